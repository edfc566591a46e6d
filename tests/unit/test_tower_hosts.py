"""The thin adapters for prismatic-vlms and TinyLLaVA Factory, by those hosts' own calls."""

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from diffenc.errors import BackboneError, ConfigError, PromptError, ShapeError
from diffenc.hosts import prismatic, tinyllava
from diffenc.hosts.prompts import PromptTokenizer, prompt_scope
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.shapes import render, sample_scenes

NAME = "diffenc:shapes?t=50&rank=2"
ONE, OTHER = "what color is the circle?", "how many stars are there?"


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    return [render(scene) for scene in sample_scenes(2, seed=0)]


@pytest.fixture(scope="module")
def backbone() -> prismatic.PrismaticBackbone:
    return prismatic.PrismaticBackbone("diffenc-shapes", "resize-naive", spec=NAME)


def test_prismatic_reads_sizes_and_a_transform(backbone) -> None:
    assert backbone.identifier == "diffenc-shapes"
    assert backbone.default_image_resolution == (3, 64, 64)
    assert (backbone.embed_dim, backbone.num_patches) == (224, 64)
    assert backbone.half_precision_dtype == torch.bfloat16
    backbone.dtype = torch.float32
    assert backbone.get_image_transform() is backbone.image_transform
    policy = backbone.get_fsdp_wrapping_policy()
    found = [policy(module=m, recurse=False, nonwrapped_numel=1) for m in backbone.modules()]
    assert not any(found)


def test_prismatic_prompts_travel_with_their_pictures(backbone, pictures) -> None:
    transform = backbone.get_image_transform()
    samples = []
    for picture, question in zip(pictures, [ONE, OTHER], strict=True):
        with prompt_scope(question):
            samples.append(transform(picture))
    dummy = torch.zeros(backbone.default_image_resolution)
    batch = {k: torch.stack([s[k] for s in samples] + [dummy]) for k in samples[0]}
    assert len({value.shape for value in batch.values()}) == 1
    for dtype in (torch.float32, torch.bfloat16):  # what an autocast loop may make of it
        cast = {key: value.to(dtype) for key, value in batch.items()}
        found = backbone(cast)
        expected = backbone.featurizer(cast["pixel_values"], [ONE, OTHER, ""])
        assert torch.equal(found, expected)
    indexed = {key: value[[1]] for key, value in batch.items()}
    torch.testing.assert_close(
        backbone(indexed), backbone.featurizer(indexed["pixel_values"], OTHER)
    )
    plain = backbone(batch["pixel_values"])
    assert torch.equal(plain, backbone.featurizer(batch["pixel_values"]))


@pytest.mark.parametrize("model", ["sdxl-like", "shapes"])
def test_packed_prompts_are_exact_in_half_precision(model, backbone) -> None:
    tokens = PromptTokenizer("shapes")([ONE, ""])
    if model == "sdxl-like":
        ids = torch.randint(0, 49408, tokens.ids.shape, generator=torch.Generator().manual_seed(0))
        tokens = type(tokens)(ids, tokens.mask)
    packed = prismatic.pack_prompts(tokens, 64).bfloat16()
    found = prismatic.unpack_prompts(packed, backbone.featurizer)
    assert torch.equal(found.ids, tokens.ids)
    assert torch.equal(found.mask, tokens.mask)
    with pytest.raises(PromptError, match="hold no prompts"):
        prismatic.pack_prompts(tokens, 6)


def test_prismatic_bad_input_is_told(backbone) -> None:
    with pytest.raises(ConfigError, match="image_resize_strategy"):
        prismatic.PrismaticBackbone(NAME, "resize")
    with pytest.raises(ConfigError, match="size=224"):
        prismatic.PrismaticBackbone(NAME, default_image_size=224)
    with pytest.raises(ShapeError, match="pixel_values"):
        backbone({"dino": torch.zeros(1, 3, 64, 64)})


def test_prismatic_registry(monkeypatch) -> None:
    registry: dict[str, Any] = {"clip": {}}
    for name in ("toyprismatic", "toyprismatic.models", "toyprismatic.models.materialize"):
        module = types.ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        module.VISION_BACKBONES = registry  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    prismatic.register({"diffenc-shapes": NAME}, "toyprismatic")
    entry = registry["diffenc-shapes"]
    made = entry["cls"]("diffenc-shapes", "letterbox", **entry["kwargs"])
    assert made.embed_dim == 224
    with pytest.raises(ConfigError):
        prismatic.register({"x": "nonsense"}, "toyprismatic")
    with pytest.raises(ConfigError, match="nosuchprismatic"):
        prismatic.register({"x": NAME}, "nosuchprismatic")


@pytest.fixture
def towers(monkeypatch) -> dict[str, Any]:
    """TinyLLaVA's registry: the last name that is part of what stands before the colon."""
    known: dict[str, Any] = {}

    def register_vision_tower(name: str) -> Any:
        return lambda cls: known.setdefault(name, cls)

    for name in ("toytiny", "toytiny.model", "toytiny.model.vision_tower"):
        module = types.ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        module.register_vision_tower = register_vision_tower  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    tinyllava.register("toytiny")
    return known


def test_tinyllava_builds_initialises_anew_and_loads(towers, tmp_path, pictures) -> None:
    name = tinyllava.write_folder(NAME, tmp_path / "tower")
    kind, _, folder = name.partition(":")
    config = AutoConfig.from_pretrained(folder).vision_config
    assert (config.hidden_size, config.image_size, config.patch_size) == (224, 64, 8)
    tower = towers[kind](config)
    for module in tower.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.normal_(module.weight)
    assert not tower._vision_tower.is_loaded
    tower.load_model(name)
    shown = torch.stack(
        [tower._image_processor(p, return_tensors="pt")["pixel_values"][0] for p in pictures]
    )
    features = tower(shown, vision_feature_layer=-2, vision_feature_select_strategy="patch")
    assert features.shape == (2, 64, 224)
    plain = DiffusionVisionTower("diffenc:shapes?t=50")
    torch.testing.assert_close(features, plain(shown))
    with prompt_scope([ONE, OTHER]):
        torch.testing.assert_close(tower(shown), plain(shown, [ONE, OTHER]))


def test_tinyllava_saves_by_names_and_loads_strictly(towers, tmp_path) -> None:
    config = tinyllava.TinyTowerConfig(NAME)
    tower = towers["diffenc"](config)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.fill_(0.5)
    state = dict(tower._vision_tower.named_parameters())
    torch.save(state, tmp_path / "pytorch_model.bin")
    fresh = towers["diffenc"](config)
    fresh.load_model("diffenc:x", pretrained_vision_tower_path=str(tmp_path))
    assert all((p == 0.5).all() for p in fresh.vision_tower.parameters())
    other = towers["diffenc"](tinyllava.TinyTowerConfig("diffenc:shapes?rank=3"))
    with pytest.raises(BackboneError, match="not of this tower"):
        other.load_model(pretrained_vision_tower_path=tmp_path)


def test_tinyllava_bad_input_is_told(tmp_path) -> None:
    with pytest.raises(ConfigError, match="spec"):
        tinyllava.TinyLLaVATower(tinyllava.TinyTowerConfig())
    with pytest.raises(ConfigError, match="splits names"):
        tinyllava.write_folder(NAME, tmp_path / "a:b")
    with pytest.raises(ConfigError, match="nosuchtiny"):
        tinyllava.register("nosuchtiny")
