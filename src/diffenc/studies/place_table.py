"""The table of places as rows: made for a model, kept in a CSV file, and joined with older rows."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from diffenc.checks.arguments import whole
from diffenc.config import check_choice
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError
from diffenc.models import describe
from diffenc.models.base import Backbone
from diffenc.storage.lines import format_csv, parse_csv
from diffenc.storage.names import exists
from diffenc.storage.reading import read_text
from diffenc.storage.writing import write_text
from diffenc.studies.place_costs import Cost, Speed, costs_of, speeds_of
from diffenc.studies.places import TEXTS, Figures, Measure, Text
from diffenc.studies.probes import (
    Done,
    Progress,
    open_encoder,
    require_distinct,
    side_of,
    tap_order,
)

Row: TypeAlias = dict[str, str]
"""A row of the table: texts by column; a column that is missing is empty."""

KEY = ("model", "size", "tap", "timestep", "text")
"""Columns that name a place; no two rows agree in all of them."""

COSTS = ("parameters_m", "gflop", "ms", "images_per_s", "batch", "dtype", "hardware")


def place_table(
    model: "str | Backbone" = "shapes",
    measures: Sequence[Measure] = (),
    *,
    name: str | None = None,
    taps: Sequence[str] | None = None,
    timesteps: Sequence[int] = (50, 261),
    texts: Sequence[Text] = TEXTS,
    size: int | None = None,
    batch_size: int = 16,
    timed: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    hardware: str = "",
    progress: Progress | None = None,
    keep: Callable[[list[Row]], object] | None = None,
) -> list[Row]:
    """Cost of every tap of a model, and figures of every tap, timestep and text.

    Without measures and times nothing is loaded: parameters and arithmetic follow from the configs,
    and there is one row for each tap, with neither timestep nor text.

    Args:
        model: Alias, Hub id or folder of a diffusion model, or a loaded `Backbone`.
        measures: Tasks that give figures, see `diffenc.studies.place_data`.
        name: Name of the model in the table; None takes that of the alias or of the folder.
        taps: Module paths or globs of the places to read; None takes the blocks and the model's
            default taps.
        timesteps: Scheduler steps of the noise levels, each 0 to 999.
        texts: Texts to read under, "none" and "text".
        size: Side of the pictures in pixels; None is the model's own.
        batch_size: Number of rows (pictures x timesteps) per call, and of pictures in a timed
            batch.
        timed: Whether calls are timed.
        device: Device that the model runs on; unused for a `Backbone`.
        dtype: Floating point type of the denoiser; unused for a `Backbone`.
        hardware: Name of what it runs on, for the table.
        progress: Function that is called with the steps that are done and the number of all.
        keep: Function that is called with all rows after each measure.

    Raises:
        ConfigError: A number or a word out of range.
        BackboneError: The model is unknown, missing or broken.
        TapError: A tap does not exist in this model.

    Examples:
        >>> rows = place_table("shapes", taps=["mid_block"], timed=False)
        >>> rows[0]["parameters_m"], rows[0]["gflop"]
        ('1.9', '0.117')
    """
    whole("batch_size", batch_size, least=1)
    require_distinct("texts", texts)
    for text in texts:
        check_choice("texts", text, TEXTS)
    if not measures and not timed and not isinstance(model, Backbone):
        architecture = describe(model)
        names = tap_order(architecture.taps(), taps, architecture.default_taps)
        side = size or architecture.default_size
        costs = costs_of(architecture, names, side)
        common = {"model": name or model_label(model), "size": str(side)}
        return [{**common, "tap": tap, **_cost(cost)} for tap, cost in costs.items()]
    encoder = open_encoder(
        model,
        taps=taps,
        timesteps=timesteps,
        size=size,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    return _measured(encoder, measures, name, texts, timed, hardware, progress, keep)


def _measured(
    encoder: DiffusionEncoder,
    measures: Sequence[Measure],
    name: str | None,
    texts: Sequence[Text],
    timed: bool,
    hardware: str,
    progress: Progress | None,
    keep: Callable[[list[Row]], object] | None,
) -> list[Row]:
    names, side = encoder.config.taps or (), side_of(encoder)
    costs = costs_of(encoder.backbone, names, side)
    speeds = speeds_of(encoder, texts) if timed else {}
    common = {"model": name or model_label(encoder.backbone.name), "size": str(side)}
    rows: dict[tuple[str, int, Text], Row] = {}
    for tap in names:
        for timestep in encoder.config.timesteps:
            for text in texts:
                row = {**common, "tap": tap, "timestep": str(timestep), "text": text}
                row |= _cost(costs[tap])
                if (tap, text) in speeds:
                    row |= _speed(speeds[tap, text])
                    row |= {
                        "dtype": str(encoder.dtype).removeprefix("torch."),
                        "hardware": hardware,
                    }
                rows[tap, timestep, text] = row
    done = Done(progress, sum(measure.total for measure in measures))
    for measure in measures:
        _enter(rows, measure.measure(encoder, texts, done.add))
        encoder.clear_cache()
        if keep is not None:
            keep(list(rows.values()))
    return list(rows.values())


def _enter(rows: Mapping[tuple[str, int, Text], Row], figures: Figures) -> None:
    for place, each in figures.items():
        rows[place].update({column: f"{value:.4f}" for column, value in each.items()})


def _cost(cost: Cost) -> Row:
    return {
        "parameters_m": f"{cost.parameters / 1e6:.1f}",
        "gflop": f"{cost.operations / 1e9:.{1 if cost.operations >= 1e10 else 3}f}",
    }


def _speed(speed: Speed) -> Row:
    return {
        "ms": f"{1000 * speed.seconds:.1f}",
        "images_per_s": f"{speed.images_per_second:.1f}",
        "batch": str(speed.batch),
    }


def model_label(model: object) -> str:
    """Name of a model in the table: its alias, or the last part of its folder or Hub id."""
    return Path(str(model)).name


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file that `write_rows` wrote; none where there is no file.

    Raises:
        ConfigError: The file is no such table.
    """
    if not exists(path):
        return []
    lines = parse_csv(read_text(path), where=str(path))
    columns = lines[0][1] if lines else []
    if tuple(columns[: len(KEY)]) != KEY:
        raise ConfigError(
            f"{path} is no table of places: its columns must begin with {', '.join(KEY)}; name "
            "another file, or remove it"
        )
    rows = []
    for number, cells in lines[1:]:
        if len(cells) != len(columns):
            raise ConfigError(
                f"{path}, line {number} has {len(cells)} cells where the header has {len(columns)}"
            )
        rows.append({column: cell for column, cell in zip(columns, cells, strict=True) if cell})
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as CSV, whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    columns = columns_of(rows)
    write_text(path, format_csv(columns, [[row.get(c, "") for c in columns] for row in rows]))


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Columns of a table: the place, costs, then figures in the order in which they came."""
    known = dict.fromkeys((*KEY, *COSTS))
    known.update(dict.fromkeys(column for row in rows for column in row))
    return list(known)


def joined(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Older rows with what was measured now: of one place the newer figures count.

    Rows of costs alone make room for rows of the same tap with figures, and are left out where
    there are such rows.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    for row in (*old, *new):
        key = tuple(row.get(column, "") for column in KEY)
        rows[key] = {**rows.get(key, {}), **row}
    full = {key[:3] for key in rows if key[3]}
    return [row for key, row in rows.items() if key[3] or key[:3] not in full]
