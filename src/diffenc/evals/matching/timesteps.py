"""Which noise levels match images and texts best: single timesteps beside their mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffenc.errors import ConfigError
from diffenc.evals.matching.evaluate import Evaluation, results_of
from diffenc.evals.matching.metrics import CHANCE, METRICS, Metric, Results, by_label, correct
from diffenc.evals.paper import published_table
from diffenc.evals.results import percent
from diffenc.evals.tables import Table

ENSEMBLE = (189, 389, 589, 789, 989)
GRID = (89, 189, 289, 389, 489, 589, 689, 789, 889, 989)
"""Timesteps of the paper's table 2; every second one is its ensemble."""


@dataclass(frozen=True)
class TimestepStudy:
    """Results by timestep, and of the ensemble.

    Attributes:
        evaluation: Evaluation with scores (trials items 2 2 timesteps).
        model: Name of the scored model, as it appears in the evaluation.
        timesteps: Scheduler steps along the last axis of the scores.
        ensemble: Timesteps whose scores are averaged.
        overall: Results of each timestep, and of the mean score under "ensemble".
        labels: Results of each timestep and of the "ensemble", per label.
    """

    evaluation: Evaluation
    model: str
    timesteps: tuple[int, ...]
    ensemble: tuple[int, ...]
    overall: Mapping[str, Results]
    labels: Mapping[str, Mapping[str, Results]]

    def to_dict(self) -> dict[str, Any]:
        """Every number, as JSON holds it."""

        def plain(results: Results) -> dict[str, Any]:
            return {metric: list(result.trials) for metric, result in results.items()}

        return {
            "benchmark": self.evaluation.benchmark.name,
            "source": self.evaluation.benchmark.source,
            "model": self.evaluation.descriptions[self.model],
            "items": len(self.evaluation.items),
            "seeds": list(self.evaluation.seeds[self.model]),
            "timesteps": list(self.timesteps),
            "ensemble": list(self.ensemble),
            "overall": {name: plain(results) for name, results in self.overall.items()},
            "labels": {
                name: {label: plain(results) for label, results in split.items()}
                for name, split in self.labels.items()
            },
        }


def timestep_study(
    evaluation: Evaluation,
    model: str,
    timesteps: Sequence[int] = GRID,
    ensemble: Sequence[int] = ENSEMBLE,
) -> TimestepStudy:
    """Split scores by timestep.

    Args:
        evaluation: Evaluation whose scores have a third axis of timesteps.
        model: Name of the scored model, as it appears in the evaluation.
        timesteps: Scheduler steps along that axis.
        ensemble: Timesteps, some of `timesteps`, whose mean score is the ensemble's score.

    Raises:
        ConfigError: The ensemble is empty or not among them, or the axis has another length.
    """
    scores = evaluation.scores[model]
    if scores.ndim != 5 or scores.shape[-1] != len(timesteps):
        raise ConfigError(
            f"scores of {model!r} are {tuple(scores.shape)} for {len(timesteps)} timesteps"
        )
    if (
        not ensemble
        or set(ensemble) - set(timesteps)
        or len(set(ensemble)) < len(ensemble)  # it would count twice
    ):
        raise ConfigError(
            f"the ensemble must be some of the timesteps {list(timesteps)}, each once, got "
            f"{list(ensemble)}"
        )
    picked = {str(t): scores[..., index] for index, t in enumerate(timesteps)}
    places = [list(timesteps).index(t) for t in ensemble]
    picked["ensemble"] = scores[..., places].mean(dim=-1)
    kind = evaluation.benchmark.label_kind
    return TimestepStudy(
        evaluation=evaluation,
        model=model,
        timesteps=tuple(timesteps),
        ensemble=tuple(ensemble),
        overall={name: results_of(each, evaluation) for name, each in picked.items()},
        labels={
            name: by_label(correct(each), evaluation.items, kind) for name, each in picked.items()
        },
    )


def timestep_tables(study: TimestepStudy) -> list[Table]:
    """Overall by score, then per score by label, and the paper's table where it is comparable."""
    rows = [
        (name, *(results[metric].text for metric in METRICS))
        for name, results in study.overall.items()
    ]
    rows.append(("chance", *(percent(CHANCE[metric]) for metric in METRICS)))
    made = [Table("by timestep, percent", ("timestep", *METRICS), tuple(rows))]
    labels = list(next(iter(study.labels.values())))
    for metric in METRICS if labels else ():
        made.append(_label_table(study, metric, labels))
    benchmark = study.evaluation.benchmark
    if benchmark.name == "mmvp-vlm" and benchmark.published:
        table = published_table("timesteps")
        paper = tuple((row.label, *row.percents) for row in table.rows)
        made.append(Table(f"paper, {table.title}", ("timestep", *table.columns), paper))
    return made


def _label_table(study: TimestepStudy, metric: Metric, labels: Sequence[str]) -> Table:
    rows = tuple(
        (
            name,
            *(study.labels[name][label][metric].text for label in labels),
            results[metric].text,
        )
        for name, results in study.overall.items()
    )
    title = f"{metric} score by timestep and {study.evaluation.benchmark.label_kind}, percent"
    return Table(title, ("timestep", *labels, "all"), rows)
