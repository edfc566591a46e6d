"""A fork written for transformers 4.37 runs under the installed one, or is refused."""

import contextlib
import importlib
import importlib.util
import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import trainer as transformers_trainer

from diffenc.errors import ConfigError
from diffenc.hosts.llava import modernize
from diffenc.hosts.llava.layout import import_part

MODEL = """
import torch
from torch import nn

class Prepares(nn.Module):
    def prepare_inputs_for_generation(self, input_ids, cache_position=None, **kwargs):
        return {"input_ids": input_ids, "cache_position": cache_position}

Prepares.__module__ = "transformers.models.of_4_48"

class OldModel(Prepares):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, rows, labels=None):
        return {"loss": (rows @ self.weight).square().mean()}

    def prepare_inputs_labels_for_multimodal(self, input_ids, images):
        return input_ids

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def generate(self):
        return None
"""
TRAINER = """
from transformers import Trainer
from transformers.trainer import ALL_LAYERNORM_LAYERS, get_parameter_names

class OldTrainer(Trainer):
    samplers = 0

    def _get_train_sampler(self):
        self.samplers += 1
        return super()._get_train_sampler()

    def _save_checkpoint(self, model, trial, metrics=None):
        super(OldTrainer, self)._save_checkpoint(model, trial, metrics)
"""
SCRIPT = """
from dataclasses import dataclass
import transformers
from oldfork.model.llava_arch import OldModel
from oldfork.train.trainer import OldTrainer

@dataclass
class TrainingArguments(transformers.TrainingArguments):
    group_by_modality_length: bool = False

def maybe_zero_3(param, ignore_status=False, name=None):
    from deepspeed import zero
    raise NotImplementedError

def train(options, rows):
    (args,) = transformers.HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(options)
    trainer = OldTrainer(model=OldModel(), tokenizer=None, args=args, train_dataset=rows)
    trainer.train()
    return trainer
"""


missing = pytest.mark.skipif(
    "tokenizer" in inspect.signature(transformers.Trainer.__init__).parameters,
    reason="this transformers lacks nothing of it",
)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that writes the fork; what it left in transformers is checked afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(vars(transformers_trainer)), transformers.Trainer.__init__

    def write(model: str = MODEL, trainer: str = TRAINER, script: str = SCRIPT) -> None:
        files = {
            "__init__.py": "",
            "model/__init__.py": "",
            "model/builder.py": "",
            "model/llava_arch.py": model,
            "train/__init__.py": "",
            "train/trainer.py": trainer,
            "train/train.py": script,
        }
        for name, text in files.items():
            file = tmp_path / "oldfork" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        importlib.invalidate_caches()

    yield write
    if "oldfork" in sys.modules:
        modernize_is_undone()
    for name in [each for each in sys.modules if each.partition(".")[0] == "oldfork"]:
        del sys.modules[name]
    assert (set(vars(transformers_trainer)), transformers.Trainer.__init__) == before


def modernize_is_undone() -> None:
    for script in ("train.train", None):
        with contextlib.suppress(ConfigError):  # refused: nothing was done
            modernize("oldfork", script=script).undo()


def options(folder: Path, *more: str) -> list[str]:
    line = (
        f"--output_dir {folder} --use_cpu True --max_steps 2 --save_strategy steps --save_steps 1"
    )
    return [*line.split(), "--report_to", "none", "--disable_tqdm", "True", *more]


def rows() -> list[dict[str, Any]]:
    return [{"rows": torch.ones(2), "labels": torch.ones(1)} for _ in range(4)]


@missing
def test_an_old_script_trains_and_saves_checkpoints(write, tmp_path) -> None:
    write()
    supplied = modernize("oldfork").supplied
    script = sys.modules["oldfork.train.train"]
    trainer = script.train(options(tmp_path / "out", "--warmup_ratio", "0.5"), rows())
    assert trainer.samplers >= 1
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    assert any("tokenizer" in each for each in supplied)


@missing
def test_without_it_an_import_fails_with_the_advice_to_call_it(write) -> None:
    write()
    with pytest.raises(ConfigError, match=r"diffenc\.hosts\.llava\.modernize"):
        import_part("oldfork", "train.train")


