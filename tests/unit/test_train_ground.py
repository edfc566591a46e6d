"""Runs that ground an encoder, alone and beside the second stage."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from diffenc import DiffusionEncoder
from diffenc.cli.main import app
from diffenc.errors import BackboneError, ConfigError, ImageError
from diffenc.mllm.training import (
    AdaptConfig,
    DataConfig,
    GroundConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    read_log,
    train,
    write_miniature,
)
from diffenc.mllm.training.build import build_grounded
from diffenc.mllm.training.grounded import GroundedConversations
from diffenc.mllm.training.plan import make_plan
from train_builders import Parts, trains
from train_builders import config as stage_config
from vlm_builders import picture, save_tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_sd_folder):
    folder = tmp_path_factory.mktemp("ground")
    return Parts(
        vision=tiny_sd_folder,
        language_model=save_tiny_lm(folder / "lm"),
        data=write_miniature(folder / "data", scenes=5),
        diffusion=tiny_sd_folder,
    )


def phrases(parts, **options):
    data = parts.data
    places = {"annotations": str(data["phrases"]), "images": str(data["images"])}
    return GroundConfig(**{**places, **options})


def config(parts, output, *, ground=None, optim=None, data=None, **options):
    """A run of five steps."""
    optim = {"batch_size": 4, "device_batch_size": 2, "epochs": 2, **(optim or {})}
    return TrainConfig(
        **{
            "stage": "ground",
            "output": str(output),
            "model": ModelConfig(encoder=str(parts.diffusion)),
            "data": data or DataConfig(),
            "ground": ground or phrases(parts),
            "adapt": AdaptConfig(unet_rank=2),
            "optim": OptimConfig(
                learning_rate=1e-2, precision="fp32", gradient_checkpointing=False, **optim
            ),
            "save_steps": 2,
            "log_steps": 1,
            **options,
        }
    )


def lora(output):
    return load_file(output / "model" / "lora" / "default" / "adapter_model.safetensors")


def close(left, right):
    """Equal but for rounding, which AdamW divides by gradients that are nearly zero."""
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-3, atol=1e-5)


@trains
@pytest.mark.long
def test_a_run_writes_a_lora_that_the_encoder_loads(parts, tmp_path):
    result = train(config(parts, tmp_path / "run"))
    assert (result.steps, result.data.samples) == (6, 10)
    lines = read_log(tmp_path / "run")
    assert len(lines) == 6
    for line in lines:
        assert line["loss"] == pytest.approx(line["outside"] + line["denoising"], rel=1e-3)
        assert 0 < line["outside"] < 1
    trained = DiffusionEncoder.from_pretrained(result.model)
    assert trained.lora_names == ("default",)
    assert not any(p.requires_grad for p in trained.parameters())
    plain = DiffusionEncoder.from_pretrained(parts.diffusion)
    before = plain(picture(0), "a red circle")
    plain.load_lora(result.model / "lora" / "default")
    after = plain(picture(0), "a red circle")
    assert (before - after).abs().max() > 1e-4
    torch.testing.assert_close(trained(picture(0), "a red circle"), after)
    moved = [value.abs().sum() > 0 for key, value in lora(tmp_path / "run").items() if "_B" in key]
    assert all(moved)


@trains
@pytest.mark.long
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(parts, tmp_path):
    train(config(parts, tmp_path / "a"))
    cut = config(parts, tmp_path / "b")
    train(cut, stop_after=3)
    other = replace(cut, ground=phrases(parts, weight=0.5))
    with pytest.raises(ConfigError, match=r"ground\.weight was 1\.0 and is 0\.5"):
        train(other, resume=True)
    result = train(cut, resume=True)
    assert (result.steps, result.resumed_at) == (6, 2)
    left, right = lora(tmp_path / "a"), lora(tmp_path / "b")
    assert all(torch.equal(left[key], right[key]) for key in left)
    with pytest.raises(ConfigError, match="nothing to resume"):
        train(cut, resume=True)
    with pytest.raises(ConfigError, match="holds a run already"):
        train(cut)


@trains
@pytest.mark.long
def test_accumulated_batches_equal_one_batch(parts, tmp_path):
    for name, size in (("a", 4), ("b", 1)):
        optim = {"device_batch_size": size, "epochs": 1}
        train(config(parts, tmp_path / name, optim=optim, save_steps=0))
    left, right = (read_log(tmp_path / name) for name in "ab")
    assert len(left) == len(right)
    for one, four in zip(left, right, strict=True):
        for name in ("loss", "outside", "denoising", "grad_norm"):
            assert four[name] == pytest.approx(one[name], rel=2e-3), name
    least = 0.02 * 1e-2  # of a step at this rate, where a gradient is hardly above rounding
    left, right = lora(tmp_path / "a"), lora(tmp_path / "b")
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-3, atol=least)


@trains
@pytest.mark.long
def test_other_phrases_and_other_weights_are_not_gone_on_with(parts, tmp_path):
    begun = config(parts, tmp_path / "run")
    train(begun, stop_after=2)
    lines = parts.data["phrases"].read_text().splitlines()
    record = json.loads(lines[0])
    record["phrases"] = record["phrases"][:-1] or [{"span": [0, 3], "boxes": [[0, 0, 9, 9]]}]
    changed = tmp_path / "p.jsonl"
    changed.write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n")
    other = replace(begun, ground=phrases(parts, annotations=str(changed)))
    with pytest.raises(ConfigError, match="content of the samples was"):
        train(other, resume=True)
    record = json.loads(lines[0])
    left, *edges = record["phrases"][0]["boxes"][0]
    record["phrases"][0]["boxes"][0] = [left + 1, *edges]
    changed.write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n")
    with pytest.raises(ConfigError, match="content of the samples was"):
        train(other, resume=True)


@trains
@pytest.mark.long
def test_without_denoising_the_model_ends_after_what_is_read(parts, tmp_path):
    short = config(
        parts,
        tmp_path / "run",
        ground=phrases(parts, denoising=False, layers=("up_blocks.1",)),
        model=ModelConfig(encoder=str(parts.diffusion), options={"taps": ["up_blocks.1"]}),
        save_steps=0,
    )
    train(short)
    line = read_log(tmp_path / "run")[0]
    assert "denoising" not in line
    assert line["loss"] == pytest.approx(line["outside"], rel=1e-3)
    encoder = DiffusionEncoder.from_pretrained(tmp_path / "run" / "model")
    assert [tap.name for tap in encoder.feature_info] == ["up_blocks.1"]


@trains
@pytest.mark.long
def test_what_is_read_decides_the_gradient(parts, tmp_path):
    """Under checkpointing, which is on by default, and with timesteps, weight and masks given."""
    optim = {"epochs": 1, "batch_size": 2}
    ground = phrases(parts, timesteps=(10, 20), weight=3.0, masks=False, layers=("up_blocks.2",))
    results = []
    for name, checkpointing in (("a", False), ("b", True)):
        run = config(parts, tmp_path / name, ground=ground, optim=optim, save_steps=0)
        train(replace(run, optim=replace(run.optim, gradient_checkpointing=checkpointing)))
        results.append(read_log(tmp_path / name))
    close(lora(tmp_path / "a"), lora(tmp_path / "b"))
    first = results[0][0]
    assert first["loss"] == pytest.approx(3 * first["outside"] + first["denoising"], rel=1e-3)


@trains
@pytest.mark.long
def test_half_precision_trains_weights_of_full_precision(parts, tmp_path):
    run = config(parts, tmp_path / "run", optim={"epochs": 1, "batch_size": 10}, save_steps=0)
    train(replace(run, optim=replace(run.optim, precision="bf16")))
    (line,) = read_log(tmp_path / "run")
    assert 0 < line["outside"] < 1
    assert all(value.dtype == torch.float32 for value in lora(tmp_path / "run").values())


@trains
@pytest.mark.long
def test_a_lora_goes_on_training_in_the_second_stage(parts, tmp_path):
    train(config(parts, tmp_path / "run", optim={"epochs": 1}, save_steps=0))
    second = stage_config(
        replace(parts, diffusion=tmp_path / "run" / "model"),
        tmp_path / "vlm",
        "instruct",
        kind="diffusion",
        layer=-2,
        epochs=1,
        save_steps=0,
        adapt=AdaptConfig(language_model="none", unet_rank=2),
    )
    result = train(second)
    (saved,) = result.model.rglob("adapter_model.safetensors")
    before, after = lora(tmp_path / "run"), load_file(saved)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def beside(parts, output, **options):
    values = {
        "kind": "diffusion",
        "layer": -2,
        "epochs": 1,
        "save_steps": 2,
        "ground": phrases(parts),
        "adapt": AdaptConfig(language_model="none", unet_rank=2),
        **options,
    }
    return stage_config(parts, output, "instruct", **values)


def test_a_lora_that_is_there_is_grounded_by_its_own_rank(parts, tmp_path):
    encoder = DiffusionEncoder.from_pretrained(parts.diffusion)
    encoder.add_lora(rank=4)
    encoder.save_pretrained(tmp_path / "begun")
    options = {"model": ModelConfig(encoder=str(tmp_path / "begun"))}
    model = build_grounded(config(parts, tmp_path, **options, adapt=None))  # of rank 16 by default
    ranks = {min(p.shape) for name, p in model.named_trainable_parameters() if ".lora_A" in name}
    assert ranks == {4}
    with pytest.raises(ConfigError, match=r"with rank 4, .* adapt\.unet_rank is 2"):
        build_grounded(config(parts, tmp_path, **options))


@trains
@pytest.mark.long
def test_phrases_are_learnt_beside_the_second_stage(parts, tmp_path):
    result = train(beside(parts, tmp_path / "a"))
    lines = read_log(tmp_path / "a")
    assert len(lines) == result.steps == 2
    assert all(0 < line["outside"] < 1 and "denoising" not in line for line in lines)
    alone = beside(parts, tmp_path / "b", ground=None)
    train(alone)
    for ours, plain in zip(lines[:1], read_log(tmp_path / "b")[:1], strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"] + ours["outside"], rel=1e-3)
    (first,) = (tmp_path / "a").rglob("model/**/adapter_model.safetensors")
    (second,) = (tmp_path / "b").rglob("model/**/adapter_model.safetensors")
    left, right = load_file(first), load_file(second)
    assert any(not torch.equal(left[key], right[key]) for key in left)


@trains
@pytest.mark.long
def test_phrases_beside_that_are_left_out_are_told(parts, tmp_path):
    lines = parts.data["phrases"].read_text().splitlines()
    gone = json.dumps({**json.loads(lines[0]), "image": "gone.png"})
    broken = tmp_path / "p.jsonl"
    broken.write_text("\n".join([gone, *lines[1:3]]) + "\n")
    ground = phrases(parts, annotations=str(broken))
    path = tmp_path / "run.toml"
    beside(parts, tmp_path / "out", ground=ground, skip_broken=True, limit=4).write(path)
    done = CliRunner().invoke(app, ["train", str(path), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "left out: 1 with missing images (gone.png)" in done.stdout


@trains
@pytest.mark.long
def test_phrases_beside_go_on_where_a_run_was_stopped(parts, tmp_path):
    train(beside(parts, tmp_path / "a", epochs=2))
    cut = beside(parts, tmp_path / "b", epochs=2)
    train(cut, stop_after=3)
    train(cut, resume=True)
    logs = [
        [(line["step"], line["loss"]) for line in read_log(tmp_path / name)] for name in ("a", "b")
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 4


def test_a_plan_says_that_phrases_are_not_counted(parts, tmp_path):
    plan = make_plan(beside(parts, tmp_path / "run"), tflops=1.0)
    assert "1 x their loss" in plan.settings["phrases"]
    assert "phrases" not in make_plan(beside(parts, tmp_path, ground=None), tflops=1.0).settings


def test_each_conversation_brings_another_phrase():
    class Rows(list):
        def __getitem__(self, place):
            return {"row": place}

    rows = GroundedConversations(Rows([0] * 3), Rows([0] * 5))
    beside = [rows[epoch, index]["grounded"]["row"] for epoch in range(4) for index in range(3)]
    assert beside[:7] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1)]
    assert len(set(beside)) == 12


@trains
@pytest.mark.long
def test_broken_pictures_are_told_and_left_out_on_request(parts, tmp_path):
    lines = parts.data["phrases"].read_text().splitlines()
    gone = json.dumps({**json.loads(lines[0]), "image": "gone.png"})
    broken = tmp_path / "p.jsonl"
    broken.write_text("\n".join([gone, *lines[1:5]]) + "\n")
    ground = phrases(parts, annotations=str(broken))
    with pytest.raises(ConfigError, match=r"1 of 5 samples cannot be used: 1 with missing images"):
        train(config(parts, tmp_path / "a", ground=ground))
    run = config(
        parts,
        tmp_path / "a",
        ground=ground,
        data=DataConfig(skip_broken=True),
        optim={"epochs": 1},
        save_steps=0,
    )
    result = train(run)
    assert (result.data.samples, result.data.broken, result.steps) == (4, 1, 1)


@trains
@pytest.mark.long
def test_a_picture_that_breaks_later_is_told_or_left_aside(parts, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in parts.data["images"].iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "000000.png").write_bytes(b"x")
    ground = phrases(parts, images=str(images))
    data = DataConfig(check_images=False)
    with pytest.raises(ImageError, match=r"000000\.png.*--resume"):
        train(config(parts, tmp_path / "a", ground=ground, data=data))
    data = replace(data, skip_broken=True)
    result = train(config(parts, tmp_path / "b", ground=ground, data=data, save_steps=0))
    assert len(result.skipped) == 2


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, r"needs \[ground\] with annotations and images"),
        ({"ground": {"annotations": "a"}}, "a key is missing: ground.images"),
        ({"ground": {"weight": 0}}, "ground.weight must be above 0"),
        ({"ground": {"timesteps": [5, 5]}}, "two steps of"),
        ({"ground": {"timesteps": [5]}}, "timesteps must be a list of 2"),
        ({"ground": {"layers": []}}, "one cross-attention or more"),
        ({"ground": {"limit": 0}}, "limit must be 1 or more"),
        ({"ground": {"weights": 1}}, "Did you mean 'weight'"),
        ({"ground": {}, "data": {"annotations": "a", "images": "b"}}, r"named in \[ground\]"),
        ({"ground": {}, "data": {"limit": 4}}, r"data\.limit is for conversations"),
        ({"ground": {}, "adapt": {"unet_rank": 0}}, "set adapt.unet_rank"),
        ({"ground": {}, "adapt": {"language_model": "lora"}}, "one diffusion model alone"),
        ({"ground": {}, "model": {"captioner": "x"}}, "model.captioner"),
        ({"ground": {}, "model": {"kind": "fused", "clip": "x"}}, "one diffusion model alone"),
        ({"ground": {}, "model": {"start": "x"}}, "one diffusion model alone"),
        ({"ground": {}, "model": {"kind": "vision"}}, "model.kind is vision"),
        ({"ground": {}, "optim": {"shard": "zero3"}}, "is for language models"),
    ],
)
def test_configs_that_ground_nothing_are_refused(tables, message):
    values = {"stage": "ground", "output": "run", **tables}
    if "ground" in tables and "annotations" not in tables["ground"]:
        values["ground"] = {"annotations": "a", "images": "b", **tables["ground"]}
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize(
    ("stage", "tables", "message"),
    [
        ("align", {}, "set adapt.unet_rank"),
        ("instruct", {}, "set adapt.unet_rank"),
        ("instruct", {"adapt": {"unet_rank": 4}, "denoising": True}, "ground.denoising is for"),
        ("instruct", {"adapt": {"unet_rank": 4}, "optim": {"shard": "zero2"}}, "not implemented"),
    ],
)
def test_what_cannot_be_learnt_beside_is_refused(stage, tables, message):
    ground = {"annotations": "a", "images": "b"}
    if "denoising" in tables:
        ground["denoising"] = tables.pop("denoising")
    data = {"annotations": "a", "images": "b"}
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(
            {"stage": stage, "output": "run", "data": data, "ground": ground, **tables}
        )


def test_a_config_is_written_and_read_again(tmp_path):
    ground = GroundConfig(
        annotations="a", images="b", layers=("up_blocks.1",), timesteps=(3, 9), denoising=False
    )
    config = TrainConfig(stage="ground", output="run", ground=ground)
    assert config.adapting.unet_rank == 16
    assert (config.optimizing.learning_rate, config.optimizing.batch_size) == (1e-4, 32)
    config.write(tmp_path / "a.toml")
    assert TrainConfig.read(tmp_path / "a.toml") == config
    lasting = config.lasting().ground
    assert lasting is not None
    assert lasting.annotations.endswith("/a")
    assert lasting.annotations.startswith("/")


@trains
def test_joint_families_are_refused_before_anything_is_written(parts, tmp_path):
    import dit_builders

    dit_builders.sd3_pipeline().save_pretrained(tmp_path / "sd3")
    run = config(parts, tmp_path / "run", model=ModelConfig(encoder=str(tmp_path / "sd3")))
    with pytest.raises(ConfigError, match="joins picture and text in one attention"):
        train(run)
    assert not list((tmp_path / "run").glob("*.toml"))
    gone = config(parts, tmp_path / "run", model=ModelConfig(encoder=str(tmp_path / "gone")))
    with pytest.raises(BackboneError):
        train(gone)


@trains
def test_the_command_line_trains_resumes_and_refuses_a_plan(parts, tmp_path):
    path = tmp_path / "run.toml"
    config(parts, tmp_path / "out").write(path)

    def run(*arguments):
        return CliRunner().invoke(app, ["train", str(path), *arguments])

    planned = run("--plan")
    assert planned.exit_code == 2
    assert 'stage = "ground" has none' in planned.output
    done = run("--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "6 steps, mean loss" in done.stdout
    assert str(tmp_path / "out" / "model") in done.stdout.replace("\n", "")
    assert "nothing to resume" in run("--resume").output
