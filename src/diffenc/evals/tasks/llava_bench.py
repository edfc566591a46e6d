"""The command `llava-bench`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

from diffenc.errors import ConfigError
from diffenc.evals.task import Ask, AskOptions, AskTask, Outcome, option, refuse

if TYPE_CHECKING:
    from diffenc.evals.folder_answerer import FolderAnswerer
    from diffenc.evals.inspection import Progress
    from diffenc.evals.llava_bench import LlavaBench, LocalJudge, OpenAIJudge, WordJudge

_OPENAI = "api.openai.com"
_OPENAI_KEY = "OPENAI_API_KEY"
_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True)
class LlavaBenchInTheWild(AskTask):
    """Ask open questions, and let a judge compare.

    The questions are those of LLaVA-Bench in the Wild. The result is 100 x mean score of the
    answers / mean score of the references. Reviews that failed are in no number; the same command
    asks for them again.

    Attributes:
        judge: Who compares: the address of a service of OpenAI's kind, such as
            https://api.openai.com/v1, with --judge-model; a folder of a language model; or words,
            which counts common words and is the default with shapes alone.
        judge_model: Name of the judge in the service.
        judge_key: Environment variable with the service's key; default OPENAI_API_KEY for
            api.openai.com, for others none.
    """

    name: ClassVar[str] = "llava-bench"
    tokens: ClassVar[tuple[int, int]] = (512, 32)

    judge: str | None = option(metavar="URL|FOLDER")
    judge_model: str | None = option(metavar="NAME")
    judge_key: str | None = option(metavar="VARIABLE")

    @property
    def parts(self) -> tuple[str, ...]:
        """Answers, then reviews."""
        return ("answering", "judging") if self.counts else ("answering",)

    def load(self) -> "LlavaBench":
        """Read questions and references."""
        from diffenc.evals.llava_bench import load_llava_bench, shapes_llava_bench
        from diffenc.evals.llava_bench.miniature import BENCH_SEED

        if self.miniature:
            seed = BENCH_SEED if self.data_seed is None else self.data_seed
            benchmark = shapes_llava_bench(seed=seed)
        else:
            refuse("--data shapes", data_seed=self.data_seed)
            benchmark = load_llava_bench(self.data)
        return benchmark if self.limit is None else benchmark.limited(self.limit)

    def prepare(
        self,
        benchmark: "LlavaBench",
        model: "FolderAnswerer",
        prompts: Mapping[str, str],
        options: AskOptions,
    ) -> Ask:
        """Find the judge, and return the function that asks and lets it review."""
        from diffenc.evals.llava_bench import (
            OpenAIJudge,
            WordJudge,
            bench_table,
            evaluate_llava_bench,
        )
        from diffenc.evals.one_question import one_question

        if self.question is not None:
            return one_question(benchmark, model, self.question, prompts, options)
        judge = self._judge(model, options)
        if not isinstance(judge, WordJudge):
            judge.check()

        def ask(results: Path | None, progress: "Progress | None") -> Outcome:
            evaluation = evaluate_llava_bench(
                benchmark,
                model,
                judge,
                prompts=lambda item: prompts[item.id],
                # judges other than services would say the same again
                attempts=_ATTEMPTS if isinstance(judge, OpenAIJudge) else 1,
                results=results,
                progress=progress,
                **options.asking,
            )
            if not evaluation.reviews:
                reason = next(iter(evaluation.failures.values()))
                raise ConfigError(
                    f"{judge.name} reviewed none of {len(evaluation.items)} answers: {reason}. The "
                    f"answers are in {results}; the same command asks for reviews again, also of "
                    "another --judge"
                )
            return Outcome(
                content=evaluation.to_dict(),
                tables=[bench_table([evaluation], paper=options.paper)],
                notes=evaluation.notes,
                count=len(evaluation.items) + len(evaluation.reviews),
                fresh=evaluation.fresh,
            )

        return ask

    def _judge(
        self, model: "FolderAnswerer", options: AskOptions
    ) -> "OpenAIJudge | LocalJudge | WordJudge":
        """Make the judge that the options name.

        Raises:
            ConfigError: No judge is named, or the options do not go together.
        """
        from diffenc.evals.llava_bench import LocalJudge, OpenAIJudge, WordJudge

        judge = self.judge or ("words" if self.miniature else None)
        if judge is None:
            raise ConfigError(
                "--judge is missing: name a service by --judge URL --judge-model NAME, the folder "
                "of a language model, or words, which only counts common words"
            )
        if not judge.startswith(("http://", "https://")):
            service = {"judge_model": self.judge_model, "judge_key": self.judge_key}
            refuse("a --judge that is a URL", **service)
            if judge == "words":
                return WordJudge()
            return LocalJudge(
                judge,
                device=options.torch_device,
                dtype=options.torch_dtype,
                before_loading=model.release,
            )
        if self.judge_model is None:
            raise ConfigError(
                f"--judge {judge} needs --judge-model, the service's name of the judge"
            )
        openai = urlsplit(judge).hostname == _OPENAI
        variable = self.judge_key or (_OPENAI_KEY if openai else None)
        if variable and not os.environ.get(variable):
            raise ConfigError(
                f"the environment variable {variable} is not set; it holds the key of {judge}, and "
                "--judge-key names another one"
            )
        return OpenAIJudge(self.judge_model, judge, key_variable=variable)
