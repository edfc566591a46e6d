"""Caption k is true of scene k and false of the other one; only one thing differs."""

from collections import Counter

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from diffenc.errors import ConfigError
from diffenc.shapes.pairs import (
    MMVP_PATTERNS,
    WINOGROUND_KINDS,
    mmvp_pairs,
    winoground_items,
)
from diffenc.shapes.render import render_array
from shapes_oracle import is_true

REFUSED = (ConfigError, TypeCheckError)  # with types checked at run time, the checker comes first
COUNT = 60
PAIRS = {kind: mmvp_pairs(COUNT, seed=51, patterns=[kind]) for kind in MMVP_PATTERNS}
ITEMS = {kind: winoground_items(COUNT, seed=51, kinds=[kind]) for kind in WINOGROUND_KINDS}
ALL = [
    *(pytest.param(pairs, id=f"mmvp-{kind}") for kind, pairs in PAIRS.items()),
    *(pytest.param(items, id=f"winoground-{kind}") for kind, items in ITEMS.items()),
]
MAKERS = pytest.mark.parametrize(
    ("make", "kinds"),
    [(mmvp_pairs, MMVP_PATTERNS), (winoground_items, WINOGROUND_KINDS)],
    ids=["mmvp", "winoground"],
)


def facts(thing):
    """What words can tell of an object; its exact radius is none of it."""
    return {
        "color": thing.color,
        "shape": thing.shape,
        "size": thing.size,
        "place": (thing.x, thing.y),
    }


def changes(pair):
    """Names of what differs, for each object of two scenes with equally many."""
    first, second = pair.scenes
    return [
        {name for name, value in facts(a).items() if value != facts(b)[name]}
        for a, b in zip(first.objects, second.objects, strict=True)
    ]


@pytest.mark.parametrize("pairs", ALL)
def test_each_caption_is_true_of_its_own_scene_and_false_of_the_other(pairs):
    for pair in pairs:
        table = [[is_true(text, scene) for text in pair.captions] for scene in pair.scenes]
        assert table == [[True, False], [False, True]], pair


@pytest.mark.parametrize("pairs", ALL)
def test_the_two_pictures_differ_and_share_their_background(pairs):
    for pair in pairs:
        first, second = (render_array(scene).astype(int) for scene in pair.scenes)
        assert (np.abs(first - second).max(axis=2) > 30).sum() >= 8, pair
        assert pair.scenes[0].background == pair.scenes[1].background


@pytest.mark.parametrize("kind", ["color", "shape", "size"])
def test_an_mmvp_pair_changes_its_own_pattern_alone(kind):
    assert all(changes(pair) == [{kind}] for pair in PAIRS[kind])


def test_an_mmvp_pair_of_positions_moves_one_object_to_the_other_side():
    assert all(changes(pair) == [{"place"}] for pair in PAIRS["position"])
    words = {text.split()[-1] for pair in PAIRS["position"] for text in pair.captions}
    assert words == {"left", "right", "top", "bottom"}


def test_an_mmvp_pair_of_counts_takes_one_object_away():
    for pair in PAIRS["count"]:
        more, fewer = (scene.objects for scene in pair.scenes)
        assert more[:-1] == fewer


@pytest.mark.parametrize(
    "pairs", [PAIRS["relation"], ITEMS["relation"]], ids=["mmvp", "winoground"]
)
def test_a_pair_of_relations_exchanges_two_places(pairs):
    for pair in pairs:
        assert changes(pair) == [{"place"}, {"place"}]
    said = {text.split()[3] for pair in pairs for text in pair.captions}
    assert said == {"left", "right", "above", "below"}


def test_a_winoground_item_of_nouns_changes_one_word():
    words = Counter()
    for item in ITEMS["noun"]:
        first, second = (text.replace("an ", "a ").split() for text in item.captions)
        assert sum(a != b for a, b in zip(first, second, strict=True)) == 1
        (changed,) = [change for change in changes(item) if change]
        words.update(changed)
    assert set(words) == {"color", "shape"}


@pytest.mark.parametrize("kind", ["color", "relation", "size"])
def test_winoground_captions_have_the_same_words_in_another_order(kind):
    for item in ITEMS[kind]:
        first, second = (Counter(text.replace("an ", "a ").split()) for text in item.captions)
        assert first == second
        assert item.captions[0] != item.captions[1]


def test_a_winoground_item_of_colours_exchanges_them_alone():
    for item in ITEMS["color"]:
        assert changes(item) == [{"color"}, {"color"}]
        colors = [[thing.color for thing in scene.objects] for scene in item.scenes]
        assert colors[0] == colors[1][::-1]


def test_winoground_captions_of_counts_say_two_of_either_kind():
    for item in ITEMS["count"]:
        first, second = item.captions
        assert first.startswith("two ")
        assert " and two " in second
        kinds = [{thing.kind for thing in scene.objects} for scene in item.scenes]
        assert kinds[0] == kinds[1]


@MAKERS
def test_equal_seeds_give_equal_pairs_whatever_else_is_drawn(make, kinds):
    everything = make(3, seed=1)
    assert [pair.kind for pair in everything] == [kind for kind in kinds for _ in range(3)]
    assert make(3, seed=1) == everything
    assert make(1, seed=1) == everything[::3]
    assert make(3, seed=2) != everything


@MAKERS
def test_unknown_kinds_are_refused_with_the_known_ones(make, kinds):
    option = "patterns" if make is mmvp_pairs else "kinds"
    with pytest.raises(REFUSED) as refusal:
        make(1, seed=0, **{option: ["colour"]})
    if isinstance(refusal.value, ConfigError):
        refusal.match(r"unknown kinds \['colour'\]; known are \['color'")


@MAKERS
def test_a_negative_number_is_refused_and_none_is_an_empty_list(make, kinds):
    with pytest.raises(ConfigError, match="0 or more, got -1"):
        make(-1, seed=0)
    assert make(0, seed=0) == []
