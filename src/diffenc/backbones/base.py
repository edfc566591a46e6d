"""What the encoder and the scorer need of a model: components, text embeddings, taps."""

import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffenc._typing import Uncond
from diffenc.backbones.taps import TapInfo, unet_taps
from diffenc.cache import TensorCache
from diffenc.prompts import PromptEmbeds


@dataclass(frozen=True, slots=True)
class Caches:
    """What a backbone remembers, each bounded in bytes.

    Attributes:
        latents: Per picture: 64 KB for 512 pixels.
        prompts: Per text: 0.3 MB for SD 2.1 in float32.
        features: Unconditional maps per picture, noise and set of taps, on the U-Net's device.
    """

    latents: TensorCache = field(default_factory=lambda: TensorCache(64 * 2**20))
    prompts: TensorCache = field(default_factory=lambda: TensorCache(64 * 2**20))
    features: TensorCache = field(default_factory=lambda: TensorCache(256 * 2**20))


class Backbone(nn.Module):
    """A diffusion model taken apart: VAE, text encoders, U-Net, schedule.

    All parts are frozen and in evaluation mode. `from_parts` of the subclasses takes any objects
    with diffusers' interfaces.

    Attributes:
        name: Alias, Hub id or folder it was loaded from.
        unet: Denoising U-Net (`UNet2DConditionModel`).
        vae: Autoencoder.
        scheduler: Holder of `alphas_cumprod` and of the prediction type.
        default_size: Side of the square that images are brought to, in pixels.
        default_taps: What the encoder reads when nothing else is asked for.
        caches: Latents, prompts and unconditional features that were computed before.
        compiled: Per tuple of taps the compiled U-Net that returns them.
        lock: Held while the U-Net is read, so that threads may share a backbone.
    """

    family: str
    uncond_rule: Uncond = "empty"

    def __init__(
        self,
        *,
        name: str,
        unet: Any,
        vae: Any,
        scheduler: Any,
        default_size: int,
        default_taps: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.name = name
        self.unet, self.vae, self.scheduler = unet, vae, scheduler
        self.default_size, self.default_taps = default_size, default_taps
        self.caches = Caches()
        self.compiled: dict[tuple[str, ...], Callable[..., tuple[Tensor, ...]]] = {}
        self.lock = threading.RLock()

    def freeze(self) -> "Backbone":
        """Evaluation mode, no gradients to weights."""
        self.eval()
        self.requires_grad_(False)
        return self

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        device: torch.device = next(self.unet.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's; the VAE may stay in float32."""
        dtype: torch.dtype = next(self.unet.parameters()).dtype
        return dtype

    @property
    def reduction(self) -> int:
        """Image pixels per latent cell."""
        levels: int = len(self.vae.config.block_out_channels)
        return int(2 ** (levels - 1))

    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts: "epsilon", "v_prediction" or "sample"."""
        kind: str = self.scheduler.config.prediction_type
        return kind

    def taps(self) -> tuple[TapInfo, ...]:
        """Every readable place of the U-Net."""
        known = dict(self.unet.named_modules())
        every = unet_taps(dict(self.unet.config), self.reduction)
        return tuple(tap for tap in every if tap.name in known)

    @property
    def truncated(self) -> bool:
        """Whether the U-Net ends after the last tap it was loaded for, and predicts no noise."""
        return not hasattr(self.unet.conv_out, "weight")

    @abstractmethod
    def embed(self, texts: Sequence[str], *, size: tuple[int, int]) -> PromptEmbeds:
        """Encode texts, one row each.

        Args:
            texts: Prompts; what exceeds the encoder's limit is cut and counted.
            size: (height, width) of the pictures they go with, in pixels; SDXL reads it.
        """

    def embed_uncond(self, rule: Uncond | None, *, size: tuple[int, int]) -> PromptEmbeds:
        """The unconditional embedding, one row.

        Args:
            rule: "empty" encodes the empty text; "zeros" is what SDXL's own pipeline uses; None is
                the model's own rule.
            size: As for `embed`.
        """
        embeds = self.embed([""], size=size)
        if (rule or self.uncond_rule) == "empty":
            return embeds
        pooled = embeds.pooled_prompt_embeds
        return PromptEmbeds(
            torch.zeros_like(embeds.prompt_embeds),
            None if pooled is None else torch.zeros_like(pooled),
            embeds.time_ids,
            embeds.truncated,
        )

    def clear_caches(self) -> None:
        """Forget everything; needed after weights were written through `.data`."""
        for cache in (self.caches.latents, self.caches.prompts, self.caches.features):
            cache.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> "Backbone":
        self.clear_caches()  # another device or dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def parts(self) -> dict[str, nn.Module]:
        """Named components that hold weights."""
        return dict(self.named_children())

    def __getstate__(self) -> dict[str, Any]:
        kept = {key: value for key, value in self.__dict__.items() if key != "lock"}
        return {**kept, "compiled": {}}  # compiled code is neither copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.lock = threading.RLock()
