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
