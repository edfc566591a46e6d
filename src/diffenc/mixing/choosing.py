"""The mixer of a way of fusing: made anew, or read from a folder."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffenc._typing import Mixed
from diffenc.config import check_choice
from diffenc.errors import BackboneError, ConfigError
from diffenc.mixing.attention import CrossAttention
from diffenc.mixing.base import CONFIG_FILE, WEIGHTS_FILE, Mixer
from diffenc.mixing.config import MIXED, MixingConfig
from diffenc.mixing.gates import Add, Gated, QuestionGated, TokenGated, Weighted
from diffenc.runtime.inference import lasting
from diffenc.storage.names import checked_path, reason
from diffenc.storage.reading import read_json
from diffenc.storage.schema import checked, make
from diffenc.storage.tensors import misfits, read_tensors

_KINDS: dict[str, type[Mixer]] = {
    kind.how: kind for kind in (CrossAttention, Add, Weighted, Gated, TokenGated, QuestionGated)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Saved:
    """What `mixer.json` says, but for the config in it."""

    how: Mixed
    clip_channels: tuple[int, ...]
    diffusion_channels: tuple[int, ...]
    text_width: int | None

    def __post_init__(self) -> None:
        widths = (*self.clip_channels, *self.diffusion_channels, self.text_width or 1)
        if min(widths) < 1 or not self.clip_channels or not self.diffusion_channels:
            raise ConfigError(f"widths must be 1 or more, got {widths}")
        if (self.text_width is not None) != (self.how == "question_gated"):
            raise ConfigError(f"text_width is {self.text_width} for how={self.how!r}")


@lasting
def make_mixer(
    how: Mixed,
    clip_channels: Sequence[int],
    diffusion_channels: Sequence[int],
    *,
    text_width: int | None = None,
    config: MixingConfig | None = None,
    device: str | torch.device = "cpu",
) -> Mixer:
    """A mixer with the weights that its seed gives, in float32.

    Args:
        how: Name of the way in which the streams are mixed.
        clip_channels: Channel counts of the groups that make up CLIP's tokens.
        diffusion_channels: Channel counts of the groups that make up the diffusion encoder's
            tokens: one group for each tap and half.
        text_width: Number of channels of a text state, for "question_gated"; None otherwise.
        config: Options of the mixer; None is `MixingConfig()`.
        device: Device on which the weights are made; "meta" makes none.

    Raises:
        ConfigError: No such way, or options that do not fit it.
    """
    check_choice("how", how, MIXED)
    config = config or MixingConfig()
    config.check_read(how)
    width = text_width if how == "question_gated" else None
    mixer = _KINDS[how](clip_channels, diffusion_channels, text_width=width, config=config)
    if torch.device(device).type == "meta":
        return mixer
    mixer.to_empty(device="cpu")
    mixer.fill()
    return mixer.to(device)


@lasting
def load_mixer(folder: "str | os.PathLike[str]") -> Mixer:
    """Inverse of `Mixer.save_pretrained`.

    Raises:
        BackboneError: The folder holds no whole mixer, or weights that do not fit its config.
    """
    source = checked_path("a mixer", folder, error=BackboneError)
    try:
        values: dict[str, Any] = read_json(source / CONFIG_FILE)
        config = make(MixingConfig, checked(values.pop("config", None), dict[str, Any], "config"))
        saved: _Saved = make(_Saved, values)
        state = read_tensors(source / WEIGHTS_FILE, finite=True)
        options: dict[str, Any] = {"text_width": saved.text_width, "config": config}
        if saved.how == "cross_attention" and config.blocks > len(state):
            raise ConfigError(f"{config.blocks} blocks, and {len(state)} weights")
        # Without memory at first: a config may ask for any amount of it.
        mixer = make_mixer(
            saved.how, saved.clip_channels, saved.diffusion_channels, device="meta", **options
        )
        own = mixer.state_dict()
        if wrong := misfits(state, own):
            has, wants = (
                tuple(each[wrong[0]].shape) if wrong[0] in each else "nothing"
                for each in (state, own)
            )
            raise ConfigError(f"{wrong[0]} is {has} in the file, and {wants} by the config")
    except Exception as error:  # torch raises three kinds of errors for sizes beyond its own
        raise BackboneError(
            f"{source} does not hold the mixer of a fused encoder ({CONFIG_FILE} and "
            f"{WEIGHTS_FILE}): {reason(error)}"
        ) from error
    mixer.to_empty(device="cpu")
    mixer.load_state_dict(state)
    return mixer
