"""Symbolic pictures for the miniature language model: words on a grid, in place of what is seen.

A large language model has read tables, maps and lists, and knows what to do with things that stand
in places. A projector can rely on that. So that the miniature one can, it reads scenes spelled out:
where a picture's 64 tokens will come, each cell is the sum of the embeddings of its words (size,
colour and shape of the object there, or the background), some of them missing, with noise. No pixel
is seen.
"""

import functools
import random
from collections.abc import Sequence
from typing import Any

import torch
from patches import on_patches
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diffenc.mllm.chat import IGNORE_ID, IMAGE_ID, Chat, Turns
from diffenc.shapes.questions import Question, conversation
from diffenc.shapes.scenes import COLORS, SHAPES, SIZES, Scene, sample_scene

MISSING = 0.15
"""Share of an object's words that are not there."""
NOISE = 0.3
"""Of an embedding's root mean square."""


def cell_words(tokenizer: Any, scene: Scene) -> Tensor:
    """Token ids of the words in each cell (patches 3); the background repeats its one word."""
    ids = {word: word_id(tokenizer, word) for word in (*SHAPES, *COLORS, *SIZES, scene.background)}
    truth = on_patches(scene)
    tables = [torch.tensor([0, *(ids[word] for word in kind)]) for kind in (SHAPES, COLORS, SIZES)]
    found = torch.stack([table[truth[:, k]] for k, table in enumerate(tables)], dim=1)
    return torch.where(truth[:, :1] > 0, found, ids[scene.background])


@functools.cache
def word_id(tokenizer: Any, word: str) -> int:
    """Of a word within a sentence, which the tokenizer keeps whole."""
    (found,) = tokenizer(f" {word}", add_special_tokens=False).input_ids
    return int(found)


def asking(question: Question) -> Turns:
    """A turn that asks about a picture."""
    return [{"from": "human", "value": f"<image>\n{question.text}"}]


class SymbolicPictures:
    """Conversations about spelled-out scenes, as a language model's input.

    Args:
        tokenizer: Of the language model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.chat = Chat(tokenizer, "chat")

    def batch(self, embedding: nn.Embedding, count: int, seed: str) -> tuple[Tensor, Tensor]:
        """Embeddings (b t width) and labels (b t), of the answers alone, of random scenes."""
        rng = random.Random(seed)
        noise = torch.Generator().manual_seed(rng.getrandbits(32))
        scenes, told = [], []
        for _ in range(count):
            scenes.append(sample_scene(rng))
            told.append(conversation(scenes[-1], turns=rng.randint(1, 4), seed=rng.getrandbits(32)))
        return self.embed(embedding, scenes, told, noise)

    def embed(
        self,
        embedding: nn.Embedding,
        scenes: Sequence[Scene],
        told: Sequence[Turns],
        noise: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """The same of given scenes and what is said about them, the picture first."""
        return self.joined(embedding, self._pictures(embedding, scenes, noise), told)

    def joined(
        self, embedding: nn.Embedding, pictures: Sequence[Tensor], told: Sequence[Turns]
    ) -> tuple[Tensor, Tensor]:
        """Input and labels of pictures' tokens (n width) and what is said about them."""
        chats = [self.chat.encode(turns) for turns in told]
        states, labels = [], []
        for chat, picture in zip(chats, pictures, strict=True):
            place = chat.input_ids.index(IMAGE_ID)
            before = embedding(torch.tensor(chat.input_ids[:place]))
            after = embedding(torch.tensor(chat.input_ids[place + 1 :]))
            states.append(torch.cat([before, picture, after]))
            blank = [IGNORE_ID] * len(picture)
            labels.append(torch.tensor(chat.labels[:place] + blank + chat.labels[place + 1 :]))
        return (
            pad_sequence(states, batch_first=True),
            pad_sequence(labels, batch_first=True, padding_value=IGNORE_ID),
        )

    def _pictures(
        self, embedding: nn.Embedding, scenes: Sequence[Scene], noise: torch.Generator
    ) -> Sequence[Tensor]:
        cells = torch.stack([cell_words(self.tokenizer, scene) for scene in scenes])
        words = embedding(cells)
        kept = torch.rand(words.shape[:3], generator=noise) >= MISSING
        background = (cells == cells[..., :1]).all(-1, keepdim=True)
        kept = torch.where(background, torch.tensor([True, False, False]), kept)
        summed = (words * kept[..., None]).sum(2)
        scale = NOISE * words.detach().square().mean().sqrt()
        return list(summed + scale * torch.randn(summed.shape, generator=noise))
