"""The protocol of mismatched captions: is the image described, or its foreign prompt?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffenc.evals.answerers import Answerer
from diffenc.evals.asking import AnswerEvaluation, asking
from diffenc.evals.captioning.data import CaptionItem, CaptionSet
from diffenc.evals.captioning.evaluate import NO_PICTURE, QUESTION, caption_images
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
from diffenc.evals.leakage.derangement import mismatched_prompts
from diffenc.evals.leakage.readout import PromptReadout, prompt_readout
from diffenc.evals.paper import published_table
from diffenc.evals.tables import Table


@dataclass(frozen=True, kw_only=True)
class LeakageEvaluation(AnswerEvaluation[CaptionItem]):
    """Captions of a model for images, under captions of other images as prompts.

    Attributes:
        seed: Seed of the choice of foreign prompts.
        prompts: Foreign prompt of each image, by id.
        captions: Caption that the model gave each image under its foreign prompt, by id.
        readout: Measure of how much of the prompts the captions say.
        against_prompt: Scores of the captions against the prompt as the only reference: the paper's
            table 6. High is bad. None if no metric was asked for.
        floor: Scores against the same prompts of captions under another foreign prompt: what a
            caption has in common with any other. None if no metric was asked for.
        against_image: Scores of the captions against the image's own references. High is good. None
            if no metric was asked for.
    """

    seed: int
    prompts: Mapping[str, str]
    captions: Mapping[str, str]
    readout: PromptReadout
    against_prompt: CaptionScores | None
    floor: CaptionScores | None
    against_image: CaptionScores | None

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on data and images that were left out."""
        skipped = self.readout.skipped
        bare = (f"{skipped} images whose prompts hold no foreign word",) if skipped else ()
        return (*super().notes, *bare)

    def to_dict(self) -> dict[str, Any]:
        """Every number, as JSON holds it."""
        scores = {
            name: None if each is None else asdict(each)
            for name, each in (
                ("against_prompt", self.against_prompt),
                ("floor", self.floor),
                ("against_image", self.against_image),
            )
        }
        return {
            **super().to_dict(),
            "seed": self.seed,
            "readout": asdict(self.readout),
            **scores,
            "prompts": dict(self.prompts),
            "captions": dict(self.captions),
            "notes": list(self.notes),
        }


def evaluate_leakage(
    data: CaptionSet,
    model: Answerer,
    *,
    seed: int = 0,
    question: str = QUESTION,
    metrics: Sequence[Metric] = WITHOUT_JAVA,
    tokenizer: Tokenizer = "ptb",
    results: "Path | None" = None,
    batch_size: int = 8,
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> LeakageEvaluation:
    """Give the encoder captions of other images, and see what the language model says.

    Each image is captioned under two foreign captions: the one that counts, and another one for
    control. `prompt_readout` makes one number of both; captions under the first are scored against
    it, as the paper does, and against the image's own references.

    Args:
        data: Images with reference captions, three or more.
        model: Model that captions the images.
        seed: Seed of the derangements and of the choice among captions.
        question: Text that the language model is asked.
        metrics: Names of the metrics beside the readout, which needs none of them; () for none.
        tokenizer: Tokenizer of the metrics: "ptb" (needs Java) as in published numbers, or
            "simple"; the readout has its own.
        results: JSON lines file that keeps the captions; None keeps nothing.
        batch_size: Largest number of images in one call of the model.
        skip_broken: Whether pictures that cannot be read are left out, instead of raising an error.
        progress: Function that is called with the number of captions of a part that are done and
            the number of all of them; None reports nothing.

    Raises:
        ConfigError: Broken data, too few images or different captions, a metric that cannot run
            here, or a results file of something else.
        MissingExtraError: A metric without pycocoevalcap.
        OutputError: The results file cannot be written.
        ShapeError: The model returns something else than one text per question.

    Source:
        The mismatched captions of the paper's table 6; how it draws them is not stated.
    """
    require_metrics(metrics, tokenizer)
    with asking(
        data,
        model,
        results=results,
        batch_size=batch_size,
        skip_broken=skip_broken,
        progress=progress,
        protocol=f"leakage on {data.name}",
        lacking=NO_PICTURE,
    ) as asker:
        drawn = mismatched_prompts(asker.items, seed=seed)
        every = [item.id for item in asker.items]
        foreign, control = (dict(zip(every, each.prompts, strict=True)) for each in drawn)
        captions = caption_images(asker, question, foreign, part=f"mismatched, seed {seed}")
        compared = caption_images(asker, question, control, part=f"control, seed {seed}")
    ids = [item.id for item in asker.items]
    captions, compared, foreign, control = (
        {name: texts[name] for name in ids} for texts in (captions, compared, foreign, control)
    )
    prompts = {name: [text] for name, text in foreign.items()}
    references = {item.id: item.references for item in asker.items}

    def scores(
        references: Mapping[str, Sequence[str]], captions: Mapping[str, str]
    ) -> CaptionScores | None:
        if not metrics:
            return None
        return score_captions(references, captions, metrics=metrics, tokenizer=tokenizer)

    return LeakageEvaluation(
        benchmark=data,
        seed=seed,
        prompts=foreign,
        captions=captions,
        readout=prompt_readout(
            (tuple(foreign.values()), tuple(control.values())),
            (tuple(captions.values()), tuple(compared.values())),
            list(references.values()),
        ),
        against_prompt=scores(prompts, captions),
        floor=scores(prompts, compared),
        against_image=scores(references, captions),
        **asker.facts(),
    )


def leakage_table(
    evaluations: Sequence[tuple[str, LeakageEvaluation]], *, paper: bool | None = None
) -> Table:
    """Settings down; the readout, then scores against the prompt and against the image.

    Args:
        evaluations: Pairs of a name and an evaluation, all on the same data.
        paper: Whether the paper's table 6 is added; None adds it for COCO alone.
    """
    first = evaluations[0][1]
    scored = first.against_prompt
    metrics = [metric for metric in METRICS if scored and metric in scored.values]
    kinds = ("prompt", "floor", "image") if metrics else ()
    columns = tuple(f"{TITLES[m]} ({kind})" for kind in kinds for m in metrics)
    rows = []
    for name, each in evaluations:
        parts = (each.against_prompt, each.floor, each.against_image)
        values = [f"{part.values[m]:.2f}" for part in parts if part for m in metrics]
        rows.append((name, _readout(each.readout), *values))
    if metrics and (first.benchmark.published if paper is None else paper):
        plain = tuple(TITLES[metric] for metric in metrics)
        blank = ["–"] * (len(columns) - len(plain))
        rows += [
            (head, "–", *cells, *blank) for head, *cells in published_table("leakage").beside(plain)
        ]
    title = (
        f"captions under prompts of other images, {first.benchmark.name}, {len(first.items)} "
        "images: prompt readout from -1 to 1 (0: the prompt is not read), metrics times 100"
    )
    return Table(title, ("model", "prompt readout", *columns), tuple(rows))


def _readout(readout: PromptReadout) -> str:
    return f"{readout.value:.3f}" + ("" if readout.error is None else f" ± {readout.error:.3f}")
