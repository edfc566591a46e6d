"""Accuracy of answers against the number of tokens that a picture is given."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffenc.checks.arguments import whole
from diffenc.clip.tokens import ClipTokens
from diffenc.denoiser.grids import middle_grid
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import BackboneError
from diffenc.models.base import Backbone
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
from diffenc.studies.budget_costs import Cost, cost_of
from diffenc.studies.crowd_readers import CrowdQuestions, read_answers
from diffenc.studies.crowd_trials import (
    ANSWERS,
    CROWD_PROPERTIES,
    CrowdProperty,
    CrowdTrial,
    sample_crowd_trials,
)
from diffenc.studies.mistakes import Mistakes, count_mistakes
from diffenc.studies.probes import Done, Progress, held_in, numerics, side_of, with_seed
from diffenc.studies.spreads import Spread, mean_of, over_seeds
from diffenc.studies.token_readers import READERS, Reader
from diffenc.studies.trials import chance_of
from diffenc.studies.vlm.findings import limit_of

BASES = (Arm("cond", side=8), Arm("uncond", side=8))
"""What the few tokens of words are compared with: 64 cells, under the question and without text."""

MARGINS: dict[Reader, float] = {"told": -0.02, "blind": 0.10}
"""Least difference to the 64 cells that counts as "at least as good" for a reader that is told the
question, and as "far better" for one that is not."""

EXAMPLES = 20
_PROBED: dict[Family, Arm] = {
    "uncond": Arm("uncond", side=8),
    "cond": Arm("cond", side=8),
    "words": Arm("words", words=8),
    "grid+words": MOONSHOT,
    "mask": MASKS,
}
"""Arm of each family that its settings are chosen by."""
_FIXED: dict[Family, Half] = {"uncond": "uncond", "cond": "cond"}

Verdict = Literal["holds", "does not hold", "undecided"]
_Place = tuple[Arm, Reader]


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """Accuracy of one reader of one number of tokens.

    Attributes:
        arm: Kind and number of tokens.
        reader: Kind of reader: "told" knows the question, as a language model does; "blind" knows
            only which property is asked for, so the tokens must say which object is meant.
        accuracy: Accuracy for each property, 0 to 1, on scenes that nothing was fitted to.
        choice: Taps and features, chosen on validation scenes; None for CLIP.
        cost: Cost of one call; None for masks, which no call gives.
    """

    arm: Arm
    reader: Reader
    accuracy: dict[CrowdProperty, Spread]
    choice: Choice | None
    cost: Cost | None

    @property
    def mean(self) -> Spread:
        """Mean over properties, per seed."""
        return mean_of(list(self.accuracy.values()))


@dataclass(frozen=True, slots=True)
class Example:
    """A question that was measured with, and what was answered.

    Attributes:
        text: Text of the question.
        answer: Right answer.
        answers: Answers of each reader from the few tokens of words and from the 64 cells under
            the question, in this order.
    """

    text: str
    answer: str
    answers: dict[Reader, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class BudgetStudy:
    """Results of the study.

    Attributes:
        model: Name of the backbone.
        clip: Name of the CLIP model; None if none was used.
        taps: Places in the U-Net that could be chosen.
        rows: Accuracy of each arm and reader.
        words_kept: Share of questions whose nouns are among the sharpest words, by their number.
        mistakes: What wrong answers name, by arm and reader.
        examples: First questions of the first seed that were measured with.
        chance: Share of the most frequent answer among them, for each property, 0 to 1.
        missing: Reason why CLIP was not studied; "" if it was.
        settings: Settings of the run, such as numbers of scenes, seeds and epochs.
    """

    model: str
    clip: str | None
    taps: tuple[str, ...]
    rows: tuple[BudgetRow, ...]
    words_kept: dict[int, Spread]
    mistakes: tuple[Mistakes, ...]
    examples: tuple[Example, ...]
    chance: dict[CrowdProperty, float]
    missing: str
    settings: dict[str, Any]

    def find(self, arm: Arm, reader: Reader) -> BudgetRow | None:
        """Row of an arm and reader; None if there is none."""
        return next((row for row in self.rows if (row.arm, row.reader) == (arm, reader)), None)

    def curve(self, family: Family, reader: Reader) -> list[BudgetRow]:
        """Rows of a family, from few tokens to many."""
        rows = [row for row in self.rows if (row.arm.family, row.reader) == (family, reader)]
        return sorted(rows, key=lambda row: row.arm.tokens)

    def gain(self, base: Arm, reader: Reader) -> Spread:
        """Mean accuracy of the grid of 2 x 2 with eight words minus that of an arm, per seed."""
        over, under = self.find(MOONSHOT, reader), self.find(base, reader)
        assert over is not None
        assert under is not None
        return over.mean - under.mean

    def verdict(self, base: Arm, reader: Reader) -> Verdict:
        """Whether the gain is above its margin, by what the seeds' deviation allows."""
        return decide(self.gain(base, reader), MARGINS[reader])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them, with the comparisons."""
        comparisons = [
            {
                "base": asdict(base),
                "reader": reader,
                "values": self.gain(base, reader).values,
                "limit": limit_of(self.gain(base, reader)),
                "verdict": self.verdict(base, reader),
            }
            for reader in READERS
            for base in BASES
        ]
        return {**asdict(self), "comparisons": comparisons}


def decide(gain: Spread, margin: float) -> Verdict:
    """Whether a difference is above a margin.

    It holds where the mean exceeds the margin by more than `limit_of` allows, and does not hold
    where it is as far below the margin, or below 0 for a margin below that.

    Args:
        gain: Difference per seed.
        margin: Least difference that is claimed.
    """
    limit = limit_of(gain)
    if limit is None:
        return "undecided"
    if gain.mean - limit > margin:
        return "holds"
    return "does not hold" if gain.mean + limit < max(margin, 0.0) else "undecided"


def study_budget(
    model: "str | Backbone" = "shapes-many",
    *,
    clip: str | None = "shapes-clip",
    scenes: int = 240,
    validation: int = 120,
    seeds: int = 3,
    reader_epochs: int = 30,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> BudgetStudy:
    """Read answers about crowded scenes from few tokens and from many.

    Held-out scenes have five to nine objects. To each there are four questions, after colour,
    shape, position and relation, whose words fit one object only. Answers are read by
    `CrowdReader`, fitted anew to the tokens of every arm, once told the question and once told only
    which property it asks for. Which tap is read, whether features are taken without text or under
    the question, and whether one of the words' tokens is of the rest, is chosen for each family and
    reader on other scenes.

    Args:
        model: Alias, Hub id or folder of a diffusion model, or a loaded `Backbone`.
        clip: Name or folder of a CLIP model; None leaves it out, as does "shapes-clip" in a version
            that does not bundle it.
        scenes: Number of scenes per seed, 30 or more; two thirds to fit, the rest to test.
        validation: Number of scenes that settings are chosen on, 30 or more, split alike.
        seeds: Number of repetitions, each with other scenes, noise and order.
        reader_epochs: Number of epochs of the readers.
        batch_size: Number of scenes per call of the U-Net.
        device: Device that the model runs on; unused for a `Backbone`.
        dtype: Floating point type of the U-Net; unused for a `Backbone`.
        progress: Function that is called with the number of steps that are done and the number of
            all steps; None reports nothing.

    Raises:
        ConfigError: A number is too small.
        BackboneError: A model is unknown, missing or broken.

    Examples:
        >>> study = study_budget(scenes=60, validation=30, seeds=1)
        >>> gain = study.gain(Arm("cond", side=8), "told")
    """
    whole("scenes", scenes, least=30)
    whole("validation", validation, least=30)
    whole("seeds", seeds, least=1)
    whole("reader_epochs", reader_epochs, least=1)
    whole("batch_size", batch_size, least=1)
    encoder = (
        DiffusionEncoder(model)
        if isinstance(model, Backbone)
        else DiffusionEncoder.from_pretrained(model, device=device, dtype=dtype)
    )
    of_clip, missing = _clip(clip, device)
    rows = len(CROWD_PROPERTIES) + 1  # the half without text is read once
    done = Done(progress, 2 * rows * (validation + seeds * scenes))
    load = [_load()]
    choices = _choose(encoder, validation, epochs=reader_epochs, batch_size=batch_size, done=done)
    arms = list(_arms(encoder, choices, of_clip))
    accuracies: list[dict[_Place, dict[CrowdProperty, float]]] = []
    kept: list[dict[int, float]] = []
    chances: list[dict[CrowdProperty, float]] = []
    mistakes: list[tuple[Mistakes, ...]] = []
    examples: tuple[Example, ...] = ()
    for seed in range(seeds):
        trials = sample_crowd_trials(scenes, seed=seed)
        questions = CrowdQuestions.of(trials)
        split = len(CROWD_PROPERTIES) * held_in(scenes)
        tokens = CrowdTokens(
            with_seed(encoder, seed),
            trials,
            sides=sorted({arm.side for arm, _ in arms} - {0}),
            batch_size=batch_size,
            clip=of_clip,
            done=done.add,
        )
        answers: dict[_Place, Tensor] = {}
        for (arm, reader), steps in zip(arms, _portions(rows * scenes, len(arms)), strict=True):
            rows_of_arm = tokens.rows(arm, choices.get((arm.family, reader), _NO_CHOICE))
            answers[arm, reader] = read_answers(
                rows_of_arm,
                questions,
                reader,
                groups=groups_of(rows_of_arm),
                split=split,
                epochs=reader_epochs,
                seed=seed,
            )
            done.add(steps)
        accuracies.append(
            {place: _accuracy(each, questions, split) for place, each in answers.items()}
        )
        kept.append(tokens.words_kept)
        chances.append(_chances(trials[held_in(scenes) :]))
        mistakes.append(
            tuple(
                count_mistakes(
                    arm, reader, trials[held_in(scenes) :], _labels(answers[arm, reader])
                )
                for reader in READERS
                for arm in (MOONSHOT, *BASES)
            )
        )
        examples = examples or _examples(answers, questions, split)
        encoder.clear_cache()
    costs = _costs(encoder, arms, choices, of_clip)
    load.append(_load())
    return BudgetStudy(
        model=encoder.backbone.name,
        clip=clip if of_clip is not None else None,
        taps=tuple(tap.name for tap in encoder.feature_info),
        rows=tuple(
            BudgetRow(
                arm,
                reader,
                over_seeds([each[arm, reader] for each in accuracies]),
                choices.get((arm.family, reader)),
                costs[arm, reader],
            )
            for arm, reader in arms
        ),
        words_kept=over_seeds(kept),
        mistakes=tuple(sum(each[1:], each[0]) for each in zip(*mistakes, strict=True)),
        examples=examples,
        chance={name: each.mean for name, each in over_seeds(chances).items()},
        missing=missing,
        settings={
            "scenes": scenes,
            "validation": validation,
            "seeds": seeds,
            "reader_epochs": reader_epochs,
            "timestep": encoder.config.timestep,
            "dtype": numerics(encoder)["dtype"],
            "threads": torch.get_num_threads(),
            "load": load,
        },
    )


_NO_CHOICE = Choice(())


def _choose(
    encoder: DiffusionEncoder, scenes: int, *, epochs: int, batch_size: int, done: Done
) -> dict[tuple[Family, Reader], Choice]:
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
    tries = [
        (family, reader, [Choice(taps, half) for taps in sets for half in _halves(family)])
        for family in _PROBED
        for reader in READERS
    ]
    fits = sum(len(choices) for _, _, choices in tries) + 2 * len(READERS)
    portions = iter(_portions((len(CROWD_PROPERTIES) + 1) * scenes, fits))

    def accuracy(family: Family, reader: Reader, choice: Choice) -> float:
        rows = tokens.rows(_PROBED[family], choice)
        labels = read_answers(
            rows, questions, reader, groups=groups_of(rows), split=split, epochs=epochs, seed=0
        )
        done.add(next(portions))
        shares = _accuracy(labels, questions, split)
        return sum(shares.values()) / len(shares)

    chosen: dict[tuple[Family, Reader], Choice] = {}
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


def _arms(
    encoder: DiffusionEncoder,
    choices: dict[tuple[Family, Reader], Choice],
    clip: ClipTokens | None,
) -> Iterator[_Place]:
    """Arms and readers, in the order of the tables."""
    grids = _grids(encoder)
    for reader in READERS:
        for family in FAMILIES:
            match family:
                case "uncond" | "cond":
                    taps = choices[family, reader].taps
                    finest = min(middle_grid([grids[tap] for tap in taps])[0], MOST_SIDE)
                    for side in sorted({*SIDES, max(finest, SIDES[-1])}):
                        yield Arm(family, side=side), reader
                case "words":
                    for count in WORD_COUNTS:
                        yield Arm(family, words=count), reader
                case "grid+words":
                    yield MOONSHOT, reader
                case "mask":
                    yield MASKS, reader
                case "clip":
                    for side in SIDES if clip is not None else ():
                        if side <= clip.side:
                            yield Arm(family, side=side), reader


def _grids(encoder: DiffusionEncoder) -> dict[str, tuple[int, int]]:
    """(height, width) of each tap's map."""
    scene = sample_crowd_trials(1, seed=0, validation=True)[0].scene
    with torch.no_grad():
        features = encoder.extract(render(scene, side_of(encoder)), conditioning="uncond")
    return {tap: (maps.shape[-2], maps.shape[-1]) for tap, maps in features.items()}


