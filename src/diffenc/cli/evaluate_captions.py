"""`diffenc evaluate captions`: what a model says of pictures."""

from typing import TYPE_CHECKING, Annotated

import typer

from diffenc.cli.evaluate_answers_command import asks_a_model
from diffenc.cli.evaluate_answers_options import (
    PROMPTS,
    Annotations,
    CocoData,
    DataSeed,
    Limit,
    Metrics,
    Split,
    TokenizerOption,
)
from diffenc.cli.evaluate_answers_run import Asked
from diffenc.cli.evaluate_captions_data import caption_tokens, known_metrics, read_captions

if TYPE_CHECKING:
    from diffenc.evals.captioning import CaptionEvaluation
    from diffenc.evals.tables import Table

_SHOWN = 5
_FirstPrompts = Annotated[
    str | None,
    typer.Option(
        metavar="POLICY",
        help=f"{PROMPTS} Of the first pass; default empty. caption: true ones, an oracle.",
    ),
]


@asks_a_model("captions", prompts=_FirstPrompts)
def captions(
    asked: Asked,
    data: CocoData,
    annotations: Annotations = None,
    split: Split = None,
    passes: Annotated[
        int,
        typer.Option(min=1, help="Each but the first has the captions of the one before as text."),
    ] = 1,
    metric: Metrics = None,
    tokenizer: TokenizerOption = "ptb",
    limit: Limit = None,
    data_seed: DataSeed = None,
) -> None:
    """Caption pictures, once or in several passes.

    Without --metric some captions are shown; metrics are added by the same command with --metric,
    and nothing is captioned again.
    """
    from diffenc.evals.captioning import evaluate_captions
    from diffenc.evals.captioning.evaluate import QUESTION, caption_table

    metrics = known_metrics(metric, tokenizer)
    model = asked.open_model(caption_tokens(data), prompts="empty")
    found_data = read_captions(data, annotations, split, limit, data_seed)
    samples = {item.id: (QUESTION, item.references) for item in found_data.items}
    prompts = asked.draw_prompts(model, samples)
    titles = ["captioning", *(f"captioning, pass {k}" for k in range(2, passes + 1))]
    with asked.answers(*titles) as (file, progress):
        found = evaluate_captions(
            found_data,
            model,
            prompts=prompts,
            passes=passes,
            metrics=metrics,
            tokenizer=tokenizer,  # type: ignore[arg-type]  # checked above
            results=file,
            progress=progress,
            **asked.options,
        )
    table = caption_table([found], paper=asked.paper) if metrics else _samples(found)
    asked.report(
        found.to_dict(),
        [table],
        found.notes if metrics else (*found.notes, "no metric was asked for; see --metric"),
        count=passes * len(found.items),
        fresh=found.fresh,
        miniature=data == "shapes",
    )


def _samples(found: "CaptionEvaluation") -> "Table":
    """The first captions of each pass, beside a reference."""
    from diffenc.evals.tables import Table

    heads = [f"pass {each.number}" for each in found.passes]
    rows = [
        (item.id, *(each.captions[item.id] for each in found.passes), item.references[0])
        for item in found.items[:_SHOWN]
    ]
    title = (
        f"captions of {found.benchmark.name} by {found.model}, {len(rows)} of {len(found.items)}"
    )
    return Table(title, ("image", *heads, "a true one"), tuple(rows))
