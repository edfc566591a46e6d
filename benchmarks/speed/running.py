"""From a case to measured rows: agreement and counts first, then times in turn, then peaks."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffenc.config import EncoderConfig
from speed.bench import Bench, DisagreementError
from speed.cases import Case, Question, ask
from speed.contenders import COMPILED, Contender, Diffenc, DiftScript, PlainScript, is_plain_format
from speed.counting import Arithmetic, Counts, arithmetic, counted
from speed.floor import Floor
from speed.measuring import (
    clock,
    forget_peak,
    in_turn,
    median,
    peak_memory,
    weight_bytes,
)
from speed.tables import Row

AGREEMENT = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
"""Largest difference of features, relative to the tap's largest magnitude; rounding reaches about
a third of it. Times of calls that answer something else would not compare."""


@dataclass(slots=True, kw_only=True)
class EncoderBench(Bench):
    """Where and how the encoder is measured.

    Attributes:
        memory: Measure peaks.
        options: Of `torch.compile`.
    """

    memory: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


def measure(
    bench: EncoderBench, case: Case, *, batch: int = 1, compiled: bool = False
) -> list[Row]:
    """Rows of one case at one batch size.

    Args:
        bench: See there.
        case: What is asked.
        batch: Pictures per call.
        compiled: Time diffenc eager and compiled; otherwise diffenc, its rival and the floor.

    Raises:
        DisagreementError: Contenders read different features.
    """
    config = case.config(quick=bench.quick)
    backbone = bench.backbone(case.model)
    taps = [tap.name for tap in backbone.match_taps(config.taps or ())]
    contenders = list(_contenders(bench, case, config, taps, compiled=compiled))
    questions = partial(_ask, case, config, batch, bench.device)
    counts = _agree(bench, case, contenders, questions)
    contenders = [contender for contender in contenders if contender.name in counts]
    if not contenders:
        return []
    calls = {contender.name: partial(_prepare, contender, questions) for contender in contenders}
    seconds = in_turn(
        calls, bench.device, repeats=bench.repeats, first=2, limit=bench.limit, timer=bench.timer
    )
    peaks = {}
    if bench.memory:
        peaks = _peaks(bench, case, contenders, questions, 2 + bench.repeats, batch)
    work = arithmetic(bench.folder(case.model), tuple(taps), questions(0).images.shape[-1])
    return _rows(bench, case, contenders, seconds, counts, work, peaks, batch)


def _ask(
    case: Case, config: EncoderConfig, batch: int, device: torch.device, index: int
) -> Question:
    assert isinstance(config.size, int)
    return ask(case, index, size=config.size, batch=batch, device=device)


def _prepare(
    contender: Contender, questions: Callable[[int], Question], index: int
) -> Callable[[], Any]:
    return contender.prepare(questions(index))


def _contenders(
    bench: EncoderBench, case: Case, config: EncoderConfig, taps: list[str], *, compiled: bool
) -> Iterator[Contender]:
    backbone = bench.backbone(case.model)
    yield Diffenc(backbone, config)
    if compiled:
        yield Diffenc(backbone, config, compiled=True, options=bench.options)
        return
    shared = backbone.unet if is_plain_format(backbone.unet) else None
    yield rival(bench, case, config, taps, unet=shared)
    yield Floor(backbone, config, taps, again=case.again)


def rival(bench: Bench, case: Case, config: EncoderConfig, taps: list[str], **given: Any) -> Any:
    """The plain script that a case is held against."""
    kind = DiftScript if case.rival == DiftScript.name else PlainScript
    folder = bench.folder(case.model)
    return kind(folder, config, taps, device=bench.device, dtype=bench.dtype, **given)


def _agree(
    bench: Bench, case: Case, contenders: Sequence[Contender], questions: Callable[[int], Question]
) -> dict[str, tuple[Counts, float]]:
    """Counts of each that fits into memory, and how far its features are from those of the first.

    It also warms all of them, and compiles.
    """
    found: dict[str, tuple[Counts, float]] = {}
    expected: dict[str, Tensor] = {}
    for contender in contenders:
        try:
            if case.again or isinstance(contender, Diffenc):
                contender.prepare(questions(0))()  # what a further question finds remembered
            call = contender.prepare(questions(1))
            with counted(contender.parts) as counts:
                features = call()
        except torch.cuda.OutOfMemoryError:
            bench.notes.append(f"{case.name}: {contender.name} ran out of memory in a batch of "
                               f"{len(questions(0).prompts)}")  # fmt: skip
            torch.cuda.empty_cache()
            continue
        expected = expected or features
        apart = _difference(expected, features)
        if not apart <= AGREEMENT[bench.dtype]:
            raise DisagreementError(
                f"{next(iter(found))} and {contender.name} read different features: {apart:.2g} "
                f"of the largest magnitude, where rounding in {bench.dtype} stays below "
                f"{AGREEMENT[bench.dtype]}"
            )
        found[contender.name] = (counts, apart)
    if COMPILED in found and "diffenc" in found:  # hooks do not count in compiled code
        found[COMPILED] = (found["diffenc"][0], found[COMPILED][1])
    return found


def _difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    apart = 0.0
    for tap, features in expected.items():
        limit = float(features.float().abs().max())
        apart = max(apart, float((found[tap].float() - features.float()).abs().max()) / limit)
    return apart


def _rows(
    bench: Bench,
    case: Case,
    contenders: list[Contender],
    seconds: dict[str, list[float]],
    counts: dict[str, tuple[Counts, float]],
    work: Arithmetic,
    peaks: Mapping[str, int | None],
    batch: int,
) -> list[Row]:
    times = {name: median(values) for name, values in seconds.items()}
    rows = []
    for contender in contenders:
        name = contender.name
        of_calls, apart = counts[name]
        operations = work.total(of_calls, exits=contender.exits)
        row = Row(
            case=case.name,
            title=case.title if not bench.quick else f"{case.title} (narrow, small)",
            contender=name,
            batch=batch,
            seconds=times[name],
            calls=seconds[name],
            images_per_second=batch / times[name],
            **of_calls.to_dict(),
            operations=operations,
            share=operations / times[name] / bench.rate,
            peak_bytes=peaks.get(name),
            peak_truncated_bytes=peaks.get(f"{name}, truncated"),
            difference=apart,
        )
        if name == "diffenc":
            row.speedup = _ratio(seconds, case.rival, name)
            row.goal = None if bench.quick or case.rival not in seconds else case.goal
            over = _ratio(seconds, name, Floor.name)
            row.overhead = None if over is None else over - 1
        elif name == COMPILED:
            row.speedup = _ratio(seconds, "diffenc", name)
        rows.append(row)
    return rows


def _ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float | None:
    """Median over rounds: calls of one round meet the same load of the machine."""
    if over not in seconds or under not in seconds:
        return None
    return median([a / b for a, b in zip(seconds[over], seconds[under], strict=True)])


def _peaks(
    bench: EncoderBench,
    case: Case,
    contenders: list[Contender],
    questions: Callable[[int], Question],
    index: int,
    batch: int,
) -> dict[str, int | None]:
    """Most memory of one call of each, weights included."""
    if bench.device.type == "cuda":
        return _peaks_here(bench, contenders, questions, index)
    found = {}
    for name in [contender.name for contender in contenders]:
        if name == COMPILED:
            continue  # a process of its own would compile once more
        for asked in (name, f"{name}, truncated") if name == "diffenc" else (name,):
            found[asked] = _peak_elsewhere(bench, case, asked, batch)
    return found


def _peaks_here(
    bench: Bench, contenders: list[Contender], questions: Callable[[int], Question], index: int
) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for contender in contenders:
        call = contender.prepare(questions(index))
        before = torch.cuda.memory_allocated(bench.device)
        forget_peak(bench.device)
        clock(call, bench.device)
        grown = (peak_memory(bench.device) or 0) - before
        found[contender.name] = weight_bytes(*contender.parts.values()) + grown
        if isinstance(contender, Diffenc) and contender.name == "diffenc":
            found["diffenc, truncated"] = contender.truncated_weights() + grown
    return found


def _peak_elsewhere(bench: Bench, case: Case, contender: str, batch: int) -> int | None:
    """In a process that loads this contender and no other."""
    request = {
        "folder": str(bench.folder(case.model)),
        "case": case.name,
        "contender": contender,
        "batch": batch,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "quick": bench.quick,
    }
    command = [sys.executable, str(Path(__file__).with_name("peak.py")), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        bench.notes.append(f"{case.name}: no peak memory of {contender}: {reason}")
        return None
    peak: int | None = json.loads(done.stdout.splitlines()[-1])
    return peak
