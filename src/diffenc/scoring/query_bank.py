"""Queries of many images on disk, to be searched by any text without the images."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc.attention import match_layers
from diffenc.attention_scores import layer_mix
from diffenc.backbones import load_backbone
from diffenc.backbones.base import Backbone
from diffenc.cache import TensorCache
from diffenc.errors import BackboneError, ConfigError, NonFiniteError, PromptError, ShapeError
from diffenc.images import ImageSource, to_pixel_values
from diffenc.memo import prompts_of
from diffenc.scoring.bank_files import BankWriter, read_contents, same_weights, weights_mark
from diffenc.scoring.calibration import References, reference_pixels
from diffenc.scoring.config import ScorerConfig
from diffenc.scoring.inputs import (
    ScoreInputs,
    check_finite,
    encode_inputs,
    in_batches,
    pooling_of,
    token_mask,
)
from diffenc.scoring.shared_query import chosen_attentions, late_queries, score_queries

_ROWS_AT_ONCE = 16
SHARD_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class SearchResult:
    """An image that was found.

    Attributes:
        name: As it was given when the bank was built.
        index: Its place in the bank.
        score: Of the text; higher is better.
    """

    name: str
    index: int
    score: float


class QueryBank:
    """Cross-attention queries of images, one set per timestep and draw, on disk.

    A bank belongs to one model and one config: it is searched with the layers, timesteps and
    reference images that it was built with. `CrossAttnScorer.build_index` writes one.

    Attributes:
        folder: Where it lies.
        config: Of the scorer that built it.
        names: Of its images.

    Example:
        >>> bank = QueryBank.load("bank")
        >>> (results,) = bank.search("a red circle", top=1)
        >>> print(results[0].name)
        circle.png
    """

    def __init__(self, folder: Path, content: dict[str, Any], backbone: Backbone) -> None:
        self.folder, self.backbone = folder, backbone
        self.config = ScorerConfig.from_dict(content["config"])
        self.names: tuple[str, ...] = tuple(content["names"])
        self._content = content

    @classmethod
    def load(
        cls,
        folder: "str | os.PathLike[str]",
        *,
        backbone: "str | os.PathLike[str] | Backbone | None" = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "QueryBank":
        """Open a bank.

        Args:
            folder: That `build_index` wrote.
            backbone: The model; None loads the one that the bank names.
            device: Where the model runs.
            dtype: Of the model.

        Raises:
            BackboneError: The bank is missing, incomplete or broken, or belongs to other weights.
        """
        root = Path(folder)
        content = read_contents(root)
        model = load_backbone(backbone or content["backbone"], device=device, dtype=dtype)
        attentions = chosen_attentions(model, tuple(content["layers"]))
        if not same_weights(content["weights"], weights_mark(attentions)):
            raise BackboneError(
                f"the bank {root} was built with other weights than {model.name!r} has: load the "
                f"model it was built with, {content['backbone']!r}, or build the bank again"
            )
        return cls(root, content, model)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"QueryBank({len(self)} images, {len(self._content['layers'])} layers)"

    def scores(self, texts: str | Sequence[str]) -> Float[Tensor, "images texts"]:
        """Score every image of the bank under every text, as the scorer that built it would.

        Raises:
            PromptError: No text, or something that is none.
        """
        listed = [texts] if isinstance(texts, str) else list(texts)
        if not listed:
            raise PromptError("got no texts; pass at least one")
        config, backbone = self.config, self.backbone
        every = [*listed, *config.reference_texts, *([""] if config.include_uncond else [])]
        embeds = prompts_of(
            backbone,
            every,
            size=tuple(self._content["size"]),
            uncond=config.uncond,
            long_prompts=config.long_prompts,
        )
        mask = token_mask(backbone, every, embeds, config.token_mask)
        attentions = chosen_attentions(backbone, tuple(self._content["layers"]))
        mix = layer_mix(config.layer_weights, len(attentions))
        rows = []
        for queries in self._rows():
            wanted = torch.ones(len(queries), len(every), dtype=torch.bool)
            pooling = pooling_of(config)
            part = score_queries(
                backbone, queries, attentions, embeds, pooling, mix, mask=mask, wanted=wanted
            )
            rows.append(part[..., 0])
        steps = len(config.steps)
        means: Tensor = torch.cat(rows).unflatten(0, (-1, steps)).mean(dim=1)
        check_finite(means, backbone)
        if config.include_uncond:
            means = (means + means[:, -1:]) / 2
        images, references = means[: len(self)], means[len(self) :]
        result = images[:, : len(listed)]
        if len(references):
            result = result - references[:, : len(listed)].mean(dim=0)
        if config.reference_texts:
            others = images[:, len(listed) : len(listed) + len(config.reference_texts)]
            result = result - others.mean(dim=1, keepdim=True)
        return result

    def search(self, texts: str | Sequence[str], *, top: int = 5) -> list[list[SearchResult]]:
        """The best images for each text.

        Args:
            texts: One or several.
            top: How many images per text, at most.

        Raises:
            ConfigError: `top` below 1.
            PromptError: No text, or something that is none.
        """
        if top < 1:
            raise ConfigError(f"top must be 1 or more, got {top}")
        scores = self.scores(texts)
        found = []
        for column in scores.T:
            best = column.argsort(descending=True, stable=True)[:top].tolist()
            found.append([SearchResult(self.names[i], i, float(column[i])) for i in best])
        return found

    def _rows(self) -> Iterator[list[tuple[Tensor, ...]]]:
        """Queries per image and step, references last, a few images at a time."""
        from safetensors import safe_open

        layers = range(len(self._content["layers"]))
        for shard in self._content["shards"]:
            path = self.folder / shard["file"]
            try:
                with safe_open(path, "pt") as opened:
                    slices = [opened.get_slice(f"layer.{layer}") for layer in layers]
                    for start in range(0, shard["rows"], _ROWS_AT_ONCE):
                        stop = min(start + _ROWS_AT_ONCE, shard["rows"])
                        parts = [entry[start:stop].to(self.backbone.dtype) for entry in slices]
                        yield [tuple(p[row] for p in parts) for row in range(stop - start)]
            except Exception as error:  # safetensors raises errors of its own
                raise BackboneError(f"cannot read {path} of the bank: {error}") from error


def bank_bytes(backbone: Backbone, config: ScorerConfig, images: int, size: tuple[int, int]) -> int:
    """How large a bank will be in half precision, from the shapes of its layers alone.

    Args:
        backbone: The model.
        config: Whose layers, timesteps and draws count.
        images: How many, with reference images.
        size: (height, width) in pixels.
    """
    taps = {tap.name: tap for tap in backbone.taps()}
    values = 0
    for layer in match_layers(backbone.unet, config.layers):
        tap = taps[f"{layer}.to_q"]
        height, width = (math.ceil(side / tap.reduction) for side in size)
        values += height * width * tap.channels
    return 2 * values * images * len(config.steps)


def write_bank(
    backbone: Backbone,
    config: ScorerConfig,
    images: Sequence[ImageSource],
    folder: Path,
    *,
    names: Sequence[str],
    references: References | None,
    dtype: torch.dtype,
    shard_bytes: int,
    progress: Callable[[int], None] | None,
) -> None:
    """Read the queries of images, and of the config's reference images, into a bank.

    Raises:
        ConfigError: A config that scores by more than attention.
        OutputError: The folder holds something, or cannot be written.
        ShapeError: Images of different sizes.
        NonFiniteError: Queries that `dtype` does not hold.
    """
    config = replace(config, mode="shared-query")
    attentions = chosen_attentions(backbone, config.layers)
    writer = BankWriter(folder, shard_bytes=shard_bytes)
    size: tuple[int, int] | None = None
    at_once = max(1, config.batch_size // len(config.steps))
    for start in range(0, len(images), at_once):
        pixel_values = to_pixel_values(
            list(images[start : start + at_once]),
            size=config.size or backbone.default_size,
            resize=config.resize,
            multiple=backbone.reduction,
        )
        here = (pixel_values.shape[2], pixel_values.shape[3])
        if (size := size or here) != here:
            raise ShapeError(
                f"images of a bank must have one size, got {size} and from image {start} on "
                f"{here}; choose resize='squash', 'crop' or 'pad'"
            )
        _add(writer, backbone, config, pixel_values, dtype)
        if progress is not None:
            progress(min(start + at_once, len(images)))
    assert size is not None
    others = reference_pixels(config, size, references)
    for part in others.split(at_once) if len(others) else ():
        _add(writer, backbone, config, part, dtype)
    writer.finish(
        {
            "backbone": backbone.name,
            "config": config.to_dict(),
            "names": list(names),
            "references": len(others),
            "layers": list(attentions),
            "size": list(size),
            "dtype": str(dtype).removeprefix("torch."),
            "weights": weights_mark(attentions),
        }
    )


def _add(
    writer: BankWriter,
    backbone: Backbone,
    config: ScorerConfig,
    pixel_values: Tensor,
    dtype: torch.dtype,
) -> None:
    config = replace(config, token_mask="none")  # of texts, which come later
    inputs = encode_inputs(backbone, pixel_values, [""], config, seed=config.seed, use_cache=True)
    steps = config.steps
    places = [(picture, step) for picture in inputs.picture_rows for step in range(len(steps))]
    for part in in_batches(places, config.batch_size, _reader(inputs, steps)):
        for row in part[1]:
            kept = tuple(entry.to("cpu", dtype) for entry in row)
            if not all(torch.isfinite(entry).all() for entry in kept):
                raise NonFiniteError(
                    f"queries do not fit into {dtype}; pass dtype=torch.bfloat16 or torch.float32"
                )
            writer.add(kept)


def _reader(
    inputs: ScoreInputs, steps: Sequence[tuple[int, int]]
) -> Callable[[Sequence[tuple[int, int]]], list[tuple[Tensor, ...]]]:
    nothing = TensorCache(0)
    return lambda part: late_queries(inputs, part, steps, nothing)
