"""A vision tower in one string, such as ``diffenc:sdxl?t=50&taps=up0a0b7&rank=16``.

Hosts keep one free text about their tower, `config.mm_vision_tower`; everything that a tower is
told fits into it. The text that `str(spec)` gives holds no dot, comma or semicolon, at which some
hosts split, and no name of another tower.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, get_args
from urllib.parse import quote, unquote

from diffenc._typing import Conditioning, How, Placed, Reused, Tokens, Uncond
from diffenc.checks.arguments import whole
from diffenc.checks.fields import conform
from diffenc.config import EncoderConfig, check_choice
from diffenc.denoiser.grids import middle_grid
from diffenc.errors import ConfigError, near_matches
from diffenc.hosts.fused_encoders import Companion, find_companion
from diffenc.models import Architecture, TapInfo, describe
from diffenc.models.device import DTYPE_NAMES, SHORT_DTYPES
from diffenc.models.sources import DOTLESS, lasting_source
from diffenc.models.tap_names import is_literature_name
from diffenc.passes.question_tokens import token_channels, token_count

PREFIX = "diffenc:"
DTYPES = SHORT_DTYPES
_SHORT_NAMES = {kind: name for name, kind in SHORT_DTYPES.items()}
_STAGES = {"up": "up_blocks", "down": "down_blocks", "mid": "mid_block"}
_LAYERS = {"a": "attentions", "r": "resnets", "b": "transformer_blocks"}
_SHORT_TAP = re.compile(r"(up|down|mid)(\d*)((?:[arb]\d+)*)((?:-\w+)*)")
_SAFE = "/-_~+"

# Key in the text: attribute. Other people's words for the same come after.
_KEYS = {
    "taps": "taps",
    "t": "timestep",
    "size": "size",
    "grid": "grid",
    "tokens": "tokens",
    "k": "word_count",
    "cond": "conditioning",
    "scale": "guidance_scale",
    "draws": "draws",
    "batch": "batch_size",
    "noise": "noise",
    "seed": "seed",
    "uncond": "uncond",
    "reuse": "reuse",
    "rank": "rank",
    "alpha": "alpha",
    "fuse": "fuse",
    "how": "how",
    "null": "null",
    "prompted": "prompted",
    "cut": "cut",
    "dtype": "dtype",
}
_SYNONYMS = {
    "words": "k",
    "lora": "rank",
    "clip": "fuse",
    "timestep": "t",
    "guidance": "scale",
    "tap": "taps",
}


SPEC_KEYS = (*_KEYS, *_SYNONYMS)
"""Words for options in the text of a spec."""


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """Options of a tower, checked before any weight is read.

    Attributes:
        model: Name of the model: an alias, a Hub id or a diffusers folder, as for
            `DiffusionEncoder.from_pretrained`.
        taps: Module paths of the U-Net; None takes the model's own set.
        timestep: Scheduler step, 0 (clean) to 999 (pure noise).
        size: Side of the square that the tower takes, in pixels; None is the model's own.
        grid: Side of the square of tokens; None takes the middle tap's.
        tokens: Kind of the tokens, "grid", "words" or "grid+words", as in `EncoderConfig`.
        word_count: Number of tokens of words, as in `EncoderConfig`.
        conditioning: Conditioning of the features, as in `EncoderConfig`; None is "cond" with
            prompts and "uncond" without.
        guidance_scale: Guidance scale, which only the conditioning "cfg" reads.
        draws: Number of noise tensors per timestep, as in `EncoderConfig`.
        batch_size: Largest number of rows per call of the U-Net, as in `EncoderConfig`; None is all
            at once.
        noise: Kind of noise, "shared" or None, as in `EncoderConfig`.
        seed: Seed of the noise, as in `EncoderConfig`, and of the adapter's initial weights.
        uncond: Rule of the unconditional embedding, as in `EncoderConfig`; None is the model's own.
        reuse: Part of the U-Net that runs without the text, as in `EncoderConfig`; not with an
            adapter that trains.
        rank: Rank of the trainable adapter; None has no adapter.
        alpha: Numerator of the adapter's scale alpha / rank; None is the rank, a scale of 1.
        fuse: CLIP or SigLIP whose tokens are joined to the diffusion model's: an alias such as
            "vitl336", or a folder. None joins none.
        how: Way in which the two are joined, see `FusedEncoder`; a way with weights of its own is
            refused.
        null: Prompt of images that come without one; "" is unconditional.
        prompted: Whether the adapter was trained with prompts; the tower then warns once when it is
            called without one.
        cut: Whether to load nothing that lies behind the last tap.
        dtype: Floating point type of the frozen model, whatever the host casts it to: "fp32",
            "bf16" or "fp16"; "float32", "bfloat16" and "float16" are the same. None follows the
            host.
    """

    model: str
    taps: tuple[str, ...] | None = None
    timestep: int = 50
    size: int | None = None
    grid: int | None = None
    tokens: Tokens = "grid"
    word_count: int = 8
    conditioning: Conditioning | None = None
    guidance_scale: float = 1.5
    draws: int = 1
    batch_size: int | None = None
    noise: str | None = "shared"
    seed: int = 0
    uncond: Uncond | None = None
    reuse: Reused | None = None
    rank: int | None = None
    alpha: float | None = None
    fuse: str | None = None
    how: How = "channel"
    null: str = ""
    prompted: bool = False
    cut: bool = True
    dtype: str | None = None

    def __post_init__(self) -> None:
        conform(self)
        if not self.model or self.model != self.model.strip():
            raise ConfigError(f"model must be an alias, a Hub id or a folder, got {self.model!r}")
        # A host keeps the text, and may read it in another directory.
        object.__setattr__(self, "model", lasting_source(self.model))
        if self.rank is not None:
            whole("rank", self.rank, least=1)
        if self.alpha is not None and (self.rank is None or not 0 < self.alpha < math.inf):
            raise ConfigError(f"alpha must be above 0 and needs a rank, got {self.alpha!r}")
        if self.rank is not None and self.reuse is not None:
            raise ConfigError(
                f"rank={self.rank} trains the denoiser under the text, and reuse={self.reuse} runs "
                "a part of it without; leave one of them out"
            )
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")
        if self.dtype is not None:
            check_choice("dtype", self.dtype, list(DTYPE_NAMES))
            object.__setattr__(self, "dtype", _SHORT_NAMES[DTYPE_NAMES[self.dtype]])
        check_choice("how", self.how, get_args(How))
        if self.how not in get_args(Placed):
            raise ConfigError(
                f"how={self.how} has weights of its own, for which no host has a place; in a tower "
                f"take one of {', '.join(get_args(Placed))}, or train a FusedEncoder in a "
                "DiffusionVLM (diffenc train)"
            )
        if self.fuse is not None:
            object.__setattr__(self, "fuse", find_companion(self.fuse).spelling)
        usual = {field.name: field.default for field in fields(self)}
        self._check_read([name for name, value in usual.items() if getattr(self, name) != value])
        self.encoder_config()

    def _check_read(self, named: Collection[str]) -> None:
        """Raise where an option is named that nothing reads beside the others."""
        if "word_count" in named and self.tokens == "grid":
            raise ConfigError(
                f"k={self.word_count} counts tokens of words; add tokens=words or tokens=grid+words"
            )
        if "guidance_scale" in named and self.conditioning != "cfg":
            raise ConfigError(
                f"scale={self.guidance_scale:g} is read with cond=cfg alone; add that"
            )
        if "how" in named and self.fuse is None:
            raise ConfigError(f"how={self.how} joins a second encoder; name it by fuse=")
        if "grid" in named and self.fuse is None and self.tokens == "words":
            raise ConfigError(
                f"grid={self.grid} is of cells, and tokens=words has none; leave it out"
            )

    def encoder_config(self) -> EncoderConfig:
        """The options of `DiffusionEncoder` that this tower reads with."""
        return EncoderConfig(
            taps=self.taps,
            timestep=self.timestep,
            size=self.size,
            grid=self.grid,
            tokens=self.tokens,
            word_count=self.word_count,
            conditioning=self.conditioning,
            guidance_scale=self.guidance_scale,
            draws=self.draws,
            batch_size=self.batch_size,
            noise=self.noise,  # type: ignore[arg-type]  # the config checks it
            seed=self.seed,
            uncond=self.uncond,
            reuse=self.reuse,
        )

    @classmethod
    def is_spec(cls, name: object) -> bool:
        """Whether a name is meant for diffenc, well formed or not."""
        return isinstance(name, str) and name.startswith(PREFIX)

    @classmethod
    def parse(cls, text: str) -> "TowerSpec":
        """Read ``diffenc:<model>?<key>=<value>&...``.

        Args:
            text: Keys may come in any order; a tap is a module path or its short form, "up1" for
                `up_blocks.1`, "up1a0b7" for `up_blocks.1.attentions.0.transformer_blocks.7`;
                several taps are joined by "+"; anything may be percent-encoded.

        Raises:
            ConfigError: It does not parse; the message points at the part that does not.
        """
        if not cls.is_spec(text):
            raise ConfigError(
                f"a tower is named {PREFIX}<model>[?<key>=<value>&...], such as "
                f"'{PREFIX}sdxl?t=50&rank=16', got {text!r}"
            )
        name, mark, options = text.removeprefix(PREFIX).partition("?")
        if not name:
            raise _at(text, len(PREFIX), 1, f"a model must follow; known are {sorted(DOTLESS)}")
        values: dict[str, Any] = {"model": unquote(name)}
        start = len(PREFIX) + len(name) + len(mark)
        for part in options.split("&") if mark else ():
            _read_part(text, start, part, values)
            start += len(part) + 1
        try:
            spec = cls(**values)
            spec._check_read(values)  # those too that are as usual
        except ConfigError as error:
            raise ConfigError(f"{error} (in {text!r})") from error
        return spec

    def __str__(self) -> str:
        """The text that `parse` reads back to an equal spec; what is as usual is left out."""
        dotless = {alias: short for short, alias in DOTLESS.items()}
        parts = []
        usual = {field.name: field.default for field in fields(self)}
        for key, attribute in _KEYS.items():
            value = getattr(self, attribute)
            if value != usual[attribute]:
                parts.append(f"{key}={_write(attribute, value)}")
        model = _quoted(dotless.get(self.model, self.model))
        return f"{PREFIX}{model}" + (f"?{'&'.join(parts)}" if parts else "")

    @cached_property
    def architecture(self) -> Architecture:
        """What the model's configs tell; for aliases this reads nothing from elsewhere."""
        return describe(self.model)

    @cached_property
    def tap_infos(self) -> tuple[TapInfo, ...]:
        """Name, channels and reduction of each tap."""
        architecture = self.architecture
        return architecture.match_taps(self.taps or architecture.default_taps)

    @property
    def companion(self) -> Companion | None:
        """The second encoder, if one is fused in."""
        return None if self.fuse is None else find_companion(self.fuse)

    @property
    def image_size(self) -> int:
        """Side of the square images that the tower takes, in pixels.

        Raises:
            ConfigError: The model needs another multiple.
        """
        if self.size is not None and self.size % self.architecture.multiple:
            multiple = self.architecture.multiple
            below = self.size - self.size % multiple
            near = ", ".join(str(side) for side in (below, below + multiple) if side)
            raise ConfigError(
                f"size={self.size} is no multiple of {multiple}, which this model needs; near it "
                f"are {near} (in {str(self)!r})"
            )
        return self.size or self.architecture.default_size

    @property
    def grid_side(self) -> int:
        """Side of the square of tokens that come from the U-Net."""
        if self.grid is not None:
            return self.grid
        if self.companion is not None and self.how != "tokens":
            return self.companion.side
        sides = [self._side(tap) for tap in self.tap_infos]
        return middle_grid([(side, side) for side in sides])[0]

    @property
    def num_patches_per_side(self) -> int:
        """Side of the square that all tokens form.

        Raises:
            ConfigError: Tokens of words, or of two encoders in one row, form no square.
        """
        if self.tokens != "grid":
            raise ConfigError(
                f"tokens={self.tokens} has tokens of words, which form no square; take tokens=grid "
                "where the host cuts pictures into tiles"
            )
        if self.companion is not None and self.how != "channel":
            raise ConfigError(
                f"how={self.how} puts the tokens of two encoders in one row, which is no square; "
                "use how=channel where the host cuts pictures into tiles"
            )
        return self.grid_side

    @property
    def num_patches(self) -> int:
        """Tokens of an image."""
        cells = token_count(self.encoder_config(), self.grid_side**2)
        if self.companion is None or self.how == "channel":
            return cells
        return cells + (self.grid or self.companion.side) ** 2

    @property
    def patch_size(self) -> int:
        """Pixels per token and side, rounded down."""
        return max(1, self.image_size // self.grid_side)

    @property
    def token_channels(self) -> tuple[int, ...]:
        """Channels of a token that come from each tap and half, see `DiffusionEncoder`."""
        return token_channels(self.encoder_config(), self.tap_infos)

    @property
    def hidden_size(self) -> int:
        """Channels of a token."""
        companion = self.companion
        return sum(self.token_channels) + (0 if companion is None else companion.hidden_size)

    def _side(self, tap: TapInfo) -> int:
        vae = self.architecture.reduction
        side, halvings = self.image_size // vae, (tap.reduction // vae).bit_length() - 1
        for _ in range(halvings):
            side = (side + 1) // 2  # a strided convolution rounds up
        return side


def _read_part(text: str, start: int, part: str, values: dict[str, Any]) -> None:
    """Add what ``key=value`` says to `values`."""
    key, equals, written = part.partition("=")
    option = _SYNONYMS.get(key, key)
    if not equals or option not in _KEYS:
        hint = near_matches(key, [*_KEYS, *_SYNONYMS])
        raise _at(text, start, len(part), f"expected key=value with one of {list(_KEYS)}.{hint}")
    attribute = _KEYS[option]
    if attribute in values:
        raise _at(text, start, len(part), f"{option!r} is said twice")
    try:
        values[attribute] = _read(attribute, written)
    except ValueError as error:
        raise _at(text, start, len(part), str(error)) from error


def _at(text: str, start: int, length: int, problem: str) -> ConfigError:
    """An error with a line that points at the part."""
    marks = " " * start + "^" * max(1, length)
    return ConfigError(f"cannot read this tower: {problem}\n  {text}\n  {marks}")


def _read(attribute: str, written: str) -> Any:
    value = unquote(written)
    if attribute in (
        "timestep",
        "seed",
        "size",
        "grid",
        "draws",
        "batch_size",
        "rank",
        "word_count",
    ):
        least = 0 if attribute in ("timestep", "seed") else 1
        if not (value.isascii() and value.isdecimal()) or int(value) < least:
            raise ValueError(f"a whole number of {least} or more is needed, got {value!r}")
        return int(value)
    if attribute in ("guidance_scale", "alpha"):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"a number is needed, got {value!r}") from None
    if attribute in ("prompted", "cut"):
        if value not in ("0", "1"):
            raise ValueError(f"0 or 1 is needed, got {value!r}")
        return value == "1"
    if attribute == "taps":
        return tuple(long_tap(tap) for tap in value.split("+"))
    if attribute == "noise":
        return None if value == "none" else value
    choices = {"conditioning": get_args(Conditioning), "uncond": get_args(Uncond)}
    choices |= {"reuse": get_args(Reused), "tokens": get_args(Tokens)}
    choices |= {"how": get_args(How), "dtype": tuple(DTYPE_NAMES)}
    if attribute in choices:
        check_choice(attribute, value, choices[attribute])
    if attribute == "null" and not value:
        raise ValueError("a text is needed; without this part the null prompt is empty")
    if attribute == "fuse":
        find_companion(value)
    return value


