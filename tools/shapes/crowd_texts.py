"""Captions of scenes in training: which are true, and false ones made of them."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Protocol

from texts import said

from diffenc.shapes.captions import RELATION_PHRASES, with_article
from diffenc.shapes.scenes import COLORS, INVERSE, SHAPES, Scene, SceneObject

_SIZES = {"small": "small", "large": "large", "big": "large"}
_TRIES = 24

Change = Callable[[str, random.Random], str | None]


class _Related(Protocol):
    def relation(self, first: int, second: int) -> str | None: ...


def holds(scene: Scene, text: str) -> bool:
    """Whether a caption of phrases "a [size] colour shape" is true of the scene."""
    return holds_by(scene, text, partial(_members, scene))


def holds_by(scene: _Related, text: str, members: Callable[[str], Sequence[int]]) -> bool:
    """Whether a caption is true of a scene, in which `members` finds what a phrase names."""
    parts = said(text)
    if len(parts) == 3 and parts[1] in RELATION_PHRASES:
        return any(
            scene.relation(first, second) == parts[1]
            for first in members(parts[0])
            for second in members(parts[2])
            if first != second
        )
    return all(members(part) for part in parts)


def _members(scene: Scene, phrase: str) -> list[int]:
    words = phrase.split()
    return [index for index, thing in enumerate(scene.objects) if _fits(thing, words)]


def _fits(thing: SceneObject, words: Sequence[str]) -> bool:
    return all(
        word == thing.color
        if word in COLORS
        else word == thing.shape
        if word in SHAPES
        else _SIZES.get(word, thing.size) == thing.size
        for word in words
    )


def false_caption(scene: Scene, text: str, rng: random.Random) -> str | None:
    """The caption with one thing changed, so that it is not true; None for all other texts.

    Two colours are exchanged, a relation is turned, or one colour or shape word is another.
    """
    if "?" in text or not all(any(s in part for s in SHAPES) for part in _phrases(text)):
        return None
    return falsified(text, rng, (_exchanged, turned, _another), partial(holds, scene))


def falsified(
    text: str, rng: random.Random, changes: Sequence[Change], is_true: Callable[[str], bool]
) -> str | None:
    """The text changed in one of some ways until it is not true; None where that does not come."""
    for _ in range(_TRIES):
        changed = rng.choice(changes)(text, rng)
        if changed is not None and changed != text and not is_true(changed):
            return changed
    return None


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(part for part in said(text) if part not in RELATION_PHRASES)


def _exchanged(text: str, rng: random.Random) -> str | None:
    words = text.replace(",", " ,").split()
    places = [place for place, word in enumerate(words) if word in COLORS]
    if len(places) < 2:
        return None
    first, second = rng.sample(places, 2)
    words[first], words[second] = words[second], words[first]
    return _joined(words)


def turned(text: str, _rng: random.Random) -> str | None:
    """The text with its relation the other way round; None where it has none."""
    for relation, phrases in RELATION_PHRASES.items():
        for phrase in reversed(phrases):
            if f" {phrase} " in text:
                other = RELATION_PHRASES[INVERSE[relation]][phrases.index(phrase)]
                return text.replace(f" {phrase} ", f" {other} ")
    return None


def _another(text: str, rng: random.Random) -> str:
    words = text.replace(",", " ,").split()
    places = [place for place, word in enumerate(words) if word in COLORS or word in SHAPES]
    place = rng.choice(places)
    words[place] = rng.choice(COLORS if words[place] in COLORS else SHAPES)
    return _joined(words)


def _joined(words: Sequence[str]) -> str:
    """Words as a text, with "a" or "an" as the next word asks."""
    fitted = [
        with_article(after).split()[0] if word in ("a", "an") else word
        for word, after in pairwise((*words, ""))
    ]
    return " ".join(fitted).replace(" ,", ",")
