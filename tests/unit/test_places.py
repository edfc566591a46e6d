"""Figures of places: heads against sums written out, tasks on features whose answer is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from diffenc.config import EncoderConfig
from diffenc.errors import ShapeError
from diffenc.evals.dense.data import DepthPicture, LabelledPicture, PointPair, Surface
from diffenc.evals.dense.linear_heads import RIDGE, CellStatistics
from diffenc.evals.dense.points import match_points
from diffenc.inputs.images import to_pixel_values
from diffenc.studies.places import Depth, Labels, Points, order_share

PLACE = ("pixels", 50, "none")


class Pixels(SimpleNamespace):
    """An encoder whose features are the pixels."""

    config = EncoderConfig(timestep=(50,), batch_size=3)

    def extract(self, images, prompts, *, conditioning):
        assert (prompts is None) == (conditioning == "uncond")
        return {"pixels": to_pixel_values(images, size=16, multiple=1)[:, None]}


def painted(values):
    """A picture of 16 x 16 pixels whose colours are values in [0, 1], (h w 3)."""
    return Image.fromarray(np.round(255 * np.asarray(values)).astype(np.uint8))


def test_a_point_is_found_at_the_cell_with_its_feature():
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(12, generator=generator)
    first = torch.eye(12).reshape(12, 3, 4)
    second = 5 * torch.eye(12)[:, order].reshape(12, 3, 4)  # lengths do not count
    cells = torch.tensor([[x, y] for y in range(3) for x in range(4)])
    points = (cells + 0.5) / torch.tensor([4, 3])
    matches = match_points(first, second, points, (3, 4))
    torch.testing.assert_close(matches, points[order.argsort()])


def test_matching_in_parts_is_the_cosine_of_interpolated_features():
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(150, *size, generator=generator) for size in ((5, 7), (6, 4)))
    points = torch.rand(9, 2, generator=generator)
    matches = match_points(first, second, points, (20, 30))
    grid = (2 * points - 1)[None, None]
    queries = F.grid_sample(first[None], grid, align_corners=False)[0, :, 0].T.numpy()
    keys = F.interpolate(second[None], (20, 30), mode="bilinear")[0].flatten(1).T.numpy()
    for query, (x, y) in zip(queries, matches.tolist(), strict=True):
        cosines = keys @ query / np.linalg.norm(keys, axis=1)
        place = int(20 * y) * 30 + int(30 * x)  # at the border several pixels are alike
        assert cosines[place] == pytest.approx(cosines.max(), abs=1e-5)


def test_regression_is_ridge_on_standardised_channels_over_known_cells():
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(4, 3, 5, 6, generator=generator)
    maps[:, 2] = 7.0  # does not vary
    targets = torch.randn(4, 2, 5, 6, generator=generator)
    known = (torch.rand(4, 5, 6, generator=generator) > 0.3).float()
    whole, parts = CellStatistics(), CellStatistics()
    whole.add(maps, targets, known)
    for row in range(4):
        parts.add(maps[row : row + 1], targets[row : row + 1], known[row : row + 1])
    inside = known.flatten().bool().numpy()
    x = maps.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()[inside][:, :2]
    y = targets.permute(0, 2, 3, 1).reshape(-1, 2).double().numpy()[inside]
    standard = (x - x.mean(0)) / x.std(0)
    centred = y - y.mean(0)
    weight = np.linalg.solve(
        standard.T @ standard + RIDGE * len(x) * np.eye(2), standard.T @ centred
    )
    expected = standard @ weight + y.mean(0)
    for statistics in (whole, parts):
        predicted = statistics.regressor()(maps, (5, 6)).permute(0, 2, 3, 1).reshape(-1, 2)
        np.testing.assert_allclose(predicted.numpy()[inside], expected, atol=1e-9)


def test_a_cell_that_covers_two_classes_counts_for_each_by_its_share():
    maps = torch.tensor([[[[0.0, 1.0, 2.0, 3.0]]]])
    fine = torch.zeros(1, 2, 1, 8)
    fine[0, 0, 0, :3], fine[0, 1, 0, 3:] = 1, 1  # the second cell is half of each
    statistics = CellStatistics()
    statistics.add(maps, fine)
    head = statistics.classifier()
    n, counts = 4.0, np.array([1.5, 2.5])
    means = np.array([0.5 / 1.5, (0.5 + 2 + 3) / 2.5])
    within = ((0.5 + 0.5 + 4 + 9) - (counts * means**2).sum()) / n
    variance = (0.5 + 0.5 + 4 + 9) / n - 1.5**2
    weight = means / (within + RIDGE * variance)
    np.testing.assert_allclose(head.weight[0].numpy(), weight)
    np.testing.assert_allclose(head.bias.numpy(), np.log(counts / n) - 0.5 * means * weight)


def test_a_head_without_pictures_is_refused():
    with pytest.raises(ShapeError, match="needs pictures to be fitted to"):
        CellStatistics().classifier()


def test_classes_that_are_painted_are_found_and_others_are_not():
    generator = np.random.default_rng(0)
    labels = torch.from_numpy(generator.integers(0, 3, (6, 16, 16)))
    colours = np.eye(3)
    right = [LabelledPicture(painted(colours[each.numpy()]), "", each) for each in labels]
    wrong = [LabelledPicture(painted(np.full((16, 16, 3), 0.5)), "", each) for each in labels]
    task = Labels("toy", right[:4], right[4:], 3)
    steps = []
    assert task.measure(Pixels(), ["none"], steps.append)[PLACE] == {"toy_miou": 1.0}
    assert steps == [3, 1, 2]
    blind = Labels("toy", wrong[:4], wrong[4:], 3).measure(Pixels(), ["none"], steps.append)
    assert blind[PLACE]["toy_miou"] < 0.4


def test_order_is_right_where_the_class_in_front_gets_the_larger_step():
    truth = torch.tensor([[[0, 1, 2]], [[2, 1, 0]], [[0, 0, 1]]])
    scores = 10 * F.one_hot(truth, 3).permute(0, 3, 1, 2).double()
    assert order_share(scores, truth) == 1.0  # the last picture has nothing in front
    assert order_share(scores.flip(-1), truth) == 0.0


def test_depth_and_normals_that_the_pixels_tell_are_read():
    class Shaded(DepthPicture):
        caption = ""

        def __init__(self, seed):
            generator = np.random.default_rng(seed)
            self.values = generator.random((16, 16, 3))

        def image(self):
            return painted(self.values)

        def surface(self):
            values = torch.from_numpy(np.round(255 * self.values) / 255)
            tilt = torch.stack([values[..., 1] - 0.5, values[..., 2] - 0.5, -torch.ones(16, 16)])
            depth = (1 + values[..., 0]).exp()
            depth[0] = 0
            return Surface(depth, F.normalize(tilt, dim=0))

    task = Depth("toy", [Shaded(k) for k in range(4)], [Shaded(9)])
    figures = task.measure(Pixels(), ["none"], lambda _: None)[PLACE]
    assert figures["toy_depth_delta1"] == 1.0
    assert figures["toy_depth_rmse"] < 0.2
    assert figures["toy_normals_11"] > 0.99
    assert figures["toy_normals_median"] < 2


def test_points_are_counted_for_each_pair_whatever_pictures_pairs_share():
    values = np.random.default_rng(3).random((16, 16, 3))
    first, same, turned = painted(values), painted(values), painted(values[:, ::-1])
    points = torch.tensor([[2.5, 3.5], [10.5, 12.5]]) / 16

    def pair(name, image, second_points):
        names = ("first", name)
        images, captions = (first, image), ("", "")
        return PointPair(names, images, captions, points, second_points, (16, 16), 4.0, "toy")

    mirrored = torch.stack([1 - points[:, 0], points[:, 1]], dim=1)
    pairs = [pair("same", same, points), pair("turned", turned, mirrored)]
    wrong = [*pairs, pair("turned", turned, points)]
    task = Points("toy", pairs).measure(Pixels(), ["none"], lambda _: None)
    assert task[PLACE] == {"toy_pck": 1.0, "toy_pck_image": 1.0}
    task = Points("toy", wrong).measure(Pixels(), ["none"], lambda _: None)
    assert task[PLACE]["toy_pck"] == pytest.approx(2 / 3)
