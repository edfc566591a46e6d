"""The study of the budget as tables, as a page of Markdown and as a picture."""

from collections.abc import Sequence
from pathlib import Path

from diffenc.evals.tables import Table
from diffenc.studies.budget import MARGINS, BudgetRow, BudgetStudy
from diffenc.studies.budget_arms import FAMILIES, MASKS, MOONSHOT, Arm, Choice, Family
from diffenc.studies.budget_run import BASES
from diffenc.studies.charts import Panel, Series, draw_panels
from diffenc.studies.crowd_trials import CROWD_PROPERTIES
from diffenc.studies.pages import page, paragraph, section
from diffenc.studies.spreads import Spread
from diffenc.studies.token_readers import READERS, Reader
from diffenc.studies.vlm.findings import limit_of

NAMES: dict[Family, str] = {
    "uncond": "grid, no text",
    "cond": "grid, question",
    "words": "words of the question",
    "grid+words": "grid and words",
    "mask": "true masks (bound)",
    "clip": "CLIP's grid",
}
READER_NAMES: dict[Reader, str] = {
    "told": "told the question",
    "blind": "asked through the encoder only",
}
CLAIMS: dict[Reader, str] = {"told": "at least as good", "blind": "far better"}

_WHAT_IS_READ = """\
Each scene has five to nine objects and gets four questions whose words fit one object only: "what \
color is the star?", "what shape is the red object?", "where is the red star?" (which ninth of the \
picture) and "is the red star left of the blue square?". Answers are balanced. A reader is two \
attentions over the tokens, one for each object that a question may name, and a linear layer on \
what they gather; a fresh one is fitted to the tokens of every line and measured on scenes that \
nothing was fitted to. One that is told the question, as a language model is, can look for the \
objects itself. One that is asked through the encoder only knows which of the four properties is \
asked for: which object is meant must stand in the tokens. Every token, of a cell as of a word, \
has its place as further channels."""

_WHAT_THE_LINES_ARE = """\
The grid is pooled from the finest that the tap gives, up to 256 tokens. Words are the sharpest of \
the question, in the order of the text; tokens of words that are not there are zeros. The true \
masks' tokens, one for each object that is named, are what words could gather at best. Which tap \
is read (all side by side, or one, whose maps are as fine as the grid), whether words and masks \
gather features without text or under the question, and whether the last of several words' tokens \
is of the rest of the picture, is chosen for each kind of tokens and each reader on validation \
scenes."""

_ABOUT_CLIP = {
    "shapes-clip": """\
`shapes-clip` was trained on scenes of one to three objects at 64 pixels and never saw a crowd: \
its line says what a grid of another encoder gives, not what CLIP could.""",
    "shapes-many-clip": """\
`shapes-many-clip` was trained on crowded scenes, and taught what lies on each of its 144 patches, \
as no CLIP of photographs was: as a grid of tokens it is a strong baseline.""",
}

_ABOUT_GROWTH = """\
Readers of many tokens have to learn where to look, and need more scenes for it. Where the lines \
come together as scenes grow in number, what few tokens gain is an easier task for their reader, \
and more scenes may take it away."""

_ABOUT_MISTAKES = """\
Of the wrong answers, the share that is right of another object of the scene: the wrong object was \
looked at. The rest names what no other object has."""


def verdict_table(study: BudgetStudy) -> Table:
    """The claims, with the difference over seeds and what the seeds allow to see."""
    rows = []
    for reader in READERS:
        for base in BASES:
            gain = study.gain(base, reader)
            limit = limit_of(gain)
            rows.append(
                (
                    f"{arm_name(MOONSHOT)}: {CLAIMS[reader]} than {arm_name(base)}".replace(
                        "good than", "good as"
                    ),
                    READER_NAMES[reader],
                    f"{gain:+.3f}",
                    "–" if limit is None else f"{limit:.3f}",
                    gain.won,
                    study.verdict(base, reader),
                )
            )
    columns = ("claim", "reader", "difference", "smallest seen", "seeds won", "verdict")
    return Table("what the few tokens of words are worth", columns, tuple(rows))


