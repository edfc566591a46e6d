"""Reads the miniature world's texts by a grammar of its own and judges them by bare geometry.

Nothing here comes from `diffenc.shapes`: it needs only objects with `shape`, `color`, `size`, `x`
and `y`. A text outside the grammar raises `UngrammaticalError`, so that reading is a test as well.
"""

import math
import re
from collections.abc import Callable
from typing import Any

COLORS = "red|green|blue|yellow|purple|orange"
SHAPES = "circle|square|triangle|star"
RELATIONS = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "over": (0, -1),
    "below": (0, 1),
    "under": (0, 1),
}
PLACES = {
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the middle": (0, 0),
}
NUMBERS = {"one": 1, "two": 2, "three": 3}

_NOUN = re.compile(
    rf"(?P<number>an?|two|three) (?:(?P<size>small|large|big) )?(?:(?P<color>{COLORS}) )?"
    rf"(?P<shape>{SHAPES}|object)(?P<s>s?)"
)
_RELATED = re.compile(f"(.+?) ({'|'.join(RELATIONS)}) (.+)")
_PLACED = re.compile(f"(.+) ({'|'.join(PLACES)})")
_GROUND = re.compile("(.+) on a (white|gray|black) background")
_OPENING = re.compile("a picture of |a photo of |there (?P<be>is|are) |we see ")


class UngrammaticalError(AssertionError):
    """A text that the world's grammar does not have."""


def is_true(text: str, scene: Any) -> bool:
    """Whether a caption is true of a scene; numbers count exactly, "a" is one at least."""
    if opening := _OPENING.match(text):
        return _holds_together(text[opening.end() :], scene, be=opening["be"])
    if match := _GROUND.fullmatch(text):
        return bool(_meant(match[1], scene)) and scene.background == match[2]
    if match := _PLACED.fullmatch(text):
        return any(lies_at(scene.objects[index], match[2]) for index in _meant(match[1], scene))
    if match := _RELATED.fullmatch(text):
        return any(
            lies(scene.objects[first], match[2], scene.objects[second])
            for first in _meant(match[1], scene)
            for second in _meant(match[3], scene)
            if first != second
        )
    return _holds_together(text, scene)


def _holds_together(text: str, scene: Any, be: str | None = None) -> bool:
    """Judge a list: every part, each about other objects; "is" before one single thing alone."""
    head, _, last = text.rpartition(" and ")
    parts = [*head.split(", "), last] if head else [last]
    many = len(parts) > 1 or parts[0].partition(" ")[0] in NUMBERS
    if be is not None and be != ("are" if many else "is"):
        raise UngrammaticalError(text)
    found = [_meant(part, scene) for part in parts]
    all_members = [index for members in found for index in members]
    return all(found) and len(all_members) == len(set(all_members))


def _meant(phrase: str, scene: Any) -> list[int]:
    """Objects that a noun phrase fits; none where its number is not theirs."""
    match = _NOUN.fullmatch(phrase)
    if match is None:
        raise UngrammaticalError(phrase)
    number = match["number"]
    if (match["s"] == "s") != (number in NUMBERS):
        raise UngrammaticalError(phrase)
    if number in ("a", "an") and (number == "an") != (phrase.split()[1][0] in "aeiou"):
        raise UngrammaticalError(phrase)
    found = fitting(scene, shape=match["shape"], color=match["color"], size=match["size"])
    return found if len(found) == NUMBERS.get(number, len(found)) else []


def fitting(
    scene: Any, *, shape: str | None = None, color: str | None = None, size: str | None = None
) -> list[int]:
    """Indices of the objects that the words fit; None and "object" fit all."""
    size = "large" if size == "big" else size
    return [
        index
        for index, thing in enumerate(scene.objects)
        if (shape in (None, "object") or thing.shape == shape)
        and (color is None or thing.color == color)
        and (size is None or thing.size == size)
    ]


def lies(first: Any, relation: str, second: Any) -> bool:
    """Whether one object is seen from the other within 34 degrees of the direction named."""
    return _off(first.x - second.x, first.y - second.y, RELATIONS[relation]) <= 34


def lies_at(thing: Any, place: str) -> bool:
    """As `lies`, seen from the centre of the picture, where "in the middle" is."""
    dx, dy = thing.x - 0.5, thing.y - 0.5
    if place == "in the middle":
        return math.hypot(dx, dy) < 0.1
    return math.hypot(dx, dy) >= 0.17 and _off(dx, dy, PLACES[place]) <= 34


def _off(dx: float, dy: float, direction: tuple[int, int]) -> float:
    """Angle in degrees between an offset and a direction."""
    along = dx * direction[0] + dy * direction[1]
    across = dx * direction[1] - dy * direction[0]
    return abs(math.degrees(math.atan2(across, along)))


def answer(text: str, scene: Any) -> tuple[str, set[int]]:
    """The answer to a question, and the indices of the objects that it is about."""
    for pattern, read in _QUESTIONS:
        if match := re.fullmatch(pattern, text):
            return read(scene, *match.groups())
    raise UngrammaticalError(text)


def _the(scene: Any, name: str) -> int:
    """The only object of a name such as "circle", "red object" or "red circle"."""
    found = _named(scene, name)
    if len(found) != 1:
        raise AssertionError(f"'the {name}' fits objects {found}")
    return found[0]


def _named(scene: Any, name: str) -> list[int]:
    match = re.fullmatch(rf"(?:({COLORS}) )?({SHAPES}|object)", name)
    if match is None:
        raise UngrammaticalError(name)
    return fitting(scene, color=match[1], shape=match[2])


def _color(scene: Any, name: str) -> tuple[str, set[int]]:
    index = _the(scene, name)
    return scene.objects[index].color, {index}


def _shape(scene: Any, color: str) -> tuple[str, set[int]]:
    index = _the(scene, f"{color} object")
    return scene.objects[index].shape, {index}


def _size(scene: Any, name: str) -> tuple[str, set[int]]:
    index = _the(scene, name)
    return scene.objects[index].size, {index}


def _count(scene: Any, names: str) -> tuple[str, set[int]]:
    found = _named(scene, names.removesuffix("s"))
    words = {number: word for word, number in NUMBERS.items()}
    return words[len(found)], set(found)


def _place(scene: Any, name: str) -> tuple[str, set[int]]:
    index = _the(scene, name)
    (place,) = [place for place in PLACES if lies_at(scene.objects[index], place)]
    return place, {index}


def _presence(scene: Any, phrase: str) -> tuple[str, set[int]]:
    found = _meant(phrase, scene)
    return ("yes" if found else "no"), set(found)


def _relation(scene: Any, first: str, relation: str, second: str) -> tuple[str, set[int]]:
    a, b = _the(scene, first), _the(scene, second)
    true = lies(scene.objects[a], relation, scene.objects[b])
    return ("yes" if true else "no"), {a, b}


_QUESTIONS: list[tuple[str, Callable[..., tuple[str, set[int]]]]] = [
    (r"what color is the (.+)\?", _color),
    (r"which color does the (.+) have\?", _color),
    (r"what shape is the (\w+) object\?", _shape),
    (r"which shape is (\w+)\?", _shape),
    (r"is the (.+) small or large\?", _size),
    (r"what size is the (.+)\?", _size),
    (r"how many (.+s) are there\?", _count),
    (r"how many (.+s) do we see\?", _count),
    (r"where is the (.+)\?", _place),
    (r"is there (an? .+)\?", _presence),
    (r"do we see (an? .+)\?", _presence),
    (rf"is the (.+?) ({'|'.join(RELATIONS)}) the (.+)\?", _relation),
]
