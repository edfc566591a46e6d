"""The command `naturalbench`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffenc.evals.task import option, refuse
from diffenc.evals.tasks.choices import ChoiceTask

if TYPE_CHECKING:
    from diffenc.evals.choices import ChoiceBenchmark


@dataclass(frozen=True, kw_only=True)
class NaturalBench(ChoiceTask):
    """Ask NaturalBench's groups of two pictures and two questions.

    Each question is answered differently of both pictures. The result is the share of groups whose
    four answers are all right, beside the shares of questions right of both pictures and of
    pictures right in both questions.

    Attributes:
        instruction: Text that follows each question; "" for none. Default the released
            evaluation's, which asks for yes or no, or for the letter; with shapes none.
        limit: Number of groups that are taken, from the first. Default all.
    """

    name: ClassVar[str] = "naturalbench"

    limit: int | None = option(metavar="N", least=1)

    def load(self) -> "ChoiceBenchmark":
        """Read the questions."""
        from diffenc.evals.choices import load_naturalbench, shapes_naturalbench
        from diffenc.evals.choices.miniature import CHOICES_SEED

        if self.miniature:
            seed = CHOICES_SEED if self.data_seed is None else self.data_seed
            benchmark = shapes_naturalbench(seed=seed, instruction=self.instruction or "")
        else:
            refuse("--data shapes", data_seed=self.data_seed)
            benchmark = load_naturalbench(self.data, instruction=self.instruction)
        return benchmark if self.limit is None else benchmark.limited(4 * self.limit)
