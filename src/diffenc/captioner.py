"""An implicit captioner: what CLIP sees in a picture, as tokens that condition the U-Net.

With it an encoder needs no text. The tokens are added to those of the prompt through a gate that
begins at zero, so that training starts from exactly what the prompt alone gives.
"""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffenc.errors import BackboneError, ConfigError, OutputError
from diffenc.pretrained import load_whole, loading, pretrained_source

_CONFIG_FILE, _WEIGHTS_FILE = "captioner.json", "captioner.safetensors"
_INSTEAD = (
    "Pass the model itself, a folder with config.json and model.safetensors, or a Hub id such as "
    "openai/clip-vit-large-patch14"
)
_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class ImplicitCaptioner(nn.Module):
    """CLIP's image embedding to conditioning tokens: an MLP, positions, and a gate per entry.

    What is added to the states of a prompt is tanh(gate) * (mlp(embedding) + positions). The gate
    is zero at first, so the first step moves the gate alone, and the rest from the second step on.

    Args:
        image_width: Channels of CLIP's image embedding.
        width: Channels of the text states that the U-Net reads.
        length: Number of tokens: the text encoder's limit.
        pooled_width: Channels of the pooled text, for SDXL; its addition has an MLP and a gate of
            its own. None: the model reads none.
        hidden_size: Of the MLPs; None is the wider one of input and output.
        layers: Linear layers of an MLP, GELU between; ODISE has one.

    Raises:
        ConfigError: A width or a number below 1.

    Example:
        >>> captioner = ImplicitCaptioner(768, 1024)
        >>> captioner(torch.zeros(2, 768))[0].shape
        torch.Size([2, 77, 1024])

    Source:
        Xu et al. 2023 (ODISE), arXiv:2303.04803, section 3.3 and its published code (positions,
        gate); an MLP as in "Multimodal Understanding using Stable Diffusion as a Task Aware Feature
        Extractor", introduction.
    """

    def __init__(
        self,
        image_width: int,
        width: int,
        *,
        length: int = 77,
        pooled_width: int | None = None,
        hidden_size: int | None = None,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.options: dict[str, int | None] = {
            "image_width": image_width,
            "width": width,
            "length": length,
            "pooled_width": pooled_width,
            "hidden_size": hidden_size,
            "layers": layers,
        }
        for name, value in self.options.items():
            optional = value is None and name in ("pooled_width", "hidden_size")
            if not optional and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ConfigError(f"{name} must be an int of 1 or more, got {value!r}")
        self.mlp = _mlp(image_width, width, hidden_size, layers)
        self.positions = nn.Parameter(torch.empty(length, width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.gate = nn.Parameter(torch.zeros(length, width))
        if pooled_width is not None:
            self.pooled_mlp = _mlp(image_width, pooled_width, hidden_size, layers)
            self.pooled_gate = nn.Parameter(torch.zeros(pooled_width))

    def forward(
        self, image_embeds: Float[Tensor, "b c"]
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b p"] | None]:
        """What is added to the states of a prompt, and to its pooled state."""
        image_embeds = image_embeds.to(self.gate.dtype)
        tokens = self.mlp(image_embeds)[:, None] + self.positions
        pooled = None
        if self.options["pooled_width"] is not None:
            pooled = torch.tanh(self.pooled_gate) * self.pooled_mlp(image_embeds)
        return torch.tanh(self.gate) * tokens, pooled

    def save_pretrained(
        self, folder: "str | os.PathLike[str]", *, clip: "ClipEmbedder | None" = None
    ) -> None:
        """Write `captioner.json` and `captioner.safetensors`, and which CLIP it listens to.

        Raises:
            OutputError: The folder cannot be written.
        """
        target = Path(folder)
        state = {key: value.detach().contiguous() for key, value in self.state_dict().items()}
        told = {**self.options, "clip": None if clip is None else clip.reference()}
        try:
            target.mkdir(parents=True, exist_ok=True)
            (target / _CONFIG_FILE).unlink(missing_ok=True)  # without it nothing is read
            save_file(state, target / _WEIGHTS_FILE, metadata={"format": "pt"})
            partial = target / f"{_CONFIG_FILE}.partial"
            partial.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
            partial.replace(target / _CONFIG_FILE)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {target}: {error}") from error

    @classmethod
    def from_pretrained(
        cls, folder: "str | os.PathLike[str]"
    ) -> "tuple[ImplicitCaptioner, dict[str, Any]]":
        """Inverse of `save_pretrained`: the captioner, and what `ClipEmbedder.reference` told.

        Raises:
            BackboneError: The folder holds no whole captioner.
        """
        source = Path(folder)
        try:
            options = json.loads((source / _CONFIG_FILE).read_text(encoding="utf-8"))
            clip = dict(options.pop("clip") or {})
            captioner = cls(**options)
            captioner.load_state_dict(load_file(source / _WEIGHTS_FILE))
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RuntimeError,
            SafetensorError,
        ) as error:
            raise BackboneError(
                f"{source} holds no whole captioner ({_CONFIG_FILE} and {_WEIGHTS_FILE}): {error}"
            ) from error
        return captioner, clip


class ClipEmbedder(nn.Module):
    """The global image embedding of a frozen CLIP, unnormalised, from pictures in [-1, 1].

    Args:
        model: A `CLIPVisionModelWithProjection` or a `CLIPModel`, whose text half is not kept.
        name: By which it is found again; None takes the one it was loaded by.
        processor: Its image processor, or the values of one; None is OpenAI's.

    Raises:
        ConfigError: Another kind of model, or none.
    """

    def __init__(self, model: Any, *, name: str | None = None, processor: Any = None) -> None:
        super().__init__()
        if not (hasattr(model, "vision_model") and hasattr(model, "visual_projection")):
            raise ConfigError(
                "a captioner needs a CLIP with an image embedding: a CLIPVisionModelWithProjection "
                f"or CLIPModel of transformers, or its name; got {type(model).__name__}"
            )
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.eval().requires_grad_(False)
        told = processor if isinstance(processor, dict) else getattr(processor, "__dict__", {})
        self.mean = tuple(map(float, told.get("image_mean") or _OPENAI_MEAN))
        self.std = tuple(map(float, told.get("image_std") or _OPENAI_STD))
        self.crops = bool(told.get("do_center_crop", True))
        own = getattr(model.config, "_name_or_path", "") or None
        self.name = own if name is None else name
        config = getattr(model.config, "vision_config", model.config)
        self.size: int = config.image_size

    @classmethod
    def from_name(cls, name: "str | os.PathLike[str]") -> "ClipEmbedder":
        """Load a CLIP and the values of its preprocessing.

        Args:
            name: A folder, a Hub id, or "shapes-clip", the bundled miniature.

        Raises:
            BackboneError: There is no CLIP of that name.
        """
        from transformers import CLIPVisionModelWithProjection
        from transformers.image_processing_base import ImageProcessingMixin

        label = os.fspath(name)
        with loading("a CLIP", label, instead=_INSTEAD):
            source = pretrained_source(label)
            # The embedding is small work and remembered: no half precision, whatever the file has.
            model = load_whole(CLIPVisionModelWithProjection, source).float()
        try:
            processor, _ = ImageProcessingMixin.get_image_processor_dict(source)
        except OSError:
            processor = None
        return cls(model, name=label, processor=processor)

    @property
    def width(self) -> int:
        """Channels of the embedding."""
        features: int = self.visual_projection.out_features
        return features

    def reference(self) -> dict[str, Any]:
        """Name and preprocessing, as JSON holds them."""
        values = {"image_mean": self.mean, "image_std": self.std, "do_center_crop": self.crops}
        return {"name": self.name, **values}

    def forward(self, pixel_values: Float[Tensor, "b 3 size size"]) -> Float[Tensor, "b c"]:
        """Embed pictures that have CLIP's size already."""
        weight = self.visual_projection.weight
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        unit = (pixel_values + 1) / 2
        normal = (unit - mean.to(unit)) / std.to(unit)
        pooled = self.vision_model(normal.to(weight.device, weight.dtype)).pooler_output
        embeds: Tensor = self.visual_projection(pooled)
        return embeds


def _mlp(inputs: int, outputs: int, hidden_size: int | None, layers: int) -> nn.Module:
    hidden = max(inputs, outputs) if hidden_size is None else hidden_size
    widths = [inputs, *[hidden] * (layers - 1), outputs]
    parts: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for start, end in pairwise(widths[1:]):
        parts += [nn.GELU(), nn.Linear(start, end)]
    return nn.Sequential(*parts)
