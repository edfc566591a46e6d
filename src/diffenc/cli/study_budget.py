"""`diffenc study budget`: accuracy against the number of tokens of a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffenc.cli.options import Debug, Device, Dtype, Force, to_device, to_dtype
from diffenc.cli.study_report import Backbone, Clip, Output, Quick, Seeds, run_and_report

if TYPE_CHECKING:
    from diffenc.evals.tables import Table
    from diffenc.studies.budget import BudgetStudy

_QUICK = {"scenes": 30, "validation": 30, "seeds": 1, "reader_epochs": 2}


def budget(
    output: Output = Path("budget-study"),
    backbone: Backbone = "shapes-many",
    clip: Clip = "shapes-many-clip",
    scenes: Annotated[int, typer.Option(help="Number of scenes per seed, 30 or more.")] = 240,
    validation: Annotated[
        int, typer.Option(help="Number of scenes that settings are chosen on, 30 or more.")
    ] = 240,
    seeds: Seeds = 3,
    batch_size: Annotated[int, typer.Option(help="Number of scenes per pass of the U-Net.")] = 16,
    quick: Quick = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """How many tokens a picture needs: cells of a grid, words of the question, or both.

    Small readers answer questions about crowded held-out scenes, told the question or asked through
    the encoder only. Takes some ten minutes with the bundled model on one core.
    """
    from diffenc.studies.budget import study_budget
    from diffenc.studies.budget_page import draw_budget, to_markdown

    options = {"scenes": scenes, "validation": validation, "seeds": seeds}
    run_and_report(
        output,
        "budget",
        lambda progress: study_budget(
            backbone,
            clip=None if clip == "none" else clip,
            batch_size=batch_size,
            device=to_device(device),
            dtype=to_dtype(dtype),
            progress=progress,
            **{**options, **(_QUICK if quick else {})},
        ),
        page=to_markdown,
        tables=_tables,
        remarks=_remarks,
        draw=draw_budget,
        unit="steps",
        device=device,
        force=force,
    )


def _tables(results: "BudgetStudy") -> "list[Table]":
    from diffenc.studies.budget_page import accuracy_table, verdict_table
    from diffenc.studies.token_readers import READERS

    return [*(accuracy_table(results, reader) for reader in READERS), verdict_table(results)]


def _remarks(results: "BudgetStudy") -> list[str]:
    remarks = [f"not studied: clip ({results.missing})"] if results.missing else []
    if results.model == "shapes-many":
        remarks.append("The bundled model knows coloured shapes only; so do the scenes here.")
    return remarks
