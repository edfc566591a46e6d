"""Content of captions of coloured shapes, and whether it is true of a scene.

It reads texts on its own: it shares no code with what makes the captions of the miniature world,
and takes any wording of the same kind.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from diffenc.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    Color,
    Place,
    Relation,
    Scene,
    SceneObject,
    Shape,
    Size,
)

_COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
_SIZES: dict[str, Size] = {"small": "small", "large": "large", "big": "large"}
_THING = (
    r"(?P<count>an?|one|two|three) (?:(?P<size>small|large|big) )?"
    rf"(?:(?P<color>{'|'.join(COLORS)}) )?(?P<noun>{'|'.join(SHAPES)}|object)(?P<plural>s?)"
)
_ONE = re.compile(_THING)
_OPENING = re.compile(r"^(?:an? (?:picture|photo) of|there (?:is|are)|we see) ")
_RELATIONS: dict[str, Relation] = {
    "left of": "left of",
    "to the left of": "left of",
    "right of": "right of",
    "to the right of": "right of",
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
}
_PLACES: dict[str, Place] = {
    "on the left": "left",
    "on the right": "right",
    "at the top": "top",
    "at the bottom": "bottom",
    "in the middle": "middle",
}
_BETWEEN = re.compile(rf" (?:{'|'.join(sorted(_RELATIONS, key=len, reverse=True))}) ")
_PLACE = re.compile(rf" (?:{'|'.join(_PLACES)})$")
_BACKGROUND = re.compile(rf" on a (?P<name>{'|'.join(BACKGROUNDS)}) background$")


@dataclass(frozen=True, slots=True)
class Thing:
    """One object that a caption names; None is a property that it leaves open."""

    shape: Shape | None
    color: Color | None
    size: Size | None

    def fits(self, shown: SceneObject) -> bool:
        """Whether an object is one."""
        return (
            self.shape in (None, shown.shape)
            and self.color in (None, shown.color)
            and self.size in (None, shown.size)
        )


@dataclass(frozen=True, slots=True)
class Statement:
    """Content of a caption.

    Attributes:
        things: Objects that the caption names, one entry each: "two red circles" are two.
        exact: Things that a number word counts, each with the number of all such things.
        relation: Relation of the first thing to the second; None if the caption states none.
        place: Place of the only thing in the picture; None if the caption states none.
        background: Colour of the background; None if the caption states none.
    """

    things: tuple[Thing, ...]
    exact: tuple[tuple[Thing, int], ...] = ()
    relation: Relation | None = None
    place: Place | None = None
    background: str | None = None

    def is_true(self, scene: Scene) -> bool:
        """Whether all of it is so."""
        if self.background not in (None, scene.background):
            return False
        if any(_count(scene, thing) != count for thing, count in self.exact):
            return False
        return any(self._holds(scene, places) for places in self._whole(scene))

    def relation_is_true(self, scene: Scene) -> bool | None:
        """Whether the stated relation holds in a scene; None if the caption states none."""
        if self.relation is None:
            return None
        return any(self._holds(scene, places) for places in self._whole(scene))

    def shown(self, scene: Scene) -> int:
        """Number of its things that the scene shows, each object taken once."""
        slots = min(len(self.things), len(scene.objects))
        return max(
            sum(
                thing.fits(scene.objects[place])
                for thing, place in zip(things, places, strict=True)
            )
            for things in permutations(self.things, slots)
            for places in permutations(range(len(scene.objects)), slots)
        )

    def named(self, scene: Scene) -> int:
        """Number of the scene's objects that it names by colour and shape, each counted once."""
        left = [(thing.color, thing.shape) for thing in self.things]
        named = 0
        for shown in scene.objects:
            if shown.kind in left:
                left.remove(shown.kind)
                named += 1
        return named

    def _whole(self, scene: Scene) -> Iterator[tuple[int, ...]]:
        """All assignments of the things to objects of the scene."""
        for places in permutations(range(len(scene.objects)), len(self.things)):
            pairs = zip(self.things, places, strict=True)
            if all(thing.fits(scene.objects[place]) for thing, place in pairs):
                yield places

    def _holds(self, scene: Scene, places: Sequence[int]) -> bool:
        if self.relation is not None and scene.relation(places[0], places[1]) != self.relation:
            return False
        return self.place is None or scene.objects[places[0]].place == self.place


def read_caption(text: str) -> Statement | None:
    """Read the content of a caption; None if it is no caption of coloured shapes."""
    words = _OPENING.sub("", " ".join(text.lower().strip(" .").split()), count=1)
    background = place = None
    if match := _BACKGROUND.search(words):
        background, words = match["name"], words[: match.start()]
    elif match := _PLACE.search(words):
        place, words = _PLACES[match[0].strip()], words[: match.start()]
    relation = None
    parts = re.split(r", | and ", words)
    if match := _BETWEEN.search(words):
        relation = _RELATIONS[match[0].strip()]
        parts = [words[: match.start()], words[match.end() :]]
    read = [_thing(part) for part in parts]
    known = [each for each in read if each is not None]
    if len(known) < len(read):
        return None
    things = tuple(thing for thing, count, _ in known for _ in range(count))
    if (relation and len(things) != 2) or ((place or background) and len(things) != 1):
        return None
    exact = tuple((thing, count) for thing, count, counts in known if counts)
    return Statement(things, exact, relation, place, background)


def caption_figures(
    captions: Mapping[str, str], scenes: Mapping[str, Scene]
) -> dict[str, float | None]:
    """Measure how true captions are, in percent.

    Args:
        captions: Caption of each picture, by id.
        scenes: Scene that each of these pictures shows, by id.

    Returns:
        "right": captions that are true from end to end; "objects": of the objects that are named,
        those that are there (a text that is no caption counts 0); "named": of the objects that are
        there, those that are named by colour and shape; "relations": of the captions that say how
        two objects lie, those that say it right, None where none does; "unread": texts that are
        no caption of coloured shapes, and count as wrong.
    """
    right, objects, relations, unread = [], [], [], []
    named = there = 0
    for key, text in captions.items():
        scene, said = scenes[key], read_caption(text)
        there += len(scene.objects)
        unread.append(said is None)
        right.append(said is not None and said.is_true(scene))
        objects.append(said.shown(scene) / len(said.things) if said else 0.0)
        if said is not None:
            named += said.named(scene)
            if (so := said.relation_is_true(scene)) is not None:
                relations.append(so)
    return {
        "right": _percent(right),
        "objects": _percent(objects),
        "named": 100 * named / there if there else None,
        "relations": _percent(relations),
        "unread": _percent(unread),
    }


def _thing(words: str) -> tuple[Thing, int, bool] | None:
    """A thing, how many, and whether they are counted; None where the words are something else."""
    match = _ONE.fullmatch(words)
    if match is None:
        return None
    count = _COUNTS[match["count"]]
    if bool(match["plural"]) != (count > 1):
        return None
    shape = next((name for name in SHAPES if name == match["noun"]), None)
    color = next((name for name in COLORS if name == match["color"]), None)
    size = _SIZES.get(match["size"] or "")
    return Thing(shape, color, size), count, match["count"] not in ("a", "an")


def _count(scene: Scene, thing: Thing) -> int:
    return sum(thing.fits(shown) for shown in scene.objects)


def _percent(values: Sequence[float]) -> float | None:
    return 100 * sum(values) / len(values) if values else None
