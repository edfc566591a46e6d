"""The study of registers as a page, as tables, as findings and as a picture."""

from collections.abc import Callable, Iterator
from pathlib import Path

from diffenc.evals.tables import Table
from diffenc.models.tap_names import paper_name
from diffenc.studies.charts import CellTable, draw_cells
from diffenc.studies.pages import page, paragraph, section
from diffenc.studies.registers import KINDS, RegisterStudy, TapRegisters, kind_of, mean_count
from diffenc.studies.spreads import Spread
from diffenc.studies.vlm.findings import RULE, DecidedFinding, Finding, decide, parse_claim
from diffenc.studies.vlm.page import finding_blocks

_ABOUT = """\
A register is a cell whose feature vector is more than {ratio:g} times as long as the median in \
its picture, and as all but one of the eight cells around it. The second part spares objects, \
which cover cells side by side. First: share of the variance of all cells that the first principal \
component has, with the registers and without them; where one cell dominates, the first component \
is that cell, and a picture of the components is black but for it."""


_REASON = """\
The miniature has 256 cells at the most, and little to spare; registers were seen in large models \
that were trained for long."""


def findings_of(study: RegisterStudy) -> list[DecidedFinding]:
    """The paper's findings that this run can decide."""
    names = {tap: paper_name(tap) for tap in study.taps}
    kinds = [kind for kind in KINDS if any(kind_of(name) == kind for name in names.values())]

    def figure(key: tuple[str, str, str]) -> Spread | None:
        kind, _, timestep = key
        return mean_count(study, kind, int(timestep), names)

    if "cross-q" not in kinds or len(kinds) < 2:
        return []
    findings = [
        Finding(
            f"{kind.capitalize()} taps hold more registers than cross-q taps.",
            "Project page and a caption: tokens of out and res-out act as registers.",
            tuple(
                parse_claim(f"{kind}/registers/{step} > cross-q/registers/{step}")
                for step in study.timesteps
            ),
            _REASON if study.model == "shapes" else "",
        )
        for kind in kinds
        if kind != "cross-q"
    ]
    return [decide(finding, figure) for finding in findings]


def to_markdown(study: RegisterStudy, *, command: str, made_with: str, picture: str) -> str:
    """A page of tables.

    Args:
        study: Results of the study.
        command: Command that makes this page.
        made_with: Versions, hardware and time, in a sentence.
        picture: File name of the heat map.
    """
    settings, decided = study.settings, findings_of(study)
    several = "s" if settings["pictures"] > 1 else ""
    of_what = f"{'held-out scene' if settings['scenes'] else 'picture'}{several}"
    findings = [
        "## What holds here",
        section("findings", finding_table(decided)),
        paragraph(RULE),
        *(block for each in decided for block in finding_blocks(each, ".3f")),
    ]
    return page(
        "# Register cells",
        f"`{command}`",
        paragraph(
            f"Model `{study.model}` at {settings['size']} px in {settings['dtype']}, features "
            f"without a text; {settings['pictures']} {of_what} per seed, {settings['seeds']} seeds,"
            f" given as mean ± sample standard deviation. {made_with}"
        ),
        f"![Registers per picture, and the share of the first component]({picture})",
        paragraph(_ABOUT.format(ratio=study.ratio)),
        *(findings if decided else []),
        "## Figures",
        *(register_table(study, timestep).to_markdown() for timestep in study.timesteps),
    )


def finding_table(decided: list[DecidedFinding]) -> Table:
    """Each finding with its verdict."""
    rows = tuple((each.finding.statement, each.verdict) for each in decided)
    return Table("Findings of the paper", ("finding", "here"), rows)


def register_table(study: RegisterStudy, timestep: int) -> Table:
    """Registers of each tap at a timestep."""
    columns = (
        "tap",
        "registers a picture",
        "pictures with one",
        "longest / median",
        "first",
        "first without",
        "most often at",
    )
    rows = tuple(_cells(row) for row in study.rows if row.timestep == timestep)
    return Table(f"registers, t = {timestep}", columns, rows)


def _cells(row: TapRegisters) -> tuple[str, ...]:
    place = "–"
    if row.place is not None:
        place = f"{row.place[0]:.2f}, {row.place[1]:.2f} ({100 * row.there:.0f} %)"
    return (
        paper_name(row.tap),
        f"{row.count:.2f}",
        f"{row.pictures:.2f}",
        f"{row.largest:.2f}",
        f"{row.first:.2f}",
        f"{row.first_without:.2f}",
        place,
    )


def draw_registers(study: RegisterStudy, path: Path) -> None:
    """Draw the number of registers and the share of the first component.

    Args:
        study: Results of the study.
        path: Path of the picture file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    highest = max(row.count.mean for row in study.rows)
    tables = [
        _table(study, "registers a picture", lambda row: row.count, max(highest, 1.0)),
        _table(study, "longest cell / median", lambda row: row.largest, 5.0, low=1.0),
        _table(study, "first component", lambda row: row.first, 1.0),
        _table(study, "first, without registers", lambda row: row.first_without, 1.0),
    ]
    draw_cells(
        [tables],
        path,
        rows=[paper_name(tap) for tap in study.taps],
        columns=[str(timestep) for timestep in study.timesteps],
        title=f"Register cells of {study.model}",
        note="Rows: taps from the input of the U-Net to its output. Columns: timesteps. Registers: "
        f"cells more than {study.ratio:g} times as long as the picture's median and as all but "
        "one around. First component: its share of the variance of all cells.",
    )


def _table(
    study: RegisterStudy,
    title: str,
    figure: Callable[[TapRegisters], Spread],
    high: float,
    *,
    low: float = 0.0,
) -> CellTable:
    return CellTable(title, [list(_row(study, tap, figure)) for tap in study.taps], low, high)


def _row(
    study: RegisterStudy, tap: str, figure: Callable[[TapRegisters], Spread]
) -> Iterator[float | None]:
    for timestep in study.timesteps:
        row = study.find(tap, timestep)
        yield None if row is None else figure(row).mean
