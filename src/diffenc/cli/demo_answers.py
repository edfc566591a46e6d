"""What the words' tokens say: a linear layer, fitted on other scenes, that names a trait of one."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffenc.shapes.captions import noun_phrase
from diffenc.shapes.crowds import sample_crowd
from diffenc.shapes.render import render
from diffenc.shapes.scenes import COLORS, SHAPES, Scene, SceneObject

if TYPE_CHECKING:
    from PIL import Image

    from diffenc.encoder import DiffusionEncoder
    from diffenc.passes.word_tokens import WordTokens
    from diffenc.studies.readouts import Readout

SCENES = 240
"""Crowded scenes that a layer is fitted on; the picture of the demo is none of them."""

_BATCH = 16
_SEED = "demo"


@dataclass(frozen=True, slots=True)
class Query:
    """A question about one object of a crowded scene, and the word that stands for the object.

    Attributes:
        text: Text of the question.
        word: Word of the text whose token is read.
        trait: Trait that is asked for, "color" or "shape"; the other one names the object.
        answer: Right answer.
    """

    text: str
    word: str
    trait: str
    answer: str

    @property
    def answers(self) -> tuple[str, ...]:
        """All answers that the world has."""
        return COLORS if self.trait == "color" else SHAPES


def query(thing: SceneObject, trait: str) -> Query:
    """Ask for the colour or the shape of an object by its other trait."""
    if trait == "color":
        return Query(f"what color is the {thing.shape}?", thing.shape, trait, thing.color)
    name = noun_phrase(color=thing.color, article=False)
    return Query(f"what shape is the {name}?", "object", trait, thing.shape)


def named(
    encoder: "DiffusionEncoder", gathered: "WordTokens", queries: "Sequence[Query]"
) -> list[str]:
    """What the token of each question's word says.

    Args:
        encoder: Encoder of the tokens, of one of the bundled models.
        gathered: Tokens of the words of each question, of unconditional features.
        queries: The questions, in the order of the batch.
    """
    layers = {trait: fit_answers(encoder, trait) for trait in {each.trait for each in queries}}
    answers = []
    for row, each in enumerate(queries):
        token = gathered.tokens[row, token_of(gathered, row, each.word)]
        (answer,) = layers[each.trait].predict(token[None].float().cpu()).tolist()
        answers.append(each.answers[answer])
    return answers


def token_of(gathered: "WordTokens", row: int, word: str) -> int:
    """Column of a word's token in a row of the batch."""
    return gathered.words[row].index(word)


def fit_answers(encoder: "DiffusionEncoder", trait: str) -> "Readout":
    """Fit the layer that names a trait of the asked object from its word's token.

    Args:
        encoder: Encoder that the tokens come from, of one of the bundled models.
        trait: Trait that is asked for, "color" or "shape".
    """
    import torch

    from diffenc.studies.readouts import fit_readout

    size = encoder.backbone.default_size
    queries: list[Query] = []
    pictures: list[Image.Image] = []
    rng = random.Random(f"{_SEED}/{trait}")
    while len(queries) < SCENES:
        scene = sample_crowd(rng)
        if things := _named_alone(scene, trait):
            queries.append(query(rng.choice(things), trait))
            pictures.append(render(scene, size))
    tokens = []
    for start in range(0, SCENES, _BATCH):
        part = queries[start : start + _BATCH]
        gathered = encoder.word_tokens(
            pictures[start : start + _BATCH], [each.text for each in part], conditioning="uncond"
        )
        columns = [token_of(gathered, row, each.word) for row, each in enumerate(part)]
        tokens += [gathered.tokens[row, column] for row, column in enumerate(columns)]
    labels = [each.answers.index(each.answer) for each in queries]
    return fit_readout(
        torch.stack(tokens).float().cpu(),
        torch.tensor(labels, dtype=torch.long, device="cpu"),
        len(part[0].answers),
    )


def _named_alone(scene: Scene, trait: str) -> list[SceneObject]:
    """Objects that no other one shares the naming trait with."""
    names = [thing.shape if trait == "color" else thing.color for thing in scene.objects]
    return [
        thing for thing, name in zip(scene.objects, names, strict=True) if names.count(name) == 1
    ]
