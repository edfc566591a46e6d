"""True captions of a scene, in paraphrases: what is there, how many, how large, and where.

Every caption is true of its scene. It may leave things out (sizes, colours, an object), as people
do. A number word counts exactly; "a red circle" says that there is one at least.
"""

import random
from collections.abc import Sequence

from diffenc.errors import ConfigError
from diffenc.shapes.scenes import Color, Place, Relation, Scene, SceneObject, Shape, Size

NUMBERS = ("zero", "one", "two", "three")
MOST_OBJECTS = 9
"""Largest number of objects in a scene that texts are about."""

RELATION_PHRASES: dict[Relation, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
PLACE_PHRASES: dict[Place, str] = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
SIZE_WORDS: dict[Size, tuple[str, ...]] = {"small": ("small",), "large": ("large", "big")}

_OPENINGS = ("{}", "{}", "{}", "a picture of {}", "a photo of {}", "there {be} {}", "we see {}")


def with_article(words: str) -> str:
    """``"orange star"`` to ``"an orange star"``."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(shape: str) -> str:
    """``"star"`` to ``"stars"``."""
    return f"{shape}s"


def noun_phrase(
    *,
    shape: Shape | None = None,
    color: Color | None = None,
    size_word: str | None = None,
    count: int = 1,
    article: bool = True,
) -> str:
    """``"a small red circle"``, ``"two red circles"``; without a shape it is an ``"object"``."""
    noun = shape or "object"
    words = " ".join(word for word in (size_word, color, noun) if word)
    if count != 1:
        return f"{NUMBERS[count]} {plural(words)}"
    return with_article(words) if article else words


def require_describable(scene: Scene) -> None:
    """Refuse scenes that the world has no words for."""
    if not 1 <= len(scene.objects) <= MOST_OBJECTS:
        raise ConfigError(
            f"texts are about scenes of 1 to {MOST_OBJECTS} objects, this one has "
            f"{len(scene.objects)}"
        )


def caption(scene: Scene, rng: random.Random) -> str:
    """Draw one caption of the scene.

    Args:
        scene: Scene to be described.
        rng: Random generator that chooses among paraphrases.

    Returns:
        Lower-case words without a full stop, at most 30 tokens of the bundled tokenizer.

    Raises:
        ConfigError: The scene has no object, or more than nine.
    """
    require_describable(scene)
    if len(scene.objects) > len(NUMBERS) - 1:
        return _of_crowd(scene, rng)
    if len(scene.objects) == 1:
        return _of_one(scene, rng)
    if len(scene.objects) > 2 and rng.random() < 0.25:
        first, second = rng.sample(range(len(scene.objects)), 2)
        pair = _of_pair(scene, first, second, rng)
        if pair is not None:
            return pair
    if len(scene.groups()) == 2 == len(scene.objects) and rng.random() < 0.75:
        first, second = rng.sample((0, 1), 2)
        pair = _of_pair(scene, first, second, rng)
        if pair is not None:
            return pair
    return _of_groups(scene, rng)


def captions(scene: Scene, count: int, *, seed: int = 0) -> list[str]:
    """Up to `count` different captions of the scene; fewer where it allows no more.

    Raises:
        ConfigError: `count` is negative, or the scene has no object, or more than nine.
    """
    if count < 0:
        raise ConfigError(f"count must be 0 or more, got {count}")
    require_describable(scene)
    rng = random.Random(f"captions/{seed}")
    texts: dict[str, None] = {}
    for _ in range(count * 12):
        texts.setdefault(caption(scene, rng))
        if len(texts) == count:
            break
    return list(texts)


def _of_crowd(scene: Scene, rng: random.Random) -> str:
    """Name some of many objects, each as "a ...", which says that there is at least one."""
    if rng.random() < 0.4:
        first, second = rng.sample(range(len(scene.objects)), 2)
        pair = _of_pair(scene, first, second, rng)
        if pair is not None:
            return pair
    kinds = scene.groups()
    named = rng.sample(kinds, min(len(kinds), rng.randint(1, 3)))
    sized = rng.random() < 0.35
    things = [scene.objects[rng.choice(members)] for _, members in named]
    phrases = [_phrase(thing, rng, sized=sized, colored=True) for thing in things]
    return opened(join(phrases), rng, be="is" if len(phrases) == 1 else "are")


def _of_one(scene: Scene, rng: random.Random) -> str:
    thing = scene.objects[0]
    phrase = _phrase(thing, rng, sized=rng.random() < 0.35, colored=rng.random() > 0.08)
    if thing.place is not None and rng.random() < 0.45:
        return f"{phrase} {PLACE_PHRASES[thing.place]}"
    if rng.random() < 0.15:
        return f"{phrase} on a {scene.background} background"
    return opened(phrase, rng, be="is")


def _of_pair(scene: Scene, first: int, second: int, rng: random.Random) -> str | None:
    """``"a red circle left of a blue square"``, or None where no relation is clear."""
    relation = scene.relation(first, second)
    a, b = scene.objects[first], scene.objects[second]
    if relation is None or a.kind == b.kind:
        return None
    shapes_tell = a.shape != b.shape and len(scene.objects) == 2
    colored = not shapes_tell or rng.random() > 0.08
    sized = rng.random() < 0.25
    phrases = [_phrase(thing, rng, sized=sized, colored=colored) for thing in (a, b)]
    return f"{phrases[0]} {rng.choice(RELATION_PHRASES[relation])} {phrases[1]}"


def _of_groups(scene: Scene, rng: random.Random) -> str:
    """``"two red circles and a blue square"``: everything, grouped by kind, in any order."""
    groups = scene.groups()
    rng.shuffle(groups)
    sized = rng.random() < 0.25
    parts = []
    for (color, shape), members in groups:
        same_size = len({scene.objects[index].size for index in members}) == 1
        word = rng.choice(SIZE_WORDS[scene.objects[members[0]].size])
        parts.append(
            noun_phrase(
                shape=shape,
                color=color,
                size_word=word if sized and same_size else None,
                count=len(members),
            )
        )
    return opened(join(parts), rng, be="are")  # two objects at least


def join(parts: Sequence[str]) -> str:
    """``["a", "b", "c"]`` to ``"a, b and c"``."""
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _phrase(thing: SceneObject, rng: random.Random, *, sized: bool, colored: bool) -> str:
    return noun_phrase(
        shape=thing.shape,
        color=thing.color if colored else None,
        size_word=rng.choice(SIZE_WORDS[thing.size]) if sized else None,
    )


def opened(phrase: str, rng: random.Random, *, be: str) -> str:
    """The phrase, or a sentence or title that begins before it; `be` is "is" or "are"."""
    return rng.choice(_OPENINGS).format(phrase, be=be)
