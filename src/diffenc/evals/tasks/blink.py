"""The command `blink`."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffenc.evals.task import option, refuse
from diffenc.evals.tasks.choices import ChoiceTask

if TYPE_CHECKING:
    from diffenc.evals.choices import ChoiceBenchmark


@dataclass(frozen=True, kw_only=True)
class Blink(ChoiceTask):
    """Ask BLINK's questions on one picture to four.

    The result is the mean of the accuracies of its tasks. Options are read out of answers by fixed
    rules; no other model is asked.

    Attributes:
        tasks: Some of the tasks alone, with commas or repeated: Counting,
            Functional_Correspondence.
        limit: Number of questions of each task that are taken, from the first. Default all.
    """

    name: ClassVar[str] = "blink"

    tasks: tuple[str, ...] | None = option(metavar="NAME", flag="--task")
    limit: int | None = option(metavar="N", least=1)

    @property
    def partial(self) -> bool:
        """Whether some of the tasks, or some questions of each, are taken."""
        return super().partial or self.tasks is not None

    def load(self) -> "ChoiceBenchmark":
        """Read the questions."""
        from diffenc.evals.choices import load_blink, shapes_blink
        from diffenc.evals.choices.miniature import CHOICES_SEED

        if self.miniature:
            seed = CHOICES_SEED if self.data_seed is None else self.data_seed
            benchmark = shapes_blink(seed=seed, instruction=self.asking, tasks=self.tasks)
        else:
            refuse("--data shapes", data_seed=self.data_seed)
            benchmark = load_blink(self.data, tasks=self.tasks, instruction=self.asking)
        if self.limit is None:
            return benchmark
        counts: Counter[str] = Counter()
        items = []
        for item in benchmark.items:
            counts[item.group] += 1
            if counts[item.group] <= self.limit:
                items.append(item)
        count = f"{len(items)} of {len(benchmark.items)}"
        return benchmark.with_items(items, f"{count} questions, by --limit")
