"""The picture of a study, by matplotlib: trainings across, a colour per measurement."""

from pathlib import Path
from typing import Any

from diffenc._optional import require
from diffenc.studies.vlm.plan import Measurement
from diffenc.studies.vlm.results import VlmStudy

_COLORS = ("#0b6e99", "#c2571a", "#4f4f57", "#5b8c2a", "#8b3a8b", "#b8860b")
_MARKS = ("o", "s", "^", "D", "v", "P")


def need_plots() -> None:
    """Find out before anything is computed whether pictures can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib.figure", extra="viz")


def plot_study(study: VlmStudy, path: Path) -> None:
    """Draw every figure that the plan names, with bars of one sample deviation.

    Args:
        study: Results of the study.
        path: Path of the picture file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    plots = study.plan.plots
    width = max(5.6, 1.3 * sum(_is_measured(study, name) for name in study.plan.trainings))
    figure = require("matplotlib.figure", extra="viz").Figure(
        figsize=(width * max(1, len(plots)), 4.8), layout="constrained"
    )
    panels = figure.subplots(1, max(1, len(plots)), squeeze=False)[0]
    for panel, plot in zip(panels, plots, strict=False):
        kind, _, name = plot.partition("/")
        _panel(panel, study, kind, name)
    figure.suptitle(study.plan.title)
    figure.savefig(path, dpi=110)


def _is_measured(study: VlmStudy, training: str) -> bool:
    return any(study.cell(training, each) for each in study.plan.measurements)


def _panel(panel: Any, study: VlmStudy, kind: str, name: str) -> None:
    plan = study.plan
    measurements = [each for each in plan.measurements.values() if each.kind == kind]
    passes = max(each.passes for each in measurements)
    if passes > 1:
        _passes(panel, study, measurements, name, passes)
        panel.set_xlabel("pass")
    else:
        _trainings(panel, study, measurements, name)
    unit = "CIDEr × 100" if name == "cider" else "percent"
    panel.set_title(f"{kind}: {name}")
    panel.set_ylabel(unit)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
    panel.legend(fontsize=8, **(below if passes > 1 else {"loc": "best"}))


def _trainings(panel: Any, study: VlmStudy, measurements: list[Measurement], name: str) -> None:
    names = [
        training.name
        for training in study.plan.trainings.values()
        if any(study.cell(training.name, each.name) for each in measurements)
    ]
    for index, measurement in enumerate(measurements):
        found = [study.figure((each, measurement.name, name)) for each in names]
        shift = 0.08 * (index - (len(measurements) - 1) / 2)  # bars do not hide each other
        places = [k + shift for k, spread in enumerate(found) if spread is not None]
        spreads = [spread for spread in found if spread is not None]
        if spreads:
            _draw(panel, places, spreads, index, measurement.label, line="none")
    labels = [study.plan.trainings[each].label for each in names]
    panel.set_xticks(range(len(names)), labels, rotation=20, ha="right", fontsize=8)


def _passes(
    panel: Any, study: VlmStudy, measurements: list[Measurement], name: str, passes: int
) -> None:
    index = 0
    for training in study.plan.trainings.values():
        for measurement in measurements:
            keys = [f"{name}.{k}" for k in range(1, measurement.passes + 1)]
            found = [study.figure((training.name, measurement.name, key)) for key in keys]
            spreads = [spread for spread in found if spread is not None]
            if len(spreads) < 2:
                continue
            label = f"{training.label}, {measurement.label}"
            _draw(panel, list(range(1, len(spreads) + 1)), spreads, index, label)
            index += 1
    panel.set_xticks(range(1, passes + 1))


def _draw(
    panel: Any,
    places: list[float],
    spreads: list[Any],
    index: int,
    label: str,
    *,
    line: str = "solid",
) -> None:
    panel.errorbar(
        places,
        [spread.mean for spread in spreads],
        yerr=[spread.deviation or 0.0 for spread in spreads],
        color=_COLORS[index % len(_COLORS)],
        marker=_MARKS[index % len(_MARKS)],
        linewidth=1.2,
        linestyle=line,
        capsize=3,
        label=label,
    )
