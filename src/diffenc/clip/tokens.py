"""Patch tokens of CLIP and SigLIP, the vision models of transformers, from pictures of any kind."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from diffenc.checks.arguments import shown, whole
from diffenc.checks.fields import require_finite
from diffenc.clip.vision_models import VisionModel, process, to_pictures
from diffenc.errors import BackboneError, ConfigError, ShapeError
from diffenc.inputs.images import Images
from diffenc.memory.cache import TensorCache, content_key, recall, state_key
from diffenc.memory.object_watch import free_to_swap
from diffenc.runtime.inference import lasting, make_plain
from diffenc.runtime.threads import lock_of
from diffenc.storage.names import checked_path
from diffenc.storage.pretrained import (
    lasting_name,
    load_image_processor,
    load_whole,
    loading,
    model_kind,
)

_VISION = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
_TAKEN = (
    "taken are CLIPVisionModel, CLIPModel, SiglipVisionModel and SiglipModel of transformers, "
    "whose patches form a square grid"
)
_INSTEAD = (
    "Pass a folder with config.json, model.safetensors and preprocessor_config.json, or a Hub id "
    "such as openai/clip-vit-large-patch14-336"
)
_CACHE_BYTES = 256 * 2**20
_BEHIND_LAYERS = ("post_layernorm", "head")


class ClipTokens(VisionModel):
    """Tokens of the patches of one hidden layer, without the class token.

    Args:
        model: A `CLIPVisionModel`, `CLIPModel`, `SiglipVisionModel` or `SiglipModel`; only the
            vision part of a whole model is used.
        image_processor: Image processor of the model.
        layer: Index of the hidden state that is read; -2, the penultimate, is LLaVA's.
        frozen: Whether nothing is trained. Otherwise the weights that run before `layer` are, and
            no others.
        name: Name or path that the model was loaded from; None for an object, and for a model that
            trains.
        use_cache: Whether to remember the tokens of pictures while the model is frozen.

    Attributes:
        side: Number of patches per side of the square.

    Raises:
        ConfigError: Another kind of model, one without a square grid, or no such layer.
    """

    def __init__(
        self,
        model: nn.Module,
        image_processor: Any,
        *,
        layer: int = -2,
        frozen: bool = True,
        name: str | None = None,
        use_cache: bool = True,
    ) -> None:
        super().__init__()
        if not callable(image_processor):
            raise ConfigError(
                f"image_processor must be an image processor of transformers, got "
                f"{shown(image_processor)}"
            )
        self.model = _vision_part(model)
        make_plain(self.model)
        self.image_processor = image_processor
        self.layer, self.frozen, self.name = layer, frozen, name
        self.use_cache = use_cache
        config: Any = self.model.config
        self.hidden_size = config.hidden_size
        self.image_size, self.side = _square(config)
        depth = config.num_hidden_layers
        self.layer = layer = whole("layer", layer)
        if not -depth <= layer + 1 <= depth + 1:
            raise ConfigError(
                f"layer must be {-depth - 1} to {depth}, an index into the embeddings and the "
                f"outputs of this model's {depth} layers, got {shown(layer)}"
            )
        self._cache = TensorCache(_CACHE_BYTES)
        self.model.eval()
        self.freeze(frozen)

    @classmethod
    @lasting
    def from_pretrained(
        cls,
        name: "str | os.PathLike[str]",
        *,
        image_processor: Any = None,
        layer: int = -2,
        frozen: bool = True,
        use_cache: bool = True,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "ClipTokens":
        """Load a vision model and its image processor.

        Args:
            name: Name of the model: a folder, a Hub id, or "shapes-clip", the bundled miniature.
            image_processor: Replacement for the model's own image processor; None loads that.
            layer: Index of the hidden state that is read; see the class for this and the next two.
            frozen: Whether nothing is trained.
            use_cache: Whether to remember the tokens of pictures.
            device: Device of the model.
            dtype: Floating point type of the weights.

        Raises:
            BackboneError: There is no such model, or it is of another kind.
        """
        import transformers

        label = os.fspath(checked_path("a CLIP", name, error=BackboneError))
        with loading("a CLIP", label, instead=_INSTEAD):
            model_type = model_kind(name)
            kind = model_type.removesuffix("_vision_model")
            if kind not in _VISION:
                raise BackboneError(f"{label!r} is of the kind {model_type!r}; {_TAKEN}")
            model = load_whole(getattr(transformers, _VISION[kind]), label, dtype=dtype)
            if image_processor is None:
                image_processor = load_image_processor(label)
        return cls(
            model.to(device),
            image_processor,
            layer=layer,
            frozen=frozen,
            name=lasting_name(name),
            use_cache=use_cache,
        )

    def freeze(self, frozen: bool = True) -> None:
        """Train nothing, or what runs before `layer`, and no more.

        What has been trained is no longer found by its name: `name` is None from then on.
        """
        self.frozen = frozen
        self.model.requires_grad_(False)
        if frozen:
            self.model.eval()
            return
        self.name = None
        for parameter in self._parameters_read():
            parameter.requires_grad_(True)

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the patches."""
        return self.side, self.side

    def clear_cache(self) -> None:
        """Forget tokens; needed after writes through `.data`."""
        self._cache.clear()

    def forward(self, images: Images, *, batch_size: int | None = None) -> Float[Tensor, "b n c"]:
        """Tokens of pictures, row by row.

        Args:
            images: Pictures of any kind, see `diffenc.inputs.images.to_pixel_values`; the image
                processor sees them at their own size, in 8 bits.
            batch_size: Largest number of pictures per call of the model; None is all at once.

        Raises:
            ImageError: A picture cannot be read.
            ShapeError: The image processor gives another size than the model takes, or the model
                another number of tokens than its patches.
            NonFiniteError: NaN or infinity in the tokens.
        """
        pixel_values = self._process(to_pictures(images))
        state = state_key(self.model) if self.use_cache else None
        if state is None:
            return self._tokens(pixel_values, batch_size)
        entries = recall(
            self._cache,
            [(state, self.layer, content_key(picture)) for picture in pixel_values],
            lambda rows: ((tokens,) for tokens in self._tokens(pixel_values[rows], batch_size)),
        )
        return torch.stack([tokens for (tokens,) in entries])

    def train(self, mode: bool = True) -> "ClipTokens":
        """Training mode; a frozen model stays in evaluation mode, so that it is remembered."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def save_pretrained(self, folder: "str | os.PathLike[str]") -> None:
        """Write model and image processor in transformers' own layout."""
        self.model.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def _process(self, pictures: list[Image.Image]) -> Float[Tensor, "b 3 height width"]:
        pixel_values = process(self.image_processor, pictures)["pixel_values"]
        if tuple(pixel_values.shape[-2:]) != (self.image_size, self.image_size):
            raise ShapeError(
                f"the image processor gives {tuple(pixel_values.shape[-2:])} pixels and the model "
                f"takes {(self.image_size, self.image_size)}; pass the image processor that "
                "belongs to the model"
            )
        return pixel_values

    def _tokens(self, pixel_values: Tensor, batch_size: int | None) -> Float[Tensor, "b n c"]:
        trained = any(parameter.requires_grad for parameter in self.model.parameters())
        grad = torch.is_grad_enabled() and trained
        with lock_of(self.model), torch.set_grad_enabled(grad):
            parts = [
                self.model(part.to(self.device, self.dtype), output_hidden_states=True)
                for part in pixel_values.split(batch_size or len(pixel_values))
            ]
            tokens = torch.cat([part.hidden_states[self.layer] for part in parts])
        expected = self.side**2
        if tokens.shape[1] not in (expected, expected + 1):
            raise ShapeError(
                f"the model gives {tokens.shape[1]} tokens for {self.side} x {self.side} patches; "
                f"its grid cannot be matched, {expected} tokens can, or {expected + 1} with a "
                "class token"
            )
        require_finite(tokens, f"tokens of layer {self.layer} of CLIP", "try float32 or bfloat16")
        return tokens[:, -expected:]

    def _parameters_read(self) -> Iterator[nn.Parameter]:
        """What the layer depends on: a parameter without a gradient stops DDP."""
        runs = self.layer % (self.model.config.num_hidden_layers + 1)
        layers = next(
            (name, module)
            for name, module in self.model.named_modules()
            if name.endswith("encoder.layers")
        )
        behind = {id(p) for layer in layers[1][runs:] for p in layer.parameters()}
        for path, parameter in self.model.named_parameters():
            parts = path.split(".")
            if id(parameter) not in behind and not any(name in parts for name in _BEHIND_LAYERS):
                yield parameter

    def _apply(self, fn: Any, recurse: bool = True) -> "ClipTokens":
        self.clear_cache()  # another device or dtype
        free_to_swap([self.model])
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def to_maps(tokens: Float[Tensor, "b n c"], grid: tuple[int, int]) -> Float[Tensor, "b c h w"]:
    """Tokens, row by row, as a map."""
    maps: Tensor = rearrange(tokens, "b (h w) c -> b c h w", h=grid[0], w=grid[1])
    return maps


def _vision_part(model: nn.Module) -> nn.Module:
    """The vision model, able to save itself."""
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    kind = str(model_type).removesuffix("_vision_model").removesuffix("_vision_transformer")
    if kind not in _VISION:
        raise ConfigError(f"clip is of the kind {model_type!r}; {_TAKEN}")
    if model_type != kind:
        return model
    part: nn.Module = model.vision_model  # type: ignore[assignment]
    if hasattr(part, "save_pretrained"):
        return part
    import transformers

    with torch.device("meta"):  # in transformers 4 the part is no model of its own: give it one
        whole: nn.Module = getattr(transformers, _VISION[kind])(part.config)
    whole.vision_model = part
    return whole


def _square(config: Any) -> tuple[int, int]:
    """Side of the picture in pixels, and of the grid in patches."""
    size, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    if not isinstance(size, int) or not isinstance(patch, int) or size < patch:
        raise ConfigError(
            f"the grid of this model cannot be matched: image_size={size!r}, patch_size={patch!r}. "
            "Square grids can, which take ints: image_size 336 with patch_size 14 is 24 x 24"
        )
    return size, size // patch
