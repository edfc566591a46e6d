"""Queries of images, and of reference pictures, computed part by part into a bank."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffenc.denoiser.attention import match_layers
from diffenc.errors import ConfigError, ImageError, NonFiniteError
from diffenc.inputs.images import ImageSource, to_pixel_values
from diffenc.memory.cache import TensorCache, content_key
from diffenc.models.base import Backbone
from diffenc.models.device import as_dtype
from diffenc.scoring.bank_files import FORMAT, Shapes, json_digest
from diffenc.scoring.bank_plan import (
    begin,
    check_folder,
    check_names,
    look_at,
    make_folder,
)
from diffenc.scoring.bank_weights import model_mark, weights_mark
from diffenc.scoring.bank_writing import BankWriter
from diffenc.scoring.batches import in_batches
from diffenc.scoring.calibration import References, reference_pixels
from diffenc.scoring.config import ScorerConfig
from diffenc.scoring.encoded_call import EncodedCall, encode_call
from diffenc.scoring.shared_query import chosen_attentions, late_queries
from diffenc.storage.names import printable
from diffenc.storage.writing import locked

SHARD_BYTES = 64 * 2**20


def layer_shapes(backbone: Backbone, layers: Sequence[str], size: tuple[int, int]) -> Shapes:
    """(cells, channels) of the queries of each layer.

    Args:
        backbone: The model.
        layers: Module paths of cross-attentions.
        size: Size of the pictures in pixels, (height, width).
    """
    taps = {tap.name: tap for tap in backbone.taps()}
    shapes = []
    for layer in layers:
        tap = taps[f"{layer}.to_q"]
        height, width = (math.ceil(side / tap.reduction) for side in size)
        shapes.append((height * width, tap.channels))
    return tuple(shapes)


def bank_bytes(backbone: Backbone, config: ScorerConfig, images: int, size: tuple[int, int]) -> int:
    """How large a bank will be in half precision, from the shapes of its layers alone.

    Args:
        backbone: The model.
        config: Config whose layers, timesteps and draws count.
        images: Number of images, reference pictures included.
        size: Size of the pictures in pixels, (height, width).
    """
    layers = match_layers(backbone.denoiser, config.layers)
    values = sum(cells * channels for cells, channels in layer_shapes(backbone, layers, size))
    return 2 * values * images * len(config.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Build:
    """A bank that is to be built.

    Attributes:
        backbone: The model.
        config: Config of the scorer.
        images: Pictures that are whole.
        digests: Digests of what the model sees of them.
        references: Reference pictures, in [-1, 1].
        dtype: Floating point type of what is stored.
        plan: Everything that the queries depend on, as JSON holds it.
        content: Contents of the table of contents, `bank.json`.
        shapes: Shape (cells, channels) of the queries of each layer.
    """

    backbone: Backbone
    config: ScorerConfig
    images: Sequence[ImageSource]
    digests: Sequence[str]
    references: Tensor
    dtype: torch.dtype
    plan: dict[str, Any]
    content: dict[str, Any]
    shapes: Shapes

    @property
    def at_once(self) -> int:
        """Pictures of a part of the bank, which is computed in one go."""
        return max(1, self.config.batch_size // len(self.config.steps))

    def parts(self) -> list[tuple[bool, range]]:
        """Whether each part is one of references, and the numbers of its pictures."""
        counts = (False, len(self.images)), (True, len(self.references))
        return [
            (kind, range(start, min(start + self.at_once, count)))
            for kind, count in counts
            for start in range(0, count, self.at_once)
        ]

    def pictures(self, of_references: bool, places: range) -> Tensor:
        """`pixel_values` of a part.

        Raises:
            ImageError: A picture is not what it was before the first pass.
        """
        if of_references:
            return self.references[places.start : places.stop]
        rows = [_read_picture(self.backbone, self.config, self.images[k]) for k in places]
        for row, place in zip(rows, places, strict=True):
            if content_key(row).hex() != self.digests[place]:
                name = printable(self.content["names"][place])
                raise ImageError(f"{name} was changed while the bank was built; build it again")
        return torch.cat(rows)


def write_bank(
    backbone: Backbone,
    config: ScorerConfig,
    images: Sequence[ImageSource],
    folder: Path,
    *,
    names: Sequence[str],
    references: References | None,
    dtype: torch.dtype | str,
    shard_bytes: int,
    skip_broken: bool,
    overwrite: bool,
    progress: Callable[[int], None] | None,
) -> None:
    """Read the queries of images, and of the config's reference pictures, into a bank.

    Every picture is read once before the first pass. A bank that was begun with the same pictures,
    config and model goes on after its last whole shard.

    Raises:
        ConfigError: A config that scores by more than attention, or names that are none.
        ImageError: Pictures are broken; it names all of them.
        OutputError: The folder holds something else, is being written, or cannot be written.
        ShapeError: Images of different sizes, or another number of names.
        NonFiniteError: Queries that `dtype` does not hold.
    """
    dtype = as_dtype(dtype)
    if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise ConfigError(f"shard_bytes must be an int of 1 or more, got {shard_bytes!r}")
    config = replace(config, mode="shared-query")
    names = check_names(names, len(images))
    check_folder(folder, overwrite=overwrite)
    build = _planned(backbone, config, images, names, references, dtype, skip_broken=skip_broken)
    build.plan["shard_bytes"] = shard_bytes
    make_folder(folder)
    with locked(folder, purpose="building this index"):
        going_on = begin(folder, build.plan, overwrite=overwrite)
        writer = BankWriter(
            folder, json_digest(build.plan), build.shapes, dtype, shard_bytes=shard_bytes
        )
        parts, steps = build.parts(), len(config.steps)
        done = writer.resume([len(places) * steps for _, places in parts])
        if going_on and progress is not None:
            progress(sum(len(places) for kind, places in parts[:done] if not kind))
        for of_references, places in parts[done:]:
            pixel_values = build.pictures(of_references, places)
            writer.add(_queries(backbone, config, pixel_values, dtype))
            if progress is not None and not of_references:
                progress(places.stop)
        writer.finish(build.content)


def _planned(
    backbone: Backbone,
    config: ScorerConfig,
    images: Sequence[ImageSource],
    names: Sequence[str],
    references: References | None,
    dtype: torch.dtype,
    *,
    skip_broken: bool,
) -> _Build:
    """Look at all pictures, and write down what the bank will be made from."""

    def read(picture: ImageSource) -> Tensor:
        return _read_picture(backbone, config, picture)

    whole, digests, broken, size = look_at(images, names, read, skip_broken=skip_broken)
    others = reference_pixels(config, size, references)
    attentions = chosen_attentions(backbone, config.layers)
    shapes = layer_shapes(backbone, list(attentions), size)
    common = {
        "config": config.to_dict(),
        "names": [names[index] for index in whole],
        "layers": list(attentions),
        "size": list(size),
        "dtype": str(dtype).removeprefix("torch."),
    }
    plan = {
        "format": FORMAT,
        **common,
        "pictures": digests,
        "references": [content_key(picture).hex() for picture in others],
        "computed": f"{str(backbone.dtype).removeprefix('torch.')} on {backbone.device.type}",
        "weights": model_mark(backbone),
    }
    content = {
        "backbone": backbone.name,
        **common,
        "skipped": [list(each) for each in broken],
        "references": len(others),
        "shapes": [list(shape) for shape in shapes],
        "weights": weights_mark(backbone, attentions),
    }
    return _Build(
        backbone=backbone,
        config=config,
        images=[images[index] for index in whole],
        digests=digests,
        references=others,
        dtype=dtype,
        plan=plan,
        content=content,
        shapes=shapes,
    )


def _read_picture(backbone: Backbone, config: ScorerConfig, picture: ImageSource) -> Tensor:
    """`pixel_values` (1 3 height width) of a picture, as the scorer reads it."""
    return to_pixel_values(
        [picture],
        size=config.size or backbone.default_size,
        resize=config.resize,
        multiple=backbone.multiple,
    )


def _queries(
    backbone: Backbone, config: ScorerConfig, pixel_values: Tensor, dtype: torch.dtype
) -> list[tuple[Tensor, ...]]:
    """Rows of some pictures, each with the queries of every layer."""
    config = replace(config, token_mask="none")  # of texts, which come later
    # Nothing is looked up: what was computed in other batches differs in its last bits, and a bank
    # that was gone on with shall be equal to one that was not interrupted.
    encoded = encode_call(backbone, pixel_values, [""], config, seed=config.seed, use_cache=False)
    steps = config.steps
    places = [(picture, step) for picture in encoded.picture_rows for step in range(len(steps))]
    rows = []
    for part in in_batches(places, config.batch_size, _reader(encoded, steps)):
        for row in part[1]:
            kept = tuple(entry.to("cpu", dtype) for entry in row)
            if not all(torch.isfinite(entry).all() for entry in kept):
                raise NonFiniteError(
                    f"queries do not fit into {dtype}; pass dtype=torch.bfloat16 or torch.float32"
                )
            rows.append(kept)
    return rows


def _reader(
    encoded: EncodedCall, steps: Sequence[tuple[int, int]]
) -> Callable[[Sequence[tuple[int, int]]], list[tuple[Tensor, ...]]]:
    nothing = TensorCache(0)
    return lambda part: late_queries(encoded, part, steps, nothing)
