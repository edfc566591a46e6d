"""Conversations as token ids: chat templates, places of pictures, and labels on answers."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from diffenc.config import check_choice
from diffenc.errors import ConfigError, PromptError
from diffenc.inputs.tokenizing import ids_with_places

Template = Literal["auto", "chat", "v1", "plain"]
Turns = Sequence[Mapping[str, str]]

IMAGE_MARK = "<image>"
IMAGE_ID = -200
"""Placeholder in `input_ids` for the tokens of one picture; the number that LLaVA uses."""
IGNORE_ID = -100
"""Label of a token that the loss leaves out."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True, slots=True)
class ChatTokens:
    """One conversation.

    Attributes:
        input_ids: Token ids; `IMAGE_ID` for each picture.
        labels: The same ids where an answer stands, `IGNORE_ID` elsewhere.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def num_images(self) -> int:
        """How many pictures it shows."""
        return self.input_ids.count(IMAGE_ID)

    def length(self, tokens_per_image: int) -> int:
        """Tokens that the language model sees."""
        return len(self.input_ids) + self.num_images * (tokens_per_image - 1)

    def cut_to(self, limit: int, tokens_per_image: int) -> "ChatTokens":
        """The first tokens, as many as fit; a picture's tokens are never cut.

        Raises:
            ConfigError: A picture lies behind what fits.
        """
        if self.length(tokens_per_image) <= limit:
            return self
        keep = used = 0
        for token in self.input_ids:
            used += tokens_per_image if token == IMAGE_ID else 1
            if used > limit:
                break
            keep += 1
        if IMAGE_ID in self.input_ids[keep:]:
            raise ConfigError(
                f"{self.num_images} pictures of {tokens_per_image} tokens do not fit into {limit} "
                "tokens; use a coarser grid (grid= of the encoder), fewer pictures, or a longer "
                "context"
            )
        return ChatTokens(self.input_ids[:keep], self.labels[:keep])


class Chat:
    """Turns conversations in LLaVA's format into token ids.

    Args:
        tokenizer: Fast tokenizer of the language model.
        template: Name of the template. "chat" is the tokenizer's own chat template, "v1" is LLaVA's
            for Vicuna, and "plain" is pictures and the answer alone, as LLaVA's first stage has it.
            "auto" is "chat" where the tokenizer has a chat template and otherwise "v1", with a
            warning.
        system: System message of "chat" and "v1"; None is none for "chat" and Vicuna's for "v1".

    Attributes:
        template: Name of the template that is used, never "auto".

    Raises:
        ConfigError: "chat" without a chat template, a system message without a place in the
            template, or a tokenizer that cannot tell where its tokens stand in a text.

    Source:
        Templates "v1" and "plain": Liu et al. 2023 (LLaVA-1.5), arXiv:2310.03744, and its code.
        There "plain" ends with a line break; here with the end of sequence, so that captions end.
    """

    def __init__(
        self, tokenizer: Any, template: Template = "auto", *, system: str | None = None
    ) -> None:
        check_choice("template", template, get_args(Template))
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(tokenizer).__name__} cannot tell where tokens stand in a text; load the "
                "fast tokenizer: AutoTokenizer.from_pretrained(name, use_fast=True)"
            )
        own = getattr(tokenizer, "chat_template", None)
        if template == "chat" and not own:
            raise ConfigError(
                'this tokenizer has no chat template; use template="v1", LLaVA\'s for Vicuna, or '
                "set tokenizer.chat_template to the one that the model was trained with"
            )
        if template == "auto":
            template = "chat" if own else "v1"
            if not own:
                warnings.warn(
                    "this tokenizer has no chat template: LLaVA's v1 (Vicuna) is used. Pass "
                    'template="v1" to say so, or set tokenizer.chat_template',
                    stacklevel=3,
                )
        self.tokenizer, self.template, self.system = tokenizer, template, system
        if system and system.strip() not in self.text([{"from": "human", "value": ""}]):
            raise ConfigError(
                f"the template {template!r} has no place for a system message, which is missing in "
                "the text that the model reads; leave system out, or say it in the first question"
            )

    def encode(self, turns: Turns) -> ChatTokens:
        """Token ids and labels of a conversation.

        Args:
            turns: ``{"from": "human" | "gpt", "value": text}`` in turn, the human first. After a
                last human turn the model is asked to answer. `IMAGE_MARK` in a human turn is a
                picture's place.

        Raises:
            PromptError: Roles do not take turns, or a picture stands in an answer.
        """
        messages = as_messages(turns)
        text, answers = self._render(messages)
        input_ids: list[int] = []
        labels: list[int] = []
        start = 0
        for index, chunk in enumerate(text.split(IMAGE_MARK)):
            if index:
                input_ids.append(IMAGE_ID)
                labels.append(IGNORE_ID)
            for token, (place, _) in zip(*ids_with_places(self.tokenizer, chunk), strict=True):
                learnt = any(first <= start + place < last for first, last in answers)
                input_ids.append(token)
                labels.append(token if learnt else IGNORE_ID)
            start += len(chunk) + len(IMAGE_MARK)
        return ChatTokens(input_ids, labels)

    def text(self, turns: Turns) -> str:
        """The conversation as the one text that the language model reads.

        Args:
            turns: Conversation, see `encode`; `IMAGE_MARK` stands where a picture does.

        Raises:
            PromptError: Roles do not take turns, or a picture stands in an answer.
        """
        return self._render(as_messages(turns))[0]

    def _render(self, messages: list[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and from where to where its answers stand."""
        render = {"chat": self._chat, "v1": self._v1, "plain": self._plain}[self.template]
        whole = render(messages)
        answers = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = render(messages[:index]), render(messages[: index + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                raise ConfigError(
                    "this chat template changes earlier turns when later ones come, so answers "
                    'cannot be found in it; use template="v1", or a template that only appends'
                )
            answers.append((len(before), len(after)))
        return whole, answers

    def _chat(self, messages: list[dict[str, str]]) -> str:
        asks = not messages or messages[-1]["role"] == "user"
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asks
            )
        except Exception as error:  # jinja's, raised by the template itself
            raise ConfigError(f"the chat template refuses this conversation: {error}") from error
        return text

    def _v1(self, messages: list[dict[str, str]]) -> str:
        text = self._begin + (_V1_SYSTEM if self.system is None else self.system) + " "
        for message in messages:
            if message["role"] == "user":
                text += f"USER: {message['content']} ASSISTANT:"
            else:
                text += f" {message['content']}{self._end}"
        return text

    def _plain(self, messages: list[dict[str, str]]) -> str:
        text = self._begin
        for message in messages:
            if message["role"] == "user":
                text += IMAGE_MARK * message["content"].count(IMAGE_MARK)
            else:
                text += f"{message['content']}{self._end}"
        return text

    @property
    def _begin(self) -> str:
        return getattr(self.tokenizer, "bos_token", None) or ""

    @property
    def _end(self) -> str:
        return getattr(self.tokenizer, "eos_token", None) or "\n"


def as_messages(turns: Turns) -> list[dict[str, str]]:
    """LLaVA's turns as transformers has them: ``{"role": ..., "content": ...}``.

    Raises:
        PromptError: They are of another form, do not take turns, or show a picture in an answer.
    """
    messages: list[dict[str, str]] = []
    for index, turn in enumerate(turns):
        role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, Mapping) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise PromptError(
                f'turn {index} must be {{"from": "human" or "gpt", "value": text}}, got {turn!r}'
            )
        if role != ("user", "assistant")[index % 2]:
            raise PromptError(
                f"turn {index} is from {turn['from']!r}; human and gpt take turns, the human first"
            )
        if role == "assistant" and IMAGE_MARK in turn["value"]:
            raise PromptError(f"turn {index} is an answer and holds {IMAGE_MARK}")
        messages.append({"role": role, "content": turn["value"]})
    if not messages:
        raise PromptError("a conversation has one turn or more, got none")
    return messages
