"""Measurements of a study: what is counted, on which pictures, under which prompts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffenc.checks.arguments import flag, whole
from diffenc.config import check_choice
from diffenc.errors import ConfigError, near_matches

FIGURES: Mapping[str, tuple[str, ...]] = {
    "captions": ("named", "objects", "right", "relations", "cider", "unread"),
    "leakage": ("read", "said", "base", "named", "right", "cider", "unread"),
    "answers": (
        *("all", "color", "shape", "size", "count", "position", "presence", "relation"),
        *("guess", "unread"),
    ),
    "mmvp": ("pairs", "questions", "chance", "unread"),
    "pairs": ("pairs", "questions", "chance", "unread"),
}
"""Names of the figures that each kind of measurement gives; in percent, except "cider"."""

NEAR_SAME = ("mmvp", "pairs")
"""Kinds that ask about pairs of near-same pictures, some of each pattern."""

_KNOWN = ("none", "oracle", "question")
_BY = "by "


@dataclass(frozen=True, slots=True)
class Prompting:
    """The parts of a prompt, of which the question stands first.

    Attributes:
        question: Whether the question is part of the prompt.
        oracle: Whether a true caption is part of the prompt.
        writer: Name of the training whose caption is part of the prompt; None if there is no such
            part.
    """

    question: bool = False
    oracle: bool = False
    writer: str | None = None

    def text(self, *, question: str = "", caption: str = "") -> str:
        """The prompt, with the parts that it has."""
        parts = [question if self.question else "", caption if self.captioned else ""]
        return " ".join(part for part in parts if part)

    @property
    def captioned(self) -> bool:
        """Whether a caption is a part."""
        return self.oracle or self.writer is not None


def parse_prompting(text: str, where: str = "prompts") -> Prompting:
    """Read ``"none"``, ``"oracle"``, ``"question"``, ``"by NAME"``, or two joined by "+".

    Args:
        text: Description of the prompt to be read.
        where: It stands, for messages.

    Raises:
        ConfigError: It is something else.
    """
    parts = [" ".join(part.split()) for part in text.split("+")]
    for part in parts:
        if part not in _KNOWN and not (part.startswith(_BY) and len(part) > len(_BY)):
            raise ConfigError(
                f'{where}: {part!r} is no prompt; known are "none", "oracle", "question" and "by '
                f'NAME" with the name of a training.{near_matches(part, _KNOWN)}'
            )
    writers = [part.removeprefix(_BY) for part in parts if part.startswith(_BY)]
    if len(parts) > 2 or len(set(parts)) < len(parts) or ("none" in parts and len(parts) > 1):
        raise ConfigError(f'{where}: {text!r} must be one of these, or "question + ..." with two')
    if len(parts) == 2 and "question" not in parts:
        raise ConfigError(f"{where}: {text!r} has two captions; one is enough")
    return Prompting("question" in parts, "oracle" in parts, writers[0] if writers else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Measurement of trained models.

    Attributes:
        name: Name of the measurement in the plan.
        kind: Kind of measurement: one of `FIGURES`, which says what
            each gives.
        label: Name of the measurement in tables; "" takes `name`.
        of: Names of the trainings that are measured; () is all of them.
        prompts: Prompt of the encoder: "none", "oracle" (a true caption), "question", "by NAME"
            (what the training of that name says of the picture), or two with a "+".
        items: Number of held-out scenes per seed, 3 or more; for `NEAR_SAME`, of pairs per
            pattern.
        passes: Number of passes over the pictures, for "captions" alone; from the second on, the
            caption of the pass before is the prompt.
        crowds: Whether the scenes have five to nine objects, for "answers" alone.
        untold: Whether the language model reads what is asked for and not of which objects ("what
            color?"), so that only the encoder gets the question, for "answers" alone.
        options: Options of the encoder that differ from those of training.
    """

    name: str
    kind: str
    label: str = ""
    of: tuple[str, ...] = ()
    prompts: str = "none"
    items: int = 100
    passes: int = 1
    crowds: bool = False
    untold: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name)
        where = f"measure.{self.name}"
        check_choice(f"{where}.kind", self.kind, list(FIGURES))
        whole(f"{where}.items", self.items, least=3)
        whole(f"{where}.passes", self.passes, least=1)
        if self.passes > 1 and self.kind != "captions":
            raise ConfigError(f'{where}.passes is for kind = "captions"')
        for name in ("crowds", "untold"):
            flag(f"{where}.{name}", getattr(self, name))
            if getattr(self, name) and self.kind != "answers":
                raise ConfigError(f'{where}.{name} is for kind = "answers"')
        if self.kind == "leakage" and self.prompts != "none":
            raise ConfigError(f"{where}.prompts: leakage has prompts of its own; leave them out")
        prompting = parse_prompting(self.prompts, where)
        if prompting.question and self.kind == "captions":
            raise ConfigError(f'{where}.prompts: captions are asked for without a "question"')
        if prompting.oracle and self.kind in NEAR_SAME:
            raise ConfigError(f'{where}.prompts: {self.kind} has no caption for "oracle"')
        if self.passes > 1 and prompting.question:
            raise ConfigError(f"{where}.passes needs prompts without a question")

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of what it gives: with several passes, also ``"named.1"`` of each of them."""
        own = FIGURES[self.kind]
        if self.passes == 1:
            return own
        return (*own, *(f"{name}.{k}" for name in own for k in range(1, self.passes + 1)))

    @property
    def writer(self) -> str | None:
        """The training that writes captions for its prompts."""
        return parse_prompting(self.prompts).writer

    def measures(self, training: str) -> bool:
        """Whether a training is measured."""
        return not self.of or training in self.of
