"""The two losses of grounding against plain diffusers, and what they train."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import builders
import dit_builders
from diffenc import DiffusionEncoder
from diffenc.denoiser.grounding import share_outside
from diffenc.errors import ConfigError, ImageError, TapError
from diffenc.grounding import Grounding, PhraseDataset, collate_phrases, read_phrases
from diffenc.inputs.noise import denoising_target
from diffenc.inputs.words import span_positions
from diffenc.models import load_backbone
from plain_dit import hooked, picture

TEXTS = {"a red circle left of a blue square": ("red circle", "blue square"), "a photo": ("photo",)}
BOXES = ([[8, 8, 40, 24]], [[30, 4, 60, 60], [0, 50, 9, 60]], [[0, 0, 64, 30]])


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phrases")
    boxes = iter(BOXES)
    lines = []
    for index, (text, names) in enumerate(TEXTS.items()):
        picture(64, 64, seed=index).save(folder / f"{index}.png")
        phrases = [{"words": name, "boxes": next(boxes)} for name in names]
        lines.append(json.dumps({"image": f"{index}.png", "text": text, "phrases": phrases}))
    (folder / "p.jsonl").write_text("\n".join(lines) + "\n")
    return read_phrases(folder / "p.jsonl", folder)


def save(kind, folder):
    if kind == "sdxl":
        return builders.save_sdxl(folder, depth=10)
    if kind == "pixart":
        return dit_builders.save_pixart(folder)
    if kind == "sana":
        dit_builders.sana_pipeline().save_pretrained(folder)
        return folder
    return builders.save_sd(folder, kind)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    known = {}

    def folder(kind):
        if kind not in known:
            known[kind] = save(kind, tmp_path_factory.mktemp(kind.replace(".", "")))
        return known[kind]

    return folder


def batch_of(encoder, samples, **options):
    dataset = PhraseDataset(samples, encoder, **options)
    return collate_phrases([dataset[index] for index in range(len(samples))])


PLACES = {
    "sd1.5": ("up_blocks.1.attentions.2.transformer_blocks.0.attn2", 4),
    "sd2.1": ("up_blocks.2.attentions.0.transformer_blocks.0.attn2", 2),
    "sdxl": ("up_blocks.0.attentions.1.transformer_blocks.2.attn2", 4),
    "pixart": ("transformer_blocks.2.attn2", 2),
    "sana": ("transformer_blocks.1.attn2", 1),
}
"""A cross-attention of each family, and how much coarser its map is than the latents."""


def states_of(pipe, kind, text):
    """Text states of plain diffusers, with what else the denoiser is told of the text."""
    if kind == "sdxl":
        states, _, pooled, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
        ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
        added = {"text_embeds": pooled, "time_ids": ids}
        return states, {"added_cond_kwargs": added}
    if kind == "pixart":
        states, mask, _, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
        added = {"resolution": None, "aspect_ratio": None}
        return states, {"encoder_attention_mask": mask, "added_cond_kwargs": added}
    if kind == "sana":
        states, mask, _, _ = pipe.encode_prompt(
            text, do_classifier_free_guidance=False, complex_human_instruction=None
        )
        return states, {"encoder_attention_mask": mask}
    return pipe.encode_prompt(text, "cpu", 1, False)[0], {}


def plain_terms(pipe, kind, row, text, positions, seed):
    """Both losses of one picture, with hooks on diffusers' own modules."""
    layer, coarser = PLACES[kind]
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    encoded = pipe.vae.encode(row[None])
    latents = encoded[0] if kind == "sana" else encoded.latent_dist.mode()
    latents = latents * pipe.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(seed)
    step = int(torch.randint(0, 400, (), generator=generator))
    noise = torch.randn(latents.shape[1:], generator=generator)[None]
    if kind == "sana":
        signal = 1 - step / 1000
        noisy, target = signal * latents + (1 - signal) * noise, noise - latents
    else:
        signal = pipe.scheduler.alphas_cumprod[step]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        target = noise
        if kind == "sd2.1":
            target = pipe.scheduler.get_velocity(latents, noise, torch.tensor([step]))
    states, extra = states_of(pipe, kind, text)
    said = []
    scale = denoiser.config.get("timestep_scale", 1.0)
    outputs = hooked(
        denoiser,
        [f"{layer}.to_q", f"{layer}.to_k"],
        lambda: said.append(
            denoiser(
                noisy,
                timestep=torch.tensor([step]) * scale,
                encoder_hidden_states=states,
                return_dict=False,
                **extra,
            )[0]
        ),
    )
    error = (said[0][:, : target.shape[1]] - target).square().mean()
    attn = denoiser.get_submodule(layer)
    query, key = (outputs[f"{layer}.{part}"] for part in ("to_q", "to_k"))
    query = attn.norm_q(query) if getattr(attn, "norm_q", None) is not None else query
    key = attn.norm_k(key) if getattr(attn, "norm_k", None) is not None else key
    query, key = (
        each.reshape(1, each.shape[1], attn.heads, -1).transpose(1, 2) for each in (query, key)
    )
    logits = query @ key.transpose(2, 3) * attn.scale
    if "encoder_attention_mask" in extra:
        logits = logits.masked_fill(extra["encoder_attention_mask"][:, None, None] == 0, -torch.inf)
    maps = logits.softmax(-1).mean(1)[0]  # cells, tokens
    side = noisy.shape[-1] // coarser
    shares = []
    for position, areas in positions.items():
        mask = torch.zeros(64, 64)
        for left, top, right, bottom in areas:
            mask[top:bottom, left:right] = 1
        own = mask.reshape(side, 64 // side, side, 64 // side).mean(dim=(1, 3)).flatten()
        attention = maps[:, position]
        shares.append((1 - (attention * own).sum() / attention.sum()) ** 2)
    return torch.stack(shares).mean(), error


POSITIONS = {
    "clip": [{2: BOXES[0], 3: BOXES[0], 7: BOXES[1], 8: BOXES[1]}, {2: BOXES[2]}],
    "t5": [{1: BOXES[0], 2: BOXES[0], 6: BOXES[1], 7: BOXES[1]}, {1: BOXES[2]}],
}


@pytest.mark.long
@pytest.mark.parametrize("kind", list(PLACES))
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_both_losses_are_those_of_hooks_on_plain_diffusers(folders, samples, kind):
    folder = folders(kind)
    encoder = DiffusionEncoder.from_pretrained(folder, size=64)
    batch = batch_of(encoder, samples)
    ours = Grounding(encoder, layers=PLACES[kind][0])(**batch)
    pipe = DiffusionPipeline.from_pretrained(folder)
    places = POSITIONS["t5" if kind == "pixart" else "clip"]
    if kind == "sana":  # a start token, then one a letter; a word has the space before it
        places = []
        boxes = iter(BOXES)
        for text, names in TEXTS.items():
            own = {}
            for name in names:
                areas = next(boxes)
                for word in name.split():
                    start = text.index(word)
                    own |= {1 + start + place: areas for place in range(-1, len(word))}
            places.append(own)
    theirs = [
        plain_terms(
            pipe,
            kind,
            batch["pixel_values"][row],
            text,
            places[row],
            batch["noise_seeds"][row],
        )
        for row, text in enumerate(TEXTS)
    ]
    outside, denoising = (torch.stack(values).mean() for values in zip(*theirs, strict=True))
    assert ours.outside.item() == pytest.approx(outside.item(), rel=2e-5)
    assert ours.denoising.item() == pytest.approx(denoising.item(), rel=2e-5)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd1.5", "sdxl", "pixart"])
def test_a_gradient_reaches_the_lora_and_nothing_else(folders, samples, kind):
    encoder = DiffusionEncoder.from_pretrained(folders(kind), size=64)
    encoder.add_lora(rank=2)
    with torch.no_grad():
        for parameter in encoder.trainable_parameters():
            parameter.add_(0.05)
    batch = batch_of(encoder, samples)
    encoder.train()
    (Grounding(encoder, denoise=False)(**batch).outside).backward()
    reached = {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert reached
    assert all("lora" in name for name in reached)
    assert any(
        bool(p.grad.abs().sum() > 0) for p in encoder.trainable_parameters() if p.grad is not None
    )


@pytest.mark.long
@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("kind", ["sd1.5", "pixart"])
def test_checkpointing_changes_no_gradient(folders, samples, kind, denoise):
    gradients = []
    for checkpointing in (False, True):
        encoder = DiffusionEncoder.from_pretrained(folders(kind), size=64)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            encoder.add_lora(rank=2)
            for parameter in encoder.trainable_parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            encoder.backbone.denoiser.enable_gradient_checkpointing()
        encoder.train()
        terms = Grounding(encoder, denoise=denoise)(**batch_of(encoder, samples))
        (terms.outside + terms.denoising).backward()
        gradients.append([p.grad for p in encoder.trainable_parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert (plain is None) == (again is None)
        if plain is not None:
            torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-7)


def test_word_tokens_train_under_checkpointing(folders):
    encoder = DiffusionEncoder.from_pretrained(folders("sd1.5"), size=64)
    encoder.add_lora(rank=2)
    encoder.backbone.unet.enable_gradient_checkpointing()
    encoder.train()
    tokens = encoder.word_tokens(picture(64, 64), "a red circle", "circle").with_places()
    tokens.square().sum().backward()
    assert any(p.grad is not None for p in encoder.trainable_parameters())


@pytest.mark.long
def test_a_step_down_the_gradient_brings_attention_inside(folders, samples):
    encoder = DiffusionEncoder.from_pretrained(folders("sd1.5"), size=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder.add_lora(rank=8)
    grounding = Grounding(encoder, denoise=False)
    batch = batch_of(encoder, samples)
    optimizer = torch.optim.Adam(encoder.trainable_parameters(), lr=0.03)
    losses = []
    for _ in range(15):
        loss = grounding(**batch).outside
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_joint_attention_is_refused_in_a_sentence(tmp_path):
    dit_builders.sd3_pipeline().save_pretrained(tmp_path)
    encoder = DiffusionEncoder.from_pretrained(tmp_path, size=64)
    with pytest.raises(ConfigError, match="joins picture and text in one attention; take a model"):
        Grounding(encoder)


@pytest.mark.long
def test_a_truncated_model_predicts_no_noise_and_can_be_grounded_without(folders, samples):
    encoder = DiffusionEncoder.from_pretrained(
        folders("sd1.5"), size=64, truncate=True, taps=["up_blocks.1"]
    )
    with pytest.raises(ConfigError, match="predicts no noise"):
        Grounding(encoder)
    whole = DiffusionEncoder.from_pretrained(folders("sd1.5"), size=64, taps=["up_blocks.1"])
    short, full = (
        Grounding(each, denoise=False)(**batch_of(each, samples)) for each in (encoder, whole)
    )
    assert short.outside.item() == pytest.approx(full.outside.item(), rel=1e-6)
    assert short.denoising.item() == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"timesteps": (400, 100)}, ConfigError, r"two steps of \[0, 1000\].*got \[400, 100\]"),
        ({"timesteps": (0, 1001)}, ConfigError, "two steps"),
        ({"layers": "up_block"}, TapError, "no cross-attention in 'up_block'"),
        pytest.param({"denoise": 1}, ConfigError, "denoise must be", marks=pytest.mark.wrong_type),
    ],
)
def test_options_that_mean_nothing_are_refused(options, error, message):
    encoder = DiffusionEncoder.from_pretrained("shapes")
    with pytest.raises(error, match=message):
        Grounding(encoder, **options)


