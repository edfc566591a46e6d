"""Models of open_clip as baselines, among them those of DFN, MetaCLIP and EVA."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffenc._optional import require
from diffenc.errors import BackboneError, MissingExtraError
from diffenc.evals.matching.matchers import short_name, weights_digest
from diffenc.evals.matching.sizes import tower_sizes
from diffenc.storage.hub import hub_folder
from diffenc.storage.names import expanded, is_file, is_folder, reason
from diffenc.storage.pretrained import loading

CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_SMALL = (".json", ".txt", ".model")
_PRECISIONS = {torch.float32: "fp32", torch.float16: "pure_fp16", torch.bfloat16: "pure_bf16"}
_INSTEAD = (
    f"Pass a folder with {CONFIG} and {_WEIGHTS[0]}, or a Hub id such as "
    "timm/eva_giant_patch14_clip_224.laion400m_s11b_b41k"
)


class OpenClipMatcher:
    """A model of open_clip in an evaluation; it has no noise, so one trial is enough.

    Args:
        model: Model of open_clip, with `encode_image`, `encode_text` and `logit_scale`.
        tokenizer: Tokenizer of the model, with a `context_length`.
        transform: Function from a picture to pixel values, as open_clip makes it.
        name: Name of the model in tables.
    """

    deterministic = True

    def __init__(self, model: Any, tokenizer: Any, transform: Any, *, name: str) -> None:
        self.model, self.tokenizer, self.transform = model.eval(), tokenizer, transform
        self.name = name
        self.parameters = tower_sizes(model, model.visual)
        self._first = next(model.parameters())
        self.description: Mapping[str, Any] = {
            "kind": f"open_clip {type(model).__name__}",
            "model": name,
            "weights": weights_digest([("open_clip", model)]),
            "dtype": str(self._first.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_pretrained(
        cls,
        name: "str | os.PathLike[str]",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "OpenClipMatcher":
        """Load model, tokenizer and transform.

        Args:
            name: Path of a folder in the layout of open_clip's models on the Hub, or a Hub id.
            device: Device that the model runs on.
            dtype: Floating point type of the weights.

        Raises:
            BackboneError: There is no such model, or its weights are pickled.
            MissingExtraError: open_clip is not installed.
        """
        label = os.fspath(name)
        open_clip = _open_clip()
        with loading("a model of open_clip", label, instead=_INSTEAD):
            source = f"local-dir:{open_clip_folder(label)}"
            model, transform = open_clip.create_model_from_pretrained(
                source, device=device, precision=_PRECISIONS[dtype]
            )
            tokenizer = open_clip.get_tokenizer(source)
        return cls(model, tokenizer, transform, name=short_name(label))

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], texts: Sequence[str], *, seed: int = 0
    ) -> Tensor:
        """Logits, (images, texts), in float32."""
        device, dtype = self._first.device, self._first.dtype
        pixel_values = torch.stack([self.transform(image) for image in images])
        pictures = self.model.encode_image(pixel_values.to(device, dtype), normalize=True)
        statements = self.model.encode_text(self.tokenizer(list(texts)).to(device), normalize=True)
        logits = self.model.logit_scale.exp() * pictures @ statements.T
        bias = getattr(self.model, "logit_bias", None)
        scores: Tensor = (logits if bias is None else logits + bias).float().cpu()
        return scores

    def truncated(self, texts: Sequence[str]) -> Sequence[int]:
        """Number of tokens of each text that exceed the model's limit and are not read."""
        return [max(0, self._length(text) - self.tokenizer.context_length) for text in texts]

    def _length(self, text: str) -> int:
        inner = getattr(self.tokenizer, "tokenizer", None)  # one of transformers
        if inner is not None:
            return len(inner(self.tokenizer.clean_fn(text))["input_ids"])
        return len(self.tokenizer.encode(text)) + 2  # it is put between start and end


def open_clip_folder(name: str) -> Path:
    """The folder of a model of open_clip, fetched from the Hub where needed.

    Raises:
        BackboneError: It holds no such model, or pickled weights alone.
        Exception: The Hub's own, where it has no such model.
    """
    path = expanded(name)
    if is_folder(path):
        folder = path
    else:
        folder = hub_folder(
            name,
            lambda file: "/" not in file and file.endswith(_SMALL),
            lambda _, listing: [file for file in _WEIGHTS if file in listing][:1],
        )
    if not is_file(folder / CONFIG):
        raise BackboneError(
            f"{folder} holds no model of open_clip: {CONFIG} is missing. {_INSTEAD}"
        )
    if not any(is_file(folder / file) for file in _WEIGHTS):
        raise BackboneError(
            f"{folder} has no {_WEIGHTS[0]}: other formats of weights can run code when they are "
            "opened. Convert them first, see the guide to evaluation"
        )
    return folder


def _open_clip() -> Any:
    """The library, which needs a torchvision that fits torch.

    Raises:
        MissingExtraError: It is not installed.
        BackboneError: It cannot be imported.
    """
    try:
        return require("open_clip", extra="open-clip")
    except MissingExtraError:
        raise
    except Exception as error:  # torchvision raises whatever a foreign torch makes it raise
        raise BackboneError(
            f"open_clip cannot be imported: {reason(error)}; it needs a torchvision that was built "
            "for this torch"
        ) from error
