"""Pictures and masks show what the scene says: seen by hue, and by geometry written anew."""

import colorsys
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffenc.errors import ConfigError
from diffenc.shapes.render import masks, render, render_array
from diffenc.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    sample_scene,
    sample_scenes,
)

SCENES = list(sample_scenes(80, seed=21))
HUES = {  # degrees on the colour wheel, where a person would use the word
    "red": (-20, 12),
    "orange": (18, 42),
    "yellow": (45, 65),
    "green": (90, 160),
    "blue": (205, 250),
    "purple": (265, 310),
}


def word_for(pixel: np.ndarray) -> str | None:
    hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
    if saturation < 0.1:
        return "black" if value < 0.2 else "white" if value > 0.9 else "gray"
    degrees = 360 * hue if hue < 0.9 else 360 * hue - 360
    return next((word for word, (low, high) in HUES.items() if low <= degrees <= high), None)


def is_inside(thing: SceneObject, x: float, y: float) -> bool:
    """Whether a point lies in the outline, in half-planes around the centre."""
    u, v = (x - thing.x) / thing.radius, (y - thing.y) / thing.radius
    if thing.shape == "circle":
        return math.hypot(u, v) < 0.9
    if thing.shape == "square":
        return max(abs(u), abs(v)) < 0.8
    if thing.shape == "triangle":
        return v < 0.8 and abs(u) < 0.95 * (v + 1) / 1.8
    # A star is five mirrored kites: fold the angle into half a point, then one edge decides.
    angle = abs((math.atan2(u, -v) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    distance = math.hypot(u, v)
    px, py = distance * math.cos(angle), distance * math.sin(angle)
    qx, qy = 0.42 * math.cos(math.pi / 5), 0.42 * math.sin(math.pi / 5)
    return (px - 1) * qy - py * (qx - 1) < 0


def outline(thing: SceneObject, size: int) -> np.ndarray:
    centers = (np.arange(size) + 0.5) / size
    return np.array([[is_inside(thing, x, y) for x in centers] for y in centers])


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def inner(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask whose eight neighbours belong to it too: no soft edge."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    shifted = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.logical_and.reduce(shifted)


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("word", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_is_the_outline_of_its_object(shape, word, size):
    scene = sample_scene(random.Random(0), kinds=[("red", shape)], sizes=[word])
    (mask,) = masks(scene, size)
    assert iou(mask, outline(scene.objects[0], size)) > 0.93


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("color", COLORS)
def test_colours_are_those_that_their_words_say(color, background):
    scene = Scene((SceneObject("square", color, "large", 0.5, 0.5, 0.2),), background)
    pixels = render_array(scene)
    assert word_for(pixels[32, 32]) == color
    assert word_for(pixels[2, 2]) == background


def test_pixels_of_every_mask_have_the_colour_of_its_object_and_all_others_the_background():
    for scene in SCENES:
        pixels, parts = render_array(scene), masks(scene)
        for thing, mask in zip(scene.objects, parts, strict=True):
            found = np.unique(pixels[inner(mask)], axis=0)
            assert [word_for(pixel) for pixel in found] == [thing.color]
        ground = inner(inner(~parts.any(axis=0)))  # the soft tip of a star is two pixels long
        found = np.unique(pixels[ground], axis=0)
        assert [word_for(pixel) for pixel in found] == [scene.background]


def test_masks_are_disjoint_and_the_front_object_hides_the_one_behind():
    behind = SceneObject("square", "red", "large", 0.45, 0.5, 0.2)
    front = SceneObject("circle", "blue", "small", 0.55, 0.5, 0.13)
    pixels, parts = render_array(Scene((behind, front))), masks(Scene((behind, front)))
    assert word_for(pixels[32, 35]) == "blue"
    assert not (parts[0] & parts[1]).any()
    assert (parts[1] == masks(Scene((front,)))[0]).all()
    assert (parts[0] == masks(Scene((behind,)))[0] & ~parts[1]).mean() > 0.99


def test_objects_of_sampled_scenes_are_seen_whole():
    for scene in SCENES:
        for thing, mask in zip(scene.objects, masks(scene), strict=True):
            assert iou(mask, masks(Scene((thing,)))[0]) > 0.95


def test_a_hidden_object_keeps_an_empty_mask():
    thing = SceneObject("square", "red", "large", 0.5, 0.5, 0.2)
    parts = masks(Scene((replace(thing, radius=0.1), thing)))
    assert parts.shape == (2, 64, 64)
    assert parts[0].sum() == 0


def test_masks_of_two_resolutions_agree():
    for scene in SCENES[:10]:
        coarse = masks(scene, 64)
        fine = masks(scene, 128).reshape(-1, 64, 2, 64, 2).mean(axis=(2, 4)) > 0.5
        for a, b in zip(coarse, fine, strict=True):
            assert iou(a, b) > 0.75


def test_an_empty_scene_is_plain_and_has_no_masks():
    assert masks(Scene(()), 16).shape == (0, 16, 16)
    assert np.unique(render_array(Scene((), "black"), 16)).size == 1


def test_equal_scenes_give_equal_pictures():
    picture = render(SCENES[0])
    assert isinstance(picture, Image.Image)
    assert (picture.mode, picture.size) == ("RGB", (64, 64))
    assert picture.tobytes() == render(SCENES[0]).tobytes()


def test_the_array_is_the_picture_and_belongs_to_the_caller():
    pixels = render_array(SCENES[0], 40)
    assert pixels.shape == (40, 40, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == np.array(render(SCENES[0], 40))).all()
    pixels[:] = 0


@pytest.mark.parametrize("size", [7, 0, -64])
@pytest.mark.parametrize("draw", [render, render_array, masks])
def test_a_picture_too_small_is_refused(draw, size):
    with pytest.raises(ConfigError, match=f"at least 8 pixels a side, got {size}"):
        draw(SCENES[0], size)


def test_the_smallest_picture_is_drawn():
    assert render(SCENES[0], 8).size == (8, 8)
