"""One question on the pictures of every item, such as the request for a caption."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffenc.evals.asking import AnswerEvaluation, Query, asking
from diffenc.evals.items import Benchmark
from diffenc.evals.tables import Table
from diffenc.evals.task import Ask, AskOptions, Outcome

if TYPE_CHECKING:
    from diffenc.evals.folder_answerer import FolderAnswerer
    from diffenc.evals.inspection import Progress

_SHOWN = 5


def one_question(
    benchmark: Benchmark[Any],
    model: "FolderAnswerer",
    question: str,
    prompts: Mapping[str, str],
    options: AskOptions,
) -> Ask:
    """Return the function that asks the question of every item, and shows the first answers.

    Args:
        benchmark: Benchmark whose pictures are shown.
        model: Model that is asked.
        question: Text that the language model is asked, in place of the benchmark's questions.
        prompts: Prompt of the encoder for each item, by id.
        options: How the model is asked.
    """

    def ask(results: Path | None, progress: "Progress | None") -> Outcome:
        with asking(
            benchmark,
            model,
            results=results,
            progress=progress,
            protocol=f"one question on {benchmark.name}",
            **options.asking,
        ) as asker:
            queries = [
                Query(item.id, item.pictures, question, prompts[item.id]) for item in asker.items
            ]
            answers = asker.ask(queries)
        evaluation = AnswerEvaluation(benchmark=benchmark, **asker.facts())
        rows = tuple((name, answer.strip()) for name, answer in list(answers.items())[:_SHOWN])
        title = f"{question} {len(rows)} of {len(answers)} answers of {model.name}"
        return Outcome(
            content={**evaluation.to_dict(), "question": question, "answers": answers},
            tables=[Table(title, ("item", "answer"), rows)],
            notes=(*evaluation.notes, "nothing was counted: the question was another one"),
            count=len(answers),
            fresh=evaluation.fresh,
        )

    return ask
