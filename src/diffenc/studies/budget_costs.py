"""What one call costs that gives the tokens of an arm of the study of the budget."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffenc.clip.tokens import ClipTokens
from diffenc.encoder import DiffusionEncoder
from diffenc.passes.word_tokens import word_layers
from diffenc.projector.plain import Projector
from diffenc.studies.budget_arms import Arm, Choice

_CALLS = 5


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of the tokens of one picture under one question that nothing is remembered of.

    Attributes:
        rows: Number of rows that reach the last tap; what comes before a text is run once for all.
        milliseconds: Time of one call, median of five: processor time of all threads on a CPU, on
            another device wall-clock time.
    """

    rows: int
    milliseconds: float


def cost_of(
    encoder: DiffusionEncoder,
    arm: Arm,
    choice: Choice | None,
    *,
    image: Image.Image,
    text: str,
    clip: ClipTokens | None = None,
) -> Cost:
    """Measure one call.

    Args:
        encoder: Encoder of the study, whose taps decide which cross-attentions gather words.
        arm: Tokens that are made.
        choice: Taps and features of the arm; None for CLIP.
        image: Picture that is read.
        text: Question that is asked.
        clip: CLIP of the arm, if it is CLIP's.
    """
    if choice is None:
        assert clip is not None
        plain = ClipTokens(clip.model, clip.image_processor, layer=clip.layer, use_cache=False)
        pool = Projector(plain.hidden_size, plain.hidden_size, "identity", grid=arm.side)
        return _measured(lambda: pool(plain([image])), plain.model, None)
    own = DiffusionEncoder(
        encoder.backbone, replace(encoder.config, taps=choice.taps), use_cache=False
    )
    layers = word_layers(encoder.backbone, [tap.name for tap in encoder.feature_info], None)

    def call() -> object:
        if not arm.words:
            features = own.extract(image, text, conditioning=choice.half)
            return features.tokens(arm.side)
        rest = choice.rest and arm.words > 1
        words = own.word_tokens(
            image,
            text,
            count=arm.words - 1 if rest else arm.words,
            rest=rest,
            layers=layers,
            conditioning=choice.half,
        )
        return words.features.tokens(arm.side) if arm.side else words

    denoiser = encoder.backbone.denoiser
    return _measured(call, denoiser, denoiser.get_submodule(own.feature_info[-1].name))


@torch.no_grad()
def _measured(call: Callable[[], object], module: torch.nn.Module, counted: Any) -> Cost:
    device = next(module.parameters()).device
    rows: list[int] = []

    def count(_module: object, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        tensors = (each for each in (*args, *options.values()) if isinstance(each, Tensor))
        rows.append(len(next(tensors)))

    hook = None if counted is None else counted.register_forward_pre_hook(count, with_kwargs=True)
    try:
        call()
    finally:
        if hook is not None:
            hook.remove()
    times = [_seconds(call, device) for _ in range(_CALLS)]
    return Cost(sum(rows), 1000 * median(times))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    start = time.perf_counter()
    call()
    torch.zeros(1, dtype=torch.float32, device=device).cpu()  # waits for what was queued
    return time.perf_counter() - start
