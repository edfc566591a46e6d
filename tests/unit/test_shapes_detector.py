"""The detector that judges generated pictures finds what the renderer drew."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from diffenc.errors import ImageError
from diffenc.shapes.render import render, render_array
from diffenc.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, SceneObject, sample_scenes

PATH = Path(__file__).parents[2] / "tools" / "shapes" / "detector.py"


@pytest.fixture(scope="module")
def detect():
    spec = importlib.util.spec_from_file_location("shapes_detector", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module.detect
    finally:
        del sys.modules[spec.name]


def words(things):
    return Counter((thing.color, thing.shape, thing.size) for thing in things)


def blurred_and_noisy(pixels, rng):
    """Weights 1, 4, 1 along both axes (a Gaussian of 0.6 pixels), and noise of 8 steps of 255."""
    soft = np.pad(pixels.astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
    soft = (soft[:-2] + 4 * soft[1:-1] + soft[2:]) / 6
    soft = (soft[:, :-2] + 4 * soft[:, 1:-1] + soft[:, 2:]) / 6
    return (soft + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)


def test_objects_of_rendered_scenes_are_found_with_colour_shape_size_and_place(detect):
    for scene in sample_scenes(25, seed=61):
        found = detect(render(scene))
        assert words(found) == words(scene.objects)
        for thing in scene.objects:
            assert any(np.hypot(one.x - thing.x, one.y - thing.y) < 0.02 for one in found)
        assert min(one.fit for one in found) > 0.75


def test_blur_and_noise_do_not_deceive(detect):
    rng = np.random.default_rng(0)
    scenes = list(sample_scenes(20, seed=62))
    found = [detect(blurred_and_noisy(render_array(scene), rng)) for scene in scenes]
    right = [words(a) == words(scene.objects) for a, scene in zip(found, scenes, strict=True)]
    assert np.mean(right) >= 0.95


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_colour_of_a_small_shape_is_told_on_every_background(detect, shape, background):
    for color in COLORS[:: 1 if shape == "star" else 3]:
        scene = Scene((SceneObject(shape, color, "small", 0.3, 0.6, 0.12),), background)
        assert words(detect(render_array(scene))) == words(scene.objects)


def test_touching_objects_of_two_colours_are_told_apart(detect):
    square = SceneObject("square", "red", "large", 0.35, 0.5, 0.2)
    circle = SceneObject("circle", "blue", "large", 0.63, 0.5, 0.2)
    assert words(detect(render(Scene((square, circle))))) == words((square, circle))


def test_other_resolutions_are_read(detect):
    (scene,) = sample_scenes(1, seed=63)
    assert words(detect(render(scene, 96))) == words(scene.objects)


def test_pictures_without_shapes_have_none(detect):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert detect(noise) == []
    assert detect(np.zeros((64, 64, 3), dtype=np.uint8)) == []
    bar = render_array(Scene(()))
    bar[30:34, :] = (220, 40, 40)
    assert detect(bar) == []


@pytest.mark.parametrize("shape", [(64, 64), (64, 32, 3), (8, 8, 3), (64, 64, 4)], ids=str)
def test_what_is_no_picture_of_a_scene_is_refused(detect, shape):
    with pytest.raises(ImageError, match=r"square of RGB|at least 16"):
        detect(np.zeros(shape, dtype=np.uint8))
