"""The table of what works with which transformer: each cell of the guide is called as it stands.

A row of the page names a check here. In a column that says "works" the check passes; in one that
says "refused" the same call raises, and its message says the row's reason.
"""

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dit_builders
from diffenc import CrossAttnScorer, DiffusionEncoder, DiffusionVLM, FusedEncoder
from diffenc.cli.main import app
from diffenc.errors import DiffencError
from diffenc.grounding import Grounding, PhraseDataset, collate_phrases, read_phrases
from diffenc.hosts.prompts import PromptTokenizer
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.mllm.training import write_miniature
from diffenc.mllm.training.plan import make_plan
from plain_dit import agree, latents_of, picture, stock_error, stock_map, stock_pass
from train_builders import Parts, config
from vlm_builders import save_tiny_clip, save_tiny_lm

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "diffusion-transformers.md"
MODELS: dict[str, dict[str, Any]] = {
    "`pixart`": {"family": "pixart"},
    "`sana`": {"family": "sana"},
    "`sd3`": {"family": "sd3"},
    "`flux` schnell": {"family": "flux", "guidance": False},
    "`flux` dev": {"family": "flux", "guidance": True},
}
"""Columns of the table, and the tiny model that stands for each."""

SIZE = (64, 96)
TEXT = "a red circle"
OTHERS = ("blue square " * 90, "")  # one is cut, one is empty
STEP = 500


@dataclass(frozen=True)
class Case:
    """One model and what a call about it needs."""

    name: str
    folder: Path
    root: Path = field(repr=False)
    tmp: Path = field(repr=False)

    @property
    def family(self) -> str:
        return str(MODELS[self.name]["family"])

    @cached_property
    def pipe(self) -> Any:
        return DiffusionPipeline.from_pretrained(self.folder)

    @property
    def blocks(self) -> list[str]:
        """Every block, in the order in which they run."""
        lists = ("transformer_blocks", "single_transformer_blocks")
        denoiser = self.pipe.transformer
        return [f"{kind}.{k}" for kind in lists for k in range(len(getattr(denoiser, kind, ())))]

    @property
    def joins_text(self) -> bool:
        return self.family in ("sd3", "flux")

    def encoder(self, **options: Any) -> DiffusionEncoder:
        options = {"size": SIZE, "timestep": STEP, "taps": self.blocks[1], **options}
        return DiffusionEncoder.from_pretrained(self.folder, **options)

    def scorer(self, preset: str | None = None, **options: Any) -> CrossAttnScorer:
        options = {"size": SIZE, "timesteps": (STEP,), **options}
        return CrossAttnScorer.from_pretrained(self.folder, preset=preset, **options)

    def run(self, command: str, *arguments: Any) -> str:
        """The output of a command about the picture; what it refuses is raised."""
        image = () if command == "info" else (self.root / "picture.png", "--model")
        result = CliRunner().invoke(app, [*map(str, (command, *image, self.folder, *arguments))])
        if result.exit_code == 2:
            raise DiffencError(" ".join(result.output.split()))
        assert result.exit_code == 0, result.output
        return result.output


Check = Callable[[Case], object]


def features(case: Case) -> None:
    """They are those of diffusers' own call, also in a batch of other texts."""
    taps = case.blocks
    together = case.encoder(taps=taps).extract([picture(*SIZE)] * 3, [TEXT, *OTHERS])
    latents = latents_of(case.pipe, picture(*SIZE))
    for row, text in enumerate((TEXT, *OTHERS)):
        outputs, _, _ = stock_pass(case.pipe, latents, STEP, text, taps)
        for tap in taps:
            h, w = together[tap].shape[2:]
            theirs = stock_map(case.pipe, tap, outputs[tap], h, w)
            assert agree(together[tap][row : row + 1], theirs), (tap, text)


def both_halves(case: Case) -> None:
    encoder = case.encoder(use_cache=False)
    passes = []
    block = encoder.backbone.transformer.transformer_blocks[0]
    block.register_forward_hook(lambda *_: passes.append(1))
    halves = encoder.extract(picture(*SIZE), TEXT, conditioning="concat")
    cond, uncond = (encoder.extract(picture(*SIZE), text)[0] for text in (TEXT, ""))
    assert agree(halves.select("cond")[0], cond)
    assert agree(halves.select("uncond")[0], uncond)
    guided = encoder.extract(picture(*SIZE), TEXT, conditioning="cfg", guidance_scale=2.0)[0]
    assert agree(guided, uncond + 2 * (cond - uncond))
    assert passes


