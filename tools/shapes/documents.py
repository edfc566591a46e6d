"""Documents for the miniature language model: all that is said about one scene, as plain text.

Captions, several captions of one scene, questions with answers, instructions, conversations. No
picture goes with them: where captions stand before a question, its answer can often be read there,
as it will later be read from a picture; elsewhere it can only be guessed.
"""

import random
from collections.abc import Callable, Sequence

from diffenc.shapes.captions import caption, captions
from diffenc.shapes.questions import conversation, multiple_choice, questions, sample_question
from diffenc.shapes.scenes import Scene, sample_scene

USER, ASSISTANT, IMAGE, END = "<|user|>", "<|assistant|>", "<image>", "<eos>"
INSTRUCTION = "describe the picture."


def document(scene: Scene, rng: random.Random) -> str:
    """One document, without the marks that begin and end it."""
    makers, weights = zip(*_MAKERS.items(), strict=True)
    make: Callable[[Scene, random.Random], str] = rng.choices(makers, weights)[0]
    return make(scene, rng)


def chat(turns: Sequence[tuple[str, str]]) -> str:
    """What the tokenizer's chat template makes of (user, assistant) turns, without the marks."""
    return END.join(f"{USER}\n{asked}\n{ASSISTANT}\n{answer}" for asked, answer in turns)


def question_and_answer(scene: Scene, rng: random.Random, *, lettered: float) -> tuple[str, str]:
    """A question with its answer; with probability `lettered`, options are listed."""
    question = sample_question(scene, rng)
    if rng.random() < lettered:
        question = multiple_choice(question, rng, options=rng.randint(2, 4))
    return question.text, question.answer


def readable(rng: random.Random) -> tuple[str, str]:
    """A prompt and the answer to its question of colour or shape that one of its captions gives."""
    while True:
        scene = sample_scene(rng)
        said = some_captions(scene, rng, rng.choice((1, 1, 2)))
        for question in questions(scene, seed=rng.getrandbits(32)):
            if question.kind not in ("color", "shape"):
                continue
            thing = scene.objects[question.subjects[0]]
            # Both kinds of question are asked only where their words fit one object alone.
            if any(f"{thing.color} {thing.shape}" in line for line in said):
                return chat([("\n".join([*said, question.text]), "")]), question.answer


def lettered(rng: random.Random) -> tuple[str, str]:
    """A prompt up to a question, after captions, and what comes then: options and a letter."""
    scene = sample_scene(rng)
    question = sample_question(scene, rng)
    listed = multiple_choice(question, rng, options=rng.randint(2, 4))
    said = some_captions(scene, rng, rng.randint(0, 2))
    before, _, after = chat([("\n".join([*said, listed.text]), listed.answer)]).partition("?")
    return f"{before}?", after


def some_captions(scene: Scene, rng: random.Random, count: int) -> list[str]:
    """Up to `count` different captions."""
    return captions(scene, count, seed=rng.getrandbits(32))


def _captions(scene: Scene, rng: random.Random) -> str:
    return "\n".join(some_captions(scene, rng, rng.randint(2, 4)))


def _answers(scene: Scene, rng: random.Random) -> str:
    """Lines of captions, or none, and then lines of a question and its answer."""
    lines = some_captions(scene, rng, rng.randint(0, 2))
    asked = dict(question_and_answer(scene, rng, lettered=0.25) for _ in range(rng.randint(1, 3)))
    return "\n".join([*lines, *(" ".join(pair) for pair in asked.items())])


def _instruction(scene: Scene, rng: random.Random) -> str:
    return chat([(INSTRUCTION, caption(scene, rng))])


def _conversation(scene: Scene, rng: random.Random) -> str:
    messages = conversation(scene, turns=rng.randint(1, 4), seed=rng.getrandbits(32))
    said = [message["value"].removeprefix(f"{IMAGE}\n") for message in messages]
    return chat(list(zip(said[::2], said[1::2], strict=True)))


def _reading(scene: Scene, rng: random.Random) -> str:
    """A conversation whose first question comes after captions, in the same turn."""
    asked = dict(question_and_answer(scene, rng, lettered=0.4) for _ in range(rng.randint(1, 2)))
    (first, answer), *others = asked.items()
    lines = some_captions(scene, rng, rng.randint(1, 4))
    return chat([("\n".join([*lines, first]), answer), *others])


_MAKERS: dict[Callable[[Scene, random.Random], str], float] = {
    caption: 0.1,
    _captions: 0.1,
    _answers: 0.2,
    _instruction: 0.1,
    _conversation: 0.15,
    _reading: 0.35,
}
