"""Text encoders and VAEs of transformers that overflow in float16 stay in another type."""

import json

import pytest
import torch
from typer.testing import CliRunner

import dit_builders
from diffenc import DiffusionEncoder
from diffenc.cli.main import app
from diffenc.models import load_backbone
from plain_dit import agree, picture

TEXT = "a red circle left of a blue square"
SIZE = (48, 80)
T5 = {"pixart": "text_encoder", "sd3": "text_encoder_3", "flux": "text_encoder_2"}


def overflowing(family):
    """A pipeline whose text encoder is beyond the numbers of float16, and not beyond float32."""
    pipe = dit_builders.PIPELINES[family]()
    with torch.no_grad():
        if family == "sana":
            for layer in pipe.text_encoder.layers:
                layer.mlp.gate_proj.weight.mul_(1e2)
                layer.mlp.up_proj.weight.mul_(3e3)
                layer.mlp.down_proj.weight.mul_(3e3)
        else:
            for block in getattr(pipe, T5[family]).encoder.block:
                block.layer[1].DenseReluDense.wi_1.weight.mul_(3e2)
                block.layer[1].DenseReluDense.wo.weight.mul_(3e3)
    return pipe


@pytest.fixture(scope="module", params=["sana", *T5])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / family
    overflowing(family).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exact(family):
    backbone = load_backbone(overflowing(family))
    return backbone.embed([TEXT, "a"], size=SIZE).prompt_embeds.float()


def of_folder(family, folder):
    return load_backbone(folder, dtype="float16")


def of_pipeline(family, _folder):
    return load_backbone(overflowing(family), dtype="float16")


def cast_later(family, folder):
    return load_backbone(folder).half()


def cast_by_part(family, folder):
    backbone = load_backbone(folder)
    for part in backbone.parts().values():
        part.half()
    return backbone


@pytest.mark.parametrize("made", [of_folder, of_pipeline, cast_later, cast_by_part])
def test_states_in_float16_are_those_of_float32(family, folder, exact, made):
    backbone = made(family, folder)
    states = backbone.embed([TEXT, "a"], size=SIZE).prompt_embeds
    # bfloat16 has 8 bits, and a state goes through two layers.
    assert agree(states.float(), exact, 5e-2 if family == "sana" else 5e-3)
    assert backbone.dtype == torch.float16
    if family == "sana":
        assert backbone.text_encoder.dtype == torch.bfloat16
        backbone.text_encoder.half()
        plain = backbone.text_encoder(torch.tensor([[2, 7, 8, 9]]))[0]
        assert not plain.isfinite().all()  # which is why
    else:
        own = {
            each.weight.dtype
            for path, each in getattr(backbone, T5[family]).named_modules()
            if path.endswith(".wo")
        }
        assert own == {torch.float32}


@pytest.mark.parametrize("made", [of_folder, of_pipeline])
def test_what_stays_in_float32_was_never_rounded(family, folder, made):
    ours, plain = made(family, folder), overflowing(family)
    if family == "sana":
        pairs = [(ours.vae, plain.vae)]
    else:
        blocks = [getattr(each, T5[family]).encoder.block for each in (ours, plain)]
        pairs = [
            tuple(each.layer[1].DenseReluDense.wo for each in pair)
            for pair in zip(*blocks, strict=True)
        ]
    for mine, theirs in pairs:
        weights = dict(mine.named_parameters())
        assert all(torch.equal(weights[name], each) for name, each in theirs.named_parameters())


def test_features_in_float16_are_those_of_float32(family, folder):
    half, whole = (
        DiffusionEncoder.from_pretrained(folder, size=SIZE, dtype=dtype)
        for dtype in ("float16", "float32")
    )
    ours, theirs = (each.extract(picture(*SIZE), TEXT)[0] for each in (half, whole))
    assert ours.dtype == torch.float16
    assert agree(ours.float(), theirs, 2e-2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_info_tells_the_memory_of_what_is_loaded(family, folder, dtype):
    parts = json.loads(CliRunner().invoke(app, ["info", str(folder), "--json"]).output)
    backbone = load_backbone(folder, dtype=dtype)
    for part in parts["components"]:
        weights = getattr(backbone, part["name"]).parameters()
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        assert part["memory_bytes"][dtype] == size, part["name"]
