"""The bundled model of crowded scenes: the words of a question light up what they name."""

import random

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffenc import DiffusionEncoder, list_taps
from diffenc.cli import demo_figure
from diffenc.cli.demo import demo_queries
from diffenc.cli.demo_answers import named
from diffenc.models import describe
from diffenc.models.shapes import shapes_folder
from diffenc.shapes import masks, render
from diffenc.shapes.crowds import sample_crowd
from diffenc.shapes.example import CROWD, crowded_picture
from diffenc.viz import HeatMap

HELD_OUT = 920_000


@pytest.fixture(scope="module")
def encoder():
    return DiffusionEncoder.from_pretrained("shapes-many")


def crowds_with_a_single_color(count):
    """Scenes, an object whose colour no other has, and another such object."""
    rng, drawn = random.Random(f"crowds/{HELD_OUT}"), []
    while len(drawn) < count:
        scene = sample_crowd(rng)
        colors = [thing.color for thing in scene.objects]
        alone = [index for index, color in enumerate(colors) if colors.count(color) == 1]
        if len(alone) > 1:
            drawn.append((scene, *rng.sample(alone, 2)))
    return drawn


def grown(mask, pixels=2):
    rows, columns = np.nonzero(mask)
    larger = np.zeros_like(mask)
    for down in range(-pixels, pixels + 1):
        for right in range(-pixels, pixels + 1):
            inside = np.clip(rows + down, 0, 95), np.clip(columns + right, 0, 95)
            larger[inside] = True
    return larger


def test_the_stock_pipeline_loads_it():
    pipe = StableDiffusionPipeline.from_pretrained(shapes_folder("shapes-many"))
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (96, 96, 3)


def test_its_parts_agree_on_the_size_of_pictures():
    """Scripts render at the side that the VAE names, the U-Net says what pictures become."""
    configs = describe("shapes-many").configs
    assert configs["vae"]["sample_size"] == 96 == 4 * configs["unet"]["sample_size"]


def test_its_pictures_have_96_pixels_and_its_taps_are_those_of_the_smaller_one():
    assert describe("shapes-many").default_size == 96
    sizes = {tap.name: (tap.channels, tap.reduction) for tap in list_taps("shapes-many")}
    assert sizes == {tap.name: (tap.channels, tap.reduction) for tap in list_taps("shapes")}


@pytest.mark.long
def test_words_of_a_reference_are_seen_on_the_object_that_they_name(encoder):
    trials = crowds_with_a_single_color(40)
    images = [render(scene, 96) for scene, _, _ in trials]
    texts = [f"the {scene.objects[target].color} object" for scene, target, _ in trials]
    gathered = encoder.word_tokens(images, texts)
    hits = {"color": 0, "object": 0}
    for row, (scene, target, _) in enumerate(trials):
        allowed = grown(masks(scene, 96)[target])
        for label, word in (("color", scene.objects[target].color), ("object", "object")):
            values = gathered.maps[row, gathered.words[row].index(word)]
            side = values.shape[-1]
            down, across = divmod(int(values.argmax()), side)
            middle = [int((place + 0.5) * 96 / side) for place in (down, across)]
            hits[label] += bool(allowed[middle[0], middle[1]])
    assert hits["color"] >= 37
    assert hits["object"] >= 36


@pytest.mark.long
def test_a_reference_changes_features_on_its_object_more_than_on_another(encoder):
    trials = crowds_with_a_single_color(40)
    images = [render(scene, 96) for scene, _, _ in trials]
    inside = torch.stack(
        [torch.from_numpy(masks(scene, 96)[target]).float() for scene, target, _ in trials]
    )
    changes = []
    for turn in (1, 2):
        texts = [f"the {trial[0].objects[trial[turn]].color} object" for trial in trials]
        gathered = encoder.word_tokens(images, texts, conditioning="uncond")
        maps = torch.nn.functional.interpolate(
            gathered.question_maps("change")[:, None], (96, 96), mode="nearest"
        )[:, 0]
        within = (maps * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2))
        changes.append(within / maps.mean(dim=(1, 2)))
    assert (changes[0] > changes[1]).float().mean() >= 0.85


def test_the_demo_draws_what_changed_at_the_finest_tap(encoder, monkeypatch):
    drawn = []

    def heat_map(values):
        drawn.append(values)
        return HeatMap(values)

    monkeypatch.setattr(demo_figure, "HeatMap", heat_map)
    queries = demo_queries()[:1]
    picture = crowded_picture(96)
    gathered = encoder.word_tokens([picture], [queries[0].text], conditioning="uncond")
    demo_figure.draw_demo(picture, gathered, queries, None, model="shapes-many")
    without, under = (
        gathered.features.select(half)["up_blocks.2.attentions.0"] for half in ("uncond", "cond")
    )
    moved = (under - without).norm(dim=1)[0]
    _, changed = drawn
    assert changed.shape == (24, 24)
    torch.testing.assert_close(changed / changed.sum(), moved / moved.sum())


@pytest.mark.long
def test_the_tokens_of_the_demo_say_what_is_true(encoder):
    queries = demo_queries()
    texts = [each.text for each in queries]
    picture = crowded_picture(96)
    gathered = encoder.word_tokens([picture] * 3, texts, conditioning="uncond")
    assert named(encoder, gathered, queries) == [each.answer for each in queries]
    assert [each.answer for each in queries] == ["triangle", "star", "circle"]
    for each in queries:
        fitting = [
            thing
            for thing in CROWD.objects
            if each.word == thing.shape or (each.word == "object" and thing.color in each.text)
        ]
        assert len(fitting) == 1
