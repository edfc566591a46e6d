"""The study of reuse as a page and as tables."""

from diffenc._typing import Reused
from diffenc.evals.tables import Table
from diffenc.models.tap_names import paper_name
from diffenc.studies.pages import page, paragraph, section
from diffenc.studies.reuse import PARTS, ReuseStudy

_ABOUT = """\
Scenes with one to three objects are read exactly, and with `reuse`: the way down, or the way down \
and the middle, ran without the text. Drift: length of the difference over the length of the exact \
features. Direction: cosine between the changes f_c - f_u that the text makes in both. Answers: a \
linear layer is fitted to exact features of two thirds of the scenes, under a question after \
colour, shape, position or number, and answers for the others, from exact features and from those \
with reuse; nothing is fitted anew."""


def to_markdown(study: ReuseStudy, *, command: str, made_with: str) -> str:
    """A page of tables.

    Args:
        study: Results of the study.
        command: Command that makes this page.
        made_with: Versions, hardware and time, in a sentence.
    """
    settings = study.settings
    return page(
        "# The first half of the U-Net without the text",
        f"`{command}`",
        paragraph(
            f"Model `{study.model}` at {settings['size']} px in {settings['dtype']}; "
            f"{settings['scenes']} held-out scenes per seed, {settings['seeds']} seeds, given as "
            f"mean ± sample standard deviation. {made_with}"
        ),
        paragraph(_ABOUT),
        section("summary", summary_table(study)),
        *(reuse_table(study, part).to_markdown() for part in PARTS),
    )


def summary_table(study: ReuseStudy) -> Table:
    """What each part loses, over all taps and timesteps."""
    columns = (
        "reuse",
        "largest drift (%)",
        "smallest direction",
        "word maps (cosine)",
        "answers lost, mean (points)",
        "answers lost, most (points)",
    )
    rows = []
    for part in PARTS:
        figures = [row for row in study.rows if row.part == part]
        lost = [100 * (row.exact - row.reused).mean for row in figures]
        drifts = [each.mean for row in figures for each in row.drift.values()]
        cosines = [each.mean for row in figures for each in row.direction.values()]
        cells = (
            f"{100 * max(drifts):.1f}",
            f"{min(cosines):.2f}",
            f"{study.words[part]:.4f}",
            f"{sum(lost) / len(lost):+.2f}",
            f"{max(lost):+.2f}",
        )
        rows.append((part, *cells))
    return Table("What is lost", columns, tuple(rows))


def reuse_table(study: ReuseStudy, part: Reused) -> Table:
    """Figures of each tap and timestep with one part reused."""
    columns = (
        "tap",
        "t",
        "drift, question (%)",
        "drift, caption (%)",
        "direction, question",
        "direction, caption",
        "answers, exact (%)",
        "answers, reused (%)",
    )
    rows = tuple(
        (
            paper_name(row.tap),
            str(row.timestep),
            *(f"{row.drift[text].percent:.1f}" for text in row.drift),
            *(f"{row.direction[text]:.2f}" for text in row.direction),
            f"{row.exact.percent:.1f}",
            f"{row.reused.percent:.1f}",
        )
        for row in study.rows
        if row.part == part
    )
    return Table(f"reuse = {part}", columns, rows)
