import pytest

from diffenc.shapes.captions import captions
from diffenc.shapes.scenes import Scene, SceneObject, sample_scenes
from diffenc.studies.vlm.truth import caption_figures, read_caption


def thing(shape="circle", color="red", size="small", x=0.2, y=0.5):
    return SceneObject(shape, color, size, x, y, 0.13 if size == "small" else 0.2)


PAIR = Scene((thing(), thing("square", "blue", "large", x=0.75)), "gray")
TWINS = Scene((thing(x=0.2), thing(x=0.5), thing("star", "green", x=0.8)))
ALONE = Scene((thing("star", "orange", x=0.5),), "black")


@pytest.mark.parametrize(
    ("scene", "text", "true"),
    [
        (PAIR, "a red circle left of a blue square", True),
        (PAIR, "a red circle to the left of a large blue square", True),
        (PAIR, "a blue square right of a red circle", True),
        (PAIR, "a blue square left of a red circle", False),
        (PAIR, "a red circle above a blue square", False),
        (PAIR, "a circle and a square", True),
        (PAIR, "a photo of a blue square and a small red circle", True),
        (PAIR, "a large red circle and a blue square", False),
        (PAIR, "A red circle.", True),
        (PAIR, "two red circles", False),
        (PAIR, "a red circle and a red circle", False),
        (PAIR, "one red circle and one blue square", True),
        (TWINS, "two red circles and a green star", True),
        (TWINS, "there are two red circles and a green star", True),
        (TWINS, "one red circle and a green star", False),
        (TWINS, "a red circle", True),
        (TWINS, "three red circles", False),
        (ALONE, "an orange star in the middle", True),
        (ALONE, "an orange star on the left", False),
        (ALONE, "an orange star on a black background", True),
        (ALONE, "an orange star on a white background", False),
        (ALONE, "there is an orange object", True),
    ],
)
def test_truth_of_a_caption(scene, text, true):
    said = read_caption(text)
    assert said is not None
    assert said.is_true(scene) is true


@pytest.mark.parametrize(
    "text",
    [
        *("", "red", "a red", "a red dog", "two red circle", "a red circles", "a red circle and"),
        *("a red circle left of", "a red circle left of a star and a square"),
        "a red circle and a star on the left",
        "a red circle a blue square",
        *("a redder circle", "an incredible circle", "a red circles's star", "no red circle"),
        *("a red circle left of a photo of a blue square", "a there is red circle"),
        *("not a red circle", "a red circle, not a star", "2 red circles", "a red-blue circle"),
        *("a red circle or a star", "maybe a red circle", "two or three red circles"),
    ],
)
def test_what_is_no_caption_is_not_read(text):
    assert read_caption(text) is None


def test_every_caption_of_the_world_is_read_and_true():
    for index, scene in enumerate(sample_scenes(150, seed=11)):
        for text in captions(scene, 5, seed=index):
            said = read_caption(text)
            assert said is not None, text
            assert said.is_true(scene), text


def test_figures_count_objects_and_captions():
    scenes = {"1": PAIR, "2": TWINS, "3": ALONE}
    said = {
        "1": "a red circle left of a green square",  # one of two things is there
        "2": "two red circles and a green star",  # all true
        "3": "gibberish",
    }
    found = caption_figures(said, scenes)
    assert found["right"] == pytest.approx(100 / 3)
    assert found["objects"] == pytest.approx(100 * (0.5 + 1 + 0) / 3)
    assert found["named"] == pytest.approx(100 * (1 + 3 + 0) / 6)
    assert found["relations"] == 0.0  # the circle is left of no green square


def test_without_a_relation_there_is_no_share_of_right_ones():
    assert caption_figures({"3": "an orange star"}, {"3": ALONE})["relations"] is None
    assert caption_figures({"1": "a circle left of a square"}, {"1": PAIR})["relations"] == 100


def test_an_object_is_counted_once():
    said = read_caption("two red circles and a red circle")
    assert said is not None
    assert said.shown(PAIR) == 1
    assert said.named(PAIR) == 1
    assert said.shown(TWINS) == 2


def test_texts_that_are_no_captions_are_counted():
    said = {"a": "a red circle", "b": "a redder circle", "c": "", "d": "a blue star"}
    figures = caption_figures(said, dict.fromkeys(said, PAIR))
    assert figures["unread"] == 50
    assert figures["right"] == 25
