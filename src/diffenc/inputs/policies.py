"""Which text conditions the encoder for a training or evaluation sample.

A policy makes one prompt of a sample: its caption, its question, both, or none. Sources are put
together with changes by `|`, and written as text: ``"question+caption | dropout(0.3)"``. What is
random depends on the seed, the sample and the epoch alone: it is the same whatever the worker, the
order or the batch, and new in every epoch. A change behind a source does not alter what the source
draws, so that runs with and without it compare.
"""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffenc.errors import ConfigError, PromptError, near_matches
from diffenc.inputs.tokenizing import limit_of, prompt_ids

_IMAGE_MARK = "<image>"
_ROLE_MARKS = re.compile(
    r"\[/?INST\]|<<SYS>>.*?<</SYS>>|<\|im_(?:start|end)\|>(?:user|assistant|system)?"
    r"|\b(?:USER|ASSISTANT|HUMAN|GPT)\s*:|###\s*(?:Human|Assistant)\s*:|</?s>",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class PromptSample:
    """A sample of a data set, as a policy reads it.

    Attributes:
        key: Name of the sample in its dataset, such as its id; it seeds all random choices.
        conversation: Turns of the conversation in the form of LLaVA's data,
            ``{"from": "human" | "gpt", "value": ...}``.
        captions: Texts about the image, true ones or those of another model.
    """

    key: str
    conversation: Sequence[Mapping[str, str]] = ()
    captions: Sequence[str] = ()

    def questions(self) -> list[str]:
        """Texts of the human's turns, in order, without image marks and templates.

        Raises:
            PromptError: A turn is not of that form, or no turn is the human's, or none has words.
        """
        questions = []
        for index, turn in enumerate(self.conversation):
            if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
                raise PromptError(
                    f"sample {self.key!r}, turn {index}: expected "
                    f'{{"from": "human" or "gpt", "value": text}}, got {turn!r}'
                )
            if turn.get("from") in ("human", "user"):
                questions.append(strip_template(turn["value"]))
        if not any(questions):
            raise PromptError(
                f"sample {self.key!r} has no question: none of its {len(self.conversation)} turns "
                'is from "human" and has words; use the policy "caption" or "empty" for such data'
            )
        return [question for question in questions if question]


def captions_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Captions of a record of LLaVA's data.

    Where it has none of its own and its conversation is one question with one answer, as in the
    data of LLaVA's first stage, the answer is the caption.

    Args:
        record: Record with ``captions``, a list of texts, with ``caption``, a text, or with
            ``conversations`` alone.
    """
    own = record.get("captions") or record.get("caption") or ()
    if own:
        return (own,) if isinstance(own, str) else tuple(own)
    turns: Sequence[Any] = record.get("conversations") or ()
    answer = turns[1] if len(turns) == 2 else None
    text = answer.get("value") if isinstance(answer, Mapping) else None
    return (text,) if isinstance(text, str) else ()


def strip_template(text: str) -> str:
    """A turn's words alone: without ``<image>``, role marks of chat templates, and line breaks."""
    bare = _ROLE_MARKS.sub(" ", text.replace(_IMAGE_MARK, " "))
    return " ".join(bare.split())


class PromptPolicy(ABC):
    """Makes the encoder's prompt of a sample; see `parse_policy` for the known ones."""

    @abstractmethod
    def draw(self, sample: PromptSample, rng: random.Random) -> str:
        """One prompt; every choice is taken from `rng`."""

    def __call__(self, sample: PromptSample, *, seed: int = 0, epoch: int = 0) -> str:
        """Make the sample's prompt in an epoch; equal arguments give the equal prompt.

        Raises:
            PromptError: The sample lacks what the policy needs.
        """
        return self.draw(sample, random.Random(f"{seed}/{epoch}/{sample.key}"))

    def __or__(self, change: "PromptChange") -> "PromptPolicy":
        if not isinstance(change, PromptChange):
            return NotImplemented
        return _Changed(self, change)


class PromptChange(ABC):
    """Changes a prompt of any origin."""

    @abstractmethod
    def change(self, prompt: str, rng: random.Random) -> str:
        """The prompt changed; every choice is taken from `rng`."""


@dataclass(frozen=True, slots=True)
class Empty(PromptPolicy):
    """The empty text, encoded as any other: on SDXL not the unconditional embedding."""

    def draw(self, sample: PromptSample, rng: random.Random) -> str:
        """The empty text."""
        return ""

    def __str__(self) -> str:
        return "empty"


@dataclass(frozen=True, slots=True)
class Caption(PromptPolicy):
    """One of the sample's captions.

    Attributes:
        which: Which of several texts is taken: "random", or always the "first".
    """

    which: Literal["random", "first"] = "random"

    def __post_init__(self) -> None:
        _check_which(self.which)

    def draw(self, sample: PromptSample, rng: random.Random) -> str:
        """A caption; raises `PromptError` where there is none."""
        if not sample.captions:
            raise PromptError(
                f"sample {sample.key!r} has no caption; give it some, or use the policy "
                '"question" or "empty"'
            )
        chosen = rng.choice(sample.captions) if self.which == "random" else sample.captions[0]
        return strip_template(chosen)

    def __str__(self) -> str:
        return "caption" if self.which == "random" else "caption(first)"


@dataclass(frozen=True, slots=True)
class Question(PromptPolicy):
    """One of the human's turns: the paper's random question sampling.

    Attributes:
        which: Which of several texts is taken: "random", or always the "first".
    """

    which: Literal["random", "first"] = "random"

    def __post_init__(self) -> None:
        _check_which(self.which)

    def draw(self, sample: PromptSample, rng: random.Random) -> str:
        """A question; raises `PromptError` where there is none."""
        candidates = sample.questions()
        return rng.choice(candidates) if self.which == "random" else candidates[0]

    def __str__(self) -> str:
        return "question" if self.which == "random" else "question(first)"


@dataclass(frozen=True, slots=True)
class Joined(PromptPolicy):
    """Several sources, one after the other: a question with a caption is the paper's dagger.

    If the prompt exceeds the text encoder's limit, its end is cut off, so the first parts are kept.

    Attributes:
        parts: Policies whose prompts are joined, in order.
    """

    parts: tuple[PromptPolicy, ...]

    def draw(self, sample: PromptSample, rng: random.Random) -> str:
        """The parts with a space between."""
        drawn = (part.draw(sample, rng) for part in self.parts)
        return " ".join(text for text in drawn if text)

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))


