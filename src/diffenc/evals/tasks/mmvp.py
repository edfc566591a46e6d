"""The command `mmvp`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffenc.evals.task import option, refuse
from diffenc.evals.tasks.choices import ChoiceTask

if TYPE_CHECKING:
    from diffenc.evals.choices import ChoiceBenchmark


@dataclass(frozen=True, kw_only=True)
class Mmvp(ChoiceTask):
    """Ask MMVP's questions on pairs of near-same pictures.

    A pair counts where both answers are right. Options are read out of answers by fixed rules; no
    other model is asked.

    Attributes:
        fix_errata: Exchange the answers of questions 99 and 100 and of 279 and 280, which are the
            wrong way round in the original files.
        limit: Number of questions that are taken, from the first, in whole pairs. Default all.
    """

    name: ClassVar[str] = "mmvp"

    fix_errata: bool = False
    limit: int | None = option(metavar="N", least=2)

    def load(self) -> "ChoiceBenchmark":
        """Read the questions."""
        from diffenc.evals.choices import load_mmvp, shapes_mmvp
        from diffenc.evals.choices.miniature import CHOICES_SEED

        if self.miniature:
            refuse("MMVP's files, not to --data shapes", fix_errata=self.fix_errata)
            seed = CHOICES_SEED if self.data_seed is None else self.data_seed
            benchmark = shapes_mmvp(seed=seed, instruction=self.asking)
        else:
            refuse("--data shapes", data_seed=self.data_seed)
            benchmark = load_mmvp(self.data, fix_errata=self.fix_errata, instruction=self.asking)
        if self.limit is None:
            return benchmark
        return benchmark.limited(self.limit - self.limit % 2)
