"""The bare floor: what has to be computed for the answer, called by hand and nothing else."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from diffenc.config import EncoderConfig
from diffenc.denoiser.blank_texts import skipping_blank_texts
from diffenc.denoiser.hooks import TapOutputs
from diffenc.denoiser.replay import record, replayed, text_free_prefix
from diffenc.denoiser.shortening import shortened
from diffenc.inputs.noise import shared_noise
from diffenc.models.base import Backbone
from speed.cases import Question

Maps = dict[str, Tensor]
Text = tuple[Tensor, Tensor | None]
"""States and, for SDXL, the pooled text."""


class Floor:
    """The text encoders, the VAE and the truncated U-Net, warm, in the memory format of `backbone`.

    Pixels, token ids and noise lie ready on the device; what a further question finds remembered
    (latents, the unconditional half, what runs before a text comes in) does too. A first question
    runs that part for both halves, which is what an answer in one call needs. Rows without a text
    skip cross-attention where diffenc's do.

    Args:
        backbone: Whose parts are called.
        config: What is read: "cfg" with one draw, or the mean over draws.
        taps: Module paths.
        again: Answer further questions on a picture.
    """

    name = "bare floor"
    exits = True

    def __init__(
        self, backbone: Backbone, config: EncoderConfig, taps: list[str], *, again: bool
    ) -> None:
        self.backbone, self.config, self.taps, self.again = backbone, config, taps, again
        self.parts: Mapping[str, nn.Module] = backbone.parts()
        self._short = shortened(backbone.unet, taps)
        self.unet = self._whole = TapOutputs(self._short, taps)
        self.device, self.dtype = backbone.device, backbone.dtype
        numbers = ("", "_2") if backbone.family == "sdxl" else ("",)
        self.towers: list[tuple[Any, Any]] = [
            (getattr(backbone, f"tokenizer{number}"), getattr(backbone, f"text_encoder{number}"))
            for number in numbers
        ]
        side = _side(config)
        self._time_ids = torch.tensor([[side, side, 0, 0, side, side]]).to(self.device, self.dtype)
        self.uncond = self._uncond()
        self.noise = self._draw(config.timesteps[0])
        self.samples = self._draw(-1)
        self._known: dict[int, tuple[Tensor, list[Tensor]]] = {}

    @torch.no_grad()
    def prepare(self, question: Question) -> Callable[[], Maps]:
        """Pixels and token ids; of a further question also what was computed for the first."""
        pixel_values = (question.images.float() / 127.5 - 1).to(self.device)
        ids = self._ids(question.prompts)
        if self.config.conditioning != "cfg":
            return lambda: self._average(pixel_values, ids)
        if not self.again:
            return lambda: self._first(pixel_values, ids)
        if question.picture not in self._known:
            latents = self._noised(self._encode(pixel_values)[0], self.noise)
            self.unet = self._whole
            known = self._pass(latents, [self.uncond], len(latents))
            self.unet = self._begun(latents)
            self._known = {question.picture: (latents, known)}
        return lambda: self._next(*self._known[question.picture], ids)

    def _begun(self, latents: Tensor) -> TapOutputs:
        """The U-Net with the outputs of what no text changes in place."""
        unet = self.backbone.unet
        paths = text_free_prefix(unet)
        if not paths:
            return self._whole
        outputs = record(unet, paths, lambda: self._pass(latents, [self.uncond], len(latents)))
        return TapOutputs(shortened(replayed(unet, outputs), self.taps), self.taps)

    @torch.no_grad()
    def _first(self, pixel_values: Tensor, ids: list[Tensor]) -> Maps:
        latents, rows = self._noised(self._encode(pixel_values)[0], self.noise), len(pixel_values)
        maps = self._pass(torch.cat([latents, latents]), [self.uncond, self._text(ids)], rows)
        halves = (rearrange(each, "(two b) c h w -> two b c h w", two=2) for each in maps)
        return {tap: self._guide(*half) for tap, half in zip(self.taps, halves, strict=True)}

    @torch.no_grad()
    def _next(self, latents: Tensor, known: list[Tensor], ids: list[Tensor]) -> Maps:
        maps = self._pass(latents, [self._text(ids)], len(latents))
        pairs = zip(self.taps, known, maps, strict=True)
        return {tap: self._guide(uncond, cond) for tap, uncond, cond in pairs}

    @torch.no_grad()
    def _average(self, pixel_values: Tensor, ids: list[Tensor]) -> Maps:
        mode, deviation = self._encode(pixel_values)
        latents = self._noised(mode + deviation * self.samples, self.noise)
        maps = self._pass(latents, [self._text(ids)], len(latents))
        return {tap: m.mean(dim=0, keepdim=True) for tap, m in zip(self.taps, maps, strict=True)}

    def _guide(self, uncond: Tensor, cond: Tensor) -> Tensor:
        return torch.lerp(uncond, cond, self.config.guidance_scale)

    def _encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.backbone.vae
        posterior = vae.encode(pixel_values.to(vae.dtype)).latent_dist
        scale = vae.config.scaling_factor
        # The U-Net would follow the memory format that the VAE's comes out in.
        mode, deviation = posterior.mean.float().contiguous(), posterior.std.float().contiguous()
        return mode * scale, deviation * scale

    def _noised(self, latents: Tensor, noise: Tensor) -> Tensor:
        signal = float(self.backbone.scheduler.alphas_cumprod[self.config.timesteps[0]])
        noisy: Tensor = (signal**0.5 * latents + (1 - signal) ** 0.5 * noise).to(self.dtype)
        return noisy

    def _pass(self, latents: Tensor, texts: Sequence[Text], rows: int) -> list[Tensor]:
        """One call of the U-Net; a text of one row serves `rows` of the latents."""
        step = torch.tensor(self.config.timesteps[0], device=self.device)
        states = torch.cat([_rows(states, rows) for states, _ in texts])
        pooled = [_rows(pooled, rows) for _, pooled in texts if pooled is not None]
        kwargs: dict[str, Any] = {}
        if pooled:
            time_ids = self._time_ids.expand(len(latents), 6)
            kwargs["added_cond_kwargs"] = {"text_embeds": torch.cat(pooled), "time_ids": time_ids}
        skipping = skipping_blank_texts(self._short, states, read=self.taps)
        unet = self.unet if skipping is self._short else TapOutputs(skipping, self.taps)
        return list(unet(latents, step, states, return_dict=False, **kwargs))

    def _ids(self, prompts: Sequence[str]) -> list[Tensor]:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return [
            tokenizer(list(prompts), **options).input_ids.to(self.device)
            for tokenizer, _ in self.towers
        ]

    def _text(self, ids: list[Tensor]) -> Text:
        encoders = [encoder for _, encoder in self.towers]
        if len(encoders) == 1:
            return encoders[0](ids[0]).last_hidden_state, None
        outputs = [
            encoder(each, output_hidden_states=True)
            for encoder, each in zip(encoders, ids, strict=True)
        ]
        return torch.cat([out.hidden_states[-2] for out in outputs], dim=-1), outputs[1][0]

    @torch.no_grad()
    def _uncond(self) -> Text:
        """SDXL's is zeros, as its pipeline has it."""
        states, pooled = self._text(self._ids([""]))
        if pooled is None:
            return states, None
        return torch.zeros_like(states), torch.zeros_like(pooled)

    def _draw(self, timestep: int) -> Tensor:
        config, side = self.config, _side(self.config) // self.backbone.reduction
        shape = (self.backbone.unet.config.in_channels, side, side)
        draws = [
            shared_noise(shape, seed=config.seed, timestep=timestep, draw=draw)
            for draw in range(config.draws)
        ]
        return torch.stack(draws).to(self.device)


def _side(config: EncoderConfig) -> int:
    assert isinstance(config.size, int)
    return config.size


def _rows(states: Tensor, rows: int) -> Tensor:
    return states if len(states) == rows else states.expand(rows, *states.shape[1:])
