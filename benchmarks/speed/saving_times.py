"""Times of a question with and without each saving, in turn in one process."""

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from diffenc import DiffusionEncoder
from diffenc.config import EncoderConfig
from diffenc.denoiser.replay import text_free_prefix
from diffenc.models.base import Backbone, Caches
from diffenc.models.reached_layers import reached_projections
from speed.cases import Question
from speed.contenders import PlainScript, is_plain_format
from speed.measuring import in_turn, median
from speed.program import describe_machine
from speed.running import AGREEMENT

TIMESTEP = 261
FURTHER = "further question, cfg"
OVER_PLAIN = f"{FURTHER}, over the plain script"
PREFIX = "prefix without text once"
COMPILED = "compiled"
WITHOUT_TEXT = "pass without a text"
BLANK = "no attention to a text of zeros"
ROWS = 8
SAME_TEXT = f"one new text for {ROWS} pictures, cond"
KEYS = "keys and values once per text"
_ALL_KEYS, _KEYS_ONCE = f"keys and values, {ROWS} rows", "keys and values, 1 row"

PAIRS = {
    (FURTHER, PREFIX): ("further, without the prefix", "further, exact"),
    (FURTHER, COMPILED): ("further, exact", "further, compiled"),
    (WITHOUT_TEXT, BLANK): ("no text, attended", "no text, exact"),
    (OVER_PLAIN, "all that is exact"): ("plain script", "further, exact"),
    **{
        (job, f'reuse="{part}"'): (before, f"further, {part}")
        for part in ("down", "middle")
        for job, before in ((FURTHER, "further, exact"), (OVER_PLAIN, "plain script"))
    },
}
"""The call before and the call after, for each job and saving that is timed."""


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of calls on one model.

    Attributes:
        machine: What they were taken on.
        size: Side of the picture, in pixels.
        seconds: Those of each round, by the name of the call.
        difference: Largest difference between exact features and those of the plain script,
            relative to the largest magnitude at the tap.
    """

    machine: str
    size: int
    seconds: Mapping[str, list[float]]
    difference: float

    def ratio(self, job: str, saving: str) -> float | None:
        """How many times faster a job is with a saving: median over rounds; None: not timed."""
        if (job, saving) == (SAME_TEXT, KEYS):
            # Nothing does it: what it would leave out was timed beside whole questions.
            names = ("further, exact", _ALL_KEYS, _KEYS_ONCE)
            rounds = zip(*(self.seconds[name] for name in names), strict=True)
            wholes = [(ROWS * one, every - once) for one, every, once in rounds]
            return median([whole / (whole - saved) for whole, saved in wholes])
        before, after = PAIRS.get((job, saving), ("", ""))
        if before not in self.seconds or after not in self.seconds:
            return None
        pairs = zip(self.seconds[before], self.seconds[after], strict=True)
        return median([first / second for first, second in pairs])


def time_savings(
    folder: Path,
    taps: tuple[str, ...],
    *,
    size: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    remark: str = "",
    compiled: str | None = None,
) -> Times:
    """Time questions about a picture: as a plain script answers them, exactly, and with reuse.

    On a CPU it is processor time, which leaves out what other programs take.

    Args:
        folder: Folder of the model.
        taps: Module paths.
        size: Side of the picture, in pixels.
        repeats: Number of rounds, in which all calls take turns.
        device: Where everything runs.
        dtype: Type of the weights.
        remark: What else is to be said of the machine.
        compiled: Backend of `torch.compile` of a U-Net that is timed too; None compiles nothing.

    Raises:
        ValueError: The plain script reads other features.
    """
    config = EncoderConfig(taps=taps, timestep=TIMESTEP, size=size, conditioning="cfg")
    exact = DiffusionEncoder.from_pretrained(folder, device=device, dtype=dtype, **config.to_dict())
    backbone = exact.backbone
    plain = PlainScript(folder, config, list(taps), device=device, dtype=dtype,
                        **_shared_parts(backbone))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shape = (1, 3, size, size)
    image = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)

    answers: dict[str, Mapping[str, Tensor]] = {}

    def further(encoder: DiffusionEncoder, name: str, index: int) -> Callable[[], None]:
        def call() -> None:
            # A text of its own for each, so that no text is encoded before.
            answers[name] = dict(encoder.extract(image, f"question {index}, {name}?"))

        return call

    def whole(index: int) -> Callable[[], Any]:
        def call() -> None:
            with patch("diffenc.passes.reuse.text_free_prefix", lambda _: ()):
                further(exact, "whole", index)()

        return call

    def script(index: int) -> Callable[[], None]:
        ask = plain.prepare(Question(image, [f"question {index}, exact?"], 0))

        def call() -> None:
            answers["script"] = ask()

        return call

    def without_text(attended: bool, _index: int) -> Callable[[], Any]:
        def call() -> None:
            with ExitStack() as stack:
                if attended:
                    whole = patch("diffenc.passes.forward.skipping_blank_texts", _same)
                    stack.enter_context(whole)
                exact.extract(image, conditioning="uncond")

        backbone.caches.features.clear()  # the latents stay known
        return call

    # What a further question finds known: latents, features without a text, outputs for reuse.
    DiffusionEncoder(backbone, replace(config, taps=("latents",))).extract(
        image, conditioning="uncond"
    )
    calls: dict[str, Callable[[int], Callable[[], None]]] = {}
    if backbone.uncond_rule == "zeros":
        calls["no text, attended"] = partial(without_text, True)
        calls["no text, exact"] = partial(without_text, False)
    else:
        exact.extract(image, conditioning="uncond")
    calls |= {"plain script": script, "further, exact": partial(further, exact, "exact")}
    calls |= _key_calls(backbone, taps)
    if text_free_prefix(backbone.denoiser):
        calls["further, without the prefix"] = whole
    for part in ("down", "middle"):
        encoder = DiffusionEncoder(backbone, replace(config, reuse=part))
        encoder.extract(image, "warm", conditioning="cond")
        calls[f"further, {part}"] = partial(further, encoder, part)
    if compiled is not None:
        calls["further, compiled"] = partial(further, _compiled(backbone, config, image, compiled),
                                             "compiled")  # fmt: skip
    timer = time.process_time if device.type == "cpu" else time.perf_counter
    load = [os.getloadavg()[0]]
    seconds = in_turn(calls, device, repeats=repeats, timer=timer)
    load.append(os.getloadavg()[0])
    difference = _difference(answers["script"], answers["exact"])
    if not difference <= AGREEMENT[dtype]:
        raise ValueError(f"the plain script reads other features: {difference:.2g} apart")
    about = describe_machine(device, dtype, 0.0)
    busy = f"load {load[0]:.1f} before and {load[1]:.1f} after, on {os.cpu_count()} cores"
    facts = (about["device"], about["dtype"], f"torch {about['torch']}", busy, remark)
    machine = ", ".join(fact for fact in facts if fact)
    return Times(machine, size, seconds, difference)


def _compiled(
    backbone: Backbone, config: EncoderConfig, image: Tensor, backend: str
) -> DiffusionEncoder:
    """An encoder with compiled code of its own on the same weights, warm for further questions."""
    twin = copy.copy(backbone)
    twin.caches, twin.compiled = Caches(), {}
    encoder = DiffusionEncoder(twin, config)
    encoder.compile(backend=backend)
    encoder.extract(image, conditioning="uncond")
    encoder.extract(image, "warm")  # a text of its own leaves the shape as it will be
    return encoder


def text_projections(unet: Any, taps: Sequence[str]) -> list[Any]:
    """Projections of the text's keys and values that features at the taps depend on."""
    paths = reached_projections(dict(unet.config), taps)
    return [unet.get_submodule(path) for path in paths if path.endswith((".to_k", ".to_v"))]


