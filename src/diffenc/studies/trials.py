"""Scenes with one object that is asked about, what is asked, and what is true."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from diffenc.errors import ConfigError
from diffenc.shapes.captions import join, noun_phrase
from diffenc.shapes.scenes import COLORS, SHAPES, Scene, SceneObject, sample_scene

Property = Literal["color", "shape", "position", "count"]
PROPERTIES: tuple[Property, ...] = get_args(Property)

Conditioning = Literal["uncond", "question", "caption"]
CONDITIONINGS: tuple[Conditioning, ...] = get_args(Conditioning)
"""Kinds of text that a scene is read under."""

CLASSES: dict[Property, int] = {
    "color": len(COLORS),
    "shape": len(SHAPES),
    "position": 9,
    "count": 3,
}
"""Number of answers. Positions are the ninths of the picture, row by row."""

_HELD_OUT = 950_000  # no bundled model was trained on seeds from 900,000 up


@dataclass(frozen=True, slots=True)
class Trial:
    """A scene whose objects differ in colour and in shape, so that each word names one of them.

    Attributes:
        scene: Scene with one to three objects, apart from each other.
        target: Index of the object that is asked about.
    """

    scene: Scene
    target: int

    @property
    def thing(self) -> SceneObject:
        """The object that is asked about."""
        return self.scene.objects[self.target]

    def label(self, asked: Property) -> int:
        """The true answer, 0 to `CLASSES[asked]` - 1."""
        thing = self.thing
        match asked:
            case "color":
                return COLORS.index(thing.color)
            case "shape":
                return SHAPES.index(thing.shape)
            case "position":
                return 3 * min(int(3 * thing.y), 2) + min(int(3 * thing.x), 2)
            case "count":
                return len(self.scene.objects) - 1

    def question(self, asked: Property) -> str:
        """A question after the property that does not give it away."""
        match asked:
            case "color":
                return f"what color is the {self.thing.shape}?"
            case "shape":
                return f"what shape is the {self.thing.color} object?"
            case "position":
                return f"where is the {self.thing.shape}?"
            case "count":
                return "how many objects are there?"

    def caption(self) -> str:
        """All objects by colour and shape: gives away colours, shapes and their number."""
        return join([phrase(thing) for thing in self.scene.objects])


def phrase(thing: SceneObject) -> str:
    """``"a red circle"``."""
    return noun_phrase(shape=thing.shape, color=thing.color)


def sample_trials(count: int, *, seed: int, least: int = 1) -> list[Trial]:
    """Held-out scenes with `least` to three objects, each number equally often.

    Args:
        count: Number of scenes.
        seed: Seed of the scenes, 0 or more; trial k depends on the seed, k and `least` alone.
        least: Smallest number of objects in a scene, 1 to 3.

    Raises:
        ConfigError: A negative count or seed, or another `least`.
    """
    if count < 0 or seed < 0 or not 1 <= least <= 3:
        raise ConfigError(
            "trials need a count and a seed of 0 or more and 1 to 3 objects at least, got "
            f"count={count}, seed={seed}, least={least}"
        )
    trials = []
    for index in range(count):
        rng = random.Random(f"{_HELD_OUT + seed}/{index}/{least}")
        objects = least + index % (4 - least)
        kinds = list(zip(rng.sample(COLORS, objects), rng.sample(SHAPES, objects), strict=True))
        trials.append(Trial(sample_scene(rng, kinds=kinds), rng.randrange(objects)))
    return trials


def chance_of(labels: Sequence[int]) -> float:
    """Share of the most frequent answer: what is right without looking."""
    return max(Counter(labels).values()) / len(labels)
