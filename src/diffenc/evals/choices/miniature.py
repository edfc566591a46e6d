"""MMVP and BLINK on the miniature world: they need no download, and their truth is known."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from diffenc.errors import ConfigError
from diffenc.evals.choices.base import ChoiceBenchmark, ChoiceItem
from diffenc.evals.items import Picture, check_positive
from diffenc.shapes import (
    ContrastPair,
    Question,
    Scene,
    mmvp_pairs,
    perturb,
    questions,
    render,
    sample_scene,
)
from diffenc.shapes.captions import noun_phrase
from diffenc.shapes.questions import with_options

CHOICES_SEED = 962_000
"""Seed of the bundled sets; no bundled model was trained on seeds from 900,000 up."""

_TRIES = 500


def shapes_mmvp(
    per_pattern: int = 15, *, seed: int = CHOICES_SEED, instruction: str = ""
) -> ChoiceBenchmark:
    """Pairs of near-same pictures with one question each, whose right answers differ.

    Args:
        per_pattern: Number of pairs for each of color, count, position, relation, shape and size.
        seed: Seed of the scenes; choose settings on another seed than the one you report.
        instruction: Text that follows the question and its options, on a line of its own; "" adds
            nothing.

    Raises:
        ConfigError: Fewer than one pair.
    """
    check_positive(per_pattern=per_pattern)
    items = []
    for index, pair in enumerate(mmvp_pairs(per_pattern, seed=seed)):
        rng = random.Random(f"mmvp questions/{seed}/{index}")
        pair_questions = _asked_of_both(pair, rng)
        options = [question.answer for question in pair_questions]
        rng.shuffle(options)
        for turn, (scene, question) in enumerate(zip(pair.scenes, pair_questions, strict=True)):
            number = 2 * index + turn + 1
            items.append(
                _item(
                    *(str(number), [scene], question.text, options, question.answer),
                    group=f"{2 * index + 1}-{2 * index + 2}",
                    labels={"pattern": pair.kind},
                    instruction=instruction,
                    source=f"mmvp, seed {seed}",
                )
            )
    return ChoiceBenchmark(
        name="mmvp", source=f"shapes, seed {seed}", items=tuple(items), score="pairs"
    )


def shapes_blink(
    per_task: int = 30,
    *,
    seed: int = CHOICES_SEED,
    instruction: str = "",
    tasks: Sequence[str] | None = None,
) -> ChoiceBenchmark:
    """Four tasks on one, two and three pictures of coloured shapes.

    "Counting" (three options) and "Spatial_Relation" ask about one picture. "Change" shows a
    picture and its near twin, and asks whether both show the same objects in the same places;
    "Visual_Similarity" shows three, and asks which of the last two shows the objects of the first.

    Args:
        per_task: Number of questions per task.
        seed: Seed of the scenes; choose settings on another seed than the one you report.
        instruction: Text that follows the question and its options, on a line of its own; "" adds
            nothing.
        tasks: Names of the tasks to make; None makes all four.

    Raises:
        ConfigError: Fewer than one question per task, or an unknown task.
    """
    check_positive(per_task=per_task)
    if unknown := [name for name in tasks or () if name not in _TASKS]:
        raise ConfigError(f"unknown tasks {unknown}; the miniature has {list(_TASKS)}")
    items = []
    for task, make in _TASKS.items():
        if tasks is not None and task not in tasks:
            continue
        for index in range(per_task):
            rng = random.Random(f"blink/{seed}/{task}/{index}")
            scenes, question, options, answer = make(rng)
            items.append(
                _item(
                    *(f"{task}_{index + 1}", scenes, question, options, answer),
                    group=task,
                    labels={},
                    instruction=instruction,
                    source=f"blink, seed {seed}",
                )
            )
    return ChoiceBenchmark(
        name="blink",
        source=f"shapes, seed {seed}",
        items=tuple(items),
        score="tasks",
        groups=tuple(_TASKS),
    )


def shapes_naturalbench(
    per_kind: int = 20, *, seed: int = CHOICES_SEED, instruction: str = ""
) -> ChoiceBenchmark:
    """Groups of two near-same pictures and two questions, each answered yes of one picture alone.

    Questions of presence ("is there a red circle?") in pictures whose objects differ in colour or
    in shape.

    Args:
        per_kind: Number of groups for each of color and shape.
        seed: Seed of the scenes; choose settings on another seed than the one you report.
        instruction: Text that follows the question, on a line of its own; "" adds nothing.

    Raises:
        ConfigError: Fewer than one group.

    Examples:
        >>> group = shapes_naturalbench(1).items[:4]
        >>> [(item.text, item.options[item.answer]) for item in group[:2]]
        [('is there a purple square?', 'yes'), ('is there a purple square?', 'no')]
    """
    check_positive(per_kind=per_kind)
    items = []
    for index, pair in enumerate(mmvp_pairs(per_kind, seed=seed, patterns=("color", "shape"))):
        kinds = [{thing.kind: thing for thing in scene.objects} for scene in pair.scenes]
        for question, own in enumerate(kinds):
            other = kinds[1 - question]
            thing = next(thing for kind, thing in own.items() if kind not in other)
            text = f"is there {noun_phrase(shape=thing.shape, color=thing.color)}?"
            for image, scene in enumerate(pair.scenes):
                name = f"{index + 1}-q{question}-i{image}"
                items.append(
                    ChoiceItem(
                        id=name,
                        pictures=(
                            Picture(
                                f"picture {image} of group {index + 1}, naturalbench, seed {seed}",
                                render(scene),
                            ),
                        ),
                        question=text,
                        text=f"{text}\n{instruction}" if instruction else text,
                        options=("yes", "no"),
                        answer=int(image != question),
                        group=str(index + 1),
                        labels={
                            "question": str(question),
                            "image": str(image),
                            "type": "yes_no",
                            "pattern": pair.kind,
                        },
                    )
                )
    return ChoiceBenchmark(
        name="naturalbench",
        source=f"shapes, seed {seed}",
        items=tuple(items),
        score="groups",
    )


_Asked = tuple[list[Scene], str, list[str], str]
"""Scenes, question, options in order, right one."""


def _asked_of_both(pair: ContrastPair, rng: random.Random) -> tuple[Question, Question]:
    """A question of the pair's kind that fits both scenes and is answered differently."""
    for _ in range(_TRIES):
        seeds = rng.randrange(1 << 30), rng.randrange(1 << 30)
        by_text = [
            {q.text: q for q in questions(scene, seed=seed) if q.kind == pair.kind}
            for scene, seed in zip(pair.scenes, seeds, strict=True)
        ]
        for text in sorted(by_text[0].keys() & by_text[1].keys()):
            first, second = by_text[0][text], by_text[1][text]
            if first.answer != second.answer:
                return first, second
    raise ConfigError(
        f"a pair of pattern {pair.kind!r} has no question in common; take other seeds"
    )