def _accuracy(answers: Tensor, questions: CrowdQuestions, split: int) -> dict[CrowdProperty, float]:
    right = (answers == questions.labels[split:]).double().view(-1, len(CROWD_PROPERTIES))
    return dict(zip(CROWD_PROPERTIES, right.mean(dim=0).tolist(), strict=True))


def _labels(answers: Tensor) -> list[int]:
    """Answers counted within their property, row by row."""
    first = [0]
    for name in CROWD_PROPERTIES[:-1]:
        first.append(first[-1] + len(ANSWERS[name]))
    return [answer - first[row % len(first)] for row, answer in enumerate(answers.tolist())]


def _chances(trials: Sequence[CrowdTrial]) -> dict[CrowdProperty, float]:
    labels = zip(*([each.label for each in trial.questions] for trial in trials), strict=True)
    return {name: chance_of(each) for name, each in zip(CROWD_PROPERTIES, labels, strict=True)}


def _examples(
    answers: dict[_Place, Tensor], questions: CrowdQuestions, split: int
) -> tuple[Example, ...]:
    labels = {
        reader: [_labels(answers[arm, reader]) for arm in (MOONSHOT, BASES[0])]
        for reader in READERS
    }
    examples = []
    for row, question in enumerate(questions.questions[split : split + EXAMPLES]):
        names = ANSWERS[question.asks]
        said = {
            reader: (names[few[row]], names[many[row]]) for reader, (few, many) in labels.items()
        }
        examples.append(Example(question.text, question.answer, said))
    return tuple(examples)