def states_made_elsewhere(case: Case) -> None:
    """Those of `pipe.encode_prompt` count as their texts, with their padding told or left out."""
    texts, pipe = [TEXT, "blue"], case.pipe
    lengths = None
    if case.family == "sd3":
        states, _, pooled, _ = pipe.encode_prompt(
            texts, texts, texts, do_classifier_free_guidance=False
        )
    elif case.family == "flux":
        length = 512 if pipe.transformer.config.guidance_embeds else 256
        states, pooled, _ = pipe.encode_prompt(texts, None, max_sequence_length=length)
    else:
        states, mask, _, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
        pooled, lengths = None, tuple(mask.sum(dim=1).tolist())
    encoder = case.encoder()
    images = [picture(*SIZE), picture(*SIZE, seed=1)]
    ours = encoder.extract(images, PromptEmbeds(states, pooled, lengths=lengths))[0]
    assert agree(ours, encoder.extract(images, texts)[0])
    for broken in (states[..., :3], states[0], states[:, :0], states[:1].expand(3, -1, -1)):
        with pytest.raises(DiffencError):
            encoder.extract(images, PromptEmbeds(broken, pooled))
    for broken in (pooled[..., :3], pooled[0], pooled[:1]) if pooled is not None else ():
        with pytest.raises(DiffencError, match="one row for each text"):
            encoder.extract(images, PromptEmbeds(states, broken))


def caches(case: Case) -> None:
    """A second question runs no text encoder twice and no VAE again."""
    encoder = case.encoder()
    ran: list[str] = []
    for name, part in encoder.backbone.parts().items():
        if name == "vae":
            part.encoder.register_forward_hook(lambda *_: ran.append("vae"))
        elif name != "transformer":
            part.register_forward_hook(lambda *_, name=name: ran.append(name))
    first = encoder.extract(picture(*SIZE), TEXT)[0]
    assert "vae" in ran
    assert "text_encoder" in ran
    ran.clear()
    encoder.extract(picture(*SIZE, seed=0), TEXT)
    assert not ran
    encoder.extract(picture(*SIZE), "blue")
    assert "vae" not in ran
    assert torch.equal(encoder.extract(picture(*SIZE), TEXT)[0], first)


def early_exit(case: Case) -> None:
    encoder = case.encoder(taps=case.blocks[0])
    ran: list[str] = []
    for name in case.blocks:
        block = encoder.backbone.transformer.get_submodule(name)
        block.register_forward_hook(lambda *_, name=name: ran.append(name))
    encoder.extract(picture(*SIZE), TEXT)
    assert ran in ([], case.blocks[:1])  # the pass may end within the block


def truncation(case: Case) -> None:
    short, whole = case.encoder(truncate=True), case.encoder()
    sizes = [sum(p.numel() for p in each.parameters()) for each in (short, whole)]
    assert sizes[0] < sizes[1]
    assert agree(*(each.extract(picture(*SIZE), TEXT)[0] for each in (short, whole)), 1e-6)
    with pytest.raises(DiffencError, match=r"lies behind .* truncated when it was loaded"):
        DiffusionEncoder.from_pretrained(short.backbone, taps=case.blocks[-1])
    scorer = CrossAttnScorer.from_pretrained(short.backbone, preset="diffusion-classifier")
    with pytest.raises(DiffencError, match="predicts no noise; load the model without truncate"):
        scorer(picture(*SIZE), TEXT)


def compiled(case: Case) -> None:
    """One graph for two image sizes, of which a break in it or a third compilation would fail."""
    torch._dynamo.reset()
    own, plain = case.encoder(), case.encoder()
    own.compile(backend="eager", fullgraph=True)
    for size in (SIZE, (64, 32)):
        ours, theirs = (
            DiffusionEncoder.from_pretrained(
                each.backbone, size=size, taps=case.blocks[1], timestep=STEP
            ).extract(picture(*size), TEXT)[0]
            for each in (own, plain)
        )
        assert agree(ours, theirs)


