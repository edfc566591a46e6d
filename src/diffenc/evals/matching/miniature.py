"""Both benchmarks on the miniature world: they need no download, and their truth is known."""

from diffenc.errors import ConfigError
from diffenc.evals.items import Picture
from diffenc.evals.matching.base import BenchmarkName, Item, MatchingBenchmark
from diffenc.shapes import ContrastPair, mmvp_pairs, render, winoground_items

SHAPES_SEED = 960_000
"""Seed of the bundled benchmarks; no bundled model was trained on seeds from 900,000 up."""

REFERENCE_SEED = 970_000


def shapes_benchmark(
    name: BenchmarkName, *, per_label: int | None = None, seed: int = SHAPES_SEED
) -> MatchingBenchmark:
    """A benchmark in miniature: coloured shapes of 64 pixels, made from a seed.

    Args:
        name: Name of the benchmark: "winoground" (kinds noun, color, relation, count, size) or
            "mmvp-vlm" (patterns color, count, position, relation, shape, size).
        per_label: Number of items per kind or pattern; None is 30 for Winoground, and 15 for
            MMVP-VLM, as in the original.
        seed: Seed of the scenes; choose layers or thresholds on another seed than the one you
            report.

    Raises:
        ConfigError: Fewer than one item per kind, or no such benchmark.
    """
    if per_label is not None and per_label < 1:
        raise ConfigError(f"the items per kind must be 1 or more, got {per_label}")
    count = per_label or (30 if name == "winoground" else 15)
    if name == "winoground":
        pairs, kind = winoground_items(count, seed=seed), "kind"
    elif name == "mmvp-vlm":
        pairs, kind = mmvp_pairs(count, seed=seed), "pattern"
    else:
        raise ConfigError(f"benchmark must be 'winoground' or 'mmvp-vlm', got {name!r}")
    return MatchingBenchmark(
        name=name,
        source=f"shapes, seed {seed}",
        items=tuple(_item(pair, index % count, kind) for index, pair in enumerate(pairs)),
        label_kind=kind,
        average="labels" if name == "mmvp-vlm" else "items",
    )


def _item(pair: ContrastPair, index: int, kind: str) -> Item:
    first, second = (
        Picture(f"scene {k} of {pair.kind}-{index}", render(scene))
        for k, scene in enumerate(pair.scenes)
    )
    return Item(f"{pair.kind}-{index}", (first, second), pair.captions, {kind: (pair.kind,)})
