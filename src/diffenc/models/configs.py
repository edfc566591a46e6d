"""Architectures of the known models, as their own config files state them.

They let taps, shapes and parameter counts be told before any weight is loaded, and real-size models
be built for benchmarks without a download.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffenc.denoiser.transformers import layout_of
from diffenc.models.denoisers import patch_of
from diffenc.models.family_files import FAMILY_FILES, family_of_configs
from diffenc.models.presets import preset_options
from diffenc.models.taps import TapInfo, denoiser_taps, match_taps

_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
_OPENCLIP_H = {
    **_CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # of 24: SD 2 reads the states before the last layer
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_OPENCLIP_BIG_G = {
    **_CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}


def _vae(sample_size: int, scaling_factor: float, *, force_upcast: bool) -> dict[str, Any]:
    return {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
        "force_upcast": force_upcast,
    }


def _sd_unet(sample_size: int, cross_attention_dim: int, **options: Any) -> dict[str, Any]:
    return {
        "sample_size": sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "cross_attention_dim": cross_attention_dim,
        **options,
    }


_SD2_HEADS = {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}

_ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    "sd1.5": {
        "unet": _sd_unet(64, 768, attention_head_dim=8),
        "vae": _vae(512, 0.18215, force_upcast=False),
        "text_encoder": _CLIP_L,
        "scheduler": {**_SCHEDULE, "prediction_type": "epsilon"},
    },
    "sd2.1-base": {
        "unet": _sd_unet(64, 1024, **_SD2_HEADS),
        "vae": _vae(512, 0.18215, force_upcast=False),
        "text_encoder": _OPENCLIP_H,
        "scheduler": {**_SCHEDULE, "prediction_type": "epsilon"},
    },
    "sd2.1": {
        "unet": _sd_unet(96, 1024, upcast_attention=True, **_SD2_HEADS),
        "vae": _vae(768, 0.18215, force_upcast=False),
        "text_encoder": _OPENCLIP_H,
        "scheduler": {**_SCHEDULE, "prediction_type": "v_prediction"},
    },
    "sdxl": {
        "unet": {
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10],
            "norm_num_groups": 32,
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": _vae(1024, 0.13025, force_upcast=True),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPENCLIP_BIG_G,
        "scheduler": {**_SCHEDULE, "prediction_type": "epsilon"},
    },
}

# What the parts of the transformers share.
_T5_XXL = {
    "model_type": "t5",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}

_ARCHITECTURES["pixart-sigma"] = {
    "transformer": {
        "_class_name": "PixArtTransformer2DModel",
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "sample_size": 128,
        "patch_size": 2,
        "interpolation_scale": 2,
        "use_additional_conditions": False,
    },
    "vae": _vae(1024, 0.13025, force_upcast=True),
    "text_encoder": _T5_XXL,
    "scheduler": {
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
    },
}
_ARCHITECTURES["sana"] = {
    "transformer": {
        "_class_name": "SanaTransformer2DModel",
        "in_channels": 32,
        "out_channels": 32,
        "num_attention_heads": 70,
        "attention_head_dim": 32,
        "num_layers": 20,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
        "caption_channels": 2304,
        "sample_size": 32,
        "patch_size": 1,
    },
    "vae": {
        "_class_name": "AutoencoderDC",
        "latent_channels": 32,
        "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
        "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
        "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "upsample_block_type": "interpolate",
        "downsample_block_type": "conv",
        "scaling_factor": 0.41407,
    },
    "text_encoder": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
    },
    "scheduler": {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
    },
}

_ARCHITECTURES["sd3.5-medium"] = {
    "transformer": {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
        "qk_norm": "rms_norm",
    },
    "vae": {
        **_vae(1024, 1.5305, force_upcast=True),
        "latent_channels": 16,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": _CLIP_L,
    "text_encoder_2": _OPENCLIP_BIG_G,
    "text_encoder_3": _T5_XXL,
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
    },
}

_FLUX = {
    "transformer": {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
        "axes_dims_rope": [16, 56, 56],
    },
    "vae": {
        **_ARCHITECTURES["sd3.5-medium"]["vae"],
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    "text_encoder": _CLIP_L,
    "text_encoder_2": _T5_XXL,
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 1.0,
    },
}
_ARCHITECTURES["flux-schnell"] = _FLUX
_ARCHITECTURES["flux-dev"] = {
    **_FLUX,
    "transformer": {**_FLUX["transformer"], "guidance_embeds": True},
    "scheduler": {**_FLUX["scheduler"], "shift": 3.0},
}


def vae_reduction(config: Mapping[str, Any]) -> int:
    """Image pixels per latent cell of a VAE, by its config."""
    widths = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return int(2 ** (len(widths) - 1))


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a model's configs tell, without its weights.

    Attributes:
        configs: Config of each part (vae, text_encoder ..., scheduler, and unet or transformer), as
            JSON holds it.
        own_taps: Taps that the encoder reads by default; None takes those of the family's "gdf"
            preset.
        own_family: Family, where its components do not tell it; None takes that of the components.
    """

    configs: dict[str, dict[str, Any]]
    own_taps: tuple[str, ...] | None = None
    own_family: str | None = None

    @property
    def family(self) -> str:
        """Family that it is shaped like, such as "sd" or "sdxl"."""
        return self.own_family or family_of_configs(self.configs)

    @property
    def reduction(self) -> int:
        """Image pixels per latent cell."""
        return vae_reduction(self.configs["vae"])

    @property
    def denoiser(self) -> str:
        """Name of the part that is read: "unet" or "transformer"."""
        return FAMILY_FILES[self.family].denoiser

    @property
    def denoiser_config(self) -> dict[str, Any]:
        """Config of the part that is read."""
        return self.configs[self.denoiser]

    @property
    def joins_text(self) -> bool:
        """Whether picture and text are joined in one attention, so that there is none across."""
        layout = layout_of(self.denoiser_config)
        return layout is not None and layout.cross_attention is None

    @property
    def multiple(self) -> int:
        """Image pixels that both sides of a picture are multiples of."""
        return self.reduction * patch_of(self.denoiser_config)

    @property
    def default_size(self) -> int:
        """Side of the square that images are brought to: 512 pixels, or less for a small U-Net."""
        side = self.denoiser_config.get("sample_size") or 64
        return min(512, (min(side) if isinstance(side, list) else int(side)) * self.reduction)

    @property
    def default_taps(self) -> tuple[str, ...]:
        """Module paths of the denoiser: of a transformer, the block at half its depth."""
        if self.own_taps is not None:
            return self.own_taps
        if (layout := layout_of(self.denoiser_config)) is not None:
            middle = layout.depth(self.denoiser_config) // 2
            return (layout.block(self.denoiser_config, middle),)
        taps: tuple[str, ...] = preset_options("gdf", self.family)["taps"]
        return taps

    def taps(self) -> tuple[TapInfo, ...]:
        """Every readable place of the denoiser."""
        return denoiser_taps(self.denoiser_config, self.reduction)

    def match_taps(self, patterns: Sequence[str]) -> tuple[TapInfo, ...]:
        """The places that module paths or globs name, see `diffenc.match_taps`."""
        return match_taps(patterns, self.taps())


def known_architecture(alias: str) -> Architecture | None:
    """Configs of an alias whose weights lie on the Hub; None for any other name."""
    configs = _ARCHITECTURES.get(alias)
    return None if configs is None else Architecture(configs)
