"""The tower as a model of transformers: config, features, weights."""

import copy
import json
import pickle
import shutil
import threading
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

import tiny_llava
from diffenc import DiffusionEncoder
from diffenc.errors import BackboneError, ConfigError, ImageError, PromptError, ShapeError
from diffenc.hosts.guidance import guide
from diffenc.hosts.prompts import PromptTokenizer, prompt_scope
from diffenc.hosts.transformers import DiffEncConfig, DiffEncImageProcessor, DiffEncModel
from diffenc.models.shapes import shapes_folder
from loaded import fresh

QUESTIONS = ["what color is the circle?", "how many squares are there?"]


@pytest.fixture(scope="module")
def frozen() -> DiffEncModel:
    return DiffEncModel(DiffEncConfig("diffenc:shapes?t=50")).eval()


@pytest.fixture(scope="module")
def adapted() -> DiffEncModel:
    model = DiffEncModel(DiffEncConfig("diffenc:shapes?t=50&rank=2")).eval()
    tiny_llava.train_adapter(model)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with the backbone inside, and the folder that it was saved in."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = DiffEncModel(DiffEncConfig("diffenc:shapes", "checkpoint"))
    model.load_backbone()
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def plain():
    return DiffusionEncoder.from_pretrained("shapes", timestep=50)


def features(model, pixel_values, **options):
    with torch.no_grad():
        return model(pixel_values, **options).last_hidden_state


@pytest.mark.parametrize(
    "option",
    [{"tokens": "words"}, {"rank": 4}, {"k": 4}, {"timestep": 9}, {"taps": "up9"}],
    ids=str,
)
def test_options_of_the_spec_are_refused_beside_it(option):
    (name,) = option
    with pytest.raises(ConfigError, match=f"{name} belongs in the spec.*diffenc:shapes.{name}="):
        DiffEncConfig("diffenc:shapes", **option)


def test_the_config_tells_sizes_without_weights_and_survives_json(tmp_path):
    config = DiffEncConfig("diffenc:shapes?t=50&grid=4&rank=2&taps=up1")
    assert (config.hidden_size, config.image_size) == (64, 64)
    assert (config.patch_size, config.num_patches) == (16, 16)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, DiffEncConfig)
    told = {**again.to_dict(), "_name_or_path": config.to_dict()["_name_or_path"]}
    assert json.loads(json.dumps(told)) == json.loads(json.dumps(config.to_dict()))
    assert again.tower_spec == config.tower_spec


def test_a_config_reads_nothing_from_the_model_it_names(tiny_sd_folder, tmp_path):
    spec = f"diffenc:{tiny_sd_folder}?rank=2&taps=up_blocks.1"
    told = DiffEncConfig(spec).to_dict()
    told["spec"] = spec.replace(str(tiny_sd_folder), str(tmp_path / "gone"))
    told.pop("transformers_version", None)
    model = AutoModel.from_config(DiffEncConfig.from_dict(told))
    assert len(list(model.tower.adapter.parameters())) > 0
    with pytest.raises(BackboneError, match="gone"):
        model(torch.zeros(1, 3, 64, 64))


def test_a_size_that_is_not_the_specs_is_refused():
    with pytest.raises(ConfigError, match="hidden_size of 'diffenc:shapes' is 224"):
        DiffEncConfig("diffenc:shapes", hidden_size=1024)


@pytest.mark.parametrize("prompts", [None, "a red circle", QUESTIONS], ids=["none", "one", "each"])
def test_features_are_those_of_the_encoder(frozen, plain, prompts):
    pixel_values = tiny_llava.pixel_values()
    expected = plain(pixel_values, prompts)
    torch.testing.assert_close(features(frozen, pixel_values, prompts=prompts), expected)


def test_tokens_and_scopes_give_what_texts_give(adapted):
    pixel_values, tokens = tiny_llava.pixel_values(), adapted.tower.tokenize(QUESTIONS)
    expected = features(adapted, pixel_values, prompts=QUESTIONS)
    as_tokens = {"prompt_input_ids": tokens.ids, "prompt_attention_mask": tokens.mask}
    assert torch.equal(features(adapted, pixel_values, **as_tokens), expected)
    with prompt_scope(QUESTIONS):
        assert torch.equal(features(adapted, pixel_values), expected)
    assert not torch.allclose(features(adapted, pixel_values), expected, atol=1e-2)


