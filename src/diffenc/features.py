"""What an encoder reads: maps per tap in one of four conditionings, and tokens made of them."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, get_args, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc._typing import Conditioning
from diffenc.checks.arguments import number, shown, sides
from diffenc.checks.fields import require_finite
from diffenc.config import check_choice
from diffenc.denoiser.adaptive_norm import MASSIVE_RATIO, massive_channels
from diffenc.denoiser.grids import to_tokens
from diffenc.denoiser.registers import REGISTER_RATIO, register_cells, without_cells
from diffenc.errors import ConfigError, TapError, near_matches

Maps: TypeAlias = dict[str, Tensor]
"""Feature maps by tap, each (b c h w), or (b t c h w) for several timesteps."""


_OF_TENSORS = frozenset(
    ("shape", "size", "dtype", "device", "mean", "numpy", "to", "cpu", "cuda", "detach", "float")
)
"""Attributes that are tried on features by those who expect a tensor."""


def check_guidance(guidance_scale: float | None, conditioning: str) -> None:
    """Raise a `ConfigError` unless a scale is a finite number, and something that reads it."""
    if guidance_scale is None:
        return
    number("guidance_scale", guidance_scale)
    if conditioning != "cfg":
        raise ConfigError(
            f"guidance_scale={guidance_scale} is read by conditioning='cfg' alone, and this call "
            f"gives {conditioning!r}; pass conditioning='cfg' too, or leave the scale out"
        )


class Features(Mapping[str, Tensor]):
    """Feature maps per tap, (b channels h w), in the dtype and on the device of the backbone.

    As a mapping it holds the maps in one conditioning; `select` gives another one of the same
    pass, without running anything. `features[0]` is the map of the first tap, `features[-1]` that
    of the last, and `features[1:]` the features of some taps.

    Attributes:
        conditioning: Conditioning of the maps that the mapping holds: "uncond", "cond", "cfg" or
            "concat".
        guidance_scale: Guidance scale s in f_u + s (f_c - f_u), where f_u and f_c are the
            unconditional and the conditional features.
        grid: Token grid that `tokens` makes by default, (height, width).
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
        self.conditioning, self.guidance_scale = conditioning, float(guidance_scale)
        self.grid, self.truncated = grid, truncated
        self._maps = self._derive(conditioning, self.guidance_scale)

    @overload
    def __getitem__(self, tap: str | int) -> Float[Tensor, "b *t c h w"]: ...

    @overload
    def __getitem__(self, tap: slice) -> "Features": ...

    def __getitem__(self, tap: str | int | slice) -> "Tensor | Features":
        if isinstance(tap, slice):
            return self._some(list(self._maps)[tap])
        if isinstance(tap, int) and -len(self) <= tap < len(self):
            return list(self._maps.values())[tap]
        if not isinstance(tap, str) or tap not in self._maps:
            raise TapError(
                f"no tap {shown(tap)} was read.{near_matches(tap, self._maps)} These were: "
                f"{list(self._maps)}. features[tap] takes a name or a place in this list; its rows "
                "are the images"
            )
        return self._maps[tap]

    def _some(self, taps: list[str]) -> "Features":
        if not taps:
            raise TapError(f"the slice leaves no tap; there are {len(self)}: {list(self._maps)}")
        halves = {
            name: half and {tap: half[tap] for tap in taps} for name, half in self._halves.items()
        }
        return self._with(halves)

    def __getattr__(self, name: str) -> Any:
        hint = ""
        if name in _OF_TENSORS and "_maps" in self.__dict__:
            hint = (
                f": a Features holds a tensor per tap. Read it of one of them, features[0].{name}, "
                f"or of all as tokens, features.tokens().{name}"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def __repr__(self) -> str:
        lines = [f"  {tap!r}: {tuple(maps.shape)}," for tap, maps in self._maps.items()]
        scale = f", guidance_scale={self.guidance_scale:g}" if self.conditioning == "cfg" else ""
        return "\n".join([f"Features({self.conditioning!r}{scale}", *lines, ")"])

    def select(
        self, conditioning: Conditioning, *, guidance_scale: float | None = None
    ) -> "Features":
        """The same pass in another conditioning, in memory of its own.

        Args:
            conditioning: Conditioning of the result: "uncond", "cond", "cfg" or "concat".
            guidance_scale: Scale for "cfg"; None keeps this object's.

        Raises:
            ConfigError: It needs a half that was not computed, or the scale is not "cfg"'s.
        """
        check_guidance(guidance_scale, conditioning)
        scale = self.guidance_scale if guidance_scale is None else float(guidance_scale)
        copies = {
            name: half and {tap: features.clone() for tap, features in half.items()}
            for name, half in self._halves.items()
        }
        return Features(
            uncond=copies["uncond"],
            cond=copies["cond"],
            conditioning=conditioning,
            guidance_scale=scale,
            grid=self.grid,
            truncated=self.truncated,
        )

    def tokens(self, grid: int | tuple[int, int] | None = None) -> Float[Tensor, "b *t n c"]:
        """All taps on one grid, channels concatenated in tap order, cells row by row.

        Args:
            grid: Side, or (height, width), of the token grid; None takes the encoder's.

        Raises:
            ConfigError: A grid that is none.
        """
        return to_tokens(self._maps, self.grid if grid is None else sides("grid", grid))

    def to_list(self) -> list[Float[Tensor, "b *t c h w"]]:
        """The maps from fine to coarse, as timm's `features_only` gives them.

        Maps of one size stay in tap order.
        """
        return sorted(self._maps.values(), key=lambda m: m.shape[-2] * m.shape[-1], reverse=True)

    def registers(self, *, ratio: float = REGISTER_RATIO) -> dict[str, Bool[Tensor, "b *t h w"]]:
        """Cells that act as registers, at every tap: True where either half has one.

        Args:
            ratio: Factor above 1 by which a register is longer than its picture's median cell and
                than those around it; see `diffenc.denoiser.registers.register_cells`.

        Raises:
            ConfigError: Another ratio.

        Examples:
            >>> from diffenc.encoder import DiffusionEncoder
            >>> features = DiffusionEncoder.from_pretrained("shapes").extract(picture)
            >>> [int(cells.sum()) for cells in features.registers().values()]
            [0, 0, 0]
        """
        halves = [half for half in self._halves.values() if half is not None]
        registers = {tap: register_cells(maps, ratio=ratio) for tap, maps in halves[0].items()}
        for half in halves[1:]:
            for tap, maps in half.items():
                registers[tap] = registers[tap] | register_cells(maps, ratio=ratio)
        return registers

    def massive_channels(self, *, ratio: float = MASSIVE_RATIO) -> dict[str, tuple[int, ...]]:
        """Channels that dwarf the others at every tap, in either half, as `discard` takes them.

        Of FLUX, read the block before the norm that is tapped: what that block gives is the norm's
        input.

        Args:
            ratio: Factor above 1 by which a massive channel's mean magnitude exceeds that of the
                median channel.

        Raises:
            ConfigError: Another ratio.
        """
        halves = [half for half in self._halves.values() if half is not None]
        return {
            tap: tuple(
                sorted(
                    {each for half in halves for each in massive_channels(half[tap], ratio=ratio)}
                )
            )
            for tap in halves[0]
        }

    def without_registers(self, *, ratio: float = REGISTER_RATIO) -> "Features":
        """The same features, with the mean of the cells around in the place of each register.

        What is made of them, such as tokens on a coarser grid, then knows nothing of registers.

        Args:
            ratio: Factor above 1 that decides what a register is; see `registers`.

        Raises:
            ConfigError: Another ratio.
        """
        registers = self.registers(ratio=ratio)
        halves = {
            name: half
            and {tap: without_cells(maps, registers[tap]).clone() for tap, maps in half.items()}
            for name, half in self._halves.items()
        }
        return self._with(halves)

    def _with(self, halves: dict[str, Maps | None]) -> "Features":
        return Features(
            uncond=halves["uncond"],
            cond=halves["cond"],
            conditioning=self.conditioning,
            guidance_scale=self.guidance_scale,
            grid=self.grid,
            truncated=self.truncated,
        )

    def _half(self, name: str, conditioning: Conditioning) -> Maps:
        half = self._halves[name]
        if half is None:
            raise ConfigError(
                f"conditioning {conditioning!r} needs the {name} features, which were not "
                "computed; pass prompts and conditioning='cfg' or 'concat' to `extract` to have "
                "both"
            )
        return half

    def _derive(self, conditioning: Conditioning, scale: float) -> Maps:
        check_choice("conditioning", conditioning, get_args(Conditioning))
        if conditioning in ("uncond", "cond"):
            return self._half(conditioning, conditioning)
        uncond, cond = self._half("uncond", conditioning), self._half("cond", conditioning)
        if conditioning == "concat":
            return {name: torch.cat([uncond[name], cond[name]], dim=-3) for name in cond}
        guided = {name: torch.lerp(uncond[name], cond[name], float(scale)) for name in cond}
        for name, features in guided.items():
            require_finite(
                features,
                f"features at {name!r} under guidance_scale={scale}",
                "take a smaller scale, or load the model with dtype=torch.float32",
            )
        return guided
