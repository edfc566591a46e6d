"""What MMVP, BLINK and other questions with options have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from diffenc.evals.task import Ask, AskOptions, AskTask, Outcome, option

if TYPE_CHECKING:
    from diffenc.evals.choices import ChoiceBenchmark
    from diffenc.evals.folder_answerer import FolderAnswerer
    from diffenc.evals.inspection import Progress


@dataclass(frozen=True, kw_only=True)
class ChoiceTask(AskTask):
    """Questions with options, which are read out of answers by fixed rules.

    Attributes:
        instruction: Text that follows each question; "" for none. Default LLaVA's, which asks for
            the letter; with shapes none.
    """

    tokens: ClassVar[tuple[int, int]] = (32, 16)

    instruction: str | None = option(metavar="TEXT")

    @property
    def asking(self) -> str:
        """Text that follows each question."""
        from diffenc.evals.choices.base import LETTER_INSTRUCTION

        if self.instruction is None:
            return "" if self.miniature else LETTER_INSTRUCTION
        return self.instruction

    def prepare(
        self,
        benchmark: "ChoiceBenchmark",
        model: "FolderAnswerer",
        prompts: Mapping[str, str],
        options: AskOptions,
    ) -> Ask:
        """Return the function that asks every question once."""
        from diffenc.evals.choices import choice_table, evaluate_choices
        from diffenc.evals.one_question import one_question

        if self.question is not None:
            return one_question(benchmark, model, self.question, prompts, options)

        def ask(results: Path | None, progress: "Progress | None") -> Outcome:
            evaluation = evaluate_choices(
                benchmark,
                model,
                prompts=lambda item: prompts[item.id],
                results=results,
                progress=progress,
                **options.asking,
            )
            table = choice_table([evaluation], paper=options.paper)
            long = benchmark.score == "tasks"
            return Outcome(
                content=evaluation.to_dict(),
                tables=[table.transposed("task") if long else table],
                notes=evaluation.notes,
                count=len(evaluation.items),
                fresh=evaluation.fresh,
            )

        return ask
