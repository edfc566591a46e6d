"""Prismatic VLMs on a diffusion encoder.

Their training loop passes fixed names only, and `pixel_values` may be a mapping of tensors that it
stacks per key. The prompt travels there, in the shape of an image: samples without a picture get
one image-shaped tensor of zeros for every key, which reads as the null prompt.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffenc.errors import ConfigError, PromptError, ShapeError
from diffenc.hosts.prompts import PromptTokens, current_scope, prompt_scope
from diffenc.hosts.spec import TowerSpec
from diffenc.hosts.tower import DiffusionVisionTower

PIXELS, PROMPT = "pixel_values", "prompt"
_BASE = 128  # digits below it survive bfloat16


class PrismaticBackbone(nn.Module):
    """A vision backbone with the contract of prismatic-vlms.

    Args:
        vision_backbone_id: Name that the tower is registered by, or a spec.
        image_resize_strategy: Way in which pictures are brought to a square: "resize-naive" ignores
            the aspect ratio, "resize-crop" keeps the middle, "letterbox" pads with grey.
        default_image_size: Side of the pictures in pixels; None is the spec's.
        spec: Spec of the tower; None reads it from the id.

    Raises:
        ConfigError: The spec does not parse, its size is another one, or the strategy is unknown.
    """

    def __init__(
        self,
        vision_backbone_id: str,
        image_resize_strategy: str = "resize-naive",
        default_image_size: int | None = None,
        *,
        spec: str | None = None,
    ) -> None:
        super().__init__()
        rules = {"resize-naive": "squash", "resize-crop": "crop", "letterbox": "pad"}
        if image_resize_strategy not in rules:
            raise ConfigError(
                f"image_resize_strategy must be one of {list(rules)}, got {image_resize_strategy!r}"
            )
        self.identifier = vision_backbone_id
        self.image_resize_strategy = image_resize_strategy
        self.featurizer = DiffusionVisionTower(spec or vision_backbone_id)
        side = self.featurizer.image_size
        if default_image_size not in (None, side):
            raise ConfigError(
                f"default_image_size is {default_image_size} and the spec's size is {side}; put "
                f"size={default_image_size} into the spec"
            )
        self.default_image_size = side
        self.image_transform = PrismaticTransform(self.featurizer, rules[image_resize_strategy])
        self.dtype = torch.bfloat16

    def get_image_transform(self) -> Callable[..., dict[str, Tensor]]:
        """Pictures to `pixel_values`."""
        return self.image_transform

    def get_fsdp_wrapping_policy(self) -> Callable[..., bool]:
        """Shards nothing by itself: the frozen model is hidden, and the adapter stays whole."""
        from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

        return functools.partial(lambda_auto_wrap_policy, lambda_fn=_nothing)

    @property
    def default_image_resolution(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return (3, self.default_image_size, self.default_image_size)

    @property
    def embed_dim(self) -> int:
        """Channels of a token."""
        return self.featurizer.hidden_size

    @property
    def num_patches(self) -> int:
        """Tokens of an image."""
        return self.featurizer.num_patches

    @property
    def half_precision_dtype(self) -> torch.dtype:
        """What the training loop casts to."""
        return torch.bfloat16

    def forward(
        self, pixel_values: "Tensor | Mapping[str, Tensor]"
    ) -> Float[Tensor, "b tokens channels"]:
        """Tokens of pictures under the prompts that travel with them.

        Args:
            pixel_values: Output of the transform: a mapping with "pixel_values" and "prompt", or
                pictures alone.

        Raises:
            ShapeError: A mapping without pictures.
        """
        if isinstance(pixel_values, Tensor):
            features: Tensor = self.featurizer(pixel_values)
            return features
        if PIXELS not in pixel_values:
            raise ShapeError(f"pixel_values must hold {PIXELS!r}, got {sorted(pixel_values)}")
        packed = pixel_values.get(PROMPT)
        tokens = None if packed is None else unpack_prompts(packed, self.featurizer)
        prompted: Tensor = self.featurizer(pixel_values[PIXELS], tokens)
        return prompted


def _nothing(module: nn.Module) -> bool:
    return False


class PrismaticTransform:
    """Converts a picture to tensors of one shape; the prompt is that of the `prompt_scope`.

    Args:
        tower: Tower whose image processor and tokenizer are used.
        resize: Way in which pictures are brought to the tower's size, see `EncoderConfig.resize`.
    """

    def __init__(self, tower: DiffusionVisionTower, resize: str) -> None:
        from diffenc.hosts.image_processor import TowerImageProcessor

        self._process = TowerImageProcessor(tower.image_size, resize)  # type: ignore[arg-type]
        self._tokenizer = tower.tokenizer

    def __call__(self, image: Any, prompt: str | None = None, **ignored: Any) -> dict[str, Tensor]:
        """Both tensors of one picture.

        Args:
            image: A PIL image.
            prompt: Prompt of the picture; None takes the scope's.
            ignored: Further arguments that the host passes; ignored.
        """
        pixel_values = self._process.preprocess(image, return_tensors="pt")[PIXELS][0]
        scope = current_scope()
        chosen = prompt if prompt is not None or scope is None else scope.prompts
        if chosen is None:
            return {PIXELS: pixel_values, PROMPT: torch.zeros_like(pixel_values)}
        tokens = self._tokenizer(chosen).rows(1)
        return {PIXELS: pixel_values, PROMPT: pack_prompts(tokens, pixel_values.shape[-1])[0]}


def pack_prompts(tokens: PromptTokens, side: int) -> Float[Tensor, "n 3 side side"]:
    """Prompts in the shape of images, as digits that half precision keeps; zeros are the null one.

    Raises:
        PromptError: The images are too small to hold them.
    """
    count, length = tokens.ids.shape
    room = 3 * side * side
    if 4 * length > room:
        raise PromptError(f"images of {side} pixels hold no prompts of {length} tokens")
    digits = [tokens.ids // _BASE**place % _BASE for place in range(3)]
    values = torch.cat([*digits, tokens.mask], dim=1).float()
    packed = torch.zeros(count, room, dtype=torch.float32, device="cpu")
    packed[:, : 4 * length] = values
    return packed.reshape(count, 3, side, side)


def unpack_prompts(
    packed: Float[Tensor, "n 3 side side"], tower: DiffusionVisionTower
) -> PromptTokens:
    """Inverse of `pack_prompts`."""
    null = tower.tokenize(tower.spec.null)
    length = null.ids.shape[1]
    values = packed.flatten(1)[:, : 4 * length].round().long().cpu()
    low, middle, high, mask = values.split(length, dim=1)
    ids = low + _BASE * middle + _BASE**2 * high
    prompted = mask.sum(dim=1, keepdim=True) > 0
    null_mask = null.mask if tower.spec.null else torch.zeros_like(null.mask)
    return PromptTokens(
        torch.where(prompted, ids, null.ids), torch.where(prompted, mask, null_mask)
    )


def register(specs: Mapping[str, str], package: str = "prismatic") -> None:
    """Add towers to prismatic's registry of vision backbones.

    Args:
        specs: Specs by id, such as ``{"diffenc-sdxl": "diffenc:sdxl?t=50"}``.
        package: Name of prismatic's top-level module.

    Raises:
        ConfigError: The package is not there, or a spec does not parse.
    """
    for spec in specs.values():
        TowerSpec.parse(spec)
    try:
        registry = importlib.import_module(f"{package}.models.materialize").VISION_BACKBONES
    except Exception as error:  # its own code runs here
        raise ConfigError(f"cannot reach {package}.models.materialize: {error!r}") from error
    for name, spec in specs.items():
        registry[name] = {"cls": PrismaticBackbone, "kwargs": {"spec": spec}}


__all__ = [
    "PrismaticBackbone",
    "PrismaticTransform",
    "pack_prompts",
    "prompt_scope",
    "register",
    "unpack_prompts",
]