def _costs(
    encoder: DiffusionEncoder,
    arms: Sequence[_Place],
    choices: dict[tuple[Family, Reader], Choice],
    clip: ClipTokens | None,
) -> dict[_Place, Cost | None]:
    trial = sample_crowd_trials(1, seed=0, validation=True)[0]
    image, text = render(trial.scene, side_of(encoder)), trial.questions[-1].text
    measured: dict[tuple[Arm, Choice | None], Cost] = {}
    costs: dict[_Place, Cost | None] = {}
    for arm, reader in arms:
        choice = choices.get((arm.family, reader))
        if arm.family != "mask" and (arm, choice) not in measured:
            cost = cost_of(encoder, arm, choice, image=image, text=text, clip=clip)
            measured[arm, choice] = cost
        costs[arm, reader] = measured.get((arm, choice))
    return costs


def _clip(name: str | None, device: str | torch.device) -> tuple[ClipTokens | None, str]:
    """CLIP, or the reason why there is none."""
    if name is None:
        return None, "no CLIP was asked for"
    try:
        return ClipTokens.from_pretrained(name, device=device), ""
    except BackboneError as error:
        if name != "shapes-clip":
            raise
        return None, str(error)


def _portions(total: int, count: int) -> list[int]:
    """Whole numbers that add up to a total, as even as they can be."""
    return [total * (k + 1) // count - total * k // count for k in range(count)]


def _load() -> float | None:
    """Mean number of running processes of the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
