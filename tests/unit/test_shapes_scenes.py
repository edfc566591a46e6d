"""The sampler keeps its promises: seeded, inside the picture, apart, and never endless."""

import itertools
import math
import random
from collections import Counter
from dataclasses import FrozenInstanceError, replace

import pytest
from jaxtyping import TypeCheckError

from diffenc.errors import ConfigError, DiffencError
from diffenc.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    INVERSE,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    perturb,
    sample_scene,
    sample_scenes,
    turn,
)

REFUSED = (ConfigError, TypeCheckError)  # with types checked at run time, the checker comes first
SCENES = list(sample_scenes(500, seed=11))


def dot(x: float, y: float, **changes: object) -> SceneObject:
    """A small red circle with its centre there, or what `changes` makes of it."""
    return replace(SceneObject("circle", "red", "small", x, y, 0.13), **changes)


def test_equal_seeds_give_equal_scenes_and_other_seeds_others():
    assert list(sample_scenes(50, seed=3)) == list(sample_scenes(50, seed=3))
    assert not set(sample_scenes(50, seed=3)) & set(sample_scenes(50, seed=4))


def test_a_scene_does_not_depend_on_how_many_are_drawn():
    assert list(sample_scenes(5, seed=3)) == list(sample_scenes(50, seed=3))[:5]
    assert list(sample_scenes(0, seed=3)) == []


def test_sampling_leaves_the_global_generator_alone(pytestconfig):
    if pytestconfig.getoption("jaxtyping_packages", None):
        pytest.skip("the run-time type checker draws from the global generator itself")
    state = random.getstate()
    perturb(next(sample_scenes(1, seed=0)), random.Random(0))
    assert random.getstate() == state


def test_scenes_stay_what_they_were_when_the_bundled_models_learnt_them():
    (scene,) = sample_scenes(1, seed=4)
    (thing,) = scene.objects
    assert (scene.background, thing.kind, thing.size) == ("white", ("red", "circle"), "large")
    place = (0.6916269652, 0.2805684638, 0.2070991889)
    assert (thing.x, thing.y, thing.radius) == pytest.approx(place, abs=1e-9)


def test_every_word_of_the_world_occurs_and_counts_follow_their_weights():
    things = [thing for scene in SCENES for thing in scene.objects]
    assert {thing.color for thing in things} == set(COLORS)
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.size for thing in things} == set(SIZES)
    assert {thing.place for thing in things} == {*PLACES, None}
    assert {scene.background for scene in SCENES} == set(BACKGROUNDS)
    counts = Counter(len(scene.objects) for scene in SCENES)
    shares = [counts[number] / len(SCENES) for number in (1, 2, 3)]
    assert shares == pytest.approx([0.3, 0.5, 0.2], abs=0.05)


def test_objects_lie_inside_the_picture_and_are_as_large_as_their_word():
    for thing in itertools.chain.from_iterable(scene.objects for scene in SCENES):
        assert thing.radius < min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
        assert (thing.radius < 0.165) == (thing.size == "small")
        assert 0.1 < thing.radius < 0.25


@pytest.mark.parametrize("overlap", [0.0, 0.4, 1.0])
def test_objects_reach_into_each_other_no_further_than_allowed(overlap):
    deepest = -math.inf
    for scene in sample_scenes(150, seed=5, overlap=overlap):
        for a, b in itertools.combinations(scene.objects, 2):
            common = a.radius + b.radius - math.dist((a.x, a.y), (b.x, b.y))
            deepest = max(deepest, common / min(a.radius, b.radius))
    assert deepest < 0 if overlap == 0 else 0.7 * overlap < deepest <= overlap + 1e-9


def test_what_is_asked_for_is_drawn():
    kinds = [("blue", "star"), ("red", "square"), ("red", "star")]
    sizes = ["large", "small", "large"]
    for number, relation in itertools.product(range(10), RELATIONS):
        rng = random.Random(number)
        scene = sample_scene(rng, kinds=kinds, sizes=sizes, relation=relation)
        assert [thing.kind for thing in scene.objects] == kinds
        assert [thing.size for thing in scene.objects] == sizes
        assert scene.relation(0, 1) == relation
    assert {len(sample_scene(random.Random(n), count=2).objects) for n in range(20)} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "1 to 3 objects, got 0"),
        ({"count": 4}, "1 to 3 objects, got 4"),
        ({"count": -1}, "got -1"),
        ({"kinds": []}, "got 0"),
        ({"kinds": [("red", "star")] * 4}, "got 4"),
        ({"kinds": [("red", "star")], "count": 2}, "needs 2 kinds, got 1"),
        ({"count": 2, "sizes": ["small"]}, "needs 2 sizes, got 1"),
        ({"count": 1, "relation": "above"}, "two objects, got 1"),
        ({"overlap": -0.1}, "0 to 1, got -0.1"),
        ({"overlap": 1.5}, "0 to 1, got 1.5"),
        ({"overlap": math.nan}, "0 to 1, got nan"),
    ],
    ids=str,
)
def test_impossible_wishes_are_refused_with_what_is_allowed(options, message):
    with pytest.raises(ConfigError, match=message):
        sample_scene(random.Random(0), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"kinds": [("pink", "star")]},
        {"kinds": [("red", "hexagon")]},
        {"count": 1, "sizes": ["tiny"]},
        {"count": 2, "relation": "behind"},
    ],
    ids=str,
)
def test_unknown_words_are_refused(options):
    with pytest.raises(REFUSED):
        sample_scene(random.Random(0), **options)


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({"shape": "circel"}, "circle, square.*Did you mean 'circle'"),
        ({"color": "pink"}, "red, green, blue"),
        ({"size": "big"}, "small, large"),
        ({"radius": 0.0}, "radius above 0"),
        ({"radius": math.nan}, "radius above 0"),
        ({"x": math.inf}, "finite place"),
    ],
    ids=str,
)
def test_an_object_that_cannot_be_is_refused(changes, known):
    with pytest.raises(REFUSED) as refusal:
        replace(dot(0.5, 0.5), **changes)
    if isinstance(refusal.value, DiffencError):
        refusal.match(known)


