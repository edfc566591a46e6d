"""What LLaVA and its kin do to a vision tower, call by call, without their code."""

import copy
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.image_processing_utils import BaseImageProcessor

from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, ImageError, PromptError, ShapeError
from diffenc.hosts import loading
from diffenc.hosts.prompts import prompt_scope
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.shapes import render, sample_scenes
from marks import wrong_type

NAME = "diffenc:shapes?t=50"
ADAPTED = "diffenc:shapes?t=50&rank=4"
QUESTION, OTHER = "what color is the circle?", "how many stars are there?"


@pytest.fixture(scope="module", autouse=True)
def load_once() -> Iterator[None]:
    """Towers get a copy of what was loaded for an equal spec before."""
    loaded: dict[Any, Any] = {}

    def load(spec: Any, *, device: torch.device, dtype: torch.dtype) -> Any:
        key = (str(replace(spec, rank=None, alpha=None)), device, dtype)
        if key not in loaded:
            loaded[key] = loading.load_encoder(spec, device=device, dtype=dtype)
        return copy.deepcopy(loaded[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffenc.hosts.tower.load_encoder", load)
        yield


@pytest.fixture(scope="module")
def plain() -> Any:
    """An encoder by itself: what the frozen tower must agree with."""
    return DiffusionEncoder.from_pretrained("shapes", timestep=50)


@pytest.fixture(scope="module")
def images() -> list[Any]:
    return [render(scene) for scene in sample_scenes(3, seed=0)]


@pytest.fixture(scope="module")
def frozen() -> DiffusionVisionTower:
    """Shared by tests that leave it as it is."""
    return DiffusionVisionTower(NAME)


@pytest.fixture(scope="module")
def pixel_values(frozen, images) -> torch.Tensor:
    return frozen.image_processor(images, return_tensors="pt")["pixel_values"]


@pytest.fixture
def adapted() -> DiffusionVisionTower:
    tower = DiffusionVisionTower(ADAPTED)
    shake(tower)
    return tower


def shake(tower: DiffusionVisionTower, seed: int = 1) -> None:
    """An adapter as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tower.adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture
def no_loading(monkeypatch) -> Iterator[None]:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("diffenc.hosts.tower.load_encoder", load)
    return


# Construction


class DataclassLike:
    vision_tower = NAME
    mm_vision_select_layer = -2


def test_everything_is_told_before_anything_is_loaded(no_loading) -> None:
    tower = DiffusionVisionTower(NAME, args=SimpleNamespace(), delay_load=True)
    assert tower.is_loaded is False
    assert (tower.hidden_size, tower.image_size, tower.patch_size) == (224, 64, 8)
    assert (tower.num_patches, tower.num_patches_per_side) == (64, 8)
    config = tower.config
    assert (config.hidden_size, config.image_size, config.patch_size) == (224, 64, 8)
    assert tower.cfg_only is config
    assert tower.dummy_feature.shape == (1, 224)
    assert tower.vision_tower_name == NAME
    assert (tower.dtype, tower.device) == (torch.float32, torch.device("cpu"))
    assert isinstance(tower.image_processor, BaseImageProcessor)
    assert tower.tokenize([QUESTION]).ids.shape == (1, 32)
    assert tower.unfreeze_mm_vision_tower is False
    assert isinstance(tower.select_layer, int)
    assert isinstance(tower.select_feature, str)


@pytest.mark.parametrize(
    "call",
    [
        lambda: DiffusionVisionTower(NAME, DataclassLike(), delay_load=True),
        lambda: DiffusionVisionTower(NAME, args=DataclassLike(), delay_load=True, something=3),
        lambda: DiffusionVisionTower(NAME, vision_tower_cfg=DataclassLike(), delay_load=True),
        lambda: DiffusionVisionTower(NAME, delay_load=True),
        lambda: DiffusionVisionTower(NAME, LlamaConfig()),  # in a host's constructor
    ],
    ids=["positional", "more", "cfg", "bare", "in-a-host"],
)
def test_constructor_forms(call, no_loading) -> None:
    assert call().is_loaded is False


def test_arguments_of_the_host_are_kept_for_its_eyes() -> None:
    tower = DiffusionVisionTower(NAME, DataclassLike(), delay_load=True)
    assert tower.select_layer == -2
    assert isinstance(tower.args, DataclassLike)


def test_it_loads_at_once_where_no_host_is_being_built(frozen) -> None:
    assert DiffusionVisionTower(NAME, args=DataclassLike()).is_loaded
    assert frozen.is_loaded


def test_nothing_is_loaded_on_the_meta_device(no_loading) -> None:
    with torch.device("meta"):
        tower = DiffusionVisionTower(ADAPTED)
        tower.load_model()
    assert not tower.is_loaded
    assert {p.device.type for p in tower.parameters()} == {"cpu"}


def test_name_or_spec_but_one_of_them() -> None:
    with pytest.raises(ConfigError, match="one of them"):
        DiffusionVisionTower()
    spec = DiffusionVisionTower(NAME, delay_load=True).spec
    with pytest.raises(ConfigError, match="one of them"):
        DiffusionVisionTower(NAME, spec=spec)
    assert DiffusionVisionTower(spec=spec, delay_load=True).vision_tower_name == str(spec)


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", torch.device("cpu"), {"": "cpu"}])
def test_loading_takes_every_form_of_device_map_and_once_is_enough(device_map) -> None:
    tower = DiffusionVisionTower(NAME, delay_load=True)
    tower.load_model(device_map=device_map)
    encoder = tower.encoder
    tower.load_model(device_map=device_map)
    assert tower.encoder is encoder
    assert tower.device == torch.device("cpu") or torch.cuda.is_available()


def test_a_device_map_that_leads_nowhere_is_told() -> None:
    with pytest.raises(ConfigError, match="device_map"):
        DiffusionVisionTower(NAME, delay_load=True).load_model(device_map="somewhere")


def test_the_first_call_loads(pixel_values, frozen) -> None:
    tower = DiffusionVisionTower(NAME, LlamaConfig())
    assert torch.equal(tower(pixel_values), frozen(pixel_values))


def test_the_config_is_saved_as_hosts_save_it(tmp_path) -> None:
    tower = DiffusionVisionTower(NAME, delay_load=True)
    tower.vision_tower.vision_model.config.save_pretrained(tmp_path / "vision")
    told = json.loads((tmp_path / "vision" / "config.json").read_text())
    assert (told["spec"], told["hidden_size"]) == (str(tower.spec), 224)


# Features


def test_features_are_those_of_the_encoder(frozen, pixel_values, plain) -> None:
    features = frozen(pixel_values)
    assert features.shape == (3, frozen.num_patches, frozen.hidden_size)
    assert features.is_contiguous()
    torch.testing.assert_close(features, plain(pixel_values))
    asked = frozen(pixel_values, [QUESTION, OTHER, ""])
    torch.testing.assert_close(asked, plain(pixel_values, [QUESTION, OTHER, ""]))
    assert frozen.feature_select(features) is features


def test_another_question_gives_other_features_and_the_same_the_same(frozen, pixel_values) -> None:
    one, again = frozen(pixel_values, QUESTION), frozen(pixel_values, [QUESTION] * 3)
    assert torch.equal(one, again)
    other = frozen(pixel_values, OTHER)
    assert ((one - other).abs().amax(dim=(1, 2)) > 0.05).all()
    with prompt_scope(QUESTION):
        assert torch.equal(frozen(pixel_values), one)
        assert torch.equal(frozen(pixel_values, OTHER), other)
    assert torch.equal(frozen(pixel_values), frozen(pixel_values, ""))


@pytest.mark.parametrize("conditioning", ["uncond", "cond", "cfg", "concat"])
@pytest.mark.parametrize("asked", [False, True])
def test_every_conditioning_works_with_and_without_a_prompt(
    conditioning, asked, pixel_values, plain
) -> None:
    tower = DiffusionVisionTower(f"{NAME}&cond={conditioning}")
    features = tower(pixel_values, QUESTION if asked else None)
    assert features.shape == (3, tower.num_patches, tower.hidden_size)
    encoder = DiffusionEncoder(plain.backbone, replace(plain.config, conditioning=conditioning))
    expected = encoder(pixel_values, QUESTION if asked else "")
    torch.testing.assert_close(features, expected)


@pytest.mark.long
@pytest.mark.parametrize("folder", ["tiny_sd_folder", "tiny_sdxl_folder"])
def test_other_models_by_their_folder(folder, request) -> None:
    path = request.getfixturevalue(folder)
    tower = DiffusionVisionTower(f"diffenc:{path}?taps=up1&rank=2")
    side = tower.image_size
    pictures = torch.rand(2, 3, side, side) * 2 - 1
    with torch.no_grad():
        features = tower(pictures, ["a red circle", ""])
    encoder = DiffusionEncoder.from_pretrained(path, taps="up_blocks.1")
    expected = encoder(pictures, ["a red circle", ""])
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    assert features.shape == (2, tower.num_patches, tower.hidden_size)


def test_a_null_prompt_of_the_spec_counts_where_there_is_none(frozen, pixel_values) -> None:
    tower = DiffusionVisionTower(f"{NAME}&null=a%20red%20circle")
    torch.testing.assert_close(tower(pixel_values), frozen(pixel_values, "a red circle"))
    torch.testing.assert_close(tower(pixel_values, QUESTION), frozen(pixel_values, QUESTION))


def test_a_tower_trained_with_prompts_tells_once_of_none(pixel_values) -> None:
    tower = DiffusionVisionTower(f"{NAME}&prompted=1")
    with pytest.warns(UserWarning, match="trained with prompts"):
        tower(pixel_values)
    tower(pixel_values)
    tower(pixel_values, QUESTION)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_features_do_not_depend_on_the_batch(frozen, pixel_values, batch) -> None:
    shown = pixel_values[[row % 3 for row in range(batch)]]
    prompts = [(QUESTION, OTHER, "")[row % 3] for row in range(batch)]
    together = frozen(shown, prompts)
    for row in range(batch):
        alone = frozen(shown[row : row + 1], prompts[row])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_twice_is_the_same_and_the_global_generator_is_left_alone(pixel_values) -> None:
    tower = DiffusionVisionTower(NAME)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = tower(pixel_values, QUESTION)
    assert torch.equal(torch.get_rng_state(), before)
    tower.encoder.clear_cache()
    torch.manual_seed(5)
    torch.testing.assert_close(tower(pixel_values, QUESTION), first)


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    DiffusionVisionTower(ADAPTED, delay_load=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_lists_of_images_and_of_tiles_give_lists(frozen, pixel_values) -> None:
    whole = frozen(pixel_values, [QUESTION, OTHER, ""])
    parts = frozen([pixel_values[0], pixel_values[1:]], [QUESTION, OTHER, ""])
    assert [part.shape[0] for part in parts] == [1, 2]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert frozen([]) == []
    assert torch.equal(frozen(pixel_values[0]), frozen(pixel_values[:1]))


def test_no_images_give_no_features(frozen, pixel_values) -> None:
    assert frozen(pixel_values[:0]).shape == (0, 64, 224)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_images_comes_back(frozen, pixel_values, dtype) -> None:
    features = frozen(pixel_values.to(dtype), QUESTION)
    assert features.dtype == dtype
    error = (features.float() - frozen(pixel_values, QUESTION)).abs().max()
    assert error < 0.1


def test_the_stand_in_of_a_text_only_sample_is_taken(frozen) -> None:
    crop = frozen.image_processor.crop_size
    assert torch.isfinite(frozen(torch.zeros(1, 3, crop["height"], crop["width"]))).all()


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.zeros(1, 3, 32, 32), ShapeError, "size=32"),
        (torch.zeros(1, 3, 64, 32), ShapeError, "64, 32"),
        wrong_type(torch.zeros(2, 2, 3, 64, 64), ShapeError, "list of them"),
        wrong_type(torch.zeros(64, 64), ShapeError, "list of them"),
        wrong_type(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ImageError, "floats"),
        (torch.full((1, 3, 64, 64), 2.1), ImageError, "-1"),  # CLIP's own normalisation
        (torch.full((1, 3, 64, 64), 255.0), ImageError, "255"),
        (torch.full((1, 3, 64, 64), torch.nan), ImageError, "NaN"),
        wrong_type(np.zeros((1, 3, 64, 64)), ShapeError, "ndarray"),
    ],
)
def test_images_that_hosts_got_wrong_are_told(frozen, images, error, words) -> None:
    with pytest.raises(error, match=words):
        frozen(images)


def test_more_prompts_than_images_are_told(frozen, pixel_values) -> None:
    with pytest.raises(PromptError, match="4 prompts, 3 images"):
        frozen(pixel_values, [QUESTION] * 4)
    with pytest.raises(PromptError), prompt_scope([QUESTION] * 2):
        frozen(pixel_values)


def test_autocast_of_the_host_changes_nothing(frozen, pixel_values) -> None:
    frozen.encoder.clear_cache()  # what another batch left there may differ in the last bit
    plain = frozen(pixel_values, QUESTION)
    frozen.encoder.clear_cache()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(pixel_values, QUESTION), plain)


# Casts and moves


def test_a_cast_reaches_the_hidden_model_and_leaves_the_adapter_out_of_float16(
    adapted, pixel_values
) -> None:
    plain = adapted(pixel_values, QUESTION)
    weights = {name: value.clone() for name, value in adapted.state_dict().items()}
    adapted.half()
    assert adapted.dtype == torch.float16
    assert adapted.encoder.backbone.unet.conv_in.weight.dtype == torch.float16
    assert adapted.encoder.backbone.text_encoder.dtype == torch.float16
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}
    assert all(torch.equal(weights[name], value) for name, value in adapted.state_dict().items())
    features = adapted(pixel_values, QUESTION)
    assert features.dtype == torch.float32
    assert (features - plain).abs().max() < 0.05 * plain.abs().max()
    adapted.to(dtype=torch.bfloat16)
    assert adapted.dtype == torch.bfloat16
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}
    assert torch.isfinite(adapted(pixel_values, QUESTION)).all()
    adapted.to(torch.float32)
    assert adapted.dtype == torch.float32


def test_a_cast_before_loading_counts_afterwards(pixel_values) -> None:
    tower = DiffusionVisionTower(ADAPTED, delay_load=True)
    tower.to(dtype=torch.bfloat16)
    assert tower.dtype == torch.bfloat16
    tower.load_model()
    assert tower.encoder.dtype == torch.bfloat16
    assert tower(pixel_values).dtype == torch.float32


def test_a_dtype_of_the_spec_withstands_the_host() -> None:
    tower = DiffusionVisionTower(f"{NAME}&dtype=fp32")
    tower.half()
    assert tower.dtype == torch.float32
    assert tower.encoder.dtype == torch.float32


def test_a_vae_that_overflows_stays_in_float32(tiny_sdxl_folder) -> None:
    tower = DiffusionVisionTower(f"diffenc:{tiny_sdxl_folder}?taps=up0")
    tower.half()
    backbone = tower.encoder.backbone
    assert backbone.vae.dtype == torch.float32
    assert backbone.unet.dtype == torch.float16
    tower.to(torch.bfloat16)
    assert backbone.vae.dtype == torch.bfloat16


def test_a_device_without_float16_computes_in_float32(monkeypatch) -> None:
    def refuse(device: Any, dtype: torch.dtype) -> None:
        if dtype == torch.float16:
            raise ConfigError("no")

    monkeypatch.setattr("diffenc.hosts.hidden.check_placement", refuse)
    tower = DiffusionVisionTower(NAME)
    tower.half()
    assert tower.dtype == torch.float32


def test_other_conversions_leave_the_model_whole(adapted, pixel_values) -> None:
    plain = adapted(pixel_values, QUESTION)
    adapted.double()
    assert adapted.dtype == torch.float32
    adapted.float()
    adapted.share_memory()
    adapted.to(memory_format=torch.channels_last)
    torch.testing.assert_close(adapted(pixel_values, QUESTION), plain)


# Training


def test_only_the_adapter_is_a_parameter_and_only_by_harmless_names(adapted) -> None:
    names = [name for name, _ in adapted.named_parameters()]
    layers = len(adapted.adapter.layers)
    expected = {f"adapter.{i}_{part}" for i in range(layers) for part in ("down", "up")}
    assert set(names) == expected
    assert not [name for name in names if "lora_" in name or "vision_tower" in name]
    assert list(adapted.buffers()) == []
    assert not [m for m in adapted.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding))]
    assert list(DiffusionVisionTower(NAME, delay_load=True).parameters()) == []


def test_a_frozen_tower_builds_no_graph(frozen, pixel_values) -> None:
    assert not frozen(pixel_values, QUESTION).requires_grad


@pytest.mark.parametrize("taps", ["", "&taps=up0", "&taps=mid", "&taps=up1a1b0-attn2-to_q"])
def test_every_parameter_gets_a_gradient(taps, pixel_values) -> None:
    tower = DiffusionVisionTower(ADAPTED + taps)
    shake(tower)
    tower(pixel_values, QUESTION).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())
    frozen_parts = tower.encoder.backbone.vae.parameters()
    assert all(p.grad is None for p in frozen_parts)


def test_the_adapter_can_be_frozen_and_thawed(adapted, pixel_values) -> None:
    adapted.requires_grad_(False)
    with pytest.warns(UserWarning, match="no gradient"):
        assert not adapted(pixel_values).requires_grad
    adapted.requires_grad_(True)
    assert adapted(pixel_values).requires_grad
    with torch.no_grad():
        assert not adapted(pixel_values).requires_grad


def test_training_mode_leaves_the_frozen_model_in_evaluation(adapted, pixel_values) -> None:
    plain = adapted(pixel_values, QUESTION)
    adapted.train()
    assert not adapted.encoder.backbone.unet.training
    assert torch.equal(adapted(pixel_values, QUESTION), plain)


def test_a_step_of_the_optimizer_changes_the_features(adapted, pixel_values) -> None:
    optimizer = torch.optim.Adam(adapted.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(pixel_values, QUESTION).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_checkpointing_gives_the_same_gradients(adapted, pixel_values) -> None:
    def gradients() -> list[torch.Tensor]:
        adapted.zero_grad()
        adapted(pixel_values, QUESTION).square().mean().backward()
        return [p.grad.clone() for p in adapted.parameters()]

    plain = gradients()
    adapted.gradient_checkpointing = True
    torch.testing.assert_close(gradients(), plain)
    assert adapted.encoder.backbone.unet.is_gradient_checkpointing
    adapted.gradient_checkpointing = False
    torch.testing.assert_close(gradients(), plain)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # hosts call it so
def test_checkpointing_of_a_host_is_passed_on(adapted, pixel_values) -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    host = LlamaForCausalLM(config)
    host.model.vision_tower = adapted
    host.gradient_checkpointing_enable()
    adapted(pixel_values)
    assert adapted.encoder.backbone.unet.is_gradient_checkpointing
    host.gradient_checkpointing_disable()
    adapted(pixel_values)
    assert not adapted.encoder.backbone.unet.is_gradient_checkpointing


def test_caches_do_not_hide_a_changed_adapter(adapted, pixel_values) -> None:
    adapted.requires_grad_(False).eval()
    before = adapted(pixel_values)
    adapted.load_state_dict({k: v * 2 for k, v in adapted.state_dict().items()})
    assert not torch.allclose(adapted(pixel_values), before)


# Weights through the hands of hosts


@pytest.mark.long
def test_the_state_dict_is_small_and_loads_strictly(adapted, pixel_values) -> None:
    state = {k: v.clone() for k, v in adapted.state_dict().items()}
    assert sum(value.numel() for value in state.values()) < 50_000
    for delay in (True, False):
        other = DiffusionVisionTower(ADAPTED, delay_load=delay)
        other.load_state_dict(state, strict=True)
        torch.testing.assert_close(other(pixel_values), adapted(pixel_values))
    assert DiffusionVisionTower(NAME, delay_load=True).state_dict() == {}


def test_parameters_that_a_host_exchanges_are_the_ones_that_run(adapted, pixel_values) -> None:
    state = {k: v.clone() for k, v in adapted.state_dict().items()}
    other = DiffusionVisionTower(ADAPTED)
    other(pixel_values)
    other.load_state_dict(state, assign=True)
    torch.testing.assert_close(other(pixel_values), adapted(pixel_values))
    other(pixel_values).sum().backward()
    assert all(p.grad is not None for p in other.parameters())


def test_sharded_weights_come_as_views_and_run_too(adapted, pixel_values) -> None:
    plain = adapted(pixel_values)
    flat = {}
    for name, parameter in list(adapted.adapter.named_parameters()):
        flat[name] = parameter.detach().clone().requires_grad_(True)
        del adapted.adapter._parameters[name]
        setattr(adapted.adapter, name, flat[name].view_as(flat[name]))
    features = adapted(pixel_values)
    torch.testing.assert_close(features, plain)
    features.sum().backward()
    assert all(tensor.grad is not None for tensor in flat.values())


def test_weights_that_are_elsewhere_are_told(adapted, pixel_values) -> None:
    with torch.no_grad():
        next(adapted.adapter.parameters()).data = torch.empty(0)
    with pytest.raises(ConfigError, match="ZeRO-3"):
        adapted(pixel_values)


def test_copies_are_equal_and_apart(adapted, pixel_values) -> None:
    plain = adapted(pixel_values, QUESTION)
    twin = copy.deepcopy(adapted)
    shake(twin, seed=2)
    assert torch.equal(adapted(pixel_values, QUESTION), plain)
    assert not torch.allclose(twin(pixel_values, QUESTION), plain)
    there = pickle.loads(pickle.dumps(adapted))
    torch.testing.assert_close(there(pixel_values, QUESTION), plain)
    twin.half()
    assert adapted.dtype == torch.float32


def test_data_parallel_is_refused_where_it_would_split_the_adapter(adapted, pixel_values) -> None:
    adapted._is_replica = True
    with pytest.raises(ConfigError, match="torchrun"):
        adapted(pixel_values)


# A host's own hands: what LLaVA's recipes do to a whole model by names


class Host(nn.Module):
    """A language model with a tower and a projector, by LLaVA's names."""

    def __init__(self, tower: DiffusionVisionTower) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.q_proj = nn.Linear(4, 4)
        self.model.vision_tower = tower
        self.model.mm_projector = nn.Linear(224, 4)


def test_filters_by_name_find_what_they_should(adapted) -> None:
    named = dict(Host(adapted).named_parameters())
    projector = [name for name in named if "mm_projector" in name]
    assert len(projector) == 2
    tower = [name for name in named if "vision_tower" in name]
    assert len(tower) == 2 * len(adapted.adapter.layers)
    assert all(name.startswith("model.vision_tower.adapter.") for name in tower)
    assert not [name for name in named if "lora_" in name]


def test_lora_for_the_language_model_stays_out_of_the_tower(adapted) -> None:
    from peft import LoraConfig, get_peft_model

    host = Host(adapted)
    linear = {n.split(".")[-1] for n, m in host.named_modules() if isinstance(m, nn.Linear)}
    model = get_peft_model(host, LoraConfig(r=2, target_modules=sorted(linear)))
    tower = [name for name, _ in model.named_parameters() if "vision_tower" in name]
    assert tower
    assert not [name for name in tower if "lora_" in name]
    # peft freezes what is not its own; a load_model, as LLaVA calls it, must not be needed twice
    assert {p.requires_grad for n, p in model.named_parameters() if "vision_tower" in n} == {False}


@pytest.mark.long
def test_what_stage_two_saves_comes_back(adapted, pixel_values, tmp_path) -> None:
    trainable = {
        f"base_model.model.{name}": value.detach().clone()
        for name, value in Host(adapted).named_parameters()
        if "lora_" not in name and value.requires_grad
    }
    torch.save(trainable, tmp_path / "non_lora_trainables.bin")
    fresh = DiffusionVisionTower(ADAPTED, delay_load=True)
    stripped = {key.removeprefix("base_model.model."): v for key, v in trainable.items()}
    Host(fresh).load_state_dict(stripped, strict=False)
    torch.testing.assert_close(fresh(pixel_values), adapted(pixel_values))
    again = DiffusionVisionTower(ADAPTED)
    assert again.load_adapter(tmp_path)
    torch.testing.assert_close(again(pixel_values), adapted(pixel_values))


def test_a_host_that_initialises_everything_anew_leaves_the_tower_alone(
    pixel_values, plain
) -> None:
    tower = DiffusionVisionTower(ADAPTED, LlamaConfig())
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    host = Host(tower)
    for module in host.modules():  # as post_init does
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.normal_(module.weight)
    tower.load_model()
    after = tower.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(getattr(p, "_is_hf_initialized", False) for p in tower.parameters())
    torch.testing.assert_close(tower(pixel_values), plain(pixel_values))


@pytest.mark.parametrize("garbage", [1.7e38, torch.nan, 0.0])
def test_weights_that_a_host_left_uninitialised_start_anew(garbage, pixel_values, frozen) -> None:
    tower = DiffusionVisionTower(ADAPTED, delay_load=True)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.fill_(garbage)
    with pytest.warns(UserWarning, match="load_adapter"):
        tower.load_model()
    torch.testing.assert_close(tower(pixel_values), frozen(pixel_values))


def test_weights_left_on_the_meta_device_start_anew(pixel_values, frozen) -> None:
    tower = DiffusionVisionTower(ADAPTED, delay_load=True)
    tower.adapter.to("meta")
    with pytest.warns(UserWarning, match="meta"):
        tower.load_model()
    tower(pixel_values).sum().backward()
    assert all(p.grad is not None for p in tower.parameters())
    torch.testing.assert_close(tower(pixel_values), frozen(pixel_values))


def test_weights_that_a_host_loaded_in_float16_are_brought_back(pixel_values) -> None:
    tower = DiffusionVisionTower(ADAPTED, delay_load=True)
    for parameter in tower.parameters():
        parameter.data = parameter.data.half()
    tower.load_model()
    assert {p.dtype for p in tower.parameters()} == {torch.float32}


def test_zero3_of_transformers_is_put_aside_while_loading(monkeypatch) -> None:
    deepspeed = pytest.importorskip("transformers.integrations.deepspeed")

    class Flag:
        def is_zero3(self) -> bool:
            return True

    flag, seen = Flag(), []
    deepspeed.set_hf_deepspeed_config(flag)
    try:
        with loading.without_zero3():
            seen.append(deepspeed.is_deepspeed_zero3_enabled())
        seen.append(deepspeed.is_deepspeed_zero3_enabled())
        with pytest.raises(KeyError), loading.without_zero3():
            raise KeyError
        seen.append(deepspeed.is_deepspeed_zero3_enabled())
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert seen == [False, True, True]


# With CLIP beside it


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny-vit")
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.long
@pytest.mark.parametrize("how", ["channel", "tokens", "interleave"])
def test_clip_and_diffusion_are_one_tower(clip_folder, how, pixel_values) -> None:
    tower = DiffusionVisionTower(f"{ADAPTED}&fuse={clip_folder}&how={how}", delay_load=True)
    told = (tower.num_patches, tower.hidden_size)
    tower.load_model()
    features = tower(pixel_values, QUESTION)
    assert tuple(features.shape[1:]) == told
    assert (features - tower(pixel_values, OTHER)).abs().max() > 0.05
    features.sum().backward()
    assert all(p.grad is not None for p in tower.parameters())
    tower.half()
    assert tower.encoder.clip.dtype == torch.float16
    assert {p.dtype for p in tower.parameters()} == {torch.float32}
    assert torch.isfinite(tower(pixel_values, QUESTION)).all()
    assert set(dict(tower.named_parameters())) == set(tower.state_dict())
