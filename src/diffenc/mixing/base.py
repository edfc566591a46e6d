"""What all ways of mixing two streams have in common: sizes, seeded weights, a folder."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffenc._typing import Mixed
from diffenc.errors import OutputError, ShapeError
from diffenc.mixing.config import MixingConfig
from diffenc.runtime.inference import lasting
from diffenc.runtime.precision import restore_precise
from diffenc.storage.names import checked_path
from diffenc.storage.tensors import write_tensors
from diffenc.storage.writing import begin_folder, write_json

CONFIG_FILE, WEIGHTS_FILE = "mixer.json", "mixer.safetensors"


class GroupNorms(nn.Module):
    """A layer norm for each group of neighbouring channels.

    U-Net activations differ in scale from tap to tap by orders of magnitude; one norm over all of
    them would hear the loudest alone.
    """

    def __init__(self, groups: Sequence[int]) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, dtype=torch.float32, device="meta") for width in groups
        )

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Each group normed by itself."""
        parts = tokens.split(self.groups, dim=-1)
        return torch.cat([norm(part) for norm, part in zip(self.norms, parts, strict=True)], -1)


class Mixer(nn.Module):
    """Base of what makes one stream of tokens of two.

    It is built on the meta device, without memory; `make_mixer` and `load_mixer` give it weights.
    Weights are float32 when they are made, and stay so when the encoder is cast to float16. Tokens
    of another dtype are mixed in that of the weights, and given back in their own.

    Args:
        clip_channels: Channel counts of the groups that make up CLIP's tokens.
        diffusion_channels: Channel counts of the groups that make up the diffusion encoder's
            tokens: one group for each tap and half.
        text_width: Number of channels of a text state, for "question_gated"; None otherwise.
        config: Options of the mixer.

    Attributes:
        how: Name of the way in which the streams are mixed.
        channels: Channel counts of the groups that make up the tokens of the result.
    """

    how: ClassVar[Mixed]
    channels: tuple[int, ...]

    def __init__(
        self,
        clip_channels: Sequence[int],
        diffusion_channels: Sequence[int],
        *,
        text_width: int | None = None,
        config: MixingConfig,
    ) -> None:
        super().__init__()
        self.clip_channels = tuple(clip_channels)
        self.diffusion_channels = tuple(diffusion_channels)
        self.text_width, self.config = text_width, config

    @property
    def width(self) -> int:
        """Channels of a token of the result."""
        return sum(self.channels)

    @property
    def sizes(self) -> dict[str, Any]:
        """What the two streams, and the text, must have."""
        return {
            "clip_channels": self.clip_channels,
            "diffusion_channels": self.diffusion_channels,
            "text_width": self.text_width,
        }

    def forward(
        self,
        clip: Float[Tensor, "b _n _c"],
        diffusion: Float[Tensor, "b _m _d"],
        text: Float[Tensor, "b _t"] | None = None,
        there: Bool[Tensor, "b _m"] | None = None,
    ) -> Float[Tensor, "b _k _w"]:
        """Mix two streams.

        Args:
            clip: Tokens of CLIP.
            diffusion: Tokens of the diffusion encoder.
            text: State of each prompt, for "question_gated"; None otherwise.
            there: Mask of the diffusion encoder's tokens that there are, for "cross_attention";
                others are not attended to, and stay zeros where they ask. None is all.

        Returns:
            One stream of tokens, in the dtype of `clip`.

        Raises:
            ShapeError: Other widths than this mixer was made for, or numbers of tokens that do not
                go together.
        """
        self._check(clip, diffusion, text)
        dtype = next(self.parameters()).dtype
        read = None if text is None else text.to(dtype)
        return self._mix(clip.to(dtype), diffusion.to(dtype), read, there).to(clip.dtype)

    def _mix(
        self, clip: Tensor, diffusion: Tensor, text: Tensor | None, there: Tensor | None
    ) -> Tensor:
        raise NotImplementedError

    def _begin(self) -> None:
        """Set what does not begin as other weights do."""

    def _check(self, clip: Tensor, diffusion: Tensor, text: Tensor | None) -> None:
        has = (clip.shape[-1], diffusion.shape[-1])
        wants = (sum(self.clip_channels), sum(self.diffusion_channels))
        if has != wants:
            raise ShapeError(
                f"this mixer was made for streams of {wants[0]} and {wants[1]} channels, got "
                f"{has[0]} and {has[1]}; taps and conditioning must stay as they were then"
            )
        if self.text_width is not None and (text is None or text.shape[-1] != self.text_width):
            shape = "none" if text is None else str(tuple(text.shape))
            raise ShapeError(f"this gate reads a text state of {self.text_width}, got {shape}")

    @torch.no_grad()
    def fill(self) -> None:
        """Initial weights by `config.seed`; torch's own generator is left alone."""
        generator = torch.Generator("cpu").manual_seed(self.config.seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = (6 / (module.in_features + module.out_features)) ** 0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1)
                module.bias.zero_()
        self._begin()

    def save_pretrained(self, folder: "str | os.PathLike[str]") -> None:
        """Write `mixer.json` and `mixer.safetensors`; `load_mixer` is the inverse.

        Raises:
            OutputError: The folder cannot be written.
        """
        target = begin_folder(checked_path("a mixer", folder, error=OutputError), CONFIG_FILE)
        write_tensors(target / WEIGHTS_FILE, self.state_dict())
        description = {"how": self.how, **self.sizes, "config": asdict(self.config)}
        write_json(target / CONFIG_FILE, description)

    @lasting
    def _apply(self, fn: Any, recurse: bool = True) -> "Mixer":
        before = {path: parameter.data for path, parameter in self.named_parameters()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        restore_precise(dict(self.named_parameters()), before)
        return self
