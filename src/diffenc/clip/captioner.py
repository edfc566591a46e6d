"""An implicit captioner: what CLIP sees in a picture, as tokens that condition the U-Net.

With it an encoder needs no text. The tokens are added to those of the prompt through a gate that
begins at zero, so that training starts from exactly what the prompt alone gives.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffenc.checks.arguments import shown, whole
from diffenc.errors import BackboneError, ConfigError, OutputError
from diffenc.memory.digests import weights_mark
from diffenc.runtime.inference import lasting, make_plain
from diffenc.runtime.threads import lock_of
from diffenc.storage.names import checked_path, reason
from diffenc.storage.pretrained import (
    lasting_name,
    load_whole,
    loading,
    model_folder,
    read_name,
    stored_name,
)
from diffenc.storage.reading import read_json
from diffenc.storage.schema import checked, make
from diffenc.storage.tensors import misfits, read_tensors, write_tensors
from diffenc.storage.writing import begin_folder, write_json

_CONFIG_FILE, _WEIGHTS_FILE = "captioner.json", "captioner.safetensors"
_WIDEST = 2**20
_INSTEAD = (
    "Pass the model itself, a folder with config.json and model.safetensors, or a Hub id such as "
    "openai/clip-vit-large-patch14"
)
_MOST_LAYERS = 99
_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class ImplicitCaptioner(nn.Module):
    """CLIP's image embedding to conditioning tokens: an MLP, positions, and a gate per entry.

    What is added to the states of a prompt is tanh(gate) * (mlp(embedding) + positions). The gate
    is zero at first, so the first step moves the gate alone, and the rest from the second step on.

    Args:
        image_width: Number of channels of CLIP's image embedding.
        width: Number of channels of the text states that the U-Net reads.
        length: Number of tokens, which is the text encoder's limit.
        pooled_width: Number of channels of SDXL's pooled text, whose addition has an MLP and a gate
            of its own. None: the model reads no pooled text.
        hidden_size: Width of the hidden layers of the MLPs; None is the larger of the input and the
            output width.
        layers: Number of linear layers of an MLP, with GELU between them; ODISE has one.
        device: Device on which the weights are made, in float32; "meta" makes none.

    Raises:
        ConfigError: A width or a number below 1.

    Examples:
        >>> captioner = ImplicitCaptioner(768, 1024)
        >>> captioner(torch.zeros(2, 768))[0].shape
        torch.Size([2, 77, 1024])

    Source:
        Xu et al. 2023 (ODISE), arXiv:2303.04803, section 3.3 and its published code (positions,
        gate); an MLP as in "Multimodal Understanding using Stable Diffusion as a Task Aware Feature
        Extractor", introduction.
    """

    @lasting
    def __init__(
        self,
        image_width: int,
        width: int,
        *,
        length: int = 77,
        pooled_width: int | None = None,
        hidden_size: int | None = None,
        layers: int = 2,
        device: str | torch.device = "cpu",
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
            if value is not None or name not in ("pooled_width", "hidden_size"):
                self.options[name] = whole(name, value, least=1, most=_WIDEST)
        image_width, width, length, layers = (
            self.options[name] or 0 for name in ("image_width", "width", "length", "layers")
        )
        if layers > _MOST_LAYERS:
            raise ConfigError(f"layers must be {_MOST_LAYERS} at most, got {layers}")
        place: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.mlp = _mlp(image_width, width, hidden_size, layers, place)
        self.positions = nn.Parameter(torch.empty(length, width, **place))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.gate = nn.Parameter(torch.zeros(length, width, **place))
        if pooled_width is not None:
            self.pooled_mlp = _mlp(image_width, pooled_width, hidden_size, layers, place)
            self.pooled_gate = nn.Parameter(torch.zeros(pooled_width, **place))

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
        target = begin_folder(checked_path("a captioner", folder, error=OutputError), _CONFIG_FILE)
        content = {**self.options, "clip": None if clip is None else clip.reference(target)}
        write_tensors(target / _WEIGHTS_FILE, self.state_dict())
        write_json(target / _CONFIG_FILE, content)

    @classmethod
    @lasting
    def from_pretrained(
        cls, folder: "str | os.PathLike[str]"
    ) -> "tuple[ImplicitCaptioner, dict[str, Any]]":
        """Inverse of `save_pretrained`: the captioner, and what `ClipEmbedder.reference` told.

        Raises:
            BackboneError: The folder holds no whole captioner.
        """
        source = checked_path("a captioner", folder, error=BackboneError)
        try:
            options = read_json(source / _CONFIG_FILE)
            clip = checked(options.pop("clip"), dict[str, Any] | None, "clip") or {}
            if clip:
                make(_ClipReference, clip, "clip")
                if clip.get("name") is not None:
                    clip["name"] = read_name(clip["name"], source)
            state = read_tensors(source / _WEIGHTS_FILE, finite=True)
            # Without memory at first: a config may ask for any amount of it.
            with torch.device("meta"):
                shaped: ImplicitCaptioner = make(cls, options)
            if wrong := misfits(state, shaped.state_dict()):
                raise ConfigError(f"{len(wrong)} weights are another model's, as {wrong[0]!r}")
        except Exception as error:  # torch raises three kinds of errors for sizes beyond its own
            raise BackboneError(
                f"{source} holds no whole captioner ({_CONFIG_FILE} and {_WEIGHTS_FILE}): "
                f"{reason(error)}"
            ) from error
        captioner: ImplicitCaptioner = make(cls, options)
        captioner.load_state_dict(state)
        return captioner, clip


@dataclass(frozen=True, slots=True, kw_only=True)
class _ClipReference:
    """What `ClipEmbedder.reference` gives."""

    name: str | None
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    do_center_crop: bool
    mark: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if min(self.image_std) <= 0:
            raise ConfigError(f"clip.image_std must be above 0, got {self.image_std}")


class ClipEmbedder(nn.Module):
    """The global image embedding of a frozen CLIP, unnormalised, from pictures in [-1, 1].

    Args:
        model: A `CLIPVisionModelWithProjection` or a `CLIPModel`, whose text half is not kept.
        name: Name or folder that the model is found again by; None takes the one it was loaded by.
        processor: Image processor of the model, or the values of one; None takes OpenAI's values.

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
        make_plain(self)
        self.eval().requires_grad_(False)
        if not (
            processor is None or isinstance(processor, dict) or hasattr(processor, "image_mean")
        ):
            raise ConfigError(
                "processor must be an image processor of transformers or a dict of its values, got "
                f"{shown(processor)}"
            )
        settings = processor if isinstance(processor, dict) else getattr(processor, "__dict__", {})
        self.mean = tuple(map(float, settings.get("image_mean") or _OPENAI_MEAN))
        self.std = tuple(map(float, settings.get("image_std") or _OPENAI_STD))
        self.crops = bool(settings.get("do_center_crop", True))
        own = getattr(model.config, "_name_or_path", "") or None
        name = own if name is None else name
        self.name = None if name is None else lasting_name(name)
        config = getattr(model.config, "vision_config", model.config)
        self.size: int = config.image_size

    @classmethod
    @lasting
    def from_name(cls, name: "str | os.PathLike[str]", *, processor: Any = None) -> "ClipEmbedder":
        """Load a CLIP and the values of its preprocessing.

        Args:
            name: A folder, a Hub id, or "shapes-clip", the bundled miniature.
            processor: Image processor, or the values of one; None takes what lies beside the model.

        Raises:
            BackboneError: There is no CLIP of that name.
        """
        from transformers import CLIPVisionModelWithProjection
        from transformers.image_processing_base import ImageProcessingMixin

        label = os.fspath(checked_path("a CLIP", name, error=BackboneError))
        with loading("a CLIP", label, instead=_INSTEAD):
            source = model_folder(name)
            # The embedding is small work and remembered: no half precision, whatever the file has.
            model = load_whole(CLIPVisionModelWithProjection, label)
        if processor is None:
            with suppress(OSError):  # there is none beside it
                processor, _ = ImageProcessingMixin.get_image_processor_dict(
                    source, local_files_only=True
                )
        return cls(model, name=lasting_name(name), processor=processor)

    @property
    def width(self) -> int:
        """Channels of the embedding."""
        features: int = self.visual_projection.out_features
        return features

    def reference(self, folder: "str | os.PathLike[str]") -> dict[str, Any]:
        """Name, preprocessing and numbers of the weights, as JSON in a folder holds them."""
        name = None if self.name is None else stored_name(self.name, folder)
        values = {"image_mean": self.mean, "image_std": self.std, "do_center_crop": self.crops}
        return {"name": name, **values, "mark": weights_mark(self)}

    def forward(self, pixel_values: Float[Tensor, "b 3 size size"]) -> Float[Tensor, "b c"]:
        """Embed pictures that have CLIP's size already."""
        weight = self.visual_projection.weight
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1, 1)
            for values in (self.mean, self.std)
        )
        unit = (pixel_values + 1) / 2
        normal = (unit - mean.to(unit)) / std.to(unit)
        with lock_of(self.vision_model):
            pooled = self.vision_model(normal.to(weight.device, weight.dtype)).pooler_output
        embeds: Tensor = self.visual_projection(pooled)
        return embeds


def _mlp(
    inputs: int, outputs: int, hidden_size: int | None, layers: int, place: dict[str, Any]
) -> nn.Module:
    hidden = max(inputs, outputs) if hidden_size is None else hidden_size
    widths = [inputs, *[hidden] * (layers - 1), outputs]
    parts: list[nn.Module] = [nn.Linear(widths[0], widths[1], **place)]
    for start, end in pairwise(widths[1:]):
        parts += [nn.GELU(), nn.Linear(start, end, **place)]
    return nn.Sequential(*parts)
