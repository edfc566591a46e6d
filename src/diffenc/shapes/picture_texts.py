"""Texts about scenes of little pictures, and which word names which of their things."""

import random
from collections.abc import Sequence

from diffenc.shapes.captions import RELATION_PHRASES, join, opened, with_article
from diffenc.shapes.pictures import PictureScene

CAPTIONS, QUESTIONS = 0.5, 0.15
"""Shares of the texts; the rest refers to one thing, as in "the dog"."""


def picture_caption(scene: PictureScene, rng: random.Random) -> str:
    """A true caption: one to three things, or how one lies to another.

    Args:
        scene: Scene to be described.
        rng: Random generator that chooses among paraphrases.

    Returns:
        Lower-case words without a full stop. "a dog" says that there is one at least.
    """
    if rng.random() < 0.4:
        first, second = rng.sample(range(len(scene.objects)), 2)
        relation = scene.relation(first, second)
        a, b = (scene.objects[index].noun for index in (first, second))
        if relation is not None and a != b:
            return f"{with_article(a)} {rng.choice(RELATION_PHRASES[relation])} {with_article(b)}"
    nouns = list(dict.fromkeys(thing.noun for thing in scene.objects))
    chosen = rng.sample(nouns, min(len(nouns), rng.randint(1, 3)))
    phrase = join([with_article(noun) for noun in chosen])
    return opened(phrase, rng, be="is" if len(chosen) == 1 else "are")


def picture_text(scene: PictureScene, rng: random.Random) -> str:
    """A caption, a question about a thing, or a reference to one."""
    draw = rng.random()
    if draw < CAPTIONS:
        return picture_caption(scene, rng)
    noun = rng.choice(scene.objects).noun
    if draw < CAPTIONS + QUESTIONS:
        return rng.choice((f"where is the {noun}?", f"is there {with_article(noun)}?"))
    return rng.choice((f"the {noun}", f"the {noun}", with_article(noun), noun))


def named_things(scene: PictureScene, words: Sequence[str]) -> list[tuple[int, ...]]:
    """Things of a scene that each word of a text names, by index; none for most words."""
    return [scene.named(word) for word in words]
