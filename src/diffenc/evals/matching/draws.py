"""How the deviation of results falls with noise draws in a score, and with trials of it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc.errors import ConfigError
from diffenc.evals.matching.evaluate import Evaluation, results_of
from diffenc.evals.matching.metrics import METRICS, Metric
from diffenc.evals.results import percent
from diffenc.evals.tables import Table

_LEAST_GROUPS = 3
_REGROUPINGS = 100


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and deviation of a percentage over repetitions.

    Attributes:
        mean: Mean of the repetitions, in percent.
        std: Sample standard deviation of one repetition, in percent (ddof 1).
    """

    mean: float
    std: float


@dataclass(frozen=True)
class DrawRow:
    """Results where each score, or each result, is the mean over some noises.

    Attributes:
        count: Number of noises that are averaged.
        groups: Number of such means that the available noises give at a time, none sharing a noise.
        draws: Results of scores that are means over that many draws, by metric.
        trials: Results that are themselves means over that many trials of one draw, by metric.
        score_deviation: Mean sample standard deviation of the averaged scores themselves.
    """

    count: int
    groups: int
    draws: Mapping[Metric, Spread]
    trials: Mapping[Metric, Spread]
    score_deviation: float


@dataclass(frozen=True)
class DrawStudy:
    """The ablation.

    Attributes:
        evaluation: Evaluation with one trial per noise.
        model: Name of the scored model, as it appears in the evaluation.
        rows: Results by number of averaged noises, in rising order.
    """

    evaluation: Evaluation
    model: str
    rows: tuple[DrawRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Every number, as JSON holds it."""
        return {
            "benchmark": self.evaluation.benchmark.name,
            "source": self.evaluation.benchmark.source,
            "model": self.evaluation.descriptions[self.model],
            "items": len(self.evaluation.items),
            "seeds": list(self.evaluation.seeds[self.model]),
            "rows": [
                {
                    "count": row.count,
                    "groups": row.groups,
                    "score_deviation": row.score_deviation,
                    "draws": {metric: asdict(each) for metric, each in row.draws.items()},
                    "trials": {metric: asdict(each) for metric, each in row.trials.items()},
                }
                for row in self.rows
            ],
        }


def draw_study(evaluation: Evaluation, model: str) -> DrawStudy:
    """Regroup trials with one noise each into scores over several draws, and results over trials.

    Since the noise of a trial depends on its seed alone, the mean of the scores of n trials is the
    score with n draws. Noises are split into groups that share none; variances are those between
    groups, and averaged over 100 random ways to split, which are the same on each call. The
    variance of a mean over n trials is that of one trial over n.

    Args:
        evaluation: Evaluation with six trials or more.
        model: Name of the scored model, whose scores in the evaluation are (trials items 2 2).

    Raises:
        ConfigError: Too few trials.
    """
    scores = evaluation.scores[model]
    if len(scores) < 2 * _LEAST_GROUPS:
        raise ConfigError(
            f"the ablation needs {2 * _LEAST_GROUPS} noises or more, got {len(scores)}; 24 are good"
        )
    counts = [n for n in range(1, len(scores) // _LEAST_GROUPS + 1) if _is_step(n)]
    rows = tuple(_row(scores, count, evaluation) for count in counts)
    return DrawStudy(evaluation, model, rows)


def draw_table(study: DrawStudy) -> Table:
    """Draws and trials side by side."""
    rows = []
    for row in study.rows:
        cells = [str(row.count), str(row.groups), f"{row.score_deviation:.4f}"]
        for metric in METRICS:
            cells.append(percent(row.draws[metric].mean, row.draws[metric].std))
            cells.append(percent(row.trials[metric].std))
        rows.append(tuple(cells))
    columns = ["noises", "repetitions", "deviation of scores"]
    for metric in METRICS:
        columns += [f"{metric} of n draws", "± over n trials"]
    title = "noises averaged in each score, or over trials of the result, percent"
    return Table(title, tuple(columns), tuple(rows))


def _is_step(count: int) -> bool:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    return count & (count - 1) == 0 or (count % 3 == 0 and (count // 3) & (count // 3 - 1) == 0)


def _row(scores: Tensor, count: int, evaluation: Evaluation) -> DrawRow:
    groups = len(scores) // count
    generator = torch.Generator("cpu").manual_seed(count)
    ways = 1 if count == 1 else _REGROUPINGS
    place: dict[str, Any] = {"dtype": torch.long, "device": "cpu"}
    order = torch.stack(
        [torch.randperm(len(scores), generator=generator, **place) for _ in range(ways)]
    )
    split = order[:, : groups * count].unflatten(1, (groups, count))
    grouped = torch.stack([scores[way].mean(dim=1) for way in split])  # ways groups items 2 2
    results = results_of(grouped.flatten(0, 1), evaluation)
    single = results_of(scores, evaluation)
    return DrawRow(
        count=count,
        groups=groups,
        draws={metric: _spread(results[metric].trials, groups) for metric in METRICS},
        trials={
            metric: Spread(single[metric].mean, (single[metric].std or 0.0) / math.sqrt(count))
            for metric in METRICS
        },
        score_deviation=_deviation(grouped),
    )


def _spread(values: tuple[float, ...], groups: int) -> Spread:
    """Mean and deviation of repetitions, of which each way to split has equally many."""
    table = torch.tensor(values, dtype=torch.float64, device="cpu").unflatten(0, (-1, groups))
    variance = table.var(dim=1, correction=1).mean()
    return Spread(float(table.mean()), math.sqrt(float(variance)))


def _deviation(scores: Float[Tensor, "ways groups items 2 2"]) -> float:
    return float(scores.var(dim=1, correction=1).mean(dim=0).sqrt().mean())
