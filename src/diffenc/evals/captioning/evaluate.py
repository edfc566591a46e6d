"""Let a model caption pictures, feed its captions back as prompts, and compare with references."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffenc.errors import ConfigError
from diffenc.evals.answerers import Answerer
from diffenc.evals.asking import AnswerEvaluation, Asker, Query, asking
from diffenc.evals.captioning.data import CaptionItem, CaptionSet
from diffenc.evals.captioning.metrics import (
    METRICS,
    TITLES,
    WITHOUT_JAVA,
    CaptionScores,
    Metric,
    require_metrics,
    score_captions,
)
from diffenc.evals.captioning.tokens import Tokenizer
from diffenc.evals.inspection import Progress
from diffenc.evals.items import check_positive
from diffenc.evals.paper import published_table
from diffenc.evals.tables import Table

QUESTION = "Provide a one-sentence caption for the provided image."
"""LLaVA's; the paper does not state its own."""

NO_PICTURE = "picture that can be captioned"

Prompts = Mapping[str, str] | Callable[[CaptionItem], str]
"""Prompt of the encoder for each image: by image id, or as a function of the item."""


@dataclass(frozen=True, slots=True)
class CaptionPass:
    """One round over all pictures.

    Attributes:
        number: Number of the round, 1 for the first.
        prompts: Prompt of the encoder for each image, by id; empty if the model chose its own
            prompts.
        captions: Caption that the model gave each image, by id.
        scores: Agreement with the reference captions; None if no metric was asked for.
    """

    number: int
    prompts: Mapping[str, str]
    captions: Mapping[str, str]
    scores: CaptionScores | None


