"""Generation arguments of lmms-eval's tasks as those of transformers."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffenc.errors import ConfigError

DEFAULT_TOKENS = 1024
"""Length of an answer where a task says nothing, as for the models that lmms-eval brings."""

_PASSED = (
    *("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("min_new_tokens", "early_stopping"),
)
_SAMPLING = ("temperature", "top_p", "top_k")
_ELSEWHERE = ("max_new_tokens", "until", "do_sample", *_SAMPLING)
_NOT_OURS = ("image_aspect_ratio",)  # how LLaVA's own towers cut pictures


@dataclass(frozen=True, slots=True)
class Generation:
    """How an answer is generated.

    Attributes:
        max_new_tokens: Largest number of tokens of an answer.
        until: Texts before which an answer ends.
        options: Further arguments of transformers' `generate`, by name, sorted.
    """

    max_new_tokens: int = DEFAULT_TOKENS
    until: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = (("do_sample", False),)

    @classmethod
    def of_task(cls, arguments: Mapping[str, Any], *, most: int | None = None) -> "Generation":
        """Read the `generation_kwargs` of a task.

        Tokens are sampled where a temperature above 0 is given, and are the likeliest otherwise.
        What belongs to other models is left out, with a warning that names it.

        Args:
            arguments: Arguments by name, as the task has them.
            most: Largest number of tokens whatever the task says; None leaves it to the task.

        Raises:
            ConfigError: A value is of another type.
        """
        tokens = _tokens(arguments.get("max_new_tokens"))
        until = arguments.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        if not all(isinstance(text, str) for text in until):
            raise ConfigError(f"until must be a text or a list of texts, got {until!r}")
        known = {*_PASSED, *_ELSEWHERE, *_NOT_OURS}
        if unknown := sorted(set(arguments) - known):
            warnings.warn(
                f"generation arguments that models of diffenc do not know are left out: {unknown}",
                stacklevel=2,
            )
        options = {key: arguments[key] for key in _PASSED if arguments.get(key) is not None}
        sampled = bool(arguments.get("do_sample", True)) and (arguments.get("temperature") or 0) > 0
        options["do_sample"] = sampled
        if sampled:
            options |= {key: arguments[key] for key in _SAMPLING if arguments.get(key) is not None}
        return cls(
            tokens if most is None else min(tokens, most),
            tuple(text for text in until if text),
            tuple(sorted(options.items())),
        )

    def within(self, room: int | None) -> "Generation":
        """The same with answers that end where the context of the language model does.

        Args:
            room: Number of tokens that the context has left; None is unknown.

        Raises:
            ConfigError: Nothing is left.
        """
        if room is None or room >= self.max_new_tokens:
            return self
        if room < 1:
            raise ConfigError(
                "the question and its pictures fill the context of the language model; use a "
                "coarser grid of the encoder, fewer pictures, or a longer context"
            )
        return replace(self, max_new_tokens=room)

    def ended(self, answer: str) -> str:
        """The answer up to the first of the texts that end it."""
        for text in self.until:
            answer = answer.split(text)[0]
        return answer.strip()


def _tokens(value: Any) -> int:
    if value is None:
        return DEFAULT_TOKENS
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"max_new_tokens must be an int of 1 or more, got {value!r}")
    return value
