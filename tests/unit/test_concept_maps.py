"""ConceptAttention's maps: concepts that ride along with a picture's pass in SD 3 and FLUX."""

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

import dit_builders
from diffenc import CrossAttnScorer
from diffenc.denoiser.concept_attention import ConceptTaps
from diffenc.denoiser.hooks import ForwardTaps
from diffenc.errors import ConfigError, PromptError, TapError
from diffenc.inputs.noise import shared_noise
from plain_dit import agree, latents_of, picture

TEXT = "a red circle left of a blue square"
CONCEPTS = ["photo", "red", "blue"]  # not all of the text
SIZE = (48, 80)
TIMESTEPS = (66, 515)
MODELS = {
    "sd3.5": (StableDiffusion3Pipeline, dit_builders.sd3_pipeline),
    "sd3": (StableDiffusion3Pipeline, lambda: dit_builders.sd3_pipeline(dual=False)),
    "flux": (FluxPipeline, dit_builders.flux_pipeline),
    "schnell": (FluxPipeline, lambda: dit_builders.flux_pipeline(guidance=False)),
}


@pytest.fixture(scope="module", params=list(MODELS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("concepts") / kind
    MODELS[kind][1]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    return CrossAttnScorer.from_pretrained(folder, preset="self-bench", size=SIZE)


class Inputs:
    """What a module was last called with."""

    def __init__(self, module):
        module.register_forward_pre_hook(lambda _module, args: setattr(self, "last", args[0]))


@torch.no_grad()
def plain_products(kind, folder, timestep, dtype=torch.float32):
    """Products of cells' and concepts' outputs per block, by the blocks of plain diffusers.

    The pass goes block by block; in each, the block's own attention is called once more, with
    the concepts in the place of the text. All of it in float32, at the time and the guidance that
    a FLUX of type `dtype` embeds: in bfloat16 3504 and 516 in place of 3500 and 515.
    """
    pipe = MODELS[kind][0].from_pretrained(folder)
    model, is_flux = pipe.transformer, kind in ("flux", "schnell")
    latents = latents_of(pipe, picture(*SIZE))
    noise = shared_noise(tuple(latents.shape[1:]), seed=0, timestep=timestep)[None]
    sigma = timestep / 1000
    noisy = sigma * noise + (1 - sigma) * latents
    time = torch.tensor([1000 * sigma])
    if is_flux:
        length = 512 if kind == "flux" else 256
        states, pooled, _ = pipe.encode_prompt(TEXT, None, max_sequence_length=length)
        own = [pipe.encode_prompt(c, None, max_sequence_length=length)[0][:, :1] for c in CONCEPTS]
        image = model.x_embedder(pipe._pack_latents(noisy, 1, 16, 6, 10))
        time, guided = ((1000 * torch.tensor([each], dtype=dtype)).float() for each in (sigma, 3.5))
        guidance = [guided] if kind == "flux" else []
        temb = model.time_text_embed(time, *guidance, pooled)
        concept_temb = model.time_text_embed(time, *guidance, torch.zeros_like(pooled))
        cells = pipe._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
        turned = model.pos_embed(torch.cat([torch.zeros(states.shape[1], 3), cells]))
        with_concepts = model.pos_embed(torch.cat([torch.zeros(3, 3), cells]))
        rotary, concept_rotary = ({"image_rotary_emb": each} for each in (turned, with_concepts))
    else:
        states, _, pooled, _ = pipe.encode_prompt(
            TEXT, TEXT, TEXT, do_classifier_free_guidance=False
        )
        joined = " ".join(CONCEPTS)
        own = [pipe.encode_prompt(joined, joined, joined, do_classifier_free_guidance=False)[0]]
        own = [own[0][:, :4]]
        image = model.pos_embed(noisy)
        temb = concept_temb = model.time_text_embed(time, pooled)
        rotary, concept_rotary = {}, {}
    text = model.context_embedder(states)
    concepts = model.context_embedder(torch.cat(own, dim=1))
    products = []
    for block in model.transformer_blocks:
        normed_image = block.norm1(image, emb=temb)[0]
        is_last = getattr(block, "context_pre_only", False)
        modulated = block.norm1_context(concepts, concept_temb) if is_last else None
        normed, *parts = [modulated] if is_last else block.norm1_context(concepts, emb=concept_temb)
        into_out = Inputs(block.attn.to_out[0])
        into_text_out = None if is_last else Inputs(block.attn.to_add_out)
        _, attended = block.attn(
            hidden_states=normed_image, encoder_hidden_states=normed, **concept_rotary
        )
        output = attended if is_last else into_text_out.last
        image_output = into_out.last
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb, **rotary)
        if is_flux:
            image_output = into_out.last
        else:  # the release of SD 3 compares with cells that see the concepts
            output = output[:, 1:] / output[:, 1:].norm(dim=-1, keepdim=True)
        products.append((output @ image_output.transpose(1, 2))[0].reshape(3, 3, 5))
        if not is_last:
            gate, shift, scale, last_gate = (part[:, None] for part in parts)
            concepts = concepts + gate * attended
            flat = block.norm2_context(concepts) * (1 + scale) + shift
            concepts = concepts + last_gate * block.ff_context(flat)
    return products


@pytest.fixture(scope="module")
def products(kind, folder):
    return {timestep: plain_products(kind, folder, timestep) for timestep in TIMESTEPS}


def test_concept_maps_are_those_of_plain_blocks(kind, scorer, products):
    for layers, kept in ((None, slice(None)), (["transformer_blocks.1"], slice(1, 2))):
        maps = scorer.word_maps(
            picture(*SIZE),
            TEXT,
            CONCEPTS,
            preset="concept-attention",
            layers=layers or "all",
            timesteps=TIMESTEPS,
        )
        ours = torch.stack([torch.as_tensor(maps[concept].array) for concept in CONCEPTS])
        each = [one.softmax(dim=0) for t in TIMESTEPS for one in products[t][kept]]
        theirs = torch.stack(each).mean(dim=0)
        assert (ours - theirs).abs().max() < 1e-6
        assert (theirs - 1 / 3).abs().max() > 1e-3  # concepts differ


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_maps_in_half_precision_are_those_of_float32(kind, folder, dtype):
    half = CrossAttnScorer.from_pretrained(
        folder, preset="self-bench", size=SIZE, dtype=dtype, device="cpu"
    )
    maps = half.word_maps(
        picture(*SIZE),
        TEXT,
        CONCEPTS,
        preset="concept-attention",
        layers="all",
        timesteps=TIMESTEPS,
    )
    ours = torch.stack([torch.as_tensor(maps[concept].array) for concept in CONCEPTS])
    every = [one for t in TIMESTEPS for one in plain_products(kind, folder, t, dtype)]
    theirs = torch.stack([one.softmax(dim=0) for one in every]).mean(dim=0)
    # What tells concepts apart went through some thirty rounded operations in three blocks: if all
    # roundings pointed the same way, it would move by 32 units, 1.6 % in float16, 12.5 in bfloat16.
    apart = (theirs - 1 / 3).abs().max()
    assert (ours - theirs).abs().max() < 32 * torch.finfo(dtype).eps / 2 * apart


def test_concepts_beyond_float16_are_cut_off_as_the_texts_stream_is():
    pipe = dit_builders.flux_pipeline()
    block = pipe.transformer.transformer_blocks[0]
    with torch.no_grad():  # a gate of 100 on 1000 and -1000
        block.norm1_context.linear.bias.chunk(6)[5].fill_(100.0)
        block.ff_context.net[2].bias.copy_(1e3 * (-1.0) ** torch.arange(32))
    shares = []
    for dtype in (torch.float32, torch.float16):
        scorer = CrossAttnScorer.from_pretrained(pipe, preset="self-bench", size=SIZE, dtype=dtype)
        options = {"preset": "concept-attention", "layers": "all", "timesteps": (515,)}
        maps = scorer.word_maps(picture(*SIZE), TEXT, CONCEPTS, **options)
        shares.append(torch.stack([torch.as_tensor(maps[word].array) for word in CONCEPTS]))
    assert (shares[0] - shares[1]).abs().max() < 1e-2


def test_concepts_leave_the_pass_as_it_is(kind, scorer):
    backbone = scorer.backbone
    embeds = backbone.embed([TEXT], size=SIZE)
    latents = torch.randn(1, 16, 6, 10, generator=torch.manual_seed(0))
    names = ["transformer_blocks.0", "transformer_blocks.1.attn", "transformer_blocks.1"]
    counted = []

    def read(around):
        taps = ForwardTaps(backbone.transformer, names)
        with torch.no_grad(), taps:
            around(lambda: backbone.denoise(latents, 515, embeds))
        return [taps[name] for name in names]

    def beside(call):
        concepts = backbone.concepts(CONCEPTS, size=SIZE)
        layers = ["transformer_blocks.0", "transformer_blocks.1"]
        with ConceptTaps(backbone.transformer, layers, concepts) as reader:
            counted.append({name: maps.shape for name, maps in reader.run(call).items()})

    for plain, with_concepts in zip(read(lambda call: call()), read(beside), strict=True):
        assert torch.equal(plain, with_concepts)
    assert counted == [{f"transformer_blocks.{block}.attn": (1, 3, 3, 5) for block in (0, 1)}]
    assert not any(module._forward_hooks for module in backbone.transformer.modules())
    assert not any(module._forward_pre_hooks for module in backbone.transformer.modules())


def test_concepts_share_cells_and_attend_to_each_other(scorer):
    options = {"preset": "concept-attention", "layers": "all", "timesteps": (515,)}
    with_red = scorer.word_maps(picture(*SIZE), "", ["photo", "red"], **options)
    with_blue = scorer.word_maps(picture(*SIZE), "", ["photo", "blue"], **options)
    first, second = (torch.as_tensor(maps["photo"].array) for maps in (with_red, with_blue))
    assert not agree(first, second)
    for maps in (with_red, with_blue):
        assert abs(sum(maps[word].array for word in maps) - 1).max() < 1e-6


def test_each_concept_is_read_by_its_first_token(kind, scorer):
    backbone = scorer.backbone
    concepts = backbone.concepts(["star", "red"], size=SIZE)  # of four tokens, and of one
    if kind in ("flux", "schnell"):
        expected = [backbone.embed([c], size=SIZE).prompt_embeds[0, 0] for c in ("star", "red")]
    else:
        joined = backbone.embed(["star red"], size=SIZE).prompt_embeds[0]
        expected = [joined[0], joined[1], joined[5]]
        with pytest.raises(PromptError, match="80 tokens together, and CLIP reads 75"):
            backbone.concepts(["star"] * 20, size=SIZE)
    assert torch.equal(concepts.states, torch.stack(expected))


def test_the_preset_of_flux_reads_four_blocks_and_ends_behind_them():
    pipe = dit_builders.flux_pipeline(num_layers=19, num_single_layers=1)
    scorer = CrossAttnScorer.from_pretrained(pipe, preset="self-bench", size=SIZE)
    late = Inputs(scorer.backbone.transformer.single_transformer_blocks[0])
    ours = scorer.word_maps(picture(*SIZE), TEXT, CONCEPTS, preset="concept-attention")
    assert not hasattr(late, "last")
    same = scorer.word_maps(
        picture(*SIZE),
        TEXT,
        CONCEPTS,
        preset="concept-attention",
        layers=[f"transformer_blocks.{block}" for block in (15, 16, 17, 18)],
        timesteps=(500,),
    )
    other = scorer.word_maps(
        picture(*SIZE), TEXT, CONCEPTS, preset="concept-attention", timesteps=(515,)
    )
    assert (ours["red"].array == same["red"].array).all()
    assert (ours["red"].array != other["red"].array).any()


def test_what_is_no_concept_map_is_refused(kind, scorer):
    def call(concepts=CONCEPTS, **options):
        options = {"preset": "concept-attention", "layers": "all", **options}
        scorer.word_maps(picture(*SIZE), TEXT, concepts, **options)

    for concepts in (["photo"], ["photo", " "]):
        with pytest.raises(PromptError, match="two or more, none of them blank"):
            call(concepts)
    with pytest.raises(ConfigError, match="leave heads out"):
        call(heads=[0])
    if kind in ("flux", "schnell"):
        with pytest.raises(TapError, match="whose text has weights of its own"):
            call(layers="single_transformer_blocks.0")
    else:
        with pytest.raises(TapError, match=r"transformer_blocks\.7"):
            call(layers="transformer_blocks.7")


def test_fused_projections_are_refused(kind, folder):
    if kind == "sd3.5":
        pytest.skip("diffusers itself cannot run second attentions that are fused")
    own = CrossAttnScorer.from_pretrained(folder, preset="self-bench", size=SIZE)
    own.backbone.transformer.fuse_qkv_projections()
    with pytest.raises(TapError, match="unfuse_qkv_projections"):
        own.word_maps(picture(*SIZE), TEXT, CONCEPTS, preset="concept-attention", layers="all")


def test_models_with_cross_attention_have_words_and_no_concepts():
    scorer = CrossAttnScorer.from_pretrained("shapes")
    with pytest.raises(ConfigError, match="is defined for 'flux' and 'sd3', and this model"):
        scorer.word_maps(picture(64, 64), TEXT, CONCEPTS, preset="concept-attention")
    with pytest.raises(ConfigError, match="models that join picture and text"):
        scorer.backbone.concepts(CONCEPTS, size=(64, 64))
