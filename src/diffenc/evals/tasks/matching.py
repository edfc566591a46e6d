"""The commands `winoground` and `mmvp-vlm`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from diffenc.errors import ConfigError
from diffenc.evals.task import Task, option, refuse

if TYPE_CHECKING:
    from diffenc.evals.matching.base import MatchingBenchmark


@dataclass(frozen=True, kw_only=True)
class MatchOptions:
    """Which scores are compared on the items, and how they are made.

    Attributes:
        model: Alias, Hub id, diffusers folder or .safetensors checkpoint; see diffenc info.
        presets: Kinds of score, repeated: calibrated, paper, discffusion, diffusion-classifier,
            diffusion-itm or denoising-gap; calibrated+shared-query and the like; none: CLIP alone.
            Default calibrated.
        clip: CLIP models on the same items, repeated: a folder, a Hub id, or shapes-clip.
        trials: Number of trials, each with other noise.
        seed: Seed of the noise of the first trial.
        timesteps: Noise levels with commas; default those of the preset.
        layers: Cross-attentions or blocks, with commas or repeated: mid_block, up_blocks.1.
        size: Side in pixels, or HEIGHTxWIDTH; default the model's own.
        resize: Way to that size: squash (default), crop, pad or none.
        references: Your own reference images, repeated; any will do.
        data_references: Number of pictures of the data to calibrate by; with shapes, of other
            scenes.
        skip_broken: Go on without pictures that cannot be read, and tell which.
        batch_size: Number of rows per call of the U-Net.
        device: Device: cpu, cuda, cuda:1, mps; auto is cuda where there is one.
        dtype: Floating point type of the weights: float32, float16 or bfloat16.
    """

    model: str = option("shapes", metavar="NAME", flag="--model/-m")
    presets: tuple[str, ...] | None = option(metavar="NAME", flag="--preset")
    clip: tuple[str, ...] | None = option(metavar="NAME")
    trials: int = option(3, least=1)
    seed: int = 0
    timesteps: tuple[int, ...] | None = option(metavar="T,T")
    layers: tuple[str, ...] | None = option(metavar="NAMES")
    size: int | tuple[int, int] | None = option(metavar="PIXELS")
    resize: str | None = option(metavar="WORD")
    references: tuple[Path, ...] | None = field(
        default=None, metadata={"metavar": "IMAGE", "flag": "--reference"}
    )
    data_references: int | None = option(metavar="N", least=1)
    skip_broken: bool = False
    batch_size: int = option(16, least=1)
    device: str = option("auto", metavar="NAME")
    dtype: str = option("float32", metavar="NAME")


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
