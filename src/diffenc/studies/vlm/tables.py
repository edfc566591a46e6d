"""Tables of a study: for the terminal and for its page."""

from collections.abc import Mapping

from diffenc.evals.tables import Table
from diffenc.mllm.training.config import TrainConfig
from diffenc.studies.spreads import written
from diffenc.studies.vlm.measurements import FIGURES, NEAR_SAME, Measurement, parse_prompting
from diffenc.studies.vlm.plan import StudyPlan
from diffenc.studies.vlm.study import VlmStudy
from diffenc.studies.vlm.trainings import LEARNS

KINDS: Mapping[str, str] = {
    "captions": "Captions of held-out pictures",
    "leakage": "Captions under the caption of another picture",
    "answers": "Answers to questions about held-out pictures",
    "mmvp": "Pairs of near-same pictures, as in MMVP",
    "pairs": "Pairs of near-same pictures, asked in words",
}
MEANINGS: Mapping[str, str] = {
    "captions": (
        "named: of the objects in the pictures, those that captions name by colour and shape; "
        "objects: of the objects that captions name, those that are there; right: captions that "
        "are true from end to end; relations: of the captions that say how two objects lie, those "
        "that say it right; unread: captions that are none of coloured shapes, and count as wrong; "
        "all in percent. cider: CIDEr times 100 against five true captions, "
        "with a tokenizer that needs no Java, so that it does not compare with the paper's."
    ),
    "leakage": (
        "read: how much of the foreign prompt is said, 0 to 100, less what is said of it under "
        "another foreign prompt (said less base); named and right: as for captions, of the picture "
        "itself; unread: captions that are none; cider: against the foreign prompt, as in the "
        "paper's table 6."
    ),
    "answers": (
        "Percent of answers that are right, of all and by what is asked for; kinds of questions "
        "take turns. guess: what the most frequent answer of each kind would reach; unread: "
        "percent of answers that are none of those that make sense, which count as wrong."
    ),
    "mmvp": (
        "pairs: percent of pairs with both answers right, the benchmark's own number; questions: "
        "percent of single answers; chance: pairs by guessing, below which a model stays that "
        "answers both pictures alike; unread: percent of answers that mean no single option, and "
        "count as wrong."
    ),
    "pairs": (
        "The same questions without options, answered in words. pairs: percent of pairs with both "
        "answers right; questions: percent of single answers; chance: pairs by guessing between "
        "the two right answers; unread: percent of answers that fit no question of their kind."
    ),
}


def figure_tables(study: VlmStudy) -> dict[str, Table]:
    """By kind of measurement: trainings and measurements down, figures across."""
    kinds = {each.kind for each in study.plan.measurements.values()}
    return {kind: _figures(study, kind) for kind in FIGURES if kind in kinds}


def finding_table(study: VlmStudy) -> Table:
    """Table of the findings, each with its verdict."""
    rows = tuple(
        (each.finding.statement, each.outcome, unread_cell(each.unread)) for each in study.findings
    )
    return Table("Findings of the paper", ("finding", "here", "unread, %"), rows)


def unread_cell(percentage: float | None) -> str:
    """Percentage of unread answers as a cell; a dash where answers are not read."""
    return "–" if percentage is None else f"{percentage:.1f}"


def training_table(plan: StudyPlan) -> Table:
    """Table of the trainings."""
    rows = []
    for training in plan.trainings.values():
        config = plan.config(training.name)
        optim = config.optimizing
        steps = -(-plan.data.scenes // optim.batch_size) * optim.epochs
        start = plan.trainings[training.start].label if training.start else "–"
        schedule = f"{steps} of {optim.batch_size}, rate {optim.learning_rate:g}"
        what = LEARNS[training.learns_from]
        parts = _learning(config)
        rows.append((training.label, what, parts, start, training.prompts, schedule))
    columns = ("training", "learns", "what is trained", "starts from", "prompts", "steps")
    return Table("Trainings", columns, tuple(rows))


def measurement_table(plan: StudyPlan) -> Table:
    """Table of the measurements."""
    rows = []
    for each in plan.measurements.values():
        prompts = _prompts(plan, each)
        options = ", ".join(f"{key} = {value}" for key, value in each.options.items())
        what = "pairs a pattern" if each.kind in NEAR_SAME else "pictures"
        many = f"{each.items} {what}"
        passes = f", {each.passes} passes" if each.passes > 1 else ""
        rows.append((each.label, each.kind, prompts, f"{many}{passes}", options or "–"))
    columns = ("measurement", "kind", "prompt of the encoder", "a seed", "options")
    return Table("Measurements", columns, tuple(rows))


def _figures(study: VlmStudy, kind: str) -> Table:
    names = list(FIGURES[kind])
    rows = []
    for training, measurement in study.plan.pairs():
        cell = study.cell(training.name, measurement.name)
        if measurement.kind != kind or cell is None:
            continue
        for number, suffix in _passes(measurement):
            values = [cell.figures.get(f"{name}{suffix}") for name in names]
            cells = (written(value, ".1f", nothing="–") for value in values)
            rows.append((training.label, f"{measurement.label}{number}", *cells))
    shown = [k for k in range(len(names)) if any(row[k + 2] != "–" for row in rows)]
    columns = ("training", "prompt or measurement", *(names[k] for k in shown))
    kept = tuple((*row[:2], *(row[k + 2] for k in shown)) for row in rows)
    return Table(KINDS[kind], columns, kept)


def _passes(measurement: Measurement) -> list[tuple[str, str]]:
    """Text that is added to the label and to the names of figures, per pass."""
    if measurement.passes == 1:
        return [("", "")]
    return [(f", pass {k}", f".{k}") for k in range(1, measurement.passes + 1)]


def _learning(config: TrainConfig) -> str:
    """Names of the parts that train."""
    adapt = config.adapting
    parts = ["projector"]
    if adapt.language_model != "none":
        lora = " (LoRA)" if adapt.language_model == "lora" else ""
        parts.append(f"language model{lora}")
    parts += ["LoRA on the U-Net"] * bool(adapt.unet_rank)
    parts += ["captioner"] * bool(config.model.captioner)
    return ", ".join(parts)


def _prompts(plan: StudyPlan, measurement: Measurement) -> str:
    if measurement.kind == "leakage":
        return "a caption of another picture"
    prompting = parse_prompting(measurement.prompts)
    parts = ["the question"] * prompting.question + ["a true caption"] * prompting.oracle
    if prompting.writer is not None:
        parts.append(f"the caption by {plan.trainings[prompting.writer].label}")
    return " and ".join(parts) or "none"