def _write(attribute: str, value: Any) -> str:
    if attribute == "taps":
        return "+".join(_quoted(short_tap(tap)) for tap in value)
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        value = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return _quoted("none" if value is None else str(value))


def _quoted(value: str) -> str:
    return quote(value, safe=_SAFE.replace("+", "")).replace(".", "%2E")


def long_tap(name: str) -> str:
    """The module path that a short tap stands for; a path stays as it is.

    Raises:
        ConfigError: It is empty.
    """
    if not name:
        raise ConfigError("a tap is missing; taps are joined by one +")
    match = None if is_literature_name(name) else _SHORT_TAP.fullmatch(name)
    if match is None or (match[1] == "mid") != (match[2] == ""):
        return name
    parts = [_STAGES[match[1]], *([match[2]] if match[2] else [])]
    for letter, index in re.findall(r"([arb])(\d+)", match[3]):
        parts += [_LAYERS[letter], index]
    return ".".join([*parts, *match[4].split("-")[1:]])


def short_tap(path: str) -> str:
    """The short form of a module path, without dots; what has none stays as it is."""
    stages = {path: word for word, path in _STAGES.items()}
    layers = {path: letter for letter, path in _LAYERS.items()}
    parts = path.split(".")
    if parts[0] not in stages:
        return path
    text, rest = stages[parts[0]], parts[1:]
    if text != "mid" and rest:
        text, rest = text + rest[0], rest[1:]
    while len(rest) > 1 and rest[0] in layers and rest[1].isdecimal():
        text, rest = text + layers[rest[0]] + rest[1], rest[2:]
    short = "-".join([text, *rest])
    return short if long_tap(short) == path else path
