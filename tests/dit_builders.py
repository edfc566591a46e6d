"""Tiny random folders of the families of diffusion transformers, equal on every run.

Classes, tokens, schedules and factors are those of the published models; widths and depths are not.
"""

import inspect
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from builders import WORDS, seeded, tiny_tokenizer

SANA_OPTIONS = inspect.signature(SanaTransformer2DModel.__init__).parameters
"""Those that diffusers knows: 0.32 has neither a factor of times nor norms of queries and keys."""
SANA_TIME_SCALE = 0.5 if "timestep_scale" in SANA_OPTIONS else 1.0
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'"


def tiny_t5_tokenizer() -> T5TokenizerFast:
    """A tokenizer like T5's that keeps `WORDS` whole and spells any other word."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -8.0) for letter in LETTERS]
    pieces += [("▁" + word, -1.0) for word in WORDS]
    core = Tokenizer(Unigram(pieces, unk_id=2))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(tokenizer_object=core, vocab=pieces, extra_ids=0, model_max_length=512)


def tiny_t5(width: int = 16) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tiny_t5_tokenizer()),
        d_model=width,
        d_kv=4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return seeded(lambda: T5EncoderModel(config))


def tiny_kl(channels: int = 4, **options: Any) -> AutoencoderKL:
    """A VAE with 8 pixels per cell."""
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(4, 4, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=channels,
            sample_size=64,
            **options,
        )
    )


def pixart_pipeline(**options: Any) -> PixArtSigmaPipeline:
    """A PixArt-Σ of four blocks for pictures of 64 pixels."""
    transformer = seeded(
        lambda: PixArtTransformer2DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_layers": 4,
                "cross_attention_dim": 32,
                "caption_channels": 16,
                "sample_size": 8,
                "norm_num_groups": 4,
                "interpolation_scale": 2,
                "use_additional_conditions": False,
                **options,
            }
        )
    )
    return PixArtSigmaPipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=tiny_t5(),
        vae=tiny_kl(scaling_factor=0.13025),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
        ),
    )


def save_pixart(folder: Path, **options: Any) -> Path:
    """Write a PixArt-Σ pipeline to `folder`."""
    pixart_pipeline(**options).save_pretrained(folder)
    return folder


def tiny_gemma_tokenizer() -> GemmaTokenizerFast:
    """A tokenizer like Gemma's: a start and no end, spaces within the pieces, by letters."""
    names = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁")
    vocab = {piece: index for index, piece in enumerate((*names, *LETTERS))}
    core = Tokenizer(BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    blanks = decoders.Replace("▁", " ")
    core.decoder = decoders.Sequence([blanks, decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = GemmaTokenizerFast(
        tokenizer_object=core, vocab=vocab, merges=[], model_max_length=512
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return tokenizer


def sana_pipeline(**options: Any) -> SanaPipeline:
    """A Sana of three blocks on a VAE with 8 pixels per cell."""
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    transformer = seeded(
        lambda: SanaTransformer2DModel(
            **{
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 4,
                "attention_head_dim": 8,
                "num_layers": 3,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 16,
                "cross_attention_dim": 32,
                "caption_channels": 16,
                "sample_size": 8,
                **({"timestep_scale": SANA_TIME_SCALE} if SANA_TIME_SCALE != 1.0 else {}),
                **options,
            }
        )
    )
    widths = (4, 4, 8, 8)
    vae = seeded(
        lambda: AutoencoderDC(
            latent_channels=4,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            encoder_qkv_multiscales=((),) * 4,
            decoder_qkv_multiscales=((),) * 4,
            scaling_factor=0.41407,
        )
    )
    return SanaPipeline(
        tokenizer=tiny_gemma_tokenizer(),
        text_encoder=seeded(lambda: Gemma2Model(config)),
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def sd3_pipeline(*, dual: bool = True, num_layers: int = 3) -> StableDiffusion3Pipeline:
    """An SD 3.5 of three blocks, or an SD 3 without its norms and second attentions."""

    def clip(act: str, pad: str) -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
        tokenizer = tiny_tokenizer(pad_token=pad)
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=16,
            projection_dim=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            hidden_act=act,
            bos_token_id=0,
            eos_token_id=2,
        )
        return seeded(lambda: CLIPTextModelWithProjection(config)), tokenizer

    transformer = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=num_layers,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            pos_embed_max_size=12,
            dual_attention_layers=(0, 1) if dual else (),
            qk_norm="rms_norm" if dual else None,
        )
    )
    (first, words), (second, more_words) = clip("quick_gelu", "<|endoftext|>"), clip("gelu", "!")
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_kl(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False),
        text_encoder=first,
        tokenizer=words,
        text_encoder_2=second,
        tokenizer_2=more_words,
        text_encoder_3=tiny_t5(24),
        tokenizer_3=tiny_t5_tokenizer(),
    )


def flux_pipeline(*, guidance: bool = True, **options: Any) -> FluxPipeline:
    """A FLUX.1 of two dual and three single blocks; dev, or schnell without guidance."""
    tokenizer = tiny_tokenizer(pad_token="<|endoftext|>")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=2,
    )
    transformer = seeded(
        lambda: FluxTransformer2DModel(
            **{
                "patch_size": 1,
                "in_channels": 64,
                "num_layers": 2,
                "num_single_layers": 3,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 24,
                "pooled_projection_dim": 8,
                "guidance_embeds": guidance,
                "axes_dims_rope": (4, 6, 6),
                **options,
            }
        )
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
        vae=tiny_kl(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False),
        text_encoder=seeded(lambda: CLIPTextModel(config)),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(24),
        tokenizer_2=tiny_t5_tokenizer(),
    )


PIPELINES = {
    "pixart": pixart_pipeline,
    "sana": sana_pipeline,
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
}
"""Builder of each family's pipeline."""
