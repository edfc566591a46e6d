"""Prompts of the encoder when a model is measured."""

from dataclasses import dataclass

from diffenc.errors import ConfigError, near_matches

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
