"""Which captions of little pictures are true, and false ones made of true ones."""

import random
import re
from functools import partial

from crowd_texts import falsified, holds_by, turned

from diffenc.shapes.captions import with_article
from diffenc.shapes.pictures import NOUNS, PictureScene

_NAMED = re.compile(rf"\ban? ({'|'.join(NOUNS)})\b")


def holds(scene: PictureScene, text: str) -> bool:
    """Whether a caption of phrases "a noun" is true of the scene."""
    return holds_by(scene, text, lambda phrase: scene.named(phrase.split()[-1]))


def false_caption(scene: PictureScene, text: str, rng: random.Random) -> str | None:
    """The caption with one thing changed, so that it is not true; None for all other texts.

    A relation is turned, or a noun is another.
    """
    if "?" in text or not _NAMED.search(text):
        return None
    return falsified(text, rng, (turned, _another), partial(holds, scene))


def _another(text: str, rng: random.Random) -> str:
    place = rng.choice(list(_NAMED.finditer(text)))
    return text[: place.start()] + with_article(rng.choice(NOUNS)) + text[place.end() :]
