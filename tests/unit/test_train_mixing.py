"""Fusion whose weights train: both stages, checkpoints, plans, and what is refused."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from diffenc.errors import ConfigError
from diffenc.mllm import DiffusionVLM
from diffenc.mllm.training import TrainConfig, train, write_miniature
from diffenc.mllm.training.build import build_vlm
from diffenc.mllm.training.meta import meta_encoder
from diffenc.mllm.training.plan import make_plan
from diffenc.projector import Projector
from train_builders import Parts, config, trains
from vlm_builders import picture, save_tiny_clip, save_tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SHORT = {
    "limit": 4,
    "device_batch_size": 4,
    "epochs": 3,
    "save_steps": 0,
    "learning_rate": 0.05,
}
HEADS = {"cross_attention": {"heads": 2}}
WEIGHTS = ("encoder/mixer/mixer.safetensors", "projector/projector.safetensors")


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_sd_folder):
    folder = tmp_path_factory.mktemp("parts")
    return Parts(
        vision=save_tiny_clip(folder / "clip", layers=3),
        language_model=save_tiny_lm(folder / "lm"),
        data=write_miniature(folder / "data", scenes=8),
        diffusion=tiny_sd_folder,
    )


def mixed(parts, output, how, stage="align", **options):
    named = {
        "kind": "fused",
        "encoder": str(parts.diffusion),
        "clip": str(parts.vision),
        "options": {"taps": ["up_blocks.1"], "size": 32},
        "how": how,
        "mixing": HEADS.get(how, {}),
        "layer": -2,
    }
    return config(parts, output, stage, **{**named, **SHORT, **options})


def moved(before, after):
    state = after.state_dict()
    return {name for name in before if not torch.equal(before[name], state[name].to(before[name]))}


def copied(vlm):
    return {name: value.clone() for name, value in vlm.state_dict().items()}


@pytest.fixture(scope="module")
def first_stage(parts, tmp_path_factory):
    """Gives everything before and after a run with a way of fusing, and the folder of its model."""

    @cache
    def run(how):
        first = mixed(parts, tmp_path_factory.mktemp(how), how, prompts="empty")
        before = copied(build_vlm(first))
        model = train(first).model
        return before, DiffusionVLM.from_pretrained(model), model

    return run


@trains
@pytest.mark.long
@pytest.mark.parametrize("how", ["cross_attention", "token_gated"])
def test_both_stages_train_the_mixer_and_nothing_below_it(first_stage, parts, tmp_path, how):
    before, after, model = first_stage(how)
    trained = moved(before, after)
    assert {name.split(".")[1] for name in trained if name.startswith("encoder.")} == {"mixer"}
    assert all(name.startswith(("encoder.mixer.", "projector.")) for name in trained)
    assert isinstance(after.projector, Projector)

    options = {"start": str(model), "language_model": "lora", "rank": 2}
    second = mixed(parts, tmp_path / "b", how, "instruct", unet_rank=2, **options)
    begun = build_vlm(second)
    assert not moved({k: v for k, v in copied(after).items() if ".mixer." in k}, begun)
    before = copied(begun)
    last = DiffusionVLM.from_pretrained(train(second).model)
    changed = moved({name: v for name, v in before.items() if ".lora_" not in name}, last)
    assert any(name.startswith("encoder.mixer.") for name in changed)
    assert all(name.startswith(("encoder.mixer.", "projector.")) for name in changed)
    lora = {name: v for name, v in before.items() if ".lora_B." in name and "encoder" in name}
    assert moved(lora, last)
    tokens = last.encode_images([picture(0), picture(1)], ["what color?", ""])
    assert tokens.shape == (2, last.tokens_per_image, last.encoder.hidden_size)
    assert last.generate(picture(0), "what color?", max_new_tokens=2)
    last.save_pretrained(tmp_path / "c")
    again = DiffusionVLM.from_pretrained(tmp_path / "c")
    shown = again.encode_images([picture(0), picture(1)], ["what color?", ""])
    assert torch.equal(shown, tokens)


@trains
@pytest.mark.long
def test_a_later_stage_guides_what_the_first_one_read_without_text(first_stage, parts, tmp_path):
    model = first_stage("cross_attention")[2]
    guided = {"taps": ["up_blocks.1"], "size": 32, "conditioning": "cfg", "guidance_scale": 4.0}
    options = {"start": str(model), "options": guided, "language_model": "lora", "rank": 2}
    begun = build_vlm(mixed(parts, tmp_path, "cross_attention", "instruct", **options))
    assert begun.encoder.config.conditioning == "cfg"
    assert begun.encoder.config.guidance_scale == 4.0


@trains
@pytest.mark.long
@pytest.mark.parametrize("how", ["cross_attention", "token_gated"])
def test_a_mixer_that_was_stopped_goes_on_as_if_it_had_not_been(parts, tmp_path, how):
    train(mixed(parts, tmp_path / "a", how, precision="bf16"))
    cut = mixed(parts, tmp_path / "b", how, precision="bf16", save_steps=2)
    train(cut, stop_after=2)
    held = load_file(tmp_path / "b" / "checkpoint-2" / "trained.safetensors")
    assert {name.split(".")[0] for name in held} == {"encoder", "projector"}
    assert all(name.startswith("encoder.mixer.") for name in held if name.startswith("encoder."))
    assert {value.dtype for value in held.values()} == {torch.float32}
    assert train(cut, resume=True).resumed_at == 2
    for file in WEIGHTS:
        left, right = (load_file(tmp_path / run / "model" / file) for run in "ab")
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def plain_plan(parts, tmp_path_factory):
    """Plan of a run whose way of fusing has no weights."""
    return make_plan(mixed(parts, tmp_path_factory.mktemp("plan"), "channel"), tflops=1.0)


@pytest.mark.long
@pytest.mark.parametrize("how", ["cross_attention", "gated", "question_gated"])
def test_a_plan_counts_what_is_built(parts, plain_plan, tmp_path, how):
    run = mixed(parts, tmp_path, how)
    vlm = build_vlm(run)
    planned, described = make_plan(run, tflops=1.0), meta_encoder(run.model)
    assert planned.trained == {
        "mixer": sum(p.numel() for p in vlm.encoder.mixer.parameters()),
        "projector": sum(p.numel() for p in vlm.projector.parameters()),
    }
    assert planned.tokens_per_image == vlm.tokens_per_image
    assert described.groups == vlm.encoder.token_channels
    assert planned.flops["mixer"] == 3 * described.flops["mixer"] > 0
    assert planned.flops["unet"] == plain_plan.flops["unet"]  # nothing goes back through it


@pytest.mark.long
def test_a_plan_counts_the_stream_that_asks_and_all_timesteps(parts, tmp_path):
    options = {"taps": ["up_blocks.1"], "size": 32, "grid": 3}
    asks = {"heads": 2, "asks": "diffusion"}
    run = mixed(parts, tmp_path, "cross_attention", mixing=asks, options=options)
    vlm = build_vlm(run)
    assert make_plan(run, tflops=1.0).tokens_per_image == vlm.tokens_per_image == 9
    assert meta_encoder(run.model).groups == vlm.encoder.token_channels
    one, two = (
        mixed(parts, tmp_path, "cross_attention", options={**options, "timestep": timestep})
        for timestep in (50, [50, 261])
    )
    costs = [meta_encoder(each.model).flops["mixer"] for each in (one, two)]
    assert costs[0] < costs[1] < 2 * costs[0]
    assert build_vlm(two).encode_images([picture(0)], ["a"]).shape[1] == 16


@pytest.mark.long
def test_the_seed_of_a_run_begins_the_mixer_unless_the_table_says_one(parts, tmp_path):
    def weight(**options):
        return build_vlm(mixed(parts, tmp_path, "add", **options)).encoder.mixer.clip_in.weight

    assert torch.equal(weight(seed=3), weight(mixing={"seed": 3}))
    assert not torch.equal(weight(seed=3), weight(seed=4))


@trains
@pytest.mark.long
def test_a_mixer_that_trains_is_never_cached(parts, tmp_path):
    run = mixed(parts, tmp_path, "question_gated", prompts="empty")
    assert train(run).cache_misses == 0
    with pytest.raises(ConfigError, match="a way of fusing with weights"):
        train(replace(run, output=str(tmp_path / "b"), data=replace(run.data, cache="on")))


def test_a_run_is_written_and_read_with_its_mixing(parts, tmp_path):
    run = mixed(parts, tmp_path, "cross_attention", mixing={"heads": 2, "asks": "diffusion"})
    run.write(tmp_path / "run.toml")
    assert "[model.mixing]" in (tmp_path / "run.toml").read_text()
    assert TrainConfig.read(tmp_path / "run.toml").model.mixing == run.model.mixing


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mixing": {"head": 2}}, "unknown key model.mixing.head.*heads"),
        ({"mixing": {"heads": "two"}}, "model.mixing.heads must be a whole number"),
        ({"mixing": {"heads": 3}}, "mixing.heads must divide the 8 channels"),
        (
            {"how": "add", "mixing": {"heads": 2}},
            "mixing.heads is read by how='cross_attention' alone",
        ),
        ({"how": "cross"}, "model.how must be one of"),
        ({"kind": "diffusion", "mixing": {}}, 'model.how = "cross_attention"'),
    ],
)
def test_bad_tables_are_named(parts, tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        build_vlm(mixed(parts, tmp_path, **{"how": "cross_attention", **options}))


@trains
def test_a_later_stage_keeps_the_way_of_the_earlier_one(first_stage, parts, tmp_path):
    _, _, model = first_stage("cross_attention")
    start = str(model)
    for how, mixing, said in [
        ("add", {}, "trained with how = 'cross_attention'"),
        ("cross_attention", {"blocks": 2, "heads": 2}, r"trained with mixing.blocks = 1"),
    ]:
        with pytest.raises(ConfigError, match=said):
            build_vlm(mixed(parts, tmp_path / "b", how, "instruct", start=start, mixing=mixing))
