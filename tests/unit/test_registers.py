import numpy as np
import pytest
import torch

from diffenc.denoiser.registers import register_cells, without_cells
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, ShapeError
from diffenc.features import Features
from diffenc.models import load_backbone
from diffenc.shapes import Scene, SceneObject, render

TAP = "up_blocks.1.attentions.1.transformer_blocks.0"


def plain_maps(shape=(2, 8, 5, 7), seed=0):
    """Cells of nearly one length."""
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return maps / maps.norm(dim=-3, keepdim=True)


def by_hand(features, ratio):
    """Registers of one map (c h w), cell by cell."""
    norms = np.linalg.norm(np.asarray(features, dtype=np.float64), axis=0)
    height, width = norms.shape
    cells = np.zeros((height, width), dtype=bool)
    for row in range(height):
        for column in range(width):
            around = [
                norms[r, c]
                for r in range(max(0, row - 1), min(height, row + 2))
                for c in range(max(0, column - 1), min(width, column + 2))
                if (r, c) != (row, column)
            ]
            second = sorted(around)[-2] if len(around) > 1 else np.inf
            typical = sorted(norms.ravel())[(norms.size - 1) // 2]
            cells[row, column] = norms[row, column] > ratio * max(second, typical)
    return cells


@pytest.mark.parametrize("ratio", [1.3, 2.0, 3.0])
def test_cells_are_those_of_a_plain_loop(ratio):
    maps = torch.randn((3, 4, 5, 7), generator=torch.Generator().manual_seed(1)) ** 3
    cells = register_cells(maps, ratio=ratio)
    assert cells.any()
    for one, known in zip(maps, cells, strict=True):
        assert np.array_equal(by_hand(one, ratio), known.numpy())


def test_a_planted_cell_is_found_and_an_object_is_not():
    maps = plain_maps()
    maps[0, :, 1, 3] *= 10  # in the middle
    maps[1, :, 0, 6] *= 10  # in a corner
    maps[1, :, 2:5, 1:4] *= 10  # an object of nine cells
    expected = torch.zeros(2, 5, 7, dtype=torch.bool)
    expected[0, 1, 3] = expected[1, 0, 6] = True
    assert torch.equal(register_cells(maps), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_lengths_that_half_precision_cannot_hold_are_compared(dtype):
    maps = 100 * plain_maps((1, 8, 4, 4)).to(dtype)
    maps[0, :, 2, 1] = 30_000  # its norm is beyond float16
    cells = register_cells(maps)
    assert cells.nonzero().tolist() == [[0, 2, 1]]
    assert without_cells(maps, cells).dtype == dtype


def test_maps_may_have_timesteps_or_no_batch_and_one_cell_is_no_register():
    maps = plain_maps()
    maps[1, :, 2, 2] *= 10
    cells = register_cells(maps)
    assert torch.equal(register_cells(maps[None]), cells[None])
    assert torch.equal(register_cells(maps[1]), cells[1])
    assert not register_cells(torch.ones(1, 3, 1, 1)).any()
    assert not register_cells(torch.zeros(1, 3, 4, 4)).any()


def test_replaced_cells_are_means_of_those_around_and_others_stay_to_the_bit():
    maps, cells = plain_maps((1, 3, 4, 6)), torch.zeros(1, 4, 6, dtype=torch.bool)
    cells[0, 0, 0] = cells[0, 2, 3] = True
    filled = without_cells(maps, cells)
    assert torch.equal(filled[:, :, ~cells[0]], maps[:, :, ~cells[0]])
    corner = maps[0, :, [0, 1, 1], [1, 0, 1]].mean(dim=1)
    torch.testing.assert_close(filled[0, :, 0, 0], corner)
    ring = [(r, c) for r in (1, 2, 3) for c in (2, 3, 4) if (r, c) != (2, 3)]
    around = torch.stack([maps[0, :, r, c] for r, c in ring]).mean(dim=0)
    torch.testing.assert_close(filled[0, :, 2, 3], around)


def test_holes_are_filled_from_their_edge():
    maps, cells = torch.full((1, 1, 7, 7), 2.0), torch.zeros(1, 7, 7, dtype=torch.bool)
    cells[0, 1:6, 1:6] = True
    maps[0, 0, 1:6, 1:6] = 1e6
    torch.testing.assert_close(without_cells(maps, cells), torch.full((1, 1, 7, 7), 2.0))


def test_nothing_to_replace_is_the_same_object_and_all_is_refused():
    maps = plain_maps()
    assert without_cells(maps, torch.zeros(2, 5, 7, dtype=torch.bool)) is maps
    with pytest.raises(ShapeError, match="every cell"):
        without_cells(maps, torch.ones(2, 5, 7, dtype=torch.bool))


@pytest.mark.parametrize("ratio", [1, 0.5, float("nan"), "3"])
def test_ratios_that_find_every_cell_are_refused(ratio):
    with pytest.raises(ConfigError, match="ratio"):
        register_cells(plain_maps(), ratio=ratio)


def test_what_is_no_map_is_refused():
    with pytest.raises((ShapeError, TypeError), match=r"maps \(b c h w\)|shape|type"):
        register_cells(torch.ones(3, 4))


def test_features_have_registers_of_either_half_and_pool_without_them():
    uncond, cond = plain_maps((1, 8, 4, 6)), plain_maps((1, 8, 4, 6), seed=1)
    uncond[0, :, 1, 1] *= 50
    cond[0, :, 3, 4] *= 50
    features = Features(
        uncond={"tap": uncond},
        cond={"tap": cond},
        conditioning="cfg",
        guidance_scale=2.0,
        grid=(1, 1),
    )
    cells = features.registers()["tap"]
    assert cells.nonzero().tolist() == [[0, 1, 1], [0, 3, 4]]
    cleared = features.without_registers()
    assert (cleared.conditioning, cleared.guidance_scale, cleared.grid) == ("cfg", 2.0, (1, 1))
    kept = ~cells[0]
    assert torch.equal(cleared["tap"][0][:, kept], features["tap"][0][:, kept])
    # The one token is a mean over cells: it moves with the planted cells, and not without them.
    assert float(features.tokens().norm()) > 2 * float(cleared.tokens().norm())
    assert float(cleared.select("uncond").tokens().norm()) < 1
    assert torch.equal(features.select("uncond")["tap"], uncond)  # as it was


def plant(tokens, width=8):
    """The same tokens (b n c), with a long one in row 2, column 1."""
    tokens = tokens.clone()
    place = 2 * width + 1
    longest = tokens.norm(dim=2).max(dim=1).values
    unit = torch.nn.functional.normalize(tokens[:, place], dim=1)
    tokens[:, place] = 30 * longest[:, None] * unit
    return tokens


def test_registers_planted_in_a_real_unet_are_found_at_its_tap_and_left_out():
    backbone = load_backbone("shapes")
    transformer = backbone.denoiser.get_submodule("up_blocks.1.attentions.1")
    block = transformer.transformer_blocks[0]
    handle = block.register_forward_hook(lambda module, args, out: plant(out))
    picture = render(Scene((SceneObject("circle", "red", "large", 0.5, 0.5, 0.25),)))
    try:
        encoder = DiffusionEncoder.from_pretrained(backbone, taps=(TAP,), use_cache=False)
        features = encoder.extract(picture, "a red circle", conditioning="cfg")
    finally:
        handle.remove()
    assert features.registers()[TAP].nonzero().tolist() == [[0, 2, 1]]
    cleared = features.without_registers()
    assert not cleared.registers()[TAP].any()
    clean = DiffusionEncoder.from_pretrained(backbone, taps=(TAP,), use_cache=False)
    unharmed = clean.extract(picture, "a red circle", conditioning="cfg")
    mean = unharmed.tokens(1)
    harm = float((features.tokens(1) - mean).norm() / mean.norm())
    assert float((cleared.tokens(1) - mean).norm() / mean.norm()) < 0.05 < harm
