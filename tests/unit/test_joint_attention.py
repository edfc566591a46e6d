"""Joint attention of SD 3 and FLUX: word maps, the text's share, adapters."""

import json

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file

import dit_builders
from diffenc import CrossAttnScorer, DiffusionEncoder
from diffenc.errors import ConfigError, PromptError, TapError
from diffenc.inputs.noise import shared_noise
from plain_dit import agree, hooked, latents_of, picture, stock_map

TEXT = "a red circle left of a blue square"
SIZE = (48, 80)
CELLS = 15
MODELS = {
    "sd3.5": (StableDiffusion3Pipeline, dit_builders.sd3_pipeline),
    "sd3": (StableDiffusion3Pipeline, lambda: dit_builders.sd3_pipeline(dual=False)),
    "flux": (FluxPipeline, dit_builders.flux_pipeline),
}
LAYERS = {
    "sd3": [f"transformer_blocks.{index}.attn" for index in range(3)],
    "flux": [
        *[f"transformer_blocks.{index}.attn" for index in range(2)],
        *[f"single_transformer_blocks.{index}.attn" for index in range(3)],
    ],
}


@pytest.fixture(scope="module", params=list(MODELS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint") / kind
    MODELS[kind][1]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    return CrossAttnScorer.from_pretrained(folder, preset="self-bench", size=SIZE)


@pytest.fixture(scope="module")
def shares(kind, folder):
    """Softmax over all keys of each layer, (heads cells text), from what the model multiplies.

    The attention function of torch is watched: its queries and keys are those of both streams,
    normed and turned, in the model's own order.
    """
    pipe = MODELS[kind][0].from_pretrained(folder)
    latents = latents_of(pipe, picture(*SIZE))
    products = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, *args, **options):
        products.append((query.detach(), key.detach()))
        return plain(query, key, value, *args, **options)

    @torch.no_grad()
    def read(timestep):
        noise = shared_noise(tuple(latents.shape[1:]), seed=0, timestep=timestep)[None]
        sigma = timestep / 1000
        noisy = sigma * noise + (1 - sigma) * latents
        products.clear()
        if kind == "flux":
            states, pooled, places = pipe.encode_prompt(TEXT, None, max_sequence_length=512)
            inputs = {
                "hidden_states": pipe._pack_latents(noisy, 1, 16, 6, 10),
                "timestep": torch.tensor([sigma]),
                "guidance": torch.tensor([3.5]),
                "txt_ids": places,
                "img_ids": pipe._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32),
            }
        else:
            states, _, pooled, _ = pipe.encode_prompt(
                TEXT, TEXT, TEXT, do_classifier_free_guidance=False
            )
            inputs = {"hidden_states": noisy, "timestep": torch.tensor([1000.0 * sigma])}
        inputs |= {"encoder_hidden_states": states, "pooled_projections": pooled}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
            pipe.transformer(**inputs)
        length = states.shape[1]
        joint = [(q, k) for q, k in products if k.shape[2] == length + CELLS]
        weights = [(q @ k.transpose(2, 3) / 16**0.5).softmax(-1)[0] for q, k in joint]
        if kind == "flux":
            return [each[:, length:, :length] for each in weights]
        return [each[:, :CELLS, CELLS:] for each in weights]

    return read


def positions(kind, word):
    """Of the word in CLIP's tokens behind its start, and in T5's, which stand at 77."""
    at = TEXT.split().index(word)
    return [at] if kind == "flux" else [at + 1, 77 + at]


def test_word_maps_are_shares_of_all_keys(kind, scorer, shares):
    layers = LAYERS[kind[:3] if kind != "flux" else kind]
    for chosen in (None, layers[1], "transformer_blocks.0"):
        maps = scorer.word_maps(
            picture(*SIZE), TEXT, ["red", "square"], layers=chosen and [chosen], timesteps=(515,)
        )
        kept = (
            range(len(layers))
            if chosen is None
            else [layers.index(chosen)]
            if (chosen in layers)
            else [0]
        )
        weights = torch.stack([shares(515)[index].mean(0) for index in kept]).mean(0)
        for word in ("red", "square"):
            expected = weights[:, positions(kind, word)].sum(-1).reshape(3, 5)
            assert agree(torch.as_tensor(maps[word].array), expected), word


def test_daam_maps_are_shares_of_joint_attention_on_the_latents_grid(kind, scorer, shares):
    maps = scorer.word_maps(picture(*SIZE), TEXT, "red", preset="daam", timesteps=(66, 515))
    grown = [
        torch.nn.functional.interpolate(
            each[..., positions(kind, "red")].permute(0, 2, 1).reshape(len(each), -1, 3, 5),
            size=(6, 10),
            mode="bicubic",
        ).clamp(min=0)
        for each in (first + last for first, last in zip(shares(66), shares(515), strict=True))
    ]
    assert agree(torch.as_tensor(maps["red"].array), torch.cat(grown).mean((0, 1)))


