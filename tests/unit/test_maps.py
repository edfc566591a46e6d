import numpy as np
import pytest
import torch

from diffenc.denoiser.grids import middle_grid, to_grid, to_tokens


def test_coarser_grids_are_means_of_cells():
    features = torch.arange(32.0).view(1, 2, 4, 4)
    expected = features.numpy().reshape(1, 2, 2, 2, 2, 2).mean(axis=(3, 5))
    np.testing.assert_allclose(to_grid(features, (2, 2)), expected)


def test_finer_grids_interpolate_within_the_range():
    features = torch.rand(2, 3, 4, 5)
    finer = to_grid(features, (8, 10))
    assert finer.shape == (2, 3, 8, 10)
    assert finer.max() <= features.max()
    torch.testing.assert_close(to_grid(torch.ones(1, 1, 3, 3), (7, 5)), torch.ones(1, 1, 7, 5))


@pytest.mark.parametrize("grid", [(2, 9), (8, 3), (4, 6), (1, 1)], ids=str)
def test_axes_may_grow_and_shrink_separately(grid):
    assert to_grid(torch.rand(1, 2, 4, 6), grid).shape == (1, 2, *grid)


def test_the_same_grid_is_left_alone():
    features = torch.rand(1, 2, 3, 4)
    assert torch.equal(to_grid(features, (3, 4)), features)


def test_tokens_run_row_by_row_with_channels_in_tap_order():
    coarse, fine = torch.rand(2, 3, 2, 4), torch.rand(2, 5, 4, 8)
    tokens = to_tokens({"coarse": coarse, "fine": fine}, (2, 4))
    assert tokens.shape == (2, 8, 8)
    assert torch.equal(tokens[1, 4 * 1 + 3, :3], coarse[1, :, 1, 3])
    cell = fine[1, :, 2:4, 6:8].mean(dim=(1, 2))
    torch.testing.assert_close(tokens[1, 4 * 1 + 3, 3:], cell)


def test_the_middle_grid_is_the_finer_of_two():
    assert middle_grid([(4, 4), (16, 16), (8, 8)]) == (8, 8)
    assert middle_grid([(4, 4), (8, 8)]) == (8, 8)