def test_rows_depend_on_seed_sample_and_epoch_alone(samples):
    encoder = DiffusionEncoder.from_pretrained("shapes")
    one, again = (PhraseDataset(samples, encoder, seed=3) for _ in range(2))
    assert one[0, 1]["noise_seed"] == again[0, 1]["noise_seed"] == one[1]["noise_seed"]
    seeds = {one[0, 0]["noise_seed"], one[0, 1]["noise_seed"], one[1, 0]["noise_seed"]}
    seeds.add(PhraseDataset(samples, encoder, seed=4)[0, 0]["noise_seed"])
    assert len(seeds) == 4
    alone, beside = collate_phrases([one[0]]), collate_phrases([one[0], one[1]])
    grounding = Grounding(encoder)
    rows = torch.tensor([1.0, 0.0])
    first = grounding(**{**beside, "weights": beside["weights"] * rows[:, None], "whole": rows})
    expected = grounding(**alone)
    assert first.outside.item() == pytest.approx(expected.outside.item(), rel=1e-5)
    assert first.denoising.item() == pytest.approx(expected.denoising.item(), rel=1e-5)


def test_an_epoch_draws_one_of_several_texts(samples):
    texts = tuple(text for sample in samples for text in sample.texts)
    both = replace(samples[0], texts=texts)
    dataset = PhraseDataset([both], DiffusionEncoder.from_pretrained("shapes"))
    assert {dataset[epoch, 0]["text"] for epoch in range(20)} == set(TEXTS)


