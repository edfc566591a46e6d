from pathlib import Path

import pytest

from diffenc.errors import ConfigError
from diffenc.mllm.training import AdaptConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig
from diffenc.mllm.training.config import to_toml
from diffenc.storage.reading import tomllib

DATA = {"annotations": "a.json", "images": "images"}
EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "train").glob("*.toml"))


def minimal(stage="align", **tables):
    return TrainConfig.from_dict({"stage": stage, "output": "run", "data": DATA, **tables})


def test_defaults_are_llavas_own():
    align, instruct = minimal().optimizing, minimal("instruct").optimizing
    assert (align.learning_rate, align.batch_size, align.device_batch_size) == (1e-3, 256, 32)
    assert (instruct.learning_rate, instruct.batch_size) == (2e-5, 128)
    for optim in (align, instruct):
        assert (optim.epochs, optim.warmup, optim.weight_decay) == (1, 0.03, 0)
        assert (optim.schedule, optim.precision) == ("cosine", "bf16")
        assert optim.gradient_checkpointing
    assert minimal().adapting.language_model == "none"
    assert minimal("instruct").adapting.language_model == "full"
    assert minimal("instruct", adapt={"unet_rank": 4}).adapting.language_model == "full"
    assert minimal().model.template == "plain"
    assert minimal("instruct").model.template == "auto"


def test_a_table_changes_what_it_names_and_nothing_else():
    optim = minimal(optim={"epochs": 3, "learning_rate": 1}).optimizing
    assert (optim.epochs, optim.learning_rate, optim.batch_size) == (3, 1.0, 256)
    assert isinstance(optim.learning_rate, float)


@pytest.mark.parametrize("policy", ["empty", "empty | dropout(0.5)"])
@pytest.mark.parametrize("kind", ["words", "grid+words"])
def test_tokens_of_words_without_words_are_refused(kind, policy):
    model = {"options": {"tokens": kind}}
    with pytest.raises(ConfigError, match="gathered by the words of a prompt"):
        minimal(model=model, data={**DATA, "prompts": policy})
    assert minimal(model=model, data={**DATA, "prompts": "caption | dropout(0.3)"})


def test_a_guidance_scale_that_nothing_reads_is_refused():
    for options in ({"guidance_scale": 4.0}, {"guidance_scale": 4.0, "conditioning": "cond"}):
        with pytest.raises(ConfigError, match='conditioning = "cfg" alone'):
            minimal(model={"options": options})
    assert minimal(model={"options": {"guidance_scale": 4.0, "conditioning": "cfg"}})


def test_written_and_read_again_it_is_the_same(tmp_path):
    config = TrainConfig(
        stage="instruct",
        output='a "quoted"\\ path\nwith ümläut \x7f',
        data=DataConfig(annotations="x", images="y", limit=7, cache="on", cache_gb=0.5),
        model=ModelConfig(options={"timestep": 50, "guidance_scale": 1.5, "taps": ["a", "b"]}),
        optim=OptimConfig(learning_rate=1e-7, batch_size=8, device_batch_size=4, precision="fp32"),
        adapt=AdaptConfig(language_model="lora", unet_rank=2, unet_alpha=4.0),
        seed=3,
    )
    config.write(tmp_path / "a.toml")
    assert TrainConfig.read(tmp_path / "a.toml") == config
    nested = {"a": True, "b": {"c": [1, 2.5, "x"], "d": {"e": False}}}
    assert tomllib.loads(to_toml(nested)) == nested


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_can_be_read(path):
    config = TrainConfig.read(path)
    assert config.data.annotations or (config.ground is not None and config.ground.annotations)
    assert len(EXAMPLES) == 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage": "algin"}, "stage must be one of.*align"),
        ({"optim": {"lr": 1e-3}}, "unknown key optim.lr"),
        ({"optim": {"epoch": 1}}, "Did you mean 'epochs'"),
        ({"outptu": "x"}, "unknown key outptu.*Did you mean 'output'"),
        ({"optim": 3}, "must be a table"),
        ({"optim": {"epochs": "two"}}, "optim.epochs must be a whole number"),
        ({"optim": {"epochs": True}}, "optim.epochs must be a whole number"),
        ({"optim": {"epochs": 0}}, "1 or more"),
        ({"optim": {"learning_rate": -1.0}}, "above 0"),
        ({"optim": {"batch_size": 10, "device_batch_size": 4}}, "no multiple"),
        pytest.param(
            {"optim": {"precision": "int8"}}, "optim.precision", marks=pytest.mark.wrong_type
        ),
        ({"data": {"images": "x"}}, "a key is missing.*annotations"),
        ({"data": {**DATA, "prompts": "capshun"}}, "capshun"),
        ({"model": {"options": {"timestep": 5000}}}, "timestep"),
        ({"model": {"options": {"timstep": 5}}}, "timstep"),
        ({"model": {"kind": "fused"}}, "needs model.clip"),
        ({"model": {"kind": "vision", "captioner": "x"}}, "no captioner"),
        ({"model": {"pad": True}}, 'model.pad is for model.kind = "vision"'),
        ({"adapt": {"unet_rank": 4}}, "align"),
        ({"model": {"template": "v7"}}, "model.template"),
        ({"model": {"clip": "x"}}, "model.clip = 'x' is for model.kind = \"fused\", and"),
        ({"model": {"kind": "vision", "how": "tokens"}}, "model.how = 'tokens' is for"),
        ({"model": {"layer": -1}}, 'is for model.kind = "fused" or "vision"'),
        ({"adapt": {"rank": 8}}, 'adapt.rank = 8 .* set adapt.language_model = "lora"'),
        ({"adapt": {"unet_alpha": 8.0}}, "adapt.unet_alpha = 8.0 .* set adapt.unet_rank"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict({"stage": "align", "output": "run", "data": DATA, **values})


def test_a_batch_is_shared_evenly_or_refused(tmp_path):
    optim = OptimConfig(learning_rate=1, batch_size=24, device_batch_size=4)
    assert [optim.accumulation(n) for n in (1, 2, 3)] == [6, 3, 2]
    with pytest.raises(ConfigError, match="multiple of 16"):
        optim.accumulation(4)
    with pytest.raises(ConfigError, match="cannot read"):
        TrainConfig.read(tmp_path / "none.toml")
