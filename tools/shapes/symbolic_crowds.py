"""Symbolic pictures of crowded scenes, on a grid or as tokens of a text's words.

A cell of a grid is the mean of what lies on it, so that small objects are faint, as they are in
features. The other half of the pictures are what `tokens="grid+words"` gives, spelled out: four
cells and eight words, each the mean of the objects that the word names, or of the whole picture
where it names none, with the place of what it gathers. Half of the grids say the place of each cell
too, as features may; of the others it is the cell's turn in the row.

Places are said as the answers to them are, by the words "left", "right", "top", "bottom" and
"middle". Texts give a language model no reason to tell "left" from "right": where one stands, the
other would do. `pull_apart` makes them differ.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

import torch
from patches import on_patches
from symbolic import NOISE, SymbolicPictures, asking, word_id
from texts import any_scene
from torch import Tensor, nn

from diffenc.mllm.chat import Turns
from diffenc.shapes.captions import captions
from diffenc.shapes.phrases import named_objects
from diffenc.shapes.questions import (
    Question,
    conversation,
    multiple_choice,
    questions,
)
from diffenc.shapes.scenes import COLORS, SHAPES, SIZES, Scene

CROWDS = 0.65
"""Share of crowded scenes."""
GRID, FINE = 8, 3
"""Cells along a side, and parts of a cell along its side."""
FEW, WORDS = 2, 8
"""Cells along a side where words come after them, and the number of those words."""
DROPPED = 0.3
"""Share of texts that are not there, as in a first stage with prompts dropped."""
REQUEST = "describe the picture."
EDGES = ("left", "right", "top", "bottom")
LOUDNESS = 3.0
"""What an edge's word weighs, a picture's side away from the middle."""
MIDDLE = 0.2
"""How far from the middle its word is heard, in sides of a picture."""


def pull_apart(embedding: nn.Embedding, tokenizer: Any) -> None:
    """Move the words of places away from each other, each in a random direction of its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for word in (*EDGES, "above", "below"):
            apart = torch.randn(embedding.embedding_dim, generator=generator)
            embedding.weight[word_id(tokenizer, word)] += 1.5 * apart / apart.norm()