def _key_calls(
    backbone: Backbone, taps: Sequence[str]
) -> dict[str, Callable[[int], Callable[[], None]]]:
    """Projections of texts alone: of many rows, and of one."""
    layers = text_projections(backbone.denoiser, taps)
    shape = (ROWS, 77, layers[0].in_features)
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    states = states.to(backbone.device, backbone.dtype)

    def project(rows: int, _index: int) -> Callable[[], None]:
        @torch.no_grad()
        def call() -> None:
            for layer in layers:
                layer(states[:rows])

        return call

    return {_ALL_KEYS: partial(project, ROWS), _KEYS_ONCE: partial(project, 1)}


def _same(unet: Any, *_: Any, **__: Any) -> Any:
    return unet


def _shared_parts(backbone: Backbone) -> dict[str, Any]:
    """Parts that the stock pipeline takes as they are, so that they lie in memory once."""
    parts = backbone.parts()
    return {
        name: part
        for name, part in parts.items()
        if name.startswith("text") or (name == "unet" and is_plain_format(part))
    }


def _difference(expected: Mapping[str, Tensor], features: Mapping[str, Tensor]) -> float:
    """Largest difference over taps, relative to the largest magnitude at the tap."""
    return max(
        float((features[tap] - each).abs().max() / each.abs().max())
        for tap, each in expected.items()
    )
