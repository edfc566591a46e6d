"""Processors that make prompts for the tower beside what the language model reads."""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import LlavaNextProcessor, LlavaProcessor

from diffenc.errors import ConfigError, PromptError
from diffenc.hosts.prompts import PromptTokenizer, tokenize_prompts
from diffenc.hosts.transformers.prompted import PROMPT_ARGUMENTS
from diffenc.models.parts import load_tokenizer
from diffenc.storage.names import is_folder

FOLDER = "prompt_tokenizer"
"""Name of the folder with the tower's tokenizer, inside the folder of a saved processor."""


class _MakesPrompts:
    """Mixin before a processor that takes `images` and `text`.

    transformers reads the names of `__init__` to save a processor and to make it again: they stand
    here one by one.
    """

    image_token: str
    prompt_model: str
    chat_prompts: str | None

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = "full",
        chat_template: Any = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        prompt_model: str = "shapes",
        chat_prompts: str | None = None,
        **kwargs: Any,
    ) -> None:
        parent: Any = super()
        if chat_prompts not in (None, "question"):
            raise ConfigError(f"chat_prompts is None or 'question', got {chat_prompts!r}")
        self.prompt_model, self.chat_prompts = prompt_model, chat_prompts
        self._prompts = PromptTokenizer(prompt_model)
        self._own: Any = None
        parent.__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    @property
    def prompt_tokens(self) -> Any:
        """The tokenizer of the tower's text encoder."""
        return self._prompts.tokenizer if self._own is None else self._own

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *args: Any,
        prompts: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Process images and texts as the stock processor does, with prompts for the tower.

        Args:
            images: Images of all samples, in order.
            text: Texts of all samples, with an image token for each image.
            args: Further arguments of the stock processor.
            prompts: Prompts for the tower: one for all samples, one for each, or one for each
                image. None leaves the tower its null prompt. Prompts of samples without images are
                left out.
            kwargs: Further keyword arguments of the stock processor.

        Returns:
            Output of the stock processor, with `prompt_input_ids` and `prompt_attention_mask`,
            one row for each image, if there are prompts and images.

        Raises:
            PromptError: The number of prompts fits neither samples nor images.
        """
        parent: Any = super()
        counts = self._count(text, images)
        rows = None if prompts is None else _per_image(prompts, counts)
        inputs = parent.__call__(images, text, *args, **kwargs)
        if rows:
            tokens = tokenize_prompts(self.prompt_tokens, rows)
            inputs.update(dict(zip(PROMPT_ARGUMENTS, (tokens.ids, tokens.mask), strict=True)))
        return inputs

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Write conversations as the stock processor does, with prompts for the tower.

        Args:
            conversation: Messages of a conversation, or of several.
            chat_template: Chat template; None takes the processor's.
            prompts: Prompts for the tower, as in a call of the processor. None takes the last text
                of the user in each conversation where `chat_prompts` is "question", else the
                tower's null prompt.
            tokenize: Whether to make what the model takes, in place of a text.
            kwargs: Further keyword arguments of the stock processor.

        Returns:
            Output of the stock processor, with `prompt_input_ids` and `prompt_attention_mask`
            where it is tokenized and returned as a dictionary.

        Raises:
            PromptError: There are prompts, and what is returned has no place for them; or their
                number fits neither conversations nor images.
        """
        parent: Any = super()
        complete = tokenize and kwargs.get("return_dict", False)
        if prompts is not None and not complete:
            raise PromptError(
                "prompts come back as tokens of their own: pass tokenize=True, return_dict=True, "
                "or pass them to the processor with the text that this returns"
            )
        if prompts is None and complete and self.chat_prompts == "question":
            prompts = [_last_question(each) for each in _conversations(conversation)]
        if prompts is not None:
            if "processor_kwargs" in inspect.signature(parent.apply_chat_template).parameters:
                options = {**(kwargs.pop("processor_kwargs", None) or {})}
                kwargs["processor_kwargs"] = {"prompts": prompts, **options}
            else:  # before transformers 5.4 all of it goes to the processor
                kwargs["prompts"] = prompts
        made = parent.apply_chat_template(conversation, chat_template, tokenize=tokenize, **kwargs)
        if prompts is not None and PROMPT_ARGUMENTS[0] not in made and _shows(conversation):
            raise PromptError(
                "apply_chat_template of the installed transformers hands no prompts on; pass the "
                "text that it makes with tokenize=False to the processor, with images and prompts"
            )
        return made

    def _count(self, text: Any, images: Any) -> list[int]:
        """Images of each sample."""
        if text is None:
            flat = images if isinstance(images, (list, tuple)) else [images]
            return [1] * len(flat)
        texts = [text] if isinstance(text, str) else list(text)
        return [each.count(self.image_token) for each in texts]

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the processor makes."""
        parent: Any = super()
        return [*parent.model_input_names, *PROMPT_ARGUMENTS]

    def save_pretrained(self, save_directory: "str | os.PathLike[str]", **kwargs: Any) -> Any:
        """Save as the stock processor does, with the tower's tokenizer in a folder of its own."""
        parent: Any = super()
        saved = parent.save_pretrained(save_directory, **kwargs)
        self.prompt_tokens.save_pretrained(str(Path(save_directory) / FOLDER))
        return saved

    @classmethod
    def from_pretrained(cls, name: "str | os.PathLike[str]", **kwargs: Any) -> Any:
        """Load as the stock processor does, with the folder's tokenizer for the tower, if any."""
        parent: Any = super()
        if not kwargs.get("trust_remote_code"):  # nobody is asked on the terminal
            kwargs["trust_remote_code"] = False
        made = parent.from_pretrained(name, **kwargs)
        folder = Path(name) / FOLDER
        if is_folder(folder):
            made._own = load_tokenizer(folder)
        return made


