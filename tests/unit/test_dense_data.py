"""SPair-71k, NYU and NAVI are read from folders in the layout in which they are downloaded."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from dense_builders import slope, write_navi, write_nyu, write_spair
from diffenc.errors import ConfigError, ImageError
from diffenc.evals.dense.navi import load_navi
from diffenc.evals.dense.nyu import CROP, FOCAL, load_nyu
from diffenc.evals.dense.points import hits, pck
from diffenc.evals.dense.spair import load_spair
from diffenc.evals.dense.surfaces import normals_of
from diffenc.inputs.pictures.files import load_numbers


def test_a_pair_of_spair_has_its_points_its_box_and_the_text_that_dift_takes(tmp_path):
    (pair,) = load_spair(write_spair(tmp_path))
    assert pair.captions == ("a photo of a potted plant",) * 2
    assert pair.second_size == (100, 50)
    assert pair.box == 40  # the longer side of 30 x 40
    expected = torch.tensor([[0.5 / 40, 0.5 / 20], [39.5 / 40, 19.5 / 20]])
    torch.testing.assert_close(pair.first_points, expected)
    assert [image.name for image in pair.images] == ["a.jpg", "b.jpg"]


def test_a_point_counts_within_a_tenth_of_the_box_as_published(tmp_path):
    (pair,) = load_spair(write_spair(tmp_path))
    pixels = torch.tensor([50.0, 100.0])
    for distance, right in ((3.9, True), (4.1, False)):  # 0.1 x 40 pixels
        moved = pair.second_points + torch.tensor([distance, 0.0]) / pixels
        assert hits(pair, moved, 0.1).tolist() == [right, right]
        down = pair.second_points + torch.tensor([0.0, distance]) / pixels
        assert hits(pair, down, 0.1).tolist() == [right, right]


def test_pck_counts_points_alike_or_pictures_alike():
    correct = [torch.tensor([True]), torch.tensor([False, False, True, False])]
    assert pck(correct) == {"pck": pytest.approx(2 / 5), "pck_image": pytest.approx(0.625)}


def test_some_pairs_are_spread_over_the_list(tmp_path):
    write_spair(tmp_path, count=10)
    assert len(load_spair(tmp_path)) == 10
    assert len(load_spair(tmp_path, most=3)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"src_imname": "gone.jpg"}, "names a picture that is missing"),
        ({"src_imname": "../../x.jpg"}, "must be relative and stay"),
        ({"src_kps": [[1, 1]]}, "1 points in the first picture and 2"),
        ({"trg_bndbox": None}, "is no annotation of a pair"),
    ],
)
def test_a_broken_pair_is_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_spair(write_spair(tmp_path, **changes))


def test_another_folder_says_what_it_lacks(tmp_path):
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(ConfigError, match="has no PairAnnotation and no Layout; unpack"):
        load_spair(tmp_path)


def test_normals_are_those_of_the_plane_and_look_at_the_camera():
    depth, normal = slope()
    depth[100, 100] = 0
    normals = normals_of(torch.from_numpy(depth), FOCAL).numpy()
    known = np.abs(normals).sum(0) > 0
    assert not known[99:102, 99:102].any()
    assert not known[0].any()
    assert known.sum() == 478 * 638 - 9
    np.testing.assert_allclose(normals[:, known].T - normal, 0, atol=1e-3)


def test_depth_of_nyu_is_in_metres_within_the_crop_and_near_enough(tmp_path):
    (picture,) = load_nyu(write_nyu(tmp_path))
    assert picture.caption == "a photo of a living room"
    depth, normal = slope()
    surface = picture.surface()
    inside = torch.zeros(480, 640, dtype=torch.bool)
    inside[CROP] = True
    assert not surface.depth[~inside].any()
    torch.testing.assert_close(
        surface.depth[CROP], torch.from_numpy(depth[CROP]).float(), atol=6e-4, rtol=0
    )
    mean = surface.normals[:, inside].mean(dim=1)
    cosine = float((mean / mean.norm()) @ torch.from_numpy(normal).float())
    assert math.degrees(math.acos(min(1.0, cosine))) < 1
    assert picture.image().size == (640, 480)


def test_folders_of_nyu_that_hold_nothing_say_what_was_expected(tmp_path):
    with pytest.raises(ConfigError, match="name the one that holds train and test"):
        load_nyu(tmp_path)
    (tmp_path / "test").mkdir()
    with pytest.raises(ConfigError, match="holds no <room>/rgb_<number>"):
        load_nyu(tmp_path)


def test_depth_of_navi_is_relative_to_the_object_that_is_cut_out(tmp_path):
    (picture,) = load_navi(write_navi(tmp_path))
    assert picture.caption == "a photo of toy dog"
    assert picture.focal == 2.0  # of the shorter side
    assert picture.image().size == (20, 20)
    surface = picture.surface()
    assert surface.depth.shape == (20, 20)
    torch.testing.assert_close(surface.depth[:10], torch.full((10, 20), 0.01))
    torch.testing.assert_close(surface.depth[10:], torch.ones(10, 20))
    torch.testing.assert_close(surface.normals[:, 4, 10], torch.tensor([0.0, 0.0, -1.0]))


def test_navi_is_fitted_to_many_views_and_tested_in_the_wild(tmp_path):
    write_navi(tmp_path, "multiview_00_pixel_6pro")
    assert len(load_navi(tmp_path, split="train")) == 1
    with pytest.raises(ConfigError, match="holds no pictures of NAVI"):
        load_navi(tmp_path)


def test_a_depth_map_with_colours_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "depth.png")
    with pytest.raises(ImageError, match="must have one channel of whole numbers, got 'RGB'"):
        load_numbers(tmp_path / "depth.png")