def test_an_unknown_background_is_refused():
    with pytest.raises(REFUSED):
        Scene((dot(0.5, 0.5),), "pink")


def test_a_wrong_number_of_scenes_is_refused_before_the_first_is_drawn():
    with pytest.raises(ConfigError, match="0 or more, got -1"):
        sample_scenes(-1, seed=0)
    with pytest.raises(ConfigError, match="got 2"):
        sample_scenes(1, seed=0, overlap=2.0)


def test_scenes_cannot_be_changed_and_may_be_keys():
    scene = SCENES[0]
    with pytest.raises(FrozenInstanceError):
        scene.background = "black"
    assert scene in {scene}


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [
        (0.2, 0.5, "left"),
        (0.8, 0.6, "right"),
        (0.5, 0.2, "top"),
        (0.4, 0.8, "bottom"),
        (0.5, 0.5, "middle"),
        (0.55, 0.45, "middle"),
        (0.2, 0.2, None),
        (0.8, 0.25, None),
        (0.35, 0.5, None),
    ],
)
def test_a_place_is_one_word_or_none_where_no_word_is_right(x, y, place):
    assert dot(x, y).place == place


@pytest.mark.parametrize(
    ("dx", "dy", "relation"),
    [
        (-0.3, 0.0, "left of"),
        (0.3, -0.1, "right of"),
        (0.1, -0.3, "above"),
        (0.0, 0.3, "below"),
        (0.3, 0.29, None),
        (-0.3, 0.21, None),
        (0.0, 0.0, None),
    ],
)
def test_a_relation_is_one_word_or_none_where_no_word_is_right(dx, dy, relation):
    scene = Scene((dot(0.5 + dx, 0.5 + dy), dot(0.5, 0.5)))
    assert scene.relation(0, 1) == relation
    assert scene.relation(1, 0) == (relation and INVERSE[relation])
    assert scene.relation(0, 0) is None


def test_counts_and_groups_agree_with_counting_one_by_one():
    for scene in SCENES[:200]:
        tally = Counter((thing.color, thing.shape) for thing in scene.objects)
        for color, shape in itertools.product((*COLORS, None), (*SHAPES, None)):
            expected = sum(
                number
                for (c, s), number in tally.items()
                if color in (None, c) and shape in (None, s)
            )
            assert scene.count(color=color, shape=shape) == expected
        groups = scene.groups()
        assert {kind: len(members) for kind, members in groups} == tally
        assert sorted(index for _, members in groups for index in members) == [
            *range(len(scene.objects))
        ]


def test_a_near_twin_differs_in_one_thing_and_keeps_the_background():
    rng = random.Random(0)
    for scene in SCENES:
        twin = perturb(scene, rng)
        assert twin != scene
        assert twin.background == scene.background
        if len(twin.objects) < len(scene.objects):
            assert twin.objects == scene.objects[:-1]
        else:
            pairs = zip(scene.objects, twin.objects, strict=True)
            assert 1 <= sum(before != after for before, after in pairs) <= 2


def test_a_near_twin_is_found_for_objects_that_hide_each_other():
    heap = Scene((dot(0.5, 0.5), dot(0.5, 0.5, color="blue"), dot(0.5, 0.5, shape="star")))
    assert perturb(heap, random.Random(0)) != heap


@pytest.mark.parametrize("relation", RELATIONS)
def test_turning_a_scene_turns_the_relation_round(relation):
    kinds, sizes = [("red", "star"), ("blue", "star")], ["small", "small"]
    scene = sample_scene(random.Random(0), kinds=kinds, sizes=sizes, relation=relation)
    turned = turn(scene)
    assert turned.relation(1, 0) == relation
    for before, after in zip(scene.objects, turned.objects, strict=True):
        assert (before.kind, before.radius) == (after.kind, after.radius)


def test_a_large_object_that_is_turned_to_an_edge_is_moved_back_inside():
    turned = turn(Scene((dot(0.15, 0.5), dot(0.6, 0.5, size="large", radius=0.22))))
    assert 0.22 < turned.objects[1].x < 0.25
    assert turned.objects[0].x == 0.6


@pytest.mark.parametrize("objects", [(), (dot(0.5, 0.5),)], ids=len)
def test_one_object_cannot_be_turned_and_none_has_no_twin(objects):
    with pytest.raises(ConfigError, match="two objects"):
        turn(Scene(objects))
    if not objects:
        with pytest.raises(ConfigError, match="at least one object"):
            perturb(Scene(objects), random.Random(0))
