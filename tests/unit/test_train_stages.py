import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffenc.errors import BackboneError, ConfigError, OutputError
from diffenc.mllm import DiffusionVLM
from diffenc.mllm.training import read_log, train, write_miniature
from diffenc.storage.writing import locked
from train_builders import Parts, config
from vlm_builders import picture, save_tiny_lm, save_tiny_vision

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_sd_folder):
    folder = tmp_path_factory.mktemp("parts")
    return Parts(
        vision=save_tiny_vision(folder / "vision"),
        language_model=save_tiny_lm(folder / "lm"),
        data=write_miniature(folder / "data", scenes=10),
        diffusion=tiny_sd_folder,
    )


def weights(output):
    return load_file(output / "model" / "projector" / "projector.safetensors")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def close(left, right):
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(parts, tmp_path):
    whole = train(config(parts, tmp_path / "a"))
    assert (whole.steps, whole.resumed_at) == (6, 0)
    cut = config(parts, tmp_path / "b")
    train(cut, stop_after=5)
    # Killed while it wrote its newest checkpoint.
    (tmp_path / "b" / "checkpoint-5").mkdir()
    (tmp_path / "b" / "checkpoint-5" / "trainer_state.json").write_text('{"global_st')
    result = train(cut, resume=True)
    assert (result.steps, result.resumed_at) == (6, 4)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    logs = [
        [(line["step"], line["loss"], line["learning_rate"]) for line in read_log(tmp_path / each)]
        for each in "ab"
    ]
    assert logs[0] == logs[1]
    assert [step for step, *_ in logs[0]] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ConfigError, match="nothing to resume"):
        train(cut, resume=True)
    with pytest.raises(ConfigError, match="holds a run already"):
        train(cut)


def test_a_checkpoint_of_another_configuration_is_refused(parts, tmp_path):
    begun = config(parts, tmp_path)
    train(begun, stop_after=2)
    other = config(parts, tmp_path, learning_rate=1e-3, prompts="empty", limit=8)
    with pytest.raises(ConfigError, match=r"learning_rate was 0.01 and is 0.001.*samples was 10"):
        train(other, resume=True)
    assert (tmp_path / "checkpoint-2").is_dir()