@dataclass(frozen=True, slots=True)
class WordDeletion(PromptChange):
    """Each word is deleted with probability `p`; one at least is kept: the paper's noisy captions.

    Attributes:
        p: Probability, 0 to 1.
    """

    p: float = 0.3

    def __post_init__(self) -> None:
        _check_probability(self.p)

    def change(self, prompt: str, rng: random.Random) -> str:
        """The words that are left, in their order."""
        words = prompt.split()
        kept = [word for word in words if rng.random() >= self.p]
        return " ".join(kept or ([rng.choice(words)] if words else []))

    def __str__(self) -> str:
        return f"noisy({self.p:g})"


@dataclass(frozen=True, slots=True)
class PromptDropout(PromptChange):
    """The whole prompt becomes empty with probability `p`: the paper's cure for leakage.

    The empty prompt is a text, encoded as any other, on SDXL too: what diffusers' own training of
    SDXL drops a caption to. No prompt at all would be zeros there.

    Attributes:
        p: Probability, 0 to 1.
    """

    p: float = 0.3

    def __post_init__(self) -> None:
        _check_probability(self.p)

    def change(self, prompt: str, rng: random.Random) -> str:
        """The prompt, or ""."""
        return "" if rng.random() < self.p else prompt

    def __str__(self) -> str:
        return f"dropout({self.p:g})"


@dataclass(frozen=True, slots=True)
class _Changed(PromptPolicy):
    source: PromptPolicy
    step: PromptChange

    def draw(self, sample: PromptSample, rng: random.Random) -> str:
        return self.step.change(self.source.draw(sample, rng), rng)

    def __str__(self) -> str:
        return f"{self.source} | {self.step}"


