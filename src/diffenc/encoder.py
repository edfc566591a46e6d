"""A diffusion U-Net as a vision encoder that reads the question."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffenc._typing import Conditioning
from diffenc.backbones import (
    TapInfo,
    describe,
    load_backbone,
    match_taps,
)
from diffenc.backbones.base import Backbone
from diffenc.backbones.presets import preset_options
from diffenc.cache import state_key
from diffenc.config import EncoderConfig, check_choice
from diffenc.errors import BackboneError, ConfigError, OutputError
from diffenc.features import Features, Maps
from diffenc.forward import compile_taps, read_taps
from diffenc.images import Images, to_pixel_values
from diffenc.latents import draw_latents
from diffenc.maps import middle_grid
from diffenc.memo import image_keys, posterior_of, prompts_of
from diffenc.noise import add_noise, shared_noise
from diffenc.prompts import PromptEmbeds, match_batch

_CONFIG_FILE = "config.json"


class DiffusionEncoder(nn.Module):
    """Text-conditioned visual features from the U-Net of a text-to-image model.

    Images are encoded by the VAE, noised, and passed once through the U-Net under the prompt;
    nothing is generated. The backbone is a registered submodule: `.to()`, `.half()` and
    `state_dict` reach it.

    Attributes:
        backbone: The model.
        config: What is read from it.
        use_cache: Remember latents, prompts and unconditional features of frozen parts, so that
            a second question about an image costs one conditional pass.

    Example:
        >>> encoder = DiffusionEncoder.from_pretrained("shapes")
        >>> encoder(image, "what color is the circle?").shape
        torch.Size([1, 64, 224])
    """

    def __init__(
        self, backbone: Backbone, config: EncoderConfig | None = None, *, use_cache: bool = True
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config or EncoderConfig()
        self.use_cache = use_cache
        wanted = self.config.taps or backbone.default_taps
        self._taps = match_taps(wanted, backbone.taps())

    @classmethod
    def from_pretrained(
        cls,
        name: "str | os.PathLike[str] | Backbone",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        use_cache: bool = True,
        preset: str | None = None,
        truncate: bool = False,
        **options: Any,  # attributes of EncoderConfig, which checks their names
    ) -> "DiffusionEncoder":
        """Load an encoder.

        Args:
            name: An alias ("shapes", "sd1.5", "sd2.1-base", "sd2.1", "sdxl"), a Hub id, a diffusers
                folder, a folder that `save_pretrained` wrote, or a `Backbone`.
            device: Where it runs.
            dtype: Of U-Net and text encoder; the VAE stays in float32 where half overflows.
            use_cache: See the class.
            preset: Where a published method reads: "gdf", "dift", "cleandift" or "hyperfeatures",
                see `diffenc.backbones.presets`.
            truncate: Load and run nothing that lies behind the last tap: the same features from
                less memory. Such an encoder has no later taps and predicts no noise.
            options: Attributes of `EncoderConfig`, such as `taps`, `timestep` or `size`; they win
                over a preset, and that over a saved config.

        Raises:
            BackboneError: The model is unknown, missing, incomplete or broken.
            ConfigError: An option is unknown or not allowed.
            TapError: A tap does not exist in this model.
        """
        config = EncoderConfig()
        if not isinstance(name, Backbone) and (Path(name) / _CONFIG_FILE).is_file():
            config, name = _read_saved(Path(name))
        if isinstance(options.get("taps"), str):
            options["taps"] = (options["taps"],)
        if isinstance(name, Backbone) and truncate:
            raise ConfigError("a Backbone is not truncated; pass the name that it is loaded by")
        told = name if isinstance(name, Backbone) else describe(name)
        published = {} if preset is None else preset_options(preset, told.family)
        config = EncoderConfig.from_dict({**config.to_dict(), **published, **options})
        # Taps are checked before weights are loaded.
        taps = match_taps(config.taps or told.default_taps, told.taps())
        keep = [tap.name for tap in taps] if truncate else None
        backbone = load_backbone(name, device=device, dtype=dtype, keep_taps=keep)
        return cls(backbone, config, use_cache=use_cache)

    def save_pretrained(self, folder: "str | os.PathLike[str]") -> None:
        """Write the config and a reference to the backbone (not its weights) to a folder.

        Raises:
            OutputError: The folder cannot be written.
        """
        target = Path(folder)
        content = {"backbone": self.backbone.name, **self.config.to_dict()}
        try:
            target.mkdir(parents=True, exist_ok=True)
            partial = target / f"{_CONFIG_FILE}.partial"
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            partial.replace(target / _CONFIG_FILE)
        except OSError as error:
            raise OutputError(f"cannot write {target}: {error}") from error

    @property
    def feature_info(self) -> tuple[TapInfo, ...]:
        """Per tap, in the order in which features are returned: name, channels, reduction."""
        return self._taps

    @property
    def hidden_size(self) -> int:
        """Channels of a token: of all taps together, twice that for "concat"."""
        channels = sum(tap.channels for tap in self._taps)
        return 2 * channels if self.config.conditioning == "concat" else channels

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's."""
        return self.backbone.dtype

    def compile(self, **options: Any) -> None:
        """Compile the U-Net up to the last tap, without graph breaks.

        The first call of each batch and image size compiles, and takes minutes for a real model.
        Features stay within the dtype's rounding of the eager ones. Compile again after adding or
        removing LoRA.

        Args:
            options: Of `torch.compile`, such as `mode` and `dynamic`.
        """
        compile_taps(self.backbone, [tap.name for tap in self._taps], **options)

    def clear_cache(self) -> None:
        """Forget latents, prompts and features; needed after writes through `.data`."""
        self.backbone.clear_caches()

    def forward(
        self, images: Images, prompts: str | Sequence[str] | PromptEmbeds | None = None
    ) -> Float[Tensor, "b n c"]:
        """Tokens in place of a CLIP encoder's: `extract(images, prompts).tokens()`."""
        return self.extract(images, prompts).tokens()

    encode = forward

    def extract(
        self,
        images: Images,
        prompts: str | Sequence[str] | PromptEmbeds | None = None,
        *,
        conditioning: Conditioning | None = None,
        guidance_scale: float | None = None,
    ) -> Features:
        """Feature maps per tap.

        Args:
            images: One or several pictures of any kind, see `diffenc.images.to_pixel_values`.
            prompts: One text for all images or one for each, or texts encoded before; None is
                unconditional.
            conditioning: "uncond" and "cond" run the U-Net once per image, "cfg" and "concat"
                run both halves in one fused call; None takes the config's, which is "cond" with
                prompts and "uncond" without.
            guidance_scale: s of f_u + s (f_c - f_u); None takes the config's.

        Returns:
            One map (b, channels, h, w) per tap, in tap order; (b, timesteps, channels, h, w) where
            the config has several timesteps.

        Raises:
            ImageError: A picture cannot be read.
            ShapeError: Sizes that the model does not take.
            PromptError: A prompt is no text, or their number fits the images in no way.
            ConfigError: A conditioning that needs prompts, without prompts.
            NonFiniteError: NaN or infinity in the features.

        Source:
            Features under a text and their guidance: "Multimodal Understanding using Stable
            Diffusion as a Task Aware Feature Extractor", section 5.
        """
        conditioning = self._conditioning(conditioning, prompts)
        config, backbone = self.config, self.backbone
        pixel_values = to_pixel_values(
            images,
            size=config.size or backbone.default_size,
            resize=config.resize,
            multiple=backbone.reduction,
        )
        size = (pixel_values.shape[2], pixel_values.shape[3])
        keys = image_keys(pixel_values) if self.use_cache else None
        latents = posterior_of(backbone, pixel_values, keys=keys, batch_size=config.batch_size)
        uncond = cond = None
        if conditioning != "cond":
            uncond = prompts_of(
                backbone, [""], size=size, uncond=config.uncond, use_cache=self.use_cache
            )
        if conditioning != "uncond":
            assert prompts is not None
            cond = self._embed(prompts, len(pixel_values), size)
        halves = self._read(latents, keys, uncond, cond)
        first = next(half for half in halves.values() if half is not None)
        grid = config.grid or middle_grid([(m.shape[-2], m.shape[-1]) for m in first.values()])
        return Features(
            **halves,
            conditioning=conditioning,
            guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
            grid=(grid, grid) if isinstance(grid, int) else grid,
            truncated=() if cond is None else cond.truncated,
        )

    def _conditioning(self, wanted: Conditioning | None, prompts: object) -> Conditioning:
        unprompted = prompts is None or (isinstance(prompts, str) and prompts == "")
        chosen = wanted or self.config.conditioning or ("uncond" if unprompted else "cond")
        check_choice("conditioning", chosen, get_args(Conditioning))
        if prompts is None and chosen != "uncond":
            raise ConfigError(f"conditioning {chosen!r} needs prompts; got none")
        return chosen

    def _embed(
        self, prompts: str | Sequence[str] | PromptEmbeds, batch: int, size: tuple[int, int]
    ) -> PromptEmbeds:
        if isinstance(prompts, PromptEmbeds):
            return prompts.rows(batch)
        return prompts_of(
            self.backbone,
            match_batch(prompts, batch),
            size=size,
            uncond=self.config.uncond,
            use_cache=self.use_cache,
        ).rows(batch)

    def _read(
        self,
        latents: tuple[Tensor, Tensor],
        keys: list[bytes] | None,
        uncond: PromptEmbeds | None,
        cond: PromptEmbeds | None,
    ) -> dict[str, Maps | None]:
        """Both halves: what the cache lacks of the unconditional one, and the conditional one."""
        cache, known, full_keys = self.backbone.caches.features, {}, None
        if uncond is not None and keys is not None:
            state = [state_key(part) for part in self.backbone.parts().values()]
            if None not in state:
                full_keys = [(*state, key, *self._noise_key()) for key in keys]
                known = {key: found for key in set(full_keys) if (found := cache.get(key))}
        batch, names = len(latents[0]), [tap.name for tap in self._taps]
        missing: list[int] = []
        if uncond is not None:
            missing = [i for i in range(batch) if not full_keys or full_keys[i] not in known]
        everything = list(range(batch)) if cond is not None else []
        texts = [part for part in (uncond and uncond.rows(len(missing)), cond) if part is not None]
        maps = self._run(latents, [*missing, *everything], PromptEmbeds.concat(texts))
        fresh = {name: features[: len(missing)] for name, features in maps.items()}
        halves: dict[str, Maps | None] = {"uncond": None, "cond": None}
        if full_keys:
            for row, index in enumerate(missing):
                known[full_keys[index]] = tuple(fresh[name][row].detach().clone() for name in names)
                cache.put(full_keys[index], known[full_keys[index]])
            rows = [known[key] for key in full_keys]
            halves["uncond"] = {
                name: torch.stack([row[tap] for row in rows]) for tap, name in enumerate(names)
            }
        elif uncond is not None:
            halves["uncond"] = {name: features.clone() for name, features in fresh.items()}
        if cond is not None:
            halves["cond"] = {name: maps[name][len(missing) :].clone() for name in names}
        return halves

    def _noise_key(self) -> tuple[object, ...]:
        """What unconditional features depend on beside image and weights."""
        config = self.config
        taps = tuple(tap.name for tap in self._taps)
        steps = config.timestep, config.draws, config.noise, config.seed
        return taps, steps, config.posterior, config.uncond

    def _run(self, latents: tuple[Tensor, Tensor], images: list[int], texts: PromptEmbeds) -> Maps:
        """Features of rows, mean over draws: (rows c h w), or (rows t c h w) for several steps.

        Args:
            latents: Mode and deviation of all images.
            images: Which image each row shows.
            texts: One row each.
        """
        names = [tap.name for tap in self._taps]
        if not images:
            return {}
        config = self.config
        steps, draws, rows = config.timesteps, config.draws, len(images)
        noisy_latents = torch.cat(
            [self._noised(latents, step, draw)[images] for step in steps for draw in range(draws)]
        )
        repeats = len(steps) * draws
        maps = read_taps(
            self.backbone,
            noisy_latents,
            torch.tensor(steps).repeat_interleave(draws * rows),
            PromptEmbeds.concat([texts] * repeats),
            names,
            batch_size=config.batch_size,
        )
        if repeats == 1 and isinstance(config.timestep, int):
            return maps
        merged = {}
        for name, features in maps.items():
            split = rearrange(features, "(t d b) c h w -> b t d c h w", t=len(steps), d=draws)
            mean = split.mean(dim=2)
            merged[name] = mean[:, 0] if isinstance(config.timestep, int) else mean
        return merged

    def _noised(self, posterior: tuple[Tensor, Tensor], timestep: int, draw: int) -> Tensor:
        config = self.config
        latents = draw_latents(*posterior, config.posterior, seed=config.seed, draw=draw)
        if config.noise is None:
            return latents
        _, c, h, w = latents.shape
        noise = shared_noise((c, h, w), seed=config.seed, timestep=timestep, draw=draw)
        return add_noise(self.backbone.scheduler, latents, noise, timestep)


def _read_saved(folder: Path) -> tuple[EncoderConfig, str]:
    path = folder / _CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        backbone = values.pop("backbone")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BackboneError(
            f"{path} is not a config that DiffusionEncoder.save_pretrained wrote: {error!r}"
        ) from error
    return EncoderConfig.from_dict(values), backbone
