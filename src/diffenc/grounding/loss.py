"""Two losses of one pass of a denoiser: of the noise, and of where the words of texts are seen."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc.checks.arguments import flag, wholes
from diffenc.denoiser.attention import CrossAttnTaps
from diffenc.denoiser.grounding import share_outside
from diffenc.denoiser.hooks import ForwardTaps
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError
from diffenc.inputs.latents import draw_latents
from diffenc.inputs.noise import add_noise, denoising_target
from diffenc.passes.encoded import image_keys, posterior_of, prompts_of
from diffenc.passes.forward import check_whole
from diffenc.passes.word_tokens import word_layers
from diffenc.runtime.inference import make_plain

TIMESTEPS = (0, 400)
"""Steps from which the noise of a picture is drawn: features are read at little noise, and where
there is much, a picture does not show where anything is."""

LEAST_SIDE = 8
"""Cells along the sides of maps that count by default: coarser ones do not tell things apart."""


class GroundingTerms(NamedTuple):
    """Losses of a batch.

    Attributes:
        outside: Mean squared share of the words' attention that lies outside what they name, from 0
            to 1.
        denoising: Mean squared error of what the denoiser predicts; 0 where it is not asked.
    """

    outside: Float[Tensor, ""]
    denoising: Float[Tensor, ""]


class Grounding:
    """How far the attention of an encoder's denoiser to words lies outside what they name.

    Batches come from `collate_phrases`. What trains is the encoder's: `add_lora` first. A gradient
    of either loss reaches it and nothing else.

    Args:
        encoder: Encoder whose denoiser attends to texts by cross-attention.
        layers: Cross-attentions whose maps count, see `diffenc.denoiser.attention.match_layers`.
            None takes those that word tokens are gathered by, of the decoder, as far as the taps
            depend on it, and of these the ones whose maps have 8 x 8 cells or more.
        timesteps: First scheduler step that noise is drawn from, and the one behind the last.
        denoise: Whether the denoiser's prediction is compared with the noise that was added, which
            keeps a LoRA from unlearning pictures. Otherwise the pass ends after the last layer.

    Raises:
        ConfigError: The model joins picture and text in one attention, or was truncated and shall
            predict noise; or steps outside of its schedule.
        TapError: No cross-attention by that name.

    Examples:
        >>> from diffenc.grounding import Grounding
        >>> encoder = DiffusionEncoder.from_pretrained("shapes")
        >>> encoder.add_lora(rank=4)
        >>> grounding = Grounding(encoder)
    """

    def __init__(
        self,
        encoder: DiffusionEncoder,
        *,
        layers: "str | Sequence[str] | None" = None,
        timesteps: tuple[int, int] = TIMESTEPS,
        denoise: bool = True,
    ) -> None:
        backbone = encoder.backbone
        if backbone.joins_text:
            raise ConfigError(
                f"grounding teaches maps of cross-attention, and {backbone.name!r} joins picture "
                "and text in one attention; take a model with cross-attention: Stable Diffusion "
                "1.5, 2.1 or XL, PixArt or Sana"
            )
        self.encoder = encoder
        self.denoise = flag("denoise", denoise)
        if denoise:
            check_whole(backbone)
        taps = [tap.name for tap in encoder.feature_info]
        self.layers = word_layers(backbone, taps, layers)
        self._least = 0 if layers is not None else LEAST_SIDE
        first, behind = wholes("timesteps", timesteps)
        if not 0 <= first < behind <= len(backbone.noise_levels):
            raise ConfigError(
                f"timesteps must be two steps of [0, {len(backbone.noise_levels)}], the first "
                f"below the second, got {list(timesteps)}"
            )
        self.timesteps = (first, behind)

    def __call__(
        self,
        pixel_values: Float[Tensor, "b 3 height width"],
        texts: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        noise_seeds: Sequence[int],
        positions: Sequence[int],
        masks: Float[Tensor, "b tokens h w"],
        weights: Float[Tensor, "b tokens"],
        whole: Float[Tensor, " b"],
    ) -> GroundingTerms:
        """Losses of a batch of `collate_phrases`.

        Args:
            pixel_values: Pictures in RGB, in [-1, 1].
            texts: Text of each picture.
            sizes: (height, width) of each picture before it was resized, for SDXL.
            noise_seeds: Seed of each picture's noise and noise level.
            positions: Positions of the tokens that name something in any of the texts.
            masks: Share of each cell that is covered by what a token names.
            weights: How much each token counts.
            whole: 1 for a picture that was read, 0 for one that is blank.
        """
        encoder, backbone = self.encoder, self.encoder.backbone
        config, device = encoder.config, backbone.device
        size = (pixel_values.shape[2], pixel_values.shape[3])
        with backbone.lock, torch.no_grad():
            keys = image_keys(pixel_values) if encoder.use_cache else None
            mode, deviation = posterior_of(
                backbone, pixel_values, keys=keys, batch_size=config.batch_size
            )
            embeds = prompts_of(
                backbone,
                texts,
                size=size,
                uncond=config.uncond,
                long_prompts=config.long_prompts,
                use_cache=encoder.use_cache,
            )
        if config.original_size is not None:
            same: list[Any] = [config.original_size] * len(texts)
            own = list(sizes) if config.original_size == "image" else same
            embeds = embeds.with_original_sizes(own)
        latents = draw_latents(mode, deviation, config.posterior, seed=config.seed)
        noise, timesteps = self._drawn(noise_seeds, latents)
        rows = zip(latents.split(1), noise.split(1), timesteps.tolist(), strict=True)
        noisy = torch.cat([add_noise(backbone.scheduler, *row) for row in rows])
        make_plain(backbone.denoiser)  # moved in inference mode, weights could not be saved for it
        with ExitStack() as stack:
            stack.enter_context(backbone.lock)
            taps = stack.enter_context(
                CrossAttnTaps(backbone.denoiser, self.layers, tokens=positions)
            )
            if self.denoise:
                predicted = backbone.denoise(noisy, timesteps, embeds)[0].float()
            else:
                reader = ForwardTaps(backbone.denoiser, self.layers, early_exit=True)
                stack.enter_context(reader)
                reader.run(lambda: backbone.denoise(noisy, timesteps, embeds))
            maps = taps.maps()
        fine = {name: each for name, each in maps.items() if min(each.shape[-2:]) >= self._least}
        maps = fine or maps
        outside = share_outside(maps, masks.to(device), weights.to(device))
        if not self.denoise:
            return GroundingTerms(outside, torch.zeros_like(outside))
        target = denoising_target(
            backbone.scheduler, backbone.prediction_type, latents, noise, timesteps
        )
        errors = (predicted - target.to(predicted)).square().mean(dim=(1, 2, 3))
        counts = whole.to(device)
        return GroundingTerms(outside, (errors * counts).sum() / counts.sum().clamp(min=1))

    def _drawn(self, seeds: Sequence[int], latents: Tensor) -> tuple[Tensor, Tensor]:
        """Noise like some latents, and a noise level for each row."""
        noise, timesteps = [], []
        for seed in seeds:
            generator = torch.Generator("cpu").manual_seed(seed)
            drawn: Any = torch.randint(
                *self.timesteps, (), generator=generator, dtype=torch.long, device="cpu"
            )
            timesteps.append(drawn)
            noise.append(
                torch.randn(
                    latents.shape[1:], generator=generator, dtype=torch.float32, device="cpu"
                )
            )
        return torch.stack(noise).to(latents), torch.stack(timesteps)
