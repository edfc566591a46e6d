"""diffenc's scorer, and what it is held against: the released way, and the bare parts.

All score the same pictures with the same weights and noise; `prepare` is not timed, what it returns
is.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from diffenc import CrossAttnScorer
from diffenc.denoiser.attention import cross_attention_layers, match_layers
from diffenc.denoiser.hooks import AllTapsRead
from diffenc.inputs.noise import shared_noise
from diffenc.models.base import Backbone
from diffenc.scoring.config import ScorerConfig
from speed.contenders import load_pipeline
from speed.score_cases import Kind, ScoreQuestion


class DiffencScores:
    """The library, as its users call it.

    Args:
        backbone: The model.
        config: Kind of score.
    """

    def __init__(self, backbone: Backbone, config: ScorerConfig) -> None:
        self.parts: Mapping[str, nn.Module] = backbone.parts()
        self.scorer = CrossAttnScorer(backbone, config)

    def prepare(self, question: ScoreQuestion) -> Callable[[], Tensor]:
        """Nothing is prepared: images and words go in as they are."""
        return lambda: self.scorer(question.images, question.texts)


class ReleasedWay:
    """One image and one text at a time, as the released code of Discffusion scores them.

    Both texts, the empty one and the given one, are encoded for every pair. At each timestep the
    picture goes through the VAE, and both halves through the whole U-Net in one call, whatever the
    score needs. Attention is read in hooks: the released code replaces it by slower code of its
    own, which is not held against it here. In diffusers' own memory format.

    Args:
        folder: Holds the pipeline.
        config: Kind of score: layers, halves, error term, posterior.
        kind: Its name.
        device: Where it runs.
        dtype: Of the weights.
        unet: Loaded before, in diffusers' own memory format, to save memory.

    Source:
        He et al. 2023 (Discffusion), arXiv:2305.10722, released code.
    """

    name = "released way"

    def __init__(
        self,
        folder: Path,
        config: ScorerConfig,
        kind: Kind,
        *,
        device: torch.device,
        dtype: torch.dtype,
        unet: nn.Module | None = None,
    ) -> None:
        self.config, self.kind = config, kind
        self.pipe = load_pipeline(folder, device, dtype, unet=unet)
        self.device, self.dtype = device, dtype
        self.parts: Mapping[str, nn.Module] = {
            name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)
        }
        self.layers = match_layers(self.pipe.unet, config.layers)

    def as_kind(self, kind: Kind, config: ScorerConfig) -> "ReleasedWay":
        """The same pipeline, another score."""
        twin = object.__new__(ReleasedWay)
        twin.__dict__ = {**self.__dict__, "kind": kind, "config": config}
        twin.layers = match_layers(self.pipe.unet, config.layers)
        return twin

    def prepare(self, question: ScoreQuestion, pairs: int = 1) -> Callable[[], Tensor]:
        """Scores of the first pairs, in one row; the noise lies ready."""
        noise = {t: self._noise(t) for t in (*self.config.timesteps, -1)}
        every = [(image, text) for image in question.images for text in question.texts]
        return lambda: torch.stack([self._pair(*pair, noise) for pair in every[:pairs]])

    @torch.no_grad()
    def _pair(self, image: Tensor, text: str, noise: Mapping[int, Tensor]) -> Tensor:
        pipe = self.pipe
        cond, uncond, *pooled = pipe.encode_prompt(
            prompt=text,
            negative_prompt="",
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        states, added = torch.cat([uncond, cond]), {}
        if pooled:
            side = image.shape[-1]
            ids = torch.tensor([[side, side, 0, 0, side, side]] * 2).to(states)
            added = {"text_embeds": torch.cat([pooled[1], pooled[0]]), "time_ids": ids}
        scores = []
        for timestep in self.config.timesteps:
            latents = self._encode(image, noise[-1])
            step = torch.tensor([timestep], device=self.device)
            noisy = pipe.scheduler.add_noise(latents, noise[timestep], step).to(self.dtype)
            output, read = self._pass(noisy.repeat(2, 1, 1, 1), step, states, added)
            scores.append(self._score(output.float(), read, noise[timestep]))
        return torch.stack(scores).mean()

    def _encode(self, image: Tensor, noise: Tensor) -> Tensor:
        vae = self.pipe.vae
        pixel_values = (image[None].float() / 127.5 - 1).to(self.device, vae.dtype)
        posterior = vae.encode(pixel_values).latent_dist
        latents: Tensor = posterior.mean.float()
        if self.config.posterior == "sample":
            latents = latents + posterior.std.float() * noise
        scale: float = vae.config.scaling_factor
        return latents * scale

    def _pass(
        self, noisy: Tensor, step: Tensor, states: Tensor, added: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """What the U-Net predicts, and queries and keys of each layer."""
        read: dict[str, list[Tensor]] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, _args, output: read.setdefault(name, []).append(output)

        unet = self.pipe.unet
        with ExitStack() as stack:
            for name in self.layers:
                attn = unet.get_submodule(name)
                for part in (attn.to_q, attn.to_k):
                    stack.callback(part.register_forward_hook(keep(name)).remove)
            output = unet(noisy, step[0], states, added_cond_kwargs=added, return_dict=False)[0]
        return output, {name: (found[0], found[1]) for name, found in read.items()}

    def _score(
        self, output: Tensor, read: Mapping[str, tuple[Tensor, Tensor]], noise: Tensor
    ) -> Tensor:
        """Of the two halves, the empty text's first."""
        layers = []
        halves = {"paper": (1, 1), "shared-query": (0, 1)}.get(self.kind)
        for name, (query, key) in read.items():
            attn: Any = self.pipe.unet.get_submodule(name)
            queries = rearrange(query.float(), "b n (heads d) -> b heads n d", heads=attn.heads)
            keys = rearrange(key.float(), "b l (heads d) -> b heads d l", heads=attn.heads)
            if halves is not None:
                queries, keys = queries[halves[0]], keys[halves[1]]
            layers.append((queries @ keys * attn.scale).logsumexp(dim=-1).mean())
        score: Tensor = torch.stack(layers).mean()
        if self.config.error_term is None:
            return score
        errors: Tensor = (output - noise).flatten(1).norm(dim=1)
        return score + errors[0] - errors[1]

    def _noise(self, timestep: int) -> Tensor:
        size = self.config.size
        assert isinstance(size, int)
        side, config = size // 8, self.config
        return shared_noise((4, side, side), seed=config.seed, timestep=timestep).to(self.device)