def noise_scores(case: Case) -> None:
    limits = {"`sana`": "300", "`sd3`": "77 or 256", "`flux` schnell": "77 or 256"}
    scorer = case.scorer("diffusion-classifier")
    cut: Any = nullcontext()
    if case.name != "`pixart`":  # whose 300 tokens are enough for the longest
        limit = limits.get(case.name, "77 or 512")
        cut = pytest.warns(UserWarning, match=f"1 of 3 texts are longer than the {limit} tokens")
    with cut:
        scores = scorer([picture(*SIZE)], [TEXT, *OTHERS])
    latents = latents_of(case.pipe, picture(*SIZE))
    errors = [stock_error(case.pipe, latents, STEP, text) for text in (TEXT, *OTHERS)]
    assert torch.allclose(scores[0], -torch.stack(errors), rtol=1e-5)


def denoising_gap(case: Case) -> None:
    scores = case.scorer("denoising-gap")(picture(*SIZE), [TEXT, ""])
    latents = latents_of(case.pipe, picture(*SIZE))
    error, empty = (stock_error(case.pipe, latents, STEP, text) for text in (TEXT, ""))
    assert agree(scores[0, 0], empty - error, 1e-2)  # a difference of nearly equal numbers
    assert abs(scores[0, 1]) < 1e-6


def self_bench(case: Case) -> None:
    scores = case.scorer("self-bench")(picture(*SIZE), [TEXT, "blue"])
    latents = latents_of(case.pipe, picture(*SIZE))
    for row, text in enumerate((TEXT, "blue")):
        error = stock_error(case.pipe, latents, STEP, text)  # (1 - sigma)^2 times the flow's
        norm = (error * latents.numel()).sqrt() / (1 - STEP / 1000)
        assert torch.allclose(scores[0, row], -norm, rtol=1e-4)


def attention_scores(case: Case) -> None:
    images, texts = [picture(*SIZE), picture(*SIZE, seed=1)], [TEXT, "blue", "a square"]
    first = case.blocks[:1]  # whose queries know nothing of the text: exact when they are shared
    exact = case.scorer("paper", layers=first)
    assert exact(images, texts).shape == (2, 3)
    shared = case.scorer("paper", layers=first, mode="shared-query")
    assert torch.allclose(shared(images, texts), exact(images, texts), rtol=1e-5)
    bank = shared.build_index(images, case.tmp / "bank")
    assert torch.allclose(bank.scores(texts), exact(images, texts), rtol=1e-2)


def stages(case: Case) -> None:
    case.scorer("discffusion")(picture(*SIZE), TEXT)


