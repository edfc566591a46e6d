"""The study of features as Markdown and as a picture."""

from collections.abc import Iterator, Sequence

from PIL import Image

from diffenc.studies.chart import CellTable, cell_chart
from diffenc.studies.markdown import number, section, signed, table
from diffenc.studies.results import (
    MEASURES,
    Conditioning,
    FeatureStudy,
    Measure,
    Spread,
)
from diffenc.studies.trials import Property

TEXTS: dict[Conditioning, str] = {
    "uncond": "no text",
    "question": "question",
    "caption": "caption",
}
ACTIONS: dict[Measure, str] = {
    "attention": "cross-attention of the words",
    "change": "change of the features",
}

_WHAT_IS_READ = """\
Colour, shape, position (which ninth of the picture) and number of objects, read by a linear layer \
from frozen features: the mean over the cells of one object, for the number over all cells. A \
question asks for the property without giving it away ("what color is the circle?"); the caption \
names every object, and so tells colour, shape and number, but no position: what it adds there is \
the text, not sight. Pixels and latents, averaged over the same cells, are what the U-Net itself \
starts from."""

_WHERE_TEXT_ACTS = """\
A text names one object of a scene ("a red circle"). Attention: how dense the cross-attention of \
its two words is inside the object's mask, as a multiple of its mean density. Change: the mean of \
|f_c - f_u| inside the mask, as a multiple of that outside. Asked: in the mask of the object that \
is named; control: in the same masks while the text names another object of the scene; 1 is no \
preference. A text focuses on what it asks for where asked exceeds control. Won: the share of \
scenes in which it does; 0.50 is chance. Means are geometric."""

_BEST_IS_CHOSEN = """\
The best place is chosen on the scenes that it is measured on, among all places, so it is somewhat \
too good; the gain of a text is the mean over all places, which nobody chose."""


def to_markdown(study: FeatureStudy, *, command: str, made_with: str, picture: str) -> str:
    """A page of tables.

    Args:
        study: Results of the study.
        command: Command that makes this page.
        made_with: Versions, hardware and time, in a sentence.
        picture: File name of the heat map.
    """
    settings = study.settings
    lines = [
        "# What the features carry",
        "",
        f"`{command}`",
        "",
        f"Model `{study.model}` at {settings['size']} px in {settings['dtype']}; per seed "
        f"{settings['scenes']} held-out scenes, of which two thirds fit the readouts, and "
        f"{settings['focus_scenes']} more for where a text acts; {settings['seeds']} seeds of "
        f"scenes and noise, given as mean ± standard deviation over seeds. {made_with}",
        "",
        f"![Accuracy per tap and timestep, and where a text acts]({picture})",
        "",
        "## Colour, shape, position, count",
        "",
        _WHAT_IS_READ,
        "",
        *section("best", _best_table(study)),
        "",
        _BEST_IS_CHOSEN,
        "",
        *_every_reading(study),
    ]
    if study.focus:
        lines += ["## Where a text acts", "", _WHERE_TEXT_ACTS, "", *_every_focus(study)]
    return "\n".join(lines).rstrip() + "\n"


def best_rows(study: FeatureStudy) -> list[list[str]]:
    """Per property: chance, pixels, latents, then best place and mean gain for each text."""
    rows = []
    for name in study.properties:
        row = [name, f"{study.chance[name]:.2f}"]
        row += [number(study.find(name, None, source, None)) for source in ("pixels", "latents")]
        for conditioning in study.conditionings:
            best = study.best(name, conditioning)
            assert best is not None
            row.append(f"{number(best.accuracy)} at {best.tap}, {best.timestep}")
            if conditioning != "uncond" and "uncond" in study.conditionings:
                row.append(signed(study.gain(name, conditioning)))
        rows.append(row)
    return rows


def best_columns(study: FeatureStudy) -> list[str]:
    """Headings of `best_rows`."""
    columns = ["property", "chance", "pixels", "latents"]
    for conditioning in study.conditionings:
        columns.append(f"best with {TEXTS[conditioning]}")
        if conditioning != "uncond" and "uncond" in study.conditionings:
            columns.append(f"gain of {TEXTS[conditioning]}")
    return columns


