"""A diffusion U-Net as a vision encoder that reads the question."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffenc._typing import Conditioning
from diffenc.backbones import TapInfo, load_backbone, match_taps
from diffenc.backbones.base import Backbone
from diffenc.config import EncoderConfig, check_choice
from diffenc.errors import BackboneError, ConfigError, OutputError, TapError, near_matches
from diffenc.forward import read_taps
from diffenc.images import Images, to_pixel_values
from diffenc.latents import encode_latents
from diffenc.maps import middle_grid, to_tokens
from diffenc.noise import add_noise, shared_noise
from diffenc.prompts import PromptEmbeds, match_batch

Maps = dict[str, Float[Tensor, "b _c _h _w"]]

_CONFIG_FILE = "config.json"


class Features(Mapping[str, Tensor]):
    """Feature maps per tap, (b channels h w), in the dtype and on the device of the backbone.

    As a mapping it holds the maps in one conditioning; `select` gives another one of the same
    pass, without running anything.

    Attributes:
        conditioning: Of the maps that the mapping holds.
        guidance_scale: s of f_u + s (f_c - f_u).
        grid: (height, width) of `tokens`.
        truncated: Number of prompt tokens that were cut, per image; empty without prompts.
    """

    def __init__(
        self,
        *,
        uncond: Maps | None,
        cond: Maps | None,
        conditioning: Conditioning,
        guidance_scale: float,
        grid: tuple[int, int],
        truncated: tuple[int, ...] = (),
    ) -> None:
        self._halves = {"uncond": uncond, "cond": cond}
        self.conditioning, self.guidance_scale = conditioning, guidance_scale
        self.grid, self.truncated = grid, truncated
        self._maps = self._derive(conditioning, guidance_scale)

    def __getitem__(self, tap: str) -> Float[Tensor, "b c h w"]:
        try:
            return self._maps[tap]
        except KeyError:
            raise TapError(
                f"no tap {tap!r} was read.{near_matches(tap, self._maps)} "
                f"These were: {list(self._maps)}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def __repr__(self) -> str:
        shapes = {name: tuple(features.shape) for name, features in self._maps.items()}
        return f"Features({self.conditioning}, {shapes})"

    def select(
        self, conditioning: Conditioning, *, guidance_scale: float | None = None
    ) -> "Features":
        """The same pass in another conditioning.

        Args:
            conditioning: "uncond", "cond", "cfg" or "concat".
            guidance_scale: For "cfg"; None keeps this object's.

        Raises:
            ConfigError: It needs a half that was not computed.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return Features(
            uncond=self._halves["uncond"],
            cond=self._halves["cond"],
            conditioning=conditioning,
            guidance_scale=scale,
            grid=self.grid,
            truncated=self.truncated,
        )

    def tokens(self, grid: int | tuple[int, int] | None = None) -> Float[Tensor, "b n c"]:
        """All taps on one grid, channels concatenated in tap order, cells row by row.

        Args:
            grid: Side or (height, width); None takes the encoder's.
        """
        grid = self.grid if grid is None else (grid, grid) if isinstance(grid, int) else grid
        return to_tokens(self._maps, grid)

    def to_list(self) -> list[Float[Tensor, "b c h w"]]:
        """The maps from fine to coarse, as timm's `features_only` gives them."""
        return sorted(self._maps.values(), key=lambda m: m.shape[2] * m.shape[3], reverse=True)

    def _half(self, name: str, wanted: Conditioning) -> Maps:
        half = self._halves[name]
        if half is None:
            raise ConfigError(
                f"conditioning {wanted!r} needs the {name} features, which were not computed; "
                "pass prompts and conditioning='cfg' or 'concat' to `extract` to have both"
            )
        return half

    def _derive(self, conditioning: Conditioning, scale: float) -> Maps:
        check_choice("conditioning", conditioning, get_args(Conditioning))
        if conditioning in ("uncond", "cond"):
            return self._half(conditioning, conditioning)
        uncond, cond = self._half("uncond", conditioning), self._half("cond", conditioning)
        if conditioning == "concat":
            return {name: torch.cat([uncond[name], cond[name]], dim=1) for name in cond}
        return {name: torch.lerp(uncond[name], cond[name], scale) for name in cond}


