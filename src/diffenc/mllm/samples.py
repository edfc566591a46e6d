"""What a model is asked: conversations, the pictures of each, and the prompts of their encoder."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from diffenc.errors import PromptError
from diffenc.inputs.images import ImageSource, as_list
from diffenc.inputs.policies import PromptPolicy, PromptSample, parse_policy, without_captions
from diffenc.mllm.chat import IMAGE_MARK, ChatTokens, Turns

Pictures: TypeAlias = "ImageSource | Sequence[ImageSource] | None"
"""Pictures of one sample: one, several, or None."""


def pictures_of(entry: Pictures) -> list[ImageSource]:
    """The pictures of one sample, as a list."""
    if entry is None or (isinstance(entry, (list, tuple)) and not entry):
        return []
    return as_list(entry)


def samples_of(images: Any, questions: Any) -> tuple[list[Turns], list[list[ImageSource]]]:
    """Conversations, and the pictures of each."""
    single = isinstance(questions, str)
    texts = [questions] if single else list(questions)
    if not texts:
        raise PromptError("there is no question; pass one or more")
    if images is None:
        images = [None] * len(texts)
    elif single or not isinstance(images, (list, tuple)):
        images = [images]
    shown = [pictures_of(entry) for entry in images]
    if len(shown) != len(texts):
        raise PromptError(
            f"pictures for {len(shown)} questions, and {len(texts)} questions; pass for each "
            "question a picture, a list of pictures, or None"
        )
    turns: list[Turns] = [
        [{"from": "human", "value": each}] if isinstance(each, str) else list(each)
        for each in texts
    ]
    for each in turns:
        if not each or each[-1].get("from") not in ("human", "user"):
            raise PromptError("a conversation to be answered ends with a turn from the human")
    return turns, shown


def with_marks(turns: Turns, pictures: int) -> list[dict[str, str]]:
    """The conversation with a place for each picture, before its first turn where it has none."""
    copies = [dict(turn) for turn in turns]
    places = sum(turn["value"].count(IMAGE_MARK) for turn in copies)
    if not places and pictures:
        copies[0]["value"] = f"{IMAGE_MARK}\n" * pictures + copies[0]["value"]
    elif places != pictures:
        raise PromptError(
            f"a question shows {places} pictures ({IMAGE_MARK}) and comes with {pictures}"
        )
    return copies


def prompts_of(
    policy: PromptPolicy, conversations: Sequence[Turns], prompts: str | Sequence[str] | None
) -> list[str]:
    """The encoder's prompt of each conversation: the one that is given, or what the policy makes.

    Of the policy only its first part counts: noise and dropout are for training. Captions are not
    known when something is asked: what draws on them gives no text.
    """
    if isinstance(prompts, str):
        return [prompts] * len(conversations)
    if prompts is not None:
        if len(prompts) != len(conversations):
            raise PromptError(f"{len(prompts)} prompts for {len(conversations)} questions")
        return list(prompts)
    unchanged = without_captions(parse_policy(str(policy).split("|")[0]))
    return [
        unchanged(PromptSample(key=str(index), conversation=[turns[-1]]))
        for index, turns in enumerate(conversations)
    ]


def pad(
    encoded: Sequence[ChatTokens], device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Token ids on the right padded with zeros, and the mask that tells them apart."""
    length = max(len(each.input_ids) for each in encoded)
    ids = [each.input_ids + [0] * (length - len(each.input_ids)) for each in encoded]
    mask = [[1] * len(each.input_ids) + [0] * (length - len(each.input_ids)) for each in encoded]
    first, second = (torch.tensor(each, dtype=torch.long, device=device) for each in (ids, mask))
    return first, second
