"""What the encoder is asked to do, as a frozen dataclass that checks itself, and how it reads."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from diffenc._typing import Conditioning, LongPrompts, Posterior, Resize, Reused, Tokens, Uncond
from diffenc.checks.arguments import pair, shown, whole, wholes
from diffenc.checks.fields import conform
from diffenc.errors import ConfigError, near_matches
from diffenc.storage.schema import make

_MOST_SHOWN = 4
_WORD_COUNT = 8


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise a `ConfigError` that lists the allowed words unless `value` is one of them."""
    if not isinstance(value, str) or value not in allowed:
        hint = near_matches(value, allowed)
        raise ConfigError(f"{name} must be one of {list(allowed)}, got {shown(value)}.{hint}")


def check_guidable(conditioning: str | None, owner: str) -> None:
    """Raise a `ConfigError` unless a guidance scale changes features of this conditioning.

    Args:
        conditioning: Conditioning of an encoder or a tower; None follows the prompts.
        owner: Name of the model, for the message.
    """
    if conditioning not in (None, "cond", "cfg"):
        raise ConfigError(
            f"the encoder of {owner} gives {conditioning!r} features, which no guidance scale "
            "changes; leave it out"
        )


def check_is_config(value: object, kind: type, example: str) -> None:
    """Raise a `ConfigError` unless a config that is set is one, and say how to change one option.

    Args:
        value: Value that is set as the config of an object.
        kind: Class of the config.
        example: Option and value of the message's example, such as "timestep=10".
    """
    if not isinstance(value, kind):
        raise ConfigError(
            f"config must be of the class {kind.__name__}, got {shown(value)}; "
            f"dataclasses.replace(config, {example}) changes one option of it"
        )


def check_pair(name: str, value: object) -> None:
    """Raise unless `value` is a positive int, two of them, or None."""
    pair(name, value)


