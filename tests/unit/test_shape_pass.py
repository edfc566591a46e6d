"""Shapes on the meta device: the same as torch derives, and its errors where nothing fits."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from diffenc.denoiser.hooks import ForwardTaps
from diffenc.denoiser.shape_pass import ShapePass
from diffenc.models import describe
from diffenc.models.denoisers import meta_inputs


def _meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("side", [64, 36])
@pytest.mark.parametrize("model", ["shapes", "sd1.5", "sdxl"])
def test_every_module_gives_the_shape_that_torch_derives(model, side):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(describe(model).configs["unet"]).eval()
    names = [name for name, _ in unet.named_modules() if name.endswith(("0", "attn2", "proj_out"))]
    inputs = meta_inputs(unet.config, side)
    with torch.no_grad(), ForwardTaps(unet, names) as taps:
        derived = taps.run(lambda: unet(**inputs))
    with torch.no_grad(), ForwardTaps(unet, names) as taps, ShapePass():
        known = taps.run(lambda: unet(**inputs))
    assert {name: (each.shape, each.dtype) for name, each in known.items()} == {
        name: (each.shape, each.dtype) for name, each in derived.items()
    }


OPERATIONS = {
    "linear": lambda: F.linear(_meta(2, 5, 4), _meta(3, 4), _meta(3)),
    "attention": lambda: F.scaled_dot_product_attention(
        _meta(2, 3, 7, 4), _meta(2, 3, 5, 4), _meta(2, 3, 5, 6)
    ),
    "masked attention": lambda: F.scaled_dot_product_attention(
        _meta(2, 3, 7, 4), _meta(2, 3, 5, 4), _meta(2, 3, 5, 4), _meta(2, 1, 7, 5)
    ),
    "group norm": lambda: F.group_norm(_meta(2, 6, 4, 3), 3, _meta(6), _meta(6)),
    "layer norm": lambda: F.layer_norm(_meta(2, 5, 4), (4,), _meta(4), _meta(4)),
    "sum": lambda: _meta(2, 3) + _meta(2, 3),
    "scaled sum": lambda: _meta(2, 3).add(_meta(2, 3), alpha=2),
    "broadcast sum": lambda: _meta(2, 3) + _meta(4, 1, 3),
    "sum of two types": lambda: _meta(2, 3, dtype=torch.float16) + _meta(2, 3),
    "whole numbers and a fraction": lambda: _meta(2, 3, dtype=torch.long) * 0.5,
    "number first": lambda: 2.0 * _meta(2, 3),
    "quotient rounded": lambda: _meta(2, 3).div(2, rounding_mode="floor"),
    "activations": lambda: F.silu(F.gelu(_meta(2, 3), approximate="tanh"), inplace=True),
    "transposed": lambda: F.silu(_meta(2, 3, 4).transpose(1, 2)) + 1,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations_give_the_shape_type_and_layout_of_torch(operation):
    derived = operation()
    with ShapePass():
        known = operation()
    assert known.is_meta
    assert (known.shape, known.dtype) == (derived.shape, derived.dtype)
    assert known.stride() == derived.stride()


MISFITS = {
    "linear": lambda: F.linear(_meta(2, 5), _meta(3, 4)),
    "bias": lambda: F.linear(_meta(2, 4), _meta(3, 4), _meta(2)),
    "attention": lambda: F.scaled_dot_product_attention(
        _meta(2, 3, 7, 4), _meta(2, 3, 5, 6), _meta(2, 3, 5, 6)
    ),
    "groups": lambda: F.group_norm(_meta(2, 6, 4), 4),
    "one value a group": lambda: F.group_norm(_meta(1, 6, 1), 6),
    "norm": lambda: F.layer_norm(_meta(2, 5), (4,)),
    "sum": lambda: _meta(2, 3) + _meta(2, 4),
}


@pytest.mark.parametrize("operation", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_raises_the_error_of_torch(operation):
    with pytest.raises((RuntimeError, ValueError)) as derived:
        operation()
    with ShapePass(), pytest.raises((RuntimeError, ValueError)) as known:
        operation()
    assert (type(known.value), str(known.value)) == (type(derived.value), str(derived.value))
