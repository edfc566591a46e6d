"""Captions on the miniature world: references are paraphrases, all of them true."""

from diffenc.errors import ConfigError
from diffenc.evals.captioning.data import CaptionItem, CaptionSet
from diffenc.evals.items import Picture, check_positive
from diffenc.mllm.training.miniature import REQUEST
from diffenc.shapes import captions, render, sample_scenes

CAPTIONS_SEED = 961_000
"""Seed of the bundled set; no bundled model was trained on seeds from 900,000 up."""

SHAPES_QUESTION = REQUEST
"""What models that were trained on the miniature's conversations are asked for a caption."""


def shapes_captions(
    count: int = 200, *, references: int = 5, seed: int = CAPTIONS_SEED, size: int = 64
) -> CaptionSet:
    """Pictures of coloured shapes with up to `references` different captions each.

    Args:
        count: Number of pictures, 1 or more.
        references: Largest number of captions per picture, 1 or more; scenes of one object allow
            fewer.
        seed: Seed of the scenes and captions, 0 or more; choose settings on another seed than the
            one you report.
        size: Side of the square pictures, in pixels.

    Raises:
        ConfigError: A number below 1, or a negative seed.
    """
    check_positive(count=count, references=references, size=size)
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}")
    items = []
    for index, scene in enumerate(sample_scenes(count, seed=seed)):
        texts = captions(scene, references, seed=seed + index)
        picture = Picture(f"scene {index} of seed {seed}", render(scene, size))
        items.append(CaptionItem(str(index), picture, tuple(texts)))
    return CaptionSet(name="shapes-captions", source=f"shapes, seed {seed}", items=tuple(items))