def _one_question(rng: random.Random, kind: str) -> tuple[Scene, Question]:
    while True:
        scene = sample_scene(rng)
        candidates = [q for q in questions(scene, seed=rng.randrange(1 << 30)) if q.kind == kind]
        if candidates:
            return scene, rng.choice(candidates)


def _counting(rng: random.Random) -> _Asked:
    scene, question = _one_question(rng, "count")
    return [scene], question.text, list(question.choices), question.answer


def _spatial_relation(rng: random.Random) -> _Asked:
    scene, question = _one_question(rng, "relation")
    return [scene], question.text, ["yes", "no"], question.answer


def _change(rng: random.Random) -> _Asked:
    scene = sample_scene(rng)
    same = rng.random() < 0.5
    other = scene if same else perturb(scene, rng)
    question = "do both pictures show the same objects in the same places?"
    return [scene, other], question, ["yes", "no"], "yes" if same else "no"


def _similarity(rng: random.Random) -> _Asked:
    """One picture shows the first one's objects elsewhere, the other shows other objects."""
    first = sample_scene(rng)
    kinds = [thing.kind for thing in first.objects]
    moved = sample_scene(rng, kinds=kinds, sizes=[thing.size for thing in first.objects])
    other = sample_scene(rng)
    while sorted(thing.kind for thing in other.objects) == sorted(kinds):
        other = sample_scene(rng)
    shown = [replace(scene, background=first.background) for scene in (moved, other)]
    right = rng.randrange(2)
    if right:
        shown.reverse()
    question = "which picture shows the objects of the first picture?"
    options = ["the second picture", "the third picture"]
    return [first, *shown], question, options, options[right]


_TASKS: dict[str, Callable[[random.Random], _Asked]] = {
    "Counting": _counting,
    "Spatial_Relation": _spatial_relation,
    "Change": _change,
    "Visual_Similarity": _similarity,
}


def _item(
    name: str,
    scenes: list[Scene],
    question: str,
    options: list[str],
    answer: str,
    *,
    group: str,
    labels: dict[str, str],
    instruction: str,
    source: str,
) -> ChoiceItem:
    text = with_options(question, options)
    pictures = [
        Picture(f"picture {k} of {name}, {source}", render(scene))
        for k, scene in enumerate(scenes, start=1)
    ]
    return ChoiceItem(
        id=name,
        pictures=tuple(pictures),
        question=question,
        text=f"{text}\n{instruction}" if instruction else text,
        options=tuple(options),
        answer=options.index(answer),
        group=group,
        labels=labels,
    )
