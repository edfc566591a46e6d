"""A checkpoint of transformers' LLaVA or LLaVA-NeXT with a tower of diffenc, which answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffenc.evals.lmms_eval.answering import Turns
from diffenc.hosts.guidance import guide
from diffenc.mllm.chat import IMAGE_MARK, Chat, as_messages
from diffenc.storage.pretrained import loading
from diffenc.storage.whole_models import dtype_argument


class TransformersLlava:
    """LLaVA of transformers whose tower reads the question, as `Answering`.

    Conversations are put into the processor's chat template; a processor without one gets LLaVA's
    for Vicuna.

    Args:
        folder: Folder that the model and its processor (`DiffEncLlavaProcessor` or
            `DiffEncLlavaNextProcessor`) were saved to.
        device: Device of the model.
        dtype: Floating point type of the model.
        guidance_scale: Guidance scale of the tower's features; None leaves the tower's spec.

    Raises:
        BackboneError: The folder does not hold both.
        ConfigError: The tower's features are not changed by a guidance scale.
    """

    prompt_policy = "question"

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        guidance_scale: float | None = None,
    ) -> None:
        instead = "Save the model and its processor (DiffEncLlavaProcessor) to one folder."
        with loading("LLaVA of transformers", str(folder), instead=instead):
            model_class, processor_class = _classes(folder)
            self.processor = processor_class.from_pretrained(folder)
            self.model = model_class.from_pretrained(folder, **{dtype_argument(): dtype})
        self.processor.tokenizer.padding_side = "left"
        self.model.to(device).eval()
        tower = self.model.require_tower()
        if guidance_scale is not None:
            guide(tower.tower, guidance_scale)
        tower.load_backbone()

    def room(self, turns: Turns, pictures: Sequence[Image.Image]) -> int | None:
        """Number of tokens that the context has left for an answer; None is unknown."""
        context = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if context is None or self.model.config.model_type != "llava":  # tiles vary in number
            return None
        text = self._text(turns)
        ids = self.processor.tokenizer(text, add_special_tokens=not self._begins(text))["input_ids"]
        tokens = self.model.config.vision_config.num_patches
        return int(context) - len(ids) - len(pictures) * (int(tokens) - 1)

    @torch.no_grad()
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
        texts = [self._text(turns) for turns in conversations]
        inputs = self.processor(
            images=[picture for each in images for picture in each] or None,
            text=texts,
            prompts=list(prompts),
            padding=True,
            return_tensors="pt",
            add_special_tokens=not self._begins(texts[0]),
        ).to(self.model.device, self.model.dtype)
        rows = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        answers = rows[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _text(self, turns: Turns) -> str:
        """The conversation as the language model reads it."""
        if getattr(self.processor, "chat_template", None) is None:
            tokenizer = self.processor.tokenizer
            return Chat(tokenizer, "chat" if tokenizer.chat_template else "v1").text(turns)
        messages = [
            {"role": message["role"], "content": _content(message["content"])}
            for message in as_messages(turns)
        ]
        text: str = self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text

    def _begins(self, text: str) -> bool:
        """Whether a text begins with the token that a tokenizer would put there."""
        mark = self.processor.tokenizer.bos_token
        return mark is not None and text.startswith(mark)


def _content(value: str) -> list[dict[str, str]]:
    """A turn as transformers' templates read it: pictures and texts in order."""
    content: list[dict[str, str]] = []
    for index, chunk in enumerate(value.split(IMAGE_MARK)):
        if index:
            content.append({"type": "image"})
        if text := chunk.strip("\n"):
            content.append({"type": "text", "text": text})
    return content


def _classes(folder: Path) -> tuple[Any, Any]:
    """Classes of the model and its processor, by the checkpoint's config."""
    from transformers import AutoConfig

    from diffenc.hosts import transformers as hosts

    kinds = {
        "llava": (hosts.DiffEncLlavaForConditionalGeneration, hosts.DiffEncLlavaProcessor),
        "llava_next": (
            hosts.DiffEncLlavaNextForConditionalGeneration,
            hosts.DiffEncLlavaNextProcessor,
        ),
    }
    kind = AutoConfig.from_pretrained(folder).model_type
    if kind not in kinds:
        raise ValueError(f"model_type {kind!r} is none of {', '.join(kinds)}")
    return kinds[kind]
