"""Requests of lmms-eval as conversations with pictures, and the prompt of the vision encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from diffenc.errors import ConfigError, ImageError, PromptError, near_matches
from diffenc.inputs.pictures.files import load_image
from diffenc.inputs.policies import PromptSample, parse_policy
from diffenc.mllm.chat import IMAGE_MARK
from diffenc.mllm.samples import prompts_of, with_marks

_ROLES = {"user": "human", "assistant": "gpt"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One request, ready to be answered.

    Attributes:
        task: Name of the task.
        document: Number of the document in its task.
        turns: Conversation in LLaVA's format, with `IMAGE_MARK` for each picture.
        pictures: Pictures in the order of their marks, upright and RGB.
        prompt: Text that conditions the vision encoder.
    """

    task: str
    document: int
    turns: Sequence[Mapping[str, str]]
    pictures: Sequence[Image.Image]
    prompt: str

    @property
    def question(self) -> str:
        """Text of the last turn."""
        return self.turns[-1]["value"]


@dataclass(frozen=True, slots=True)
class SampleReader:
    """Makes samples of lmms-eval's requests.

    Args:
        policy: Prompt policy that makes the encoder's prompt; of its parts only the source counts,
            noise and dropout are for training.
        question_field: Column of the task's documents that holds the bare question, from which
            prompts are made, such as "question"; upper and lower case count the same. None makes
            them of all the text that the language model reads.

    Raises:
        ConfigError: There is no such policy, or it needs captions, which no request has.
    """

    policy: str
    question_field: str | None = None

    def __post_init__(self) -> None:
        try:
            parse_policy(self.policy.split("|")[0])(
                PromptSample("", [{"from": "human", "value": "word"}])
            )
        except PromptError:
            raise ConfigError(
                f"the prompt policy {self.policy!r} needs captions, which requests of lmms-eval do "
                "not have; pass prompt=question or prompt=empty"
            ) from None

    def read(
        self,
        messages: Sequence[Mapping[str, Any]],
        document: Mapping[str, Any],
        *,
        task: str = "",
        number: int = 0,
    ) -> Sample:
        """Read one request.

        Args:
            messages: Messages of the request, `{"role": ..., "content": [{"type": ...}, ...]}`.
            document: Document of the task that the request was made from.
            task: Name of the task, for messages and logs.
            number: Number of the document, for messages and logs.

        Raises:
            ConfigError: It shows something else than pictures, or lacks the column.
            PromptError: Roles do not take turns, or marks and pictures differ in number.
            ImageError: A picture cannot be read.
        """
        where = f"task {task!r}, document {number}"
        turns, pictures = conversation_of(messages, where)
        source = turns
        if self.question_field is not None:
            source = [{"from": "human", "value": _column(document, self.question_field, where)}]
        try:
            turns = with_marks(turns, len(pictures))
            prompt = prompts_of(parse_policy(self.policy), [source], None)[0]
        except PromptError as error:
            raise PromptError(f"{where}: {error}") from error
        return Sample(task, number, turns, pictures, prompt)


def conversation_of(
    messages: Sequence[Mapping[str, Any]], where: str
) -> tuple[list[dict[str, str]], list[Image.Image]]:
    """Turns of messages in LLaVA's format, and their pictures in order.

    Each picture stands as `IMAGE_MARK` on a line of its own where the message shows it, unless the
    texts have marks of their own. Texts of the system come before the first question.

    Args:
        messages: Messages of a request.
        where: Place of the request, for error messages.

    Raises:
        ConfigError: A message shows something else than texts and pictures, or has another role.
        PromptError: Roles do not take turns, or the last is not the user's.
    """
    parts = [(str(each.get("role")), _parts(each.get("content"), where)) for each in messages]
    marked = any(IMAGE_MARK in part for _, each in parts for part in each if isinstance(part, str))
    turns: list[dict[str, str]] = []
    before: list[str] = []
    for role, each in parts:
        lines = [part if isinstance(part, str) else IMAGE_MARK for part in each]
        if marked:
            lines = [part for part in each if isinstance(part, str)]
        if role == "system":
            before += lines
        elif role in _ROLES:
            turns.append({"from": _ROLES[role], "value": "\n".join([*before, *lines])})
            before = []
        else:
            raise ConfigError(f"{where}: unknown role {role!r}; known are system, user, assistant")
    roles = [turn["from"] for turn in turns]
    if not turns or roles != [("human", "gpt")[k % 2] for k in range(len(roles))]:
        raise PromptError(f"{where}: user and assistant must take turns, got {roles}")
    if roles[-1] != "human":
        raise PromptError(f"{where}: the last message must be the user's")
    pictures = [part for _, each in parts for part in each if isinstance(part, Image.Image)]
    return turns, pictures


def _parts(content: Any, where: str) -> list[str | Image.Image]:
    """Texts and pictures of one message, in order."""
    if isinstance(content, str):
        return [content]
    parts: list[str | Image.Image] = []
    for entry in content or ():
        kind = entry.get("type")
        if kind == "text":
            parts.append(str(entry["text"]))
        elif kind == "image":
            try:
                parts.append(load_image(entry["url"]))
            except ImageError as error:
                raise ImageError(f"{where}: {error}") from error
        else:
            raise ConfigError(
                f"{where} shows a {kind}; models of diffenc read pictures and texts alone: leave "
                "this task out"
            )
    return parts


def _column(document: Mapping[str, Any], field: str, where: str) -> str:
    names = {str(name).lower(): name for name in document}
    if field.lower() not in names:
        raise ConfigError(
            f"{where} has no column {field!r} (question_field); its columns are "
            f"{sorted(map(str, document))}.{near_matches(field, map(str, document))}"
        )
    return str(document[names[field.lower()]])
