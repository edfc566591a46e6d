"""What the public objects are told to do, as frozen dataclasses that check themselves."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from diffenc._typing import Conditioning, Posterior, Resize, Uncond
from diffenc.errors import ConfigError, near_matches


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise a `ConfigError` that lists the allowed words unless `value` is one of them."""
    if value not in allowed:
        hint = near_matches(value, allowed) if isinstance(value, str) else ""
        raise ConfigError(f"{name} must be one of {list(allowed)}, got {value!r}.{hint}")


def check_pair(name: str, value: object) -> None:
    """Raise unless `value` is a positive int, two of them, or None."""
    sides = value if isinstance(value, tuple) else (value,)
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if value is None or (whole and len(sides) <= 2 and all(side > 0 for side in sides)):
        return
    raise ConfigError(f"{name} must be a positive int or (height, width), got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """What to read from the U-Net, at which noise level, and under which text.

    Attributes:
        taps: Module paths or globs of the U-Net, in the order in which features are returned;
            None takes the backbone's default set.
        timestep: Scheduler step, 0 (clean) to 999 (pure noise).
        size: Side of the square that images are brought to, or (height, width), in pixels; None
            takes the backbone's own.
        resize: "squash" ignores the aspect ratio, "crop" keeps the middle, "pad" adds grey,
            "none" keeps the size and pads to a multiple of what the model needs.
        conditioning: What `extract` and the tokens hold by default; None is "cond" with prompts
            and "uncond" without.
        guidance_scale: s of f_u + s (f_c - f_u), for "cfg".
        seed: Of the one noise tensor that all images, prompts and halves share.
        posterior: Take the mode of the VAE's posterior, or a seeded sample.
        uncond: Which embedding is "unconditional": "zeros", "empty" (the empty text's), or None
            for the model's own rule.
        grid: Side, or (height, width), of the token grid; None takes the middle tap's by
            resolution.
    """

    taps: tuple[str, ...] | None = None
    timestep: int = 50
    size: int | tuple[int, int] | None = None
    resize: Resize = "squash"
    conditioning: Conditioning | None = None
    guidance_scale: float = 1.5
    seed: int = 0
    posterior: Posterior = "mode"
    uncond: Uncond | None = None
    grid: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.taps is not None and (isinstance(self.taps, str) or not self.taps):
            raise ConfigError(
                f"taps must be a tuple of module paths with at least one entry, got {self.taps!r}"
            )
        if isinstance(self.timestep, bool) or not isinstance(self.timestep, int):
            raise ConfigError(f"timestep must be an int, got {self.timestep!r}")
        if not 0 <= self.timestep < 1000:
            raise ConfigError(
                f"timestep must be in [0, 1000), got {self.timestep}. It counts scheduler steps; "
                "for a fraction of the schedule pass int(fraction * 1000)."
            )
        check_pair("size", self.size)
        check_pair("grid", self.grid)
        check_choice("resize", self.resize, get_args(Resize))
        check_choice("posterior", self.posterior, get_args(Posterior))
        if self.conditioning is not None:
            check_choice("conditioning", self.conditioning, get_args(Conditioning))
        if self.uncond is not None:
            check_choice("uncond", self.uncond, get_args(Uncond))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EncoderConfig":
        """Inverse of `to_dict`, lists read as tuples.

        Raises:
            ConfigError: A key is no attribute.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - known):
            hint = near_matches(unknown[0], known)
            raise ConfigError(f"unknown options {unknown}; known are {sorted(known)}.{hint}")
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**plain)
