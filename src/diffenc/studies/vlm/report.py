"""The page of a study."""

import textwrap
from collections.abc import Iterator

from diffenc.evals.paper import published_source, published_table
from diffenc.studies.markdown import section
from diffenc.studies.vlm.findings import RULE, DecidedFinding
from diffenc.studies.vlm.results import VlmStudy
from diffenc.studies.vlm.tables import (
    Lines,
    figure_tables,
    finding_table,
    markdown,
    measurement_table,
    number,
    signed,
    training_table,
)


def to_markdown(study: VlmStudy, *, command: str, made_with: str, picture: str | None) -> str:
    """A page of tables.

    Args:
        study: Results of the study.
        command: Command that makes this page.
        made_with: Versions, hardware and time, in a sentence.
        picture: File name of the plot; None if there is no plot.
    """
    return "\n".join(_lines(study, command, made_with, picture)).rstrip() + "\n"


def _lines(study: VlmStudy, command: str, made_with: str, picture: str | None) -> Iterator[str]:
    plan = study.plan
    yield from (f"# {plan.title}", "", f"`{command}`", "")
    yield from (_wrap(plan.about), "")
    yield from (_wrap(_setting(study, made_with)), "")
    for line in _missing(study):
        yield from (line, "")
    if picture is not None:
        yield from (f"![Figures of the study, mean and deviation over seeds]({picture})", "")
    if study.findings:
        yield from ("## What holds here", "")
        yield from section("findings", list(markdown(finding_table(study))))
        yield from ("", _wrap(RULE), "")
        for decided in study.findings:
            yield from _finding(decided)
    yield from ("## Figures", "")
    for table in figure_tables(study):
        yield from (f"### {table.title}", "", *markdown(table), "")
    if plan.paper:
        yield from ("## In the paper", "", *_paper(plan.paper))
    yield from ("## What was run", "")
    for table in (training_table(plan), measurement_table(plan)):
        yield from (f"### {table.title}", "", *markdown(table), "")


def _setting(study: VlmStudy, made_with: str) -> str:
    plan = study.plan
    seeds = f"{plan.seeds} seeds" if plan.seeds > 1 else "one seed, so without a deviation"
    there = study.trained - study.fresh
    shared = f", {there} of which were there already" if there else ""
    model = plan.shared.model.get("encoder"), plan.shared.model.get("language_model")
    return (
        f"Encoder `{model[0]}`, language model `{model[1]}`; {plan.data.scenes} pictures of "
        f"coloured shapes to learn from; {seeds}, given as mean ± sample standard deviation: a "
        "seed changes what is initialised, the order, the prompts that are drawn, and the held-out "
        f"scenes. {study.trained} trainings{shared}. {made_with}"
    )


def _missing(study: VlmStudy) -> Iterator[str]:
    for reason in dict.fromkeys(study.missing.values()):
        names = [
            f"“{study.plan.trainings[name].label}”"
            for name, why in study.missing.items()
            if why == reason
        ]
        yield _wrap(f"**Not run:** {', '.join(names)}, and what depends on them ({reason}).")


def _finding(decided: DecidedFinding) -> Iterator[str]:
    finding = decided.finding
    yield from (f"### {finding.statement.rstrip('.')}: {decided.verdict}", "")
    yield from (_wrap(f"In the paper: {finding.paper}"), "")
    rows = []
    for each in decided.decisions:
        limit = "–" if each.limit is None else f"{each.limit:.1f}"
        sides = "; ".join(f"`{name}` {number(spread)}" for name, spread in each.sides.items())
        rows.append((f"`{each.claim}`", signed(each.excess), limit, each.verdict, sides or "–"))
    columns = ("comparison", "by how much", "must exceed", "so it", "figures")
    yield from markdown(Lines("", columns, tuple(rows)))
    yield ""
    if decided.at_limit:
        told = ", ".join(f"`{each}`" for each in decided.at_limit)
        yield from (_wrap(f"At an end of their scale, with no room for a difference: {told}."), "")
    if finding.if_not and decided.verdict in ("does not show", "opposite"):
        yield from (_wrap(f"Likely reason: {finding.if_not}"), "")


def _paper(names: tuple[str, ...]) -> Iterator[str]:
    yield from (_wrap(f"Transcribed from {published_source()}."), "")
    yield from (
        _wrap(
            "Photographs, SDXL and Vicuna-7B there; coloured shapes and a language model of a "
            "million parameters here: signs of differences compare, numbers do not."
        ),
        "",
    )
    for name in names:
        table = published_table(name)
        text = table.to_table()
        yield from (f"### {text.title}", "")
        yield from (*markdown(Lines(text.title, text.columns, text.rows)), "")
        for note in table.notes:
            yield from (_wrap(note), "")


def _wrap(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
