"""Questions with answers about a scene, and conversations of several turns in LLaVA's format."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from diffenc.errors import ConfigError
from diffenc.shapes.captions import (
    NUMBERS,
    PLACE_PHRASES,
    captions,
    noun_phrase,
    plural,
    require_describable,
)
from diffenc.shapes.scenes import COLORS, INVERSE, SHAPES, SIZES, Scene, SceneObject

QuestionKind = Literal["color", "shape", "size", "count", "position", "presence", "relation"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)

_LETTERS = ("a", "b", "c", "d")
_REQUESTS = {
    "what color ": "what color?",
    "which color ": "what color?",
    "what shape ": "what shape?",
    "which shape ": "what shape?",
    "what size ": "what size?",
    "how many ": "how many?",
    "where ": "where?",
    "is there ": "is there?",
    "do we see ": "is there?",
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one scene.

    Attributes:
        text: Text of the question, in lower case, with its question mark.
        answer: Right answer in one or a few words; "yes" or "no" for presence and relation.
        kind: Property that is asked for.
        choices: All answers that make sense, with the right one among them, in a fixed order.
        subjects: Indices of the scene's objects that the question is about; empty if it is about
            none of them (a "no" to "is there a ...?").
    """

    text: str
    answer: str
    kind: QuestionKind
    choices: tuple[str, ...]
    subjects: tuple[int, ...]


def questions(scene: Scene, *, seed: int = 0) -> list[Question]:
    """Every kind of question that has one clear answer in this scene, in a seeded order.

    Raises:
        ConfigError: The scene has no object, or more than nine.
    """
    require_describable(scene)
    rng = random.Random(f"questions/{seed}")
    every = [question for make in _MAKERS for question in make(scene, rng)]
    rng.shuffle(every)
    return every


def sample_question(scene: Scene, rng: random.Random) -> Question:
    """Draw one question; all kinds that this scene allows are equally likely.

    Raises:
        ConfigError: The scene has no object, or more than nine.
    """
    require_describable(scene)
    makers = list(_MAKERS)
    rng.shuffle(makers)
    for make in makers:
        if candidates := list(make(scene, rng)):
            return rng.choice(candidates)
    raise AssertionError("questions of presence exist for every scene")


def multiple_choice(question: Question, rng: random.Random, *, options: int = 4) -> Question:
    """The same question with lettered options, ``"... (a) red (b) blue"``, answered ``"(b)"``.

    Args:
        question: Question whose answer is given in words.
        rng: Random generator that chooses the wrong options and the order.
        options: Number of options to show, 2 to 4; fewer if the question has no more choices.

    Raises:
        ConfigError: `options` is not 2 to 4.
    """
    if not 2 <= options <= len(_LETTERS):
        raise ConfigError(f"options must be 2 to {len(_LETTERS)}, got {options}")
    others = [choice for choice in question.choices if choice != question.answer]
    shown = [question.answer, *rng.sample(others, min(len(others), options - 1))]
    rng.shuffle(shown)
    letters = [f"({letter})" for letter in _LETTERS[: len(shown)]]
    return Question(
        text=with_options(question.text, shown),
        answer=letters[shown.index(question.answer)],
        kind=question.kind,
        choices=tuple(letters),
        subjects=question.subjects,
    )


def without_names(text: str) -> str:
    """What a question of this world asks for, and not of which objects: "what color?".

    A relation is kept, as in "left of?"; a text that is no question stays as it is.

    Examples:
        >>> without_names("is the red star left of the blue circle?")
        'left of?'
    """
    if not text.endswith("?"):
        return text
    for begins, request in _REQUESTS.items():
        if text.startswith(begins):
            return request
    for relation in INVERSE:
        if f" {relation} the " in text:
            return f"{relation}?"
    return "what size?"  # "is the red star small or large?"


def with_options(text: str, options: Sequence[str]) -> str:
    """A question with its options behind it, as in ``"what color is it? (a) red (b) blue"``."""
    listed = (f"({letter}) {option}" for letter, option in zip(_LETTERS, options, strict=False))
    return " ".join([text, *listed])


def conversation(
    scene: Scene, *, turns: int = 3, lettered: int = 0, even: bool = False, seed: int = 0
) -> list[dict[str, str]]:
    """A conversation in LLaVA's format: ``{"from": "human" | "gpt", "value": ...}`` in turns.

    The first human turn begins with ``"<image>"`` and a line break. One turn at most asks for a
    description, all others are `questions`; there are fewer turns where those run out.

    Args:
        scene: Scene that is talked about.
        turns: Largest number of turns that are answered in words.
        lettered: Number of further turns, at any place among them, that list options and are
            answered by a letter, see `multiple_choice`.
        even: Whether each kind of question is as likely as any other that the scene allows;
            otherwise each question is, and most of them count.
        seed: Seed of all choices.

    Raises:
        ConfigError: `turns` is below 1 or `lettered` below 0, or the scene has no object, or more
            than nine.
    """
    if turns < 1:
        raise ConfigError(f"a conversation has 1 turn or more, got {turns}")
    if lettered < 0:
        raise ConfigError(
            f"lettered is the number of turns with options, 0 or more, got {lettered}"
        )
    rng = random.Random(f"conversation/{seed}")
    waiting = questions(scene, seed=seed)
    if even:
        waiting = _kinds_in_turn(waiting, rng)
    pairs: list[tuple[str, str]] = []
    described = False
    while len(pairs) < turns and (waiting or not described):
        if not described and (not waiting or rng.random() < 1 / 3):
            described = True
            pairs.append(("describe the picture.", captions(scene, 1, seed=seed)[0]))
        else:
            question = waiting.pop()
            pairs.append((question.text, question.answer))
    for _ in range(lettered):
        options = rng.choice((2, 2, 3, 4))  # two, as contrast pairs and "yes or no" have
        question = multiple_choice(sample_question(scene, rng), rng, options=options)
        pairs.insert(rng.randrange(len(pairs) + 1), (question.text, question.answer))
    messages: list[dict[str, str]] = []
    for text, answer in pairs:
        prefix = "" if messages else "<image>\n"
        messages += [{"from": "human", "value": prefix + text}, {"from": "gpt", "value": answer}]
    return messages


