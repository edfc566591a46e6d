"""Plan of a study: trainings, measurements and claims, checked before anything runs."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diffenc.checks.arguments import flag, whole
from diffenc.config import check_choice
from diffenc.errors import ConfigError
from diffenc.evals.paper import published_tables
from diffenc.mixing.config import MIXED
from diffenc.mllm.training.config import TrainConfig
from diffenc.storage.pretrained import BUNDLED_CLIPS
from diffenc.storage.schema import checked
from diffenc.studies.vlm.findings import Finding, Key
from diffenc.studies.vlm.measurements import FIGURES, NEAR_SAME, Measurement
from diffenc.studies.vlm.trainings import LEARNS, Shared, Training

_ANY = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyData:
    """The pictures of a study.

    Attributes:
        scenes: Number of scenes of coloured shapes to train on.
        seed: Seed of these scenes, 0 to 899,999; held-out scenes have seeds of their own.
        turns: Largest number of questions in a conversation.
        lettered: Number of further questions that list options and are answered by a letter.
        crowds: Whether scenes have five to nine objects, at 96 pixels.
    """

    scenes: int = 1000
    seed: int = 0
    turns: int = 3
    lettered: int = 2
    crowds: bool = False

    def __post_init__(self) -> None:
        whole("data.scenes", self.scenes, least=1)
        whole("data.turns", self.turns, least=1)
        whole("data.lettered", self.lettered, least=0)
        flag("data.crowds", self.crowds)
        if not 0 <= self.seed < 900_000:
            raise ConfigError(
                f"data.seed must be 0 to 899999, got {self.seed}; from 900000 on scenes are held "
                "out"
            )


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
        whole("seeds", self.seeds, least=1)
        _check(self)

    def pairs(self, missing: Collection[str] = ()) -> list[tuple[Training, Measurement]]:
        """Pairs of a training and a measurement of it, by training.

        Args:
            missing: Names of trainings that are left out, with the measurements that need them.
        """
        return [
            (training, measurement)
            for training in self.trainings.values()
            for measurement in self.measurements.values()
            if measurement.measures(training.name)
            and training.name not in missing
            and measurement.writer not in missing
        ]

    def ancestors(self, name: str) -> list[str]:
        """A training and those it starts from, the first one first."""
        start = self.trainings[name].start
        return [*(self.ancestors(start) if start else ()), name]

    def model(self, name: str) -> dict[str, Any]:
        """The table ``[model]`` of a training, with what it takes over from where it starts."""
        training = self.trainings[name]
        base = self.model(training.start) if training.start else self.shared.model
        model = {**base, **training.model}
        inherited = _options(base, "model")
        if model.get("kind") == "vision":  # it has no U-Net that options could be for
            inherited = {}
        own = _options(training.model, f"train.{name}.model")
        return {**model, "options": {**inherited, **own, **training.options}}

    def config(
        self,
        name: str,
        *,
        files: "Mapping[str, str | Path] | None" = None,
        output: "str | Path" = _ANY,
        seed: int = 0,
        start: "str | Path" = _ANY,
        cache_dir: "str | Path" = "",
        options: Mapping[str, Any] | None = None,
    ) -> TrainConfig:
        """Configuration of a training for `diffenc.mllm.training`.

        Args:
            name: Name of the training to configure.
            files: File with captions, under "align", files with conversations, under "instruct" and
                "asked", and folder of the pictures, under "images"; None shows whether a config can
                be made.
            output: Folder of the run.
            seed: Seed of the run.
            start: Folder of the model that the training starts from, if it starts from one.
            cache_dir: Folder that caches the tokens of frozen encoders.
            options: Further options of the encoder; None adds none.

        Raises:
            ConfigError: A key or a value is not allowed.
        """
        files = files or dict.fromkeys((*LEARNS, "images"), _ANY)
        training, model = self.trainings[name], self.model(name)
        model["options"] = {**model["options"], **(options or {})}
        if training.start:
            model = {key: value for key, value in model.items() if key != "language_model"}
            model["start"] = str(start)
        stage = self.shared.align if training.stage == "align" else self.shared.instruct
        adapt = {} if training.stage == "align" else self.shared.adapt
        adapt = {**adapt, **training.adapt}
        mixes = model.get("kind") == "fused" and model.get("how") in MIXED
        learns = bool(mixes or model.get("captioner") or adapt.get("unet_rank"))
        tables: dict[str, Any] = {
            "stage": training.stage,
            "output": str(output),
            "seed": seed,
            "save_steps": 50,
            "keep": 1,
            "model": model,
            "data": {
                "annotations": str(files[training.learns_from]),
                "images": str(files["images"]),
                "prompts": training.prompts,
                "cache": "off" if learns else "on",
                "cache_dir": str(cache_dir),
            },
            "optim": {**stage, **training.optim},
        }
        if adapt:
            tables["adapt"] = adapt
        try:
            return TrainConfig.from_dict(tables)
        except ConfigError as error:
            raise ConfigError(f"train.{name}: {error}") from error

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
            clip: Name or folder of a CLIP model that replaces the bundled one in all trainings;
                None keeps it.
        """
        shared, trainings = self.shared, dict(self.trainings)
        if language_model is not None:
            shared = replace(shared, model={**shared.model, "language_model": language_model})
        if clip is not None:
            shared = replace(shared, model=_with_clip(shared.model, clip))
            for name, each in trainings.items():
                trainings[name] = replace(each, model=_with_clip(each.model, clip))
        seeds = self.seeds if seeds is None else seeds
        return replace(self, seeds=seeds, shared=shared, trainings=trainings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    def quick(self) -> "StudyPlan":
        """A tiny one that shows that everything runs, and no more."""
        data = replace(self.data, scenes=min(self.data.scenes, 32))
        align, instruct = (
            {**each, "epochs": 1} for each in (self.shared.align, self.shared.instruct)
        )
        shared = replace(self.shared, align=align, instruct=instruct)
        measurements = {
            name: replace(each, items=3 if each.kind in NEAR_SAME else min(each.items, 8))
            for name, each in self.measurements.items()
        }
        return replace(self, seeds=1, data=data, shared=shared, measurements=measurements)


def _with_clip(model: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: name if value in BUNDLED_CLIPS else value for key, value in model.items()}


def _options(model: Mapping[str, Any], where: str) -> dict[str, Any]:
    options: dict[str, Any] = checked(
        model.get("options", {}), Mapping[str, Any], f"{where}.options"
    )
    return options


def _check(plan: StudyPlan) -> None:
    """Check across tables that all names exist and all configs are valid."""
    if not plan.trainings or not plan.measurements:
        raise ConfigError("a study needs one training and one measurement or more")
    for name in plan.paper:
        check_choice("paper", name, published_tables())
    before: list[str] = []
    for training in plan.trainings.values():
        if training.start:
            check_choice(
                f"train.{training.name}.start: a training before it", training.start, before
            )
        before.append(training.name)
        plan.config(training.name)
    for measurement in plan.measurements.values():
        for name in (*measurement.of, *filter(None, [measurement.writer])):
            check_choice(f"measure.{measurement.name}: a training", name, before)
        for name in filter(measurement.measures, before if measurement.options else ()):
            plan.config(name, options=measurement.options)
    for finding in plan.findings:
        for claim in finding.claims:
            for key in claim.keys:
                _check_key(plan, key, claim.text)
    kinds = sorted({each.kind for each in plan.measurements.values()})
    for plot in plan.plots:
        check_choice("plots", plot, [f"{kind}/{name}" for kind in kinds for name in FIGURES[kind]])


def _check_key(plan: StudyPlan, key: Key, claim: str) -> None:
    training, name, figure = key
    check_choice(f"{claim!r}: a training", training, list(plan.trainings))
    measured = {each.name: each for each in plan.measurements.values() if each.measures(training)}
    check_choice(f"{claim!r}: a measurement of {training!r}", name, list(measured))
    check_choice(f"{claim!r}: a figure of {name!r}", figure, measured[name].figures)
