"""All that is trained inside an encoder, on one base class: LoRA and the implicit captioner."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from diffenc.denoiser.lora.adapters import is_merged, lora_parameters
from diffenc.runtime.inference import lasting
from diffenc.runtime.precision import restore_precise
from diffenc.tuning.captioner import CaptionerPart
from diffenc.tuning.lora import LoraPart
from diffenc.tuning.summary import parameter_table


class TrainableParts(LoraPart, CaptionerPart):
    """Base of `DiffusionEncoder`: adds, switches, saves and lists what trains.

    Everything else in the encoder stays frozen. The parts that train are in float32 when they are
    made, and casting the encoder to float16 leaves them there: in float16 they do not survive
    training.

    Attributes:
        backbone: Frozen model; LoRA lives in its U-Net.
        captioner: The implicit captioner, or None.
        clip: Frozen CLIP whose image embedding the captioner reads; None without a captioner.
        use_cache: Whether to remember what was computed before, see `DiffusionEncoder`.
    """

    def clear_cache(self) -> None:
        """Forget latents, prompts and features; needed after writes through `.data`."""
        super().clear_cache()
        self._image_embeds.clear()

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that require a gradient, for an optimizer."""
        return (parameter for _, parameter in self.named_trainable_parameters())

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that require a gradient, with their names in `state_dict`."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def summary(self) -> str:
        """A table to print: parts, adapters, their parameters, how many train, and dtypes."""
        return parameter_table({**self.parameter_groups(), "all": list(self.parameters())})

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of each part and adapter, by its name."""
        unet = self.backbone.denoiser
        adapters: dict[str, list[nn.Parameter]] = {}
        for name in self.lora_names:
            state = "merged" if is_merged(unet) else "active"
            note = f" ({state})" if name == self.active_lora else ""
            adapters[f"LoRA {name!r}{note}"] = list(lora_parameters(unet, name).values())
        of_lora = {parameter for parameters in adapters.values() for parameter in parameters}
        parts: dict[str, nn.Module | None] = {
            **self.backbone.parts(),
            "captioner": self.captioner,
            "clip": self.clip,
        }
        plain = {
            name: [p for p in part.parameters() if p not in of_lora]
            for name, part in parts.items()
            if part is not None
        }
        return {**plain, **adapters}

    def train(self, mode: bool = True) -> "TrainableParts":
        """Training mode for what has something to train.

        Frozen parts stay in evaluation mode, so that what they compute is remembered.
        """
        super().train(mode)
        for part in (*self.backbone.parts().values(), self.clip):
            if part is not None and not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def _precise(self) -> dict[str, nn.Parameter]:
        """Parameters that are never in float16."""
        parameters = dict(self.captioner.named_parameters()) if self.captioner is not None else {}
        for name in self.lora_names:
            parameters |= lora_parameters(self.backbone.denoiser, name)
        return parameters

    @lasting
    def _apply(self, fn: Any, recurse: bool = True) -> "TrainableParts":
        with self.backbone.lock:
            before = {path: parameter.data for path, parameter in self._precise().items()}
            self._image_embeds.clear()
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            restore_precise(self._precise(), before)
        return self
