"""Figures of a trained model on held-out scenes, of which the truth is known."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from PIL import Image

from diffenc.evals.answerers import FunctionAnswerer
from diffenc.evals.captioning.evaluate import evaluate_captions
from diffenc.evals.captioning.metrics import score_captions
from diffenc.evals.captioning.miniature import shapes_captions
from diffenc.evals.choices.base import ChoiceBenchmark
from diffenc.evals.choices.evaluate import evaluate_choices
from diffenc.evals.choices.miniature import shapes_mmvp
from diffenc.evals.leakage.evaluate import evaluate_leakage
from diffenc.mllm.training.miniature import REQUEST
from diffenc.shapes.captions import captions
from diffenc.shapes.crowds import sample_crowd
from diffenc.shapes.questions import QUESTION_KINDS, Question, questions, without_names
from diffenc.shapes.render import render
from diffenc.shapes.scenes import Scene, sample_scene, sample_scenes
from diffenc.studies.vlm.measurements import Measurement, parse_prompting
from diffenc.studies.vlm.truth import caption_figures

HELD_OUT: Mapping[str, int] = {
    "captions": 971_000,
    "leakage": 972_000,
    "answers": 973_000,
    "mmvp": 974_000,
    "pairs": 974_000,
}
"""First seed of the scenes of each kind; no bundled model was trained on seeds from 900,000 up."""

EDITIONS: Mapping[str, int] = {"answers": 2}
"""Number of the making of what is asked, where it was made otherwise before."""

UNTOLD = "without names"
"""How models are asked that are not told the question; results with another way are not found."""

CAPTION_TOKENS, ANSWER_TOKENS = 32, 12
SIDE, CROWD_SIDE = 64, 96
"""Side of a picture of one to three objects, and of a crowded one, in pixels."""
_OBJECTS = (1, 2, 3, 2, 3)
_BATCH = 32
_EXAMPLES = 4

Figures = dict[str, float | None]
Generate = Callable[..., list[str]]
"""`DiffusionVLM.generate`."""

Writer = Callable[[Sequence[Image.Image]], list[str]]
"""Function that returns a caption per picture."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of one model with one seed.

    Attributes:
        figures: Value of each figure, by name; None where nothing could be counted.
        examples: Examples of prompts of the encoder and of answers.
    """

    figures: Figures
    examples: tuple[Mapping[str, str], ...] = ()


def measure(
    measurement: Measurement,
    generate: Generate,
    *,
    seed: int,
    writer: Writer | None = None,
) -> Measured:
    """Measure a model.

    Args:
        measurement: Measurement to make, with its kind and prompts.
        generate: Function `generate` of the model, see `DiffusionVLM.generate`.
        seed: Seed of the scenes and of everything that is drawn, 0 or more; it is added to the
            first held-out seed of the kind.
        writer: Function that captions pictures for the prompts, if the measurement asks for that;
            None is for other measurements.
    """
    run = _KINDS[measurement.kind]
    return run(measurement, generate, HELD_OUT[measurement.kind] + seed, writer)


def has_cider() -> bool:
    """Whether CIDEr can be computed here; it needs no Java with the tokenizer that studies use."""
    return find_spec("pycocoevalcap") is not None


def _captions(
    measurement: Measurement, generate: Generate, seed: int, writer: Writer | None
) -> Measured:
    data = shapes_captions(measurement.items, seed=seed)
    scenes = _scenes(measurement.items, seed)
    prompts = _prompts(
        measurement,
        writer,
        lambda: [item.picture.open() for item in data.items],
        captions=[item.references[0] for item in data.items],
    )
    evaluation = evaluate_captions(
        data,
        _answerer(generate, CAPTION_TOKENS),
        prompts=dict(zip([item.id for item in data.items], prompts, strict=True)),
        passes=measurement.passes,
        question=REQUEST,
        metrics=(),
        batch_size=_BATCH,
    )
    references = {item.id: item.references for item in data.items}
    figures: Figures = {}
    for each in evaluation.passes:
        own = {**caption_figures(each.captions, scenes), "cider": _cider(references, each.captions)}
        figures.update(own)  # those of the last pass stay
        if measurement.passes > 1:
            figures.update({f"{name}.{each.number}": value for name, value in own.items()})
    last = evaluation.passes[-1]
    return Measured(figures, _examples(last.prompts, last.captions))


def _leakage(
    measurement: Measurement, generate: Generate, seed: int, _writer: Writer | None
) -> Measured:
    evaluation = evaluate_leakage(
        shapes_captions(measurement.items, seed=seed),
        _answerer(generate, CAPTION_TOKENS),
        seed=seed,
        question=REQUEST,
        metrics=(),
        batch_size=_BATCH,
    )
    prompts, texts = evaluation.prompts, evaluation.captions
    truth = caption_figures(texts, _scenes(measurement.items, seed))
    readout = evaluation.readout
    figures: Figures = {
        "read": 100 * readout.value,
        "said": 100 * readout.said,
        "base": 100 * readout.base,
        "named": truth["named"],
        "right": truth["right"],
        "unread": truth["unread"],
        "cider": _cider({name: [text] for name, text in prompts.items()}, texts),
    }
    return Measured(figures, _examples(prompts, texts))


def ask_questions(
    generate: Generate,
    count: int,
    *,
    seed: int,
    prompts: Callable[[Sequence[Scene], Sequence[str]], Sequence[str]] | None = None,
    crowds: bool = False,
    untold: bool = False,
) -> tuple[tuple[Question, ...], list[str]]:
    """Questions on scenes, all kinds in turn, and what a model answers.

    Args:
        generate: Function `generate` of the model, see `DiffusionVLM.generate`.
        count: Number of questions.
        seed: Seed of the scenes and of the choice of questions.
        prompts: Function that returns the encoder's prompts, from scenes and questions; None takes
            the questions.
        crowds: Whether scenes have five to nine objects; otherwise they have one to three.
        untold: Whether the language model reads what is asked for and not of which objects, as in
            "what color?".
    """
    scenes, chosen = zip(*(_asked(index, seed, crowds) for index in range(count)), strict=True)
    texts = [question.text for question in chosen]
    words = texts if prompts is None else prompts(scenes, texts)
    pictures = [render(scene, CROWD_SIDE if crowds else SIDE) for scene in scenes]
    read = [without_names(text) for text in texts] if untold else texts
    return chosen, _in_batches(generate, pictures, read, words, ANSWER_TOKENS)


def is_right(answer: str, question: Question) -> bool:
    """Whether a model's answer is the true one."""
    return _plain(answer) == question.answer


