"""A backbone as part of a checkpoint: built from configs, recognised when its weights came.

Hosts build models without weights and fill in what a checkpoint has; what it lacks is left
uninitialised or random. A list of one value per weight, saved beside them, shows whether they are
the weights that were saved.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from diffenc.denoiser.shortening import shortened
from diffenc.errors import BackboneError, PromptError
from diffenc.hosts.transformers.configuration import DiffEncConfig
from diffenc.inputs.prompts import tokenize
from diffenc.models import Backbone
from diffenc.models.building import build_part
from diffenc.models.families import make_backbone
from diffenc.models.memory_format import arrange
from diffenc.models.schedules import make_scheduler


class StoredTokens:
    """Stand-in for a tokenizer that a checkpoint does not hold; knows only the empty prompts.

    Args:
        texts: Texts of the empty prompts; the first is the empty text.
        ids: Token ids of the texts, padded, one row each.
        size: Number of entries of the vocabulary.
    """

    def __init__(self, texts: Sequence[str], ids: Int[Tensor, "texts l"], size: int) -> None:
        self._rows = dict(zip(texts, ids.tolist(), strict=True))
        self._size = size
        self.model_max_length = ids.shape[1]
        self.pad_token_id = self._rows[""][-1]
        self.pad_token = None

    def __len__(self) -> int:
        return self._size

    def __call__(self, text: str | Sequence[str], **options: Any) -> Any:
        """Stored tokens, under `input_ids`; other arguments of tokenizers have no effect.

        Raises:
            PromptError: The text is not among them.
        """
        from transformers import BatchEncoding

        texts = [text] if isinstance(text, str) else list(text)
        if unknown := [each for each in texts if each not in self._rows]:
            raise PromptError(
                f"a tower loaded from a checkpoint has no tokenizer for {unknown[0]!r}; pass "
                "prompt_input_ids and prompt_attention_mask, as DiffEncLlavaProcessor makes them"
            )
        rows = [self._rows[each] for each in texts]
        as_tensor = options.get("return_tensors") == "pt"
        return BatchEncoding(
            {"input_ids": torch.tensor(rows, dtype=torch.long, device="cpu") if as_tensor else rows}
        )


def empty_texts(null: str) -> tuple[str, str]:
    """The texts that may stand for no prompt: the empty one, and a spec's null prompt."""
    return "", null


def empty_ids(backbone: Any, null: str) -> Int[Tensor, "tokenizers 2 l"]:
    """Tokens of `empty_texts`, per tokenizer of a backbone."""
    rows = []
    for name in ("tokenizer", "tokenizer_2"):
        if (tokenizer := getattr(backbone, name, None)) is not None:
            rows.append(tokenize(tokenizer, empty_texts(null))[0])
    return torch.stack(rows)


def store_tokens(backbone: Any, null: str, ids: Int[Tensor, "tokenizers 2 l"]) -> None:
    """Give a backbone tokenizers that know `empty_texts`, inverse of `empty_ids`."""
    for name, rows in zip(("tokenizer", "tokenizer_2"), ids.cpu(), strict=False):
        encoder = getattr(backbone, name.replace("tokenizer", "text_encoder"))
        texts = empty_texts(null)
        setattr(backbone, name, StoredTokens(texts, rows, encoder.config.vocab_size))


def count_tokens(backbone: Any) -> tuple[int, int, int]:
    """Shape of what `empty_ids` returns, by the text encoders."""
    encoders = [part for name, part in backbone.parts().items() if name.startswith("text")]
    return len(encoders), 2, int(encoders[0].config.max_position_embeddings)


def build_backbone(config: DiffEncConfig) -> Backbone:
    """A backbone of a config's parts, without their weights.

    It may be built on the meta device, where hosts build; the schedule has its values even there.
    """
    spec, architecture = config.tower_spec, config.tower_spec.architecture
    parts: dict[str, Any] = {}
    for name, values in architecture.configs.items():
        if name == "scheduler":
            with torch.device("cpu"):
                parts[name] = make_scheduler(values)
            continue
        parts[name] = build_part(name, values, architecture.family)
        if name == "unet" and spec.cut:
            parts[name] = shortened(parts[name], [tap.name for tap in spec.tap_infos])
        if name.startswith("text_encoder"):
            tokenizer = name.replace("text_encoder", "tokenizer")
            length = parts[name].config.max_position_embeddings
            nothing = torch.zeros(2, length, dtype=torch.long, device="cpu")
            texts = empty_texts(spec.null)
            parts[tokenizer] = StoredTokens(texts, nothing, parts[name].config.vocab_size)
    for part in ("unet", "vae"):  # not to be initialised by hosts, which transformers 4 has do it
        for module in parts[part].modules():
            module._is_hf_initialized = True
    # Nothing is moved: hosts have weights on the meta device, and buffers there or not.
    backbone = make_backbone(spec.model, architecture, parts)
    return backbone if backbone.device.type == "meta" else arrange(backbone)


def mark(backbone: nn.Module) -> Tensor:
    """The first value of each weight, as the bits of a float32, which no host casts."""
    firsts = [weight.detach().flatten()[:1].float().cpu() for _, weight in _weights(backbone)]
    return torch.cat(firsts).view(torch.int32)


def count_weights(backbone: nn.Module) -> int:
    """Length of what `mark` returns."""
    return len(_weights(backbone))


def check_marks(backbone: nn.Module, marks: Tensor) -> None:
    """Raise unless the weights are those that were marked, up to rounding.

    Raises:
        BackboneError: Some are not: the checkpoint lacked them.
    """
    weights = _weights(backbone)
    saved = marks.cpu().view(torch.float32)
    own_marks = mark(backbone).view(torch.float32)
    same = torch.isclose(own_marks, saved, rtol=2e-2, atol=1e-6)
    if marks.any() and same.all():
        return
    strange = [path for (path, _), right in zip(weights, same.tolist(), strict=True) if not right]
    raise BackboneError(
        f"the checkpoint lacked weights of the diffusion model: {len(strange) or len(weights)} of "
        f"{len(weights)}, such as {(strange or [weights[0][0]])[0]!r}. Load them with "
        "load_backbone(), which takes the spec's model or a source, or save the checkpoint anew "
        "after include_backbone()"
    )


def _weights(backbone: nn.Module) -> list[tuple[str, Tensor]]:
    """Weights by their names without adapters, in an order that does not depend on these."""
    plain = {
        path.replace(".base_layer.", "."): weight
        for path, weight in backbone.named_parameters(remove_duplicate=False)
        if ".lora_" not in path
    }
    return sorted(plain.items())


def hide_adapter(state: dict[str, Any], prefix: str) -> None:
    """Rename a state dict's keys under a prefix to those of a backbone without LoRA, in place."""
    for key in [key for key in state if key.startswith(prefix)]:
        if ".lora_" in key:
            del state[key]
        elif ".base_layer." in key:
            state[key.replace(".base_layer.", ".")] = state.pop(key)


def show_adapter(state: dict[str, Any], prefix: str, backbone: nn.Module) -> None:
    """Inverse of `hide_adapter`, for a backbone that has LoRA now, in place."""
    for path, weight in backbone.state_dict().items():
        if ".base_layer." in path:
            plain = prefix + path.replace(".base_layer.", ".")
            if plain in state:
                state[prefix + path] = state.pop(plain)
        elif ".lora_" in path:
            state.setdefault(prefix + path, weight)