def accuracy_table(study: BudgetStudy, reader: Reader) -> Table:
    """Accuracy and cost of every number of tokens, read by one reader, then chance."""
    rows = []
    for family in FAMILIES:
        for row in study.curve(family, reader):
            spreads = [*(row.accuracy[name] for name in CROWD_PROPERTIES), row.mean]
            cells = [f"{spread:.2f}" for spread in spreads]
            rows.append((NAMES[family], _tokens(row.arm), *cells, *_cost(row)))
    chance = [study.chance[name] for name in CROWD_PROPERTIES]
    cells = [f"{value:.2f}" for value in (*chance, sum(chance) / len(chance))]
    rows.append(("most frequent answer", "", *cells, "", ""))
    columns = ("tokens", "number", *CROWD_PROPERTIES, "mean", "U-Net rows", "ms")
    return Table(f"accuracy of answers, {READER_NAMES[reader]}", columns, tuple(rows))


def growth_table(study: BudgetStudy) -> Table:
    """Accuracy of the arms that are compared, by the number of scenes that readers learn from."""
    counts = sorted({each.scenes for each in study.growth})
    rows = []
    for reader in READERS:
        for arm in (MOONSHOT, *BASES):
            own = [each for each in study.growth if (each.arm, each.reader) == (arm, reader)]
            own.sort(key=lambda each: each.scenes)
            cells = [f"{each.accuracy:.2f}" for each in own]
            rows.append((arm_name(arm), READER_NAMES[reader], *cells))
    columns = ("tokens", "reader", *(f"{count} scenes" for count in counts))
    return Table("accuracy by the number of scenes that are fitted to", columns, tuple(rows))


def choice_table(study: BudgetStudy) -> Table:
    """Settings that were chosen on validation scenes."""
    rows = []
    for reader in READERS:
        for family in FAMILIES:
            curve = study.curve(family, reader)
            if curve and (choice := curve[0].choice) is not None:
                rows.append((NAMES[family], READER_NAMES[reader], *_choice(study, family, choice)))
    columns = ("tokens", "reader", "taps", "features", "rest")
    return Table("what was chosen", columns, tuple(rows))


def word_table(study: BudgetStudy) -> Table:
    """How often the nouns of a question are among its sharpest words."""
    cells = tuple(f"{spread:.2f}" for spread in study.words_kept.values())
    columns = ("", *(f"{count} of the words" for count in study.words_kept))
    return Table("questions whose nouns are all kept", columns, (("share of questions", *cells),))


def mistake_table(study: BudgetStudy) -> Table:
    """What wrong answers name."""
    rows = []
    for each in study.mistakes:
        cells = [
            f"{each.others[name] / wrong:.2f} of {wrong}" if wrong else "0 of 0"
            for name, wrong in each.wrong.items()
        ]
        rows.append((arm_name(each.arm), READER_NAMES[each.reader], *cells))
    columns = ("tokens", "reader", *study.mistakes[0].wrong)
    return Table("wrong answers that are right of another object", columns, tuple(rows))


def example_table(study: BudgetStudy) -> Table:
    """The first questions that were measured with, and the answers; wrong ones are marked."""
    rows = []
    for each in study.examples:
        cells = [
            answer if answer == each.answer else f"{answer} (wrong)"
            for reader in READERS
            for answer in each.answers[reader]
        ]
        rows.append((each.text, each.answer, *cells))
    heads = [
        f"{name}, {reader}"
        for reader in ("told", "asked")
        for name in (arm_name(MOONSHOT), arm_name(BASES[0]))
    ]
    return Table("answers of the first seed", ("question", "answer", *heads), tuple(rows))


def arm_name(arm: Arm) -> str:
    """Name of a kind and number of tokens."""
    if arm == MOONSHOT:
        return f"{arm.side} x {arm.side} grid and {arm.words} words"
    return f"{arm.tokens} of the {NAMES[arm.family]}"


