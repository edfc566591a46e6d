import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from diffenc.encoder import DiffusionEncoder
from diffenc.errors import BackboneError, ConfigError
from diffenc.mllm import DiffusionVLM, VisionTokens, tokens_per_image
from diffenc.mllm.training import train, write_miniature
from diffenc.mllm.training.meta import count, meta_encoder, meta_language_model
from diffenc.mllm.training.plan import make_plan
from train_builders import Parts, config
from vlm_builders import save_tiny_lm, save_tiny_vision


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_sd_folder):
    folder = tmp_path_factory.mktemp("plan")
    return Parts(
        vision=save_tiny_vision(folder / "vision"),
        language_model=save_tiny_lm(folder / "lm"),
        data=write_miniature(folder / "data", scenes=10),
        diffusion=tiny_sd_folder,
    )


@pytest.mark.long
def test_a_plan_says_what_the_run_then_has(parts, tmp_path):
    taps = {"taps": ["up_blocks.1"], "conditioning": "concat"}
    run = config(
        parts,
        tmp_path,
        "instruct",
        kind="diffusion",
        options=taps,
        language_model="lora",
        rank=2,
        unet_rank=3,
    )
    plan = make_plan(run, processes=2, tflops=1e-3)
    encoder = DiffusionEncoder.from_pretrained(
        parts.diffusion, truncate=True, taps="up_blocks.1", conditioning="concat"
    )
    assert plan.tokens_per_image == tokens_per_image(encoder)
    sizes = {name: count(part) for name, part in encoder.backbone.parts().items()}
    assert {name: plan.parameters[name] for name in sizes} == sizes
    encoder.add_lora(rank=3)
    vlm = DiffusionVLM(encoder, str(parts.language_model))
    vlm.requires_grad_(False)
    vlm.projector.requires_grad_(True)
    vlm.add_language_lora(rank=2)
    assert plan.trained == {
        "projector": count(vlm.projector),
        "unet LoRA": sum(p.numel() for n, p in encoder.named_parameters() if "lora_" in n),
        "language model LoRA": sum(
            p.numel() for n, p in vlm.language_model.named_parameters() if "lora_" in n
        ),
    }
    assert (plan.steps, plan.accumulation, plan.processes) == (6, 1, 2)
    assert plan.seconds == pytest.approx(sum(plan.flops.values()) * 10 * 2 / (1e9 * 2))
    assert not plan.estimated_text
    longest = max(
        vlm.chat.encode(record["conversations"]).length(plan.tokens_per_image)
        for record in json.loads(parts.data["instruct"].read_text())
    )
    assert plan.longest == longest


def test_training_the_language_model_costs_more_than_aligning(parts, tmp_path):
    align = make_plan(config(parts, tmp_path, cache="off"), processes=1, tflops=1.0)
    instruct = make_plan(config(parts, tmp_path, "instruct"), processes=1, tflops=1.0)
    assert align.trained.keys() == {"projector"}
    assert instruct.trained["language model"] == align.parameters["language model"]
    assert instruct.flops["language model"] > align.flops["language model"]
    assert instruct.memory["AdamW"] > align.memory["AdamW"]
    assert align.disk["model"] == 4 * align.trained["projector"]
    cached = make_plan(config(parts, tmp_path, cache="on"), processes=1, tflops=1.0)
    assert cached.disk["cache"] == 10 * 4 * 8 * 4
    assert cached.flops["vision model"] == align.flops["vision model"] / 2
    vision = VisionTokens.from_pretrained(parts.vision)
    assert align.parameters["vision model"] == count(vision.model)


