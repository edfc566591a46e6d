"""LLaVA and LLaVA-NeXT of transformers, with a question for each image."""

from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from transformers.models.llava import modeling_llava
from transformers.models.llava_next import modeling_llava_next

from diffenc.hosts.transformers.prompted import (
    GeneratesWithPrompts,
    TakesPrompts,
    zeros_like_features,
)


class _Tiled(TakesPrompts):
    """What LLaVA-NeXT adds: images in tiles."""

    def tiles(self, arguments: dict[str, Any]) -> list[int] | None:
        """Number of tiles of each image, as the stock class counts them."""
        return _tile_counts(self.config, arguments["image_sizes"])


def _tile_counts(config: Any, image_sizes: Any) -> list[int]:
    return [
        int(
            modeling_llava_next.image_size_to_num_patches(
                image_size=size,
                grid_pinpoints=config.image_grid_pinpoints,
                patch_size=config.vision_config.image_size,
            )
        )
        for size in image_sizes
    ]


# Before transformers 4.52 there is no model inside the model.
_LlavaModel: Any = getattr(modeling_llava, "LlavaModel", None)
_LlavaNextModel: Any = getattr(modeling_llava_next, "LlavaNextModel", None)
_INNER: dict[Any, Any] = {}
if _LlavaModel is not None:

    class DiffEncLlavaModel(TakesPrompts, _LlavaModel):  # type: ignore[misc]
        """The part of LLaVA that `generate` asks for features."""

    class DiffEncLlavaNextModel(_Tiled, _LlavaNextModel):  # type: ignore[misc]
        """The part of LLaVA-NeXT that `generate` asks for features."""

    # By these names transformers 5 finds how weights are named in checkpoints.
    DiffEncLlavaModel.__name__ = _LlavaModel.__name__
    DiffEncLlavaNextModel.__name__ = _LlavaNextModel.__name__
    _INNER = {_LlavaModel: DiffEncLlavaModel, _LlavaNextModel: DiffEncLlavaNextModel}


def _exchange_inner(host: Any) -> None:
    """Let a host's inner model take prompts; it was built as the stock class."""
    inner = getattr(host, "model", None)
    if type(inner) in _INNER:
        inner.__class__ = _INNER[type(inner)]
    host.require_tower()


class DiffEncLlavaForConditionalGeneration(
    GeneratesWithPrompts,
    LlavaForConditionalGeneration,  # type: ignore[misc]
):
    """`LlavaForConditionalGeneration` on a `DiffEncModel` that reads the question.

    `forward`, `generate` and `get_image_features` take `prompt_input_ids` and
    `prompt_attention_mask`, one row for all images or one for each; `DiffEncLlavaProcessor` makes
    them. Checkpoints are those of the stock class, either way.

    Args:
        config: A `LlavaConfig` whose `vision_config` is a `DiffEncConfig`.

    Raises:
        ConfigError: The vision tower is another one.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _exchange_inner(self)


class DiffEncLlavaNextForConditionalGeneration(
    GeneratesWithPrompts,
    _Tiled,
    LlavaNextForConditionalGeneration,  # type: ignore[misc]
):
    """`LlavaNextForConditionalGeneration` on a `DiffEncModel` that reads the question.

    As `DiffEncLlavaForConditionalGeneration`; prompts are counted by images, not by tiles.

    Args:
        config: A `LlavaNextConfig` whose `vision_config` is a `DiffEncConfig`.

    Raises:
        ConfigError: The vision tower is another one.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _exchange_inner(self)

    def image_lengths(self, images: int, image_tokens: int, image_sizes: Any) -> list[int]:
        """How many tokens of the text stand for each image, as the stock class packs them."""
        owner: Any = getattr(self, "model", self)
        tokens = self.config.vision_config.num_patches
        _, lengths = owner.pack_image_features(
            zeros_like_features(_tile_counts(self.config, image_sizes), tokens),
            image_sizes,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            image_newline=torch.zeros(1, dtype=torch.float32, device="cpu"),
        )
        return [int(length) for length in lengths]