def focus_rows(study: FeatureStudy) -> list[list[str]]:
    """Per measure: the place where asked exceeds control by most, and the mean over all places."""
    rows = []
    for measure in MEASURES:
        entries = [entry for entry in study.focus if entry.measure == measure]
        if not entries:
            continue
        best = max(entries, key=lambda entry: entry.preferred.mean)
        rows.append(
            [
                ACTIONS[measure],
                f"{best.tap}, {best.timestep}",
                *(number(part) for part in (best.asked, best.control, best.preferred)),
                number(_mean_over([entry.preferred for entry in entries])),
            ]
        )
    return rows


FOCUS_COLUMNS = ("action", "best place", "asked", "control", "won", "won, mean over places")


def heat_map(study: FeatureStudy) -> Image.Image:
    """Accuracy of every property under every text, then where a text acts; taps by timesteps."""
    steps = [str(timestep) for timestep in study.timesteps]
    tables: list[list[CellTable | None]] = [
        [_accuracies(study, name, conditioning) for conditioning in study.conditionings]
        for name in study.properties
    ]
    for measure in MEASURES:
        if any(entry.measure == measure for entry in study.focus):
            tables.append(list(_actions(study, measure)))
    return cell_chart(
        tables,
        rows=study.taps,
        columns=steps,
        title=f"What the features of {study.model} carry, and where a text acts",
        note="Rows: taps from the input of the U-Net to its output. Columns: timesteps, from "
        "nearly clean to nearly noise. Accuracies: dark is chance, light is 1. Asked and control: "
        "density inside the object's mask, dark is half of that elsewhere, light is twice; won: "
        "share of scenes in which the asked object has more, dark is 0, light is 1. Grey: no text "
        "has reached the tap.",
    )


def _accuracies(study: FeatureStudy, name: Property, conditioning: Conditioning) -> CellTable:
    found = [
        [study.find(name, conditioning, tap, timestep) for timestep in study.timesteps]
        for tap in study.taps
    ]
    values = [[None if spread is None else spread.mean for spread in row] for row in found]
    title = f"{name}, {TEXTS[conditioning]}"
    return CellTable(title, values, min(study.chance[name], 0.99), 1.0)


def _actions(study: FeatureStudy, measure: Measure) -> Iterator[CellTable]:
    for part, low, high in (("asked", 0.5, 2.0), ("control", 0.5, 2.0), ("preferred", 0.0, 1.0)):
        entries = [
            [study.focus_at(measure, tap, timestep) for timestep in study.timesteps]
            for tap in study.taps
        ]
        values = [
            [None if entry is None else getattr(entry, part).mean for entry in row]
            for row in entries
        ]
        title = f"{measure}: {'won' if part == 'preferred' else part}"
        yield CellTable(title, values, low, high, logarithmic=part != "preferred")


def _best_table(study: FeatureStudy) -> list[str]:
    return table(best_columns(study), best_rows(study))


def _every_reading(study: FeatureStudy) -> Iterator[str]:
    for name in study.properties:
        for conditioning in study.conditionings:
            yield f"### {name.capitalize()}, {TEXTS[conditioning]}"
            yield ""
            rows = [
                [f"`{tap}`"]
                + [number(study.find(name, conditioning, tap, step)) for step in study.timesteps]
                for tap in study.taps
            ]
            yield from table(["tap", *map(str, study.timesteps)], rows)
            yield ""


def _every_focus(study: FeatureStudy) -> Iterator[str]:
    yield from section("focus", table(FOCUS_COLUMNS, focus_rows(study)))
    yield ""
    for measure in MEASURES:
        entries = [entry for entry in study.focus if entry.measure == measure]
        if not entries:
            continue
        yield f"### {ACTIONS[measure].capitalize()}"
        yield ""
        rows = [
            [
                f"`{entry.tap}`",
                str(entry.timestep),
                *(number(part) for part in (entry.asked, entry.control, entry.preferred)),
            ]
            for entry in sorted(
                entries, key=lambda entry: (study.taps.index(entry.tap), entry.timestep)
            )
        ]
        yield from table(("tap", "timestep", "asked", "control", "won"), rows)
        yield ""


def _mean_over(spreads: Sequence[Spread]) -> Spread:
    """Mean over places, per seed."""
    seeds = zip(*(spread.values for spread in spreads), strict=True)
    return Spread(tuple(sum(values) / len(values) for values in seeds))