def _answers(
    measurement: Measurement, generate: Generate, seed: int, writer: Writer | None
) -> Measured:
    prompts: list[str] = []
    crowds = measurement.crowds

    def make_prompts(scenes: Sequence[Scene], texts: Sequence[str]) -> list[str]:
        truth = [captions(scene, 1, seed=seed + index)[0] for index, scene in enumerate(scenes)]
        prompts[:] = _prompts(
            measurement,
            writer,
            lambda: [render(scene, CROWD_SIDE if crowds else SIDE) for scene in scenes],
            captions=truth,
            questions=texts,
        )
        return prompts

    chosen, answers = ask_questions(
        generate,
        measurement.items,
        seed=seed,
        prompts=make_prompts,
        crowds=crowds,
        untold=measurement.untold,
    )
    right = [is_right(text, question) for text, question in zip(answers, chosen, strict=True)]
    unread = [_plain(text) not in q.choices for text, q in zip(answers, chosen, strict=True)]
    figures: Figures = {
        "all": _percent(right),
        "guess": _percent_guessed(chosen),
        "unread": _percent(unread),
    }
    for kind in QUESTION_KINDS:
        own = [value for value, q in zip(right, chosen, strict=True) if q.kind == kind]
        figures[kind] = _percent(own) if own else None
    examples = tuple(
        {"prompt": prompt, "question": question.text, "said": text, "true": question.answer}
        for prompt, question, text in zip(prompts, chosen, answers, strict=True)
    )
    return Measured(figures, examples[:_EXAMPLES])


def _mmvp(
    measurement: Measurement, generate: Generate, seed: int, writer: Writer | None
) -> Measured:
    benchmark, prompts = _near_same(measurement, seed, writer)
    by_id = dict(zip([item.id for item in benchmark.items], prompts, strict=True))
    evaluation = evaluate_choices(
        benchmark,
        _answerer(generate, ANSWER_TOKENS),
        prompts=lambda item: by_id[item.id],
        batch_size=_BATCH,
    )
    figures: Figures = {
        "pairs": evaluation.overall,
        "questions": evaluation.accuracy,
        "chance": evaluation.chance,
        "unread": 100 * evaluation.unread_share,
    }
    examples = tuple(
        {"question": item.text, "said": evaluation.choices[item.id].answer}
        for item in evaluation.items
    )
    return Measured(figures, examples[:_EXAMPLES])


def _pairs(
    measurement: Measurement, generate: Generate, seed: int, writer: Writer | None
) -> Measured:
    benchmark, prompts = _near_same(measurement, seed, writer)
    items = benchmark.items
    pictures = [item.pictures[0].open() for item in items]
    texts = [item.question for item in items]
    answers = [
        _plain(text) for text in _in_batches(generate, pictures, texts, prompts, ANSWER_TOKENS)
    ]
    right: dict[str, list[bool]] = defaultdict(list)
    guessed: dict[str, float] = defaultdict(lambda: 1.0)
    sensible: dict[str, set[str]] = defaultdict(set)
    for item, answer in zip(items, answers, strict=True):
        right[item.group].append(answer == item.options[item.answer])
        guessed[item.group] /= len(item.options)
        sensible[item.labels["pattern"]].update(item.options)
    unread = [
        answer not in sensible[item.labels["pattern"]]
        for item, answer in zip(items, answers, strict=True)
    ]
    figures: Figures = {
        "pairs": _percent([all(both) for both in right.values()]),
        "questions": _percent([one for both in right.values() for one in both]),
        "chance": 100 * sum(guessed.values()) / len(guessed),
        "unread": _percent(unread),
    }
    examples = tuple(
        {"question": item.question, "said": answer, "true": item.options[item.answer]}
        for item, answer in zip(items, answers, strict=True)
    )
    return Measured(figures, examples[:_EXAMPLES])