class CrowdedPictures(SymbolicPictures):
    """Conversations about spelled-out scenes of up to nine objects.

    Args:
        tokenizer: Tokenizer of the language model.
    """

    def batch(self, embedding: nn.Embedding, count: int, seed: str) -> tuple[Tensor, Tensor]:
        """Embeddings (b t width) and labels (b t): half on grids, half as words."""
        rng = random.Random(seed)
        noise = torch.Generator().manual_seed(rng.getrandbits(32))
        scenes, talks, texts = [], [], []
        for index in range(count):
            scene = any_scene(rng, CROWDS)
            if few := index % 2 == 1:
                talk = self._one_turn(scene, rng)
            else:
                talk = conversation(
                    scene,
                    turns=rng.randint(1, 3),
                    lettered=int(rng.random() < 0.25),
                    even=True,
                    seed=rng.getrandbits(32),
                )
            scenes.append(scene)
            talks.append(talk)
            texts.append(self._prompt(scene, talk, rng) if few else None)
        return self.embed_under(embedding, scenes, talks, texts, noise)

    def _one_turn(self, scene: Scene, rng: random.Random) -> Turns:
        talk = conversation(scene, turns=1, even=True, seed=rng.getrandbits(32))
        if rng.random() >= 0.25:
            return talk
        return _turn(with_letters(rng.choice(questions(scene, seed=rng.getrandbits(32))), rng))

    def embed_under(
        self,
        embedding: nn.Embedding,
        scenes: Sequence[Scene],
        told: Sequence[Turns],
        texts: Sequence[str | None],
        noise: torch.Generator,
        *,
        placed: float = 0.5,
    ) -> tuple[Tensor, Tensor]:
        """Input and labels of given scenes; a text asks for its words, None for a grid.

        Args:
            embedding: The language model's input embedding.
            scenes: What is spelled out.
            told: What is said about each.
            texts: Text whose words gather each scene's tokens.
            noise: Source of noise, and of which grids say places.
            placed: Share of the grids that say the place of each cell.
        """
        say_places = (torch.rand(len(scenes), generator=noise) < placed).tolist()
        pictures = [
            self._grid(embedding, scene, placed=say)
            if text is None
            else self._cells_and_words(embedding, scene, text, noise)
            for scene, text, say in zip(scenes, texts, say_places, strict=True)
        ]
        scale = NOISE * embedding.weight.detach().square().mean().sqrt()
        noisy = [
            picture + scale * torch.randn(picture.shape, generator=noise) for picture in pictures
        ]
        return self.joined(embedding, noisy, told)

    def _prompt(self, scene: Scene, talk: Turns, rng: random.Random) -> str:
        """What the encoder would be told: the question, or a true caption before a description."""
        question = talk[0]["value"].removeprefix("<image>\n")
        if question != REQUEST:
            return question
        if rng.random() < DROPPED:
            return ""
        return captions(scene, 1, seed=rng.getrandbits(32))[0]

    def _objects(self, embedding: nn.Embedding, scene: Scene) -> Tensor:
        """Sum of the embeddings of each object's words (objects width)."""
        ids = [
            [word_id(self.tokenizer, word) for word in (thing.shape, thing.color, thing.size)]
            for thing in scene.objects
        ]
        summed: Tensor = embedding(torch.tensor(ids)).sum(1)
        return summed

    def _grid(
        self, embedding: nn.Embedding, scene: Scene, side: int = GRID, *, placed: bool = False
    ) -> Tensor:
        """Mean of what lies on each cell, with its place or without (side * side width)."""
        truth = on_patches(scene, GRID * FINE)
        background = embedding(torch.tensor(word_id(self.tokenizer, scene.background)))
        tables = [
            embedding(torch.tensor([word_id(self.tokenizer, word) for word in kind]))
            for kind in (SHAPES, COLORS, SIZES)
        ]
        there = truth[:, :1] > 0
        summed = sum(table[(truth[:, k] - 1).clamp(min=0)] for k, table in enumerate(tables))
        parts = torch.where(there, summed, background).unflatten(0, (GRID * FINE, GRID * FINE))
        part = GRID * FINE // side
        cells = parts.unflatten(1, (side, part)).unflatten(0, (side, part))
        grid: Tensor = cells.mean(dim=(1, 3)).flatten(0, 1)
        if not placed:
            return grid
        steps = (torch.arange(side) + 0.5) / side
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")
        return grid + self._places(embedding, torch.stack([columns, rows], -1).flatten(0, 1))

    def _cells_and_words(
        self, embedding: nn.Embedding, scene: Scene, text: str, noise: torch.Generator
    ) -> Tensor:
        """Four cells, then tokens of up to eight words in the order of the text, then zeros."""
        cells = self._grid(embedding, scene, FEW)
        words = re.findall(r"\w+", text)
        named = named_objects(scene, words)
        order = torch.randperm(len(words), generator=noise).tolist()
        first = sorted(order, key=lambda place: not named[place])
        objects = self._objects(embedding, scene)
        whole = cells.mean(0)
        middle = self._places(embedding, torch.tensor([[0.5, 0.5]]))[0]
        tokens = []
        for place in sorted(first[:WORDS]):
            members = named[place] or self._alike(scene, words, place)
            if members:
                things = [scene.objects[index] for index in members]
                centre = torch.tensor([[thing.x, thing.y] for thing in things]).mean(0, True)
                there = self._places(embedding, centre)[0]
                tokens.append(objects[list(members)].mean(0) + there)
            else:
                tokens.append(whole + middle)
        missing = embedding.weight.new_zeros(WORDS - len(tokens), embedding.embedding_dim)
        return torch.cat([cells, *(token[None] for token in tokens), missing])

    def _alike(self, scene: Scene, words: Sequence[str], place: int) -> tuple[int, ...]:
        """For a shape word that names nothing here: what has the shape, or else the colour."""
        if words[place].removesuffix("s") not in SHAPES:
            return ()
        shape, color = words[place].removesuffix("s"), words[max(place - 1, 0)]
        return tuple(
            index
            for index, thing in enumerate(scene.objects)
            if thing.shape == shape or thing.color == color
        )[:1]

    def _places(self, embedding: nn.Embedding, centres: Tensor) -> Tensor:
        """Places (n 2), x and y from 0 to 1, by how much of each edge's word there is (n width)."""
        words = embedding(
            torch.tensor([word_id(self.tokenizer, word) for word in (*EDGES, "middle")])
        )
        away = centres - 0.5
        x, y = away.unbind(-1)
        edges = LOUDNESS * torch.stack([-x, x, -y, y], -1).clamp(min=0)
        middle = (1 - away.norm(dim=-1, keepdim=True) / MIDDLE).clamp(min=0)
        places: Tensor = torch.cat([edges, middle], -1) @ words
        return places


def with_letters(question: Question, rng: random.Random) -> Question:
    """The same question with two to four lettered options."""
    return multiple_choice(question, rng, options=rng.choice((2, 2, 3, 4)))


def _turn(question: Question) -> Turns:
    """A question about a picture, and its answer."""
    return [*asking(question), {"from": "gpt", "value": question.answer}]