def test_pictures_that_break_are_named_or_left_aside(samples, tmp_path):
    (tmp_path / "x.png").write_bytes(b"x")
    broken = replace(samples[0], image=tmp_path / "x.png")
    turned = replace(samples[0], size=(64, 32))
    encoder = DiffusionEncoder.from_pretrained("shapes")
    with pytest.raises(ImageError, match=r"x\.png"):
        PhraseDataset([broken], encoder)[0]
    with pytest.raises(
        ImageError, match="has 64 x 64 pixels, and its areas are measured in 64 x 32"
    ):
        PhraseDataset([turned], encoder)[0]
    dataset = PhraseDataset([broken, samples[1]], encoder, skip_broken=True)
    batch = collate_phrases([dataset[0], dataset[1]])
    assert batch.pop("broken")[0].startswith(samples[0].key)
    alone = collate_phrases([dataset[1]])
    grounding = Grounding(encoder)
    ours, expected = grounding(**batch), grounding(**alone)
    assert ours.outside.item() == pytest.approx(expected.outside.item(), rel=1e-5)
    assert ours.denoising.item() == pytest.approx(expected.denoising.item(), rel=1e-5)


def test_what_is_cropped_away_names_nothing(tmp_path):
    Image.new("RGB", (120, 40), "gray").save(tmp_path / "a.png")
    line = {
        "image": "a.png",
        "text": "a red circle left of a blue square",
        "phrases": [
            {"words": "circle", "boxes": [[0, 0, 20, 40]]},
            {"words": "square", "boxes": [[50, 0, 70, 40]]},
        ],
    }
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    encoder = DiffusionEncoder.from_pretrained("shapes", resize="crop")
    batch = batch_of(encoder, read_phrases(tmp_path / "p.jsonl", tmp_path))
    assert batch["weights"].tolist() == [[1.0]]
    assert batch["positions"] == [8]
    blind = {**batch, "weights": torch.zeros(1, 1)}
    assert Grounding(encoder)(**blind).outside.item() == 0