def test_the_texts_share_leaves_its_padding_out(kind, scorer, shares):
    ours = torch.as_tensor(scorer.text_share(picture(*SIZE), TEXT, timesteps=(66, 515)).array)
    words = len(TEXT.split())
    own = list(range(words + 1))  # T5: the words and the end
    if kind != "flux":
        own = [*range(words + 2), *[77 + place for place in own]]
    weights = torch.stack([torch.stack(shares(t)).mean((0, 1)) for t in (66, 515)]).mean(0)
    expected = weights[:, own].sum(-1).reshape(3, 5)
    assert agree(ours, expected)
    assert expected.max() < weights.sum(-1).max()


def test_seg4diff_is_its_layer_and_step_of_sd3(kind, scorer, tmp_path):
    with pytest.raises(
        (TapError, ConfigError), match=r"transformer_blocks\.9|is defined for 'sd3'"
    ):
        scorer.word_maps(picture(*SIZE), TEXT, "red", preset="seg4diff")
    if kind == "sd3.5":
        options = {"layers": ["transformer_blocks.1"]}
        ours = scorer.word_maps(picture(*SIZE), TEXT, "red", preset="seg4diff", **options)
        same = scorer.word_maps(picture(*SIZE), TEXT, "red", timesteps=(515,), **options)
        assert (ours["red"].array == same["red"].array).all()


def test_a_word_that_clip_cuts_off_is_seen_by_t5(kind, scorer):
    text = "a " * 80 + "red circle"
    expected = (80,) if kind == "flux" else (77 + 80,)
    assert scorer.backbone.word_positions(text, "red") == expected
    with pytest.raises(PromptError, match="'star'"):
        scorer.backbone.word_positions(text, "star")


def test_fused_projections_are_refused(kind, folder):
    if kind == "sd3.5":
        pytest.skip("diffusers itself cannot run second attentions that are fused")
    own = CrossAttnScorer.from_pretrained(folder, preset="self-bench", size=SIZE)
    own.backbone.transformer.fuse_qkv_projections()
    with pytest.raises(TapError, match="unfuse_qkv_projections"):
        own.word_maps(picture(*SIZE), TEXT, "red", timesteps=(515,))


def test_cross_attention_has_no_text_share():
    with pytest.raises(TapError, match="no attention that joins picture and text"):
        CrossAttnScorer.from_pretrained("shapes").text_share(picture(*SIZE), TEXT)


@pytest.mark.long
def test_an_adapter_trains_what_the_tap_reads_and_is_saved_for_diffusers(kind, folder, tmp_path):
    tap = "single_transformer_blocks.0" if kind == "flux" else "transformer_blocks.1"
    encoder = DiffusionEncoder.from_pretrained(folder, taps=(tap,), size=SIZE)
    before = encoder.extract(picture(*SIZE), TEXT)[0]
    encoder.add_lora(rank=2)
    names = {name for name, each in encoder.named_parameters() if each.requires_grad}
    assert not any("add_" in name or "attn2" in name for name in names)
    # A and B of four projections of two blocks; a single block has three.
    assert len(names) == 2 * (4 + 4 + 3 if kind == "flux" else 4 + 4)
    assert agree(encoder.extract(picture(*SIZE), TEXT)[0].detach(), before, 1e-6)
    encoder.extract(picture(*SIZE), TEXT)[0].square().mean().backward()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad.sign())
    after = encoder.extract(picture(*SIZE), TEXT)[0].detach()
    assert not agree(after, before, 1e-4)
    encoder.save_pretrained(tmp_path)
    saved = DiffusionEncoder.from_pretrained(tmp_path, truncate=True)
    assert agree(saved.extract(picture(*SIZE), TEXT)[0].detach(), after, 1e-6)
    files = tmp_path / "lora" / "default"
    assert json.loads((files / "diffenc.json").read_text())["backbone"] == str(folder)
    assert all(
        name.startswith(("transformer.transformer_blocks.", "transformer.single_transformer"))
        for name in load_file(files / "pytorch_lora_weights.safetensors")
    )
    pipe = MODELS[kind][0].from_pretrained(folder)
    pipe.load_lora_weights(files, weight_name="pytorch_lora_weights.safetensors")
    theirs = plain_tap(kind, pipe, tap)
    assert agree(after, theirs, 1e-5)


@torch.no_grad()
def plain_tap(kind, pipe, tap):
    latents = latents_of(pipe, picture(*SIZE))
    noise = shared_noise(tuple(latents.shape[1:]), seed=0, timestep=50)[None]
    noisy = 0.05 * noise + 0.95 * latents
    if kind == "flux":
        states, pooled, places = pipe.encode_prompt(TEXT, None, max_sequence_length=512)
        inputs = {
            "hidden_states": pipe._pack_latents(noisy, 1, 16, 6, 10),
            "timestep": torch.tensor([0.05]),
            "guidance": torch.tensor([3.5]),
            "txt_ids": places,
            "img_ids": pipe._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32),
        }
    else:
        states, _, pooled, _ = pipe.encode_prompt(
            TEXT, TEXT, TEXT, do_classifier_free_guidance=False
        )
        inputs = {"hidden_states": noisy, "timestep": torch.tensor([50.0])}
    inputs |= {"encoder_hidden_states": states, "pooled_projections": pooled}
    output = hooked(pipe.transformer, [tap], lambda: pipe.transformer(**inputs))[tap]
    return stock_map(pipe, tap, output, 3, 5)
