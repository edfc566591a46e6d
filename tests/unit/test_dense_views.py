"""Surfaces of two views: the matches, their errors in space, and NAVI's pictures as pairs."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from dense_builders import BALL, write_navi, write_navi_ball
from diffenc.config import EncoderConfig
from diffenc.errors import ConfigError
from diffenc.evals.dense.data import Sighting
from diffenc.evals.dense.navi import load_navi, load_navi_pairs
from diffenc.evals.dense.views import Matches, match_cells, matches_of, recalls, rotation_angle
from diffenc.inputs.images import to_pixel_values
from diffenc.studies.place_views import Views


def about_y(degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def wall(translation=(0.0, 0.0, 0.0)):
    """A wall one metre away, 3 x 4 cells of 10 cm."""
    y, x = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    points = torch.stack([0.1 * (x - 1.5), 0.1 * (y - 1), torch.ones(3, 4)])
    return Sighting(points, torch.eye(3), torch.tensor(translation), 1.5)


def test_matches_are_by_cosine_and_those_that_stand_out_come_first():
    noise = np.random.default_rng(0)
    first, second = noise.normal(size=(1500, 5)), noise.normal(size=(70, 5))
    rows, columns = match_cells(torch.from_numpy(first), torch.from_numpy(second), most=300)
    unit = [each / np.linalg.norm(each, axis=1)[:, None] for each in (first, second)]
    order = np.sort(1 - unit[0] @ unit[1].T, axis=1)
    doubt = order[:, 0] / order[:, 1]
    assert rows.tolist() == np.argsort(doubt, kind="stable")[:300].tolist()
    nearest = (unit[0] @ unit[1].T).argmax(axis=1)
    assert columns.tolist() == nearest[rows.numpy()].tolist()


def test_errors_are_distances_in_space_and_in_the_second_picture():
    features = torch.eye(12).reshape(12, 3, 4)
    below = features.roll(
        1, dims=1
    )  # each looks like its lower neighbour, the last row like the first
    matches = matches_of((wall(), wall((0.0, 0.2, 0.0))), (features, below))
    expected = torch.tensor([0.1] * 8 + [0.4] * 4).double()  # two cells lower in truth
    torch.testing.assert_close(matches.metres.sort().values, expected)
    torch.testing.assert_close(matches.pixels, 512 * 1.5 * matches.metres)  # all one metre away
    assert matches.angle == 0


def test_cells_without_a_surface_are_never_matched():
    features = torch.eye(12).reshape(12, 3, 4)
    first, second = wall(), wall()
    second.points[:, :, 0] = 0
    first.points[:, :, 1] = 0
    matches = matches_of((first, second), (features, features))
    assert len(matches.metres) == 9
    assert int((matches.metres < 1e-6).sum()) == 6
    assert matches.metres.max() < 0.5


def test_a_point_is_moved_from_camera_to_camera_by_both_poses():
    generator = torch.Generator().manual_seed(0)
    world = torch.rand(3, 12, generator=generator) - 0.5
    sightings = []
    for turn, translation in ((20.0, [0.1, 0.0, 2.0]), (-25.0, [0.0, -0.3, 3.0])):
        place = torch.tensor(translation)
        points = (about_y(turn) @ world + place[:, None]).reshape(3, 3, 4)
        sightings.append(Sighting(points, about_y(turn), place, 1.0))
    features = torch.eye(12).reshape(12, 3, 4)
    matches = matches_of(tuple(sightings), (features, features))
    torch.testing.assert_close(matches.metres, torch.zeros(12).double(), atol=1e-5, rtol=0)
    assert matches.angle == pytest.approx(45, abs=1e-3)


def test_an_error_in_pixels_is_larger_where_the_surface_is_near():
    points = torch.tensor([[[0.0, 0.1]], [[0.0, 0.0]], [[0.5, 0.5]]])
    first, second = (Sighting(points, torch.eye(3), torch.zeros(3), f) for f in (7.0, 2.0))
    swapped = torch.eye(2).reshape(2, 1, 2).flip(2)
    matches = matches_of((first, second), (torch.eye(2).reshape(2, 1, 2), swapped))
    torch.testing.assert_close(matches.metres, torch.tensor([0.1, 0.1]).double())
    torch.testing.assert_close(matches.pixels, torch.full((2,), 512 * 2 * 0.1 / 0.5).double())


def test_views_without_a_surface_do_not_count():
    empty = Sighting(torch.zeros(3, 3, 4), torch.eye(3), torch.zeros(3), 1.0)
    features = torch.eye(12).reshape(12, 3, 4)
    assert matches_of((wall(), empty), (features, features)) is None
    assert recalls([]) == {}


def test_recall_is_a_mean_over_pairs_and_ranges_of_angles():
    def errors(*values):
        return torch.tensor(values).double()

    pairs = [
        Matches(errors(0.005, 0.015, 0.03, 0.06), errors(4, 20, 30, 60), 10.0),
        Matches(errors(0.015), errors(100), 30.0),
        Matches(errors(0.5, 0.5), errors(100, 100), 59.0),
    ]
    figures = recalls(pairs)
    assert figures["recall_1cm"] == pytest.approx(0.25 / 3)
    assert figures["recall_2cm"] == pytest.approx(1.5 / 3)
    assert figures["recall_5cm"] == pytest.approx(1.75 / 3)
    assert [figures[f"recall_{n}px"] for n in (5, 25, 50)] == pytest.approx([1 / 12, 1 / 6, 1 / 4])
    assert figures["recall_2cm_0_30"] == pytest.approx(0.5)
    assert figures["recall_2cm_30_60"] == pytest.approx(0.5)
    assert "recall_2cm_60_90" not in figures


def test_points_of_a_ball_lie_on_it_and_turn_with_the_camera(tmp_path):
    pairs = load_navi_pairs(write_navi_ball(tmp_path, [0, 40, 100, 290]))
    ((first, second),) = pairs  # every fourth picture begins one
    assert first.name == "ball/wild_set/000.jpg"
    for view, turn in ((first, 0), (second, {"1": 40, "2": 100, "3": 290}[second.name[-5]])):
        torch.testing.assert_close(view.rotation, about_y(turn).float())
        sighting = view.sighting(32)
        there = sighting.points[2] > 0
        assert 0.7 < there.double().mean() < 0.8  # of a square: pi / 4
        assert there[16].all()  # from edge to edge
        points = sighting.points[:, there] - torch.tensor([0.01, -0.02, 0.6])[:, None]
        torch.testing.assert_close(
            points.norm(dim=0), torch.full((len(points.T),), BALL), atol=1e-3, rtol=0
        )
        assert view.image().size[0] == view.image().size[1]
        side = 2 * BALL / 0.6 * 2 * 160  # pixels of the ball's width, nearly
        assert sighting.focal == pytest.approx(320 / side, rel=0.05)


def test_views_from_behind_are_no_pair(tmp_path):
    pairs = load_navi_pairs(write_navi_ball(tmp_path / "near", [0, 119, 0, 0, 0]), seed=1)
    assert len(pairs) == 2  # of 5 that have a partner the first and the fifth
    angles = [rotation_angle(b.rotation @ a.rotation.T) for a, b in pairs]
    assert angles == pytest.approx([119, 119], abs=1e-3)
    with pytest.raises(ConfigError, match="two or more pictures within 120 degrees"):
        load_navi_pairs(write_navi_ball(tmp_path / "far", [0, 180]))


def test_the_choice_of_partners_is_the_same_each_time_and_another_by_another_seed(tmp_path):
    write_navi_ball(tmp_path, range(0, 110, 5), side=24)
    chosen = [[b.name for _, b in load_navi_pairs(tmp_path, seed=seed)] for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(load_navi_pairs(tmp_path, most=2)) == 2


def test_a_camera_without_a_pose_is_named(tmp_path):
    write_navi_ball(tmp_path, [0, 40])
    path = tmp_path / "ball/wild_set/annotations.json"
    path.write_text(path.read_text().replace('"q"', '"Q"'))
    with pytest.raises(ConfigError, match=r"annotations.json has a camera that is none of NAVI's"):
        load_navi_pairs(tmp_path)
    path.write_text(
        path.read_text().replace('"Q"', '"q"').replace("[3.0, 0.0, 0.0, 0.0]", "[0, 0, 0, 0]")
    )
    with pytest.raises(ConfigError, match="none of NAVI's"):
        load_navi_pairs(tmp_path)


def test_only_the_middle_square_of_a_picture_counts(tmp_path):
    (picture,) = load_navi(write_navi(tmp_path))
    disparity = np.array(Image.open(picture.depth))
    disparity[:, :20] = 1000  # 10 columns in the middle square, 10 before it
    Image.fromarray(disparity).save(picture.depth)
    assert picture.image().size == (40, 40)


class Colours:
    """An encoder whose features are the colours, in [-1, 1]."""

    config = EncoderConfig(timestep=(50,), batch_size=2)
    device = torch.device("cpu")

    def __init__(self, turn=0.0):
        self._turn = about_y(turn)

    def extract(self, images, prompts, *, conditioning):
        values = to_pixel_values(images, size=128, multiple=1)
        values[1:] = torch.einsum("dc,bchw->bdhw", self._turn, values[1:])
        return {"colours": values[:, None]}


def test_directions_as_features_match_the_ball_and_turned_ones_are_off_by_the_turn(tmp_path):
    pairs = load_navi_pairs(write_navi_ball(tmp_path, [0, 40]))
    steps = []
    place = ("colours", 50, "none")
    figures = Views("navi", pairs).measure(Colours(), ["none"], steps.append)[place]
    assert steps == [1]
    assert figures["navi_recall_1cm"] > 0.99
    assert figures["navi_recall_5px"] > 0.8  # a cell has 4 pixels
    assert figures["navi_recall_25px"] > 0.99
    assert figures["navi_recall_2cm_30_60"] == figures["navi_recall_2cm"]
    # 2 x 10 cm x sin(15 degrees) = 5.2 cm at the equator of the ball, less towards its poles
    turned = Views("navi", pairs).measure(Colours(30), ["none"], steps.append)[place]
    assert turned["navi_recall_1cm"] < 0.05
    assert turned["navi_recall_5cm"] > 0.5
    less = Views("navi", pairs).measure(Colours(60), ["none"], steps.append)[place]
    assert less["navi_recall_5cm"] < 0.35