@missing
def test_renamed_options_set_the_new_ones(write, tmp_path) -> None:
    write()
    modernize("oldfork")
    kind = sys.modules["oldfork.train.train"].TrainingArguments
    parser = transformers.HfArgumentParser(kind)

    def parsed(*more: str) -> Any:
        return parser.parse_args_into_dataclasses(options(tmp_path, *more))[0]

    args = parsed("--evaluation_strategy", "epoch", "--warmup_ratio", "0.25", "--do_eval")
    assert args.eval_strategy == "epoch"
    assert args.get_warmup_steps(100) == 25
    both = parsed("--warmup_ratio", "0.25", "--warmup_steps", "7")
    assert both.get_warmup_steps(100) == 7
    plain = parsed()
    assert (plain.eval_strategy, plain.get_warmup_steps(100)) == ("no", 0)
    assert pickle.loads(pickle.dumps(args)).eval_strategy == "epoch"
    with pytest.raises(ConfigError, match="below 1, got 3"):
        parsed("--warmup_ratio", "3")


def test_weights_of_norms_do_not_decay(write) -> None:
    write()
    modernize("oldfork")
    module = sys.modules["oldfork.train.trainer"]
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    decayed = module.get_parameter_names(llama, module.ALL_LAYERNORM_LAYERS)
    names = [name for name, _ in llama.named_parameters()]
    assert [name for name in names if name not in decayed] == [n for n in names if "norm" in n]


def test_weights_are_gathered_without_deepspeed(write, monkeypatch) -> None:
    write()
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    modernize("oldfork")
    weight = torch.nn.Parameter(torch.ones(2))
    whole = sys.modules["oldfork.train.train"].maybe_zero_3(weight, ignore_status=True, name="w")
    assert torch.equal(whole, weight)
    assert not whole.requires_grad


def test_generate_hands_no_cache_position_to_a_model_that_takes_none(write) -> None:
    write()
    modernize("oldfork", script=None)
    model = sys.modules["oldfork.model.llava_arch"].OldModel()
    assert set(model.prepare_inputs_for_generation(1, cache_position=2)) == {"input_ids"}
    stock = sys.modules["oldfork.model.llava_arch"].Prepares.prepare_inputs_for_generation
    assert set(stock(model, 1, cache_position=2)) == {"input_ids", "cache_position"}


@missing
def test_training_can_follow_a_call_that_left_it_aside(write) -> None:
    write()
    first = modernize("oldfork", script=None)
    second = modernize("oldfork")
    assert any("cache_position" in each for each in first.supplied)
    assert any("tokenizer" in each for each in second.supplied)
    assert not any("cache_position" in each for each in second.supplied)
    second.undo()
    first.undo()
    model = sys.modules["oldfork.model.llava_arch"].OldModel()
    assert "cache_position" in model.prepare_inputs_for_generation(1, cache_position=2)


def test_a_model_that_takes_the_cache_position_keeps_it(write) -> None:
    write(model=MODEL.replace("labels=None)", "labels=None, cache_position=None)"))
    modernize("oldfork", script=None)
    model = sys.modules["oldfork.model.llava_arch"].OldModel()
    assert model.prepare_inputs_for_generation(1, cache_position=2)["cache_position"] == 2


def test_what_a_fork_has_of_its_own_is_left(write) -> None:
    script = SCRIPT.replace(
        "modality_length: bool = False",
        "modality_length: bool = False\n    evaluation_strategy: str = 'no'\n"
        "    warmup_ratio: float = 0.0",
    )
    trainer = TRAINER.replace("_get_train_sampler(self)", "_get_train_sampler(self, *rows)")
    write(MODEL.replace("labels=None)", "labels=None, **kwargs)"), trainer, script)
    done = modernize("oldfork")
    kind = sys.modules["oldfork.train.train"].TrainingArguments
    assert kind.__mro__[1] is transformers.TrainingArguments
    words = ("cache_position", "--evaluation_strategy", "--warmup_ratio", "_get_train_sampler")
    assert not [each for each in done.supplied if any(word in each for word in words)]


@missing
def test_a_second_call_changes_nothing_and_undo_everything(write) -> None:
    write()
    done = modernize("oldfork")
    module, script = (sys.modules[f"oldfork.train.{name}"] for name in ("trainer", "train"))
    assert modernize("oldfork") is done
    assert module.OldTrainer.__bases__ != (transformers.Trainer,)
    done.undo()
    assert module.OldTrainer.__bases__ == (transformers.Trainer,)
    assert "self" in inspect.signature(module.OldTrainer._get_train_sampler).parameters
    assert script.TrainingArguments.__mro__[1] is transformers.TrainingArguments


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SCRIPT.replace("def train(", "def main("), "has no train"),
        (SCRIPT.replace("OldTrainer(", "print("), "makes no trainer"),
        (SCRIPT.replace("HfArgumentParser(TrainingArguments)", "HfArgumentParser(1)"), "no class"),
        ("from transformers.trainer import NeverWas\n" + SCRIPT, "NeverWas"),
    ],
    ids=["no train()", "no trainer", "no options", "unknown name"],
)
def test_what_cannot_be_supplied_is_refused(write, text, reason) -> None:
    write(script=text)
    with pytest.raises(ConfigError, match=reason):
        modernize("oldfork")


