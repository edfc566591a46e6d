"""Symbolic pictures of crowded scenes, on a grid or as tokens of a text's words.

A cell of a grid is the mean of what lies on it, so that small objects are faint, as they are in
features. The other half of the pictures are what `tokens="grid+words"` gives, spelled out: four
cells and eight words, each the mean of the objects that the word names, or of the whole picture
where it names none, with the place of what it gathers.
"""

import random
import re
from collections.abc import Sequence

import torch
from patches import on_patches
from symbolic import NOISE, SymbolicPictures, word_id
from texts import any_scene
from torch import Tensor, nn

from diffenc.mllm.chat import Turns
from diffenc.shapes.captions import captions
from diffenc.shapes.phrases import named_objects
from diffenc.shapes.questions import conversation
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
            few = index % 2 == 1
            turns = 1 if few else rng.randint(1, 3)
            lettered = int(not few and rng.random() < 0.25)
            talk = conversation(
                scene, turns=turns, lettered=lettered, even=True, seed=rng.getrandbits(32)
            )
            scenes.append(scene)
            talks.append(talk)
            texts.append(self._prompt(scene, talk, rng) if few else None)
        return self.embed_under(embedding, scenes, talks, texts, noise)

    def embed_under(
        self,
        embedding: nn.Embedding,
        scenes: Sequence[Scene],
        told: Sequence[Turns],
        texts: Sequence[str | None],
        noise: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Input and labels of given scenes; a text asks for its words, None for a grid."""
        pictures = [
            self._grid(embedding, scene)
            if text is None
            else torch.cat(
                [self._grid(embedding, scene, FEW), self._words(embedding, scene, text, noise)]
            )
            for scene, text in zip(scenes, texts, strict=True)
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

    def _grid(self, embedding: nn.Embedding, scene: Scene, side: int = GRID) -> Tensor:
        """Mean of what lies on each cell (side * side width)."""
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
        return grid

    def _words(
        self, embedding: nn.Embedding, scene: Scene, text: str, noise: torch.Generator
    ) -> Tensor:
        """Tokens of up to eight words in the order of the text, zeros after them (8 width)."""
        words = re.findall(r"\w+", text)
        named = named_objects(scene, words)
        order = torch.randperm(len(words), generator=noise).tolist()
        first = sorted(order, key=lambda place: not named[place])
        objects = self._objects(embedding, scene)
        whole = self._grid(embedding, scene).mean(0)
        middle = self._place(embedding, 0.5, 0.5)
        tokens = []
        for place in sorted(first[:WORDS]):
            members = named[place] or self._alike(scene, words, place)
            if members:
                things = [scene.objects[index] for index in members]
                x, y = (sum(getattr(each, axis) for each in things) / len(things) for axis in "xy")
                tokens.append(objects[list(members)].mean(0) + self._place(embedding, x, y))
            else:
                tokens.append(whole + middle)
        missing = embedding.weight.new_zeros(WORDS - len(tokens), embedding.embedding_dim)
        return torch.cat([torch.stack(tokens), missing]) if tokens else missing

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

    def _place(self, embedding: nn.Embedding, x: float, y: float) -> Tensor:
        """A place between the four edges, said by how much of each edge's word there is."""
        left, right, top, bottom = embedding(
            torch.tensor(
                [word_id(self.tokenizer, word) for word in ("left", "right", "top", "bottom")]
            )
        )
        place: Tensor = (1 - x) * left + x * right + (1 - y) * top + y * bottom
        return place