def test_the_data_and_the_batch_are_checked(parts, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "broken.json"
    path.write_text(json.dumps([{"id": "x", "image": "b.png", "conversations": []}]))
    with pytest.raises(ConfigError, match="missing images"):
        make_plan(config(parts, tmp_path, annotations=str(path)))
    with pytest.raises(ConfigError, match="cannot be shared by 3 processes"):
        make_plan(config(parts, tmp_path), processes=3, tflops=1.0)
    plan = make_plan(config(parts, tmp_path, max_length=64), processes=1)
    assert plan.rate > 0
    assert "multiplication" in plan.rate_source
    assert any("steps" in warning for warning in plan.warnings())


def test_known_models_have_their_published_sizes_without_a_download():
    vicuna = meta_language_model("lmsys/vicuna-7b-v1.5")
    assert vicuna.parameters == 6_738_415_616
    assert (vicuna.width, vicuna.context, vicuna.layers) == (4096, 4096, 32)
    assert vicuna.computing == 6_738_415_616 - 32000 * 4096
    with pytest.raises(BackboneError, match="these are known: lmsys"):
        meta_language_model("/nowhere/at/all")


@pytest.mark.slow
def test_a_real_encoder_is_counted_as_its_table_says():
    from diffenc.mllm.training import ModelConfig

    model = ModelConfig(
        encoder="sdxl",
        kind="fused",
        clip="openai/clip-vit-large-patch14-336",
        how="channel",
        options={"taps": ["up_blocks.2"]},
    )
    found = meta_encoder(model)
    # benchmarks: 1.589 TFLOP for SDXL at 512 px, 1.117 for its VAE, 0.382 for CLIP at 336 px
    assert found.flops["unet"] == pytest.approx(1.589e12, rel=0.01)
    assert found.flops["vae"] == pytest.approx(1.117e12, rel=0.01)
    assert found.flops["vision model"] == pytest.approx(0.382e12, rel=0.02)
    assert found.tokens == 576
    assert found.hidden_size == 1024 + 320


def test_tied_embeddings_compute_too(tmp_path):
    folder = save_tiny_lm(tmp_path)
    found = meta_language_model(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert found.parameters == count(model)
    assert found.computing == count(model) - model.get_input_embeddings().weight.numel()
    assert all(parameter.device == torch.device("cpu") for parameter in model.parameters())


@pytest.fixture(scope="module")
def vicuna(parts):
    """LLaVA-1.5's second stage, of bundled configs, with nothing of its data at hand."""
    model = {"encoder": "openai/clip-vit-large-patch14-336", "layer": -2}
    run = config(parts, "runs/llava", "instruct", **model, precision="bf16", max_length=2048)
    optim = {"batch_size": 128, "device_batch_size": 16, "gradient_checkpointing": True}
    data = replace(run.data, annotations="nowhere.json", images="nowhere")
    named = replace(run.model, language_model="lmsys/vicuna-7b-v1.5")
    return replace(run, optim=replace(run.optim, **optim), data=data, model=named)


@pytest.fixture(scope="module")
def planned(vicuna):
    return make_plan(vicuna, processes=8, tflops=300, samples=665_298)


def test_a_plan_needs_no_data_where_it_is_told_the_number_of_samples(vicuna, planned):
    plan = planned
    assert (plan.data.samples, plan.data.images, plan.steps) == (665_298, 665_298, 2 * 5198)
    assert (plan.text_tokens, plan.longest, plan.assumed) == (250, 2048, True)
    assert plan.settings["batch"] == "128 = 16 at a time x 1 accumulated x 8 processes"
    with pytest.raises(ConfigError, match="cannot read"):
        make_plan(vicuna, processes=8, tflops=300)
    with pytest.raises(ConfigError, match="samples must be 1 or more"):
        make_plan(vicuna, processes=8, samples=0)


def test_a_vicuna_that_trains_takes_sixteen_bytes_a_parameter_and_an_eighth_of_it_split(planned):
    plan = planned
    learnt = 6_738_415_616 + plan.trained["projector"]
    uses = ("trained weights", "gradients", "AdamW")
    assert sum(plan.memories["none"][use] for use in uses) == 16 * learnt
    for kind in ("zero2", "zero3"):
        assert sum(plan.memories[kind][use] for use in uses) == 16 * learnt / 8
    # Of CLIP, frozen in bf16, every process has all.
    frozen = 2 * 303_507_456
    assert {m["frozen weights"] for m in plan.memories.values()} == {frozen}
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    rest = 6_738_415_616 - 32 * layer
    moving = plan.memories["zero2"]["put together"] - plan.memories["zero3"]["put together"]
    assert moving == 2 * (32 - 2) * layer
    outside = rest + plan.trained["projector"]
    together = 2 * 2 * layer + 4 * outside + 4 * (2 * layer + outside)
    assert plan.memories["zero3"]["put together"] == together
    assert plan.memory == plan.memories["none"]


def test_a_plan_says_which_card_holds_what(vicuna, planned):
    plan = planned
    assert list(plan.fits) == [24, 40, 80, 141]
    for card, fits in plan.fits.items():
        whole, zero3 = (fits[kind] or 0 for kind in ("none", "zero3"))
        assert whole <= (fits["zero2"] or 0) <= zero3
        held = plan.memories["zero3"]
        grows = sum(held[use] for use in ("activations", "logits", "encoding"))
        fixed = sum(held.values()) - grows
        if zero3:
            assert fixed + grows * zero3 / 16 <= 0.9e9 * card
        if zero3 < 16:
            assert fixed + grows * max(1, 2 * zero3) / 16 > 0.9e9 * card
    assert (plan.fits[80]["none"], plan.fits[141]["none"]) == (0, 2)
    assert plan.fits[80]["zero3"] == 16
    assert any('take optim.shard = "zero3"' in note for note in plan.warnings())
    split = replace(vicuna, optim=replace(vicuna.optim, shard="zero3"))
    assert not make_plan(split, processes=8, tflops=300, samples=1000).warnings()


def test_a_plan_says_what_is_fetched_and_from_where(planned, parts, tmp_path):
    vision, language = planned.downloads
    assert (vision.repository, language.repository) == (
        "openai/clip-vit-large-patch14-336",
        "lmsys/vicuna-7b-v1.5",
    )
    assert vision.bytes == 4 * 427_944_193  # both halves of CLIP, in float32
    assert language.bytes == 2 * 6_738_415_616
    here = make_plan(config(parts, tmp_path), processes=1, tflops=1.0)
    assert [(each.repository, each.bytes) for each in here.downloads] == [("", 0), ("", 0)]


@pytest.mark.long
def test_what_a_run_holds_is_what_its_plan_says(parts, tmp_path):
    run = config(parts, tmp_path, "instruct", language_model="full", epochs=1, limit=4)
    held, plan = train(run).held, make_plan(run, processes=1, tflops=1.0)
    assert held == {use: plan.memory[use] for use in held}
    lora = config(parts, tmp_path / "b", "instruct", language_model="lora", epochs=1, limit=4)
    lora = replace(lora, optim=replace(lora.optim, precision="bf16"))
    held, plan = train(lora).held, make_plan(lora, processes=1, tflops=1.0)
    assert held == {use: plan.memory[use] for use in held}