def draw_budget(study: BudgetStudy, path: Path) -> None:
    """Draw accuracy over the number of tokens, a panel for each reader.

    Args:
        study: Results of the study.
        path: Path of the picture file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    chance = sum(study.chance.values()) / len(study.chance)
    panels = [
        Panel(
            title=READER_NAMES[reader],
            unit="accuracy of answers, mean of four properties",
            series=_series(study, reader),
            axis="number of tokens",
            guessing=chance,
            logarithmic=True,
        )
        for reader in READERS
    ]
    draw_panels(panels, path, title="Accuracy against the number of tokens of a picture")


def to_markdown(study: BudgetStudy, *, command: str, made_with: str, picture: str) -> str:
    """A page of tables.

    Args:
        study: Results of the study.
        command: Command that makes this page.
        made_with: Versions, hardware and time, in a sentence.
        picture: File name of the chart.
    """
    settings = study.settings
    return page(
        "# Accuracy against the number of tokens",
        f"`{command}`",
        paragraph(
            f"Model `{study.model}`, taps {', '.join(f'`{tap}`' for tap in study.taps)} at "
            f"timestep {settings['timestep']} in {settings['dtype']}; CLIP: "
            f"{'none' if study.clip is None else f'`{study.clip}`'}. {settings['seeds']} seeds of "
            f"{settings['scenes']} held-out scenes with four questions each, of which two thirds "
            f"are fitted to; settings chosen on {settings['validation']} other scenes; given as "
            f"mean ± sample standard deviation over seeds. {made_with}"
        ),
        f"Not studied: CLIP ({study.missing})." if study.missing else "",
        f"![Accuracy over the number of tokens, by reader]({picture})",
        "## What holds",
        section("verdict", verdict_table(study)),
        paragraph(_rule(study)),
        "## Accuracy and cost",
        paragraph(_WHAT_IS_READ),
        paragraph(_WHAT_THE_LINES_ARE),
        *(section(f"accuracy-{reader}", accuracy_table(study, reader)) for reader in READERS),
        paragraph(_about_costs(study)),
        paragraph(_ABOUT_CLIP[study.clip]) if study.clip in _ABOUT_CLIP else "",
        choice_table(study).to_markdown(),
        "## By the number of scenes to learn from",
        paragraph(_ABOUT_GROWTH),
        growth_table(study).to_markdown(),
        "## What goes wrong",
        word_table(study).to_markdown(),
        paragraph(_ABOUT_MISTAKES),
        mistake_table(study).to_markdown(),
        paragraph("The first twenty questions of the first seed that were measured with:"),
        example_table(study).to_markdown(),
    )


def _rule(study: BudgetStudy) -> str:
    limits = f"{study.settings['seeds']} seeds"
    return (
        "Differences of the mean of four properties are taken within each seed. With mean m and "
        "sample deviation d over n seeds, l = t d / √n is the smallest difference that could be "
        f"seen (Student's distribution, one-sided 5 %; here {limits}). "
        f'"At least as good" holds where m - l is above {MARGINS["told"]:.2f} and does not hold '
        f'where m + l is below 0; "far better" holds where m - l is above '
        f"{MARGINS['blind']:.2f} and does not hold where m + l is below that. Else it is "
        "undecided, as with one seed. Margins were set before anything was measured."
    )


def _about_costs(study: BudgetStudy) -> str:
    settings = study.settings
    first, last = settings["load"]
    load = "" if first is None else f", load average {first} before the study and {last} after it"
    return (
        "U-Net rows and time of one call for one picture and one question with nothing remembered, "
        "VAE included: processor time on a CPU, wall-clock time elsewhere, median of five calls "
        f"({settings['threads']} threads{load}). A second question about a picture costs the row "
        "under the question alone. Every token is one token of the language model."
    )


def _tokens(arm: Arm) -> str:
    return f"1 to {arm.tokens}" if arm == MASKS else str(arm.tokens)


def _cost(row: BudgetRow) -> tuple[str, str]:
    return ("", "") if row.cost is None else (str(row.cost.rows), f"{row.cost.milliseconds:.0f}")


def _choice(study: BudgetStudy, family: Family, choice: Choice) -> tuple[str, str, str]:
    taps = "all" if choice.taps == study.taps else f"`{choice.taps[0]}`"
    half = "no text" if choice.half == "uncond" else "under the question"
    has_rest = ("yes" if choice.rest else "no") if family in ("words", "grid+words") else ""
    return taps, half, has_rest


def _series(study: BudgetStudy, reader: Reader) -> list[Series]:
    series = []
    most = max(row.arm.tokens for row in study.rows)
    for family in FAMILIES:
        curve = study.curve(family, reader)
        if not curve:
            continue
        name = arm_name(MOONSHOT) if family == "grid+words" else NAMES[family]
        if family == "mask":  # a bound for every number of tokens
            series.append(Series(name, (1, most), (curve[0].mean,) * 2))
        else:
            series.append(Series(name, _places(curve), _means(curve)))
    return series


def _places(curve: Sequence[BudgetRow]) -> list[float]:
    return [row.arm.tokens for row in curve]


def _means(curve: Sequence[BudgetRow]) -> list[Spread]:
    return [row.mean for row in curve]
