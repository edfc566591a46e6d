"""Which scores are compared, and how they are made: the options of matching commands."""

from dataclasses import dataclass, field
from pathlib import Path

from diffenc.evals.task import check_options, option


@dataclass(frozen=True, kw_only=True)
class MatchOptions:
    """Which scores are compared on the items, and how they are made.

    Attributes:
        model: Alias, Hub id, diffusers folder or .safetensors checkpoint; see diffenc info.
        presets: Kinds of score, repeated: calibrated, paper, discffusion, diffusion-classifier,
            diffusion-itm, self-bench or denoising-gap; calibrated+shared-query and the like; none:
            CLIP alone. Default calibrated.
        clip: CLIP, SigLIP or open_clip models on the same items, repeated: a folder, a Hub id, or
            shapes-clip.
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
    clip: tuple[str, ...] | None = option(metavar="NAME", whole=True)
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

    def __post_init__(self) -> None:
        check_options(self)
