"""What dense features are measured on: pairs of pictures with points, pictures with maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from diffenc.checks.arguments import whole
from diffenc.inputs.images import ImageSource

Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True, eq=False)
class PointPair:
    """Two pictures, and points of the first whose place in the second is known.

    Attributes:
        names: Names of both pictures, each of one picture of the data alone.
        images: Both pictures.
        captions: A text for each picture, such as "a photo of a cat".
        first_points: Points of the first picture: x and y as shares of its width and height.
        second_points: The same points in the second picture.
        second_size: Height and width of the second picture in pixels.
        box: Longer side of the box around the second picture's object, in pixels.
        category: Name of what the pictures show.
    """

    names: tuple[str, str]
    images: tuple[ImageSource, ImageSource]
    captions: tuple[str, str]
    first_points: Float[Tensor, "points 2"]
    second_points: Float[Tensor, "points 2"]
    second_size: tuple[int, int]
    box: float
    category: str


@dataclass(frozen=True, slots=True, eq=False)
class Sighting:
    """Points in space that the cells of a picture show, and the camera that sees them.

    Attributes:
        points: Point of each cell in metres (right, down, into the picture), with the camera as
            the origin; 0 where there is none.
        rotation: Rotation from the object's directions to the camera's.
        translation: Place of the object's origin, in metres from the camera.
        focal: Focal length over the side of the picture.
    """

    points: Float[Tensor, "3 height width"]
    rotation: Float[Tensor, "3 3"]
    translation: Float[Tensor, "3"]
    focal: float


class View:
    """A picture of an object whose shape and place are known; readers of datasets extend it.

    Attributes:
        name: Name of one picture of the data alone.
        caption: Text about the picture.
    """

    name: str
    caption: str

    def image(self) -> Image.Image:
        """The picture, decoded."""
        raise NotImplementedError

    def sighting(self, cells: int) -> Sighting:
        """What it shows in space, on a grid of so many cells a side."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, eq=False)
class LabelledPicture:
    """A picture with a class for each cell of a grid.

    Attributes:
        image: Picture.
        caption: Text about the picture.
        labels: Class of each cell, 0 and up.
    """

    image: ImageSource
    caption: str
    labels: Int[Tensor, "height width"]


@dataclass(frozen=True, slots=True)
class Surface:
    """Depth of a picture's pixels, and which way their surfaces look.

    Attributes:
        depth: Distance along the camera's axis, in metres; 0 where it is unknown.
        normals: Unit vectors (right, down, into the picture) that look at the camera; 0 where they
            are unknown.
    """

    depth: Float[Tensor, "height width"]
    normals: Float[Tensor, "3 height width"]


class DepthPicture:
    """A picture whose surface is read when it is asked for; readers of datasets extend it.

    Attributes:
        caption: Text about the picture.
    """

    caption: str

    def image(self) -> Image.Image:
        """The picture, decoded."""
        raise NotImplementedError

    def surface(self) -> Surface:
        """Its depth and normals."""
        raise NotImplementedError


def some_of(entries: Sequence[Entry], most: int | None) -> list[Entry]:
    """At most so many entries, spread evenly over all; None takes all.

    Raises:
        ConfigError: A number below 1.
    """
    if most is None or len(entries) <= whole("most", most, least=1):
        return list(entries)
    return [entries[place * len(entries) // most] for place in range(most)]
