"""Models of transformers whose `forward` and `generate` take a prompt for each image.

Stock classes hand what they do not know to the language model, which drops it. A class made with
`TakesPrompts` names the prompts in its signatures and opens a scope for them inside the call, where
its tower finds them; that works under PEFT, in threads and in every version of transformers.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from diffenc.errors import ConfigError, PromptError
from diffenc.hosts.prompts import (
    Prompts,
    PromptTokens,
    current_scope,
    like_a_prompt,
    prompt_scope,
)
from diffenc.hosts.transformers.modeling import DiffEncModel

PROMPT_ARGUMENTS = ("prompt_input_ids", "prompt_attention_mask")
_OF_GENERATION = (
    "prompt_lookup_num_tokens",
    *("negative_prompt_ids", "negative_prompt_attention_mask"),
)
"""Options of transformers' `generate` that are named like a prompt."""
_PER_IMAGE = ("pixel_values", "image_sizes", *PROMPT_ARGUMENTS)


def _forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A class's `forward`, with prompts as named arguments."""

    @functools.wraps(stock)
    def forward(
        self: Any,
        *args: Any,
        prompt_input_ids: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        refuse_other_names(kwargs)
        tokens = _as_tokens(prompt_input_ids, prompt_attention_mask)
        if tokens is None:
            return stock(self, *args, **kwargs)
        _check_use(tokens, _named(stock, self, args, kwargs))
        with prompt_scope(tokens, per="image"):
            return stock(self, *args, **kwargs)

    return _signed(forward, stock)


def _image_features(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A class's `get_image_features`, with prompts as named arguments."""

    @functools.wraps(stock)
    def get_image_features(
        self: Any,
        *args: Any,
        prompt_input_ids: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        refuse_other_names(kwargs)
        scope = current_scope()
        prompts: Prompts | None = _as_tokens(prompt_input_ids, prompt_attention_mask)
        if prompts is None and scope is not None:
            prompts = scope.prompts
        if prompts is not None and "vision_tower" in self._modules:
            tiles = self.tiles(_named(stock, self, args, kwargs))
            if tiles is not None:
                prompts = spread(self.vision_tower.tower.tokenize(prompts), tiles)
        if prompts is None:
            return stock(self, *args, **kwargs)
        with prompt_scope(prompts, per="image"):
            return stock(self, *args, **kwargs)

    return _signed(get_image_features, stock)


def refuse_other_names(arguments: Mapping[str, Any]) -> None:
    """Raise where prompts come under a name that stock classes would drop without a word.

    Raises:
        PromptError: An argument is none of `PROMPT_ARGUMENTS` and named like a prompt.
    """
    for name in arguments:
        if like_a_prompt(name) and name not in (*PROMPT_ARGUMENTS, *_OF_GENERATION):
            raise PromptError(
                f"unknown argument {name!r}; pass prompts as {' and '.join(PROMPT_ARGUMENTS)}, "
                "which DiffEncLlavaProcessor makes of prompts=[...]"
            )


def spread(tokens: PromptTokens, tiles: Sequence[int]) -> PromptTokens:
    """Prompts of images as prompts of their tiles."""
    rows = tokens.rows(len(tiles))
    return rows.take([image for image, count in enumerate(tiles) for _ in range(count)])


def _as_tokens(ids: Tensor | None, mask: Tensor | None) -> PromptTokens | None:
    if ids is None and mask is None:
        return None
    if ids is None or mask is None:
        raise PromptError("prompt_input_ids and prompt_attention_mask go together; got one of them")
    return PromptTokens(ids, mask)


def _check_use(tokens: PromptTokens, arguments: dict[str, Any]) -> None:
    """Raise where prompts would be dropped: nothing is left for a tower to do."""
    if not len(tokens):
        return
    if arguments.get("mm_encoder_outputs") is not None:
        raise PromptError(
            "mm_encoder_outputs were made before, with prompts or without; pass the prompts to "
            "get_image_features"
        )
    # A step after the first has its images in the cache.
    if arguments.get("pixel_values") is None and arguments.get("past_key_values") is None:
        raise PromptError(f"there are {len(tokens)} prompts and no images: pass pixel_values too")


def _named(
    function: Callable[..., Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of a call by name."""
    bound = inspect.signature(function).bind_partial(owner, *args, **kwargs)
    return dict(bound.arguments)


def _signed(function: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Give a wrapper the signature that hosts inspect: the stock one and the prompts."""
    signature = inspect.signature(stock)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in PROMPT_ARGUMENTS
    ]
    function.__signature__ = signature.replace(parameters=[*named, *extra, *rest])
    function.takes_prompts = True
    made: Callable[..., Any] = function
    return made


def _image_token(config: Any) -> int:
    """Id of the image token, by either of the names that the config has had for it."""
    token_id = getattr(config, "image_token_id", None)
    return int(config.image_token_index if token_id is None else token_id)


def zeros_like_features(tiles: Sequence[int], tokens: int) -> list[Tensor]:
    """Features of images without channels to speak of, to count with."""
    return [torch.zeros(count, tokens, 1, dtype=torch.float32, device="cpu") for count in tiles]


class TakesPrompts:
    """Mixin before a class with `forward` and `get_image_features`.

    Both then take `prompt_input_ids` and `prompt_attention_mask`, one row for all images or one for
    each image of the batch, in the order of the images.
    """

    config: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, wrap in (("forward", _forward), ("get_image_features", _image_features)):
            stock = getattr(cls, name, None)
            if stock is not None and not hasattr(stock, "takes_prompts"):
                setattr(cls, name, wrap(stock))

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers then names weights in checkpoints as it does for the stock class."""
        return False

    def tiles(self, arguments: dict[str, Any]) -> list[int] | None:
        """Number of tiles per image that `get_image_features` shows the tower; None is one each.

        Args:
            arguments: Arguments of `get_image_features`, by name.
        """
        return None


class GeneratesWithPrompts(TakesPrompts):
    """Mixin before a class that generates, too."""

    def require_tower(self) -> DiffEncModel:
        """The tower.

        Raises:
            ConfigError: The model has another one.
        """
        owner: Any = getattr(self, "model", self)
        tower = owner._modules.get("vision_tower")
        if not isinstance(tower, DiffEncModel):
            raise ConfigError(
                f"the vision tower is a {type(tower).__name__}, which reads no prompts; give a "
                "DiffEncConfig as vision_config, or use the stock class"
            )
        return tower

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the stock class does, with `prompt_input_ids` and `prompt_attention_mask`.

        Raises:
            PromptError: There are prompts, and no images.
        """
        refuse_other_names(kwargs)
        tokens = _as_tokens(*(kwargs.get(name) for name in PROMPT_ARGUMENTS))
        if tokens is not None:
            _check_use(tokens, kwargs)
        parent: Any = super()
        return parent.generate(*args, **kwargs)

    def image_lengths(self, images: int, image_tokens: int, image_sizes: Any) -> list[int]:
        """How many tokens of the text stand for each image."""
        return [image_tokens // images] * images

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Repeat samples for beams, and with each sample all its images.

        Before transformers 5.18 stock classes repeat image by image, which is another order as soon
        as a sample has not exactly one image.
        """
        parent: Any = super()
        held: dict[str, Tensor] = {}
        if expand_size > 1 and input_ids is not None and kwargs.get("pixel_values") is not None:
            held = {k: kwargs.pop(k) for k in _PER_IMAGE if isinstance(kwargs.get(k), Tensor)}
        result = parent._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **kwargs,
        )
        if held and input_ids is not None:
            groups = self._images_by_sample(input_ids, held)
            order = [image for group in groups for _ in range(expand_size) for image in group]
            images = len(held["pixel_values"])
            for name, value in held.items():
                result[1][name] = value[order] if len(value) == images else value
        return result

    def _images_by_sample(
        self, input_ids: Int[Tensor, "b l"], held: dict[str, Tensor]
    ) -> list[list[int]]:
        """Indices of the images of each sample."""
        counts = (input_ids == _image_token(self.config)).sum(dim=1).tolist()
        images = len(held["pixel_values"])
        lengths = self.image_lengths(images, sum(counts), held.get("image_sizes"))
        ends = [0, *accumulate(lengths)]
        stops = [0, *accumulate(counts)]
        try:
            places = [ends.index(stop, 0) for stop in stops]
        except ValueError:
            raise PromptError(
                f"{sum(counts)} image tokens in samples of {counts} do not fit {images} images of "
                f"{lengths} tokens"
            ) from None
        return [list(range(*span)) for span in pairwise(places)]
