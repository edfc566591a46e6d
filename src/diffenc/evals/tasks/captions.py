"""The command `captions`, and the data and metrics that captions and leakage share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from diffenc.evals.task import Ask, AskOptions, AskTask, Outcome, option, refuse

if TYPE_CHECKING:
    from diffenc.evals.captioning import CaptionEvaluation, CaptionSet
    from diffenc.evals.captioning.data import CaptionItem
    from diffenc.evals.folder_answerer import FolderAnswerer
    from diffenc.evals.inspection import Progress
    from diffenc.evals.tables import Table

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class CaptionTask(AskTask):
    """Pictures with the captions that people gave them.

    Attributes:
        data: Folder with COCO's pictures and dataset_coco.json (Karpathy) or captions_*.json, or
            shapes: the miniature. Nothing is downloaded.
        annotations: File of the captions, where it lies elsewhere.
        split: Part of dataset_coco.json; default test.
        question: Text that the language model is asked. Default LLaVA's request for one sentence;
            with shapes the one that its models learnt.
        metrics: Metrics: cider, bleu-4, rouge-l or spice, with commas or repeated; needs
            diffenc[caption]. Default none.
        tokenizer: Tokenizer of the metrics: ptb (Java), as in published numbers, or simple.
    """

    tokens: ClassVar[tuple[int, int]] = (64, 32)

    annotations: Path | None = field(default=None, metadata={"metavar": "FILE"})
    split: str | None = option(metavar="WORD")
    metrics: tuple[str, ...] | None = option(metavar="NAME", flag="--metric")
    tokenizer: str = option("ptb", metavar="WORD")

    @property
    def counts(self) -> bool:
        """True: here the question asks for a caption in any case."""
        return True

    def check(self) -> None:
        """Refuse metrics that are unknown, stand twice, or cannot run here."""
        from diffenc.config import check_choice
        from diffenc.evals.captioning.metrics import require_metrics

        super().check()
        check_choice("tokenizer", self.tokenizer, ("ptb", "simple"))
        require_metrics(self.metrics or (), self.tokenizer)  # type: ignore[arg-type]

    def load(self) -> "CaptionSet":
        """Read the pictures and their captions."""
        from diffenc.evals.captioning import load_coco, shapes_captions
        from diffenc.evals.captioning.miniature import CAPTIONS_SEED

        if self.miniature:
            files = {"annotations": self.annotations, "split": self.split}
            refuse("COCO's files, not to --data shapes", **files)
            count = {} if self.limit is None else {"count": self.limit}
            seed = CAPTIONS_SEED if self.data_seed is None else self.data_seed
            return shapes_captions(**count, seed=seed)
        refuse("--data shapes", data_seed=self.data_seed)
        captions = load_coco(self.data, annotations=self.annotations, split=self.split or "test")
        return captions.select(limit=self.limit)

    def sample(self, item: "CaptionItem") -> tuple[str, Sequence[str]]:
        """The question and the captions of a picture."""
        return self.request, item.references

    @property
    def request(self) -> str:
        """Text that the language model is asked."""
        from diffenc.evals.captioning.evaluate import QUESTION
        from diffenc.evals.captioning.miniature import SHAPES_QUESTION

        return self.question or (SHAPES_QUESTION if self.miniature else QUESTION)

    @property
    def measuring(self) -> dict[str, Any]:
        """Keywords of both evaluations of captions."""
        return {
            "question": self.request,
            "metrics": self.metrics or (),
            "tokenizer": self.tokenizer,
        }


@dataclass(frozen=True, kw_only=True)
class Captions(CaptionTask):
    """Caption pictures, once or in several passes.

    Without --metric some captions are shown; metrics are added by the same command with --metric,
    and nothing is captioned again.

    Attributes:
        passes: Number of passes; each but the first has the captions of the one before as text.
    """

    name: ClassVar[str] = "captions"
    prompt_policy: ClassVar[str | None] = "empty"

    passes: int = option(1, least=1)

    @property
    def parts(self) -> tuple[str, ...]:
        """A part for each pass."""
        return ("captioning", *(f"captioning, pass {k}" for k in range(2, self.passes + 1)))

    def prepare(
        self,
        benchmark: "CaptionSet",
        model: "FolderAnswerer",
        prompts: Mapping[str, str],
        options: AskOptions,
    ) -> Ask:
        """Return the function that captions every picture in every pass."""
        from diffenc.evals.captioning import evaluate_captions
        from diffenc.evals.captioning.evaluate import caption_table

        def ask(results: Path | None, progress: "Progress | None") -> Outcome:
            evaluation = evaluate_captions(
                benchmark,
                model,
                prompts=prompts,
                passes=self.passes,
                results=results,
                progress=progress,
                **self.measuring,
                **options.asking,
            )
            scored = bool(self.metrics)
            bare = () if scored else ("no metric was asked for; see --metric",)
            return Outcome(
                content=evaluation.to_dict(),
                tables=[
                    caption_table([evaluation], paper=options.paper)
                    if scored
                    else _first_captions(evaluation)
                ],
                notes=(*evaluation.notes, *bare),
                count=self.passes * len(evaluation.items),
                fresh=evaluation.fresh,
            )

        return ask


def _first_captions(evaluation: "CaptionEvaluation") -> "Table":
    """The first captions of each pass, beside a reference."""
    from diffenc.evals.tables import Table

    heads = [f"pass {each.number}" for each in evaluation.passes]
    rows = [
        (item.id, *(each.captions[item.id] for each in evaluation.passes), item.references[0])
        for item in evaluation.items[:_SHOWN]
    ]
    count = f"{len(rows)} of {len(evaluation.items)}"
    title = f"captions of {evaluation.benchmark.name} by {evaluation.model}, {count}"
    return Table(title, ("image", *heads, "a true one"), tuple(rows))