def words(case: Case) -> None:
    h, w = case.encoder().extract(picture(*SIZE), TEXT)[0].shape[2:]
    scorer = case.scorer("diffusion-classifier")
    maps = scorer.word_maps(picture(*SIZE), TEXT)
    assert list(maps) == ["a", "red", "circle"]
    both = scorer.word_maps(picture(*SIZE), TEXT, "red circle")["red circle"].array
    assert both.shape == (h, w)
    assert abs(both - maps["red"].array - maps["circle"].array).max() < 1e-6  # shares of a softmax
    cells = tuple(side // case.pipe.vae_scale_factor for side in SIZE)
    daam = scorer.word_maps(picture(*SIZE), TEXT, "red", preset="daam")
    assert daam["red"].array.shape == cells
    with pytest.raises(DiffencError, match="dog"):
        scorer.word_maps(picture(*SIZE), TEXT, "dog")


def segments(case: Case) -> None:
    pipe = dit_builders.PIPELINES[case.family]
    deep = pipe(num_layers=10) if case.family == "sd3" else case.folder  # layer 9 is read
    scorer = CrossAttnScorer.from_pretrained(deep, preset="diffusion-classifier", size=SIZE)
    ours = scorer.word_maps(picture(*SIZE), TEXT, "red", preset="seg4diff")
    same = scorer.word_maps(
        picture(*SIZE), TEXT, "red", layers="transformer_blocks.9", timesteps=(515,)
    )
    assert (ours["red"].array == same["red"].array).all()


def concepts(case: Case) -> None:
    options = {"preset": "concept-attention", "layers": "all", "timesteps": (STEP,)}
    scorer = case.scorer("diffusion-classifier")
    maps = scorer.word_maps(picture(*SIZE), TEXT, ["square", "sky"], **options)
    assert abs(maps["square"].array + maps["sky"].array - 1).max() < 1e-6


def shares(case: Case) -> None:
    scorer = case.scorer("diffusion-classifier")
    share = scorer.text_share(picture(*SIZE), TEXT).array
    assert 0 < share.min() <= share.max() < 1


def word_tokens(case: Case) -> None:
    encoder = case.encoder()
    question = encoder.word_tokens(picture(*SIZE), TEXT, "circle")
    features = encoder.extract(picture(*SIZE), TEXT)[0]
    spread = question.maps[:, :, None] * features[:, None]
    assert agree(question.tokens, spread.sum(dim=(-2, -1)))


def lora(case: Case) -> None:
    encoder = case.encoder()
    before = encoder.extract(picture(*SIZE), TEXT)[0]
    encoder.add_lora(rank=2)
    assert agree(encoder.extract(picture(*SIZE), TEXT)[0].detach(), before, 1e-6)
    encoder.extract(picture(*SIZE), TEXT)[0].square().mean().backward()
    with torch.no_grad():
        for parameter in encoder.trainable_parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad.sign())
    after = encoder.extract(picture(*SIZE), TEXT)[0].detach()
    assert not agree(after, before, 1e-4)
    encoder.merge_lora()
    assert agree(encoder.extract(picture(*SIZE), TEXT)[0], after)
    encoder.save_pretrained(case.tmp)
    saved = DiffusionEncoder.from_pretrained(case.tmp, truncate=True)
    assert agree(saved.extract(picture(*SIZE), TEXT)[0].detach(), after)
    weights = load_file(case.tmp / "lora" / "default" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.") for name in weights)


def grounding(case: Case) -> None:
    phrases = {"words": "red circle", "boxes": [[8, 8, 40, 24]]}
    line = {"image": "picture.png", "text": TEXT, "phrases": [phrases]}
    (case.tmp / "phrases.jsonl").write_text(json.dumps(line) + "\n")
    encoder = case.encoder()
    encoder.add_lora(rank=2)
    loss = Grounding(encoder)
    samples = read_phrases(case.tmp / "phrases.jsonl", case.root)
    terms = loss(**collate_phrases([PhraseDataset(samples, encoder)[0]]))
    (terms.outside + terms.denoising).backward()
    assert any(each.grad is not None for each in encoder.trainable_parameters())


def captioner(case: Case) -> None:
    case.encoder().add_captioner("shapes-clip")


def windows(case: Case) -> None:
    case.encoder(long_prompts="chunk").extract(picture(*SIZE), "red " * 600)


def tower(case: Case) -> None:
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    tower = DiffusionVisionTower(f"diffenc:{case.folder}?size=64")
    encoder = DiffusionEncoder.from_pretrained(case.folder, size=64)
    with torch.no_grad():
        ids = PromptTokenizer(str(case.folder))(TEXT)
        assert agree(tower(pixels, prompts=ids), encoder(pixels, TEXT))


def textless_tower(case: Case) -> None:
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    tower = DiffusionVisionTower(f"diffenc:{case.folder}?size=64")
    with torch.no_grad():
        expected = DiffusionEncoder.from_pretrained(case.folder, size=64)(pixels)
        assert agree(tower(pixels), expected)


def fused(case: Case) -> None:
    encoder = case.encoder()
    both = FusedEncoder(str(case.root / "clip"), encoder, "channel")
    with torch.no_grad():
        one, other = (both([picture(*SIZE)], text) for text in (TEXT, "blue"))
    width = encoder.hidden_size
    assert torch.equal(one[..., :-width], other[..., :-width])  # CLIP's
    assert not torch.equal(one[..., -width:], other[..., -width:])


def language_model(case: Case) -> None:
    vlm = DiffusionVLM(case.encoder(), str(case.root / "lm"))
    vlm.save_pretrained(case.tmp)
    back = DiffusionVLM.from_pretrained(case.tmp)
    answers = [each.generate(picture(*SIZE), TEXT, max_new_tokens=4) for each in (vlm, back)]
    assert answers[0] == answers[1]


def plan(case: Case) -> None:
    data = write_miniature(case.tmp / "data", scenes=4)
    parts = Parts(case.root / "clip", case.root / "lm", data, case.folder)
    options = {"kind": "diffusion", "language_model": "lora", "rank": 2, "unet_rank": 2}
    counted = make_plan(config(parts, case.tmp, "instruct", **options), processes=1, tflops=1.0)
    encoder = DiffusionEncoder.from_pretrained(case.folder, truncate=True)
    encoder.add_lora(rank=2)
    trained = sum(each.numel() for each in encoder.trainable_parameters())
    assert counted.trained["transformer LoRA"] == trained


def reuse(case: Case) -> None:
    with pytest.raises(DiffencError, match="needs a U-Net of diffusers"):
        case.encoder(reuse="middle")
    case.encoder(reuse="down")


def info(case: Case) -> None:
    facts = json.loads(case.run("info", "--json"))
    assert facts["family"] == case.family
    assert next(part["name"] for part in facts["components"]) == "transformer"


def encode(case: Case) -> None:
    out = case.tmp / "features.safetensors"
    case.run("encode", "--prompt", TEXT, "--size", "64x96", "--timestep", STEP, "-o", out)
    ((tap, maps),) = load_file(out).items()
    assert agree(maps, case.encoder(taps=tap).extract(picture(*SIZE), TEXT)[0])


def command_maps(case: Case) -> None:
    out = case.tmp / "maps.png"
    case.run("maps", "--text", TEXT, "--word", "circle", "--timesteps", STEP, "-o", out)
    assert out.exists()


def command_score(case: Case) -> None:
    case.run("score", "--text", TEXT, "--text", "blue")


def command_noise_score(case: Case) -> None:
    options = ("--preset", "diffusion-classifier", "--timesteps", STEP)
    rows = json.loads(case.run("score", "--text", TEXT, "--text", "", *options, "--json"))
    assert rows


def look(case: Case) -> None:
    case.run("look", "-q", TEXT, "-o", case.tmp / "look.png")
    assert (case.tmp / "look.png").exists()


def look_words(case: Case) -> None:
    case.run("look", "-q", TEXT, "--words", "-o", case.tmp / "look.png")
    assert (case.tmp / "look.png").exists()


def transformers_tower(case: Case) -> None:
    import tiny_llava  # noqa: F401  # skips where transformers is too old for it
    from diffenc.hosts.transformers import DiffEncConfig

    DiffEncConfig(f"diffenc:{case.folder}")


def preset_of_places(case: Case) -> None:
    for preset in ("dift", "cleandift", "hyperfeatures"):
        with pytest.raises(DiffencError, match="is defined for"):
            case.encoder(preset=preset)
    case.encoder(preset="gdf")


def ditf(case: Case) -> None:
    deep = case.folder
    if case.family == "flux":  # block 9 is read
        deep = dit_builders.flux_pipeline(
            guidance=bool(MODELS[case.name]["guidance"]), num_single_layers=10
        )
    options = {"preset": "ditf", "size": SIZE, "draws": 2}
    all_channels, less = (
        DiffusionEncoder.from_pretrained(deep, discard=discard, **options).extract(
            picture(*SIZE), TEXT
        )
        for discard in ((), (3,))
    )
    assert list(all_channels) == ["single_transformer_blocks.9.norm"]
    assert not agree(less[0], all_channels[0], 1e-3)


def another_transformer(case: Case) -> None:
    options = {name: each for name, each in MODELS[case.name].items() if name != "family"}
    other = dit_builders.PIPELINES[case.family](**options).transformer
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    own = case.encoder().extract(picture(*SIZE), TEXT)[0]
    for replacement in (other, str(case.folder)):
        maps = case.encoder(transformer=replacement).extract(picture(*SIZE), TEXT)[0]
        assert agree(maps, own, 1e-6) is isinstance(replacement, str)


def another_unet(case: Case) -> None:
    case.encoder(unet=case.pipe.transformer)


def single_file(case: Case) -> None:
    keys = {
        "pixart": "blocks.0.cross_attn.q_linear.weight",
        "sana": "blocks.0.attention_y_norm.weight",
        "sd3": "joint_blocks.0.x_block.attn.qkv.weight",
        "flux": "double_blocks.0.img_attn.qkv.weight",
    }
    file = case.tmp / "model.safetensors"
    save_file({keys[case.family]: torch.zeros(1)}, file)
    DiffusionEncoder.from_pretrained(file)


NO_CROSS = "joins picture and text in one attention"
UNCOMPARED = "has no half without a text, beside which a question's change would be seen"
NO_HALF = "was distilled of guided predictions and has no unconditional half"
ROWS: dict[str, tuple[Check, str]] = {
    "features under a text": (features, ""),
    '`conditioning="cfg"` and `"concat"`: both halves in one call': (both_halves, NO_HALF),
    "text states that were made elsewhere": (states_made_elsewhere, ""),
    "caches of texts and latents": (caches, ""),
    "early exit": (early_exit, ""),
    "`truncate=True`": (truncation, ""),
    "`encoder.compile()`": (compiled, ""),
    "scores by the predicted noise": (noise_scores, ""),
    "the preset `denoising-gap`": (denoising_gap, NO_HALF),
    "the preset `self-bench`": (self_bench, "flow"),
    "cross-attention scores, shared queries, query banks": (attention_scores, NO_CROSS),
    "the preset `discffusion`": (stages, f"a transformer without stages|{NO_CROSS}"),
    "word maps, DAAM's too": (words, ""),
    "the preset `seg4diff`": (segments, "seg4diff"),
    "maps of concepts that need not stand in the text": (concepts, "concept-attention"),
    "`scorer.text_share`": (shares, "no attention that joins picture and text"),
    "word tokens": (word_tokens, NO_CROSS),
    "LoRA": (lora, ""),
    "[grounding](ground-words.md): a LoRA learns where words are": (grounding, NO_CROSS),
    "implicit captioner": (captioner, "a captioner adds to"),
    '`long_prompts="chunk"`': (windows, "trained without windows"),
    "`DiffusionVisionTower` without a text": (textless_tower, ""),
    "`DiffusionVisionTower` with a text": (tower, "split texts in different ways"),
    "`FusedEncoder`": (fused, ""),
    "`DiffusionVLM`": (language_model, ""),
    "training and its plan": (plan, ""),
    '`reuse="down"`, `"middle"`': (reuse, "needs a U-Net of diffusers"),
    "`diffenc info`": (info, ""),
    "`diffenc encode`": (encode, ""),
    "`diffenc maps`": (command_maps, ""),
    "`diffenc score` by cross-attention, the default": (command_score, NO_CROSS),
    "`diffenc score` by the predicted noise": (command_noise_score, ""),
    "`diffenc look`": (look, UNCOMPARED),
    "`diffenc look --words`": (look_words, f"{NO_CROSS}|{UNCOMPARED}"),
    "the tower that transformers builds itself (`DiffEncConfig`)": (
        transformers_tower,
        "names a diffusion transformer",
    ),
    "presets of taps: `gdf`, `dift`, `cleandift`, `hyperfeatures`": (
        preset_of_places,
        "is defined for",
    ),
    "the preset `ditf`": (ditf, "is defined for"),
    "`transformer=`: a module of the same class, or the folder of one": (another_transformer, ""),
    "`unet=`": (another_unet, "pass transformer="),
    "single files": (single_file, "pass a diffusers folder|from_single_file|config.json"),
}
"""Check of each row, and what the message of a refusal says."""

LONG = ("`encoder.compile()`",)


def cells() -> list[list[str]]:
    """Rows of the page's table, its head first."""
    section = PAGE.read_text("utf-8").split("## What works")[1].split("## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if not re.fullmatch(r":?-+:?", row[1])]


HEAD, *BODY = cells()
CELLS = [
    pytest.param(
        row[0],
        model,
        says,
        id=f"{model}-{row[0]}".replace("`", "").replace(" ", "_"),
        marks=[pytest.mark.long] if row[0] in LONG else [],
    )
    for row in BODY
    for model, says in zip(HEAD[1:6], row[1:6], strict=True)
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    for name, options in MODELS.items():
        kind = {key: value for key, value in options.items() if key != "family"}
        pipe = dit_builders.PIPELINES[options["family"]](**kind)
        pipe.save_pretrained(folder / name.replace("`", "").replace(" ", "-"))
    save_tiny_lm(folder / "lm")
    save_tiny_clip(folder / "clip")
    picture(*SIZE).save(folder / "picture.png")
    return folder


def test_every_row_and_column_of_the_page_is_known() -> None:
    assert HEAD[1:6] == list(MODELS)
    assert [row[0] for row in BODY] == list(ROWS)
    assert {says for row in BODY for says in row[1:6]} == {"works", "refused"}
    assert all(len(row) == 7 and (row[6] or "refused" not in row) for row in BODY)


@pytest.mark.parametrize(("row", "model", "says"), CELLS)
def test_a_cell_says_what_happens(
    row: str, model: str, says: str, root: Path, tmp_path: Path
) -> None:
    check, reason = ROWS[row]
    case = Case(model, root / model.replace("`", "").replace(" ", "-"), root, tmp_path)
    if says == "works":
        check(case)
        return
    assert reason
    with pytest.raises(DiffencError, match=reason):
        check(case)
