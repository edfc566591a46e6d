"""The two kinds of denoiser that the miniature world has: a U-Net and a transformer.

Both read the same latents and texts. A kind says how its model is made from nothing, how it is
called, what it predicts, and which of its cross-attentions the grounding loss teaches.

The transformer predicts the latents without noise, which are simpler than noise (Li and He 2025,
arXiv:2511.13720). It sees four cells as one token and learns slowly: after 500 steps of 48 rows,
taught by the U-Net of `shapes`, it was 1.4 to 9 times as far from that U-Net as the U-Net from the
noise, the less noise the farther, and its predictions hardly depended on the text. Predicting the
noise it was no better.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel, UNet2DConditionModel
from grounding import GROUNDED_LAYERS
from torch import Tensor, nn

TEXT_WIDTH = 128


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of denoiser.

    Attributes:
        part: Name of its folder in a model.
        build: Function that makes one with fresh weights, for latents of some side.
        load: Function that reads one from a folder.
        call: Function that gives what a model predicts (b 4 h w) of noisy latents, timesteps (b),
            text states (b l c) and which tokens are a text's own (b l).
        predicts: "epsilon" is the noise, "sample" the latents without it.
        grounded: Modules whose cross-attentions the grounding loss teaches.
    """

    part: str
    build: Callable[[int], Any]
    load: Callable[[Path], Any]
    call: Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]
    predicts: str
    grounded: tuple[str, ...]

    def noise(
        self, model: Any, noisy: Tensor, timesteps: Tensor, states: Tensor, own: Tensor
    ) -> Tensor:
        """The noise by what a model predicts."""
        predicted = self.call(model, noisy, timesteps, states, own)
        if self.predicts == "epsilon":
            return predicted
        signal = SIGNAL[timesteps].view(-1, 1, 1, 1)
        noise: Tensor = (noisy - signal.sqrt() * predicted) / (1 - signal).sqrt()
        return noise


def build_scheduler(predicts: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=predicts,
    )


SIGNAL = build_scheduler().alphas_cumprod


def build_unet(side: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 8),
        norm_num_groups=8,
        use_linear_projection=True,
    )


def build_transformer(side: int) -> PixArtTransformer2DModel:
    """One that begins as the identity: its gates and its output are closed, as in DiT."""
    model = PixArtTransformer2DModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        num_attention_heads=5,
        attention_head_dim=32,
        num_layers=8,
        cross_attention_dim=160,
        caption_channels=TEXT_WIDTH,
        patch_size=2,
        norm_num_groups=8,
        use_additional_conditions=False,
    )
    for layer in (model.adaln_single.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
        nn.init.zeros_(block.attn2.to_out[0].bias)
    return model


def call_unet(
    unet: UNet2DConditionModel, noisy: Tensor, timesteps: Tensor, states: Tensor, own: Tensor
) -> Tensor:
    """Stable Diffusion lets every token of a padded text be seen."""
    predicted: Tensor = unet(noisy, timesteps, states).sample
    return predicted


def call_transformer(
    model: PixArtTransformer2DModel, noisy: Tensor, timesteps: Tensor, states: Tensor, own: Tensor
) -> Tensor:
    """PixArt sees a text's own tokens only."""
    predicted: Tensor = model(
        noisy,
        encoder_hidden_states=states,
        encoder_attention_mask=own.to(noisy.dtype),
        timestep=timesteps.expand(len(noisy)),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    return predicted


def own_tokens(ids: Tensor) -> Tensor:
    """Which ids (b l) are a text's own: those up to its end token, which pads as well."""
    end = ids[:, -1:]
    before: Tensor = (ids == end).cumsum(dim=1) - (ids == end).int()
    return before == 0


def taught_by(folder: Path) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """What the trained U-Net of a model predicts."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float().eval()
    unet.requires_grad_(False)
    return torch.no_grad()(partial(call_unet, unet))


KINDS = {
    "unet": Kind(
        "unet",
        build_unet,
        UNet2DConditionModel.from_pretrained,
        call_unet,
        "epsilon",
        GROUNDED_LAYERS,
    ),
    "transformer": Kind(
        "transformer",
        build_transformer,
        PixArtTransformer2DModel.from_pretrained,
        call_transformer,
        "sample",
        tuple(f"transformer_blocks.{index}" for index in (3, 4, 5)),
    ),
}
