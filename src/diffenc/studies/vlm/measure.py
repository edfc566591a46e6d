"""Figures of a trained model on held-out scenes, of which the truth is known."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from PIL import Image

from diffenc.evals.answerers import FunctionAnswerer
from diffenc.evals.captioning.evaluate import evaluate_captions
from diffenc.evals.captioning.metrics import score_captions
from diffenc.evals.captioning.miniature import shapes_captions
from diffenc.evals.choices.evaluate import evaluate_choices
from diffenc.evals.choices.miniature import shapes_mmvp
from diffenc.evals.leakage.evaluate import evaluate_leakage
from diffenc.mllm.training.miniature import REQUEST
from diffenc.shapes.captions import captions
from diffenc.shapes.questions import QUESTION_KINDS, Question, questions
from diffenc.shapes.render import render
from diffenc.shapes.scenes import Scene, sample_scenes
from diffenc.studies.vlm.plan import Measurement
from diffenc.studies.vlm.prompting import parse_prompting
from diffenc.studies.vlm.truth import caption_figures

HELD_OUT: Mapping[str, int] = {
    "captions": 971_000,
    "leakage": 972_000,
    "answers": 973_000,
    "mmvp": 974_000,
}
"""First seed of the scenes of each kind; no bundled model was trained on seeds from 900,000 up."""

CAPTION_TOKENS, ANSWER_TOKENS = 32, 12
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


def _captions(told: Measurement, generate: Generate, seed: int, writer: Writer | None) -> Measured:
    data = shapes_captions(told.items, seed=seed)
    scenes = _scenes(told.items, seed)
    wanted = parse_prompting(told.prompts)
    known = [item.references[0] for item in data.items]
    if writer is not None:
        known = writer([item.picture.open() for item in data.items])
    ids = [item.id for item in data.items]
    given = {name: wanted.text(caption=text) for name, text in zip(ids, known, strict=True)}
    found = evaluate_captions(
        data,
        _answerer(generate, CAPTION_TOKENS),
        prompts=given,
        passes=told.passes,
        question=REQUEST,
        metrics=(),
        batch_size=_BATCH,
    )
    references = {item.id: item.references for item in data.items}
    figures: Figures = {}
    for each in found.passes:
        own = {**caption_figures(each.captions, scenes), "cider": _cider(references, each.captions)}
        figures.update(own)  # those of the last pass stay
        if told.passes > 1:
            figures.update({f"{name}.{each.number}": value for name, value in own.items()})
    last = found.passes[-1]
    return Measured(figures, _examples(last.prompts, last.captions, known))


def _leakage(told: Measurement, generate: Generate, seed: int, writer: Writer | None) -> Measured:
    data = shapes_captions(told.items, seed=seed)
    found = evaluate_leakage(
        data,
        _answerer(generate, CAPTION_TOKENS),
        seed=seed,
        question=REQUEST,
        metrics=(),
        batch_size=_BATCH,
    )
    truth = caption_figures(found.captions, _scenes(told.items, seed))
    readout = found.readout
    figures: Figures = {
        "read": 100 * readout.value,
        "said": 100 * readout.said,
        "base": 100 * readout.base,
        "named": truth["named"],
        "right": truth["right"],
        "unread": truth["unread"],
        "cider": _cider({name: [text] for name, text in found.prompts.items()}, found.captions),
    }
    own = [item.references[0] for item in data.items]
    return Measured(figures, _examples(found.prompts, found.captions, own))


def _answers(told: Measurement, generate: Generate, seed: int, writer: Writer | None) -> Measured:
    scenes = list(sample_scenes(told.items, seed=seed))
    asked = [_one_question(scene, index, seed) for index, scene in enumerate(scenes)]
    pictures = [render(scene) for scene in scenes]
    wanted = parse_prompting(told.prompts)
    known = [captions(scene, 1, seed=seed + index)[0] for index, scene in enumerate(scenes)]
    if writer is not None:
        known = writer(pictures)
    given = [
        wanted.text(question=question.text, caption=text)
        for question, text in zip(asked, known, strict=True)
    ]
    said: list[str] = []
    for first in range(0, len(asked), _BATCH):
        part = slice(first, first + _BATCH)
        texts = [question.text for question in asked[part]]
        shown = [[picture] for picture in pictures[part]]
        said += generate(shown, texts, prompts=given[part], max_new_tokens=ANSWER_TOKENS)
    right = [_plain(text) == q.answer for text, q in zip(said, asked, strict=True)]
    unread = [_plain(text) not in q.choices for text, q in zip(said, asked, strict=True)]
    figures: Figures = {
        "all": _percent(right),
        "guess": _percent_guessed(asked),
        "unread": _percent(unread),
    }
    for kind in QUESTION_KINDS:
        own = [is_right for is_right, q in zip(right, asked, strict=True) if q.kind == kind]
        figures[kind] = _percent(own) if own else None
    examples = tuple(
        {"prompt": prompt, "question": question.text, "said": text, "true": question.answer}
        for prompt, question, text in zip(given, asked, said, strict=True)
    )
    return Measured(figures, examples[:_EXAMPLES])


def _mmvp(told: Measurement, generate: Generate, seed: int, writer: Writer | None) -> Measured:
    benchmark = shapes_mmvp(told.items, seed=seed)
    wanted = parse_prompting(told.prompts)
    known = [""] * len(benchmark.items)
    if writer is not None:
        known = writer([item.pictures[0].open() for item in benchmark.items])
    written = dict(zip([item.id for item in benchmark.items], known, strict=True))
    found = evaluate_choices(
        benchmark,
        _answerer(generate, ANSWER_TOKENS),
        prompts=lambda item: wanted.text(question=item.question, caption=written[item.id]),
        batch_size=_BATCH,
    )
    figures: Figures = {
        "pairs": found.overall,
        "questions": found.accuracy,
        "chance": found.chance,
        "unread": 100 * found.unread_share,
    }
    examples = tuple(
        {"question": item.text, "said": found.choices[item.id].answer} for item in found.items
    )
    return Measured(figures, examples[:_EXAMPLES])


_KINDS: Mapping[str, Callable[[Measurement, Generate, int, Writer | None], Measured]] = {
    "captions": _captions,
    "leakage": _leakage,
    "answers": _answers,
    "mmvp": _mmvp,
}


def write_captions(generate: Generate, pictures: Sequence[Image.Image]) -> list[str]:
    """Captions of pictures by a model, with the empty prompt for its encoder."""
    said: list[str] = []
    for first in range(0, len(pictures), _BATCH):
        part = [[picture] for picture in pictures[first : first + _BATCH]]
        asked = [REQUEST] * len(part)
        said += generate(part, asked, prompts=[""] * len(part), max_new_tokens=CAPTION_TOKENS)
    return said


def _answerer(generate: Generate, tokens: int) -> FunctionAnswerer:
    def answer(images: Any, asked: list[str], prompts: list[str] | None = None) -> list[str]:
        return generate(images, asked, prompts=prompts, max_new_tokens=tokens)

    return FunctionAnswerer("model", answer)


def _scenes(count: int, seed: int) -> dict[str, Scene]:
    """Those of `shapes_captions`, by id."""
    return {str(index): scene for index, scene in enumerate(sample_scenes(count, seed=seed))}


def _cider(references: Mapping[str, Sequence[str]], said: Mapping[str, str]) -> float | None:
    if not has_cider():
        return None
    found = score_captions(references, said, metrics=("cider",), tokenizer="simple")
    return found.values["cider"]


def _one_question(scene: Scene, index: int, seed: int) -> Question:
    """Kinds take turns, so that all are asked about equally often where scenes allow it."""
    rng = random.Random(f"answers/{seed}/{index}")
    found = questions(scene, seed=rng.randrange(1 << 30))
    turn = QUESTION_KINDS[index % len(QUESTION_KINDS)]
    return rng.choice([question for question in found if question.kind == turn] or found)


def _percent_guessed(asked: Sequence[Question]) -> float:
    """Percentage of right answers if the most frequent one of each kind is always given."""
    by_kind: dict[str, Counter[str]] = {}
    for question in asked:
        by_kind.setdefault(question.kind, Counter())[question.answer] += 1
    best = sum(counts.most_common(1)[0][1] for counts in by_kind.values())
    return 100 * best / len(asked)


def _plain(text: str) -> str:
    return " ".join(text.lower().strip(" .").split())


def _percent(values: Sequence[bool]) -> float:
    return 100 * sum(values) / len(values)


def _examples(
    prompts: Mapping[str, str], said: Mapping[str, str], known: Sequence[str]
) -> tuple[Mapping[str, str], ...]:
    rows = ({"prompt": prompts.get(name, ""), "said": text} for name, text in said.items())
    return tuple(rows)[:_EXAMPLES]
