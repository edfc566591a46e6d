"""Diffusion transformers: where their blocks are, what their outputs hold, and where they end.

A U-Net's code is in the modules beside; each asks `layout_of` first, which answers None for one.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffenc.errors import ShapeError, TapError
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.runtime.threads import share_lock

Arguments = dict[str, Any]
"""Keyword arguments of a denoiser's forward pass."""


@dataclass(frozen=True, slots=True)
class TransformerLayout:
    """What there is to know of a class of transformers.

    Attributes:
        arguments: Function from the config, noisy latents, timesteps and encoded texts to the
            arguments of the forward pass.
        text_width: Field of the config that holds the channels of the text states.
        pooled_width: Field of the config that holds the channels of the pooled text; None where
            that is not read.
        needed: Fields without which a config describes no model.
        places: Pattern of the places within a block that can be read, as module paths.
        blocks: Lists of blocks, in the order in which they run.
        streams: Index of the picture's stream among several outputs, by place within a block: ""
            is the block itself.
        image_first: Whether the picture's tokens stand before the text's where one tensor holds
            both.
        cross_attention: Name of a block's cross-attention; None where text and picture are joined
            in one attention.
        joint_attention: Name of a block's attention that joins text and picture; None where there
            is none.
        packing: Side of the squares of latent cells that the denoiser is given as one token.
    """

    arguments: Callable[[Mapping[str, Any], Tensor, Tensor, PromptEmbeds], Arguments]
    text_width: str
    needed: tuple[str, ...]
    places: str
    blocks: tuple[str, ...] = ("transformer_blocks",)
    streams: Mapping[str, int] = field(default_factory=dict)
    image_first: bool = False
    cross_attention: str | None = None
    pooled_width: str | None = None
    joint_attention: str | None = None
    packing: int = 1

    @property
    def adapted(self) -> str:
        """Name of the attention in which the text has its say, and that adapters change."""
        name = self.cross_attention or self.joint_attention
        assert name is not None  # every layout has one of them
        return name

    def is_readable(self, path: str) -> bool:
        """Whether a module's output is a map of the picture."""
        blocks = "|".join(self.blocks)
        return re.fullmatch(rf"({blocks})\.\d+({self.places})?", path) is not None

    def grid(
        self, denoiser: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[int, int]:
        """Rows and columns of the picture's tokens, from the arguments of a forward pass."""
        if self.packing > 1:
            return _packed_grid(kwargs["img_ids"])
        latents = args[0] if args else kwargs["hidden_states"]
        patch = denoiser.config.patch_size
        return latents.shape[-2] // patch, latents.shape[-1] // patch

    def image_map(self, path: str, output: Any, grid: tuple[int, int]) -> Float[Tensor, "b c h w"]:
        """The picture's part of what a module gives, as a map.

        Args:
            path: Module path.
            output: Output of the module.
            grid: Rows and columns of the picture's tokens.
        """
        if isinstance(output, tuple):
            place = re.sub(r"^\w+\.\d+\.?", "", path)
            output = output[self.streams.get(place, 0)]
        if output.ndim == 4:  # a feed-forward of convolutions
            features: Tensor = output
            return features
        h, w = grid
        rows = slice(0, h * w) if self.image_first else slice(output.shape[1] - h * w, None)
        tokens: Tensor = rearrange(output[:, rows], "b (h w) c -> b c h w", h=h, w=w)
        return tokens

    def depth(self, config: Mapping[str, Any]) -> int:
        """Number of blocks."""
        return sum(int(config[_COUNTS[blocks]]) for blocks in self.blocks)

    def block(self, config: Mapping[str, Any], index: int) -> str:
        """Module path of a block by its place in the order in which blocks run."""
        for blocks in self.blocks:
            count = int(config[_COUNTS[blocks]])
            if index < count:
                return f"{blocks}.{index}"
            index -= count
        raise TapError(f"there is no block {index + self.depth(config)}")


_COUNTS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
"""Field of the config that holds the length of each list of blocks."""


def _pixart_arguments(
    config: Mapping[str, Any], noisy_latents: Tensor, timesteps: Tensor, texts: PromptEmbeds
) -> Arguments:
    rows, _, h, w = noisy_latents.shape
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    sized = config.get("use_additional_conditions")
    if sized or (sized is None and config["sample_size"] == 128):
        place: dict[str, Any] = {"dtype": noisy_latents.dtype, "device": noisy_latents.device}
        pixels = torch.tensor([[8.0 * h, 8.0 * w]], **place)  # every PixArt has a VAE of 8
        added = {
            "resolution": pixels.expand(rows, 2),
            "aspect_ratio": torch.tensor([[h / w]], **place).expand(rows, 1),
        }
    return {
        "hidden_states": noisy_latents,
        "timestep": timesteps.expand(rows),
        "encoder_hidden_states": texts.prompt_embeds,
        "encoder_attention_mask": texts.own_states(),
        "added_cond_kwargs": added,
    }


def _sana_arguments(
    config: Mapping[str, Any], noisy_latents: Tensor, timesteps: Tensor, texts: PromptEmbeds
) -> Arguments:
    rows = len(noisy_latents)
    return {
        "hidden_states": noisy_latents,
        "timestep": timesteps.expand(rows) * config.get("timestep_scale", 1.0),
        "encoder_hidden_states": texts.prompt_embeds,
        "encoder_attention_mask": texts.own_states(),
    }


def _sd3_arguments(
    config: Mapping[str, Any], noisy_latents: Tensor, timesteps: Tensor, texts: PromptEmbeds
) -> Arguments:
    patch, most = config["patch_size"], config["pos_embed_max_size"]
    if max(noisy_latents.shape[-2:]) > patch * most:
        raise ShapeError(
            f"this model has positions for {most} cells on a side, which is {8 * patch * most} "
            f"pixels, and the latents are {tuple(noisy_latents.shape[-2:])}; take a smaller size"
        )
    return {
        "hidden_states": noisy_latents,
        "timestep": timesteps.expand(len(noisy_latents)),
        "encoder_hidden_states": texts.prompt_embeds,
        "pooled_projections": texts.pooled_prompt_embeds,
    }


GUIDANCE = 3.5
"""Scale that a model with a guidance embedding is told, as its pipeline does."""


def _flux_arguments(
    config: Mapping[str, Any], noisy_latents: Tensor, timesteps: Tensor, texts: PromptEmbeds
) -> Arguments:
    rows, _, h, w = noisy_latents.shape
    device = noisy_latents.device
    place: dict[str, Any] = {"dtype": torch.float32, "device": device}
    cells = [torch.arange(side // 2, **place) for side in (h, w)]
    places = torch.cartesian_prod(*cells)
    arguments: Arguments = {
        "hidden_states": rearrange(
            noisy_latents,
            "b c (h rows) (w columns) -> b (h w) (c rows columns)",
            rows=2,
            columns=2,
        ),
        "timestep": (timesteps.to(torch.float32) / 1000).expand(rows),
        "encoder_hidden_states": texts.prompt_embeds,
        "pooled_projections": texts.pooled_prompt_embeds,
        "img_ids": torch.cat([torch.zeros_like(places[:, :1]), places], dim=1),
        "txt_ids": torch.zeros(texts.prompt_embeds.shape[1], 3, **place),
    }
    if config.get("guidance_embeds"):
        arguments["guidance"] = torch.full((rows,), GUIDANCE, **place)
    return arguments


def _packed_grid(img_ids: Tensor) -> tuple[int, int]:
    """Rows and columns of tokens, of which the last place is the lower right one."""
    if img_ids.is_meta:  # shapes are derived from squares
        side = math.isqrt(len(img_ids))
        return side, side
    _, row, column = img_ids[-1].tolist()
    return int(row) + 1, int(column) + 1


_CROSS_PLACES = r"\.attn1|\.attn2|\.attn1\.to_[qkv]|\.attn2\.to_q|\.ff"

LAYOUTS = {
    "PixArtTransformer2DModel": TransformerLayout(
        arguments=_pixart_arguments,
        text_width="caption_channels",
        needed=(
            *("num_attention_heads", "attention_head_dim", "num_layers", "in_channels"),
            *("sample_size", "patch_size", "cross_attention_dim", "caption_channels"),
        ),
        places=rf"{_CROSS_PLACES}|\.ff\.net\.0",
        cross_attention="attn2",
    ),
    "SanaTransformer2DModel": TransformerLayout(
        arguments=_sana_arguments,
        text_width="caption_channels",
        needed=(
            *("num_attention_heads", "attention_head_dim", "num_layers", "in_channels"),
            *("sample_size", "patch_size", "cross_attention_dim", "caption_channels"),
            *("num_cross_attention_heads", "cross_attention_head_dim"),
        ),
        places=_CROSS_PLACES,
        cross_attention="attn2",
    ),
    "SD3Transformer2DModel": TransformerLayout(
        arguments=_sd3_arguments,
        text_width="joint_attention_dim",
        pooled_width="pooled_projection_dim",
        needed=(
            *("num_attention_heads", "attention_head_dim", "num_layers", "in_channels"),
            *("sample_size", "patch_size", "joint_attention_dim", "pooled_projection_dim"),
            *("caption_projection_dim", "pos_embed_max_size"),
        ),
        places=r"\.attn|\.attn\.to_[qkv]|\.attn2|\.ff|\.ff\.net\.0",
        streams={"": 1, "attn": 0},
        image_first=True,
        joint_attention="attn",
    ),
    "FluxTransformer2DModel": TransformerLayout(
        arguments=_flux_arguments,
        text_width="joint_attention_dim",
        pooled_width="pooled_projection_dim",
        needed=(
            *("num_attention_heads", "attention_head_dim", "num_layers", "num_single_layers"),
            *("in_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim"),
            "axes_dims_rope",
        ),
        places=r"\.norm|\.attn|\.attn\.to_[qkv]|\.ff|\.ff\.net\.0|\.proj_mlp",
        blocks=("transformer_blocks", "single_transformer_blocks"),
        streams={"": 1, "attn": 0, "norm": 0},
        joint_attention="attn",
        packing=2,
    ),
}
"""Every class of transformers that is read."""


def layout_of(denoiser: Any) -> TransformerLayout | None:
    """The layout of a transformer; None for a U-Net.

    Args:
        denoiser: The module, or its config as JSON holds it.
    """
    if isinstance(denoiser, Mapping):
        return LAYOUTS.get(str(denoiser.get("_class_name")))
    return LAYOUTS.get(type(denoiser).__name__)


def word_for(denoiser: Any) -> str:
    """What a denoiser is called in messages: "U-Net" or "transformer".

    Args:
        denoiser: The module, or its config as JSON holds it.
    """
    return "U-Net" if layout_of(denoiser) is None else "transformer"


class _Shape(nn.Module):
    """Stands for the last layer: gives zeros of its shape, which nobody reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Zeros with the channels of the layer's output."""
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.width)


def shortened_transformer(
    denoiser: nn.Module, layout: TransformerLayout, taps: Sequence[str], copied: Any
) -> nn.Module:
    """A transformer that shares its modules with `denoiser` and ends with the last tap's block.

    Args:
        denoiser: Transformer, which is left as it is.
        layout: Its layout.
        taps: Module paths that must still be there.
        copied: Shallow copy of the transformer, which is cut.
    """
    places = [(layout.blocks.index(list_), int(index)) for list_, index in map(_block_of, taps)]
    last_list, last = max(places, default=(0, 0))  # the first block stays, to know the model by
    for place, blocks in enumerate(layout.blocks):
        whole = list(getattr(denoiser, blocks))
        kept = whole if place < last_list else whole[: last + 1] if place == last_list else []
        setattr(copied, blocks, nn.ModuleList(kept))
    if not isinstance(copied.proj_out, _Shape):  # it was cut before
        copied.proj_out = _Shape(copied.proj_out.out_features)
    share_lock(copied, denoiser)
    short: nn.Module = copied
    return short


def _block_of(tap: str) -> tuple[str, str]:
    blocks, index, *_ = tap.split(".")
    return blocks, index


def carried_grid(
    carrier: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, int]:
    """Rows and columns of the map that a module flattens to tokens, from its arguments.

    Args:
        carrier: Transformer, or a `Transformer2DModel` within a U-Net.
        args: Positional arguments of its forward pass.
        kwargs: Keyword arguments of its forward pass.
    """
    if (layout := layout_of(carrier)) is not None:
        return layout.grid(carrier, args, kwargs)
    hidden_states = args[0] if args else kwargs["hidden_states"]
    return hidden_states.shape[-2], hidden_states.shape[-1]


def transformer_attentions(
    denoiser: nn.Module, layout: TransformerLayout
) -> dict[str, tuple[nn.Module, Any]]:
    """Every cross-attention by its module path, with the module whose arguments tell the grid.

    Raises:
        TapError: Picture and text are joined in one attention.
    """
    if layout.cross_attention is None:
        raise TapError(
            f"the {type(denoiser).__name__} joins picture and text in one attention and has no "
            "cross-attention to read; score by the predicted noise (preset='diffusion-classifier', "
            "'denoising-gap' or 'self-bench'), and see words by scorer.word_maps"
        )
    return {
        f"{blocks}.{index}.{layout.cross_attention}": (
            denoiser,
            getattr(block, layout.cross_attention),
        )
        for blocks in layout.blocks
        for index, block in enumerate(getattr(denoiser, blocks))
    }
