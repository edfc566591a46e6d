import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from diffenc.errors import ConfigError, NonFiniteError, ShapeError
from diffenc.viz.pca import pca_maps, principal_components


def features(seed=0, shape=(2, 8, 4, 6)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels(image):
    return np.asarray(image).astype(int)


def test_one_picture_per_map_and_row_in_pixels_of_cells():
    pictures = pca_maps([features(), features(1, (1, 8, 3, 3))])
    assert [[image.size for image in row] for row in pictures] == [[(6, 4)] * 2, [(3, 3)]]
    assert {image.mode for row in pictures for image in row} == {"RGB"}


@pytest.mark.parametrize("resample", ["nearest", "bicubic"])
def test_pictures_have_the_size_asked_for(resample):
    ((image, _),) = pca_maps([features()], size=(40, 90), resample=resample)
    assert image.size == (90, 40)


def test_nearest_shows_flat_cells():
    ((small, _),) = pca_maps([features()])
    ((large, _),) = pca_maps([features()], size=(8, 12))
    assert np.array_equal(np.kron(pixels(small), np.ones((2, 2, 1), dtype=int)), pixels(large))


def test_equal_features_have_equal_colours_in_every_map():
    one, two = features(), features(1)
    two[0, :, 1, 2] = one[1, :, 3, 5]
    first, second = pca_maps([one, two])
    assert np.array_equal(pixels(first[1])[3, 5], pixels(second[0])[1, 2])


def test_pictures_do_not_depend_on_the_order_of_cells():
    one, two = pca_maps([features()])[0], pca_maps([features().flip(2)])[0]
    assert np.array_equal(pixels(one[0]), pixels(two[0])[::-1])


def test_red_follows_the_direction_of_largest_variance():
    maps = 0.01 * features(shape=(1, 8, 10, 10))
    ramp = torch.linspace(-1, 1, 10)
    maps[:, 3] += ramp[:, None]  # down the rows
    maps[:, 5] += 0.5 * ramp  # along the columns
    ((image,),) = pca_maps([maps])
    red, green, _ = pixels(image).transpose(2, 0, 1)
    assert (np.diff(red.mean(axis=1)) > 0).all()
    assert (np.diff(green.mean(axis=0)) > 0).all()
    assert (red[0].max(), red[-1].min()) == pytest.approx((0, 255), abs=10)


@pytest.mark.parametrize("n", [5, 50])
def test_components_are_those_of_an_svd_with_a_fixed_sign(n):
    x = np.random.default_rng(0).normal(size=(n, 12))
    x -= x.mean(axis=0)
    basis = principal_components(x, 3)
    _, _, rows = np.linalg.svd(x, full_matrices=False)
    assert np.abs(np.diag(rows[:3] @ basis)) == pytest.approx(np.ones(3))
    assert (np.take_along_axis(basis, np.abs(basis).argmax(axis=0)[None], axis=0) > 0).all()
    assert principal_components(-x, 3) == pytest.approx(basis)


def test_one_component_is_grey():
    ((image, _),) = pca_maps([features()], components=1)
    assert image.mode == "RGB"
    assert np.ptp(pixels(image), axis=2).max() == 0


def test_what_never_varies_is_mid_grey():
    ((image,),) = pca_maps([torch.full((1, 4, 2, 2), 7.0)])
    assert np.array_equal(pixels(image), np.full((2, 2, 3), 128))
    one_direction = torch.zeros(1, 4, 2, 2)
    one_direction[0, 0, 0] = 1
    ((image,),) = pca_maps([one_direction])
    assert np.array_equal(pixels(image)[:, 0], [[255, 128, 128], [0, 128, 128]])


def test_cells_that_are_left_out_change_no_colour_and_are_white():
    maps, cells = features(), np.zeros((2, 4, 6), dtype=bool)
    cells[0, 1, 2] = cells[1, 3, 5] = True
    ((one, two),) = pca_maps([maps], leave_out=[cells])
    maps[0, :, 1, 2], maps[1, :, 3, 5] = 1e6, -1e6
    harmed = pca_maps([maps], leave_out=[torch.from_numpy(cells)])[0]
    assert [image.tobytes() for image in harmed] == [one.tobytes(), two.tobytes()]
    assert (pixels(one)[1, 2] == 255).all()
    assert (pixels(two)[3, 5] == 255).all()
    nothing = np.zeros((2, 4, 6), dtype=bool)
    assert pca_maps([features()], leave_out=[nothing]) == pca_maps([features()])
    assert [image.tobytes() for image in pca_maps([maps])[0]] != [one.tobytes(), two.tobytes()]


def test_cells_to_leave_out_must_fit_and_leave_some():
    with pytest.raises(ShapeError, match="a mask \\(b h w\\) for each map"):
        pca_maps([features()], leave_out=[np.zeros((2, 4, 5), dtype=bool)])
    with pytest.raises(ShapeError, match="for each map"):
        pca_maps([features()], leave_out=[])
    with pytest.raises(ShapeError, match="one cell or more"):
        pca_maps([features()], leave_out=[np.ones((2, 4, 6), dtype=bool)])


def test_half_precision_and_arrays_are_read():
    half = features().bfloat16()
    as_array = pca_maps([half.float().numpy()])
    assert np.array_equal(pixels(pca_maps([half])[0][0]), pixels(as_array[0][0]))


def test_bad_input():
    with pytest.raises(ShapeError, match=r"same channels, got \[4, 8\]"):
        pca_maps([features(), features(0, (1, 4, 2, 2))])
    with pytest.raises(ShapeError, match="got none"):
        pca_maps([])
    with pytest.raises(ShapeError, match=r"over \(b c h w\), got shape \(8, 4, 6\)"):
        pca_maps([features()[0]])
    with pytest.raises(NonFiniteError):
        pca_maps([features() * float("nan")])
    with pytest.raises(ConfigError, match="components must be 3"):
        pca_maps([features()], components=2)
    with pytest.raises(ConfigError, match="must be a positive int"):
        pca_maps([features()], size=0)
    with pytest.raises((ConfigError, TypeCheckError), match="resample"):
        pca_maps([features()], size=9, resample="linear")
