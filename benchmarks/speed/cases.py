"""The jobs that are timed, the same for every contender, with what is to be reached."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffenc.config import EncoderConfig
from diffenc.models.presets import preset_options

OVERHEAD_GOAL = 0.05
"""Most time beyond the bare floor, as a share of the floor's."""


@dataclass(frozen=True, slots=True)
class Case:
    """One job.

    Attributes:
        name: On the command line and in JSON.
        title: In tables.
        model: Alias of the architecture.
        preset: Whose taps and timestep are read.
        family: Of the model, as presets have it.
        size: Side of the pictures, in pixels; `quick_size` is for narrow models.
        rival: The plain script that the goal is against.
        goal: How many times faster than it.
        again: The picture was asked about before.
        batched: Larger batches are timed too where they are asked for.
    """

    name: str
    title: str
    model: str
    preset: str
    family: Literal["sd", "sdxl"]
    rival: Literal["plain diffusers", "DIFT's own way"]
    goal: float
    size: int = 512
    quick_size: int = 64
    again: bool = False
    batched: bool = True

    def config(self, *, quick: bool) -> EncoderConfig:
        """What the encoder is told."""
        options = preset_options(self.preset, self.family)
        if self.rival == "plain diffusers":
            # The tap and the noise level of the preset; one draw of noise, both halves.
            options = {key: options[key] for key in ("taps", "timestep")}
            options["conditioning"] = "cfg"
        size = self.quick_size if quick else self.size
        return EncoderConfig.from_dict({**options, "size": size})


@dataclass(frozen=True, slots=True)
class Question:
    """Pictures as a data loader gives them, on the device, and a text for each.

    Attributes:
        images: (b 3 height width), uint8.
        prompts: One per picture.
        picture: Equal for questions on the same pictures.
    """

    images: Tensor
    prompts: list[str]
    picture: int


CASES = {
    case.name: case
    for case in (
        Case(
            name="sd2.1-first",
            title="SD 2.1 at 512 px, dift tap, cfg: first question on an image",
            model="sd2.1-base",
            preset="dift",
            family="sd",
            rival="plain diffusers",
            goal=1.3,
        ),
        Case(
            name="sd2.1-next",
            title="SD 2.1 at 512 px, dift tap, cfg: every further question on it",
            model="sd2.1-base",
            preset="dift",
            family="sd",
            rival="plain diffusers",
            goal=5.0,
            again=True,
        ),
        Case(
            name="dift-768",
            title="DIFT at 768 px, eight draws, SD 2.1",
            model="sd2.1-base",
            preset="dift",
            family="sd",
            rival="DIFT's own way",
            goal=2.4,
            size=768,
            quick_size=96,
            batched=False,
        ),
        Case(
            name="sdxl-first",
            title="SDXL at 512 px, gdf taps, cfg: first question on an image",
            model="sdxl",
            preset="gdf",
            family="sdxl",
            rival="plain diffusers",
            goal=1.1,
        ),
        Case(
            name="sdxl-next",
            title="SDXL at 512 px, gdf taps, cfg: every further question on it",
            model="sdxl",
            preset="gdf",
            family="sdxl",
            rival="plain diffusers",
            goal=2.8,
            again=True,
        ),
    )
}


def ask(
    case: Case, index: int, *, size: int, batch: int, device: torch.device | str = "cpu"
) -> Question:
    """Question number `index` of a case: always another text, and another picture unless `again`.

    Args:
        case: Whether the picture is the same each time.
        index: From 0; equal numbers are equal questions.
        size: Side of the pictures, in pixels.
        batch: Number of pictures.
        device: Where they lie.
    """
    picture = 0 if case.again else index
    generator = torch.Generator().manual_seed(picture)
    shape = (batch, 3, size, size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    prompts = [f"what is left of object {index} in picture {row}?" for row in range(batch)]
    return Question(images.to(device), prompts, picture)
