"""Whatever a result depends on may change between two calls: the second is as if it were the first.

Every change is made to a model whose caches are warm. The answer is compared bit by bit with that
of an encoder or a scorer which never remembers anything.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional

import builders
from diffenc import CrossAttnScorer, DiffusionEncoder
from diffenc.config import EncoderConfig
from diffenc.hosts.prompts import embed_tokens, tokenize_prompts
from diffenc.models.sd import StableDiffusion
from state_builders import SIZE, TAPS, TEXT, picture, stirred, tiny_backbone


@pytest.fixture(scope="module")
def original() -> StableDiffusion:
    return tiny_backbone()


@pytest.fixture
def backbone(original) -> StableDiffusion:
    return copy.deepcopy(original)


# What users ask of a model


def ask_guided(backbone: StableDiffusion, use_cache: bool) -> Callable[[], list[Tensor]]:
    encoder = DiffusionEncoder(backbone, use_cache=use_cache)

    def ask() -> list[Tensor]:
        return list(encoder.extract(picture(), TEXT, conditioning="cfg").values())

    return ask


def ask_reused(backbone: StableDiffusion, use_cache: bool) -> Callable[[], list[Tensor]]:
    config = EncoderConfig(taps=TAPS[1:], reuse="middle")
    encoder = DiffusionEncoder(backbone, config, use_cache=use_cache)

    @torch.no_grad()  # a gradient is refused, and some changes ask for one
    def ask() -> list[Tensor]:
        return list(encoder.extract(picture(), TEXT).values())

    return ask


def ask_exact(backbone: StableDiffusion, use_cache: bool) -> Callable[[], list[Tensor]]:
    scorer = CrossAttnScorer.from_pretrained(
        backbone, preset="paper", use_cache=use_cache, timesteps=(300,)
    )
    return lambda: [scorer(picture(), [TEXT])]


def ask_shared(backbone: StableDiffusion, use_cache: bool) -> Callable[[], list[Tensor]]:
    scorer = CrossAttnScorer.from_pretrained(
        backbone, preset="paper", use_cache=use_cache, timesteps=(300,), mode="shared-query"
    )
    return lambda: [scorer(picture(), [TEXT])]


def ask_tokens(backbone: StableDiffusion, use_cache: bool) -> Callable[[], list[Tensor]]:
    """As a tower does, whose prompts come as token ids; none of them changes but their number."""
    tokenizer = builders.tiny_tokenizer()

    def ask() -> list[Tensor]:
        tokenizer.model_max_length = backbone.tokenizer.model_max_length
        tokens = tokenize_prompts(tokenizer, [TEXT, ""])
        embeds = embed_tokens(backbone, tokens, size=(SIZE, SIZE), use_cache=use_cache)
        return [embeds.prompt_embeds]

    return ask


ENTRIES = [ask_guided, ask_reused, ask_exact, ask_shared, ask_tokens]


# What users do to a model


def another_unet(backbone):
    backbone.unet = stirred(backbone.unet)


def another_vae(backbone):
    backbone.vae = stirred(backbone.vae)


def another_text_encoder(backbone):
    backbone.text_encoder = stirred(backbone.text_encoder)


def another_scheduler(backbone):
    backbone.scheduler = DDPMScheduler(beta_end=0.01)


def another_tokenizer(backbone):
    backbone.tokenizer = builders.tiny_tokenizer(pad_token="!")


def another_block(backbone):
    backbone.unet.mid_block = stirred(backbone.unet.mid_block)


def assigned_weights(backbone):
    backbone.unet.load_state_dict(stirred(backbone.unet).state_dict(), assign=True)
    backbone.unet.requires_grad_(False)


def assigned_text_weights(backbone):
    other = stirred(backbone.text_encoder).state_dict()
    backbone.text_encoder.load_state_dict(other, assign=True)
    backbone.text_encoder.requires_grad_(False)


def there_and_back(part):
    def rounded(backbone):
        getattr(backbone, part).to(torch.bfloat16).to(torch.float32)

    rounded.__name__ = f"rounded_{part}"
    return rounded


def exchanged_storage(backbone):
    weight = backbone.unet.conv_in.weight
    weight.data = weight.data * 1.5


def transposed_storage(backbone):
    weight = backbone.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    weight.data = weight.data.t()


def exchanged_parameter(backbone):
    vae = backbone.vae
    vae.quant_conv.bias = nn.Parameter(vae.quant_conv.bias + 1, requires_grad=False)


def written_in_place(backbone):
    with torch.no_grad():
        backbone.text_encoder.get_input_embeddings().weight.mul_(1.1)


def exchanged_buffer(backbone):
    embeddings = backbone.text_encoder.get_submodule(
        next(
            name
            for name, module in backbone.text_encoder.named_modules()
            if "position_ids" in module._buffers
        )
    )
    embeddings.position_ids = embeddings.position_ids.flip(1)


def written_buffer(backbone):
    buffer = next(backbone.text_encoder.buffers())
    buffer.copy_(buffer.flip(1))


def freeu(backbone):
    backbone.unet.enable_freeu(s1=0.5, s2=0.5, b1=1.9, b2=1.9)


class Doubled(AttnProcessor):
    factor = 2.0

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * self.factor


def another_processor(backbone):
    backbone.unet.set_attn_processor(Doubled())


def changed_processor(backbone):
    backbone.unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(Doubled())


def hook(backbone):
    backbone.unet.mid_block.register_forward_hook(lambda module, args, output: output * 2)


def early_hook(backbone):
    backbone.vae.encoder.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def patched_forward(backbone):
    forward = backbone.unet.mid_block.forward
    backbone.unet.mid_block.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 2


def another_class(backbone):
    block = backbone.unet.mid_block

    class Doubling(type(block)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 2

    block.__class__ = Doubling


def vae_scale(backbone):
    backbone.vae.register_to_config(scaling_factor=0.5)


def vae_scale_attribute(backbone):
    backbone.vae.config.scaling_factor = 0.5


def text_setting(backbone):
    for module in backbone.text_encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.5


def noise_levels(backbone):
    backbone.scheduler.alphas_cumprod[:] = backbone.scheduler.alphas_cumprod.square()


def noise_levels_behind_autograd(backbone):
    backbone.scheduler.alphas_cumprod.data.mul_(0.9)


def padding(backbone):
    backbone.tokenizer.pad_token = "!"


def shorter_prompts(backbone):
    backbone.tokenizer.model_max_length = 8


def added_tokens(backbone):
    backbone.tokenizer.add_tokens(["red circle"])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        backbone.text_encoder.resize_token_embeddings(len(backbone.tokenizer))
    backbone.text_encoder.requires_grad_(False)


def known_token_cut_out(backbone):
    backbone.tokenizer.add_tokens(["re"])  # it was there, and is cut out of "red" from now on


def attention_slices(backbone):
    backbone.unet.set_attention_slice("max")


def plain_processors(backbone):
    backbone.unet.set_attn_processor(AttnProcessor())


def fused_projections(backbone):
    backbone.vae.fuse_qkv_projections()


def vae_tiles(backbone):
    backbone.vae.enable_tiling()
    backbone.vae.tile_sample_min_size = 8
    backbone.vae.tile_latent_min_size = 4


def dropout(backbone):
    for module in backbone.unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
            module.train()


def other_rule(backbone):
    backbone.uncond_rule = "zeros"


def block_setting(backbone):
    backbone.unet.mid_block.resnets[0].output_scale_factor = 2.0


MUTATIONS = [
    another_unet,
    another_vae,
    another_text_encoder,
    another_scheduler,
    another_tokenizer,
    another_block,
    assigned_weights,
    assigned_text_weights,
    there_and_back("unet"),
    there_and_back("vae"),
    there_and_back("text_encoder"),
    exchanged_storage,
    transposed_storage,
    exchanged_parameter,
    written_in_place,
    exchanged_buffer,
    written_buffer,
    freeu,
    another_processor,
    changed_processor,
    hook,
    early_hook,
    patched_forward,
    another_class,
    vae_scale,
    vae_scale_attribute,
    text_setting,
    noise_levels,
    noise_levels_behind_autograd,
    padding,
    shorter_prompts,
    added_tokens,
    known_token_cut_out,
    attention_slices,
    plain_processors,
    fused_projections,
    vae_tiles,
    dropout,
    other_rule,
    block_setting,
]


@pytest.mark.filterwarnings("ignore:.*longer than the 8 tokens")
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_changed_model_answers_as_a_fresh_one(backbone, mutate):
    asks = [ask(backbone, True) for ask in ENTRIES]
    before = [ask() for ask in asks]
    mutate(backbone)
    differs = False
    for name, ask, old in zip(ENTRIES, asks, before, strict=True):
        torch.manual_seed(11)  # of dropout
        after = ask()
        torch.manual_seed(11)
        fresh = name(backbone, False)()
        for one, other in zip(after, fresh, strict=True):
            assert torch.equal(one, other), name.__name__
        differs |= any(
            one.shape != other.shape or not torch.equal(one, other)
            for one, other in zip(old, after, strict=True)
        )
    assert differs  # otherwise the test would show nothing


@pytest.mark.parametrize("ask", [ask_guided, ask_reused, ask_exact])
def test_another_attention_in_the_place_of_torchs_is_seen(backbone, monkeypatch, ask):
    """As programs do that bring kernels of their own."""
    known = ask(backbone, True)
    before = known()
    attend = functional.scaled_dot_product_attention
    larger = lambda *args, **options: attend(*args, **options) * 1.1  # noqa: E731
    monkeypatch.setattr(functional, "scaled_dot_product_attention", larger)
    for value, stale, true in zip(known(), before, ask(backbone, False)(), strict=True):
        torch.testing.assert_close(value, true, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(stale, true, atol=1e-5, rtol=1e-5)
