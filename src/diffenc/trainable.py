"""What is trained inside an encoder whose backbone is frozen: LoRA, and the implicit captioner."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffenc.attention import cross_attention_layers
from diffenc.backbones.base import Backbone
from diffenc.backbones.reach import reached_projections
from diffenc.backbones.taps import TapInfo
from diffenc.cache import TensorCache
from diffenc.captioner import ClipEmbedder, ImplicitCaptioner
from diffenc.errors import BackboneError, ConfigError
from diffenc.images import Images, to_pixel_values
from diffenc.lora import (
    PROJECTIONS,
    LoraOptions,
    active_lora,
    add_lora,
    is_merged,
    load_lora,
    lora_names,
    lora_parameters,
    merge_lora,
    read_origin,
    require_lora,
    save_lora,
    set_lora,
)
from diffenc.memo import image_embeds_of
from diffenc.prompts import PromptEmbeds


class TrainableParts(nn.Module):
    """Base of `DiffusionEncoder`: adds, switches, saves and lists what trains.

    Everything else in the encoder stays frozen. The parts that train are in float32 when they are
    made, and casting the encoder to float16 leaves them there: in float16 they do not survive
    training.

    Attributes:
        backbone: The frozen model; LoRA lives in its U-Net.
        captioner: The implicit captioner, or None.
        clip: Frozen CLIP that the captioner listens to, or None.
        use_cache: See `DiffusionEncoder`.
    """

    backbone: Backbone
    captioner: ImplicitCaptioner | None
    clip: ClipEmbedder | None
    use_cache: bool
    _taps: tuple[TapInfo, ...]

    def __init__(self) -> None:
        super().__init__()
        self.captioner = self.clip = None
        self._image_embeds = TensorCache(16 * 2**20)
        # Adapters that are not in use: whether they train when they are.
        self._waiting: dict[str, bool] = {}
        self._compile_options: dict[str, Any] | None = None

    def clear_cache(self) -> None:
        """Forget latents, prompts and features; needed after writes through `.data`."""
        self.backbone.clear_caches()
        self._image_embeds.clear()

    def add_lora(
        self,
        *,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        projections: Sequence[str] = PROJECTIONS,
        name: str = "default",
    ) -> None:
        """Add a low-rank adapter to the cross-attentions that the taps depend on, and train it.

        Nothing behind the last tap is adapted, so every parameter gets a gradient. The new adapter
        changes nothing until it is trained; the one in use before is set aside. An encoder that
        shares the backbone sees the adapter too.

        Args:
            rank: Of the update.
            alpha: The update is scaled by alpha / rank; None is the rank.
            dropout: Of the update's inputs, in training mode.
            projections: Which linear layers of a cross-attention, see `diffenc.lora.PROJECTIONS`.
            name: Of the adapter.

        Raises:
            ConfigError: A value out of range, a name that is taken or cannot be one, or taps that
                no cross-attention reaches.

        Source:
            Hu et al. 2021 (LoRA), arXiv:2106.09685; on cross-attention: "Multimodal Understanding
            using Stable Diffusion as a Task Aware Feature Extractor", section 6.
        """
        projections = (projections,) if isinstance(projections, str) else tuple(projections)
        options = LoraOptions(rank=rank, alpha=alpha, dropout=dropout, projections=projections)
        unet = self.backbone.unet
        with self.backbone.lock:
            left = self._lora_in_use()
            add_lora(unet, cross_attention_layers(unet), options, name=name, only=self._reached())
            self._set_aside(left)
            self._exchanged()

    @property
    def lora_names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they came."""
        return tuple(lora_names(self.backbone.unet))

    @property
    def active_lora(self) -> str | None:
        """Name of the adapter in use."""
        return active_lora(self.backbone.unet)

    def set_lora(self, name: str | None, *, trainable: bool | None = None) -> None:
        """Use one adapter alone, or none.

        An adapter that is not in use requires no gradient, as it would get none.

        Args:
            name: Of the adapter; None is the plain backbone.
            trainable: Whether it trains from now on; None leaves that as it was.

        Raises:
            ConfigError: There is no such adapter.
        """
        unet = self.backbone.unet
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
            self.clear_cache()

    def merge_lora(self) -> None:
        """Add the active adapter to the weights: it costs nothing then, and does not train.

        Raises:
            ConfigError: No adapter is active.
        """
        name = self.active_lora
        if name is None:
            raise ConfigError(
                f"no adapter is active, so there is nothing to merge; known are {self.lora_names}"
            )
        with self.backbone.lock:
            self._set_aside(self._lora_in_use())
            merge_lora(self.backbone.unet)
            self.clear_cache()

    def unmerge_lora(self) -> None:
        """Put the weights back as they were; the adapter stays active and trains if it did."""
        if is_merged(self.backbone.unet):
            self.set_lora(self.active_lora)

    def save_lora(self, folder: "str | os.PathLike[str]", *, name: str | None = None) -> None:
        """Write an adapter in peft's layout and, beside it, keyed for diffusers.

        Args:
            folder: `PeftModel.from_pretrained(unet, folder)` and `pipe.load_lora_weights(folder,
                weight_name="pytorch_lora_weights.safetensors")` read it.
            name: Of the adapter; None is the active one.

        Raises:
            ConfigError: There is no such adapter, or none is active.
            OutputError: The folder cannot be written.
        """
        name = self.active_lora if name is None else name
        if name is None:
            raise ConfigError(f"no adapter is active; pass name=, one of {self.lora_names}")
        origin = {"backbone": self.backbone.name, "taps": [tap.name for tap in self._taps]}
        save_lora(self.backbone.unet, folder, name=name, origin=origin)

    def load_lora(
        self,
        folder: "str | os.PathLike[str]",
        *,
        name: str = "default",
        trainable: bool = False,
        other_taps: bool = False,
    ) -> None:
        """Read an adapter that `save_lora` or peft wrote, and use it.

        Args:
            folder: With `adapter_config.json` and `adapter_model.safetensors`.
            name: Under which it is known from now on.
            trainable: Whether it goes on training.
            other_taps: Take an adapter that was trained with other taps, as long as all of it has
                an effect on these.

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
        unet = self.backbone.unet
        with self.backbone.lock:
            left = self._lora_in_use()
            load_lora(unet, folder, name=name, trainable=trainable, only=self._reached())
            self._set_aside(left)
            self._exchanged()

    def add_captioner(
        self,
        clip: "str | os.PathLike[str] | nn.Module | None",
        *,
        processor: Any = None,
        hidden_size: int | None = None,
        layers: int = 2,
    ) -> None:
        """Let CLIP's view of each picture condition the U-Net, beside the prompt or without one.

        From now on `cond` is the prompt, or the empty text where none is given, plus the
        captioner's tokens; `uncond` stays the plain unconditional embedding, and both are equal
        until training begins. CLIP gets the same pictures in its own preprocessing, and stays
        frozen.

        Args:
            clip: A `CLIPVisionModelWithProjection` or `CLIPModel` of transformers, its folder, its
                Hub id, or "shapes-clip". It is saved by name alone.
            processor: CLIP's image processor, whose mean, deviation and cropping count; None takes
                what lies beside a name, and OpenAI's values for a model.
            hidden_size: See `ImplicitCaptioner`.
            layers: See `ImplicitCaptioner`.

        Raises:
            BackboneError: There is no CLIP of that name.
            ConfigError: There is a captioner already, no CLIP, or a value out of range.
        """
        if self.captioner is not None:
            raise ConfigError("this encoder has a captioner already; one is enough")
        embedder = _embedder(clip, processor)
        widths = self._text_widths()
        captioner = ImplicitCaptioner(
            embedder.width, hidden_size=hidden_size, layers=layers, **widths
        )
        self._attach(captioner, embedder)

    def load_captioner(
        self,
        folder: "str | os.PathLike[str]",
        *,
        clip: "str | os.PathLike[str] | nn.Module | None" = None,
        trainable: bool = False,
    ) -> None:
        """Read a captioner that `save_pretrained` wrote.

        Args:
            folder: With `captioner.json` and `captioner.safetensors`.
            clip: As for `add_captioner`; None is the one it was saved with, by name.
            trainable: Whether it goes on training.

        Raises:
            BackboneError: The folder holds no whole captioner, or one for another backbone or
                another CLIP.
            ConfigError: There is a captioner already, or the CLIP was a nameless object.
        """
        if self.captioner is not None:
            raise ConfigError("this encoder has a captioner already; one is enough")
        captioner, told = ImplicitCaptioner.from_pretrained(folder)
        if clip is None and told.get("name") is None:
            raise ConfigError(
                f"{os.fspath(folder)} was saved with a CLIP that had no name; pass clip= again"
            )
        embedder = _embedder(told["name"] if clip is None else clip, told)
        wants = {"image_width": embedder.width, **self._text_widths()}
        has = {key: captioner.options[key] for key in wants}
        if has != wants:
            raise BackboneError(
                f"{os.fspath(folder)} holds a captioner for another backbone or another CLIP: its "
                f"sizes are {has}, and here they are {wants}"
            )
        captioner.requires_grad_(trainable)
        self._attach(captioner, embedder)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that require a gradient, for an optimizer."""
        return (parameter for _, parameter in self.named_trainable_parameters())

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that require a gradient, with their names in `state_dict`."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def summary(self) -> str:
        """A table to print: parts, adapters, their parameters, how many train, and dtypes."""
        unet = self.backbone.unet
        rows: list[tuple[str, list[nn.Parameter]]] = []
        of_lora: set[nn.Parameter] = set()
        for name in self.lora_names:
            found = list(lora_parameters(unet, name).values())
            state = "merged" if is_merged(unet) else "active"
            note = f" ({state})" if name == self.active_lora else ""
            rows.append((f"LoRA {name!r}{note}", found))
            of_lora |= set(found)
        parts: dict[str, nn.Module | None] = {
            **self.backbone.parts(),
            "captioner": self.captioner,
            "clip": self.clip,
        }
        frozen = [
            (name, [p for p in part.parameters() if p not in of_lora])
            for name, part in parts.items()
            if part is not None
        ]
        lines = [f"{'part':28}{'parameters':>14}{'trained':>14}  dtype"]
        lines += [_row(name, found) for name, found in frozen + rows]
        lines.append(_row("all", list(self.parameters())))
        return "\n".join(lines)

    def train(self, mode: bool = True) -> "TrainableParts":
        """Training mode for what has something to train.

        Frozen parts stay in evaluation mode, so that what they compute is remembered.
        """
        super().train(mode)
        for part in (*self.backbone.parts().values(), self.clip):
            if part is not None and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def caption(self, images: Images, embeds: PromptEmbeds) -> PromptEmbeds:
        """Texts with the captioner's tokens added to them; without one, the texts.

        Texts of several windows get them in the first; those of fewer states get the first ones.

        Args:
            images: One or several pictures.
            embeds: A row for each.
        """
        if self.captioner is None:
            return embeds
        if self.clip is None:
            raise ConfigError("the captioner has no CLIP to listen to; use add_captioner(clip)")
        tokens, pooled = self.captioner(self._image_embeds_of(images))
        states = embeds.prompt_embeds
        places = min(states.shape[1], tokens.shape[1])
        added = F.pad(tokens[:, :places], (0, 0, 0, states.shape[1] - places))
        pooled_states = embeds.pooled_prompt_embeds
        if pooled_states is not None and pooled is not None:
            pooled_states = pooled_states + pooled.to(pooled_states.device)
        return replace(
            embeds,
            prompt_embeds=states + added.to(states.device),
            pooled_prompt_embeds=pooled_states,
        )

    def _image_embeds_of(self, images: Images) -> Float[Tensor, "b c"]:
        assert self.clip is not None
        pixel_values = to_pixel_values(
            images,
            size=self.clip.size,
            resize="crop" if self.clip.crops else "squash",
            multiple=1,
        )
        cache = self._image_embeds if self.use_cache else None
        return image_embeds_of(self.clip, pixel_values, cache=cache)

    def _text_widths(self) -> dict[str, Any]:
        with torch.no_grad():
            empty = self.backbone.embed([""], size=(8, 8))
        pooled = empty.pooled_prompt_embeds
        return {
            "width": empty.prompt_embeds.shape[2],
            "length": empty.prompt_embeds.shape[1],
            "pooled_width": None if pooled is None else pooled.shape[1],
        }

    def _attach(self, captioner: ImplicitCaptioner, embedder: ClipEmbedder) -> None:
        device = self.backbone.device
        self.captioner = captioner.to(device).train(self.training)
        self.clip = embedder.to(device)
        self._image_embeds.clear()

    def _reached(self) -> frozenset[str]:
        unet = self.backbone.unet
        return reached_projections(dict(unet.config), [tap.name for tap in self._taps])

    def _lora_in_use(self) -> tuple[str, bool] | None:
        """Name of the active adapter and whether it trains; None where nothing is to be noted."""
        name = self.active_lora
        if name is None or is_merged(self.backbone.unet):
            return None
        parameters = lora_parameters(self.backbone.unet, name).values()
        return name, any(parameter.requires_grad for parameter in parameters)

    def _set_aside(self, left: tuple[str, bool] | None) -> None:
        """Note whether an adapter trains, and freeze it."""
        if left is not None:
            self._waiting[left[0]] = left[1]
            self._train_lora(left[0], False)

    def _train_lora(self, name: str, trains: bool) -> None:
        for parameter in lora_parameters(self.backbone.unet, name).values():
            parameter.requires_grad_(trains)

    def _compiled_unets(self) -> Iterator[nn.Module]:
        """Copies of the U-Net: a layer that is a tap itself has switches of its own there."""
        for compiled in self.backbone.compiled.values():
            outputs = getattr(compiled, "_orig_mod", None)
            if outputs is not None:
                yield outputs.unet

    def _exchanged(self) -> None:
        """Modules of the U-Net were replaced: what was compiled of it no longer holds."""
        self.clear_cache()
        self.backbone.compiled.clear()
        if self._compile_options is not None:
            self.compile(**self._compile_options)

    def _precise(self) -> dict[str, nn.Parameter]:
        """Parameters that are never in float16."""
        found = dict(self.captioner.named_parameters()) if self.captioner is not None else {}
        for name in self.lora_names:
            found |= lora_parameters(self.backbone.unet, name)
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> "TrainableParts":
        before = {path: parameter.data for path, parameter in self._precise().items()}
        self._image_embeds.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for path, parameter in self._precise().items():
            if parameter.dtype == torch.float16:
                gradient, parameter.grad = parameter.grad, None
                parameter.data = before[path].to(parameter.device, torch.float32)
                parameter.grad = None if gradient is None else gradient.to(parameter.data)
        return self


def _embedder(clip: Any, processor: Any) -> ClipEmbedder:
    if clip is None:
        raise ConfigError(
            "a captioner needs a CLIP: pass a CLIPVisionModelWithProjection or CLIPModel of "
            "transformers, its folder, or its Hub id"
        )
    if isinstance(clip, (str, os.PathLike)):
        path = Path(clip)
        return ClipEmbedder.from_name(path.absolute() if path.is_dir() else clip)
    return ClipEmbedder(clip, processor=processor)


def _row(name: str, parameters: list[nn.Parameter]) -> str:
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    count = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return f"{name:28}{count:>14,}{trained:>14,}  {', '.join(dtypes)}"
