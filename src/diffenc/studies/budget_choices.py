"""Settings of the study of the budget, chosen on validation scenes, and the arms that follow."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from diffenc.clip.tokens import ClipTokens
from diffenc.denoiser.grids import middle_grid
from diffenc.encoder import DiffusionEncoder
from diffenc.shapes.render import render
from diffenc.studies.budget_arms import (
    FAMILIES,
    HALVES,
    MASKS,
    MOONSHOT,
    MOST_SIDE,
    SIDES,
    WORD_COUNTS,
    Arm,
    Choice,
    CrowdTokens,
    Family,
    Half,
    groups_of,
)
from diffenc.studies.crowd_readers import CrowdQuestions, read_answers
from diffenc.studies.crowd_trials import CROWD_PROPERTIES, CrowdProperty, sample_crowd_trials
from diffenc.studies.probes import Done, held_in, side_of
from diffenc.studies.token_readers import READERS, Reader

Place: TypeAlias = tuple[Arm, Reader]
Choices: TypeAlias = dict[tuple[Family, Reader], Choice]

_PROBED: dict[Family, Arm] = {
    "uncond": Arm("uncond", side=8),
    "cond": Arm("cond", side=8),
    "words": Arm("words", words=8),
    "grid+words": MOONSHOT,
    "mask": MASKS,
}
"""Arm of each family that its settings are chosen by."""
_FIXED: dict[Family, Half] = {"uncond": "uncond", "cond": "cond"}


def choose_settings(
    encoder: DiffusionEncoder, scenes: int, *, epochs: int, batch_size: int, done: Done
) -> Choices:
    """Settings of each family for each reader, by the accuracy on validation scenes."""
    trials = sample_crowd_trials(scenes, seed=0, validation=True)
    questions = CrowdQuestions.of(trials)
    split = len(CROWD_PROPERTIES) * held_in(scenes)
    tokens = CrowdTokens(
        encoder,
        trials,
        sides=sorted({arm.side for arm in _PROBED.values()} - {0}),
        batch_size=batch_size,
        clip=None,
        done=done.add,
    )
    names = tuple(tap.name for tap in encoder.feature_info)
    sets = [names, *((name,) for name in names if len(names) > 1)]
    grids = _grids(encoder)
    tries = [
        (
            family,
            reader,
            [
                Choice(taps, half)
                for taps in sets
                if taps == names or _PROBED[family].side <= _side(grids, taps)
                for half in _halves(family)
            ],
        )
        for family in _PROBED
        for reader in READERS
    ]
    fits = sum(len(choices) for _, _, choices in tries) + 2 * len(READERS)
    steps = iter(portions((len(CROWD_PROPERTIES) + 1) * scenes, fits))

    def accuracy(family: Family, reader: Reader, choice: Choice) -> float:
        rows = tokens.rows(_PROBED[family], choice)
        labels = read_answers(
            rows, questions, reader, groups=groups_of(rows), split=split, epochs=epochs, seed=0
        )
        done.add(next(steps))
        shares = shares_right(labels, questions, split)
        return sum(shares.values()) / len(shares)

    chosen: Choices = {}
    for family, reader, choices in tries:
        shares = [accuracy(family, reader, choice) for choice in choices]
        best = max(shares)
        choice = choices[shares.index(best)]
        if _PROBED[family].words and family != "mask":
            with_rest = replace(choice, rest=True)
            choice = with_rest if accuracy(family, reader, with_rest) > best else choice
        chosen[family, reader] = choice
    encoder.clear_cache()
    return chosen


def _halves(family: Family) -> Sequence[Half]:
    return (_FIXED[family],) if family in _FIXED else HALVES


def arms_of(
    encoder: DiffusionEncoder,
    choices: Choices,
    clip: ClipTokens | None,
) -> Iterator[Place]:
    """Arms and readers, in the order of the tables."""
    grids = _grids(encoder)
    for reader in READERS:
        for family in FAMILIES:
            match family:
                case "uncond" | "cond":
                    taps = choices[family, reader].taps
                    finest = min(_side(grids, taps), MOST_SIDE)
                    for side in sorted({*SIDES, max(finest, SIDES[-1])}):
                        yield Arm(family, side=side), reader
                case "words":
                    for count in WORD_COUNTS:
                        yield Arm(family, words=count), reader
                case "grid+words":
                    yield MOONSHOT, reader
                case "mask":
                    yield MASKS, reader
                case "clip" if clip is not None:
                    for side in SIDES:
                        if side <= clip.side:
                            yield Arm(family, side=side), reader


def _side(grids: Mapping[str, tuple[int, int]], taps: Sequence[str]) -> int:
    """Side of the grid that an encoder with these taps hands on, where nothing else is said."""
    return middle_grid([grids[tap] for tap in taps])[0]


def _grids(encoder: DiffusionEncoder) -> dict[str, tuple[int, int]]:
    """(height, width) of each tap's map."""
    scene = sample_crowd_trials(1, seed=0, validation=True)[0].scene
    with torch.no_grad():
        features = encoder.extract(render(scene, side_of(encoder)), conditioning="uncond")
    return {tap: (maps.shape[-2], maps.shape[-1]) for tap, maps in features.items()}


def shares_right(
    answers: Tensor, questions: CrowdQuestions, split: int
) -> dict[CrowdProperty, float]:
    """Share of right answers to the questions from row `split` on, by property."""
    right = (answers == questions.labels[split:]).double().view(-1, len(CROWD_PROPERTIES))
    return dict(zip(CROWD_PROPERTIES, right.mean(dim=0).tolist(), strict=True))


def portions(total: int, count: int) -> list[int]:
    """Whole numbers that add up to a total, as even as they can be."""
    return [total * (k + 1) // count - total * k // count for k in range(count)]
