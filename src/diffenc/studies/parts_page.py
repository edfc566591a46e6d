"""The study of the parts as tables, and as a page of Markdown."""

from diffenc.evals.tables import Table
from diffenc.studies.pages import by_reason, page, section
from diffenc.studies.parts import COMPARISONS, PartStudy
from diffenc.studies.parts_run import Part
from diffenc.studies.spreads import written
from diffenc.studies.token_readers import ASKED, READERS, Reader

NAMES: dict[Part, str] = {
    "uncond": "no text",
    "cond": "question",
    "concat": "no text and question, side by side",
    "clip": "CLIP alone",
    "clip+uncond": "CLIP and no text, by channel",
    "clip+cond": "CLIP and question, by channel",
    "lora": "question, LoRA trained",
    "lora-empty": "empty prompt, LoRA trained",
    "captioner": "no text, captioner trained",
}
READER_NAMES: dict[Reader, str] = {"told": "told the question", "blind": "not told"}

_WHAT_IS_READ = """\
Each scene has two or three objects and gets three questions, after colour, shape and position of \
one of them ("what color is the circle?"). A reader is one attention over the tokens and a linear \
layer on what it gathers; a fresh one is fitted to the tokens of each part and measured on scenes \
that neither it nor anything else was fitted to. A reader that is told the question, as a language \
model is, can look for the object itself. One that is not told knows only which property is asked \
for: which object is meant must stand in the tokens, so without a text it can but guess among the \
objects of the scene."""

_WHAT_IS_TRAINED = """\
LoRA and the captioner are trained on the scenes that the readers are fitted to, with readers of \
their own, by as many passes of the U-Net each. What the captioner gains may come from training on \
such questions at all. LoRA has a control: with the empty prompt it is trained on the same \
questions to the same scenes, in the same order and as many steps; its readers know of the \
question what they always know, and the U-Net nothing. What it gains over no text there is owed to \
training, and only what LoRA with the question gains beyond that to the text."""

_WHAT_NORMS_DO = """\
A probe names the kind of object (24 kinds) in each cell from what a projector (`mlp2x_gelu`, 64 \
wide, learning rate 1e-3) gives, with and without a layer norm per tap. Features are taken as they \
are, and with one tap a hundred times as large, which is what some taps of large models are \
against others."""


def accuracy_table(study: PartStudy) -> Table:
    """Accuracy per part and reader, then chance."""
    rows = []
    for reader in READERS:
        for part in study.parts:
            row = study.find(part, reader)
            assert row is not None
            spreads = [*(row.accuracy[name] for name in ASKED), row.mean]
            cells = [f"{spread:.2f}" for spread in spreads]
            rows.append((NAMES[part], READER_NAMES[reader], *cells))
    chance = [study.chance[name] for name in ASKED]
    cells = [f"{value:.2f}" for value in (*chance, sum(chance) / len(chance))]
    rows.append(("most frequent answer", "", *cells))
    return Table("accuracy of answers", ("tokens", "reader", *ASKED, "mean"), tuple(rows))


def gain_table(study: PartStudy) -> Table:
    """Mean accuracy of a part less that of another, and in how many seeds it is above."""
    rows = []
    for part, base in COMPARISONS:
        gains = [gain for reader in READERS if (gain := study.gain(part, base, reader))]
        if gains:
            cells = [f"{gain:+.3f}" for gain in gains]
            rows.append((NAMES[part], NAMES[base], *cells, ", ".join(gain.won for gain in gains)))
    readers = (READER_NAMES[reader] for reader in READERS)
    columns = ("tokens", "against", *readers, "seeds won")
    return Table("gains in mean accuracy", columns, tuple(rows))


def norm_table(study: PartStudy) -> Table:
    """Accuracy of the probe per scaling of the taps, without norms and with them."""
    accuracies = {(row.scales, row.norm): row.accuracy for row in study.norms}
    rows = []
    for scales in dict.fromkeys(row.scales for row in study.norms):
        sizes = (f"{scale * rms:.3g}" for scale, rms in zip(scales, study.rms, strict=True))
        cells = (f"{accuracies[scales, norm]:.2f}" for norm in (False, True))
        rows.append((", ".join(sizes), *cells))
    columns = ("scale of the taps", "no norm", "norm per tap")
    return Table("a probe through the projector", columns, tuple(rows))


def text_in_lora(study: PartStudy) -> str:
    """A sentence on how much of what LoRA gains is owed to the text; "" where it is not known."""
    clauses = []
    for reader in READERS:
        owed = study.lora_by_text(reader)
        if owed is None:
            return ""
        with_text = written(study.gain("lora", "cond", reader), "+.3f")
        without = written(study.gain("lora-empty", "uncond", reader), "+.3f")
        clauses.append(
            f"read by a reader that is {READER_NAMES[reader]}, LoRA adds {with_text} to the "
            f"question's tokens and {without} to those of no text, so that "
            f"{owed:+.3f} is owed to the text (above zero in {owed.won} seeds)"
        )
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}."


def to_markdown(study: PartStudy, *, command: str, made_with: str) -> str:
    """A page of tables.

    Args:
        study: Results of the study.
        command: Command that makes this page.
        made_with: Versions, hardware and time, in a sentence.
    """
    settings = study.settings
    return page(
        "# What each part adds",
        f"`{command}`",
        f"Model `{study.model}`, taps {', '.join(f'`{tap}`' for tap in study.taps)} at timestep "
        f"{settings['timestep']} on a grid of {settings['grid']} in {settings['dtype']}; CLIP: "
        f"{'none' if study.clip is None else f'`{study.clip}`'}. {settings['seeds']} seeds of "
        f"{settings['scenes']} held-out scenes, of which two thirds are fitted to; LoRA of rank "
        f"{settings['rank']}; given as mean ± standard deviation over seeds. {made_with}",
        *(
            f"Not studied: {'; '.join(NAMES[part] for part in parts)} ({reason})."
            for reason, parts in by_reason(study.missing).items()
        ),
        "## Accuracy of the answers",
        _WHAT_IS_READ,
        section("accuracy", accuracy_table(study)),
        _WHAT_IS_TRAINED,
        "## Gains",
        "Differences of the last column above, within each seed.",
        section("gains", gain_table(study)),
        text_in_lora(study),
        "## Layer norm before the projector",
        _WHAT_NORMS_DO,
        "Scale: root mean square of each tap's features, in the order of the taps.",
        section("norms", norm_table(study)),
    )
