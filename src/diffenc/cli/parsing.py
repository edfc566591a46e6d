"""Texts of a command line as values: sizes, timesteps, heads."""

import math

from diffenc.errors import ConfigError


def parse_size(text: str) -> int | tuple[int, int]:
    """Read ``"512"`` as 512 and ``"384x512"`` as (384, 512).

    Raises:
        ConfigError: Anything else.
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ConfigError(f"size must be like 512 or 384x512 (height x width), got {text!r}")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def parse_timestep(text: str) -> int | tuple[int, ...]:
    """Read ``"50"`` as 50 and ``"50,261"`` as (50, 261).

    Raises:
        ConfigError: Anything else.
    """
    steps = parse_timesteps(text, option="timestep")
    return steps[0] if len(steps) == 1 else steps


def parse_timesteps(text: str, *, option: str = "timesteps") -> tuple[int, ...]:
    """Read ``"50"`` as (50,) and ``"50,261"`` as (50, 261).

    Args:
        text: Value of the option.
        option: Name of the option, for the message.

    Raises:
        ConfigError: Anything else.
    """
    steps = text.split(",")
    if not all(step.strip().isdecimal() for step in steps):
        raise ConfigError(f"{option} must be like 50 or 50,261, got {text!r}")
    return tuple(int(step) for step in steps)


def parse_heads(text: str) -> tuple[int, ...]:
    """Read ``"0,3"`` as (0, 3).

    Raises:
        ConfigError: Anything else.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"heads must be like 0 or 0,3, got {text!r}")
    return tuple(map(int, parts))


def parse_channels(text: str) -> tuple[int, ...]:
    """Read ``"154,1446"`` as (154, 1446), and ``"none"`` as ().

    Raises:
        ConfigError: Anything else.
    """
    if text == "none":
        return ()
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(
            f"--discard takes channels with commas, such as 154,1446, or none, got {text!r}; "
            "Features.massive_channels finds those of a model"
        )
    return tuple(map(int, parts))


def parse_scales(text: str) -> tuple[float, ...]:
    """Read ``"1,1.5,4"`` as (1.0, 1.5, 4.0).

    Raises:
        ConfigError: Anything else.
    """
    try:
        scales = tuple(map(float, text.split(",")))
    except ValueError:
        scales = ()
    if not scales or not all(map(math.isfinite, scales)):
        raise ConfigError(f"guidance scales must be like 1,1.5,4, got {text!r}")
    return scales