@pytest.mark.long
def test_sizes_of_pictures_reach_sdxl(folders, samples):
    folder = folders("sdxl")
    losses = []
    for original in (None, "image", (300, 200)):
        encoder = DiffusionEncoder.from_pretrained(folder, size=64, original_size=original)
        batch = batch_of(encoder, [replace(sample) for sample in samples])
        batch["sizes"] = [(300, 200)] * 2
        losses.append(Grounding(encoder)(**batch).denoising.item())
    assert losses[1] == losses[2] != losses[0]


def test_the_share_outside_is_what_it_says():
    maps = torch.zeros(1, 3, 2, 2)
    maps[0, 0, 0, 0] = 0.5  # all of it inside
    maps[0, 1] = 0.25  # half of it
    maps[0, 2, 1, 1] = 0.1  # nothing
    masks = torch.zeros(1, 3, 4, 4)
    masks[:, :, :2] = 1
    weights = torch.tensor([[1.0, 1.0, 1.0]])
    assert share_outside({"a": maps}, masks, weights).item() == pytest.approx((0 + 0.25 + 1) / 3)
    weights = torch.tensor([[0.0, 3.0, 1.0]])
    assert share_outside({"a": maps}, masks, weights).item() == pytest.approx((0.75 + 1) / 4)
    fine = maps.repeat_interleave(2, -1).repeat_interleave(2, -2)
    both = share_outside({"a": maps, "b": fine}, masks, weights).item()
    assert both == pytest.approx((0.75 + 1) / 4)
    assert share_outside({"a": 0 * maps}, masks, 0 * weights).item() == 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_what_is_to_be_predicted_gives_the_noise_back(kind):
    scheduler = load_backbone("shapes").scheduler
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 3, 3, generator=generator) for _ in range(2))
    steps = torch.tensor([20, 700])
    target = denoising_target(scheduler, kind, latents, noise, steps)
    expected = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": scheduler.get_velocity(latents, noise, steps),
    }[kind]
    torch.testing.assert_close(target, expected)
    with pytest.raises(ConfigError, match="cannot train a model that predicts 'x'"):
        denoising_target(scheduler, "x", latents, noise, steps)


def test_parts_of_a_text_are_found_by_their_letters(tiny_tokenizer):
    text = "a red circle left of a blue square"
    places = {"red circle": (2, 3), "a blue": (6, 7), text: tuple(range(1, 9))}
    for part, expected in places.items():
        start = text.index(part)
        positions = span_positions([tiny_tokenizer], text, start, start + len(part))
        assert positions == expected
        assert span_positions([tiny_tokenizer] * 2, text, start, start + len(part)) == expected
    differing = [tiny_tokenizer, dit_builders.tiny_t5_tokenizer()]
    assert span_positions(differing, text, 2, 12) == ()  # one of them begins without a mark
    assert span_positions([tiny_tokenizer], text, 2, 4) == ()  # "re" is no token
    assert span_positions([tiny_tokenizer], "circle " * 90, 7 * 85, 7 * 85 + 6) == ()
    accent = "a\u0301 red"  # two letters that the tokenizer sees as one
    spelled = len(tiny_tokenizer("\u00e1").input_ids) - 2
    assert span_positions([tiny_tokenizer], accent, 3, 6) == (1 + spelled,)


def test_maps_that_are_too_coarse_to_tell_things_apart_do_not_count_by_default(samples):
    encoder = DiffusionEncoder.from_pretrained("shapes", taps=["up_blocks.2"])
    batch = batch_of(encoder, samples)
    fine, coarse = ("up_blocks.1", "up_blocks.2"), ("up_blocks.0",)  # 8 and 16 cells; 4
    default, finer, every = (
        Grounding(encoder, layers=layers)(**batch).outside.item()
        for layers in (None, fine, (*coarse, *fine))
    )
    assert default == pytest.approx(finer, rel=1e-6)
    assert default != pytest.approx(every, rel=1e-3)
