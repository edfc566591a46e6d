"""Hooks into a host either take effect or raise, and leave a host that they refuse as it was."""

import sys
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import toy_llava
from diffenc.errors import ConfigError
from diffenc.hosts.llava import (
    AdapterCallback,
    prompted_data,
    register,
    take_prompts,
    train_with_prompts,
)
from diffenc.hosts.llava.layout import import_part
from diffenc.hosts.llava.register import registration_of
from diffenc.hosts.prismatic import register as register_prismatic
from diffenc.hosts.prompts import PromptTokenizer
from diffenc.hosts.tinyllava import register as register_tinyllava
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.shapes import render, sample_scenes
from toy_llava import OtherTower, ToyDataset, ToyLlava, toy_collator, toy_model, toy_package

NAME = "diffenc:shapes?t=50&rank=2&grid=2"
ONE, OTHER = "what color is the circle?", "how many stars are there?"


@pytest.fixture
def fork() -> Iterator[Any]:
    with toy_package("toyfork") as made:
        yield made
        if (done := registration_of("toyfork")) is not None:
            done.undo()


def source(module: types.ModuleType, text: str) -> None:
    exec(text, vars(module))  # as the fork's own file would


def state(made: Any) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in made.modules.values()]


def refuses(made: Any, hook: Callable[[], Any], reason: str) -> None:
    before = state(made)
    with pytest.raises(ConfigError, match=reason):
        hook()
    assert state(made) == before
    assert not hasattr(ToyLlava, "_takes_vision_prompts")


# Builders


def test_a_builder_that_is_kept_in_a_table_is_refused_with_the_table(fork) -> None:
    del fork.arch.LlavaMetaModel
    source(
        fork.arch,
        "BUILDERS = {'clip': build_vision_tower}\n"
        "class LlavaMetaModel:\n"
        "    def __init__(self, cfg):\n"
        "        self.vision_tower = BUILDERS[cfg.mm_vision_tower](cfg)\n",
    )
    refuses(fork, lambda: register("toyfork"), r"table toyfork\.model\.llava_arch\.BUILDERS")


def test_a_builder_of_lists_is_refused_with_its_name(fork) -> None:
    del fork.arch.LlavaMetaModel
    source(fork.builder, "def build_vision_tower_aux_list(cfg, **kwargs):\n    return []\n")
    fork.arch.build_vision_tower_aux_list = fork.builder.build_vision_tower_aux_list
    source(
        fork.arch,
        "class LlavaMetaModel:\n"
        "    def __init__(self, cfg):\n"
        "        self.towers = build_vision_tower_aux_list(cfg)\n",
    )
    refuses(fork, lambda: register("toyfork"), "calls build_vision_tower_aux_list")


LISTS = """
def build_vision_tower_aux_list(cfg, **kwargs):
    names = getattr(cfg, "mm_vision_tower_aux_list", None) or cfg.vision_tower_aux_list
    return list(zip(names, cfg.vision_tower_aux_token_len_list, strict=True))
"""


def test_a_builder_of_lists_builds_the_tower_in_its_place_among_the_others(fork) -> None:
    source(fork.builder, LISTS)
    source(
        fork.arch,
        "from toyfork.model.multimodal_encoder.builder import build_vision_tower_aux_list\n"
        "def initialize(cfg):\n"
        "    return build_vision_tower_aux_list(cfg)\n",
    )
    place = "model.multimodal_encoder.builder:build_vision_tower_aux_list"
    done = register("toyfork", builder=place, loader=None)
    config = SimpleNamespace(
        vision_tower_aux_list=["clip", NAME, "dino"], vision_tower_aux_token_len_list=[9, 4, 16]
    )
    clip, tower, dino = fork.arch.initialize(config)
    assert isinstance(tower, DiffusionVisionTower)
    assert (clip, dino) == (("clip", 9), ("dino", 16))
    assert len(config.vision_tower_aux_list) == 3
    assert [str(spec) for spec in done.specs] == [str(tower.spec)]
    alone = SimpleNamespace(mm_vision_tower_aux_list=[NAME], vision_tower_aux_token_len_list=[4])
    assert isinstance(fork.arch.initialize(alone)[0], DiffusionVisionTower)
    wrong = SimpleNamespace(vision_tower_aux_list=[NAME], vision_tower_aux_token_len_list=[9])
    with pytest.raises(ConfigError, match=r"expects 9 tokens.*has 4; put grid=3"):
        fork.arch.initialize(wrong)


