"""Low-rank adapters as a part of an encoder: added, switched, merged, saved and loaded."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from diffenc.checks.arguments import texts
from diffenc.denoiser.joint_attention import adapted_attentions
from diffenc.denoiser.lora.adapters import (
    active_lora,
    add_lora,
    is_merged,
    listed_loras,
    lora_names,
    lora_parameters,
    merge_lora,
    require_lora,
    set_lora,
)
from diffenc.denoiser.lora.files import load_lora, read_origin, save_lora
from diffenc.denoiser.lora.options import PROJECTIONS, LoraOptions
from diffenc.errors import BackboneError, ConfigError
from diffenc.memory.model_state import structure_key
from diffenc.models.base import Backbone
from diffenc.models.denoisers import config_of
from diffenc.models.reached_layers import reached_layers
from diffenc.models.taps import TapInfo
from diffenc.runtime.defaults import torch_defaults
from diffenc.runtime.inference import lasting


class LoraPart(nn.Module):
    """Adapters on the cross-attentions of the backbone's U-Net, of which one is in use at a time.

    Attributes:
        backbone: The frozen model, in whose U-Net the adapters live.
    """

    backbone: Backbone
    _taps: tuple[TapInfo, ...]

    def __init__(self) -> None:
        super().__init__()
        # Adapters that are not in use: whether they train when they are.
        self._waiting: dict[str, bool] = {}
        self._compile_options: dict[str, Any] | None = None

    def clear_cache(self) -> None:
        """Forget latents, prompts and features; needed after writes through `.data`."""
        self.backbone.clear_caches()

    @lasting
    def add_lora(
        self,
        *,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        projections: Sequence[str] = PROJECTIONS,
        name: str = "default",
    ) -> None:
        """Add a low-rank adapter to the attentions to a text that the taps depend on, and train it.

        These are cross-attentions, or those that join picture and text, of which the picture's
        projections are adapted.

        Nothing behind the last tap is adapted, so every parameter gets a gradient. The new adapter
        changes nothing until it is trained; the one in use before is set aside. An encoder that
        shares the backbone sees the adapter too.

        Args:
            rank: Rank of the update.
            alpha: Numerator of the scale alpha / rank of the update; None is the rank, a scale of
                1.
            dropout: Dropout probability of the update's inputs in training mode, from 0 to below 1.
            projections: Names of the linear layers of a cross-attention that are adapted, see
                `diffenc.denoiser.lora.PROJECTIONS`.
            name: Name of the adapter.

        Raises:
            ConfigError: A value out of range, a name that is taken or cannot be one, or taps that
                no cross-attention reaches.

        Source:
            Hu et al. 2021 (LoRA), arXiv:2106.09685; on cross-attention: "Multimodal Understanding
            using Stable Diffusion as a Task Aware Feature Extractor", section 6.
        """
        projections = texts("projections", projections)
        options = LoraOptions(rank=rank, alpha=alpha, dropout=dropout, projections=projections)
        unet = self.backbone.denoiser
        with torch_defaults(), self.backbone.lock:
            left = self._lora_in_use()
            add_lora(unet, adapted_attentions(unet), options, name=name, only=self._reached())
            self._set_aside(left)
            self._exchanged()

    @property
    def lora_names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they came."""
        return tuple(lora_names(self.backbone.denoiser))

    @property
    def active_lora(self) -> str | None:
        """Name of the adapter in use."""
        return active_lora(self.backbone.denoiser)

    @lasting
    def set_lora(self, name: str | None, *, trainable: bool | None = None) -> None:
        """Use one adapter alone, or none.

        An adapter that is not in use requires no gradient, as it would get none.

        Args:
            name: Name of the adapter; None uses the plain backbone.
            trainable: Whether it trains from now on; None leaves that as it was.

        Raises:
            ConfigError: There is no such adapter.
        """
        unet = self.backbone.denoiser
        if name is not None:
            require_lora(unet, name)
        with self.backbone.lock:
            left = self._lora_in_use()
            for copy in (unet, *self._compiled_unets()):
                set_lora(copy, name)  # takes a merged one out of the weights
            self._set_aside(left)
            if name is not None:
                trains = self._waiting.pop(name, False)
                self._train_lora(name, trains if trainable is None else trainable)
            self._still_compiled()
            self.clear_cache()

    @lasting
    def merge_lora(self) -> None:
        """Add the active adapter to the weights: it costs nothing then, and does not train.

        Raises:
            ConfigError: No adapter is active.
        """
        with self.backbone.lock:
            if self.active_lora is None:
                raise ConfigError(
                    "no adapter is active, so there is nothing to merge; "
                    f"{listed_loras(self.backbone.denoiser)}"
                )
            self._set_aside(self._lora_in_use())
            merge_lora(self.backbone.denoiser)
            self._still_compiled()
            self.clear_cache()

    @lasting
    def unmerge_lora(self) -> None:
        """Put the weights back as they were; the adapter stays active and trains if it did."""
        with self.backbone.lock:
            if is_merged(self.backbone.denoiser):
                self.set_lora(self.active_lora)

    def save_lora(self, folder: "str | os.PathLike[str]", *, name: str | None = None) -> None:
        """Write an adapter in peft's layout and, beside it, keyed for diffusers.

        Args:
            folder: Folder to write to. `PeftModel.from_pretrained(unet, folder)` and
                `pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")`
                read it.
            name: Name of the adapter; None is the active one.

        Raises:
            ConfigError: There is no such adapter, or none is active.
            OutputError: The folder cannot be written.
        """
        name = self.active_lora if name is None else name
        if name is None:
            raise ConfigError(
                "no adapter is active, so name= must say which one is meant; "
                f"{listed_loras(self.backbone.denoiser)}"
            )
        origin = {"backbone": self.backbone.name, "taps": [tap.name for tap in self._taps]}
        save_lora(self.backbone.denoiser, folder, name=name, origin=origin)

    @lasting
    def load_lora(
        self,
        folder: "str | os.PathLike[str]",
        *,
        name: str = "default",
        trainable: bool = False,
        other_taps: bool = False,
    ) -> None:
        """Read an adapter that `save_lora` or peft wrote, and use it.

        It may adapt any linear layer or convolution that the features at the taps depend on, such
        as those of self-attention.

        Args:
            folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
            name: Name of the adapter from now on.
            trainable: Whether the adapter goes on training.
            other_taps: Whether to take an adapter that was trained with other taps, as long as all
                of it has an effect on these.

        Raises:
            BackboneError: The folder holds no whole adapter, or one for another backbone or for
                other taps.
            ConfigError: The name is taken or cannot be one.
        """
        own = [tap.name for tap in self._taps]
        known = read_origin(folder).get("taps", own)
        if not other_taps and sorted(known) != sorted(own):
            raise BackboneError(
                f"{os.fspath(folder)} is an adapter for other taps: it was trained with {known}, "
                f"and this encoder reads {own}. Load the encoder with those, or pass "
                "other_taps=True."
            )
        unet = self.backbone.denoiser
        with torch_defaults(), self.backbone.lock:
            left = self._lora_in_use()
            load_lora(unet, folder, name=name, trainable=trainable, only=self._reached())
            self._set_aside(left)
            self._exchanged()

    def _reached(self) -> frozenset[str]:
        config = config_of(self.backbone.denoiser)
        return reached_layers(config, [tap.name for tap in self._taps])

    def _lora_in_use(self) -> tuple[str, bool] | None:
        """Name of the active adapter and whether it trains; None where nothing is to be noted."""
        name = self.active_lora
        if name is None or is_merged(self.backbone.denoiser):
            return None
        parameters = lora_parameters(self.backbone.denoiser, name).values()
        return name, any(parameter.requires_grad for parameter in parameters)

    def _set_aside(self, left: tuple[str, bool] | None) -> None:
        """Note whether an adapter trains, and freeze it."""
        if left is not None:
            self._waiting[left[0]] = left[1]
            self._train_lora(left[0], False)

    def _train_lora(self, name: str, trains: bool) -> None:
        for parameter in lora_parameters(self.backbone.denoiser, name).values():
            parameter.requires_grad_(trains)

    def _compiled_unets(self) -> Iterator[nn.Module]:
        """Copies of the U-Net: a layer that is a tap itself has switches of its own there."""
        for compiled in self.backbone.compiled.values():
            outputs = getattr(compiled.run, "_orig_mod", None)
            if outputs is not None:
                yield outputs.unet

    def _still_compiled(self) -> None:
        """What changed in the U-Net has changed in its compiled copies too."""
        for compiled in self.backbone.compiled.values():
            compiled.structure = structure_key(self.backbone.denoiser)

    def _exchanged(self) -> None:
        """Modules of the U-Net were replaced: what was compiled of it no longer holds."""
        self.clear_cache()
        self.backbone.compiled.clear()
        if self._compile_options is not None:
            self.compile(**self._compile_options)
