"""One picture that demonstrations begin with."""

from PIL import Image

from diffenc.shapes.render import render
from diffenc.shapes.scenes import Scene, SceneObject


def example_picture(size: int) -> Image.Image:
    """A large red circle left of a large blue square, and a small yellow star below both.

    Args:
        size: Side of the picture in pixels.
    """
    objects = (
        SceneObject("circle", "red", "large", 0.27, 0.32, 0.21),
        SceneObject("square", "blue", "large", 0.73, 0.35, 0.21),
        SceneObject("star", "yellow", "small", 0.45, 0.79, 0.14),
    )
    return render(Scene(objects), size)


CROWD = Scene(
    (
        SceneObject("square", "green", "large", 0.2, 0.2, 0.1),
        SceneObject("star", "purple", "large", 0.55, 0.17, 0.115),
        SceneObject("triangle", "green", "small", 0.84, 0.27, 0.07),
        SceneObject("circle", "orange", "large", 0.42, 0.5, 0.11),
        SceneObject("triangle", "yellow", "large", 0.75, 0.55, 0.1),
        SceneObject("square", "yellow", "small", 0.16, 0.55, 0.07),
        SceneObject("triangle", "red", "large", 0.24, 0.82, 0.11),
        SceneObject("square", "green", "small", 0.58, 0.83, 0.07),
    )
)
"""Eight objects, of which "red", "purple", "orange", "star" and "circle" name one each."""


def crowded_picture(size: int) -> Image.Image:
    """`CROWD` as a picture: squares and triangles around a star and a circle.

    Args:
        size: Side of the picture in pixels.
    """
    return render(CROWD, size)