@pytest.mark.parametrize("around", ["", "    @torch.no_grad()\n"])
def test_a_builder_that_only_another_of_its_name_hides_is_refused(fork, around) -> None:
    del fork.arch.LlavaMetaModel
    source(
        fork.arch,
        "import torch\n"
        "def build_vision_tower(cfg):\n"
        "    return 'of its own'\n"
        f"class LlavaMetaModel:\n{around}"
        "    def __init__(self, cfg):\n"
        "        self.vision_tower = build_vision_tower(cfg)\n",
    )
    refuses(fork, lambda: register("toyfork"), "nothing in 'toyfork' calls")
    done = register("toyfork", builder="model.llava_arch:build_vision_tower")
    built = fork.arch.LlavaMetaModel(SimpleNamespace(mm_vision_tower=NAME)).vision_tower
    assert isinstance(built, DiffusionVisionTower)
    assert fork.arch.LlavaMetaModel(SimpleNamespace(mm_vision_tower="clip")).vision_tower != built
    assert repr(done).split("\n") == [
        "Registration(",
        "  package='toyfork',",
        "  builder='model.llava_arch:build_vision_tower',",
        "  loader='model.builder:load_pretrained_model',",
        "  specs=('diffenc:shapes?grid=2&rank=2',),",
        ")",
    ]
    done.undo()


def test_a_second_tower_is_built_from_its_own_name_in_the_config(fork) -> None:
    source(fork.builder, "def build_vision_tower_aux(cfg, **kwargs):\n    return 'aux'\n")
    source(
        fork.arch,
        "def initialize(cfg):\n"
        "    from toyfork.model.multimodal_encoder.builder import build_vision_tower_aux\n"
        "    return build_vision_tower_aux(cfg)\n",
    )
    place = "model.multimodal_encoder.builder:build_vision_tower_aux"
    done = register("toyfork", builder=place, loader=None)
    config = SimpleNamespace(mm_vision_tower="openai/clip", mm_vision_tower_aux=NAME)
    build = fork.builder.build_vision_tower_aux
    assert isinstance(build(config), DiffusionVisionTower)
    assert build(SimpleNamespace(mm_vision_tower=NAME, mm_vision_tower_aux="clip")) == "aux"
    done.undo()
    assert fork.builder.build_vision_tower_aux(config) == "aux"


@pytest.mark.parametrize(
    "caller",
    [
        "        self.towers = [build_vision_tower(each) for each in [cfg]]\n",
        "        self.make = lambda: build_vision_tower(cfg)\n",
        "        self.tower = builder.build_vision_tower(cfg)\n",
    ],
)
@pytest.mark.parametrize("around", ["", "    @decorate\n", "    @classmethod\n"])
def test_a_builder_is_seen_to_be_called_however_the_call_is_written(fork, caller, around) -> None:
    del fork.arch.LlavaMetaModel
    source(
        fork.arch,
        "import functools\n"
        "from toyfork.model.multimodal_encoder import builder\n"
        "def decorate(function):\n"
        "    return functools.wraps(function)(lambda *args: function(*args))\n"
        f"class LlavaMetaModel:\n{around}    def __init__(self, cfg):\n{caller}",
    )
    register("toyfork").undo()


def test_a_fork_that_takes_several_values_from_its_tower_is_refused(tmp_path, monkeypatch) -> None:
    files = {
        "__init__.py": "",
        "model/__init__.py": "from .arch import Meta\n",
        "model/multimodal_encoder/__init__.py": "",
        "model/multimodal_encoder/builder.py": "def build_vision_tower(cfg):\n    return None\n",
        "model/arch.py": "from .multimodal_encoder.builder import build_vision_tower\n"
        "class Meta:\n"
        "    def __init__(self, cfg):\n"
        "        self.tower = build_vision_tower(cfg)\n"
        "    def encode_images(self, images):\n"
        "        features, levels = self.get_model().get_vision_tower()(images)\n"
        "        return features, levels\n",
    }
    for name, text in files.items():
        file = tmp_path / "levelsfork" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"arch\.Meta\.encode_images.*features, levels\)? ="):
        register("levelsfork", loader=None)
    for name in [name for name in sys.modules if name.startswith("levelsfork")]:
        del sys.modules[name]


def test_a_second_registration_by_other_places_is_refused(fork) -> None:
    done = register("toyfork")
    assert register("toyfork") is done
    with pytest.raises(ConfigError, match="undo"):
        register("toyfork", loader=None)
    done.undo()


@pytest.mark.parametrize("place", ["builder", "model.builder:", ":load", "model.builder:a b"])
def test_a_place_that_does_not_parse_is_refused(fork, place) -> None:
    refuses(fork, lambda: register("toyfork", loader=place), "module:function")


def test_a_script_that_imported_the_loader_before_gets_the_new_one(fork) -> None:
    script = types.ModuleType("toy_eval_script")
    script.load_pretrained_model = original = toy_llava.load_pretrained_model
    sys.modules["toy_eval_script"] = script
    try:
        done = register("toyfork")
        assert script.load_pretrained_model is not original
        assert script.load_pretrained_model is fork.modules[".model.builder"].load_pretrained_model
        done.undo()
    finally:
        del sys.modules["toy_eval_script"]


