"""One number for how much of a prompt is said."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffenc.errors import ConfigError
from diffenc.evals.captioning.tokens import tokenize

_FUNCTION_WORDS = (
    "a an the this that these those some any each both and or but nor of in on at to by for from "
    "with without into onto over under near next as is are was were be been being am do does did "
    "has have had having it its he she they them his her their there here who which what where "
    "while when than then so very just not no we see i you your our one"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""Words that any caption may have; they tell nothing about where it comes from."""


@dataclass(frozen=True, slots=True)
class PromptReadout:
    """Measure of how much of foreign prompts is said, from -1 to 1.

    Attributes:
        value: Difference of `said` and `base`: 1 if every foreign word is said under its prompt and
            none under the other prompt, 0 if it makes no difference which prompt is given.
        said: Share of foreign words that are said under the prompt that holds them, 0 to 1.
        base: Share of the same words that are said under the other prompt, 0 to 1.
        error: Standard error of the value over images; None for a single image.
        images: Number of images that count.
        skipped: Number of images whose prompts hold no foreign word.
    """

    value: float
    said: float
    base: float
    error: float | None
    images: int
    skipped: int


def content_words(text: str) -> frozenset[str]:
    """Lower-case words that are no function words, each without the s of a plural or a genitive."""
    words = tokenize({"": [text]}, "simple")[""][0].split()
    return frozenset(_singular(word) for word in words if word not in FUNCTION_WORDS)


def prompt_readout(
    prompts: tuple[Sequence[str], Sequence[str]],
    captions: tuple[Sequence[str], Sequence[str]],
    references: Sequence[Sequence[str]],
) -> PromptReadout:
    """Compare what a model says of the same images under two foreign prompts.

    Foreign words of a prompt are its content words that are neither in any of the image's own
    references nor in the other prompt. For each prompt k of an image with other prompt k', the
    shares of its foreign words in caption k and in caption k' are `said` and `base`; an image's
    numbers are the means over its two prompts (of those that have foreign words), the results the
    means over images. The other prompt is the control: what a model says of an image anyway, or of
    any image, is said under both and cancels, so that a model that ignores its prompt has exactly
    0, whatever it says.

    Args:
        prompts: Two foreign prompts per image.
        captions: Captions of each image under each of the two prompts.
        references: True captions of each image.

    Raises:
        ConfigError: Numbers of texts differ, or no image counts.
    """
    counts = {len(references), *map(len, prompts), *map(len, captions)}
    if len(counts) > 1:
        raise ConfigError(f"give two prompts and two captions per image, got {sorted(counts)} of")
    rows = []
    for index, own in enumerate(references):
        pair = [content_words(each[index]) for each in prompts]
        said = [content_words(each[index]) for each in captions]
        if shares := _of_image(pair, said, frozenset().union(*map(content_words, own))):
            rows.append(shares)
    if not rows:
        raise ConfigError(
            "no prompt holds a word that is not among the references of its image; take other "
            "images, or a larger set"
        )
    differences = [said - base for said, base in rows]
    value = _mean(differences)
    error = None
    if len(rows) > 1:
        variance = sum((each - value) ** 2 for each in differences) / (len(rows) - 1)
        error = math.sqrt(variance / len(rows))
    return PromptReadout(
        value=value,
        said=_mean(said for said, _ in rows),
        base=_mean(base for _, base in rows),
        error=error,
        images=len(rows),
        skipped=len(references) - len(rows),
    )


def _of_image(
    prompts: Sequence[frozenset[str]], said: Sequence[frozenset[str]], own: frozenset[str]
) -> tuple[float, float] | None:
    """Shares of foreign words, said and base; None where there are no such words."""
    shares = []
    for this, other in ((0, 1), (1, 0)):
        if foreign := prompts[this] - own - prompts[other]:
            shares.append([len(foreign & said[k]) / len(foreign) for k in (this, other)])
    if not shares:
        return None
    return _mean(row[0] for row in shares), _mean(row[1] for row in shares)


def _singular(word: str) -> str:
    word = word.removesuffix("'s").removesuffix("\u2019s")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
