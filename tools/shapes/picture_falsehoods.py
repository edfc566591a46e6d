"""Which captions of little pictures are true, and false ones made of true ones."""

import random

from texts import said

from diffenc.shapes.captions import RELATION_PHRASES, with_article
from diffenc.shapes.pictures import NOUNS, PictureScene
from diffenc.shapes.scenes import INVERSE

_TRIES = 24


def holds(scene: PictureScene, text: str) -> bool:
    """Whether a caption of phrases "a noun" is true of the scene."""
    parts = said(text)
    if len(parts) == 3 and parts[1] in RELATION_PHRASES:
        return any(
            scene.relation(first, second) == parts[1]
            for first in scene.named(_noun(parts[0]))
            for second in scene.named(_noun(parts[2]))
            if first != second
        )
    return all(scene.named(_noun(part)) for part in parts)


def false_caption(scene: PictureScene, text: str, rng: random.Random) -> str | None:
    """The caption with one thing changed, so that it is not true; None for all other texts.

    A relation is turned, or a noun is another.
    """
    if "?" in text or text.startswith("the ") or not text.count(" "):
        return None
    for _ in range(_TRIES):
        changed = rng.choice((_turned, _another))(text, rng)
        if changed is not None and not holds(scene, changed):
            return changed
    return None


def _noun(phrase: str) -> str:
    return phrase.split()[-1]


def _turned(text: str, rng: random.Random) -> str | None:
    for relation, phrases in RELATION_PHRASES.items():
        for phrase in reversed(phrases):
            if f" {phrase} " in text:
                other = RELATION_PHRASES[INVERSE[relation]][phrases.index(phrase)]
                return text.replace(f" {phrase} ", f" {other} ")
    return None


def _another(text: str, rng: random.Random) -> str | None:
    present = [noun for noun in NOUNS if with_article(noun) in _phrases(text)]
    if not present:
        return None
    before, after = rng.choice(present), rng.choice(NOUNS)
    return text.replace(with_article(before), with_article(after), 1)


def _phrases(text: str) -> list[str]:
    return [part for part in said(text) if part not in RELATION_PHRASES]
