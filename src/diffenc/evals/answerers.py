"""Interface of models that answer questions on pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from diffenc.errors import ShapeError

Images = Sequence[Sequence[Image.Image]]
"""Per question its pictures, one or several, upright and RGB."""


@runtime_checkable
class Answerer(Protocol):
    """A model that answers questions on pictures.

    Attributes:
        name: Name of the model in tables and files of answers.
        description: Everything that the answers depend on, as JSON values; earlier answers are
            reused only if it is equal.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def description(self) -> Mapping[str, Any]: ...  # noqa: D102

    def answer(
        self, images: Images, questions: Sequence[str], prompts: Sequence[str] | None = None
    ) -> Sequence[str]:
        """Answer each question with one text.

        Args:
            images: One or several pictures for each question.
            questions: Texts that the language model is asked.
            prompts: Text that conditions the vision encoder, one per question; "" is the empty
                text, None leaves the choice to the model. Models without such an input ignore it.
        """
        ...


@dataclass(frozen=True)
class FunctionAnswerer:
    """An `Answerer` of any function, such as the bound `generate` of a language model.

    Attributes:
        name: Name of the model in tables and files.
        function: Function that is called with pictures, questions and, if there are any,
            `prompts=`, and returns one text per question.
        description: Everything that the answers depend on, as JSON values.
        options: Keyword arguments of every call, such as `{"max_new_tokens": 64}`; they are added
            to the description.

    Examples:
        >>> model = FunctionAnswerer("blind", lambda images, questions: ["yes"] * len(questions))
        >>> model.answer([[picture]], ["is there a circle?"])
        ['yes']
    """

    name: str
    function: Callable[..., Sequence[str]]
    description: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.options:
            described = {**self.description, "options": dict(self.options)}
            object.__setattr__(self, "description", described)

    def answer(
        self, images: Images, questions: Sequence[str], prompts: Sequence[str] | None = None
    ) -> Sequence[str]:
        """Return the answers of the function."""
        more = {} if prompts is None else {"prompts": list(prompts)}
        return self.function(
            [list(each) for each in images], list(questions), **more, **self.options
        )


def check_answers(answers: Sequence[str], count: int, name: str) -> list[str]:
    """Check that there is one text per question.

    Raises:
        ShapeError: Another number, or something that is no text.
    """
    if isinstance(answers, str) or len(answers) != count:
        received = "one text" if isinstance(answers, str) else f"{len(answers)} answers"
        raise ShapeError(f"{name} must give one answer per question, {count} here; got {received}")
    for answer in answers:
        if not isinstance(answer, str):
            raise ShapeError(f"{name} must answer in text, got {type(answer).__name__}")
    # Half a surrogate pair cannot be kept in a file, and a resumed answer equals a fresh one.
    return [answer.encode("utf-8", "replace").decode() for answer in answers]
