"""Texts that name objects of a scene, and which word names which of them."""

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffenc.shapes.captions import SIZE_WORDS, caption, with_article
from diffenc.shapes.questions import sample_question
from diffenc.shapes.render import masks
from diffenc.shapes.scenes import COLORS, SHAPES, Scene, Shape

CAPTIONS, QUESTIONS = 0.5, 0.25
"""Shares of the texts; the rest refers to one object, as in "the red object"."""
_NOUNS: dict[str, Shape | None] = {
    **{word: shape for shape in SHAPES for word in (shape, f"{shape}s")},
    "object": None,
    "objects": None,
}
_SIZES = {word: size for size, words in SIZE_WORDS.items() for word in words}


def scene_text(scene: Scene, rng: random.Random) -> str:
    """A caption, a question (a third of them with the answer), or a reference."""
    draw = rng.random()
    if draw < CAPTIONS:
        return caption(scene, rng)
    if draw < CAPTIONS + QUESTIONS:
        question = sample_question(scene, rng)
        return f"{question.text} {question.answer}" if rng.random() < 1 / 3 else question.text
    return reference(scene, rng)


def reference(scene: Scene, rng: random.Random) -> str:
    """Words for one object, unique where colour, shape or both make it so: "the red object"."""
    thing = rng.choice(scene.objects)
    names = [
        words
        for words, count in (
            (f"{thing.color} object", scene.count(color=thing.color)),
            (thing.shape, scene.count(shape=thing.shape)),
            (f"{thing.color} {thing.shape}", scene.count(color=thing.color, shape=thing.shape)),
        )
        if count == 1
    ]
    if not names:
        return with_article(f"{thing.size} {thing.color} {thing.shape}")
    name = rng.choice(names)
    return rng.choice((f"the {name}", f"the {name}", with_article(name), name))


def named_objects(
    scene: Scene, words: Sequence[str], *, colors: bool = True
) -> list[tuple[int, ...]]:
    """Objects of a scene that each word of a text names, by index; none for most words.

    A shape word, or "object", stands for the objects that have its shape and the colour and size of
    the words right before it. Size words are left alone. A text encoder that reads from left to
    right does not know at "red" whose colour it is, so a colour word stands for all objects of that
    colour.

    Args:
        scene: Scene that the text is about.
        words: Words and marks of the text, in order.
        colors: Whether colour words and "object" name anything.
    """
    named: list[tuple[int, ...]] = [()] * len(words)
    adjectives: set[str] = set()
    for position, word in enumerate(words):
        if word in COLORS or word in _SIZES:
            adjectives.add(word)
            if colors and word in COLORS:
                named[position] = tuple(
                    index for index, thing in enumerate(scene.objects) if thing.color == word
                )
            continue
        if word in _NOUNS and (colors or _NOUNS[word] is not None):
            named[position] = tuple(
                index
                for index, thing in enumerate(scene.objects)
                if _NOUNS[word] in (None, thing.shape)
                and all(w == thing.color or _SIZES.get(w) == thing.size for w in adjectives)
            )
        adjectives = set()
    return named


def named_boxes(scene: Scene, text: str, size: int) -> list[dict[str, Any]]:
    """Which words of a text name which boxes, as a line of phrases has it.

    Args:
        scene: Scene that the text is about.
        text: The text.
        size: Side of the picture in pixels.
    """
    places = [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]
    boxes = [_box(mask) for mask in masks(scene, size)]
    named = named_objects(scene, [text[slice(*place)].lower() for place in places])
    return [
        {"span": list(place), "boxes": [box for index in objects if (box := boxes[index])]}
        for place, objects in zip(places, named, strict=True)
        if any(boxes[index] for index in objects)
    ]


def _box(mask: Any) -> list[int]:
    """Edges of what is seen of an object; none where all of it is hidden."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return []
    edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return [int(edge) for edge in edges]
