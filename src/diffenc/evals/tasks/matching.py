"""The commands `winoground` and `mmvp-vlm`."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from diffenc.errors import ConfigError
from diffenc.evals.task import Task, option, refuse

if TYPE_CHECKING:
    from diffenc.evals.matching.base import MatchingBenchmark


@dataclass(frozen=True, kw_only=True)
class MatchTask(Task):
    """Pictures and captions that are scored against each other.

    Attributes:
        template: What is scored for a caption, "{}" being it; default "{}", and for MMVP-VLM
            "a photo of {}", as in its own evaluation.
        per_label: Number of items per kind, of --data shapes; default 30 or 15.
    """

    name: ClassVar[Literal["winoground", "mmvp-vlm"]]

    template: str | None = option(metavar="TEXT")
    per_label: int | None = option(metavar="N", least=1)

    def load(self) -> "MatchingBenchmark":
        """Read the items."""
        from diffenc.evals.matching.miniature import SHAPES_SEED, shapes_benchmark

        if self.template is not None and "{}" not in self.template:
            raise ConfigError(
                f"the template must hold {{}}, where the caption goes; got {self.template!r}"
            )
        if self.miniature:
            seed = SHAPES_SEED if self.data_seed is None else self.data_seed
            benchmark = shapes_benchmark(self.name, per_label=self.per_label, seed=seed)
        else:
            refuse("--data shapes", per_label=self.per_label, data_seed=self.data_seed)
            benchmark = self._read()
        if self.template is not None:
            benchmark = replace(benchmark, template=self.template)
        if self.limit is None:
            return benchmark
        return replace(benchmark, items=benchmark.items[: self.limit])

    def _read(self) -> "MatchingBenchmark":
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Winoground(MatchTask):
    """Score pictures and captions of the same words."""

    name = "winoground"

    def _read(self) -> "MatchingBenchmark":
        from diffenc.evals.matching.winoground import load_winoground

        return load_winoground(self.data)


@dataclass(frozen=True, kw_only=True)
class MmvpVlm(MatchTask):
    """Score pairs of near-same pictures by pattern."""

    name = "mmvp-vlm"

    def _read(self) -> "MatchingBenchmark":
        from diffenc.evals.matching.mmvp_vlm import load_mmvp_vlm

        return load_mmvp_vlm(self.data)
