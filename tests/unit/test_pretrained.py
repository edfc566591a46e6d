import json
import shutil
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.utils import logging

from diffenc.clip.captioner import ClipEmbedder
from diffenc.clip.tokens import ClipTokens
from diffenc.errors import BackboneError, ConfigError
from diffenc.evals.matching.clip import ClipMatcher
from diffenc.mllm.language import load_language_model
from diffenc.mllm.vision import VisionTokens
from diffenc.storage import pretrained
from diffenc.storage.pretrained import BUNDLED, lasting_name, load_whole, loading, pretrained_source


def test_names_and_paths_are_taken_as_they_are(tmp_path):
    assert pretrained_source("openai/clip-vit-large-patch14") == "openai/clip-vit-large-patch14"
    assert pretrained_source(tmp_path / "any") == str(tmp_path / "any")


@pytest.mark.parametrize("name", BUNDLED)
def test_a_miniature_is_its_folder_where_it_is_bundled(tmp_path, monkeypatch, name):
    monkeypatch.setattr(pretrained, "files", lambda package: tmp_path / package)
    folder = tmp_path / "diffenc" / "models" / "assets" / name
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
        logging.get_logger("transformers").removeHandler(notices)
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


def copy_of(name, folder):
    return Path(shutil.copytree(pretrained_source(name), folder))


def load_lm(folder):
    return load_language_model(folder)[0]


LOADERS = {
    "lm": ("shapes-lm", load_lm, "model.layers.0.mlp.up_proj.weight"),
    "clip": ("shapes-clip", ClipMatcher.from_pretrained, "text_model.final_layer_norm.weight"),
    "tower": ("shapes-clip", ClipTokens.from_pretrained, "vision_model.pre_layrnorm.weight"),
    "embedder": ("shapes-clip", ClipEmbedder.from_name, "visual_projection.weight"),
    "vision": ("shapes-clip", VisionTokens.from_pretrained, "vision_model.pre_layrnorm.weight"),
}
CHANGES = {
    "missing": (lambda w, key: {k: v for k, v in w.items() if k != key}, "it lacks"),
    "shape": (lambda w, key: {**w, key: w[key][..., :3].clone()}, "by its config"),
    "integers": (lambda w, key: {**w, key: w[key].to(torch.int8)}, "whole numbers"),
    "nan": (lambda w, key: {**w, key: w[key] * float("nan")}, "NaN or infinity"),
    "prefix": (lambda w, key: {f"module.{k}": v for k, v in w.items()}, "it lacks"),
    "empty": (lambda w, key: {"x": torch.ones(1)}, "holds no whole"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("loader", LOADERS)
def test_weights_that_do_not_fit_their_config_are_refused(tmp_path, loader, change):
    name, load, key = LOADERS[loader]
    folder = copy_of(name, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    alter, message = CHANGES[change]
    save_file(alter(weights, key), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=message):
        load(folder)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("change", "verb"), [(-1, "has no place for"), (1, "lacks")])
def test_a_config_that_lies_about_layers_is_refused(tmp_path, loader, change, verb):
    name, load, _ = LOADERS[loader]
    folder = copy_of(name, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for table in (config, config.get("vision_config", {}), config.get("text_config", {})):
        if "num_hidden_layers" in table:
            table["num_hidden_layers"] += change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=verb):
        load(folder)


def test_sizes_that_nobody_can_build_are_refused_before_anything_is_allocated(tmp_path):
    folder = copy_of("shapes-lm", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for change in (
        {"num_hidden_layers": 10**9},
        {"hidden_size": 2**20, "intermediate_size": 2**22},
        {"vocab_size": 2**45},
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(BackboneError):
            load_lm(folder)


def test_a_language_model_answers_as_transformers_loads_it(tmp_path):
    source = pretrained_source("shapes-lm")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        own, _ = load_language_model("shapes-lm", dtype=dtype)
        theirs = AutoModelForCausalLM.from_pretrained(source).to(dtype)
        expected = theirs.state_dict()
        assert own.state_dict().keys() == expected.keys()
        assert all(torch.equal(own.state_dict()[key], expected[key]) for key in expected)
        assert own.generation_config.to_dict() == theirs.generation_config.to_dict()
    shards = copy_of("shapes-lm", tmp_path / "lm")
    weights = load_file(shards / "model.safetensors")
    (shards / "model.safetensors").unlink()
    places = {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, shards / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    again = load_lm(shards).state_dict()
    assert all(torch.equal(again[name], weights[name].float()) for name in weights)
    index.write_text(
        json.dumps({"weight_map": {name: f"../lm/{file}" for name, file in places.items()}})
    )
    with pytest.raises(BackboneError, match="stay within the folder"):
        load_lm(shards)


def test_tied_weights_are_not_missed(tmp_path):
    config = AutoConfig.from_pretrained(pretrained_source("shapes-lm"))
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    folder = copy_of("shapes-lm", tmp_path / "lm")
    model.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    own = load_lm(folder)
    assert own.lm_head.weight is own.model.embed_tokens.weight
    assert torch.equal(own.lm_head.weight, model.lm_head.weight)
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, "tie_word_embeddings": False}))
    with pytest.raises(BackboneError, match=r"lacks 'lm_head\.weight'"):
        load_lm(folder)


def test_an_adapter_beside_a_model_is_not_passed_over(tmp_path):
    folder = copy_of("shapes-lm", tmp_path / "lm")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(BackboneError, match=r"an adapter .* would not be applied"):
        load_lm(folder)


def test_a_vision_model_is_read_out_of_one_with_a_head_and_without_its_pooler(tmp_path):
    options = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = ViTConfig(num_hidden_layers=2, image_size=16, patch_size=8, **options)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size).save_pretrained(tmp_path)
    one, two = (VisionTokens.from_pretrained(tmp_path).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {**weights, "vit.strange.weight": torch.ones(1)},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(BackboneError, match="no place for"):
        VisionTokens.from_pretrained(tmp_path)
