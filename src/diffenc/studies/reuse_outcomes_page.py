"""The study of what scores and answers lose under reuse as a page and as tables."""

from diffenc.evals.tables import Table
from diffenc.studies.pages import page, paragraph, section
from diffenc.studies.reuse_answers import LARGEST_LOSS, PARTS, TURNED, questions_needed
from diffenc.studies.reuse_outcomes import ReuseOutcomes

_SCORES = """\
Scores: pictures of pairs that differ in one thing, under the captions of all of them. Agreement: \
Spearman's rank correlation of a picture's scores over texts, exact and with reuse. Moved: length \
of the difference over that of the exact scores, both without the mean over texts. Matched: \
pictures whose own caption scores above that of their pair's other picture (guessing: 50 %)."""

_ANSWERS = """\
Answers: language models that were trained without reuse answer the same questions on held-out \
scenes, the question as the encoder's prompt, exactly and with reuse; nothing is trained anew. \
Each model is asked about scenes of its own."""

_LOSSES = f"""\
Lost: right answers without reuse less those with it, question by question; the interval is over \
questions (95 %, for these models), the deviation over models. "At most {100 * LARGEST_LOSS:g} \
point is lost" holds where the whole interval is at or below it, is the opposite where the whole \
is above, and else is not decided. Where {100 * TURNED:g} % of the answers turn right or wrong and \
nothing is lost, {questions_needed()} questions decide it with a chance of 80 %."""


def to_markdown(study: ReuseOutcomes, *, command: str, made_with: str) -> str:
    """A page of tables.

    Args:
        study: Results of the study.
        command: Command that makes this page.
        made_with: Versions, hardware and time, in a sentence.
    """
    settings = study.settings
    blocks = [paragraph(_SCORES), section("scores", score_table(study))]
    if study.answers:
        blocks += [paragraph(_ANSWERS), section("answers", answer_table(study))]
        blocks += [paragraph(_LOSSES), section("losses", loss_table(study))]
        blocks += [example_table(study).to_markdown()]
    return page(
        "# Scores and answers where half of the U-Net runs without the text",
        f"`{command}`",
        paragraph(
            f"Model `{study.model}` in {settings['dtype']}; {settings['pictures']} pictures per "
            f"seed, {settings['seeds']} seeds, given as mean ± sample standard deviation; "
            f"{settings['questions']} questions for each language model. {made_with}"
        ),
        *blocks,
    )


def score_table(study: ReuseOutcomes) -> Table:
    """Figures of each kind of score, part and timestep."""
    columns = (
        "score",
        "reuse",
        "t",
        "agreement",
        "moved (%)",
        "matched, exact (%)",
        "matched, reused (%)",
    )
    rows = tuple(
        (
            row.preset,
            row.part,
            str(row.timestep),
            f"{row.agreement:.3f}",
            f"{row.moved.percent:.1f}",
            f"{row.exact.percent:.1f}",
            f"{row.reused.percent:.1f}",
        )
        for row in study.scores
    )
    return Table("Scores", columns, rows)


def answer_table(study: ReuseOutcomes) -> Table:
    """Right answers of each language model, and how many answers changed."""
    columns = (
        "language model",
        "right, exact (%)",
        *(f"right, {part} (%)" for part in PARTS),
        *(f"changed, {part} (%)" for part in PARTS),
    )
    rows = tuple(
        (
            each.model,
            f"{100 * each.exact:.1f}",
            *(f"{100 * each.reused[part]:.1f}" for part in PARTS),
            *(f"{100 * each.changed[part]:.1f}" for part in PARTS),
        )
        for each in study.answers
    )
    return Table("Answers of trained language models", columns, rows)


def loss_table(study: ReuseOutcomes) -> Table:
    """What all models lose together, and whether that is little enough."""
    columns = (
        "reuse",
        "questions",
        "right to wrong",
        "wrong to right",
        "lost (points)",
        "95 % interval",
        "lost, by model",
        f"at most {100 * LARGEST_LOSS:g} point lost",
    )
    rows = tuple(
        (
            row.part,
            str(row.questions),
            *map(str, row.turned),
            f"{100 * row.lost:+.2f}",
            f"{100 * row.interval[0]:+.2f} to {100 * row.interval[1]:+.2f}",
            f"{row.by_model.percent:+.2f}",
            row.verdict,
        )
        for row in study.losses
    )
    return Table("What answers lose, all models together", columns, rows)


def example_table(study: ReuseOutcomes) -> Table:
    """The first questions and answers of the first language model."""
    columns = ("question", "true", "exact", *PARTS)
    examples = study.answers[0].examples
    return Table(
        f"What {study.answers[0].model} says",
        columns,
        tuple(tuple(each[column] for column in columns) for each in examples),
    )
