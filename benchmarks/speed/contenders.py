"""diffenc, and what it is held against: the plain script, DIFT's own way and the bare floor.

All read the same features from the same weights; `prepare` is not timed, what it returns is.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from diffenc import DiffusionEncoder
from diffenc.config import EncoderConfig
from diffenc.denoiser.shortening import shortened
from diffenc.inputs.noise import shared_noise
from diffenc.models.base import Backbone, Caches
from speed.cases import Question
from speed.measuring import weight_bytes

Maps = dict[str, Tensor]

COMPILED = "diffenc, compiled"


class Contender(Protocol):
    """One way to read features.

    Attributes:
        name: In tables.
        parts: The components it holds, by diffusers' names.
        exits: Its passes end after the last tap.
    """

    name: str
    parts: Mapping[str, nn.Module]
    exits: bool

    def prepare(self, question: Question) -> Callable[[], Maps]:
        """What answers the question, ready to be timed."""
        ...


class Diffenc:
    """The library, as its users call it.

    Args:
        backbone: Whose features are read.
        config: Taps, timestep, draws, conditioning.
        compiled: Compile the U-Net; the backbone given is left as it is.
        options: Of `torch.compile`.
    """

    exits = True

    def __init__(
        self,
        backbone: Backbone,
        config: EncoderConfig,
        *,
        compiled: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = COMPILED if compiled else "diffenc"
        if compiled:
            backbone = copy.copy(backbone)  # the same weights, with caches and code of its own
            backbone.caches = Caches()
        backbone.clear_caches()
        self.parts: Mapping[str, nn.Module] = backbone.parts()
        self.encoder = DiffusionEncoder(backbone, config)
        if compiled:
            self.encoder.compile(**(options or {}))

    def prepare(self, question: Question) -> Callable[[], Maps]:
        """Nothing is prepared: images and words go in as they are."""
        return lambda: dict(self.encoder.extract(question.images, question.prompts))

    def truncated_weights(self) -> int:
        """Bytes of the weights that `truncate=True` would load."""
        taps = [tap.name for tap in self.encoder.feature_info]
        short = shortened(self.parts["unet"], taps)
        return weight_bytes(short, *(p for name, p in self.parts.items() if name != "unet"))


class PlainScript:
    """Hooks on the stock pipeline, as a user writes it today; nothing is kept between questions.

    VAE, texts, then two separate passes of the whole U-Net, in diffusers' own memory format.

    Args:
        folder: Holds the pipeline.
        config: What is read.
        taps: Module paths.
        device: Where it runs.
        dtype: Of the weights; a VAE that overflows in float16 runs in float32.
        parts: Parts of the pipeline that were loaded before, by diffusers' names, to save memory; a
            U-Net among them has to be in diffusers' own memory format.
    """

    name = "plain diffusers"
    exits = False

    def __init__(
        self,
        folder: Path,
        config: EncoderConfig,
        taps: list[str],
        *,
        device: torch.device,
        dtype: torch.dtype,
        **parts: nn.Module | None,
    ) -> None:
        self.config, self.taps = config, taps
        self.pipe = load_pipeline(folder, device, dtype, **parts)
        self.device, self.dtype = device, dtype
        self.parts: Mapping[str, nn.Module] = {
            name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)
        }

    def prepare(self, question: Question) -> Callable[[], Maps]:
        """Nothing is prepared but the noise, which all contenders share."""
        noise = _noises(self.config, self.device)
        return lambda: self._answer(question, noise)

    @torch.no_grad()
    def _answer(self, question: Question, noise: Tensor) -> Maps:
        pipe, timestep = self.pipe, self.config.timesteps[0]
        pixel_values = question.images.float() / 127.5 - 1
        latents = self._encode(pixel_values).mode() * pipe.vae.config.scaling_factor
        steps = torch.tensor([timestep], device=self.device)
        noisy_latents = pipe.scheduler.add_noise(latents, noise[:1], steps).to(self.dtype)
        cond, uncond, *pooled = pipe.encode_prompt(
            prompt=question.prompts,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        texts = [uncond, cond] if not pooled else [(uncond, pooled[1]), (cond, pooled[0])]
        of_uncond, of_cond = (self._read(noisy_latents, steps, text) for text in texts)
        scale = self.config.guidance_scale
        return {tap: of_uncond[tap] + scale * (of_cond[tap] - of_uncond[tap]) for tap in self.taps}

    def _encode(self, pixel_values: Tensor) -> Any:
        vae = self.pipe.vae
        return vae.encode(pixel_values.to(self.device, vae.dtype)).latent_dist

    def _read(self, noisy_latents: Tensor, steps: Tensor, text: Any) -> Maps:
        found: Maps = {}

        def keep(tap: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                found[tap] = _as_map(output[0] if isinstance(output, tuple) else output)

            return hook

        unet = self.pipe.unet
        handles = [unet.get_submodule(tap).register_forward_hook(keep(tap)) for tap in self.taps]
        try:
            if isinstance(text, tuple):
                states, pooled = text
                side = self._side()
                ids = torch.tensor([[side, side, 0, 0, side, side]]).to(states)
                added = {"text_embeds": pooled, "time_ids": ids.expand(len(states), 6)}
                unet(noisy_latents, steps[0], states, added_cond_kwargs=added)
            else:
                unet(noisy_latents, steps[0], text)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _side(self) -> int:
        size = self.config.size
        assert isinstance(size, int)
        return size


class DiftScript(PlainScript):
    """Eight draws as DIFT's own code makes them: the picture goes through the VAE once per draw.

    The U-Net ends after the tap's block, as DIFT's copy of it does.
    """

    name = "DIFT's own way"
    exits = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.unet = shortened(self.pipe.unet, self.taps)

    @torch.no_grad()
    def _answer(self, question: Question, noise: Tensor) -> Maps:
        pipe, draws = self.pipe, self.config.draws
        pixel_values = (question.images.float() / 127.5 - 1).repeat(draws, 1, 1, 1)
        posterior = self._encode(pixel_values)
        samples = posterior.mean + posterior.std * noise[draws:].to(posterior.mean)
        latents = samples * pipe.vae.config.scaling_factor
        steps = torch.tensor([self.config.timesteps[0]], device=self.device)
        noisy_latents = pipe.scheduler.add_noise(latents, noise[:draws], steps).to(self.dtype)
        states, _ = pipe.encode_prompt(
            prompt=question.prompts,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        # The block that is read is the last one that runs: its output is the U-Net's.
        output = self.unet(noisy_latents, steps[0], states.repeat(draws, 1, 1))[0]
        return {self.taps[0]: reduce(output, "draws c h w -> 1 c h w", "mean")}


def load_pipeline(
    folder: Path, device: torch.device, dtype: torch.dtype, **parts: nn.Module | None
) -> Any:
    """The stock pipeline of a folder; a VAE that overflows in float16 is kept in float32."""
    from diffusers import DiffusionPipeline

    shared = {name: part for name, part in parts.items() if part is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the argument is called dtype in some versions
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **shared).to(device)
    if dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return pipe


def is_plain_format(module: nn.Module) -> bool:
    """Whether convolutions lie in torch's own memory format, channels first."""
    convolutions = (child for child in module.modules() if isinstance(child, nn.Conv2d))
    return all(child.weight.is_contiguous() for child in convolutions)


def _noises(config: EncoderConfig, device: torch.device) -> Tensor:
    """Noise of every draw, then that of every posterior sample: (2 * draws 4 side side)."""
    assert isinstance(config.size, int)
    shape = (4, config.size // 8, config.size // 8)
    steps = [*[config.timesteps[0]] * config.draws, *[-1] * config.draws]
    draws = [*range(config.draws)] * 2
    pairs = zip(steps, draws, strict=True)
    rows = [shared_noise(shape, seed=config.seed, timestep=step, draw=d) for step, d in pairs]
    return torch.stack(rows).to(device)


def _as_map(output: Tensor) -> Tensor:
    """Tokens (b n c) of a square picture as a map (b c h w)."""
    if output.ndim == 4:
        return output
    side = round(output.shape[1] ** 0.5)
    return rearrange(output, "b (h w) c -> b c h w", h=side)