@dataclass(frozen=True, kw_only=True)
class CaptionEvaluation(AnswerEvaluation[CaptionItem]):
    """Captions of a model in one pass or more.

    Attributes:
        question: Text that the language model was asked.
        passes: Rounds in order; from the second on, the captions of the round before were the
            prompts.
    """

    question: str
    passes: tuple[CaptionPass, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on data, words and items that were left out."""
        scored = self.passes[-1].scores
        words = (f"words by the tokenizer {scored.tokenizer!r}",) if scored else ()
        empty = [f"pass {p.number}: {p.scores.empty}" for p in self.passes if p.scores]
        some = any(p.scores.empty for p in self.passes if p.scores)
        bare = (f"captions without a word count as 0: {', '.join(empty)}",) if some else ()
        return (*super().notes, *words, *bare)

    def to_dict(self) -> dict[str, Any]:
        """Every number, as JSON holds it."""
        return {
            **super().to_dict(),
            "question": self.question,
            "passes": [asdict(each) for each in self.passes],
            "notes": list(self.notes),
        }


def evaluate_captions(
    data: CaptionSet,
    model: Answerer,
    *,
    prompts: Prompts | None = None,
    passes: int = 1,
    question: str = QUESTION,
    metrics: Sequence[Metric] = WITHOUT_JAVA,
    tokenizer: Tokenizer = "ptb",
    results: "Path | None" = None,
    batch_size: int = 8,
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> CaptionEvaluation:
    """Caption every picture, and again with the caption as the encoder's prompt.

    All pictures are looked at, and metrics looked for, before the first caption is made. With a
    results file nothing that is in it is made again.

    Args:
        data: Pictures and their reference captions.
        model: Model that captions the pictures.
        prompts: Prompts of the encoder in the first pass, by image id or as a function of the item;
            None leaves the choice to the model. Reference captions as prompts are an oracle, as in
            rows of the paper's table 4.
        passes: Number of passes, 1 or more; pass k has the captions of pass k - 1 as its prompts.
        question: Text that the language model is asked, the same in every pass.
        metrics: Names of the metrics to compute; an empty sequence only generates captions.
        tokenizer: Tokenizer of the metrics: "ptb" (needs Java) as in published numbers, or
            "simple".
        results: JSON lines file that keeps the captions; None keeps nothing.
        batch_size: Largest number of pictures in one call of the model.
        skip_broken: Whether pictures that cannot be read are left out, instead of raising an error.
        progress: Function that is called with the number of captions of a pass that are done and
            the number of all of them; None reports nothing.

    Raises:
        ConfigError: Broken data, a metric that cannot run here, images without a prompt, or a
            results file of something else.
        MissingExtraError: A metric without pycocoevalcap.
        OutputError: The results file cannot be written.
        ShapeError: The model returns something else than one text per question.

    Examples:
        >>> from diffenc.evals import FunctionAnswerer
        >>> from diffenc.evals.captioning import shapes_captions
        >>> model = FunctionAnswerer("one", lambda images, questions: ["a circle"] * len(questions))
        >>> evaluate_captions(shapes_captions(2), model, metrics=()).passes[0].captions
        {'0': 'a circle', '1': 'a circle'}
    """
    check_positive(passes=passes)
    require_metrics(metrics, tokenizer)
    references = {item.id: item.references for item in data.items}
    rounds: list[CaptionPass] = []
    with asking(
        data,
        model,
        results=results,
        batch_size=batch_size,
        skip_broken=skip_broken,
        progress=progress,
        protocol=f"captions of {data.name}",
        lacking=NO_PICTURE,
    ) as asker:
        texts = first_prompts(asker.items, prompts)
        for number in range(1, passes + 1):
            captions = caption_images(asker, question, texts, part=f"pass {number}")
            scores = None
            if metrics:
                shown = {item.id: references[item.id] for item in asker.items}
                scores = score_captions(shown, captions, metrics=metrics, tokenizer=tokenizer)
            rounds.append(CaptionPass(number, texts or {}, captions, scores))
            texts = captions
    return CaptionEvaluation(
        benchmark=data, question=question, passes=tuple(rounds), **asker.facts()
    )


def caption_images(
    asker: Asker[CaptionItem],
    question: str,
    prompts: Mapping[str, str] | None,
    *,
    part: str,
) -> dict[str, str]:
    """Ask for one caption per item of the asker; returns them by id, without spaces around.

    Raises:
        ConfigError: The file holds captions made from something else.
        ShapeError: The model returns something else than one text per question.
    """
    queries = [
        Query(item.id, item.pictures, question, None if prompts is None else prompts[item.id])
        for item in asker.items
    ]
    answers = asker.ask(queries, part=part)
    return {name: answer.strip() for name, answer in answers.items()}


def first_prompts(items: Sequence[CaptionItem], prompts: Prompts | None) -> dict[str, str] | None:
    """The prompt of each item.

    Raises:
        ConfigError: Some have none.
    """
    if prompts is None:
        return None
    if callable(prompts):
        return {item.id: prompts(item) for item in items}
    if lacking := [item.id for item in items if item.id not in prompts]:
        raise ConfigError(
            f"{len(lacking)} of {len(items)} images have no prompt: {', '.join(lacking[:5])}; give "
            "one for each, '' for none"
        )
    return {item.id: prompts[item.id] for item in items}


def caption_table(evaluations: Sequence[CaptionEvaluation], *, paper: bool | None = None) -> Table:
    """Make a table with one row per model and pass, and one column per metric.

    Args:
        evaluations: Evaluations of the same data.
        paper: Whether rows of the paper's table 4 are added; None adds them for COCO alone.
    """
    first = evaluations[0]
    scored = [(each, one) for each in evaluations for one in each.passes if one.scores]
    metrics = [m for m in METRICS if any(m in one.scores.values for _, one in scored if one.scores)]
    rows = []
    for each, one in scored:
        assert one.scores is not None
        name = each.model if len(each.passes) == 1 else f"{each.model}, pass {one.number}"
        values = [one.scores.values.get(metric) for metric in metrics]
        rows.append((name, *("–" if value is None else f"{value:.2f}" for value in values)))
    titles = tuple(TITLES[metric] for metric in metrics)
    if first.benchmark.published if paper is None else paper:
        rows += published_table("captions").beside(titles)
    title = f"captions of {first.benchmark.name}, {len(first.items)} images, metrics times 100"
    return Table(title, ("model", *titles), tuple(rows))
