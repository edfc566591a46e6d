"""What a place of a model costs: parameters, arithmetic and time up to it."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from diffenc.encoder import DiffusionEncoder
from diffenc.models import Architecture
from diffenc.models.arithmetic import pass_operations
from diffenc.models.base import Backbone
from diffenc.models.denoisers import config_of
from diffenc.models.taps import count_parameters
from diffenc.shapes.render import render
from diffenc.studies.places import TEXTS, Text
from diffenc.studies.probes import side_of
from diffenc.studies.trials import sample_trials


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of reading one tap.

    Attributes:
        parameters: Parameters of the denoiser up to the tap, which is all that `truncate` keeps.
        operations: Floating point operations of a pass of one picture that ends at the tap.
    """

    parameters: int
    operations: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Time of reading one tap, with the picture's encoding and, under a text, the text's.

    Attributes:
        seconds: Seconds of a call with one picture, the median.
        images_per_second: Pictures a second in batches.
        batch: Pictures in a batch.
    """

    seconds: float
    images_per_second: float
    batch: int


def costs_of(model: Backbone | Architecture, taps: Sequence[str], size: int) -> dict[str, Cost]:
    """Cost of each tap, from configs alone.

    Args:
        model: Loaded backbone, or the description of one.
        taps: Module paths.
        size: Side of the pictures in pixels.
    """
    config = config_of(model.denoiser) if isinstance(model, Backbone) else model.denoiser_config
    _, operations = pass_operations(config, size // model.reduction, taps)
    return {tap: Cost(count_parameters(config, [tap]), operations[tap]) for tap in taps}


def speeds_of(
    encoder: DiffusionEncoder,
    texts: Sequence[Text] = TEXTS,
    *,
    repeats: int = 3,
) -> dict[tuple[str, Text], Speed]:
    """Speed of each tap under each text; nothing is remembered from call to call.

    Args:
        encoder: Encoder with its taps; its batch size is that of the batches.
        texts: Texts to read under.
        repeats: Number of calls whose median counts; a first call does not.
    """
    batch = max(1, encoder.config.batch_size or 1)
    config = replace(encoder.config, timestep=encoder.config.timesteps[0], batch_size=batch)
    trials, side = sample_trials(batch, seed=0), side_of(encoder)
    images = [render(trial.scene, side) for trial in trials]
    captions = [trial.caption() for trial in trials]
    speeds = {}
    for tap in encoder.config.taps or ():
        one = DiffusionEncoder(encoder.backbone, replace(config, taps=(tap,)), use_cache=False)
        for text in texts:
            prompts = captions if text == "text" else None
            alone = _seconds(one, images[:1], prompts and prompts[:1], repeats)
            several = alone if batch == 1 else _seconds(one, images, prompts, repeats)
            speeds[tap, text] = Speed(alone, batch / several, batch)
    return speeds


def _seconds(
    encoder: DiffusionEncoder,
    images: list[Image.Image],
    prompts: list[str] | None,
    repeats: int,
) -> float:
    """Median time of a call; a first one does not count."""
    clocks = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        encoder.extract(images, prompts)
        if encoder.device.type == "cuda":
            torch.cuda.synchronize(encoder.device)
        clocks.append(time.perf_counter() - start)
    return statistics.median(clocks[1:])