class DiffusionEncoder(nn.Module):
    """Text-conditioned visual features from the U-Net of a text-to-image model.

    Images are encoded by the VAE, noised to one timestep, and passed once through the U-Net under
    the prompt; nothing is generated. The backbone is a registered submodule: `.to()`, `.half()`
    and `state_dict` reach it.

    Example:
        >>> encoder = DiffusionEncoder.from_pretrained("shapes")
        >>> encoder(image, "what color is the circle?").shape
        torch.Size([1, 64, 192])
    """

    def __init__(self, backbone: Backbone, config: EncoderConfig | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config or EncoderConfig()
        wanted = self.config.taps or backbone.default_taps
        self._taps = match_taps(wanted, backbone.taps())

    @classmethod
    def from_pretrained(
        cls,
        name: "str | os.PathLike[str] | Backbone",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> "DiffusionEncoder":
        """Load an encoder.

        Args:
            name: An alias ("shapes", "sd1.5", "sd2.1-base", "sd2.1", "sdxl"), a Hub id, a diffusers
                folder, a folder that `save_pretrained` wrote, or a `Backbone`.
            device: Where it runs.
            dtype: Of U-Net and text encoder; the VAE stays in float32 where half overflows.
            options: Attributes of `EncoderConfig`, such as `taps`, `timestep` or `size`; they win
                over a saved config.

        Raises:
            BackboneError: The model is unknown, missing, incomplete or broken.
            ConfigError: An option is unknown or not allowed.
            TapError: A tap does not exist in this model.
        """
        config = EncoderConfig()
        if not isinstance(name, Backbone) and (Path(name) / _CONFIG_FILE).is_file():
            config, name = _read_saved(Path(name))
        if "taps" in options and options["taps"] is not None:
            taps = options["taps"]
            options["taps"] = (taps,) if isinstance(taps, str) else tuple(taps)
        config = EncoderConfig.from_dict({**config.to_dict(), **options})
        return cls(load_backbone(name, device=device, dtype=dtype), config)

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

    def forward(
        self, images: Images, prompts: str | Sequence[str] | None = None
    ) -> Float[Tensor, "b n c"]:
        """Tokens in place of a CLIP encoder's: `extract(images, prompts).tokens()`."""
        return self.extract(images, prompts).tokens()

    encode = forward

    def extract(
        self,
        images: Images,
        prompts: str | Sequence[str] | None = None,
        *,
        conditioning: Conditioning | None = None,
        guidance_scale: float | None = None,
    ) -> Features:
        """Feature maps per tap.

        Args:
            images: One or several pictures of any kind, see `diffenc.images.to_pixel_values`.
            prompts: One text for all images or one for each; None is unconditional.
            conditioning: "uncond" and "cond" run the U-Net once per image, "cfg" and "concat"
                run both halves in one fused call; None takes the config's, which is "cond" with
                prompts and "uncond" without.
            guidance_scale: s of f_u + s (f_c - f_u); None takes the config's.

        Returns:
            One map (b, channels, h, w) per tap, in tap order.

        Raises:
            ImageError: A picture cannot be read.
            ShapeError: Sizes that the model does not take.
            PromptError: A prompt is no text, or their number fits the images in no way.
            ConfigError: A conditioning that needs prompts, without prompts.

        Source:
            Features under a text and their guidance: "Multimodal Understanding using Stable
            Diffusion as a Task Aware Feature Extractor", section 5.
        """
        conditioning = conditioning or self.config.conditioning or ("cond" if prompts else "uncond")
        check_choice("conditioning", conditioning, get_args(Conditioning))
        if prompts is None and conditioning != "uncond":
            raise ConfigError(f"conditioning {conditioning!r} needs prompts; got none")
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        noisy_latents, size = self._noisy_latents(images)
        texts: dict[str, PromptEmbeds] = {}
        if conditioning != "cond":
            texts["uncond"] = self.backbone.embed_uncond(self.config.uncond, size=size)
        if conditioning != "uncond":
            assert prompts is not None
            matched = match_batch(prompts, len(noisy_latents))
            texts["cond"] = self.backbone.embed(matched, size=size)
        names = [tap.name for tap in self._taps]
        with torch.no_grad():
            halves = read_taps(
                self.backbone, noisy_latents, self.config.timestep, list(texts.values()), names
            )
        maps = dict(zip(texts, halves, strict=True))
        first = halves[0]
        grid = self.config.grid or middle_grid([(m.shape[2], m.shape[3]) for m in first.values()])
        return Features(
            uncond=maps.get("uncond"),
            cond=maps.get("cond"),
            conditioning=conditioning,
            guidance_scale=scale,
            grid=(grid, grid) if isinstance(grid, int) else grid,
            truncated=texts["cond"].rows(len(noisy_latents)).truncated if "cond" in texts else (),
        )

    def _noisy_latents(self, images: Images) -> tuple[Tensor, tuple[int, int]]:
        """Latents at the config's noise level, and (height, width) of the pictures behind them."""
        config = self.config
        pixel_values = to_pixel_values(
            images,
            size=config.size or self.backbone.default_size,
            resize=config.resize,
            multiple=self.backbone.reduction,
        )
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            latents = encode_latents(
                self.backbone.vae, pixel_values, posterior=config.posterior, generator=generator
            )
        _, channels, rows, columns = latents.shape
        shape = (channels, rows, columns)
        noise = shared_noise(shape, seed=config.seed, timestep=config.timestep)
        noisy_latents = add_noise(self.backbone.scheduler, latents, noise, config.timestep)
        height, width = pixel_values.shape[2:]
        return noisy_latents, (height, width)


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