def check_timesteps(timesteps: Sequence[int]) -> None:
    """Raise a `ConfigError` unless all are scheduler steps."""
    for step in timesteps:
        if not 0 <= step < 1000:
            raise ConfigError(
                f"timestep must be in [0, 1000), got {step}. It counts scheduler steps; "
                "for a fraction of the schedule pass int(fraction * 1000)."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """What to read from the U-Net, at which noise level, and under which text.

    Attributes:
        taps: Module paths or globs of the U-Net, in the order in which features are returned;
            None takes the backbone's default set.
        timestep: Scheduler step, 0 (clean) to 999 (pure noise); several add a dimension to the
            features, after the batch.
        draws: Number of noise tensors per timestep; features are the mean over them.
        noise: Kind of noise: "shared" adds the same noise to all images, None keeps the latents
            clean at that timestep (CleanDIFT's way).
        size: Side of the square that images are brought to, or (height, width), in pixels; None
            takes the backbone's own. `diffenc.Size(width=640, height=480)` is such a pair by names.
        resize: Way in which images are brought to `size`: "squash" ignores the aspect ratio; "crop"
            keeps the middle, in the same pixels as torchvision's `Resize` and `CenterCrop`; "pad"
            adds grey; "none" keeps the size and pads to a multiple of what the model needs.
        conditioning: Conditioning of what `extract` and the tokens hold by default; None is "cond"
            with prompts and "uncond" without.
        guidance_scale: Guidance scale s in f_u + s (f_c - f_u), where f_u and f_c are the
            unconditional and the conditional features; read by "cfg" alone.
        seed: Seed of the noise tensors, which all images, prompts and halves share.
        posterior: Way in which latents are taken from the VAE's posterior: its "mode", or a seeded
            "sample".
        uncond: Unconditional embedding: "zeros", "empty" (the empty text's), or None for the
            model's own rule.
        long_prompts: Treatment of prompts beyond the text encoder's limit: "truncate" cuts them,
            and the result says by how much; "chunk" encodes them in several windows whose states
            stand side by side.
        original_size: Size that SDXL is told the picture had before it was resized: None tells the
            size it was resized to, "image" the picture's own, and (height, width) these numbers for
            all pictures.
        grid: Side, or (height, width), of the token grid; None takes the middle tap's by
            resolution.
        tokens: Kind of the tokens that stand for a picture: "grid" has one per cell, "words" one
            per word of the prompt, see `diffenc.passes.question_tokens`, and "grid+words" both,
            the grid's first. With words every token has its place as further channels.
        word_count: Number of tokens of words: the last one is of what belongs to no word, and the
            others are of the prompt's most telling words. Read with words alone.
        batch_size: Largest number of rows (images x halves x timesteps x draws) per call of the
            U-Net; None is all at once.
        reuse: Part of the U-Net that runs without the text, once per picture for all texts: "down"
            is all before the middle, "middle" all before the decoder. Features under a text are
            then approximate, and a further question costs about half. None runs everything under
            each text.
        discard: Channels of a block's input that are zeroed before the adaptive norm that is
            tapped, such as "single_transformer_blocks.9.norm" of FLUX; draws are then averaged
            before the norm, as DiTF has it. () zeroes none, and None reads norms as they are.
    """

    taps: tuple[str, ...] | None = None
    timestep: int | tuple[int, ...] = 50
    draws: int = 1
    noise: Literal["shared"] | None = "shared"
    size: int | tuple[int, int] | None = None
    resize: Resize = "squash"
    conditioning: Conditioning | None = None
    guidance_scale: float = 1.5
    seed: int = 0
    posterior: Posterior = "mode"
    uncond: Uncond | None = None
    long_prompts: LongPrompts = "truncate"
    original_size: Literal["image"] | tuple[int, int] | None = None
    grid: int | tuple[int, int] | None = None
    tokens: Tokens = "grid"
    word_count: int = _WORD_COUNT
    batch_size: int | None = None
    reuse: Reused | None = None
    discard: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.taps is not None and (isinstance(self.taps, str) or not len(self.taps)):
            raise ConfigError(
                f"taps must be a tuple of module paths with at least one entry, got {self.taps!r}"
            )
        conform(self)
        if twice := [tap for tap in self.taps or () if (self.taps or ()).count(tap) > 1]:
            raise ConfigError(f"taps name {shown(twice[0])} twice, and it is read once")
        if not self.timesteps:
            raise ConfigError("timestep must be an int or a tuple with one or more, got none")
        check_timesteps(self.timesteps)
        whole("draws", self.draws, least=1)
        if self.noise not in ("shared", None):
            raise ConfigError(f"noise must be 'shared' or None, got {self.noise!r}")
        if self.noise is None and self.draws > 1:
            raise ConfigError(f"without noise there is one draw, got draws={self.draws}")
        whole("word_count", self.word_count, least=1)
        if self.tokens == "grid" and self.word_count != _WORD_COUNT:
            raise ConfigError(
                f"word_count={self.word_count} is read with tokens='words' or 'grid+words' alone, "
                "got tokens='grid'; set tokens too, or leave word_count out"
            )
        if self.batch_size is not None:
            whole("batch_size", self.batch_size, least=1)
        check_pair("size", self.size)
        check_pair("grid", self.grid)
        if self.original_size not in ("image", None):
            check_pair("original_size", self.original_size)
            if not isinstance(self.original_size, tuple):
                raise ConfigError(
                    f"original_size must be 'image' or (height, width), got {self.original_size!r}"
                )
        check_choice("tokens", self.tokens, get_args(Tokens))
        check_choice("long_prompts", self.long_prompts, get_args(LongPrompts))
        check_choice("resize", self.resize, get_args(Resize))
        check_choice("posterior", self.posterior, get_args(Posterior))
        if self.conditioning is not None:
            check_choice("conditioning", self.conditioning, get_args(Conditioning))
        if self.uncond is not None:
            check_choice("uncond", self.uncond, get_args(Uncond))
        if self.reuse is not None:
            check_choice("reuse", self.reuse, get_args(Reused))
        if self.discard:
            wholes("discard", self.discard)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The timesteps, one or several."""
        return (self.timestep,) if isinstance(self.timestep, int) else self.timestep

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EncoderConfig":
        """Inverse of `to_dict`, lists read as tuples.

        Raises:
            ConfigError: A key is no attribute, or a value is not allowed.
        """
        made: EncoderConfig = make_options(cls, values)
        return made


def make_options(kind: Any, values: Mapping[str, Any]) -> Any:
    """Call a class of options with values by name, lists read as tuples.

    Args:
        kind: Dataclass of the options.
        values: Values by name.

    Raises:
        ConfigError: A key is no attribute, all of which are named, or a value is not allowed.
    """
    known = {field.name for field in fields(kind)}
    if unknown := sorted(map(str, values.keys() - known)):
        hint = near_matches(unknown[0], known)
        raise ConfigError(f"unknown options {unknown}; known are {sorted(known)}.{hint}")
    return make(kind, values)


def described(name: str, facts: Mapping[str, object], config: Any = None) -> str:
    """Few lines for a `__repr__`: a line each fact, and what of a config is not the default.

    Args:
        name: Name of the object's class.
        facts: Names and values to show; of long tuples the middle is left out.
        config: A dataclass; its fields beyond the facts are shown where they were changed.
    """
    shown = dict(facts)
    if config is not None:
        for field in fields(config):
            value = getattr(config, field.name)
            if field.name not in facts and value != field.default:
                shown[field.name] = value
    lines = [f"  {key}={_shortened(value)}," for key, value in shown.items()]
    return "\n".join([f"{name}(", *lines, ")"])


def _shortened(value: object) -> str:
    if isinstance(value, tuple) and len(value) > _MOST_SHOWN:
        first = ", ".join(map(repr, value[:2]))
        return f"({first}, ... {value[-1]!r})  # {len(value)}"
    return repr(value).removeprefix("torch.")
