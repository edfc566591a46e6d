"""Training with a captioner, with fused encoders, with a CLIP that trains and one as baseline."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from diffenc.errors import ConfigError
from diffenc.fusion import FusedEncoder
from diffenc.mllm import DiffusionVLM
from diffenc.mllm.training import train, write_miniature
from diffenc.mllm.training.build import build_vlm
from diffenc.mllm.training.plan import make_plan
from diffenc.projector import FusedProjector
from train_builders import Parts, config
from vlm_builders import picture, save_tiny_clip, save_tiny_lm, save_tiny_vision

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

DIFFUSION = {"options": {"taps": ["up_blocks.1"], "size": 32}}
SHORT = {
    "limit": 4,
    "device_batch_size": 4,
    "epochs": 3,
    "save_steps": 0,
    "learning_rate": 0.05,
}
ADAPTED = {"kind": "diffusion", "prompts": "empty", **DIFFUSION, **SHORT, "unet_rank": 2}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"), layers=3)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_sd_folder):
    folder = tmp_path_factory.mktemp("parts")
    return Parts(
        vision=save_tiny_vision(folder / "vision"),
        language_model=save_tiny_lm(folder / "lm"),
        data=write_miniature(folder / "data", scenes=8),
        diffusion=tiny_sd_folder,
    )


def captioned(parts, output, clip_folder, *stage, **options):
    named = {"kind": "diffusion", "captioner": str(clip_folder), "prompts": "empty"}
    return config(parts, output, *stage, **{**named, **DIFFUSION, **SHORT, **options})


def fused(parts, output, clip_folder, how, stage="align", **options):
    named = {"kind": "fused", "encoder": str(parts.diffusion), "clip": str(clip_folder)}
    grid = {**DIFFUSION["options"], "grid": 4}
    return config(
        parts,
        output,
        stage,
        **{**named, "options": grid, "how": how, "layer": -2, **SHORT, **options},
    )


def states(run):
    """Everything before training, and what was saved after it."""
    before = {name: value.clone() for name, value in build_vlm(run).state_dict().items()}
    result = train(run)
    after = DiffusionVLM.from_pretrained(result.model, trainable=True)
    return before, after


def moved(before, after):
    """Names of what changed; while training, the U-Net ends behind the last tap."""
    state = after.state_dict()
    assert before.keys() <= state.keys()
    return {name for name in before if not torch.equal(before[name], state[name].to(before[name]))}


@pytest.fixture(scope="module")
def captioner_run(parts, clip_folder, tmp_path_factory):
    """Folder of a run that several tests read, and everything before and after it."""
    folder = tmp_path_factory.mktemp("captioner")
    return folder, *states(captioned(parts, folder, clip_folder))


@pytest.fixture(scope="module")
def adapted_model(parts, tmp_path_factory):
    """Model whose U-Net has a LoRA of an earlier stage."""
    return train(config(parts, tmp_path_factory.mktemp("adapted"), "instruct", **ADAPTED)).model


@pytest.mark.long
def test_a_captioner_trains_with_the_projector_and_nothing_else_does(captioner_run):
    folder, before, after = captioner_run
    changed = moved(before, after)
    prefixes = ("projector.", "encoder.captioner.")
    assert changed == {name for name in before if name.startswith(prefixes)}
    assert before["encoder.captioner.gate"].eq(0).all()
    vlm = DiffusionVLM.from_pretrained(folder / "model")
    pictures = [picture(0), picture(1)]
    assert vlm.generate(pictures, ["what?", "what?"], "", max_new_tokens=2)
    with torch.no_grad():
        with_captioner = vlm.encode_images(pictures, ["", ""])
        vlm.encoder.captioner.gate.zero_()
        vlm.encoder.clear_cache()
        without = vlm.encode_images(pictures, ["", ""])
    assert not torch.allclose(with_captioner, without, atol=1e-6)


@pytest.mark.long
def test_a_captioner_that_was_stopped_goes_on_as_if_it_had_not_been(
    parts, clip_folder, captioner_run, tmp_path
):
    whole, *_ = captioner_run
    cut = captioned(parts, tmp_path, clip_folder, save_steps=2)
    train(cut, stop_after=2)
    held = load_file(tmp_path / "checkpoint-2" / "trained.safetensors")
    assert {name.split(".")[0] for name in held} == {"encoder", "projector"}
    assert all(".captioner." in name for name in held if name.startswith("encoder."))
    assert train(cut, resume=True).resumed_at == 2
    for file in ("encoder/captioner/captioner.safetensors", "projector/projector.safetensors"):
        left, right = (load_file(folder / "model" / file) for folder in (whole, tmp_path))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.long
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_later_stage_keeps_the_captioner_and_trains_it_where_it_is_named(
    parts, clip_folder, captioner_run, tmp_path, goes_on
):
    folder, _, first = captioner_run
    begun = first.encoder.captioner.state_dict()
    options = {
        "start": str(folder / "model"),
        "language_model": "lora",
        "rank": 2,
        "unet_rank": 2,
    }
    if not goes_on:
        options["captioner"] = ""
    run = captioned(parts, tmp_path, clip_folder, "instruct", **options)
    after = DiffusionVLM.from_pretrained(train(run).model).encoder
    same = [torch.equal(begun[key], value) for key, value in after.captioner.state_dict().items()]
    assert all(same) is not goes_on
    assert any(value.any() for name, value in after.named_parameters() if ".lora_B." in name)


@pytest.fixture(scope="module")
def begun(parts, clip_folder, tmp_path_factory):
    """Models of a first stage by kind, as they are before training."""
    folder = tmp_path_factory.mktemp("begun")
    shown = {"diffusion": ADAPTED, "vision": SHORT}
    runs = {
        kind: config(parts, folder, "instruct", **options, language_model="lora", rank=2)
        for kind, options in shown.items()
    }
    runs["fused"] = fused(parts, folder, clip_folder, "channel", captioner=str(clip_folder))
    for kind, run in runs.items():
        build_vlm(run).save_pretrained(folder / kind)
    return folder, runs


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("diffusion", {"encoder": "shapes"}, "trained with encoder = .*, and model.encoder is 'sh"),
        ("diffusion", {"projector_norm": False}, "trained with projector_norm = True"),
        ("diffusion", {"captioner": "shapes-clip"}, None),
        ("vision", {"encoder": "shapes-clip"}, "trained with encoder = "),
        ("vision", {"layer": -3}, "trained with layer = -1, and model.layer is -3"),
        ("fused", {"clip": "shapes-clip"}, "trained with clip = .* model.clip is 'shapes-clip'"),
        ("fused", {"layer": -1}, "trained with layer = -2, and model.layer is -1"),
        ("fused", {"captioner": "shapes-clip"}, "trained with captioner = "),
        ("fused", {}, None),
    ],
    ids=str,
)
def test_a_later_stage_that_names_another_part_is_refused(begun, kind, changes, message):
    folder, runs = begun
    run = runs[kind]
    model = replace(run.model, start=str(folder / kind), **changes)
    adapt = replace(run.adapting, unet_rank=0) if kind != "fused" else run.adapting
    if message is None:
        assert build_vlm(replace(run, model=model, adapt=adapt))
        return
    with pytest.raises(ConfigError, match=message):
        build_vlm(replace(run, model=model, adapt=adapt))


def test_tokens_of_words_that_an_earlier_stage_brings_want_words(parts, tmp_path):
    words = {
        "options": {**DIFFUSION["options"], "tokens": "grid+words", "word_count": 2, "grid": 2}
    }
    options = {"kind": "diffusion", "prompts": "question", **SHORT}
    build_vlm(config(parts, tmp_path, **options, **words)).save_pretrained(tmp_path / "model")
    later = config(parts, tmp_path, start=str(tmp_path / "model"), **options)
    assert build_vlm(later).encoder.config.tokens == "grid+words"
    later = config(
        parts, tmp_path, start=str(tmp_path / "model"), **{**options, "prompts": "empty"}
    )
    with pytest.raises(ConfigError, match=r"tokens = 'grid\+words' .* \"empty\" has none"):
        build_vlm(later)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet_rank": 4}, "encoder has a LoRA already, with rank 2, .* adapt.unet_rank is 4"),
        ({"unet_alpha": 4.0}, "encoder has a LoRA already, with alpha 2"),
        ({"rank": 4}, "language model has a LoRA already, with rank 2, .* adapt.rank is 4"),
        ({"dropout": 0.5}, "language model has a LoRA already, with dropout 0.05"),
        ({}, None),
    ],
    ids=str,
)
def test_another_adapter_than_there_is_is_refused(begun, changes, message):
    folder, runs = begun
    run = runs["diffusion"]
    model = replace(run.model, start=str(folder / "diffusion"))
    changed = replace(run, model=model, adapt=replace(run.adapting, **changes))
    if message is None:
        assert any(".lora_" in name for name, _ in build_vlm(changed).named_trainable_parameters())
        return
    with pytest.raises(ConfigError, match=message):
        build_vlm(changed)


@pytest.mark.long
@pytest.mark.parametrize("rank", [2, 0])
def test_a_later_stage_trains_the_lora_of_an_earlier_one_where_it_is_asked_to(
    parts, adapted_model, tmp_path, rank
):
    options = ADAPTED | {"start": str(adapted_model), "unet_rank": rank}
    before, after = states(config(parts, tmp_path, "instruct", **options))
    adapted = {name for name in before if ".lora_" in name and name.startswith("encoder.")}
    assert adapted
    assert moved(before, after) & adapted == (adapted if rank else set())


@pytest.mark.long
def test_what_trains_is_in_float32_whatever_the_precision(parts, adapted_model, tmp_path):
    for start in ("", str(adapted_model)):
        half = {**ADAPTED, "start": start, "precision": "bf16"}
        vlm = build_vlm(config(parts, tmp_path, "instruct", **half))
        trained = dict(vlm.named_trainable_parameters())
        assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
        frozen = {p.dtype for name, p in vlm.named_parameters() if name not in trained}
        assert torch.bfloat16 in frozen


@pytest.mark.long
@pytest.mark.parametrize("how", ["channel", "tokens", "interleave"])
def test_of_a_fused_encoder_the_projector_alone_trains(parts, clip_folder, tmp_path, how):
    before, after = states(fused(parts, tmp_path, clip_folder, how))
    assert moved(before, after) == {name for name in before if name.startswith("projector.")}
    assert isinstance(after.projector, FusedProjector) is (how != "channel")
    assert after.encoder.how == how
    count = {"channel": 16, "tokens": 32, "interleave": 32}[how]
    assert after.tokens_per_image == count
    tokens = after.encode_images([picture(0)], ["what color?"])
    assert tokens.shape == (1, count, after.encoder.hidden_size)
    assert after.generate(picture(0), "what color?", max_new_tokens=2)
    reference = json.loads((tmp_path / "model" / "encoder" / "fusion.json").read_text())
    assert reference["clip"] == str(clip_folder)
    assert not (tmp_path / "model" / "encoder" / "clip").exists()


@pytest.mark.long
def test_cached_tokens_of_a_fused_encoder_train_the_same_model(parts, clip_folder, tmp_path):
    results = [
        train(fused(parts, tmp_path / mode, clip_folder, "tokens", prompts="empty", cache=mode))
        for mode in ("off", "on")
    ]
    assert results[1].cache_hits == 2 * results[1].cache_misses > 0
    files = [result.model / "projector" / "projector.safetensors" for result in results]
    left, right = map(load_file, files)
    for key, value in left.items():
        torch.testing.assert_close(value, right[key], rtol=1e-2, atol=1e-4)


@pytest.mark.long
def test_a_fused_encoder_takes_captioner_and_lora_as_the_diffusion_encoder_does(
    parts, clip_folder, tmp_path
):
    run = fused(parts, tmp_path, clip_folder, "channel", stage="instruct")
    run = replace(
        run,
        model=replace(run.model, captioner=str(clip_folder)),
        adapt=replace(run.adapting, language_model="none", unet_rank=2),
    )
    before, after = states(run)
    parts_moved = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in moved(before, after)
                   if ".lora_" in name}  # fmt: skip
    assert parts_moved == {"to_q", "to_k", "to_v", "0"}
    others = {name for name in moved(before, after) if ".lora_" not in name}
    assert {name.rpartition("captioner.")[0] for name in others} == {"", "encoder.diffusion."}


@pytest.mark.long
def test_a_clip_that_is_not_frozen_trains_up_to_its_layer_and_is_saved(
    parts, clip_folder, tmp_path
):
    run = fused(parts, tmp_path / "a", clip_folder, "channel", freeze_clip=False)
    before, after = states(run)
    changed = moved(before, after)
    of_clip = {name for name in before if name.startswith("encoder.clip.")}
    behind = {name for name in of_clip if ".layers.2." in name or "post_layernorm" in name}
    assert behind
    assert changed & behind == set()
    # A key's bias changes no attention: its gradient is zero but for rounding.
    still = {name for name in of_clip - behind - changed if not name.endswith("k_proj.bias")}
    assert not {name for name in still if "position_ids" not in name}
    assert not any(name.startswith("encoder.diffusion.") for name in changed)
    state = {name: value.clone() for name, value in after.state_dict().items()}

    kept = fused(parts, tmp_path / "b", clip_folder, "channel", start=str(tmp_path / "a/model"))
    second = train(kept)
    shutil.rmtree(tmp_path / "a")
    later = DiffusionVLM.from_pretrained(second.model)
    assert later.encoder.clip.frozen
    for name in of_clip:
        assert torch.equal(later.state_dict()[name], state[name])


@pytest.mark.long
def test_a_trained_clip_goes_on_from_a_checkpoint(parts, clip_folder, tmp_path):
    options = {"freeze_clip": False, "precision": "bf16", "device_batch_size": 2}
    train(fused(parts, tmp_path / "a", clip_folder, "interleave", **options))
    cut = fused(parts, tmp_path / "b", clip_folder, "interleave", save_steps=2, **options)
    train(cut, stop_after=2)
    assert train(cut, resume=True).resumed_at == 2
    left, right = (FusedEncoder.from_pretrained(tmp_path / run / "model/encoder") for run in "ab")
    for name, value in left.clip.state_dict().items():
        assert torch.equal(value, right.clip.state_dict()[name]), name
        assert value.dtype == torch.float32


@pytest.mark.long
def test_a_clip_that_trains_is_planned_for_and_never_cached(parts, clip_folder, tmp_path):
    run = fused(parts, tmp_path, clip_folder, "channel", freeze_clip=False)
    clip = build_vlm(run).encoder.clip
    trained = sum(p.numel() for p in clip.parameters() if p.requires_grad)
    frozen = replace(run, model=replace(run.model, freeze_clip=True))
    planned, plain = make_plan(run, tflops=1.0), make_plan(frozen, tflops=1.0)
    assert planned.trained["vision model"] == trained
    assert "vision model" not in plain.trained
    assert planned.parameters == plain.parameters
    with pytest.raises(ConfigError, match="freeze_clip = false"):
        train(replace(run, data=replace(run.data, cache="on")))
    with pytest.raises(ConfigError, match="freeze_clip"):
        captioned(parts, tmp_path, clip_folder, freeze_clip=False)


@pytest.mark.long
def test_a_clip_as_baseline_trains_the_projector_and_is_found_by_its_folder(
    parts, clip_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(clip_folder.parent)
    run = config(parts, tmp_path, encoder=clip_folder.name, layer=-2, prompts="empty", **SHORT)
    before, after = states(run)
    assert moved(before, after) == {name for name in before if name.startswith("projector.")}
    monkeypatch.chdir(tmp_path)
    later = DiffusionVLM.from_pretrained(tmp_path / "model")
    assert later.tokens_per_image == 16
    tokens = later.encode_images([picture(0)], ["a"])
    assert torch.equal(tokens, later.encode_images([picture(0)], ["quite another"]))
    assert later.generate(picture(0), "what?", max_new_tokens=2)
    start = {"start": str(tmp_path / "model"), "layer": -2, "language_model": "lora"}
    second = config(parts, tmp_path / "b", "instruct", encoder=str(clip_folder), pad=True, **start)
    assert build_vlm(second).encoder.pad is True
