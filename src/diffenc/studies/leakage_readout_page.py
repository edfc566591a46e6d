"""The linear readout of a foreign prompt as a page, as tables, as findings and as a picture."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from diffenc.evals.tables import Table
from diffenc.studies.charts import CellTable, draw_cells
from diffenc.studies.leakage_readout import WORDS, LeakageReadout, Part, Word
from diffenc.studies.pages import page, paragraph, section
from diffenc.studies.spreads import Spread, mean_of
from diffenc.studies.vlm.findings import RULE, DecidedFinding, Finding, decide, parse_claim
from diffenc.studies.vlm.page import finding_blocks

_SILENT = 1e-4
"""A relative change below it is none: no text has reached the tap."""

_ABOUT = """\
Scenes are encoded under a prompt that has nothing to do with them: its colour and its shape are \
drawn anew ("a red circle"). A linear layer reads both from the features, averaged over all cells. \
What it reads came through the text. Without a text it can but guess; "cfg s" is \
f_u + s (f_c - f_u), which is the conditional half at s = 1."""
_CHANGE = """\
change: mean of |f_c - f_u| over that of |f_u|. All others: percent of the test prompts that are \
read rightly. Taps before the first cross-attention (change 0) know nothing of the prompt."""


def findings_of(study: LeakageReadout) -> list[DecidedFinding]:
    """The paper's findings, at the lowest timestep."""
    timestep = study.timesteps[0]
    reached = [
        loud.tap
        for loud in study.loudness
        if loud.timestep == timestep and loud.ratio.mean > _SILENT
    ]

    def accuracy(tap: str, part: str, word: str) -> Spread | None:
        for name, scale, title in _columns(study):
            if title.replace(" ", "-") == part:
                return study.find(word, name, tap, timestep, scale).percent  # type: ignore[arg-type]
        return None

    def figure(key: tuple[str, str, str]) -> Spread | None:
        tap, part, word = key
        if part == "chance":
            chance = 100 * study.chance[word]  # type: ignore[index]
            return Spread((chance,) * study.settings["seeds"])
        spreads = [accuracy(each, part, word) for each in (reached if tap == "mean" else [tap])]
        return mean_of([spread for spread in spreads if spread is not None]) if spreads else None

    return [decide(finding, figure) for finding in _findings(study, reached)] if reached else []


def _findings(study: LeakageReadout, reached: list[str]) -> Iterator[Finding]:
    scales = [f"cfg-{scale:g}" for scale in study.guidance_scales if scale > 1]
    yield _finding(
        "The prompt leaks: a foreign word is read from features under it.",
        "Table 6 of the draft: a foreign caption is said by the language model.",
        [f"mean/cond/{word} > mean/chance/{word}" for word in WORDS],
    )
    if scales:
        yield _finding(
            "The prompt is the easier to read the stronger the guidance.",
            "Table 6 of the draft: CIDEr against the foreign prompt is 7.32 without guidance, "
            "21.39 at 1.5, 63.48 at 4.5; Fig. 6 of the later version: 2.5, 3.9 and 12.9 at 1, 1.5 "
            "and 4.",
            [
                f"mean/{stronger}/{word} > mean/{weaker}/{word}"
                for word in WORDS
                for weaker, stronger in pairwise(["cond", *scales])
            ],
        )
    decoder = [tap for tap in reached if tap.startswith("up_blocks")]
    if len(decoder) > 1:
        yield _finding(
            "Leakage belongs to the tap: from the decoder's first the colour is read far more "
            "often than from its last.",
            "SDXL's taps of the draft leak about five times as much as SD 2.1's of the later one.",
            [f"{decoder[0]}/cond/color - {decoder[-1]}/cond/color > 20"],
        )


def _finding(statement: str, paper: str, claims: list[str]) -> Finding:
    return Finding(statement, paper, tuple(map(parse_claim, claims)))


def to_markdown(study: LeakageReadout, *, command: str, made_with: str, picture: str) -> str:
    """A page of tables.

    Args:
        study: Results of the study.
        command: Command that makes this page.
        made_with: Versions, hardware and time, in a sentence.
        picture: File name of the heat map.
    """
    settings, decided = study.settings, findings_of(study)
    chances = " and ".join(f"{100 * study.chance[word]:.0f} % for the {word}" for word in WORDS)
    return page(
        "# Where a foreign prompt sits",
        f"`{command}`",
        paragraph(
            f"Model `{study.model}` at {settings['size']} px in {settings['dtype']}; per seed "
            f"{settings['scenes']} held-out scenes, of which two thirds fit the readouts; "
            f"{settings['seeds']} seeds of scenes, prompts and noise, given as mean ± sample "
            f"standard deviation. {made_with}"
        ),
        f"![Accuracy of reading the prompt, per tap and part of the features]({picture})",
        paragraph(_ABOUT),
        paragraph(f"The most frequent answer is right for {chances}."),
        "## What holds here",
        section("findings", finding_table(decided)),
        paragraph(RULE),
        paragraph(
            f"Figures are in percent, at t = {study.timesteps[0]}; “mean” is over all taps that "
            "the text reaches."
        ),
        *(block for each in decided for block in finding_blocks(each)),
        "## Figures",
        paragraph(_CHANGE),
        *(word_table(study, word).to_markdown() for word in WORDS),
    )


def finding_table(decided: list[DecidedFinding]) -> Table:
    """Each finding with its verdict."""
    rows = tuple((each.finding.statement, each.verdict) for each in decided)
    return Table("Findings of the paper", ("finding", "here"), rows)


def word_table(study: LeakageReadout, word: Word) -> Table:
    """How often a word is read, per tap, timestep and part."""
    return Table(f"{word} of the prompt", study.columns(), tuple(study.rows(word)))


def draw_leakage_readout(study: LeakageReadout, path: Path) -> None:
    """Draw how often each word is read, per tap and part of the features.

    Args:
        study: Results of the study.
        path: Path of the picture file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    columns = list(_columns(study))
    draw_cells(
        [[_cells(study, word, timestep) for timestep in study.timesteps] for word in WORDS],
        path,
        rows=study.taps,
        columns=[_SHORT.get(title, title) for _, _, title in columns],
        title=f"What a linear layer reads of a foreign prompt from {study.model}",
        note="Rows: taps from the input of the U-Net to its output. Columns: features without a "
        "text (f_u), under the prompt (f_c), guided at a scale, and the difference f_c - f_u. Dark "
        "is chance, light is 1: every prompt is read.",
    )


_SHORT = {"uncond": "f_u", "cond": "f_c", "cond - uncond": "f_c - f_u"}


def _cells(study: LeakageReadout, word: Word, timestep: int) -> CellTable:
    values = [
        [study.find(word, part, tap, timestep, scale).mean for part, scale, _ in _columns(study)]
        for tap in study.taps
    ]
    return CellTable(f"{word}, t = {timestep}", values, min(study.chance[word], 0.99), 1.0)


def _columns(study: LeakageReadout) -> Iterator[tuple[Part, float | None, str]]:
    """Part, scale and heading of each column of figures."""
    yield "uncond", None, "uncond"
    yield "cond", None, "cond"
    for scale in study.guidance_scales:
        yield "cfg", scale, f"cfg {scale:g}"
    yield "difference", None, "cond - uncond"
