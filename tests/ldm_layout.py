"""Diffusers' models written in the original layout of Stable Diffusion: the inverse of a loader.

Written from the original code's module tree (`ldm.modules`, `open_clip`), not from a converter.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_in_original_layout(state: Mapping[str, Tensor], layers_per_block: int = 2) -> State:
    """Weights of a U-Net as `model.diffusion_model` names them."""
    attends = {
        int(match[1]) for key in state if (match := re.match(r"up_blocks\.(\d+)\.attentions", key))
    }
    return {_unet_key(key, layers_per_block, attends): value for key, value in state.items()}


def _unet_key(key: str, layers: int, attends: set[int]) -> str:
    module, _, leaf = key.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    kind, _, rest = module.partition(".")
    if kind == "mid_block":
        part, index, *inner = rest.split(".")
        if part == "attentions":
            return ".".join(["middle_block.1", *inner, leaf])
        return f"middle_block.{2 * int(index)}.{_RESNET['.'.join(inner)]}.{leaf}"
    block, part, index, *inner = rest.split(".")
    place = int(block) * (layers + 1) + int(index)
    if kind == "down_blocks":
        place = int(block) * (layers + 1) + 1 + (layers if part == "downsamplers" else int(index))
        root = f"input_blocks.{place}"
        if part == "downsamplers":
            return f"{root}.0.op.{leaf}"
    else:
        place = int(block) * (layers + 1) + (layers if part == "upsamplers" else int(index))
        root = f"output_blocks.{place}"
        if part == "upsamplers":
            return f"{root}.{2 if int(block) in attends else 1}.conv.{leaf}"
    if part == "attentions":
        return ".".join([f"{root}.1", *inner, leaf])
    return f"{root}.0.{_RESNET['.'.join(inner)]}.{leaf}"


def vae_in_original_layout(state: Mapping[str, Tensor], levels: int = 4) -> State:
    """Weights of an `AutoencoderKL` as `first_stage_model` names them."""
    return dict(_vae_entry(key, value, levels) for key, value in state.items())


def _vae_entry(key: str, value: Tensor, levels: int) -> tuple[str, Tensor]:
    module, _, leaf = key.rpartition(".")
    side, _, rest = module.partition(".")
    if side in ("quant_conv", "post_quant_conv"):
        return key, value
    if rest in ("conv_in", "conv_out"):
        return key, value
    if rest == "conv_norm_out":
        return f"{side}.norm_out.{leaf}", value
    if match := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", rest):
        inner = _VAE_RESNET.get(match[2], match[2])
        return f"{side}.mid.block_{int(match[1]) + 1}.{inner}.{leaf}", value
    if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", rest):
        inner = _VAE_ATTENTION[match[1]]
        if inner != "norm" and leaf == "weight":
            value = value[:, :, None, None]  # the original's projections are convolutions
        return f"{side}.mid.attn_1.{inner}.{leaf}", value
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|(?:down|up)samplers)\.(\d)\.(.+)", rest)
    assert match is not None, key
    way, block, part, index, inner = match.groups()
    level = int(block) if way == "down" else levels - 1 - int(block)
    if part != "resnets":
        return f"{side}.{way}.{level}.{way}sample.{inner}.{leaf}", value
    return f"{side}.{way}.{level}.block.{index}.{_VAE_RESNET.get(inner, inner)}.{leaf}", value


def clip_in_original_layout(state: Mapping[str, Tensor]) -> State:
    """Weights of a `CLIPTextModel`, which the original keeps as transformers had them then."""
    return {
        key if key.startswith("text_model.") else f"text_model.{key}": value
        for key, value in state.items()
    }


def openclip_in_original_layout(state: Mapping[str, Tensor], *, extra_layer: bool = False) -> State:
    """Weights of a text model as `open_clip` names them, with fused q, k and v.

    `extra_layer` adds the last layer and the projection that Stable Diffusion 2 does not read.
    """
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    found: State = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", module):
            root = f"transformer.resblocks.{match[1]}"
            if match[2] in _CLIP_LAYER:
                found[f"{root}.{_CLIP_LAYER[match[2]]}.{leaf}"] = value
            elif match[2] == "self_attn.q_proj":
                parts = [state[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
                found[f"{root}.attn.in_proj_{leaf}"] = torch.cat(parts)
        elif module == "text_projection":
            found["text_projection"] = value.T.contiguous()
        else:
            names = {
                "embeddings.token_embedding": "token_embedding.weight",
                "embeddings.position_embedding": "positional_embedding",
                "final_layer_norm": f"ln_final.{leaf}",
            }
            found[names[module]] = value
    if extra_layer:
        width = found["positional_embedding"].shape[1]
        last = max(int(key.split(".")[2]) for key in found if key.startswith("transformer."))
        behind = f"transformer.resblocks.{last}."
        found |= {
            key.replace(behind, f"transformer.resblocks.{last + 1}."): torch.full_like(value, 9.0)
            for key, value in found.items()
            if key.startswith(behind)
        }
        found["text_projection"] = torch.full((width, width), 9.0)
        found["logit_scale"] = torch.tensor(4.6)
    return found


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + key: value for key, value in state.items()}