def _near_same(
    measurement: Measurement, seed: int, writer: Writer | None
) -> tuple[ChoiceBenchmark, list[str]]:
    """Pairs of near-same pictures, and the encoder's prompt of each question."""
    benchmark = shapes_mmvp(measurement.items, seed=seed)
    prompts = _prompts(
        measurement,
        writer,
        lambda: [item.pictures[0].open() for item in benchmark.items],
        captions=[""] * len(benchmark.items),
        questions=[item.question for item in benchmark.items],
    )
    return benchmark, prompts


_KINDS: Mapping[str, Callable[[Measurement, Generate, int, Writer | None], Measured]] = {
    "captions": _captions,
    "leakage": _leakage,
    "answers": _answers,
    "mmvp": _mmvp,
    "pairs": _pairs,
}


def _prompts(
    measurement: Measurement,
    writer: Writer | None,
    pictures: Callable[[], Sequence[Image.Image]],
    *,
    captions: Sequence[str],
    questions: Sequence[str] | None = None,
) -> list[str]:
    """Prompts of the encoder; captions are the writer's if there is one, else true."""
    prompting = parse_prompting(measurement.prompts)
    known = captions if writer is None else writer(pictures())
    pairs = zip(questions or [""] * len(known), known, strict=True)
    return [prompting.text(question=question, caption=caption) for question, caption in pairs]


def write_captions(generate: Generate, pictures: Sequence[Image.Image]) -> list[str]:
    """Captions of pictures by a model, with the empty prompt for its encoder."""
    count = len(pictures)
    return _in_batches(generate, pictures, [REQUEST] * count, [""] * count, CAPTION_TOKENS)


def _in_batches(
    generate: Generate,
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    prompts: Sequence[str],
    tokens: int,
) -> list[str]:
    answers: list[str] = []
    for first in range(0, len(texts), _BATCH):
        part = slice(first, first + _BATCH)
        shown = [[picture] for picture in pictures[part]]
        answers += generate(
            shown, list(texts[part]), prompts=list(prompts[part]), max_new_tokens=tokens
        )
    return answers


def _answerer(generate: Generate, tokens: int) -> FunctionAnswerer:
    def answer(images: Any, questions: list[str], prompts: list[str] | None = None) -> list[str]:
        return generate(images, questions, prompts=prompts, max_new_tokens=tokens)

    return FunctionAnswerer("model", answer)


def _scenes(count: int, seed: int) -> dict[str, Scene]:
    """Those of `shapes_captions`, by id."""
    return {str(index): scene for index, scene in enumerate(sample_scenes(count, seed=seed))}


def _cider(references: Mapping[str, Sequence[str]], said: Mapping[str, str]) -> float | None:
    if not has_cider():
        return None
    scores = score_captions(references, said, metrics=("cider",), tokenizer="simple")
    return scores.values["cider"]


def _asked(index: int, seed: int, crowds: bool) -> tuple[Scene, Question]:
    """A scene and a question about it.

    Kinds of questions take turns, and so do numbers of objects within each kind: a scene of one
    object tells little, and of relations nothing.
    """
    rng = random.Random(f"answers/{seed}/{index}")
    turn, number = divmod(index, len(QUESTION_KINDS))
    kind = QUESTION_KINDS[number]
    counts = [count for count in _OBJECTS if count > 1 or kind != "relation"]
    while True:
        scene = sample_crowd(rng) if crowds else sample_scene(rng, count=counts[turn % len(counts)])
        every = questions(scene, seed=rng.randrange(1 << 30))
        if own := [question for question in every if question.kind == kind]:
            return scene, rng.choice(own)


def _percent_guessed(chosen: Sequence[Question]) -> float:
    """Percentage of right answers if the most frequent one of each kind is always given."""
    by_kind: dict[str, Counter[str]] = {}
    for question in chosen:
        by_kind.setdefault(question.kind, Counter())[question.answer] += 1
    best = sum(counts.most_common(1)[0][1] for counts in by_kind.values())
    return 100 * best / len(chosen)


def _plain(text: str) -> str:
    return " ".join(text.lower().strip(" .").split())


def _percent(values: Sequence[bool]) -> float:
    return 100 * sum(values) / len(values)


def _examples(prompts: Mapping[str, str], said: Mapping[str, str]) -> tuple[Mapping[str, str], ...]:
    rows = ({"prompt": prompts.get(name, ""), "said": text} for name, text in said.items())
    return tuple(rows)[:_EXAMPLES]
