"""Accuracy of answers against the number of tokens that a picture is given."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffenc.checks.arguments import whole
from diffenc.clip.tokens import ClipTokens
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import BackboneError
from diffenc.models.base import Backbone
from diffenc.shapes.render import render
from diffenc.storage.pretrained import BUNDLED_CLIPS
from diffenc.studies.budget_arms import (
    MOONSHOT,
    Arm,
    Choice,
    Family,
)
from diffenc.studies.budget_choices import (
    Choices,
    Place,
    arms_of,
    choose_settings,
    portions,
)
from diffenc.studies.budget_costs import Cost, cost_of
from diffenc.studies.budget_run import BASES, BudgetRun
from diffenc.studies.crowd_trials import (
    ANSWERS,
    CROWD_PROPERTIES,
    CrowdProperty,
    CrowdTrial,
    sample_crowd_trials,
)
from diffenc.studies.mistakes import Mistakes, count_mistakes
from diffenc.studies.probes import Done, Progress, numerics, side_of
from diffenc.studies.spreads import Spread, mean_of, over_seeds
from diffenc.studies.token_readers import READERS, Reader
from diffenc.studies.trials import chance_of
from diffenc.studies.vlm.findings import limit_of

MARGINS: dict[Reader, float] = {"told": -0.02, "blind": 0.10}
"""Least difference to the 64 cells that counts as "at least as good" for a reader that is told the
question, and as "far better" for one that is not."""

EXAMPLES = 20

Verdict = Literal["holds", "does not hold", "undecided"]


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
class Growth:
    """Accuracy of a reader that is fitted to some of the scenes.

    Attributes:
        arm: Kind and number of tokens.
        reader: Kind of reader.
        scenes: Number of scenes that are fitted to.
        accuracy: Mean accuracy over properties, on the scenes that all readers are measured on.
    """

    arm: Arm
    reader: Reader
    scenes: int
    accuracy: Spread


@dataclass(frozen=True, slots=True)
class BudgetStudy:
    """Results of the study.

    Attributes:
        model: Name of the backbone.
        clip: Name of the CLIP model; None if none was used.
        taps: Places in the U-Net that could be chosen.
        rows: Accuracy of each arm and reader.
        growth: Accuracy of the arms that are compared, from few scenes to fit to all of them.
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
    growth: tuple[Growth, ...]
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
    clip: str | None = "shapes-many-clip",
    scenes: int = 240,
    validation: int = 240,
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
        clip: Name or folder of a CLIP model; None leaves it out, as does a bundled one in a version
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
    choices = choose_settings(
        encoder, validation, epochs=reader_epochs, batch_size=batch_size, done=done
    )
    arms = list(arms_of(encoder, choices, of_clip))
    accuracies: list[dict[Place, dict[CrowdProperty, float]]] = []
    grown: list[dict[tuple[Arm, Reader, int], float]] = []
    kept: list[dict[int, float]] = []
    chances: list[dict[CrowdProperty, float]] = []
    mistakes: list[tuple[Mistakes, ...]] = []
    examples: tuple[Example, ...] = ()
    for seed in range(seeds):
        run = BudgetRun(
            encoder,
            sample_crowd_trials(scenes, seed=seed),
            choices,
            sides=sorted({arm.side for arm, _ in arms} - {0}),
            seed=seed,
            epochs=reader_epochs,
            batch_size=batch_size,
            clip=of_clip,
            done=done.add,
        )
        for (arm, reader), steps in zip(arms, portions(rows * scenes, len(arms)), strict=True):
            run.read(arm, reader)
            done.add(steps)
        accuracies.append(run.accuracies())
        grown.append(run.growth())
        kept.append(run.tokens.words_kept)
        chances.append(_chances(run.tested))
        mistakes.append(
            tuple(
                count_mistakes(arm, reader, run.tested, _labels(run.answers[arm, reader]))
                for reader in READERS
                for arm in (MOONSHOT, *BASES)
            )
        )
        examples = examples or _examples(run)
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
        growth=tuple(Growth(*place, each) for place, each in over_seeds(grown).items()),
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


def _labels(answers: Tensor) -> list[int]:
    """Answers counted within their property, row by row."""
    first = [0]
    for name in CROWD_PROPERTIES[:-1]:
        first.append(first[-1] + len(ANSWERS[name]))
    return [answer - first[row % len(first)] for row, answer in enumerate(answers.tolist())]


def _chances(trials: Sequence[CrowdTrial]) -> dict[CrowdProperty, float]:
    labels = zip(*([each.label for each in trial.questions] for trial in trials), strict=True)
    return {name: chance_of(each) for name, each in zip(CROWD_PROPERTIES, labels, strict=True)}


def _examples(run: BudgetRun) -> tuple[Example, ...]:
    labels = {
        reader: [_labels(run.answers[arm, reader]) for arm in (MOONSHOT, BASES[0])]
        for reader in READERS
    }
    examples = []
    for row, question in enumerate(run.questions.questions[run.split : run.split + EXAMPLES]):
        names = ANSWERS[question.asks]
        said = {
            reader: (names[few[row]], names[many[row]]) for reader, (few, many) in labels.items()
        }
        examples.append(Example(question.text, question.answer, said))
    return tuple(examples)


def _costs(
    encoder: DiffusionEncoder,
    arms: Sequence[Place],
    choices: Choices,
    clip: ClipTokens | None,
) -> dict[Place, Cost | None]:
    trial = sample_crowd_trials(1, seed=0, validation=True)[0]
    image, text = render(trial.scene, side_of(encoder)), trial.questions[-1].text
    measured: dict[tuple[Arm, Choice | None], Cost] = {}
    costs: dict[Place, Cost | None] = {}
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
        if name not in BUNDLED_CLIPS:
            raise
        return None, str(error)


def _load() -> float | None:
    """Mean number of running processes of the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
