"""The study of the parts as tables, and as a page of Markdown."""

from collections.abc import Iterator

from diffenc.studies.markdown import number, section, signed, table
from diffenc.studies.parts_results import (
    ASKED,
    COMPARISONS,
    READERS,
    Part,
    PartStudy,
    Reader,
)

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


def part_columns() -> list[str]:
    """Heads of `part_rows`."""
    return ["tokens", "reader", *ASKED, "mean"]


def part_rows(study: PartStudy) -> list[list[str]]:
    """Accuracy per part and reader, then chance."""
    rows = []
    for reader in READERS:
        for part in study.parts:
            row = study.find(part, reader)
            assert row is not None
            cells = [number(row.accuracy[name]) for name in ASKED]
            rows.append([NAMES[part], READER_NAMES[reader], *cells, number(row.mean)])
    chance = [study.chance[name] for name in ASKED]
    cells = [f"{value:.2f}" for value in (*chance, sum(chance) / len(chance))]
    return [*rows, ["most frequent answer", "", *cells]]


def gain_columns() -> list[str]:
    """Heads of `gain_rows`."""
    return ["tokens", "against", *(READER_NAMES[reader] for reader in READERS), "seeds won"]


def gain_rows(study: PartStudy) -> list[list[str]]:
    """Mean accuracy of a part less that of another, and in how many seeds it is above."""
    rows = []
    for part, base in COMPARISONS:
        gains = [study.gain(part, base, reader) for reader in READERS]
        if None in gains:
            continue
        won = [
            f"{sum(value > 0 for value in gain.values)} of {len(gain.values)}"
            for gain in gains
            if gain is not None
        ]
        rows.append([NAMES[part], NAMES[base], *map(signed, gains), ", ".join(won)])
    return rows


def text_in_lora(study: PartStudy) -> str:
    """A sentence on how much of what LoRA gains is owed to the text; "" where it is not known."""
    told = []
    for reader in READERS:
        asked, empty = (
            study.gain("lora", "cond", reader),
            study.gain("lora-empty", "uncond", reader),
        )
        owed = study.lora_by_text(reader)
        if owed is None:
            return ""
        won = sum(value > 0 for value in owed.values)
        told.append(
            f"read by a reader that is {READER_NAMES[reader]}, LoRA adds {signed(asked)} to the "
            f"question's tokens and {signed(empty)} to those of no text, so that "
            f"{signed(owed)} is owed to the text (above zero in {won} of {len(owed.values)} seeds)"
        )
    sentence = "; ".join(told)
    return f"{sentence[0].upper()}{sentence[1:]}."


def norm_columns() -> list[str]:
    """Heads of `norm_rows`."""
    return ["scale of the taps", "no norm", "norm per tap"]


def norm_rows(study: PartStudy) -> list[list[str]]:
    """Accuracy of the probe per scaling of the taps, without norms and with them."""
    found = {(row.scales, row.norm): row.accuracy for row in study.norms}
    return [
        [
            ", ".join(f"{scale * rms:.3g}" for scale, rms in zip(scales, study.rms, strict=True)),
            number(found[scales, False]),
            number(found[scales, True]),
        ]
        for scales in dict.fromkeys(row.scales for row in study.norms)
    ]


def to_markdown(study: PartStudy, *, command: str, made_with: str) -> str:
    """A page of tables.

    Args:
        study: Results of the study.
        command: Command that makes this page.
        made_with: Versions, hardware and time, in a sentence.
    """
    return "\n".join(_lines(study, command, made_with)).rstrip() + "\n"


def _lines(study: PartStudy, command: str, made_with: str) -> Iterator[str]:
    settings = study.settings
    yield from ("# What each part adds", "", f"`{command}`", "")
    yield (
        f"Model `{study.model}`, taps {', '.join(f'`{tap}`' for tap in study.taps)} at timestep "
        f"{settings['timestep']} on a grid of {settings['grid']} in {settings['dtype']}; CLIP: "
        f"{'none' if study.clip is None else f'`{study.clip}`'}. {settings['seeds']} seeds of "
        f"{settings['scenes']} held-out scenes, of which two thirds are fitted to; LoRA of rank "
        f"{settings['rank']}; given as mean ± standard deviation over seeds. {made_with}"
    )
    yield ""
    for reason in dict.fromkeys(study.missing.values()):
        parts = [NAMES[part] for part in study.missing if study.missing[part] == reason]
        yield from (f"Not studied: {'; '.join(parts)} ({reason}).", "")
    yield from ("## Accuracy of the answers", "", _WHAT_IS_READ, "")
    yield from section("accuracy", table(part_columns(), part_rows(study)))
    yield from ("", _WHAT_IS_TRAINED, "", "## Gains", "")
    yield "Differences of the last column above, within each seed."
    yield ""
    yield from section("gains", table(gain_columns(), gain_rows(study)))
    yield from ("", text_in_lora(study))
    yield from ("", "## Layer norm before the projector", "", _WHAT_NORMS_DO, "")
    yield "Scale: root mean square of each tap's features, in the order of the taps."
    yield ""
    yield from section("norms", table(norm_columns(), norm_rows(study)))
