"""Training that is split over processes: what it gives, saves, holds, and refuses."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from diffenc.cli.main import app
from diffenc.errors import ConfigError
from diffenc.mllm import DiffusionVLM
from diffenc.mllm.training import OptimConfig, read_log, train, write_miniature
from diffenc.mllm.training.plan import make_plan
from diffenc.mllm.training.sharding import check_launch, gathered, layers_of, part_like
from train_builders import Parts, config
from two_processes import Job, launch, train_on_two
from vlm_builders import picture, save_tiny_clip, save_tiny_lm, save_tiny_vision, tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

ROOT = Path(__file__).parents[2]
SIX_SAMPLES = {"limit": 6, "batch_size": 6, "epochs": 3, "prompts": "question"}
CLIPPED = {"learning_rate": 0.01, "max_grad_norm": 0.01, "warmup": 0.0}
LORA = {**SIX_SAMPLES, **CLIPPED, "language_model": "lora", "rank": 2, "dropout": 0.0}


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_sd_folder):
    folder = tmp_path_factory.mktemp("parts")
    return Parts(
        vision=save_tiny_vision(folder / "vision"),
        language_model=save_tiny_lm(folder / "lm"),
        data=write_miniature(folder / "data", scenes=10),
        diffusion=tiny_sd_folder,
    )


@pytest.fixture(scope="module")
def runs(parts, tmp_path_factory):
    """Runs on one process and the same ones on two: their configs, and what they gave.

    A fused encoder, so that a projector, a mixer, a captioner, a CLIP, a LoRA on the U-Net and the
    whole language model train at once; and a LoRA on a language model in bfloat16.
    """
    folder = tmp_path_factory.mktemp("runs")
    clip = save_tiny_clip(folder / "clip", layers=3)
    fused = {
        **{"kind": "fused", "encoder": str(parts.diffusion), "clip": str(clip), "how": "weighted"},
        **{"layer": -2, "captioner": str(clip), "options": {"taps": ["up_blocks.1"], "size": 32}},
        **{"freeze_clip": False, **SIX_SAMPLES, **CLIPPED},
    }
    full = {**fused, "language_model": "full", "unet_rank": 2}

    def made(name, stage, options, **own):
        return config(parts, folder / name, stage, **{**options, **own})

    align = made("align", "align", fused, device_batch_size=3)
    done = {"align": (align, train(align))}
    full |= {"start": str(folder / "align" / "model"), "device_batch_size": 3}
    instruct = made("instruct", "instruct", full)
    done["instruct"] = instruct, train(instruct)
    bf16 = made("bf16", "instruct", LORA, precision="bf16", device_batch_size=3)
    done["bf16"] = bf16, train(bf16)
    stopped = made("stopped", "instruct", full)
    train(stopped, stop_after=2)

    again = {"gradient_checkpointing": True, "device_batch_size": 1}
    jobs = {
        "align zero3": (made("align3", "align", fused, shard="zero3", device_batch_size=1), {}),
        "instruct zero3": (made("full3", "instruct", {**full, **again}, shard="zero3"), {}),
        "killed": (made("full2", "instruct", full, shard="zero2"), {"stop_after": 2}),
        "gone on": (made("full2", "instruct", full, shard="zero3"), {"resume": True}),
        "begun on one": (replace_shard(stopped, "zero3"), {"resume": True}),
        "bf16 zero3": (
            made("bf16-3", "instruct", LORA, **again, precision="bf16", shard="zero3"),
            {},
        ),
    }
    outcomes = train_on_two(written(jobs, folder), folder)
    for index, name in enumerate(jobs):
        done[name] = jobs[name][0], [of_process[index] for of_process in outcomes]
    return done


def replace_shard(run, shard):
    return replace(run, optim=replace(run.optim, shard=shard))


def written(jobs, folder):
    """Jobs, whose configs are written to files."""
    made = []
    for name, (each, options) in jobs.items():
        each.write(folder / f"{name}.toml")
        made.append(Job(str(folder / f"{name}.toml"), **options))
    return made


def saved(output):
    """All weights of a saved model, by file and name."""
    files = sorted((Path(output) / "model").rglob("*.safetensors"))
    return {(f.parent.name, f.name, k): v for f in files for k, v in load_file(f).items()}


def layout(output):
    folder = Path(output) / "model"
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def column(output, name):
    return [line[name] for line in read_log(output)]


PAIRS = [
    ("align zero3", "align"),
    ("instruct zero3", "instruct"),
    ("gone on", "instruct"),
    ("begun on one", "instruct"),
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("split", "whole"), PAIRS, ids=[split for split, _ in PAIRS])
def test_split_over_two_processes_a_run_equals_one_on_one_process(runs, split, whole):
    left, right = runs[split][0].output, runs[whole][0].output
    assert column(left, "loss") == pytest.approx(column(right, "loss"), rel=1e-4)
    assert column(left, "grad_norm") == pytest.approx(column(right, "grad_norm"), rel=1e-3)
    assert max(column(right, "grad_norm")) > CLIPPED["max_grad_norm"]
    first, second = saved(left), saved(right)
    assert first.keys() == second.keys()
    assert layout(left) == layout(right)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_was_trained_split_answers_like_what_was_trained_whole(runs):
    questions = ["what color is the circle?", "what shape is it?", "which is larger?"]
    left, right = (
        DiffusionVLM.from_pretrained(Path(runs[name][0].output) / "model").generate(
            [picture(seed) for seed in range(3)], questions, max_new_tokens=8
        )
        for name in ("instruct zero3", "instruct")
    )
    assert left == right


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_half_precision_and_a_lora_are_split_too(runs):
    left, right = (runs[name][0].output for name in ("bf16 zero3", "bf16"))
    assert column(left, "loss") == pytest.approx(column(right, "loss"), rel=2e-2)
    assert layout(left) == layout(right)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("split", "whole"), [PAIRS[1], ("bf16 zero3", "bf16")], ids=str)
def test_each_process_holds_its_share_as_the_plan_says(runs, split, whole):
    run, outcomes = runs[split]
    alone = runs[whole][1].held
    plan = make_plan(run, processes=2, tflops=1.0, samples=6)
    for use in ("trained weights", "AdamW"):
        shares = [each["held"][use] for each in outcomes]
        assert sum(shares) == alone[use] == plan.memories["none"][use]
        assert plan.memories["zero3"][use] == alone[use] / 2
        assert max(shares) < 0.55 * alone[use]  # an odd row goes to the first process
    frozen = [each["held"]["frozen weights"] for each in outcomes]
    assert sum(frozen) == 2 * plan.memories["zero3"]["frozen weights"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_guide_run(tmp_path, monkeypatch):
    page = (ROOT / "docs/guides/large-language-models.md").read_text("utf-8")
    block = re.search(r"```console\n(diffenc shapes-data.*?)```", page, re.DOTALL)
    commands = [shlex.split(line) for line in block[1].splitlines()]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples" / "train", tmp_path / "examples" / "train")
    for program, *arguments in commands:
        if program == "torchrun":
            assert arguments[:4] == ["--nproc-per-node", "2", "-m", "diffenc.cli.main"]
            assert "wrote runs/split-" in launch(*arguments[3:])
        else:
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
    assert len(commands) == 5


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_would_split_the_model_itself_is_refused(
    variable, parts, tmp_path, monkeypatch
):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=r'start with torchrun.*set optim.shard = "zero3"'):
        train(config(parts, tmp_path))
    assert not list(tmp_path.iterdir())


def test_splitting_needs_a_precision_and_a_torch_that_can(monkeypatch):
    options = {"learning_rate": 1e-3, "batch_size": 2, "device_batch_size": 1}
    with pytest.raises(ConfigError, match=r"optim.shard = \"zero2\" takes optim.precision"):
        OptimConfig(**options, precision="fp16", shard="zero2")
    with pytest.raises(ConfigError, match=r"optim.shard must be"):
        OptimConfig(**options, shard="zero1")
    split = OptimConfig(**options, shard="zero3")
    check_launch(split, 2)
    monkeypatch.setattr("diffenc.mllm.training.sharding.version", lambda _: "2.6.1+cpu")
    check_launch(split, 1)
    with pytest.raises(ConfigError, match=r"needs torch 2.7 or newer, and this is 2.6.1"):
        check_launch(split, 2)


def test_one_process_has_nothing_to_split(parts, tmp_path):
    once, split = (
        config(parts, tmp_path / name, limit=4, shard=name) for name in ("none", "zero3")
    )
    assert train(once).held == train(split).held
    assert saved(once.output).keys() == saved(split.output).keys()
    assert all(torch.equal(v, saved(split.output)[k]) for k, v in saved(once.output).items())


def test_the_layers_of_a_language_model_are_its_largest_list():
    model = tiny_lm()
    assert layers_of(model) == list(model.model.layers)
    assert layers_of(nn.Linear(2, 2)) == []
    experts = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2)] * 2) for _ in range(2))
    assert layers_of(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]), experts)) == list(experts)


def test_a_state_is_gathered_on_the_cpu_or_left_out():
    state = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    kept = gathered(state, keep=True)
    assert torch.equal(kept["state"][0]["exp_avg"], torch.ones(2))
    assert kept["param_groups"] == state["param_groups"]
    assert gathered(state, keep=False)["state"][0]["exp_avg"].numel() == 0
    assert part_like(torch.ones(2), torch.zeros(2)) is not None
