"""Pictures of the two studies, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffenc._optional import require
from diffenc.evals.matching.draws import DrawStudy
from diffenc.evals.matching.metrics import CHANCE, METRICS, Metric
from diffenc.evals.matching.timesteps import TimestepStudy

_COLORS: dict[Metric, str] = {"text": "#0b6e99", "image": "#c2571a", "group": "#4f4f57"}
_MARKS: dict[Metric, str] = {"text": "o", "image": "s", "group": "^"}


def need_plots() -> None:
    """Find out before anything is computed whether pictures can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib.figure", extra="viz")


def plot_timesteps(study: TimestepStudy, path: Path) -> None:
    """Results over timesteps with the ensemble as a line, and one panel per score by label."""
    labels = list(next(iter(study.labels.values())))
    figure, panels = _figure(1 + (len(METRICS) if labels else 0))
    _timestep_lines(panels[0], study)
    for panel, metric in zip(panels[1:], METRICS, strict=False):
        names = [*map(str, study.timesteps), "ensemble"]
        values = [[study.labels[name][label][metric].mean for label in labels] for name in names]
        panel.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=100)
        panel.set_title(f"{metric} score by {study.evaluation.benchmark.label_kind}")
        panel.set_yticks(range(len(names)), names)
        panel.set_xticks(range(len(labels)), labels, rotation=40, ha="right")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                ink = "black" if value > 62 else "white"
                panel.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink)
    _finish(figure, study.model, study.evaluation.benchmark.source, len(study.evaluation.items))
    figure.savefig(path, dpi=120)


def plot_draws(study: DrawStudy, path: Path) -> None:
    """Deviations over numbers of noises, and what averaging in the score does to the result."""
    figure, (falls, means) = _figure(2)
    counts = [row.count for row in study.rows]
    for metric in METRICS:
        color, mark = _COLORS[metric], _MARKS[metric]
        in_score = [row.draws[metric].std for row in study.rows]
        over_trials = [row.trials[metric].std for row in study.rows]
        falls.plot(counts, in_score, color=color, marker=mark, label=f"{metric}, draws in a score")
        falls.plot(
            *(counts, over_trials),
            color=color,
            marker=mark,
            linestyle="--",
            markerfacecolor="white",
            label=f"{metric}, mean of trials",
        )
        results = [row.draws[metric] for row in study.rows]
        means.errorbar(
            *(counts, [result.mean for result in results]),
            yerr=[result.std for result in results],
            color=color,
            marker=mark,
            capsize=3,
            label=metric,
        )
        means.axhline(CHANCE[metric], color=color, linewidth=1, linestyle=":")
    falls.set_title("deviation of the result")
    falls.set_ylabel("sample standard deviation, points")
    means.set_title("result with n draws per score (dotted: chance)")
    means.set_ylabel("percent of items")
    for panel in (falls, means):
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, map(str, counts))
        panel.minorticks_off()
        panel.set_xlabel("noises n")
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=8)
    _finish(figure, study.model, study.evaluation.benchmark.source, len(study.evaluation.items))
    figure.savefig(path, dpi=120)


def _timestep_lines(panel: Any, study: TimestepStudy) -> None:
    for index, metric in enumerate(METRICS):
        color = _COLORS[metric]
        results = [study.overall[str(t)][metric] for t in study.timesteps]
        beside = [t + 7 * (index - 1) for t in study.timesteps]  # bars do not hide each other
        panel.errorbar(
            *(beside, [result.mean for result in results]),
            yerr=[result.std or 0.0 for result in results],
            color=color,
            marker=_MARKS[metric],
            capsize=3,
            label=metric,
        )
        panel.axhline(study.overall["ensemble"][metric].mean, color=color, linestyle="--")
        panel.axhline(CHANCE[metric], color=color, linewidth=1, linestyle=":")
    panel.set_title("all items (dashed: ensemble, dotted: chance)")
    panel.set_xlabel("timestep")
    panel.set_ylabel("percent of items")
    panel.set_ylim(0, min(100, max(40, 1.15 * panel.get_ylim()[1])))
    panel.legend(fontsize=8)


def _figure(panels: int) -> tuple[Any, Sequence[Any]]:
    """Panels side by side, two in a row."""
    lines, across = (panels + 1) // 2, min(panels, 2)
    made = require("matplotlib.figure", extra="viz").Figure(
        figsize=(6.2 * across, 4.8 * lines), layout="constrained"
    )
    return made, list(made.subplots(lines, across, squeeze=False).flat)


def _finish(figure: Any, model: str, source: str, items: int) -> None:
    figure.suptitle(f"{model}, {items} items of {source}")