# Training scripts


def test_the_models_are_found_by_what_they_do_and_not_by_what_lies_around(fork) -> None:
    class LeftOver:
        """What an older version derived from."""

        def prepare_inputs_labels_for_multimodal(self, input_ids: Any, images: Any) -> None: ...

    fork.arch.LlavaMetaForCausalLM = LeftOver
    done = train_with_prompts("toyfork")
    assert ToyLlava._takes_vision_prompts
    assert not hasattr(LeftOver, "_takes_vision_prompts")
    done.undo()


def test_a_package_without_a_model_is_refused_and_a_class_can_be_passed(fork) -> None:
    del fork.arch.ToyLlava
    refuses(fork, lambda: train_with_prompts("toyfork"), "no class of 'toyfork'")
    done = train_with_prompts("toyfork", models=ToyLlava)
    assert ToyLlava._takes_vision_prompts
    done.undo()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("def train():\n    return LLaVATrainer()\n", "calls no make_supervised_data_module"),
        ("def train():\n    make_supervised_data_module()\n", "no trainer of its module"),
        (
            "Second = LLaVATrainer\n"
            "def train():\n    make_supervised_data_module(), LLaVATrainer(), Second()\n",
            "several trainers, LLaVATrainer, Second",
        ),
        ("del train\n", r"has no train\(\)"),
    ],
)
def test_a_script_that_works_otherwise_is_refused(fork, script, reason) -> None:
    source(fork.script, script)
    refuses(fork, lambda: train_with_prompts("toyfork"), reason)


def test_a_trainer_that_is_not_made_and_no_models_are_refused(fork) -> None:
    fork.script.Unused = toy_llava.ToyTrainer
    for name in ("MyTrainer", "Unused"):
        refuses(fork, lambda name=name: train_with_prompts("toyfork", trainer=name), name)
    refuses(fork, lambda: train_with_prompts("toyfork", models=[]), "one class or more")


def test_a_refused_script_leaves_an_earlier_registration(fork) -> None:
    done = register("toyfork")
    with pytest.raises(ConfigError, match="MyTrainer"):
        train_with_prompts("toyfork", trainer="MyTrainer")
    with pytest.raises(ConfigError, match="Linear has no"):
        train_with_prompts("toyfork", models=[ToyLlava, torch.nn.Linear])
    assert not hasattr(ToyLlava, "_takes_vision_prompts")
    config = SimpleNamespace(mm_vision_tower=NAME)
    assert isinstance(fork.arch.build_vision_tower(config, delay_load=True), DiffusionVisionTower)
    done.undo()


def test_a_script_outside_of_the_package_is_passed_as_a_module(fork) -> None:
    outside = types.ModuleType("toy_train_script")
    outside.MyTrainer = toy_llava.ToyTrainer
    outside.make_supervised_data_module = lambda entries: {
        "train_dataset": ToyDataset(entries),
        "data_collator": toy_collator,
    }
    source(
        outside,
        "import functools\n"
        "def recorded(function):\n"
        "    return functools.wraps(function)(lambda *args: function(*args))\n"
        "@recorded\n"
        "def train(entries):\n    return MyTrainer(**make_supervised_data_module(entries))\n",
    )
    done = train_with_prompts("toyfork", script=outside)
    fork.builder.build_vision_tower(SimpleNamespace(vision_tower=NAME), delay_load=True)
    trainer = outside.train([entry(ONE), entry(OTHER)])
    assert isinstance(trainer.callbacks[0], AdapterCallback)
    assert trainer.options["train_dataset"][1]["vision_prompt"] == OTHER
    done.undo()


# By hand


def entry(question: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "red"}]
    return {"id": question, "image": "a.png", "conversations": turns}


def test_data_by_hand_has_the_prompts_of_the_prepared_script() -> None:
    tower = DiffusionVisionTower(NAME, delay_load=True)
    plain = {
        "train_dataset": ToyDataset([entry(ONE), entry(OTHER)]),
        "eval_dataset": None,
        "data_collator": toy_collator,
    }
    module = prompted_data(plain, tower, "question")
    batch = module["data_collator"]([module["train_dataset"][i] for i in range(2)])
    assert torch.equal(batch["vision_prompt_ids"], PromptTokenizer("shapes")([ONE, OTHER]).ids)
    assert module["eval_dataset"] is None
    for part in ("train_dataset", "data_collator"):
        lacking = {key: value for key, value in plain.items() if key != part}
        with pytest.raises(ConfigError, match="train_dataset, and data_collator"):
            prompted_data(lacking, tower)