@pytest.mark.long
def test_accumulated_batches_equal_one_batch(parts, tmp_path):
    for name, size in (("a", 4), ("b", 1)):
        train(config(parts, tmp_path / name, device_batch_size=size, save_steps=0))
    close(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not list((tmp_path / "a").glob("checkpoint-*"))


@pytest.mark.long
def test_cached_tokens_train_the_same_model_and_are_found_again(parts, tmp_path):
    plain = config(parts, tmp_path / "a", cache="off")
    assert train(plain).cache_misses == 0
    cached = config(parts, tmp_path / "b", cache="on", cache_dir=str(tmp_path / "cache"))
    result = train(cached)
    assert (result.cache_misses, result.cache_hits) == (10, 10)
    close(weights(tmp_path / "a"), weights(tmp_path / "b"))
    again = train(replace(cached, output=str(tmp_path / "c")))
    assert (again.cache_misses, again.cache_hits) == (0, 20)
    close(weights(tmp_path / "b"), weights(tmp_path / "c"))


@pytest.mark.long
def test_what_is_learnt_is_the_answer(parts, tmp_path):
    records = json.loads(parts.data["align"].read_text())
    for record in records:
        record["conversations"][1]["value"] = "a"
    path = tmp_path / "same.json"
    path.write_text(json.dumps(records))
    changed = {"annotations": str(path), "epochs": 6, "learning_rate": 0.03, "save_steps": 0}
    data = {"instruct": path, "images": parts.data["images"]}
    run = config(replace(parts, data=data), tmp_path / "run", "instruct", **changed)
    result = train(run)
    losses = [line["loss"] for line in read_log(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]
    trained = DiffusionVLM.from_pretrained(result.model)
    assert trained.generate(picture(0), "describe the picture.", max_new_tokens=1) == ["a"]
    told = json.loads((result.model / "vlm.json").read_text())
    assert told["language_model"] is None  # it was trained, so it lies in the folder
    aligned = train(config(parts, tmp_path / "align", save_steps=0, limit=4))
    told = json.loads((aligned.model / "vlm.json").read_text())
    assert told["language_model"] == str(parts.language_model)


def test_text_and_pictures_may_be_mixed(parts, tmp_path):
    records = json.loads(parts.data["align"].read_text())
    for record in records[::2]:
        del record["image"]
        record["conversations"][0]["value"] = "hello"
    records[1]["image"] = [records[1]["image"]] * 2
    records[1]["conversations"][0]["value"] = "<image> and <image>"
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(records))
    result = train(config(parts, tmp_path / "run", annotations=str(path), precision="bf16"))
    assert (result.data.text_only, result.data.images) == (5, 6)
    assert result.steps == 6


@pytest.mark.long
def test_both_stages_train_what_they_name_in_a_diffusion_model(parts, tmp_path):
    options = {"kind": "diffusion", "options": {"taps": ["up_blocks.1"], "conditioning": "cfg"}}
    align = config(parts, tmp_path / "a", prompts="caption | dropout(0.3)", limit=4, **options)
    first = train(align)
    begun = DiffusionVLM.from_pretrained(first.model)
    assert begun.encoder.config.conditioning == "cfg"
    instruct = config(
        parts,
        tmp_path / "b",
        "instruct",
        start=str(first.model),
        language_model="lora",
        rank=2,
        alpha=4.0,
        unet_rank=2,
        limit=4,
        gradient_checkpointing=True,
        **options,
    )
    second = train(instruct)
    trained = DiffusionVLM.from_pretrained(second.model)
    state = dict(trained.named_parameters())
    added = {name for name in state if "lora_" in name}
    assert {name.split(".")[0] for name in added} == {"encoder", "language_model"}
    moved = [name for name in added if "lora_B" in name and state[name].any()]
    assert len(moved) == len([name for name in added if "lora_B" in name])
    assert not same(begun.projector.state_dict(), trained.projector.state_dict())
    plain = {name.replace(".base_layer.", "."): value for name, value in state.items()}
    for name, value in begun.encoder.backbone.unet.named_parameters():
        assert torch.equal(plain[f"encoder.backbone.unet.{name}"], value)
    assert trained.generate(picture(0), "hi", max_new_tokens=3)
    with pytest.raises(ConfigError, match=r"kind 'diffusion'.*'vision'"):
        train(config(parts, tmp_path / "c", "instruct", start=str(first.model)))


@pytest.mark.long
def test_what_cannot_work_is_refused_before_training(parts, tmp_path):
    with pytest.raises(ConfigError, match="a sample may have 4"):
        train(config(parts, tmp_path / "a", max_length=4))
    with pytest.raises(BackboneError, match="no trained model"):
        train(config(parts, tmp_path / "b", "instruct", start=str(tmp_path / "none")))
    cached = config(
        parts,
        tmp_path / "c",
        "instruct",
        kind="diffusion",
        cache="on",
        unet_rank=2,
        options={"taps": ["up_blocks.1"]},
    )
    with pytest.raises(ConfigError, match="frozen encoder"):
        train(cached)
    assert not list(tmp_path.glob("*/checkpoint-*"))


@pytest.mark.slow
def test_two_processes_equal_one(parts, tmp_path):
    run = config(parts, tmp_path / "two", device_batch_size=2, limit=8)
    run.write(tmp_path / "two.toml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "diffenc.cli.main", "train"]
    done = subprocess.run(
        [*command, str(tmp_path / "two.toml"), "--device", "cpu"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=Path.cwd(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = train(replace(run, output=str(tmp_path / "one")))
    assert one.steps == 4
    close(weights(tmp_path / "one"), weights(tmp_path / "two"))
    logs = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("one", "two")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_only_the_same_run_is_gone_on_with(parts, tmp_path):
    records = json.loads(parts.data["align"].read_text())
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    data = {"align": path, "images": parts.data["images"]}
    begun = config(replace(parts, data=data), tmp_path / "run")
    train(begun, stop_after=2)
    records[3]["conversations"][1]["value"] = "another answer"
    path.write_text(json.dumps(records))
    with pytest.raises(ConfigError, match="content of the samples was"):
        train(begun, resume=True)
    with (
        locked(tmp_path / "run", purpose="training in it"),
        pytest.raises(OutputError, match="in use: another program is training in it"),
    ):
        train(begun, resume=True)
    (tmp_path / "new").mkdir()
    with (
        locked(tmp_path / "new", purpose="training in it"),
        pytest.raises(OutputError, match="in use"),
    ):
        train(config(parts, tmp_path / "new"))
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


def test_a_run_goes_on_with_the_same_frozen_weights_alone(parts, tmp_path):
    folder = save_tiny_lm(tmp_path / "lm")
    begun = config(replace(parts, language_model=folder), tmp_path / "run")
    train(begun, stop_after=2)
    path = folder / "model.safetensors"
    state = load_file(path)
    name = next(name for name in sorted(state) if state[name].numel() > 200)
    save_file({**state, name: state[name] + 0.01}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="trained with another language model"):
        train(begun, resume=True)


@pytest.mark.long
def test_a_broken_checkpoint_is_told(parts, tmp_path):
    begun = config(parts, tmp_path)
    train(begun, stop_after=2)
    folder = tmp_path / "checkpoint-2"
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(b"broken")
        with pytest.raises(BackboneError, match=r"cannot go on from .*checkpoint-2"):
            train(begun, resume=True)
        (folder / file).write_bytes(whole)
    state = load_file(folder / "trained.safetensors")
    nothing = {name: value * float("nan") for name, value in state.items()}
    save_file(nothing, folder / "trained.safetensors")
    with pytest.raises(BackboneError, match="NaN or infinity"):
        train(begun, resume=True)
