from logging.handlers import MemoryHandler

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel, CLIPVisionModel
from transformers.utils import logging

from diffenc import pretrained
from diffenc.captioner import ClipEmbedder
from diffenc.clip_tokens import ClipTokens
from diffenc.errors import BackboneError, ConfigError
from diffenc.pretrained import BUNDLED, lasting_name, load_whole, loading, pretrained_source


def test_names_and_paths_are_taken_as_they_are(tmp_path):
    assert pretrained_source("openai/clip-vit-large-patch14") == "openai/clip-vit-large-patch14"
    assert pretrained_source(tmp_path / "any") == str(tmp_path / "any")


@pytest.mark.parametrize("name", BUNDLED)
def test_a_miniature_is_its_folder_where_it_is_bundled(tmp_path, monkeypatch, name):
    monkeypatch.setattr(pretrained, "files", lambda package: tmp_path / package)
    folder = tmp_path / "diffenc" / "backbones" / "assets" / name
    with pytest.raises(BackboneError, match=f"does not bundle '{name}'"):
        pretrained_source(name)
    folder.mkdir(parents=True)
    with pytest.raises(BackboneError, match=f"does not bundle '{name}'"):
        pretrained_source(name)
    (folder / "config.json").write_text("{}")
    assert pretrained_source(name) == str(folder)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError("no such file\nand a long explanation"), "no such file"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("\n \n"), "ValueError"),
    ],
)
def test_what_goes_wrong_is_told_in_a_line_with_what_to_do(error, told):
    with (
        pytest.raises(BackboneError) as caught,
        loading("a CLIP", "some/name", instead="Pass another"),
    ):
        raise error
    assert str(caught.value) == f"cannot load a CLIP from 'some/name': {told}. Pass another"
    assert caught.value.__cause__ is error


def test_errors_of_the_library_and_interruptions_pass():
    for error in (BackboneError("of another kind"), ConfigError("no such layer")):
        with pytest.raises(type(error)) as caught, loading("a CLIP", "name", instead=""):
            raise error
        assert caught.value is error
    with pytest.raises(KeyboardInterrupt), loading("a CLIP", "name", instead=""):
        raise KeyboardInterrupt


def test_a_folder_is_found_from_everywhere_and_a_hub_id_stays(tmp_path, monkeypatch):
    (tmp_path / "clip").mkdir()
    monkeypatch.chdir(tmp_path)
    assert lasting_name("clip") == str(tmp_path / "clip")
    assert lasting_name("openai/clip") == "openai/clip"


def test_a_tower_is_taken_out_of_its_clip_in_silence():
    notices, verbosity = MemoryHandler(1000), logging.get_verbosity()
    logging.add_handler(notices)
    try:
        tower = load_whole(CLIPVisionModel, pretrained_source("shapes-clip"))
        assert logging.get_verbosity() == verbosity
    finally:
        logging.remove_handler(notices)
    assert [record.getMessage() for record in notices.buffer] == []
    clip = CLIPModel.from_pretrained(pretrained_source("shapes-clip"))
    pixel_values = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = [each(pixel_values).pooler_output for each in (tower.float(), clip.vision_model)]
    assert torch.equal(*seen)


def test_a_clip_that_is_stored_in_half_precision_embeds_in_full():
    embedder = ClipEmbedder.from_name("shapes-clip")
    assert {parameter.dtype for parameter in embedder.parameters()} == {torch.float32}


def test_missing_weights_are_not_drawn_at_random(tmp_path):
    clip = CLIPVisionModel.from_pretrained(pretrained_source("shapes-clip"))
    clip.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"lacks 'visual_projection\.weight'; pass"):
        ClipEmbedder.from_name(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    cut = {name: value for name, value in weights.items() if "layers.3" not in name}
    save_file(cut, tmp_path / "model.safetensors", metadata={"format": "pt"})
    CLIPImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="and 15 more of its weights"):
        ClipTokens.from_pretrained(tmp_path)
