"""Every call that takes a model, with a model of each family of transformers."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import dit_builders
from diffenc import CrossAttnScorer, DiffusionEncoder, FusedEncoder
from diffenc.cli.main import app
from diffenc.errors import BackboneError, ConfigError, ShapeError, TapError
from diffenc.hosts.prompts import PromptTokenizer
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.mllm import DiffusionVLM
from diffenc.mllm.training import train, write_miniature
from diffenc.mllm.training.meta import count
from diffenc.mllm.training.plan import make_plan
from diffenc.passes.forward import check_whole
from plain_dit import agree, picture
from train_builders import Parts, config, trains
from vlm_builders import save_tiny_clip, save_tiny_lm

TEXT = "a red circle"
SCORE = ("--preset", "denoising-gap", "--timesteps", "500")
FAMILIES = ("pixart", "sana", "sd3", "flux")
LAST = {
    "pixart": "transformer_blocks.3",
    "sana": "transformer_blocks.2",
    "sd3": "transformer_blocks.2",
    "flux": "single_transformer_blocks.2",
}
JOINT = ("sd3", "flux")
SIZE = (48, 80)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    for family in FAMILIES:
        kind = {"guidance": False} if family == "flux" else {}  # dev has no half without a text
        dit_builders.PIPELINES[family](**kind).save_pretrained(folder / family)
    save_tiny_lm(folder / "lm")
    save_tiny_clip(folder / "clip")
    picture(*SIZE).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def data(models):
    return write_miniature(models / "data", scenes=4)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def encoder(models, family):
    return DiffusionEncoder.from_pretrained(models / family, size=SIZE)


INNER = {  # a block, and a place within a later one
    "pixart": ("transformer_blocks.1", "transformer_blocks.2.attn2.to_q"),
    "sana": ("transformer_blocks.0", "transformer_blocks.1.ff"),
    "sd3": ("transformer_blocks.0", "transformer_blocks.1.attn"),
    "flux": ("transformer_blocks.1", "single_transformer_blocks.1.norm"),
}


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_clip_and_a_transformer_are_fused(models, encoder):
    fused = FusedEncoder(str(models / "clip"), encoder, "channel")
    with torch.no_grad():
        one, other = (fused([picture(*SIZE)], text) for text in (TEXT, "blue"))
    assert one.shape == (1, 16, 40)
    assert torch.equal(one[..., :8], other[..., :8])  # CLIP's
    assert not torch.equal(one[..., 8:], other[..., 8:])


def test_a_language_model_answers_and_comes_back_from_its_folder(models, encoder, tmp_path):
    vlm = DiffusionVLM(encoder, str(models / "lm"))
    vlm.save_pretrained(tmp_path)
    back = DiffusionVLM.from_pretrained(tmp_path)
    answers = [each.generate(picture(*SIZE), TEXT, max_new_tokens=4) for each in (vlm, back)]
    assert answers[0] == answers[1]


def test_a_plan_counts_the_parts_that_are_there(models, family, data, tmp_path):
    parts = Parts(models / "clip", models / "lm", data, models / family)
    options = {"kind": "diffusion", "language_model": "lora", "rank": 2, "unet_rank": 2}
    run_config = config(parts, tmp_path, "instruct", **options)
    plan = make_plan(run_config, processes=1, tflops=1.0)
    short = DiffusionEncoder.from_pretrained(models / family, truncate=True)
    sizes = {name: count(part) for name, part in short.backbone.parts().items()}
    assert {name: plan.parameters[name] for name in sizes} == sizes
    assert plan.flops.keys() >= sizes.keys()
    short.add_lora(rank=2)
    trained = sum(p.numel() for p in short.parameters() if p.requires_grad)
    assert plan.trained["transformer LoRA"] == trained
    assert "LoRA of rank 2 on the transformer" in plan.settings["trains"]


@trains
@pytest.mark.long
def test_a_run_trains_an_adapter_beside_the_language_model(models, data, tmp_path):
    parts = Parts(models / "clip", models / "lm", data, models / "pixart")
    options = {"kind": "diffusion", "language_model": "lora", "rank": 2, "unet_rank": 2}
    assert train(config(parts, tmp_path, "instruct", **options)).steps == 2
    back = DiffusionVLM.from_pretrained(tmp_path / "model")
    loras = [each for name, each in back.encoder.named_parameters() if ".lora_B." in name]
    assert len(loras) == 12
    assert all(each.abs().max() > 0 for each in loras)


def test_what_a_text_costs_is_counted_for_all_tokens_that_are_read(models, family, data, tmp_path):
    parts = Parts(models / "clip", models / "lm", data, models / family)
    plan = make_plan(config(parts, tmp_path, kind="diffusion"), processes=1, tflops=1.0)
    encoder = DiffusionEncoder.from_pretrained(models / family)
    lengths = {"pixart": [300], "sana": [300], "sd3": [77, 77, 256], "flux": [77, 256]}[family]
    texts = [part for part in encoder.backbone.parts() if part.startswith("text")]
    for name, length in zip(texts, lengths, strict=True):
        part = getattr(encoder.backbone, name)
        words = part.get_input_embeddings().weight.numel()
        assert plan.flops[name] == 2 * (count(part) - words) * length


def test_a_captioner_and_reuse_are_refused_by_encoder_and_plan(models, family, data, tmp_path):
    parts = Parts(models / "clip", models / "lm", data, models / family)
    captioned = config(parts, tmp_path, kind="diffusion", captioner=str(models / "clip"))
    with pytest.raises(ConfigError, match="or use a model with a U-Net"):
        make_plan(captioned, processes=1, tflops=1.0)
    with pytest.raises(ConfigError, match="a captioner adds to"):
        DiffusionEncoder.from_pretrained(models / family).add_captioner("shapes-clip")
    with pytest.raises(ConfigError, match="reuse='down' needs a U-Net of diffusers"):
        DiffusionEncoder.from_pretrained(models / family, reuse="down")


@pytest.mark.long
def test_the_commands_describe_encode_score_and_draw(models, family, tmp_path):
    folder, image = models / family, models / "picture.png"
    facts = json.loads(run("info", folder, "--json").output)
    assert facts["family"] == family
    assert next(part["name"] for part in facts["components"]) == "transformer"
    out = tmp_path / "features.safetensors"
    commands = [
        ("encode", image, "--prompt", TEXT, "-o", out),
        ("look", image, "-q", TEXT, "-o", tmp_path / "look.png"),
        ("score", image, "--text", TEXT, "--text", "blue", *SCORE),
    ]
    evaluated = ("evaluate", "winoground", "--data", "shapes", "--limit", 1, "-o", tmp_path / "run")
    for command in (*commands, (*evaluated, *SCORE)):
        result = run(*command, "--model", folder)
        assert result.exit_code == 0, result.output
    assert out.exists()


def test_words_are_drawn(models, family, tmp_path):
    result = run(
        *("maps", models / "picture.png", "--text", TEXT, "--model", models / family),
        *("-o", tmp_path / "maps.png", "--timesteps", "500"),
    )
    assert result.exit_code == 0, result.output
    assert "circle" in result.output
    if family in JOINT:
        call = (models / "picture.png", "--model", models / family)
        for command in (
            ("score", "--text", TEXT),
            ("look", "-q", TEXT, "--words", "-o", tmp_path / "look.png"),
            ("encode", "-p", TEXT, "--word-tokens", 2, "-o", tmp_path / "words.safetensors"),
        ):
            refused = run(*command, *call)
            assert refused.exit_code == 2
            assert "joins picture and text in one attention" in refused.output


def test_tokens_of_words_need_cross_attention(encoder, family):
    words = DiffusionEncoder(
        encoder.backbone, encoder.config.from_dict({"size": SIZE, "tokens": "words"})
    )
    if family in JOINT:
        with pytest.raises(TapError, match="joins picture and text in one attention"):
            words(picture(*SIZE), TEXT)
    else:
        assert words(picture(*SIZE), TEXT).shape == (1, 8, 64)


def test_a_tower_gives_the_encoders_tokens(models, family):
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    tower = DiffusionVisionTower(f"diffenc:{models / family}?size=64")
    encoder = DiffusionEncoder.from_pretrained(models / family, size=64)
    with torch.no_grad():
        assert agree(tower(pixels), encoder(pixels))
    if family in JOINT:
        with pytest.raises(ConfigError, match="split texts in different ways"):
            tower(pixels, prompts=PromptTokenizer(str(models / family))(TEXT))
    else:
        tokens = PromptTokenizer(str(models / family))(TEXT)
        with torch.no_grad():
            assert agree(tower(pixels, prompts=tokens), encoder(pixels, TEXT))


@pytest.mark.parametrize("family", [each for each in FAMILIES if each not in JOINT])
def test_a_prompt_of_one_token_is_read(models, family):
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    tower = DiffusionVisionTower(f"diffenc:{models / family}?size=64")
    encoder = DiffusionEncoder.from_pretrained(models / family, size=64)
    with torch.no_grad():
        for prompts in (["a"], ["a", ""], ["", "x"]):
            rows = pixels.expand(len(prompts), -1, -1, -1)
            assert agree(tower(rows, prompts), encoder(rows, prompts))
        assert not agree(tower(pixels, ["a"]), encoder(pixels), 1e-3)


def test_another_transformer_takes_the_place_of_the_models_own(models, family):
    if family == "pixart":
        other = dit_builders.PIPELINES[family](num_layers=3).transformer
    else:
        kind = {"guidance": False} if family == "flux" else {}
        other = dit_builders.PIPELINES[family](**kind).transformer
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    replaced = DiffusionEncoder.from_pretrained(models / family, size=SIZE, transformer=other)
    own = DiffusionEncoder.from_pretrained(models / family, size=SIZE)
    maps = replaced.extract(picture(*SIZE), TEXT)[0]
    assert replaced.backbone.transformer is other
    assert not agree(maps, own.extract(picture(*SIZE), TEXT)[0], 1e-3)
    same = DiffusionEncoder.from_pretrained(
        models / family, size=SIZE, transformer=str(models / family), truncate=True
    )
    assert agree(same.extract(picture(*SIZE), TEXT)[0], own.extract(picture(*SIZE), TEXT)[0], 1e-6)
    with pytest.raises(BackboneError, match="unet= replaces a U-Net, and this model has a transf"):
        DiffusionEncoder.from_pretrained(models / family, unet=other)
    with pytest.raises(BackboneError, match="transformer= replaces a transformer, and this model"):
        DiffusionEncoder.from_pretrained("shapes", transformer=other)


@pytest.mark.long
@pytest.mark.parametrize("truncate", [False, True], ids=["whole", "truncated"])
def test_a_compiled_transformer_gives_the_same_features(models, family, truncate):
    torch._dynamo.reset()
    taps = INNER[family]
    plain, own = (
        DiffusionEncoder.from_pretrained(models / family, taps=taps, truncate=truncate)
        for _ in range(2)
    )
    # Of a break in the graph this would fail.
    own.compile(backend="eager", fullgraph=True, dynamic=False)
    for size in (SIZE,) if truncate else (SIZE, (64, 32)):
        compiled, expected = (
            DiffusionEncoder.from_pretrained(each.backbone, taps=taps, size=size)
            for each in (own, plain)
        )
        halves = "cond" if truncate else "cfg"  # whose texts differ in length
        ours, theirs = (
            each.extract(picture(*size), TEXT, conditioning=halves) for each in (compiled, expected)
        )
        for tap in taps:
            assert agree(ours[tap], theirs[tap]), tap
    if family in JOINT and not truncate:
        concepts = {"preset": "concept-attention", "layers": "all", "timesteps": (515,)}
        ours, theirs = (
            CrossAttnScorer.from_pretrained(each.backbone, preset="self-bench", size=SIZE)
            for each in (own, plain)
        )
        maps = ours.word_maps(picture(*SIZE), TEXT, ["red", "sky"], **concepts)
        same = theirs.word_maps(picture(*SIZE), TEXT, ["red", "sky"], **concepts)
        assert all((maps[word].array == same[word].array).all() for word in maps)


def test_messages_name_a_transformer(models, family):
    short = DiffusionEncoder.from_pretrained(models / family, truncate=True).backbone
    with pytest.raises(ConfigError, match=r"the transformer of .* was truncated"):
        check_whole(short)
    with pytest.raises(TapError, match=r"after which the transformer of .* was truncated"):
        short.match_taps([LAST[family]])
    states = short.embed([TEXT], size=SIZE)
    with pytest.raises(ShapeError, match=r"width 3, the transformer of .* reads"):
        short.check_embeds(replace(states, prompt_embeds=states.prompt_embeds[..., :3]))
