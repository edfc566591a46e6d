"""What the plug-in asks of a model, and a saved `DiffusionVLM` as one."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from PIL import Image

from diffenc.evals.saved_vlm import SavedVLM

Turns = Sequence[Mapping[str, str]]


class Answering(Protocol):
    """A loaded model that answers conversations with pictures.

    Attributes:
        prompt_policy: Prompt policy that the model was trained with, or the usual one.
    """

    @property
    def prompt_policy(self) -> str: ...  # noqa: D102

    def room(self, turns: Turns, pictures: Sequence[Image.Image]) -> int | None:
        """Number of tokens that the context has left for an answer; None is unknown.

        Args:
            turns: Conversation in LLaVA's format, with a mark for each picture.
            pictures: Pictures in the order of their marks.
        """
        ...

    def generate(
        self,
        images: Sequence[Sequence[Image.Image]],
        conversations: Sequence[Turns],
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        **options: Any,
    ) -> list[str]:
        """Answer each conversation.

        Args:
            images: Pictures of each conversation, in the order of their marks.
            conversations: Conversations that end with the human's turn.
            prompts: Prompt of the vision encoder for each conversation.
            max_new_tokens: Largest number of tokens of an answer.
            options: Further arguments of transformers' `generate`.
        """
        ...


class VLMAnswers:
    """A saved `DiffusionVLM`, as `Answering`.

    Args:
        saved: Saved model; it is loaded now.

    Raises:
        BackboneError: The model cannot be loaded.
    """

    def __init__(self, saved: SavedVLM) -> None:
        self.prompt_policy = saved.prompt_policy
        self.vlm = saved.load()

    def room(self, turns: Turns, pictures: Sequence[Image.Image]) -> int | None:
        """Number of tokens that the context has left for an answer; None is unknown."""
        each, context = self.vlm.tokens_per_image, self.vlm.context
        if each is None or context is None:
            return None
        return context - self.vlm.chat.encode(turns).length(each)

    def generate(
        self,
        images: Sequence[Sequence[Image.Image]],
        conversations: Sequence[Turns],
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        **options: Any,
    ) -> list[str]:
        """Answer each conversation, see `Answering.generate`."""
        return self.vlm.generate(
            [list(each) for each in images],
            list(conversations),
            list(prompts),
            max_new_tokens=max_new_tokens,
            **options,
        )