def _conversations(conversation: Any) -> list[Any]:
    """One conversation or several as several."""
    messages = list(conversation)
    return messages if messages and not isinstance(messages[0], Mapping) else [messages]


def _shows(conversation: Any) -> bool:
    """Whether conversations hold a picture."""
    return any(
        isinstance(part, Mapping) and part.get("type") == "image"
        for messages in _conversations(conversation)
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    )


def _last_question(messages: Sequence[Any]) -> str:
    """What the user says last, without the pictures."""
    for message in reversed(messages):
        if message["role"] != "user":
            continue
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [part["text"] for part in parts if part.get("type") == "text"]
        if texts:
            return "\n".join(texts).strip()
    return ""


def _per_image(prompts: str | Sequence[str], counts: Sequence[int]) -> list[str]:
    """One prompt for each image, of one for all, for each sample, or for each image."""
    images = sum(counts)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if isinstance(prompts, str):
        texts *= len(counts)
    if len(texts) == len(counts):
        return [text for text, count in zip(texts, counts, strict=True) for _ in range(count)]
    if len(texts) == images:
        return texts
    raise PromptError(
        f"pass one prompt, one for each of {len(counts)} texts, or one for each of {images} "
        f"images: got {len(texts)}"
    )


class DiffEncLlavaProcessor(_MakesPrompts, LlavaProcessor):  # type: ignore[misc]
    """`LlavaProcessor` that makes `prompt_input_ids` and `prompt_attention_mask` of `prompts`.

    Args:
        image_processor: A `DiffEncImageProcessor`.
        tokenizer: Tokenizer of the language model.
        patch_size: Image pixels per side of a token: `DiffEncConfig.patch_size`.
        vision_feature_select_strategy: Choice of the image tokens: "full", as there is no class
            token to take away.
        chat_template: Chat template, as for `LlavaProcessor`.
        image_token: Token that stands for an image, as for `LlavaProcessor`.
        num_additional_image_tokens: Number of tokens of an image beside its patches, as for
            `LlavaProcessor`; 0 for one encoder.
        prompt_model: Name of the model of the spec, whose tokenizer reads the prompts.
        chat_prompts: Prompts of conversations that come with none: "question" takes what the user
            says last, None the tower's null prompt.
        kwargs: Further keyword arguments of `LlavaProcessor`.
    """


class DiffEncLlavaNextProcessor(_MakesPrompts, LlavaNextProcessor):  # type: ignore[misc]
    """`LlavaNextProcessor` that makes prompts, as `DiffEncLlavaProcessor` does.

    Args:
        image_processor: A `LlavaNextImageProcessor` with the tower's sizes, mean and deviation; the
            other arguments are those of `DiffEncLlavaProcessor`.
    """
