"""Training that is split over processes: what it gives, saves, and holds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffenc.mllm.training import read_log, train, write_miniature
from train_builders import Parts, config
from two_processes import Job, train_on_two
from vlm_builders import save_tiny_clip, save_tiny_lm, save_tiny_vision

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SIX_SAMPLES = {"limit": 6, "batch_size": 6, "epochs": 3, "prompts": "question"}
CLIPPED = {"learning_rate": 0.01, "max_grad_norm": 0.1, "warmup": 0.0}


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
def everything(parts, tmp_path_factory):
    """Both stages of a model in which all that can train does: on one process, and on two."""
    folder = tmp_path_factory.mktemp("everything")
    clip = save_tiny_clip(folder / "clip", layers=3)
    fused = {
        **{"kind": "fused", "encoder": str(parts.diffusion), "clip": str(clip), "how": "weighted"},
        **{"layer": -2, "captioner": str(clip), "options": {"taps": ["up_blocks.1"], "size": 32}},
        **{"freeze_clip": False, **SIX_SAMPLES, **CLIPPED},
    }
    runs = {}
    for name, shard, share in (("one", "none", 3), ("zero3", "zero3", 1), ("zero2", "zero2", 3)):
        align = config(parts, folder / name / "align", **fused, shard=shard, device_batch_size=3)
        instruct = config(
            parts,
            folder / name / "instruct",
            "instruct",
            **fused,
            start=str(folder / "one" / "align" / "model"),
            language_model="full",
            unet_rank=2,
            gradient_checkpointing=name == "zero3",
            shard=shard,
            device_batch_size=share,
        )
        runs[name] = [align, instruct]
    return runs


def written(configs, folder):
    """Files of configs."""
    paths = [folder / f"{index}.toml" for index in range(len(configs))]
    for each, path in zip(configs, paths, strict=True):
        each.write(path)
    return [str(path) for path in paths]


def saved(output):
    """All weights of a saved model, by file and name."""
    files = sorted((Path(output) / "model").rglob("*.safetensors"))
    return {(f.name, f.parent.name, k): v for f in files for k, v in load_file(f).items()}


def losses(output):
    return [line["loss"] for line in read_log(output)]


def norms(output):
    return [line["grad_norm"] for line in read_log(output)]


def assert_equal_runs(left, right):
    assert losses(left) == pytest.approx(losses(right), rel=1e-4)
    assert norms(left) == pytest.approx(norms(right), rel=1e-3)
    first, second = saved(left), saved(right)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_split_over_two_processes_everything_trains_as_on_one(everything, tmp_path):
    align, instruct = everything["one"]
    whole = [train(align), train(instruct)]
    split = [*everything["zero3"], everything["zero2"][1]]
    outcomes = train_on_two([Job(path) for path in written(split, tmp_path)], tmp_path)
    assert_equal_runs(split[0].output, align.output)
    for each in split[1:]:
        assert_equal_runs(each.output, instruct.output)
        assert files_of(each.output) == files_of(instruct.output)
    assert max(norms(instruct.output)) > CLIPPED["max_grad_norm"]
    for done in outcomes:
        for result, alone in zip(done, [*whole, whole[1]], strict=True):
            assert result["steps"] == alone.steps
    for result, alone in zip(zip(*outcomes, strict=True), [*whole, whole[1]], strict=True):
        for use in ("trained weights", "AdamW"):
            shares = [each["held"][use] for each in result]
            assert sum(shares) == alone.held[use]
            assert max(shares) < 0.55 * alone.held[use]


def files_of(output):
    folder = Path(output) / "model"
    return {str(f.relative_to(folder)) for f in folder.rglob("*")}