def without_captions(policy: PromptPolicy) -> PromptPolicy:
    """The same policy where no caption is known: sources that draw on captions give no text."""
    if isinstance(policy, _Changed):
        return without_captions(policy.source) | policy.step
    if isinstance(policy, Joined):
        rest = tuple(part for part in policy.parts if not isinstance(part, Caption))
        return Joined(rest) if len(rest) > 1 else next(iter(rest), Empty())
    return Empty() if isinstance(policy, Caption) else policy


@dataclass(frozen=True, slots=True)
class DrawnPrompts:
    """Prompts of several samples.

    Attributes:
        texts: Prompt of each sample.
        truncated: Number of tokens of each prompt that exceed the text encoder's limit and are not
            read.
    """

    texts: tuple[str, ...]
    truncated: tuple[int, ...]


def draw_prompts(
    policy: PromptPolicy,
    samples: Sequence[PromptSample],
    tokenizer: Any,
    *,
    seed: int = 0,
    epoch: int = 0,
) -> DrawnPrompts:
    """Draw a prompt for each sample, and count the tokens that exceed the text encoder's limit.

    Args:
        policy: Policy that makes a prompt of a sample, see `parse_policy`.
        samples: Samples with different keys.
        tokenizer: Tokenizer of the backbone, whose limit counts.
        seed: Seed of the whole run; with the epoch and the sample's key it decides all random
            choices.
        epoch: Number of the epoch, from 0.

    Raises:
        PromptError: A sample lacks what the policy needs.
    """
    texts = tuple(policy(sample, seed=seed, epoch=epoch) for sample in samples)
    limit = limit_of(tokenizer)
    cut = (max(0, len(row) - limit) for row in prompt_ids(tokenizer, texts))
    return DrawnPrompts(texts, tuple(cut))


_SOURCES: dict[str, type[Empty] | type[Caption] | type[Question]] = {
    "empty": Empty,
    "caption": Caption,
    "question": Question,
}
_CHANGES: dict[str, type[WordDeletion] | type[PromptDropout]] = {
    "noisy": WordDeletion,
    "dropout": PromptDropout,
}
_CALL = re.compile(r"\s*([\w-]+)\s*(?:\(\s*([^()]*?)\s*\))?\s*")


def parse_policy(text: str) -> PromptPolicy:
    """Read a policy: sources joined by "+", then changes, each after a "|".

    Sources are "empty", "caption", "question", the latter two also as "caption(first)"; changes are
    "noisy(p)", which deletes words, and "dropout(p)", which deletes the prompt; p is 0.3 unless
    given. `str(policy)` is the inverse.

    Raises:
        ConfigError: The text is of another form; the part that is wrong is named.

    Examples:
        >>> policy = parse_policy("question+caption | noisy | dropout(0.1)")
        >>> str(policy)
        'question+caption | noisy(0.3) | dropout(0.1)'
    """
    first, *others = text.split("|")
    parts = tuple(_source(part) for part in first.split("+"))
    policy = parts[0] if len(parts) == 1 else Joined(parts)
    for other in others:
        name, argument = _call(other, _CHANGES, "change")
        kind = _CHANGES[name]
        policy = policy | (kind(_number(argument, other)) if argument else kind())
    return policy


def _source(text: str) -> PromptPolicy:
    name, argument = _call(text, _SOURCES, "source")
    kind: Any = _SOURCES[name]
    if argument and kind is Empty:
        raise ConfigError(f'"empty" takes no argument, got {text.strip()!r}')
    policy: PromptPolicy = kind(argument) if argument else kind()
    return policy


def _call(text: str, known: Mapping[str, object], what: str) -> tuple[str, str]:
    match = _CALL.fullmatch(text)
    if match is None or match[1] not in known:
        name = match[1] if match else text.strip()
        raise ConfigError(
            f"{text.strip()!r} is no {what} of a prompt policy; known are {', '.join(known)}."
            f'{near_matches(name, known)} A policy reads like "question+caption | dropout(0.3)".'
        )
    return match[1], match[2] or ""


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{where.strip()!r} needs a probability, such as 0.3") from None


def _check_probability(p: float) -> None:
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise ConfigError(f"a probability is 0 to 1, got {p!r}")


def _check_which(which: str) -> None:
    if which not in ("random", "first"):
        raise ConfigError(f"which must be 'random' or 'first', got {which!r}")