class BareParts:
    """What every score is made of, on tensors that lie ready, and nothing else.

    Args:
        backbone: Whose parts are called, in its memory format.
        rows: Of the U-Net's batch.
        size: Side of the pictures, in pixels.
    """

    def __init__(self, backbone: Backbone, *, rows: int, size: int) -> None:
        self.backbone, self.rows, self.size = backbone, rows, size
        side = size // backbone.reduction
        device, dtype = backbone.device, backbone.dtype
        generator = torch.Generator().manual_seed(0)
        shape = (rows, backbone.unet.config.in_channels, side, side)
        self.latents = torch.randn(shape, generator=generator).to(device, dtype)
        self.steps = torch.full((rows,), 389, device=device)
        embeds = backbone.embed(["a text"] * rows, size=(size, size))
        self.text = embeds.to(device, dtype).unet_kwargs()
        vae = backbone.vae
        pixel_values = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
        self.pixel_values = pixel_values.to(device, vae.dtype)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """By name: "pass" to the last cross-attention, "whole pass", "VAE" and "text"."""
        return {
            "pass": self._exit,
            "whole pass": self._whole,
            "VAE": self._vae,
            "text": self._text,
        }

    @torch.no_grad()
    def _whole(self) -> None:
        self.backbone.unet(self.latents, self.steps, return_dict=False, **self.text)

    def _exit(self) -> None:
        last = cross_attention_layers(self.backbone.unet)[-1]

        def leave(*_: Any) -> None:
            raise AllTapsRead

        handle = self.backbone.unet.get_submodule(f"{last}.to_k").register_forward_hook(leave)
        try:
            with suppress(AllTapsRead):
                self._whole()
        finally:
            handle.remove()

    @torch.no_grad()
    def _vae(self) -> None:
        self.backbone.vae.encode(self.pixel_values)

    @torch.no_grad()
    def _text(self) -> None:
        self.backbone.embed(["another text"], size=(self.size, self.size))
