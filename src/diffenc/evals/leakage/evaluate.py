"""The protocol of mismatched captions: is the image described, or its foreign prompt?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffenc._version import __version__
from diffenc.evals.answering.asking import opened_asker
from diffenc.evals.answering.base import Answerer
from diffenc.evals.answering.paper import published_table
from diffenc.evals.answering.pictures import left_out
from diffenc.evals.base import Problem
from diffenc.evals.captioning.data import CaptionItem, CaptionSet
from diffenc.evals.captioning.evaluate import QUESTION, caption_images, whole_captioned
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
from diffenc.evals.leakage.readout import PromptReadout, ordered, prompt_readout
from diffenc.evals.report import Table


@dataclass(frozen=True)
class LeakageEvaluation:
    """Captions of a model for images, under captions of other images as prompts.

    Attributes:
        model: Name of the model, as it appears in the report.
        description: Everything that the captions depend on, as JSON values.
        data: Data set that the images come from.
        items: Items that could be captioned.
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
        problems: Reasons why other items were left out.
        fresh: Number of captions that were generated in this run.
    """

    model: str
    description: Mapping[str, Any]
    data: CaptionSet
    items: tuple[CaptionItem, ...]
    seed: int
    prompts: Mapping[str, str]
    captions: Mapping[str, str]
    readout: PromptReadout
    against_prompt: CaptionScores | None
    floor: CaptionScores | None
    against_image: CaptionScores | None
    problems: tuple[Problem, ...] = ()
    fresh: int = field(default=0, compare=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on data and images that were left out."""
        skipped = self.readout.skipped
        bare = (f"{skipped} images whose prompts hold no foreign word",) if skipped else ()
        return (*left_out(self.problems), *self.data.notes, *bare)

    def to_dict(self) -> dict[str, Any]:
        """Every number, as JSON holds it."""
        scores = {
            name: None if found is None else asdict(found)
            for name, found in (
                ("against_prompt", self.against_prompt),
                ("floor", self.floor),
                ("against_image", self.against_image),
            )
        }
        return {
            "version": __version__,
            "data": self.data.name,
            "source": self.data.source,
            "items": len(self.items),
            "model": self.model,
            "description": dict(self.description),
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
    items, reading = whole_captioned(data, skip_broken=skip_broken)
    ids = [item.id for item in items]
    foreign = [
        dict(zip(ids, each.prompts, strict=True)) for each in mismatched_prompts(items, seed=seed)
    ]
    with opened_asker(
        model,
        reading.digests,
        results,
        task=f"leakage on {data.name}",
        source=data.source,
        batch_size=batch_size,
        progress=progress,
        skip_broken=skip_broken,
    ) as asker:
        said = [
            caption_images(asker, items, question, prompts, part=f"{part}, seed {seed}")
            for part, prompts in zip(("mismatched", "control"), foreign, strict=True)
        ]
        items = asker.whole(items)
    ids = [item.id for item in items]
    said = [{name: each[name] for name in ids} for each in said]

    def scores(
        references: Mapping[str, Sequence[str]], captions: Mapping[str, str]
    ) -> CaptionScores | None:
        if not metrics:
            return None
        return score_captions(references, captions, metrics=metrics, tokenizer=tokenizer)

    prompt = {name: [foreign[0][name]] for name in ids}
    return LeakageEvaluation(
        model=model.name,
        description=dict(model.description),
        data=data,
        items=items,
        seed=seed,
        prompts={name: foreign[0][name] for name in ids},
        captions=said[0],
        readout=prompt_readout(
            (ordered(foreign[0], ids), ordered(foreign[1], ids)),
            (ordered(said[0], ids), ordered(said[1], ids)),
            [item.references for item in items],
        ),
        against_prompt=scores(prompt, said[0]),
        floor=scores(prompt, said[1]),
        against_image=scores({item.id: item.references for item in items}, said[0]),
        problems=(*reading.problems, *asker.broken.values(), *asker.strangers()),
        fresh=asker.fresh,
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
        found = (each.against_prompt, each.floor, each.against_image)
        values = [f"{part.values[m]:.2f}" for part in found if part for m in metrics]
        rows.append((name, _readout(each.readout), *values))
    if metrics and (first.data.published if paper is None else paper):
        plain = tuple(TITLES[metric] for metric in metrics)
        blank = ["–"] * (len(columns) - len(plain))
        rows += [
            (head, "–", *cells, *blank) for head, *cells in published_table("leakage").beside(plain)
        ]
    title = (
        f"captions under prompts of other images, {first.data.name}, {len(first.items)} images: "
        "prompt readout from -1 to 1 (0: the prompt is not read), metrics times 100"
    )
    return Table(title, ("model", "prompt readout", *columns), tuple(rows))


def _readout(found: PromptReadout) -> str:
    return f"{found.value:.3f}" + ("" if found.error is None else f" ± {found.error:.3f}")
