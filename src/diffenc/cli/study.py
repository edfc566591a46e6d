"""`diffenc study`: experiments as one command each, written as tables and pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffenc.cli.fields import split_names
from diffenc.cli.noted import NotedCommand
from diffenc.cli.options import Debug, Device, Dtype, Force, to_device, to_dtype
from diffenc.cli.parsing import parse_scales, parse_timesteps
from diffenc.cli.study_budget import budget
from diffenc.cli.study_report import Backbone, Clip, Output, Quick, Seeds, run_and_report
from diffenc.cli.study_table import table
from diffenc.cli.study_vlm import add_studies

if TYPE_CHECKING:
    from diffenc.evals.tables import Table
    from diffenc.studies.features import FeatureStudy
    from diffenc.studies.leakage_readout import LeakageReadout
    from diffenc.studies.parts import PartStudy
    from diffenc.studies.registers import RegisterStudy
    from diffenc.studies.similarity import SimilarityStudy

Taps = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAMES",
        help="Places in the U-Net, with commas or repeated: module paths, globs, or the paper's "
        "names; default the study's own.",
    ),
]
Size = Annotated[
    int | None,
    typer.Option(metavar="PIXELS", help="Side of the pictures; default the model's own."),
]

study = typer.Typer(help="Experiments with a model, written as tables and pictures.")

_QUICK = {"scenes": 30, "seeds": 1, "reader_epochs": 2, "rank": 2}


@study.command(cls=NotedCommand)
def features(
    output: Output = Path("feature-study"),
    backbone: Backbone = "shapes",
    taps: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Places in the U-Net, with commas or repeated; default the blocks and the "
            "model's default taps.",
        ),
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(metavar="T,T", help="Noise levels, 0 to 999; default 10,50,261,500,800."),
    ] = None,
    texts: Annotated[
        str,
        typer.Option(metavar="WORDS", help="Some of uncond, question and caption, with commas."),
    ] = "uncond,question,caption",
    scenes: Annotated[
        int, typer.Option(help="Number of scenes per seed for the readouts, 30 or more.")
    ] = 240,
    focus_scenes: Annotated[
        int,
        typer.Option(help="Number of scenes per seed that show where a text acts; 0 for none."),
    ] = 60,
    seeds: Seeds = 3,
    size: Size = None,
    batch_size: Annotated[int, typer.Option(help="Number of scenes x timesteps per pass.")] = 48,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """Which tap and timestep carries colour, shape, position and count.

    Linear readouts on frozen features of held-out scenes of coloured shapes, without a text, under
    a question and under a caption; then whether a text acts inside the object that it names. Takes
    some minutes with the bundled model on one core.
    """
    steps = None if timesteps is None else parse_timesteps(timesteps)
    conditionings = tuple(name.strip() for name in texts.split(",") if name.strip())

    from diffenc.studies.features import TIMESTEPS, study_features
    from diffenc.studies.features_page import draw_features, to_markdown

    run_and_report(
        output,
        "features",
        lambda progress: study_features(
            backbone,
            taps=split_names(taps),
            timesteps=TIMESTEPS if steps is None else steps,
            conditionings=conditionings,  # type: ignore[arg-type]  # checked there
            scenes=scenes,
            focus_scenes=focus_scenes,
            seeds=seeds,
            size=size,
            batch_size=batch_size,
            device=to_device(device),
            dtype=to_dtype(dtype),
            progress=progress,
        ),
        page=to_markdown,
        tables=_feature_tables,
        remarks=lambda results: _bundled_remark(results.model),
        draw=draw_features,
        unit="scenes",
        device=device,
        force=force,
    )


@study.command(cls=NotedCommand)
def parts(
    output: Output = Path("part-study"),
    backbone: Backbone = "shapes",
    clip: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="CLIP to fuse with: a folder, a Hub id, shapes-clip, or none."
        ),
    ] = "shapes-clip",
    scenes: Annotated[int, typer.Option(help="Number of scenes per seed, 30 or more.")] = 360,
    seeds: Seeds = 3,
    rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = 8,
    epochs: Annotated[int, typer.Option(help="Epochs of LoRA over the questions.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Number of rows per pass of the U-Net.")] = 16,
    quick: Quick = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """What question, concatenation, CLIP, LoRA and captioner add to answers.

    Small readers answer questions about held-out scenes of coloured shapes from the tokens of each
    part. Takes up to ten minutes with the bundled model on one core.
    """
    from diffenc.studies.parts import study_parts
    from diffenc.studies.parts_page import to_markdown

    options = {"scenes": scenes, "seeds": seeds, "rank": rank, "epochs": epochs}
    run_and_report(
        output,
        "parts",
        lambda progress: study_parts(
            backbone,
            clip=None if clip == "none" else clip,
            batch_size=batch_size,
            device=to_device(device),
            dtype=to_dtype(dtype),
            progress=progress,
            **{**options, **(_QUICK if quick else {})},
        ),
        page=to_markdown,
        tables=_part_tables,
        remarks=_part_remarks,
        unit="passes",
        device=device,
        force=force,
    )


@study.command(cls=NotedCommand)
def similarity(
    output: Output = Path("similarity-study"),
    backbone: Backbone = "shapes",
    data: Annotated[
        str,
        typer.Option(metavar="PATH", help="shapes, or a folder or .zip file of MMVP-VLM."),
    ] = "shapes",
    clip: Clip = "shapes-clip",
    taps: Taps = None,
    timesteps: Annotated[
        str, typer.Option(metavar="T,T", help="Noise levels of the cosines, 0 to 999.")
    ] = "10,50,100,250,500",
    cka_timestep: Annotated[
        int, typer.Option(metavar="T", help="Noise level of the CKA, 0 to 999.")
    ] = 50,
    scales: Annotated[
        str, typer.Option(metavar="S,S", help="Guidance scales that the CKA is taken at.")
    ] = "1,1.5,4,7",
    pool: Annotated[
        str,
        typer.Option(metavar="WORD", help="A picture's vector: flat (all cells) or mean of cells."),
    ] = "flat",
    per_pattern: Annotated[int, typer.Option(help="Number of pairs of each pattern.")] = 15,
    seeds: Seeds = 3,
    size: Size = None,
    batch_size: Annotated[int, typer.Option(help="Number of pictures x timesteps per pass.")] = 40,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """How guidance changes features, and how alike near-same pictures are.

    CKA of unconditional and guided features per tap and guidance scale; mean cosine of the pictures
    of near-same pairs per tap and timestep, beside CLIP's and beside strangers. Takes some minutes
    with the bundled model on one core.
    """
    steps, numbers = parse_timesteps(timesteps), parse_scales(scales)

    from diffenc.studies.similarity import study_similarity
    from diffenc.studies.similarity_page import draw_similarity, to_markdown

    run_and_report(
        output,
        "similarity",
        lambda progress: study_similarity(
            backbone,
            data=data,
            clip=None if clip == "none" else clip,
            taps=split_names(taps),
            timesteps=steps,
            cka_timestep=cka_timestep,
            guidance_scales=numbers,
            pool=pool,  # type: ignore[arg-type]  # checked there
            per_pattern=per_pattern,
            seeds=seeds,
            size=size,
            batch_size=batch_size,
            device=to_device(device),
            dtype=to_dtype(dtype),
            progress=progress,
        ),
        page=to_markdown,
        tables=_similarity_tables,
        remarks=lambda results: _bundled_remark(results.model),
        draw=draw_similarity,
        unit="pairs",
        device=device,
        force=force,
    )


@study.command(cls=NotedCommand)
def reuse(
    output: Output = Path("reuse-study"),
    backbone: Backbone = "shapes",
    taps: Taps = None,
    timesteps: Annotated[
        str, typer.Option(metavar="T,T", help="Noise levels, 0 to 999.")
    ] = "50,261,500",
    scenes: Annotated[int, typer.Option(help="Number of scenes per seed.")] = 120,
    seeds: Seeds = 2,
    size: Size = None,
    batch_size: Annotated[int, typer.Option(help="Number of pictures x timesteps per pass.")] = 24,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """What is lost where the first half of the U-Net runs without the text.

    Drift of features and of word maps, and the answers of linear readouts, for both settings of
    `reuse` at every tap of the decoder.
    """
    steps = parse_timesteps(timesteps)

    from diffenc.studies.reuse import study_reuse
    from diffenc.studies.reuse_page import summary_table, to_markdown

    run_and_report(
        output,
        "reuse",
        lambda progress: study_reuse(
            backbone,
            taps=split_names(taps),
            timesteps=steps,
            scenes=scenes,
            seeds=seeds,
            size=size,
            batch_size=batch_size,
            device=to_device(device),
            dtype=to_dtype(dtype),
            progress=progress,
        ),
        page=to_markdown,
        tables=lambda results: [summary_table(results)],
        remarks=lambda results: _bundled_remark(results.model),
        unit="scenes",
        device=device,
        force=force,
    )


@study.command("reuse-outcomes", cls=NotedCommand)
def reuse_outcomes(
    output: Output = Path("reuse-outcomes"),
    backbone: Backbone = "shapes",
    vlm: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="Trained model that answers questions; repeated."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Work folder of other studies, whose trained models answer too."
        ),
    ] = None,
    training: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Training in --work, such as cfg; default all."),
    ] = None,
    timesteps: Annotated[
        str, typer.Option(metavar="T,T", help="Noise levels of the scores, 0 to 999.")
    ] = "50,389",
    per_pattern: Annotated[
        int, typer.Option(help="Number of pairs of pictures for each of six patterns.")
    ] = 2,
    questions: Annotated[
        int | None,
        typer.Option(
            help="Number of questions for each model; default as many as decide whether one answer "
            "in a hundred is lost."
        ),
    ] = None,
    seeds: Seeds = 2,
    batch_size: Annotated[int, typer.Option(help="Number of rows per pass.")] = 24,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """What scores and answers lose where the first half of the U-Net runs without the text.

    Scores by attention and by predicted noise, and the answers of language models that were trained
    without `reuse`, for both settings of it; what answers lose with its confidence interval.
    """
    steps = parse_timesteps(timesteps)

    from diffenc.studies.reuse_outcomes import study_reuse_outcomes
    from diffenc.studies.reuse_outcomes_page import (
        answer_table,
        loss_table,
        score_table,
        to_markdown,
    )

    run_and_report(
        output,
        "reuse-outcomes",
        lambda progress: study_reuse_outcomes(
            backbone,
            vlms=vlm or (),
            work=work,
            training=training,
            timesteps=steps,
            per_pattern=per_pattern,
            questions=questions,
            seeds=seeds,
            batch_size=batch_size,
            device=to_device(device),
            dtype=to_dtype(dtype),
            progress=progress,
        ),
        page=to_markdown,
        tables=lambda results: [
            score_table(results),
            *([answer_table(results), loss_table(results)] if results.answers else []),
        ],
        remarks=lambda results: _bundled_remark(results.model),
        unit="settings",
        device=device,
        force=force,
    )


@study.command(cls=NotedCommand)
def registers(
    output: Output = Path("register-study"),
    backbone: Backbone = "shapes",
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--image", metavar="FILE", help="Picture to read, repeated; default scenes of shapes."
        ),
    ] = None,
    taps: Taps = None,
    timesteps: Annotated[
        str, typer.Option(metavar="T,T", help="Noise levels, 0 to 999.")
    ] = "50,261",
    ratio: Annotated[
        float, typer.Option(help="Factor by which a register is longer than the median cell.")
    ] = 3.0,
    scenes: Annotated[int, typer.Option(help="Number of scenes per seed, without --image.")] = 48,
    seeds: Seeds = 3,
    size: Size = None,
    batch_size: Annotated[int, typer.Option(help="Number of pictures x timesteps per pass.")] = 48,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """Which taps hold register cells, where, and what those make of the variance.

    A register is a lone cell of huge norm, which principal components see before anything else.
    """
    steps = parse_timesteps(timesteps)
    pictures = None
    if images:
        from diffenc.inputs.images import load_image

        pictures = [load_image(path) for path in images]
    from diffenc.studies.registers import study_registers
    from diffenc.studies.registers_page import draw_registers, to_markdown

    run_and_report(
        output,
        "registers",
        lambda progress: study_registers(
            backbone,
            images=pictures,
            taps=split_names(taps),
            timesteps=steps,
            ratio=ratio,
            scenes=scenes,
            seeds=seeds,
            size=size,
            batch_size=batch_size,
            device=to_device(device),
            dtype=to_dtype(dtype),
            progress=progress,
        ),
        page=to_markdown,
        tables=_register_tables,
        remarks=lambda results: _bundled_remark(results.model),
        draw=draw_registers,
        unit="pictures",
        device=device,
        force=force,
    )


@study.command("leakage-readout", cls=NotedCommand)
def leakage_readout(
    output: Output = Path("leakage-readout-study"),
    backbone: Backbone = "shapes",
    taps: Taps = None,
    timesteps: Annotated[
        str, typer.Option(metavar="T,T", help="Noise levels, 0 to 999.")
    ] = "50,261",
    scales: Annotated[
        str, typer.Option(metavar="S,S", help="Guidance scales that are read at.")
    ] = "1.5,4.5,7",
    scenes: Annotated[int, typer.Option(help="Number of scenes per seed, 30 or more.")] = 240,
    seeds: Seeds = 3,
    size: Size = None,
    batch_size: Annotated[int, typer.Option(help="Number of scenes x timesteps per pass.")] = 48,
    device: Device = "auto",
    dtype: Dtype = "float32",
    force: Force = False,
    _debug: Debug = False,
) -> None:
    """How much of a foreign prompt a linear layer reads, per tap and guidance scale.

    Scenes are encoded under prompts that have nothing to do with them; colour and shape of the
    prompt are read from the averaged features. No language model is trained. Takes some minutes
    with the bundled model on one core.
    """
    steps, numbers = parse_timesteps(timesteps), parse_scales(scales)

    from diffenc.studies.leakage_readout import study_leakage_readout
    from diffenc.studies.leakage_readout_page import draw_leakage_readout, to_markdown

    run_and_report(
        output,
        "leakage-readout",
        lambda progress: study_leakage_readout(
            backbone,
            taps=split_names(taps),
            timesteps=steps,
            guidance_scales=numbers,
            scenes=scenes,
            seeds=seeds,
            size=size,
            batch_size=batch_size,
            device=to_device(device),
            dtype=to_dtype(dtype),
            progress=progress,
        ),
        page=to_markdown,
        tables=_readout_tables,
        remarks=lambda results: _bundled_remark(results.model),
        draw=draw_leakage_readout,
        unit="scenes",
        device=device,
        force=force,
    )


study.command(cls=NotedCommand)(budget)
study.command(cls=NotedCommand)(table)
add_studies(study)


def _register_tables(results: "RegisterStudy") -> "list[Table]":
    from diffenc.studies.registers_page import register_table

    return [register_table(results, timestep) for timestep in results.timesteps]


def _readout_tables(results: "LeakageReadout") -> "list[Table]":
    from diffenc.studies.leakage_readout import WORDS
    from diffenc.studies.leakage_readout_page import finding_table, findings_of, word_table

    words = [word_table(results, word) for word in WORDS]
    return [*words, finding_table(findings_of(results))]


def _similarity_tables(results: "SimilarityStudy") -> "list[Table]":
    from diffenc.studies.similarity import PAIR
    from diffenc.studies.similarity_page import (
        cka_table,
        cosine_table,
        finding_table,
        findings_of,
    )

    return [cka_table(results), cosine_table(results, PAIR), finding_table(findings_of(results))]


def _bundled_remark(model: str) -> list[str]:
    bundled = "The bundled model knows coloured shapes only; so do the scenes of this study."
    return [bundled] if model == "shapes" else []


def _feature_tables(results: "FeatureStudy") -> "list[Table]":
    from diffenc.studies.features_page import best_table, focus_table, input_table

    focus = [focus_table(results)] if results.focus else []
    return [input_table(results), best_table(results), *focus]


def _part_tables(results: "PartStudy") -> "list[Table]":
    from diffenc.studies.parts_page import accuracy_table, gain_table, norm_table

    return [accuracy_table(results), gain_table(results), norm_table(results)]


def _part_remarks(results: "PartStudy") -> list[str]:
    from diffenc.studies.pages import by_reason

    missing = by_reason(results.missing).items()
    return [f"not studied: {', '.join(parts)} ({reason})" for reason, parts in missing]
