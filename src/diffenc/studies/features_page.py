"""The study of features as a page, as tables and as a picture."""

from collections.abc import Iterator
from pathlib import Path

from diffenc.evals.tables import Table
from diffenc.studies.charts import CellTable, draw_cells
from diffenc.studies.features import FeatureStudy
from diffenc.studies.focus import MEASURES, Focus, Measure
from diffenc.studies.pages import page, section
from diffenc.studies.spreads import mean_of, written
from diffenc.studies.trials import Conditioning, Property

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
    focus = (
        "## Where a text acts",
        _WHERE_TEXT_ACTS,
        section("focus", focus_table(study)),
        *(table.to_markdown() for table in _every_focus(study)),
    )
    return page(
        "# What the features carry",
        f"`{command}`",
        f"Model `{study.model}` at {settings['size']} px in {settings['dtype']}; per seed "
        f"{settings['scenes']} held-out scenes, of which two thirds fit the readouts, and "
        f"{settings['focus_scenes']} more for where a text acts; {settings['seeds']} seeds of "
        f"scenes and noise, given as mean ± standard deviation over seeds. {made_with}",
        f"![Accuracy per tap and timestep, and where a text acts]({picture})",
        "## Colour, shape, position, count",
        _WHAT_IS_READ,
        section("best", input_table(study), best_table(study)),
        _BEST_IS_CHOSEN,
        *(table.to_markdown() for table in _every_reading(study)),
        *(focus if study.focus else ()),
    )


def input_table(study: FeatureStudy) -> Table:
    """Accuracy of guessing, and of reading what the U-Net starts from."""
    rows = [
        (
            name,
            f"{study.chance[name]:.2f}",
            *(
                written(study.find(name, None, source, None), ".2f")
                for source in ("pixels", "latents")
            ),
        )
        for name in study.properties
    ]
    title = "accuracy of linear readouts, what the U-Net starts from"
    return Table(title, ("property", "chance", "pixels", "latents"), tuple(rows))


def best_table(study: FeatureStudy) -> Table:
    """Best place for each property and text, and the mean gain of the text over all places."""
    rows = []
    for name in study.properties:
        for conditioning in study.conditionings:
            best = study.best(name, conditioning)
            assert best is not None
            place = (f"{best.accuracy:.2f}", best.tap, str(best.timestep))
            gain = None if conditioning == "uncond" else study.gain(name, conditioning)
            rows.append((name, TEXTS[conditioning], *place, written(gain, "+.3f")))
    columns = ("property", "text", "best accuracy", "tap", "timestep", "gain of the text")
    return Table("accuracy of linear readouts, best place by text", columns, tuple(rows))


def focus_table(study: FeatureStudy) -> Table:
    """Per measure: the place where asked exceeds control by most, and the mean over all places."""
    rows = []
    for measure in MEASURES:
        entries = [entry for entry in study.focus if entry.measure == measure]
        if entries:
            best = max(entries, key=lambda entry: entry.preferred.mean)
            everywhere = mean_of([entry.preferred for entry in entries])
            place = f"{best.tap}, {best.timestep}"
            rows.append((ACTIONS[measure], place, *_cells(best), f"{everywhere:.2f}"))
    columns = ("action", "best place", "asked", "control", "won", "won, mean over places")
    return Table("where a text acts", columns, tuple(rows))


def draw_features(study: FeatureStudy, path: Path) -> None:
    """Draw the accuracy of every property under every text, then where a text acts.

    Args:
        study: Results of the study.
        path: Path of the picture file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    tables: list[list[CellTable | None]] = [
        [_accuracies(study, name, conditioning) for conditioning in study.conditionings]
        for name in study.properties
    ]
    for measure in MEASURES:
        if any(entry.measure == measure for entry in study.focus):
            tables.append(list(_actions(study, measure)))
    draw_cells(
        tables,
        path,
        rows=study.taps,
        columns=[str(timestep) for timestep in study.timesteps],
        title=f"What the features of {study.model} carry, and where a text acts",
        note="Rows: taps from the input of the U-Net to its output. Columns: timesteps, from "
        "nearly clean to nearly noise. Accuracies: dark is chance, light is 1. Asked and control: "
        "density inside the object's mask, dark is half of that elsewhere, light is twice; won: "
        "share of scenes in which the asked object has more, dark is 0, light is 1. Grey: no text "
        "has reached the tap.",
    )


def _accuracies(study: FeatureStudy, name: Property, conditioning: Conditioning) -> CellTable:
    spreads = [
        [study.find(name, conditioning, tap, timestep) for timestep in study.timesteps]
        for tap in study.taps
    ]
    values = [[None if spread is None else spread.mean for spread in row] for row in spreads]
    title = f"{name}, {TEXTS[conditioning]}"
    return CellTable(title, values, min(study.chance[name], 0.99), 1.0)


def _actions(study: FeatureStudy, measure: Measure) -> Iterator[CellTable]:
    entries = [
        [study.focus_at(measure, tap, timestep) for timestep in study.timesteps]
        for tap in study.taps
    ]
    for part, low, high in (("asked", 0.5, 2.0), ("control", 0.5, 2.0), ("preferred", 0.0, 1.0)):
        values = [
            [getattr(entry, part).mean if entry else None for entry in row] for row in entries
        ]
        title = f"{measure}: {'won' if part == 'preferred' else part}"
        yield CellTable(title, values, low, high, logarithmic=part != "preferred")


def _every_reading(study: FeatureStudy) -> Iterator[Table]:
    for name in study.properties:
        for conditioning in study.conditionings:
            cells = [
                [written(study.find(name, conditioning, tap, t), ".2f") for t in study.timesteps]
                for tap in study.taps
            ]
            rows = tuple((f"`{tap}`", *row) for tap, row in zip(study.taps, cells, strict=True))
            columns = ("tap", *map(str, study.timesteps))
            yield Table(f"{name}, {TEXTS[conditioning]}", columns, rows)


def _every_focus(study: FeatureStudy) -> Iterator[Table]:
    for measure in MEASURES:
        entries = [entry for entry in study.focus if entry.measure == measure]
        entries.sort(key=lambda entry: (study.taps.index(entry.tap), entry.timestep))
        rows = tuple((f"`{each.tap}`", str(each.timestep), *_cells(each)) for each in entries)
        if rows:
            columns = ("tap", "timestep", "asked", "control", "won")
            yield Table(ACTIONS[measure], columns, rows)


def _cells(entry: Focus) -> tuple[str, ...]:
    return tuple(f"{part:.2f}" for part in (entry.asked, entry.control, entry.preferred))
