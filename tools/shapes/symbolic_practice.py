"""What a language model practises on spelled-out pictures first: places and letters.

Whether one thing is left of another is answered with one of two words, and takes three steps: find
the one, find the other, compare. From the answer alone a grid of 64 cells never taught them. So
there is a hint for the middle of the model: where a question names a thing, its token is asked
where the thing is. Each picture is talked about in several turns, since it is what costs.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from symbolic import word_id
from symbolic_crowds import CROWDS, FEW, GRID, REQUEST, WORDS, CrowdedPictures, with_letters
from texts import any_scene
from torch import Tensor, nn

from diffenc.mllm.chat import IGNORE_ID, IMAGE_ID, Turns
from diffenc.shapes.captions import RELATION_PHRASES, noun_phrase
from diffenc.shapes.questions import Question, questions
from diffenc.shapes.scenes import SHAPES, Scene

TURNS = 5
"""Most turns about a grid; tokens of words are those of one question."""
ATTRIBUTES = ("color", "shape", "size")
PLACES = ("position", "relation", "relation")
LETTERED = {"letters": ATTRIBUTES, "letters of places": PLACES}
"""Kinds of questions that are asked with lettered options, each as often as it stands there."""
ON_GRIDS = (*PLACES, "pair", "pair", "color", "letters")
IN_WORDS = (*PLACES, "letters", "letters")
NOUNS = (*SHAPES, "object")


@dataclass(frozen=True)
class Lesson:
    """What a part of the practice shows.

    Attributes:
        until: Share of the practice after which it ends.
        words: Number of pictures in a step that are tokens of words.
        grids: Number of those that are grids.
        placed: Share of grids whose cells say their places.
        crowds: Share of grids with many objects.
        kinds: Kinds of questions about grids, each as often as it stands there.
        in_words: Kinds of questions about tokens of words, likewise.
    """

    until: float
    words: int
    grids: int
    placed: float
    crowds: float
    kinds: tuple[str, ...] = ON_GRIDS
    in_words: tuple[str, ...] = IN_WORDS


LESSONS = (
    Lesson(until=0.2, words=80, grids=16, placed=0.5, crowds=0.0, kinds=ATTRIBUTES),
    Lesson(until=0.55, words=16, grids=28, placed=1.0, crowds=0.0),
    Lesson(until=0.72, words=16, grids=28, placed=0.5, crowds=0.0),
    Lesson(until=1.0, words=16, grids=28, placed=0.5, crowds=CROWDS),
)
AFTERWARDS = Lesson(
    until=1.0,
    words=8,
    grids=14,
    placed=0.5,
    crowds=CROWDS,
    kinds=(*ON_GRIDS, "letters of places"),
    in_words=(*IN_WORDS, "letters of places"),
)
"""What is practised on beside everything else."""


def lesson_at(progress: float) -> Lesson:
    """Lesson at a share of the practice that is done."""
    return next((each for each in LESSONS if progress < each.until), LESSONS[-1])


@dataclass(frozen=True)
class Practice:
    """Talks about pictures, with a hint at each thing that a question names.

    Attributes:
        states: Embeddings (b t width).
        labels: Token ids (b t) of the answers alone.
        kinds: What is asked for in each turn of each talk.
        places: Where named things are (n 4): row, token, x and y away from the middle.
    """

    states: Tensor
    labels: Tensor
    kinds: list[list[str]]
    places: Tensor


@dataclass(frozen=True)
class _Turn:
    """One question with its answer.

    Attributes:
        kind: What is asked for.
        question: Question.
        answer: Answer.
        things: Indices of the objects that the question's nouns name, in their order; none where
            nouns and objects do not pair off.
    """

    kind: str
    question: str
    answer: str
    things: tuple[int, ...] = ()


class PracticePictures:
    """Makes talks about spelled-out pictures.

    Args:
        pictures: Spell scenes out.
    """

    def __init__(self, pictures: CrowdedPictures) -> None:
        self.pictures, self.tokenizer = pictures, pictures.tokenizer
        self._nouns = {word_id(self.tokenizer, noun) for noun in NOUNS}

    def batches(self, embedding: nn.Embedding, seed: str, lesson: Lesson) -> Iterator[Practice]:
        """Talks about random pictures: those of words, and those of grids, which are longer."""
        if lesson.words:
            yield self._about_words(embedding, f"words/{seed}", lesson)
        if lesson.grids:
            yield self._about_grids(embedding, f"grids/{seed}", lesson)

    def _about_words(self, embedding: nn.Embedding, seed: str, lesson: Lesson) -> Practice:
        """One turn about the tokens of its question's words."""
        rng = random.Random(seed)
        noise = torch.Generator().manual_seed(rng.getrandbits(32))
        scenes, talks = _talks(rng, lesson.words, CROWDS, lambda: rng.choices(lesson.in_words))
        texts = [talk[0].question for talk in talks]
        return self._practice(embedding, scenes, talks, texts, noise, FEW * FEW + WORDS)

    def _about_grids(self, embedding: nn.Embedding, seed: str, lesson: Lesson) -> Practice:
        """Several turns about each grid."""
        rng = random.Random(seed)
        noise = torch.Generator().manual_seed(rng.getrandbits(32))
        scenes, talks = _talks(
            rng, lesson.grids, lesson.crowds, lambda: rng.choices(lesson.kinds, k=TURNS)
        )
        texts = [None] * len(scenes)
        return self._practice(
            embedding, scenes, talks, texts, noise, GRID * GRID, placed=lesson.placed
        )

    def _practice(
        self,
        embedding: nn.Embedding,
        scenes: Sequence[Scene],
        talks: Sequence[Sequence[_Turn]],
        texts: Sequence[str | None],
        noise: torch.Generator,
        tokens: int,
        *,
        placed: float = 0.0,
    ) -> Practice:
        turns = [_as_turns(talk) for talk in talks]
        states, labels = self.pictures.embed_under(
            embedding, scenes, turns, texts, noise, placed=placed
        )
        places = []
        for row, (scene, talk, chat) in enumerate(zip(scenes, talks, turns, strict=True)):
            things = [thing for turn in talk for thing in self._named(turn)]
            for token, thing in zip(self._nouns_in(chat, tokens), things, strict=True):
                if thing is not None:
                    there = scene.objects[thing]
                    places.append((row, token, there.x - 0.5, there.y - 0.5))
        kinds = [[turn.kind for turn in talk] for talk in talks]
        return Practice(states, labels, kinds, torch.tensor(places).view(-1, 4))

    def _nouns_in(self, turns: Turns, tokens: int) -> Iterator[int]:
        """Where nouns of questions stand, behind a picture of so many tokens."""
        chat = self.pictures.chat.encode(turns)
        picture = chat.input_ids.index(IMAGE_ID)
        for place, (token, label) in enumerate(zip(chat.input_ids, chat.labels, strict=True)):
            if label == IGNORE_ID and token in self._nouns:
                yield place if place < picture else place + tokens - 1

    @staticmethod
    def _named(turn: _Turn) -> Iterator[int | None]:
        """For each noun of a question, which object it names; None where that is not known."""
        count = len(_nouns(turn.question))
        yield from turn.things if len(turn.things) == count else [None] * count