def test_rows_do_not_depend_on_their_batch(adapted):
    pixel_values = tiny_llava.pixel_values(7)
    together = features(adapted, pixel_values, prompts=QUESTIONS[:1] * 7)
    for row in (0, 6):
        alone = features(adapted, pixel_values[row : row + 1], prompts=QUESTIONS[0])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
    assert features(adapted, pixel_values[:0]).shape == (0, 64, 224)


@pytest.mark.parametrize("wanted", [True, -2, [-1, 5], None], ids=str)
def test_every_layer_that_hosts_name_holds_the_features(frozen, wanted):
    output = frozen(tiny_llava.pixel_values(1), output_hidden_states=wanted)
    for layer in (-1, -2, 0, 23, -25):
        assert torch.equal(output.hidden_states[layer], output.last_hidden_state)
    output.pooler_output = [1]  # as LLaVA does
    assert isinstance(frozen(tiny_llava.pixel_values(1), return_dict=False), tuple)


def test_only_the_adapter_is_in_the_module_tree(adapted, frozen):
    names = [name for name, _ in adapted.named_parameters()]
    assert names
    assert all(name.startswith("tower.adapter.") and "lora_" not in name for name in names)
    assert set(adapted.state_dict()) == {*names, "place"}
    assert set(frozen.state_dict()) == {"place"}


def test_gradients_reach_the_whole_adapter_and_nothing_else():
    model = DiffEncModel(DiffEncConfig("diffenc:shapes?rank=2")).train()
    tiny_llava.train_adapter(model)
    model(
        tiny_llava.pixel_values(1), prompts="a circle"
    ).last_hidden_state.square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name
    unet = model.tower.encoder.backbone.unet
    assert not unet.training
    own = {id(weight) for weight in model.parameters()}
    assert all(weight.grad is None for weight in unet.parameters() if id(weight) not in own)


@pytest.mark.parametrize("source", [None, "checkpoint"], ids=["reference", "inside"])
def test_what_a_host_freezes_stays_frozen(source):
    model = DiffEncModel(DiffEncConfig("diffenc:shapes?rank=2", source)).train()
    model.requires_grad_(False)
    model.load_backbone()
    with pytest.warns(UserWarning, match="no gradient"):
        assert not model(tiny_llava.pixel_values(1)).last_hidden_state.requires_grad
    assert not any(weight.requires_grad for weight in model.parameters())


def test_a_frozen_tower_builds_no_graph(frozen):
    assert not frozen(
        tiny_llava.pixel_values(1), prompts="a circle"
    ).last_hidden_state.requires_grad


def test_training_works_after_inference_mode():
    model = DiffEncModel(DiffEncConfig("diffenc:shapes?rank=2")).eval()
    pixel_values = tiny_llava.pixel_values(1)
    with torch.inference_mode():  # loads, and fills the caches
        model(pixel_values.clone(), prompts="a circle")
    model(pixel_values, prompts="a circle").last_hidden_state.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_thread_sees_the_prompts_it_is_given(adapted):
    pixel_values, found = tiny_llava.pixel_values(), []
    call = threading.Thread(
        target=lambda: found.append(features(adapted, pixel_values, prompts=QUESTIONS))
    )
    call.start()
    call.join()
    assert torch.equal(found[0], features(adapted, pixel_values, prompts=QUESTIONS))


