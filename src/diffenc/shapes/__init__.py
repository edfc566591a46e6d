"""The miniature world: scenes, pictures, masks, captions, questions and contrast pairs.

Everything follows from a seeded `Scene`, so truth is known: what is where, how many, in front of
what. `sample_scenes` makes scenes, `sample_crowds` crowded ones, `render` pictures, `masks` the
pixels of each object, `captions` and `questions` texts, `mmvp_pairs` and `winoground_items`
benchmarks in miniature. `sample_picture_scenes` makes scenes of little pictures in place of shapes,
with `render_pictures`, `picture_masks` and `picture_caption`.
"""

from diffenc.shapes.captions import caption, captions
from diffenc.shapes.crowds import sample_crowd, sample_crowds
from diffenc.shapes.pairs import (
    MMVP_PATTERNS,
    WINOGROUND_KINDS,
    ContrastPair,
    mmvp_pairs,
    winoground_items,
)
from diffenc.shapes.picture_texts import picture_caption
from diffenc.shapes.pictures import (
    PictureScene,
    Thing,
    picture_masks,
    render_pictures,
    sample_picture_scenes,
    sample_pictures,
)
from diffenc.shapes.questions import Question, conversation, multiple_choice, questions
from diffenc.shapes.render import masks, render, render_array
from diffenc.shapes.scenes import Scene, SceneObject, perturb, sample_scene, sample_scenes

__all__ = [
    "MMVP_PATTERNS",
    "WINOGROUND_KINDS",
    "ContrastPair",
    "PictureScene",
    "Question",
    "Scene",
    "SceneObject",
    "Thing",
    "caption",
    "captions",
    "conversation",
    "masks",
    "mmvp_pairs",
    "multiple_choice",
    "perturb",
    "picture_caption",
    "picture_masks",
    "questions",
    "render",
    "render_array",
    "render_pictures",
    "sample_crowd",
    "sample_crowds",
    "sample_picture_scenes",
    "sample_pictures",
    "sample_scene",
    "sample_scenes",
    "winoground_items",
]