def test_a_trainer_may_have_other_parts_before_transformers(write, tmp_path) -> None:
    mixed = TRAINER.replace(
        "class OldTrainer(Trainer)", "class Part:\n    pass\n\nclass OldTrainer(Part, Trainer)"
    )
    write(trainer=mixed)
    done = modernize("oldfork")
    script = sys.modules["oldfork.train.train"]
    script.train(options(tmp_path / "out"), rows())
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    done.undo()
    kind = sys.modules["oldfork.train.trainer"].OldTrainer
    assert [each.__name__ for each in kind.__bases__] == ["Part", "Trainer"]
    assert kind.__bases__[1] is transformers.Trainer


def test_a_script_outside_of_the_package_is_passed_as_a_module(write, tmp_path) -> None:
    write()
    (tmp_path / "oldfork" / "train" / "train.py").rename(tmp_path / "oldfork_script.py")
    modernize("oldfork", script=None)
    script = importlib.import_module("oldfork_script")
    done = modernize("oldfork", script=script)
    assert modernize("oldfork", script=script) is done
    script.train(options(tmp_path / "out", "--warmup_ratio", "0.5"), rows())
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    assert any(each.startswith("oldfork_script.maybe_zero_3") for each in done.supplied) == (
        importlib.util.find_spec("deepspeed") is None
    )
    done.undo()
    del sys.modules["oldfork_script"]


def test_a_trainer_that_asks_for_fairscale_is_in_none_of_its_ways(write, tmp_path) -> None:
    write(
        trainer=TRAINER.replace("import ALL_", "import ShardedDDPOption, ALL_").replace(
            "    samplers = 0",
            "    samplers = 0\n\n    def create_optimizer(self):\n"
            "        assert self.sharded_ddp != ShardedDDPOption.SIMPLE\n"
            "        return super().create_optimizer()\n",
        )
    )
    modernize("oldfork")
    sys.modules["oldfork.train.train"].train(options(tmp_path / "out"), rows())
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_a_fork_may_call_its_models_as_transformers_calls_its_own(write) -> None:
    named = (
        "from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM\n"
        "class LlavaConfig(LlamaConfig):\n    model_type = 'llava'\n"
        "class OldLlava(LlamaForCausalLM):\n    config_class = LlavaConfig\n"
        "AutoConfig.register('llava', LlavaConfig)\n"
        "AutoModelForCausalLM.register(LlavaConfig, OldLlava)\n"
    )
    write(model=named + MODEL)
    with pytest.raises(ConfigError, match=r"already used.*diffenc\.hosts\.llava\.modernize"):
        import_part("oldfork", "model.llava_arch")
    done = modernize("oldfork", script=None)
    assert "AutoConfig of 'llava': the fork's" in done.supplied
    assert type(transformers.AutoConfig.for_model("llava")).__module__ == "oldfork.model.llava_arch"
    done.undo()
    assert transformers.AutoConfig.for_model("llava").__class__ is transformers.LlavaConfig
    with pytest.raises(ValueError, match="already used"):
        transformers.AutoConfig.register("llava", transformers.LlavaConfig)


def test_an_old_mpt_does_not_keep_the_other_models_from_being_imported(write, tmp_path) -> None:
    old = "from transformers.models.bloom.modeling_bloom import _expand_mask, _make_causal_mask\n"
    write(model=old + MODEL)
    with pytest.raises(ConfigError, match="_expand_mask"):
        modernize("oldfork", script=None)
    (tmp_path / "oldfork" / "model" / "language_model" / "mpt").mkdir(parents=True)
    done = modernize("oldfork", script=None)
    bloom = importlib.import_module("transformers.models.bloom.modeling_bloom")
    with pytest.raises(ConfigError, match="MPT needs it"):
        bloom._expand_mask(1)
    done.undo()
    assert not hasattr(bloom, "_expand_mask")