@pytest.mark.long
@pytest.mark.parametrize("source", [None, "checkpoint"], ids=["reference", "inside"])
@pytest.mark.parametrize("spec", ["diffenc:shapes", "diffenc:shapes?rank=2&cut=0"])
def test_what_is_saved_loads_to_the_same_features(spec, source, tmp_path):
    model = DiffEncModel(DiffEncConfig(spec, source)).eval()
    model.load_backbone()
    if "rank" in spec:
        tiny_llava.train_adapter(model)
    pixel_values = tiny_llava.pixel_values()
    tokens = model.tower.tokenize(QUESTIONS)
    prompted = {"prompt_input_ids": tokens.ids, "prompt_attention_mask": tokens.mask}
    expected = [features(model, pixel_values, **prompted), features(model, pixel_values)]
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, DiffEncModel)
    trained = {name for name, weight in again.named_parameters() if weight.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith("tower.adapter.")}
    found = [features(again, pixel_values, **prompted), features(again, pixel_values)]
    for before, after in zip(expected, found, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert trained == {name for name, weight in again.named_parameters() if weight.requires_grad}


@pytest.mark.long
def test_a_backbone_may_be_put_inside_later(tmp_path, monkeypatch):
    model = DiffEncModel(DiffEncConfig("diffenc:shapes?rank=2")).eval()
    tiny_llava.train_adapter(model)
    pixel_values = tiny_llava.pixel_values()
    expected = features(model, pixel_values)
    model.include_backbone()
    assert torch.equal(features(model, pixel_values), expected)
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    assert "backbone.unet.conv_in.weight" in keys
    assert not any("lora_" in key or "base_layer" in key for key in keys)

    def nowhere(*_args, **_options):
        raise AssertionError("nothing may be loaded from elsewhere")

    monkeypatch.setattr("diffenc.hosts.transformers.modeling.load_encoder", nowhere)
    monkeypatch.setattr("diffenc.hosts.tower.load_encoder", nowhere)
    again = DiffEncModel.from_pretrained(tmp_path)
    torch.testing.assert_close(features(again, pixel_values), expected, rtol=1e-4, atol=1e-4)
    again.load_state_dict(model.state_dict())  # with LoRA in place on both sides
    torch.testing.assert_close(features(again, pixel_values), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("part", ["backbone.unet.mid_block", "backbone.vae.encoder", "backbone."])
def test_missing_weights_of_the_backbone_are_told_of(part, checkpoint, tmp_path):
    model, whole = checkpoint
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith(part)}
    kept = kept or {"place_holder": torch.zeros(1)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = DiffEncModel.from_pretrained(tmp_path)
    with pytest.raises(
        BackboneError, match=r"lacked weights of the diffusion model.*load_backbone"
    ):
        again(tiny_llava.pixel_values(1))
    again.load_backbone()
    expected = features(model, tiny_llava.pixel_values(1))
    torch.testing.assert_close(
        features(again, tiny_llava.pixel_values(1)), expected, rtol=1e-4, atol=1e-4
    )


def test_a_backbone_inside_has_no_weights_before_it_is_loaded():
    model = DiffEncModel(DiffEncConfig("diffenc:shapes", "checkpoint"))
    with pytest.raises(BackboneError, match="lacked weights"):
        model(tiny_llava.pixel_values(1))


def test_an_adapter_that_no_checkpoint_had_is_a_new_one(checkpoint, tmp_path):
    model, whole = checkpoint
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    told = json.loads((tmp_path / "config.json").read_text())
    told["spec"] = "diffenc:shapes?rank=2"
    (tmp_path / "config.json").write_text(json.dumps(told))
    with warnings.catch_warnings():
        # Only versions that leave missing weights without values give a reason to warn.
        warnings.filterwarnings("ignore", "the checkpoint had no adapter")
        again = DiffEncModel.from_pretrained(tmp_path)
    assert again.tower.adapter.problem() == ""
    torch.testing.assert_close(
        features(again, tiny_llava.pixel_values(), prompts="a circle"),
        features(model, tiny_llava.pixel_values(), prompts="a circle"),
        rtol=1e-4,
        atol=1e-4,
    )


def test_on_the_meta_device_nothing_is_loaded_and_a_call_says_so():
    with torch.device("meta"):
        model = DiffEncModel(DiffEncConfig("diffenc:shapes", "checkpoint"))
    assert all(weight.is_meta for weight in model.backbone.unet.parameters())
    with pytest.raises(ConfigError, match="meta device"):
        model(tiny_llava.pixel_values(1))
    with torch.device("meta"):
        by_name = DiffEncModel(DiffEncConfig("diffenc:shapes?rank=2"))
    assert not by_name.tower.is_loaded


@pytest.mark.long
def test_half_precision_follows_the_host_and_spares_adapter_and_vae():
    model = DiffEncModel(DiffEncConfig("diffenc:shapes?rank=2")).eval()
    pixel_values = tiny_llava.pixel_values()
    expected = features(model, pixel_values, prompts="a circle")
    model.to(torch.bfloat16)
    found = features(model, pixel_values.bfloat16(), prompts="a circle")
    assert found.dtype == model.dtype == torch.bfloat16
    largest = expected.abs().max()
    torch.testing.assert_close(found.float() / largest, expected / largest, rtol=0, atol=5e-2)
    assert next(model.tower.encoder.backbone.unet.parameters()).dtype == torch.bfloat16
    model.half()
    assert all(weight.dtype == torch.float32 for weight in model.tower.adapter.parameters())
    assert features(model, pixel_values.half()).dtype == torch.float16


@pytest.mark.long
def test_copies_are_equal_and_independent():
    model = DiffEncModel(DiffEncConfig("diffenc:shapes?rank=2")).eval()
    tiny_llava.train_adapter(model)
    pixel_values = tiny_llava.pixel_values()
    expected = features(model, pixel_values)
    twin = copy.deepcopy(model)
    assert torch.equal(features(twin, pixel_values), expected)
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert torch.equal(features(model, pixel_values), expected)
    assert torch.equal(features(pickle.loads(pickle.dumps(model)), pixel_values), expected)


WRONG = [
    ({"pixel_values": torch.zeros(1, 3, 32, 64)}, ShapeError, r"\(3, 64, 64\), got \(3, 32, 64\)"),
    ({"pixel_values": torch.full((1, 3, 64, 64), 255.0)}, ImageError, "must lie in"),
    ({"pixel_values": torch.full((1, 3, 64, 64), float("nan"))}, ImageError, "NaN"),
    pytest.param(
        {"pixel_values": torch.zeros(1, 3, 64, 64, dtype=torch.uint8)},
        ImageError,
        "floats",
        marks=pytest.mark.wrong_type,
    ),
    ({}, ConfigError, "pixel_values"),
    ({"prompts": ["a", "b", "c"]}, PromptError, "3 prompts, 1 images"),
    ({"prompt_ids": torch.zeros(1, 32)}, PromptError, "unknown argument 'prompt_ids'"),
    ({"question": "is there a cat?"}, PromptError, "unknown argument 'question'"),
    ({"text": ["a cat"]}, PromptError, "unknown argument 'text'"),
    ({"prompt_input_ids": torch.zeros(1, 32).long()}, PromptError, "go together"),
]


@pytest.mark.parametrize(("given", "error", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_input_is_answered(frozen, given, error, message):
    if given and "pixel_values" not in given:
        given = {"pixel_values": torch.zeros(1, 3, 64, 64), **given}
    with pytest.raises(error, match=message):
        frozen(**given)


@pytest.mark.long
def test_texts_need_a_tokenizer_that_a_checkpoint_does_not_hold(tiny_sd_folder, tmp_path):
    spec = f"diffenc:{tiny_sd_folder}?taps=up_blocks.1"
    model = DiffEncModel(DiffEncConfig(spec, "checkpoint"))
    model.load_backbone()
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    told["spec"] = spec.replace(str(tiny_sd_folder), str(tmp_path / "gone"))
    (tmp_path / "config.json").write_text(json.dumps(told))
    again = DiffEncModel.from_pretrained(tmp_path)
    pixel_values, tokens = tiny_llava.pixel_values(1), model.tower.tokenize("a cat")
    prompted = {"prompt_input_ids": tokens.ids, "prompt_attention_mask": tokens.mask}
    torch.testing.assert_close(
        features(again, pixel_values, **prompted), features(model, pixel_values, prompts="a cat")
    )
    torch.testing.assert_close(features(again, pixel_values), features(model, pixel_values))
    with pytest.raises(BackboneError, match="gone"):
        again(pixel_values, prompts="a cat")


@pytest.mark.long
def test_sdxl_keeps_pooled_text_and_both_paddings_in_a_checkpoint(tiny_sdxl_folder, tmp_path):
    spec = f"diffenc:{tiny_sdxl_folder}?rank=2&taps=up_blocks.0"
    model = DiffEncModel(DiffEncConfig(spec, "checkpoint")).eval()
    model.load_backbone()
    model.save_pretrained(tmp_path)
    again = DiffEncModel.from_pretrained(tmp_path)
    side = model.config.image_size
    pixel_values = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder = DiffusionEncoder.from_pretrained(fresh(tiny_sdxl_folder), taps="up_blocks.0")
    for prompts in (None, "a cat"):
        expected = encoder(pixel_values, prompts)
        for each in (model, again):
            found = features(each, pixel_values, prompts=prompts)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_another_source_is_used_and_checked(tiny_sd_folder):
    model = DiffEncModel(DiffEncConfig("diffenc:shapes", "checkpoint"))
    with pytest.raises(BackboneError, match="other weights than the config"):
        model.load_backbone(str(tiny_sd_folder))


def test_a_tower_has_the_sizes_of_its_config_whatever_its_source_takes(tiny_sd_folder):
    pixel_values = tiny_llava.pixel_values(1)
    model = DiffEncModel(DiffEncConfig("diffenc:shapes", default_taps=["mid_block"]))
    encoder = DiffusionEncoder.from_pretrained("shapes", taps="mid_block", timestep=50)
    torch.testing.assert_close(features(model, pixel_values), encoder(pixel_values))
    larger = DiffEncModel(DiffEncConfig("diffenc:shapes"))
    larger.load_backbone("shapes-many")
    size = (larger.config.num_patches, larger.config.hidden_size)
    assert features(larger, pixel_values).shape[1:] == size
    with pytest.raises(BackboneError, match="has other configs than the tower was made for"):
        DiffEncModel(DiffEncConfig("diffenc:shapes?taps=mid")).load_backbone(str(tiny_sd_folder))


def test_a_source_means_the_same_in_every_directory(tmp_path, monkeypatch):
    shutil.copytree(shapes_folder("shapes"), tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    model = DiffEncModel(DiffEncConfig("diffenc:shapes"))
    model.load_backbone("own")
    assert model.config.backbone_source == str(tmp_path / "own")


def test_a_tower_is_guided_where_its_model_has_gone(tmp_path):
    shutil.copytree(shapes_folder("shapes"), tmp_path / "own")
    model = DiffEncModel(DiffEncConfig(f"diffenc:{tmp_path / 'own'}?taps=mid", "checkpoint"))
    model.load_backbone()
    shutil.rmtree(tmp_path / "own")
    guide(model.tower, 3.0)
    pixel_values, tokens = tiny_llava.pixel_values(1), PromptTokenizer("shapes")("a circle")
    encoder = DiffusionEncoder.from_pretrained(
        "shapes", taps="mid_block", timestep=50, conditioning="cfg", guidance_scale=3.0
    )
    torch.testing.assert_close(
        features(model, pixel_values, prompts=tokens), encoder(pixel_values, "a circle")
    )


def test_tokens_of_words_need_a_tokenizer_and_so_no_checkpoint_alone():
    spec = "diffenc:shapes?tokens=words"
    with pytest.raises(ConfigError, match="holds the tokenizer that tells words"):
        DiffEncConfig(spec, "checkpoint")
    with pytest.raises(ConfigError, match="holds the tokenizer that tells words"):
        DiffEncModel(DiffEncConfig(spec)).include_backbone()


@pytest.mark.parametrize("form", ["call", "preprocess"])
def test_the_image_processor_round_trips_and_gives_the_towers_input(form, frozen, tmp_path):
    processor = DiffEncImageProcessor(64)
    processor.save_pretrained(tmp_path)
    frozen.config.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(again, DiffEncImageProcessor)
    call = again if form == "call" else again.preprocess
    values = call(tiny_llava.pictures(2), return_tensors="pt")["pixel_values"]
    assert values.shape == (2, 3, 64, 64)
    assert torch.equal(
        values, processor(tiny_llava.pictures(2), return_tensors="pt")["pixel_values"]
    )
    assert features(frozen, values).shape == (2, 64, 224)