@pytest.mark.wrong_type
@pytest.mark.parametrize(
    ("data", "tower", "message"),
    [
        ({}, None, "a tower of diffenc, a DiffusionVisionTower, got None; in LLaVA"),
        ({}, torch.nn.Identity(), "got a value of type Identity"),
        (
            [1],
            DiffusionVisionTower(NAME, delay_load=True),
            r"what make_super.*got \[1\]",
        ),
    ],
    ids=["none", "other", "data"],
)
def test_what_is_no_tower_and_no_data_is_refused(data, tower, message) -> None:
    with pytest.raises(ConfigError, match=message):
        prompted_data(data, tower, "question")


def test_prompts_reach_a_tower_that_the_model_has_no_call_for() -> None:
    tower = DiffusionVisionTower(NAME)
    pictures = [render(scene) for scene in sample_scenes(1, seed=0)]
    shown = tower.image_processor(pictures, return_tensors="pt")["pixel_values"]

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.hidden_size = tower, tower.hidden_size

        def forward(self, images: Any) -> Any:
            return self.inner(images)

    class Plain(ToyLlava):
        get_vision_tower = property()  # type: ignore[assignment]

    model = take_prompts(toy_model(Wrapped(), Plain))
    logits = []
    for prompt in (ONE, OTHER, ONE):
        tokens = tower.tokenize([prompt])
        with torch.no_grad():
            out = model(
                torch.tensor([[1, -200, 5]]),
                images=shown,
                vision_prompt_ids=tokens.ids,
                vision_prompt_mask=tokens.mask,
            )
        logits.append(out.logits)
    assert torch.equal(logits[0], logits[2])
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_a_model_on_another_tower_or_of_another_signature_is_refused() -> None:
    other = OtherTower()
    other.hidden_size = 4
    with pytest.raises(ConfigError, match="OtherTower, which reads no prompts"):
        take_prompts(toy_model(other))

    class Otherwise(torch.nn.Module):
        def prepare_inputs_labels_for_multimodal(self, input_ids: Any, pixels: Any) -> None: ...

    with pytest.raises(ConfigError, match="takes no images"):
        take_prompts(Otherwise)


# Adapters that never train


@pytest.mark.long
def test_an_adapter_that_nothing_trains_is_told_of_once() -> None:
    tower = DiffusionVisionTower(NAME).train()
    side = tower.image_size
    shown = torch.zeros(1, 3, side, side)
    tower.requires_grad_(False)
    with pytest.warns(UserWarning, match="no gradient"):
        tower(shown, ONE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tower(shown, ONE)
        trained = DiffusionVisionTower(NAME).train()
        trained(shown, ONE)
        trained.requires_grad_(False).eval()(shown, ONE)


def test_a_frozen_tower_stays_frozen_when_its_model_is_loaded() -> None:
    tower = DiffusionVisionTower(NAME, delay_load=True)
    tower.requires_grad_(False)
    tower.load_model()
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    other = DiffusionVisionTower(NAME, delay_load=True)
    other.load_model()
    assert all(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize("fault", ["raise KeyError('model')", "import os; os.nothing", "1 / 0"])
@pytest.mark.parametrize(
    ("hook", "module"),
    [
        (register, "model/multimodal_encoder/builder.py"),
        (register_tinyllava, "model/vision_tower/__init__.py"),
        (partial(register_prismatic, {"diffenc-shapes": NAME}), "models/materialize.py"),
    ],
    ids=["llava", "tinyllava", "prismatic"],
)
def test_a_fork_whose_own_code_fails_is_refused(hook, module, fault, tmp_path, monkeypatch):
    file = tmp_path / "brokenfork" / module
    file.parent.mkdir(parents=True)
    for folder in file.relative_to(tmp_path).parents:
        if folder.name:
            (tmp_path / folder / "__init__.py").touch()
    file.write_text(fault)
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):  # a failed import leaves other modules behind, which fail in other ways
        with pytest.raises(ConfigError, match=r"cannot (import|reach) brokenfork\."):
            hook(package="brokenfork")
    for name in [name for name in sys.modules if name.startswith("brokenfork")]:
        del sys.modules[name]


def test_the_fault_that_a_fork_hides_is_the_one_that_is_named(tmp_path, monkeypatch) -> None:
    files = {
        "__init__.py": "",
        "model/__init__.py": "try:\n    from .language_model.llama import Llama\nexcept: pass\n",
        "model/language_model/__init__.py": "",
        "model/language_model/llama.py": "import never_installed\nLlama = object\n",
        "model/builder.py": "from hidingfork.model import Llama\n",
    }
    for name, text in files.items():
        file = tmp_path / "hidingfork" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"No module named 'never_installed'.*The fork itself"):
        import_part("hidingfork", "model.builder")
    with pytest.raises(ConfigError, match="The fork has no such part"):
        import_part("hidingfork", "model.loader")
    for name in [name for name in sys.modules if name.startswith("hidingfork")]:
        del sys.modules[name]
