"""LLaVA-Bench on the miniature world: references are true, and words can be compared."""

import random

from diffenc.evals.items import Picture, check_positive
from diffenc.evals.llava_bench.data import BenchItem, LlavaBench
from diffenc.shapes import caption, captions, questions, render, sample_scenes

BENCH_SEED = 963_000
"""Seed of the bundled set; no bundled model was trained on seeds from 900,000 up."""


def shapes_llava_bench(scenes: int = 20, *, seed: int = BENCH_SEED) -> LlavaBench:
    """Three questions per picture of coloured shapes, one of each category.

    "conv" asks for a colour, a shape or a number, "detail" for a description, "complex" for a
    relation of two objects, or whether something is there. Compare answers with `WordJudge`.

    Args:
        scenes: Number of pictures, each with three questions.
        seed: Seed of the scenes; choose settings on another seed than the one you report.

    Raises:
        ConfigError: Fewer than one picture.
    """
    check_positive(scenes=scenes)
    items = []
    for index, scene in enumerate(sample_scenes(scenes, seed=seed)):
        rng = random.Random(f"bench/{seed}/{index}")
        candidates = questions(scene, seed=rng.randrange(1 << 30))
        simple = next(q for q in candidates if q.kind in ("color", "shape", "count"))
        hard = [q for q in candidates if q.kind in ("relation", "presence")]
        complex_ = next((q for q in hard if q.kind == "relation"), hard[0])
        described = caption(scene, rng)
        picture = Picture(f"scene {index} of bench, seed {seed}", render(scene))
        context = "\n".join(captions(scene, 5, seed=seed + index))
        for category, question, answer in (
            ("conv", simple.text, simple.answer),
            ("detail", "describe the picture.", described),
            ("complex", complex_.text, complex_.answer),
        ):
            name = f"{index + 1}-{category}"
            items.append(BenchItem(name, picture, question, category, context, answer))
    return LlavaBench(name="llava-bench", source=f"shapes, seed {seed}", items=tuple(items))
