"""Plan of a study: trainings, measurements and claims, checked before anything runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from diffenc.config import check_choice
from diffenc.errors import ConfigError, near_matches
from diffenc.evals.paper import published_tables
from diffenc.studies.vlm.claims import Key
from diffenc.studies.vlm.findings import Finding
from diffenc.studies.vlm.prompting import parse_prompting
from diffenc.studies.vlm.trainings import Shared, Training, check_config

FIGURES: Mapping[str, tuple[str, ...]] = {
    "captions": ("named", "objects", "right", "relations", "cider", "unread"),
    "leakage": ("read", "said", "base", "named", "right", "cider", "unread"),
    "answers": (
        *("all", "color", "shape", "size", "count", "position", "presence", "relation"),
        *("guess", "unread"),
    ),
    "mmvp": ("pairs", "questions", "chance", "unread"),
}
"""Names of the figures that each kind of measurement gives; in percent, except "cider"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyData:
    """The pictures of a study.

    Attributes:
        scenes: Number of scenes of coloured shapes to train on.
        seed: Seed of these scenes, 0 to 899,999; held-out scenes have seeds of their own.
        turns: Largest number of questions in a conversation.
    """

    scenes: int = 1000
    seed: int = 0
    turns: int = 3

    def __post_init__(self) -> None:
        if self.scenes < 1 or self.turns < 1:
            raise ConfigError("data.scenes and data.turns must be 1 or more")
        if not 0 <= self.seed < 900_000:
            raise ConfigError(
                f"data.seed must be 0 to 899999, got {self.seed}; from 900000 on scenes are held "
                "out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Measurement of trained models.

    Attributes:
        name: Name of the measurement in the plan.
        kind: Kind of measurement: "captions", "leakage", "answers" or "mmvp"; `FIGURES` says what
            each gives.
        label: Name of the measurement in tables.
        of: Names of the trainings that are measured; () is all of them.
        prompts: Prompt of the encoder: "none", "oracle" (a true caption), "question", "by NAME"
            (what the training of that name says of the picture), or two with a "+".
        items: Number of held-out scenes per seed, 3 or more; for "mmvp", of pairs per pattern.
        passes: Number of passes over the pictures, for "captions" alone; from the second on, the
            caption of the pass before is the prompt.
        options: Options of the encoder that differ from those of training.
    """

    name: str
    kind: str
    label: str = ""
    of: tuple[str, ...] = ()
    prompts: str = "none"
    items: int = 100
    passes: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"measure.{self.name}"
        check_choice(f"{where}.kind", self.kind, list(FIGURES))
        for name in ("items", "passes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{where}.{name} must be an int of 1 or more, got {value!r}")
        if self.items < 3:
            raise ConfigError(f"{where}.items must be 3 or more, got {self.items}")
        if self.passes > 1 and self.kind != "captions":
            raise ConfigError(f'{where}.passes is for kind = "captions"')
        if self.kind == "leakage" and self.prompts != "none":
            raise ConfigError(f"{where}.prompts: leakage has prompts of its own; leave them out")
        wanted = parse_prompting(self.prompts, where)
        if wanted.question and self.kind == "captions":
            raise ConfigError(f'{where}.prompts: captions are asked for without a "question"')
        if wanted.oracle and self.kind == "mmvp":
            raise ConfigError(f'{where}.prompts: mmvp has no caption for "oracle"')
        if self.passes > 1 and wanted.question:
            raise ConfigError(f"{where}.passes needs prompts without a question")

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of what it gives: with several passes, also ``"named.1"`` of each of them."""
        own = FIGURES[self.kind]
        if self.passes == 1:
            return own
        return (*own, *(f"{name}.{k}" for name in own for k in range(1, self.passes + 1)))

    @property
    def writer(self) -> str | None:
        """The training that writes captions for its prompts."""
        return parse_prompting(self.prompts).writer

    def measures(self, training: str) -> bool:
        """Whether a training is measured."""
        return not self.of or training in self.of


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlan:
    """A whole study.

    Attributes:
        name: Name of the study and of its files.
        title: Title of the study, in a few words.
        about: Question and method of the study, in a paragraph.
        paper: Names of the paper's tables that are shown beside the results.
        seeds: Number of repetitions.
        data: Pictures that the study trains on.
        shared: Settings that all trainings have in common.
        trainings: Trainings by name, each after those it starts from.
        measurements: Measurements by name.
        findings: Findings of the paper that the study tests.
        plots: Names of the figures to draw, each as ``"measurement kind/figure"``.
    """

    name: str
    title: str
    about: str
    trainings: Mapping[str, Training]
    measurements: Mapping[str, Measurement]
    findings: tuple[Finding, ...] = ()
    paper: tuple[str, ...] = ()
    seeds: int = 3
    data: StudyData = field(default_factory=StudyData)
    shared: Shared = field(default_factory=Shared)
    plots: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.seeds, bool) or not isinstance(self.seeds, int) or self.seeds < 1:
            raise ConfigError(f"seeds must be an int of 1 or more, got {self.seeds!r}")
        _check(self)

    def pairs(self) -> list[tuple[Training, Measurement]]:
        """Pairs of a training and a measurement of it, by training."""
        return [
            (training, measurement)
            for training in self.trainings.values()
            for measurement in self.measurements.values()
            if measurement.measures(training.name)
        ]

    def ancestors(self, name: str) -> list[str]:
        """A training and those it starts from, the first one first."""
        start = self.trainings[name].start
        return [*(self.ancestors(start) if start else ()), name]

    def with_options(
        self,
        *,
        seeds: int | None = None,
        language_model: str | None = None,
        clip: str | None = None,
    ) -> "StudyPlan":
        """The same study with other repetitions or models.

        Args:
            seeds: Number of repetitions; None keeps the plan's.
            language_model: Name or folder of the language model; None keeps the plan's.
            clip: Name or folder of a CLIP model that replaces "shapes-clip" in all trainings; None
                keeps it.
        """
        shared, trainings = self.shared, dict(self.trainings)
        if language_model is not None:
            model = {**shared.model, "language_model": language_model}
            shared = replace(shared, model=model)
        if clip is not None:
            trainings = {name: each.with_clip(clip) for name, each in trainings.items()}
            shared = shared.with_clip(clip)
        return replace(
            self,
            seeds=self.seeds if seeds is None else seeds,
            shared=shared,
            trainings=trainings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    def quick(self) -> "StudyPlan":
        """A tiny one that shows that everything runs, and no more."""
        data = replace(self.data, scenes=min(self.data.scenes, 32))
        measurements = {
            name: replace(each, items=3 if each.kind == "mmvp" else min(each.items, 8))
            for name, each in self.measurements.items()
        }
        return replace(
            self, seeds=1, data=data, shared=self.shared.quick(), measurements=measurements
        )


def _check(plan: StudyPlan) -> None:
    """Check across tables that all names exist and all configs are valid."""
    if not plan.trainings or not plan.measurements:
        raise ConfigError("a study needs one training and one measurement or more")
    for name in plan.paper:
        check_choice("paper", name, published_tables())
    _check_trainings(plan)
    _check_measurements(plan)
    for finding in plan.findings:
        for claim in finding.claims:
            for key in claim.keys:
                _check_key(plan, key, claim.text)
    kinds = sorted({each.kind for each in plan.measurements.values()})
    drawn = [f"{kind}/{figure}" for kind in kinds for figure in FIGURES[kind]]
    if wrong := [plot for plot in plan.plots if plot not in drawn]:
        raise ConfigError(
            f"plots: {wrong[0]!r} is not measured; known are {', '.join(drawn)}."
            f"{near_matches(wrong[0], drawn)}"
        )


def _check_trainings(plan: StudyPlan) -> None:
    seen: list[str] = []
    for training in plan.trainings.values():
        if training.start and training.start not in seen:
            known = f"those before it are {seen}" if seen else "there is none before it"
            raise ConfigError(
                f"train.{training.name}.start must name a training before it, got "
                f"{training.start!r}; {known}.{near_matches(training.start, seen)}"
            )
        seen.append(training.name)
        check_config(plan.trainings, plan.shared, training.name)


def _check_measurements(plan: StudyPlan) -> None:
    known = list(plan.trainings)
    for measurement in plan.measurements.values():
        for name in (*measurement.of, *filter(None, [measurement.writer])):
            if name not in known:
                raise ConfigError(
                    f"measure.{measurement.name} names the training {name!r}; known are "
                    f"{known}.{near_matches(name, known)}"
                )
        for name in known:
            if measurement.options and measurement.measures(name):
                check_config(plan.trainings, plan.shared, name, options=measurement.options)


def _check_key(plan: StudyPlan, key: Key, where: str) -> None:
    training, name, figure = key
    if training not in plan.trainings:
        known = list(plan.trainings)
        raise ConfigError(
            f"{where!r}: no training {training!r}; known are {known}."
            f"{near_matches(training, known)}"
        )
    measurement = plan.measurements.get(name)
    if measurement is None or not measurement.measures(training):
        known = [each.name for each in plan.measurements.values() if each.measures(training)]
        raise ConfigError(
            f"{where!r}: {name!r} is not measured of {training!r}; measured are {known}."
            f"{near_matches(name, known)}"
        )
    if figure not in measurement.figures:
        raise ConfigError(
            f"{where!r}: {name!r} gives no {figure!r}; it gives {list(measurement.figures)}."
            f"{near_matches(figure, measurement.figures)}"
        )
