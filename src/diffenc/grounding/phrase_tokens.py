"""Which tokens of a text a phrase names, and which phrases have none."""

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

from diffenc.checks.arguments import shown
from diffenc.errors import ConfigError
from diffenc.grounding.samples import GroundedImage, GroundedText, Phrase, Span
from diffenc.inputs.tokenizing import added_tokens, limit_of, limits_of, token_ids
from diffenc.inputs.words import span_positions

logger = logging.getLogger(__name__)

_NAMED = 3
_FIRST = 1000
"""Phrases that are looked at whatever they are, before those that any tokenizer keeps whole."""
_KEPT = 2**16

Lack = Literal["split", "cut"]
"""Why a phrase has no tokens: none of its words is made of whole ones, or all were cut off."""


def phrase_positions(
    tokenizers: Sequence[Any], text: str, spans: Sequence[Span], *, windows: bool
) -> tuple[int, ...]:
    """Positions of the tokens of some spans; words that are no whole tokens or cut off have none.

    Args:
        tokenizers: Tokenizers of the model.
        text: The whole text.
        spans: Places of words in it.
        windows: Whether a long text is read in windows; otherwise it is cut.
    """
    return tuple(
        position
        for start, stop in spans
        for position in span_positions(tokenizers, text, start, stop, windows=windows)
    )


def check_phrases_have_tokens(
    samples: Sequence[GroundedImage],
    tokenizers: Sequence[Any],
    *,
    windows: bool,
    skip_broken: bool,
) -> None:
    """Count the phrases that cannot be taught because the text encoder has no tokens for them.

    Phrases that are cut off with the end of a long text are a warning in the log, never an error.

    Args:
        samples: Samples.
        tokenizers: Tokenizers of the model.
        windows: Whether a long text is read in windows; otherwise it is cut.
        skip_broken: Whether phrases without a whole token are a warning as well, instead of an
            error.

    Raises:
        ConfigError: A phrase has no word that is made of whole tokens and `skip_broken` is not set,
            or no phrase at all can be taught.
    """
    look = _Look(tokenizers, windows=windows)
    count = 0
    examples: dict[Lack, list[str]] = {"split": [], "cut": []}
    counts: dict[Lack, int] = {"split": 0, "cut": 0}
    for text, phrase in _phrases(samples):
        count += 1
        lack = look.lack(text.text, phrase.spans)
        if lack is not None:
            counts[lack] += 1
            if len(examples[lack]) < _NAMED:
                examples[lack].append(_named(text.text, phrase.spans))
    faults = []
    if counts["split"]:
        faults.append(
            f"{counts['split']} of {count} phrases name no word that the text encoder reads as "
            f"whole tokens ({', '.join(examples['split'])})"
        )
    if counts["cut"]:
        faults.append(
            f"{counts['cut']} of {count} phrases stand behind the {limits_of(tokenizers)} tokens "
            f'that the text encoder reads ({", ".join(examples["cut"])}); long_prompts = "chunk" '
            "reads them too"
        )
    if samples and sum(counts.values()) == count:
        raise ConfigError(f"no phrase can be taught: {'; '.join(faults) or 'there is none'}")
    if counts["split"] and not skip_broken:
        raise ConfigError(
            f"{faults[0]}. Name whole words, or train without these phrases: skip_broken=True "
            "(data.skip_broken = true)"
        )
    for fault in faults:
        logger.warning("%s. They are not taught", fault)


class _Look:
    """Looks phrases up, where it is in doubt whether they have tokens.

    Tokenizers keep a word whole that has spaces around it. Looking it up takes longer than reading
    it, and Visual Genome has five million phrases, so that this is relied on once it was seen to
    hold for the first thousand of them.
    """

    def __init__(self, tokenizers: Sequence[Any], *, windows: bool) -> None:
        self._tokenizers, self._windows = tokenizers, windows
        self._limit = min(map(limit_of, tokenizers))
        special = {name for each in tokenizers for name in each.all_special_tokens}
        # A token that was added may hold several words, or parts of them.
        self._holds = all(added_tokens(each).keys() <= special for each in tokenizers)
        self._looked = 0
        self.lack = lru_cache(_KEPT)(self._lack)

    def _lack(self, text: str, spans: tuple[Span, ...]) -> Lack | None:
        doubted = self._is_doubted(text, spans)
        if not doubted and self._holds and self._looked >= _FIRST:
            return None
        self._looked += 1
        if phrase_positions(self._tokenizers, text, spans, windows=self._windows):
            return None
        if phrase_positions(self._tokenizers, text, spans, windows=True):
            return "cut"
        self._holds = self._holds and doubted
        return "split"

    def _is_doubted(self, text: str, spans: tuple[Span, ...]) -> bool:
        if not spans or not text.isascii():
            return True
        if not any(
            (start == 0 or text[start - 1].isspace()) and (text[stop : stop + 1] or " ").isspace()
            for start, stop in spans
        ):
            return True
        if self._windows or len(text) + 3 <= self._limit:  # a token has a letter, or is a mark
            return False
        rows = [token_ids(each, [text])[0] for each in self._tokenizers]
        return max(map(len, rows)) > self._limit


def _phrases(samples: Sequence[GroundedImage]) -> Iterator[tuple[GroundedText, Phrase]]:
    for sample in samples:
        for text in sample.texts:
            for phrase in text.phrases:
                yield text, phrase


def _named(text: str, spans: Sequence[Span]) -> str:
    words = " ".join(text[start:stop] for start, stop in spans)
    return f"{shown(words)} in {shown(text)}"