def _nouns(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text) if word in NOUNS]


def _talks(
    rng: random.Random, count: int, crowds: float, kinds: Callable[[], Sequence[str]]
) -> tuple[list[Scene], list[list[_Turn]]]:
    """Scenes of two objects or more, and a talk about each of what is drawn for it."""
    scenes: list[Scene] = []
    talks: list[list[_Turn]] = []
    while len(scenes) < count:
        scene = any_scene(rng, crowds)
        if len(scene.objects) < 2:
            continue
        if talk := list(_talk(scene, rng, kinds)):
            scenes.append(scene)
            talks.append(talk)
    return scenes, talks


def _talk(scene: Scene, rng: random.Random, kinds: Callable[[], Sequence[str]]) -> Iterator[_Turn]:
    """Turns about a scene, a question once at most, of kinds that are drawn after it."""
    waiting: dict[str, list[Question]] = defaultdict(list)
    for question in questions(scene, seed=rng.getrandbits(32)):
        waiting[question.kind].append(question)
    for kind in kinds():
        if kind == "pair":
            if (pair := _pair(scene, rng)) is not None:
                yield _Turn(kind, REQUEST, pair)
            continue
        pool = waiting[rng.choice(LETTERED[kind]) if kind in LETTERED else kind]
        if not pool:
            continue
        question = pool.pop(rng.randrange(len(pool)))
        if kind in LETTERED:
            question = with_letters(question, rng)
        yield _Turn(kind, question.text, question.answer, question.subjects)


def _pair(scene: Scene, rng: random.Random) -> str | None:
    """How two things lie, told from one to the other."""
    first, second = rng.sample(range(len(scene.objects)), 2)
    relation = scene.relation(first, second)
    if relation is None:
        return None
    names = (
        noun_phrase(shape=thing.shape, color=thing.color)
        for thing in (scene.objects[first], scene.objects[second])
    )
    return f" {rng.choice(RELATION_PHRASES[relation])} ".join(names)


def _as_turns(talk: Sequence[_Turn]) -> Turns:
    """The talk in LLaVA's format, the picture first."""
    turns: list[dict[str, str]] = []
    for turn in talk:
        mark = "" if turns else "<image>\n"
        turns.append({"from": "human", "value": f"{mark}{turn.question}"})
        turns.append({"from": "gpt", "value": turn.answer})
    return turns