def _kinds_in_turn(shuffled: Sequence[Question], rng: random.Random) -> list[Question]:
    """The same questions; from the end on, one of each kind, then a second of each, and so on."""
    before: Counter[str] = Counter()
    order = []
    for question in shuffled:
        order.append((-before[question.kind], rng.random(), question))
        before[question.kind] += 1
    return [question for _, _, question in sorted(order, key=lambda each: each[:2])]


def _unique_name(scene: Scene, index: int) -> str | None:
    """The shortest name that fits this object alone: "circle", else "red circle", else None."""
    thing = scene.objects[index]
    if scene.count(shape=thing.shape) == 1:
        return thing.shape
    if scene.count(shape=thing.shape, color=thing.color) == 1:
        return f"{thing.color} {thing.shape}"
    return None


def _ask_color(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for index, thing in enumerate(scene.objects):
        if scene.count(shape=thing.shape) == 1:
            text = rng.choice(("what color is the {}?", "which color does the {} have?"))
            yield Question(text.format(thing.shape), thing.color, "color", COLORS, (index,))


def _ask_shape(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for index, thing in enumerate(scene.objects):
        if scene.count(color=thing.color) == 1:
            text = rng.choice(("what shape is the {} object?", "which shape is {}?"))
            yield Question(text.format(thing.color), thing.shape, "shape", SHAPES, (index,))


def _ask_size(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for index, thing in enumerate(scene.objects):
        if name := _unique_name(scene, index):
            text = rng.choice(("is the {} small or large?", "what size is the {}?"))
            yield Question(text.format(name), thing.size, "size", SIZES, (index,))


def _ask_count(scene: Scene, rng: random.Random) -> Iterator[Question]:
    things: list[SceneObject] = list(scene.objects)
    names: dict[str, tuple[int, ...]] = {"objects": tuple(range(len(scene.objects)))}
    for thing in things:
        for shape, color in ((thing.shape, None), (None, thing.color), (thing.shape, thing.color)):
            name = plural(noun_phrase(shape=shape, color=color, article=False))
            names[name] = tuple(
                index
                for index, other in enumerate(scene.objects)
                if shape in (None, other.shape) and color in (None, other.color)
            )
    for name, members in names.items():
        if len(members) >= len(NUMBERS):
            continue  # the world counts to three
        text = rng.choice(("how many {} are there?", "how many {} do we see?"))
        answer = NUMBERS[len(members)]
        yield Question(text.format(name), answer, "count", NUMBERS[1:], members)


def _ask_position(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for index, thing in enumerate(scene.objects):
        name = _unique_name(scene, index)
        if name and thing.place:
            answer = PLACE_PHRASES[thing.place]
            choices = tuple(PLACE_PHRASES.values())
            yield Question(f"where is the {name}?", answer, "position", choices, (index,))


def _ask_presence(scene: Scene, rng: random.Random) -> Iterator[Question]:
    text = rng.choice(("is there {}?", "do we see {}?"))
    present = rng.choice(scene.objects)
    members = tuple(i for i, other in enumerate(scene.objects) if other.kind == present.kind)
    there = noun_phrase(shape=present.shape, color=present.color)
    yield Question(text.format(there), "yes", "presence", ("yes", "no"), members)
    kinds = {thing.kind for thing in scene.objects}
    near = [(c, s) for c in COLORS for s in SHAPES if (c == present.color) != (s == present.shape)]
    if not (missing := [kind for kind in near if kind not in kinds]):
        return
    color, shape = rng.choice(missing)
    absent = noun_phrase(shape=shape, color=color)
    yield Question(text.format(absent), "no", "presence", ("yes", "no"), ())


def _ask_relation(scene: Scene, rng: random.Random) -> Iterator[Question]:
    for first in range(len(scene.objects)):
        for second in range(len(scene.objects)):
            names = _unique_name(scene, first), _unique_name(scene, second)
            relation = scene.relation(first, second) if first != second else None
            if relation is None or None in names:
                continue
            yes = rng.random() < 0.5
            relation_asked = relation if yes else INVERSE[relation]
            yield Question(
                f"is the {names[0]} {relation_asked} the {names[1]}?",
                "yes" if yes else "no",
                "relation",
                ("yes", "no"),
                (first, second),
            )


_MAKERS: tuple[Callable[[Scene, random.Random], Iterator[Question]], ...] = (
    _ask_color,
    _ask_shape,
    _ask_size,
    _ask_count,
    _ask_position,
    _ask_presence,
    _ask_relation,
)
