"""The page of a study, and its picture."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from diffenc.evals.paper import published_source, published_table
from diffenc.evals.tables import Table
from diffenc.studies.charts import Panel, Series, draw_panels
from diffenc.studies.pages import by_reason, page, paragraph, section
from diffenc.studies.spreads import written
from diffenc.studies.vlm.findings import GUESSING, RULE, DecidedFinding
from diffenc.studies.vlm.measurements import Measurement
from diffenc.studies.vlm.study import VlmStudy
from diffenc.studies.vlm.tables import (
    MEANINGS,
    figure_tables,
    finding_table,
    measurement_table,
    training_table,
    unread_cell,
)


def to_markdown(
    study: VlmStudy, *, command: str, made_with: str, picture: str | None = None
) -> str:
    """A page of tables.

    Args:
        study: Results of the study.
        command: Command that makes this page.
        made_with: Versions, hardware and time, in a sentence.
        picture: File name of the plot; None if there is no plot.
    """
    plan = study.plan
    findings: list[str] = []
    if study.findings:
        findings = ["## What holds here", section("findings", finding_table(study))]
        findings += [
            paragraph(RULE),
            *(part for each in study.findings for part in finding_blocks(each)),
        ]
    return page(
        f"# {plan.title}",
        f"`{command}`",
        paragraph(plan.about),
        paragraph(_setting(study, made_with)),
        *_missing(study),
        f"![Figures of the study, mean and deviation over seeds]({picture})" if picture else "",
        *findings,
        "## Figures",
        *(
            part
            for kind, table in figure_tables(study).items()
            for part in (table.to_markdown(), paragraph(MEANINGS[kind]))
        ),
        *_paper(plan.paper),
        "## What was run",
        training_table(plan).to_markdown(),
        measurement_table(plan).to_markdown(),
    )


def draw_study(study: VlmStudy, path: Path) -> None:
    """Draw every figure that the plan names, with bars of one sample deviation.

    Args:
        study: Results of the study.
        path: Path of the picture file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    panels = []
    for plot in study.plan.plots:
        kind, _, name = plot.partition("/")
        measurements = [each for each in study.plan.measurements.values() if each.kind == kind]
        several = any(each.passes > 1 for each in measurements)
        panel = _over_passes if several else _over_trainings
        unit = "CIDEr × 100" if name == "cider" else "percent"
        drawn = panel(study, measurements, name, title=f"{kind}: {name}", unit=unit)
        panels.append(replace(drawn, guessing=_guessing(study, measurements, name)))
    draw_panels(panels, path, title=study.plan.title)


def _guessing(study: VlmStudy, measurements: Sequence[Measurement], name: str) -> float | None:
    """Mean of what guessing reaches on the items of a panel; None where nothing can be guessed."""
    keys = [
        (training, measurement.name, GUESSING.get(name, ""))
        for training in study.plan.trainings
        for measurement in measurements
    ]
    reached = [spread.mean for spread in map(study.figure, keys) if spread is not None]
    return sum(reached) / len(reached) if reached else None


def _over_trainings(
    study: VlmStudy, measurements: Sequence[Measurement], name: str, *, title: str, unit: str
) -> Panel:
    """Trainings across, a series per measurement."""
    trainings = [
        training
        for training in study.plan.trainings.values()
        if any(study.cell(training.name, each.name) for each in measurements)
    ]
    series = []
    for index, measurement in enumerate(measurements):
        shift = 0.08 * (index - (len(measurements) - 1) / 2)  # bars do not hide each other
        spreads = [study.figure((each.name, measurement.name, name)) for each in trainings]
        known = [(k + shift, spread) for k, spread in enumerate(spreads) if spread is not None]
        if known:
            series.append(Series(measurement.label, *zip(*known, strict=True)))
    return Panel(title, unit, series, names=[training.label for training in trainings])


def _over_passes(
    study: VlmStudy, measurements: Sequence[Measurement], name: str, *, title: str, unit: str
) -> Panel:
    """Passes across, a series per training and measurement."""
    lines = []
    for training in study.plan.trainings.values():
        for measurement in measurements:
            keys = [f"{name}.{k}" for k in range(1, measurement.passes + 1)]
            spreads = [study.figure((training.name, measurement.name, key)) for key in keys]
            known = [spread for spread in spreads if spread is not None]
            if len(known) > 1:
                lines.append((f"{training.label}, {measurement.label}", known))
    series = []
    for index, (label, known) in enumerate(lines):
        shift = 0.05 * (index - (len(lines) - 1) / 2)  # bars do not hide each other
        places = [number + shift for number in range(1, len(known) + 1)]
        series.append(Series(label, places, known))
    return Panel(title, unit, series, axis="pass")


def _setting(study: VlmStudy, made_with: str) -> str:
    plan = study.plan
    seeds = f"{plan.seeds} seeds" if plan.seeds > 1 else "one seed, so without a deviation"
    there = study.trained - study.fresh
    were = "was" if there == 1 else "were"
    shared = f", {there} of which {were} there already" if there else ""
    model = plan.shared.model.get("encoder"), plan.shared.model.get("language_model")
    return (
        f"Encoder `{model[0]}`, language model `{model[1]}`; {plan.data.scenes} pictures of "
        f"coloured shapes to learn from; {seeds}, given as mean ± sample standard deviation: a "
        "seed changes what is initialised, the order, the prompts that are drawn, and the held-out "
        f"scenes. {study.trained} trainings{shared}. {made_with}"
    )


def _missing(study: VlmStudy) -> Iterator[str]:
    for reason, names in by_reason(study.missing).items():
        labels = ", ".join(f"“{study.plan.trainings[name].label}”" for name in names)
        yield paragraph(f"**Not run:** {labels}, and what depends on them ({reason}).")


def finding_blocks(decided: DecidedFinding, spec: str = ".1f") -> list[str]:
    """A finding with its comparisons.

    Args:
        decided: The finding, decided.
        spec: Format of the figures.
    """
    finding, answers = decided.finding, decided.unread is not None
    rows = []
    for each in decided.decisions:
        limit = "–" if each.limit is None else f"{each.limit:{spec}}"
        sides = "; ".join(f"`{name}` {spread:{spec}}" for name, spread in each.sides.items())
        excess = written(each.excess, f"+{spec}", nothing="–")
        unread = [unread_cell(each.unread)] if answers else []
        rows.append((f"`{each.claim}`", excess, limit, each.outcome, *unread, sides or "–"))
    columns = ["comparison", "by how much", "must exceed", "so it", "figures"]
    if answers:
        columns.insert(-1, "unread, %")
    blocks = [
        f"### {finding.statement.rstrip('.')}: {decided.outcome}",
        paragraph(f"In the paper: {finding.paper}"),
        Table("Comparisons", tuple(columns), tuple(rows)).to_markdown(),
    ]
    if decided.at_limit:
        names = ", ".join(f"`{each}`" for each in decided.at_limit)
        text = f"At an end of their scale, with no room for a difference: {names}."
        blocks.append(paragraph(text))
    if finding.if_not and decided.verdict in ("does not show", "opposite"):
        blocks.append(paragraph(f"Likely reason: {finding.if_not}"))
    return blocks


def _paper(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    blocks = [
        "## In the paper",
        paragraph(f"Transcribed from {published_source()}."),
        paragraph(
            "Photographs, SDXL and Vicuna-7B there; coloured shapes and a language model of a "
            "million parameters here: signs of differences compare, numbers do not."
        ),
    ]
    for name in names:
        table = published_table(name)
        blocks += [table.to_table().to_markdown(), *map(paragraph, table.notes)]
    return blocks
