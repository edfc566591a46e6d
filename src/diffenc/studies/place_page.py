"""The page of the table of places: a table for each model, and what its columns mean."""

from collections.abc import Sequence

from diffenc.evals.tables import Table
from diffenc.studies.pages import page, paragraph
from diffenc.studies.place_table import Row, columns_of

HEADINGS = {
    "tap": "tap",
    "timestep": "timestep",
    "text": "text",
    "parameters_m": "parameters, M",
    "gflop": "GFLOP",
    "ms": "ms",
    "images_per_s": "images/s",
    "shapes_probe": "probe",
    "shapes_pck": "PCK@0.1",
    "shapes_miou": "mIoU",
    "shapes_depth_order": "depth order",
    "spair_pck": "SPair PCK@0.1, points",
    "spair_pck_image": "SPair PCK@0.1, pictures",
    "nyu_depth_delta1": "NYU δ < 1.25",
    "nyu_depth_rmse": "NYU RMSE, m",
    "nyu_normals_11": "NYU normals < 11.25°",
    "nyu_normals_median": "NYU normals, median °",
    "navi_depth_delta1": "NAVI δ < 1.25",
    "navi_depth_rmse": "NAVI RMSE",
    "navi_normals_11": "NAVI normals < 11.25°",
    "navi_normals_median": "NAVI normals, median °",
    "navi_recall_1cm": "NAVI recall 1 cm",
    "navi_recall_2cm": "NAVI recall 2 cm",
    "navi_recall_5cm": "NAVI recall 5 cm",
    "navi_recall_5px": "NAVI recall 5 px",
    "navi_recall_25px": "NAVI recall 25 px",
    "navi_recall_50px": "NAVI recall 50 px",
    "navi_recall_2cm_0_30": "NAVI recall 2 cm, 0–30°",
    "navi_recall_2cm_30_60": "NAVI recall 2 cm, 30–60°",
    "navi_recall_2cm_60_90": "NAVI recall 2 cm, 60–90°",
    "navi_recall_2cm_90_120": "NAVI recall 2 cm, 90–120°",
}
"""Headings of the columns; the columns of the machine stand in a line above a table."""

_HIDDEN = ("model", "size", "batch", "dtype", "hardware", "shapes_pck_image")

_ABOUT = """\
Places of each model: where features are read (tap), how much noise is added (timestep), and \
whether a text is read. Parameters and GFLOP are the denoiser's up to the tap, for one picture: \
`truncate=True` keeps and runs no more. ms is a call with one picture and images/s a call with \
several, from pixels to features, with the picture's encoder and, under a text, the text's; they \
stand where they were measured."""

_MINIATURE = """\
Probe, PCK, mIoU and depth order are measured in the miniature world (`--data shapes`), on scenes \
that no model was trained on. Probe: a linear layer reads colour, shape, position and number of \
objects from averaged features, mean accuracy (guessing: about 0.27); the text is a question \
that does not give the answer away. PCK@0.1: points of a shape found in a picture where it has \
another colour, place and size, by the nearest feature, within a tenth of the picture's side. \
mIoU: a linear layer tells for every cell which shape it belongs to, mean over the four shapes. \
Depth order: a linear layer tells which of two overlapping shapes lies in front (guessing: 0.50). \
For these three the text is a caption with the colours and shapes, in alphabetical order."""


def to_markdown(rows: Sequence[Row]) -> str:
    """A page with a table for each model, those with figures first.

    Args:
        rows: Rows of all models.
    """
    models: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: not _has_figures(row)):
        models.setdefault((row["model"], row["size"]), []).append(row)
    commands = [_command(model, own) for (model, _), own in models.items()]
    miniature = any("shapes_probe" in row for row in rows)
    blocks = [
        "# Results by model, tap, timestep and text",
        "```console\n" + "\n".join(commands) + "\n```",
        paragraph(_ABOUT),
        paragraph(_MINIATURE) if miniature else "",
    ]
    for (model, size), own in models.items():
        blocks += [f"## {model}, {size} px", _measured_on(own), model_table(own).to_markdown()]
    return page(*blocks)


def _has_figures(row: Row) -> bool:
    return bool(row.get("timestep"))


def _command(model: str, rows: Sequence[Row]) -> str:
    """How rows of these columns are measured, with folders for the reader to fill in."""
    columns = {column.split("_")[0] for row in rows for column in row}
    data = [
        f"--data {name}" if name == "shapes" else f"--data {name}=FOLDER"
        for name in ("shapes", "spair", "nyu", "navi")
        if name in columns
    ]
    return " ".join(["diffenc study table -m", model, *(data or ["--data none"])])


def _measured_on(rows: Sequence[Row]) -> str:
    places = dict.fromkeys(
        f"{row['hardware']} in {row['dtype']}, images/s in batches of {row['batch']}"
        for row in rows
        if row.get("hardware")
    )
    return f"Times: {'; '.join(places)}." if places else "Not timed."


def model_table(rows: Sequence[Row]) -> Table:
    """Rows of one model; columns without any value are left out."""
    columns = [
        column
        for column in columns_of(rows)
        if column not in _HIDDEN and any(row.get(column) for row in rows)
    ]
    headings = tuple(HEADINGS.get(column, column) for column in columns)
    cells = tuple(tuple(_cell(column, row.get(column, "")) for column in columns) for row in rows)
    return Table(f"{rows[0]['model']}, {rows[0]['size']} px", headings, cells)


def _cell(column: str, value: str) -> str:
    if column == "tap":
        return f"`{value}`"
    if column not in ("timestep", "text") and column.startswith(
        ("shapes_", "spair_", "nyu_", "navi_")
    ):
        return f"{float(value):.3f}" if value else "–"
    return value
