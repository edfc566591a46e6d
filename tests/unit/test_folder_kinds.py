"""Folders and objects of one kind, given to a reader of another: the message says what they are."""

import pytest
import torch
from PIL import Image

from diffenc import (
    CrossAttnScorer,
    DiffusionEncoder,
    DiffusionVLM,
    Extractor,
    FusedEncoder,
    list_taps,
    load_backbone,
    write_features,
)
from diffenc.errors import BackboneError, ConfigError
from diffenc.storage.folder_kinds import kind_of_folder


@pytest.fixture(scope="module")
def encoder():
    return DiffusionEncoder.from_pretrained("shapes")


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    """A folder of each kind."""
    root = tmp_path_factory.mktemp("saved")
    encoder.save_pretrained(root / "encoder")
    FusedEncoder("shapes-clip", encoder).save_pretrained(root / "fused")
    CrossAttnScorer(encoder.backbone).save_pretrained(root / "scorer")
    DiffusionVLM(encoder, "shapes-lm").save_pretrained(root / "vlm")
    (root / "vlm" / "lora").mkdir()  # as that of a language model
    Image.new("RGB", (64, 64)).save(root / "a.png")
    write_features([root / "a.png"], root / "features", Extractor("shapes", pool="mean"))
    other = DiffusionEncoder.from_pretrained("shapes")
    other.add_lora(rank=1)
    other.save_lora(root / "lora")
    return root


KINDS = {
    "encoder": "a saved DiffusionEncoder, which DiffusionEncoder.from_pretrained reads",
    "fused": "a saved FusedEncoder, which FusedEncoder.from_pretrained reads",
    "scorer": "a saved CrossAttnScorer, which CrossAttnScorer.from_pretrained reads",
    "vlm": "a saved DiffusionVLM, which DiffusionVLM.from_pretrained reads",
    "features": "features of pictures, which diffenc.open_features reads",
    "lora": "a LoRA adapter, which load_lora of an encoder reads",
}
READERS = {
    "encoder": DiffusionEncoder.from_pretrained,
    "fused": FusedEncoder.from_pretrained,
    "scorer": CrossAttnScorer.from_pretrained,
    "vlm": DiffusionVLM.from_pretrained,
    "model": load_backbone,
    "taps": list_taps,
    "lora": lambda folder: DiffusionEncoder.from_pretrained("shapes").load_lora(folder),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_a_folder_of_another_kind_is_called_by_what_it_holds(saved, reader, kind):
    if reader == kind:
        return
    with pytest.raises(BackboneError) as told:
        READERS[reader](saved / kind)
    assert f"holds {KINDS[kind]}" in str(told.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": 3}', "[" * 10**6], ids=range(5))
def test_what_is_no_config_says_nothing(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert kind_of_folder(tmp_path) == kind_of_folder(tmp_path / "gone") == ""


def test_models_of_the_two_libraries_are_told(tiny_sd_folder, tmp_path):
    assert "DiffusionEncoder.from_pretrained" in kind_of_folder(tiny_sd_folder)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(BackboneError, match="holds a model of transformers, of the kind 'clip'"):
        load_backbone(tmp_path)


@pytest.mark.wrong_type
@pytest.mark.parametrize("call", [list_taps, CrossAttnScorer.from_pretrained, load_backbone])
def test_what_holds_a_model_is_no_model_and_says_where_it_is(encoder, call):
    for holder in (encoder, CrossAttnScorer(encoder.backbone)):
        kind = type(holder).__name__
        with pytest.raises(BackboneError, match=f"a {kind} holds one: .* encoder.backbone"):
            call(holder)
    assert list_taps(encoder.backbone) == list_taps("shapes")
    vlm = torch.nn.Module()
    vlm.encoder = encoder
    with pytest.raises(BackboneError, match=r"such as vlm\.encoder\.backbone"):
        call(vlm)


@pytest.mark.parametrize(
    ("call", "near"),
    [
        (lambda encoder: FusedEncoder("shapes-clipp", encoder), "shapes-clip"),
        (lambda encoder: DiffusionVLM(encoder, "shapes-ml"), "shapes-lm"),
    ],
    ids=["clip", "language model"],
)
def test_a_slip_in_the_name_of_a_miniature_is_told(encoder, call, near):
    with pytest.raises(BackboneError, match=f"Did you mean '{near}'\\? Pass a folder") as told:
        call(encoder)
    assert ".." not in str(told.value)


@pytest.mark.wrong_type
def test_exchanged_arguments_are_told(encoder):
    with pytest.raises(ConfigError, match=r"the order is FusedEncoder\(clip, diffusion\)"):
        FusedEncoder(encoder, "shapes-clip")
    with pytest.raises(BackboneError, match="a bundled CLIP and no diffusion model"):
        FusedEncoder("shapes", "shapes-clip")
    with pytest.raises(BackboneError, match="a bundled language model and no diffusion model"):
        DiffusionVLM("shapes-lm", encoder)
