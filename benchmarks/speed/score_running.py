"""From a case to measured rows of scores: agreement first, then times in turn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from speed.bench import Bench, DisagreementError
from speed.contenders import is_plain_format
from speed.counting import Counts, counted, score_arithmetic
from speed.measuring import in_turn, median
from speed.score_cases import (
    QUICK_SIZE,
    SIZE,
    Kind,
    ScoreCase,
    ask_scores,
    score_config,
)
from speed.score_contenders import BareParts, DiffencScores, ReleasedWay
from speed.score_tables import ScoreRow

AGREEMENT = {torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Largest difference of scores, relative to the released way's."""

Seconds = Mapping[str, Sequence[float]]


@dataclass(slots=True, kw_only=True)
class ScoreBench(Bench):
    """Where and how scores are measured.

    Attributes:
        batch_size: Rows per call of the U-Net, of diffenc and of the bare passes.
        pairs: Pairs that the released way is timed on.
    """

    batch_size: int
    pairs: int

    @property
    def size(self) -> int:
        """Side of the pictures, in pixels."""
        return QUICK_SIZE if self.quick else SIZE


def measure_scores(bench: ScoreBench, case: ScoreCase) -> list[ScoreRow]:
    """Rows of one case: the released way, then diffenc's kinds of score.

    Raises:
        DisagreementError: Contenders give different scores.
    """
    backbone = bench.backbone(case.model)
    plain = backbone.unet if is_plain_format(backbone.unet) else None
    first = next(iter(case.goals))
    released = ReleasedWay(
        bench.folder(case.model),
        _config(bench, first),
        first,
        device=bench.device,
        dtype=bench.dtype,
        unet=plain,
    )
    apart = {kind: _agree(bench, case, released, kind) for kind in case.goals}
    # What is read of its passes differs by kind, the passes do not: one of them is timed.
    kind: Kind = "discffusion" if "discffusion" in case.goals else first
    timed = _Timed(bench, case, released.as_kind(kind, _config(bench, kind)))
    seconds = in_turn(
        timed.calls(), bench.device, repeats=bench.repeats, limit=bench.limit, timer=bench.timer
    )
    return _rows(bench, case, timed, seconds, apart)


def _config(bench: ScoreBench, kind: Kind, *, short: bool = False) -> Any:
    return score_config(kind, quick=bench.quick, batch_size=bench.batch_size, short=short)


def _agree(bench: ScoreBench, case: ScoreCase, released: ReleasedWay, kind: Kind) -> float:
    """How far diffenc's score of a pair at one timestep is from the released way's; it warms both.

    For shared queries the released passes hold what is needed too: the queries of the half without
    a text, and the keys of that with one.
    """
    config = _config(bench, kind, short=True)
    question = ask_scores(case, -1, size=bench.size)
    question.images, question.texts = question.images[:1], question.texts[:1]
    ours = DiffencScores(bench.backbone(case.model), config).prepare(question)()
    theirs = released.as_kind(kind, config).prepare(question)()
    apart = float((ours.flatten() - theirs.cpu().flatten()).abs() / theirs.cpu().abs().flatten())
    if not apart <= AGREEMENT[bench.dtype]:
        raise DisagreementError(
            f"diffenc and the released way give different scores of kind {kind!r}: {apart:.2g} "
            f"apart, where rounding in {bench.dtype} stays below {AGREEMENT[bench.dtype]}"
        )
    return apart


class _Timed:
    """All that takes turns in a case, and what it counts."""

    def __init__(self, bench: ScoreBench, case: ScoreCase, released: ReleasedWay) -> None:
        self.bench, self.case, self.released = bench, case, released
        backbone = bench.backbone(case.model)
        self.ours = {kind: DiffencScores(backbone, _config(bench, kind)) for kind in case.goals}
        self.bare = BareParts(backbone, rows=bench.batch_size, size=bench.size)
        self.pairs = min(bench.pairs, case.pairs)
        self.counts: dict[str, Counts] = {}

    def calls(self) -> dict[str, Callable[[int], Callable[[], Any]]]:
        found: dict[str, Callable[[int], Callable[[], Any]]] = {
            ReleasedWay.name: partial(self._prepare, ReleasedWay.name, self.released)
        }
        for kind, contender in self.ours.items():
            found[kind] = partial(self._prepare, kind, contender)
        for name, call in self.bare.calls().items():
            found[f"bare {name}"] = lambda _index, call=call: call  # type: ignore[misc]
        return found

    def _prepare(
        self, name: str, contender: ReleasedWay | DiffencScores, index: int
    ) -> Callable[[], None]:
        # Its own question for each: latents that another call left in memory would be a gift.
        number = index * 10 + [ReleasedWay.name, *self.ours].index(name)
        question = ask_scores(self.case, number, size=self.bench.size)
        if isinstance(contender, ReleasedWay):
            call = contender.prepare(question, self.pairs)
        else:
            call = contender.prepare(question)

        def run() -> None:
            with counted(contender.parts) as self.counts[name]:
                call()

        return run


def _rows(
    bench: ScoreBench,
    case: ScoreCase,
    timed: _Timed,
    seconds: Seconds,
    apart: Mapping[Kind, float],
) -> list[ScoreRow]:
    work = score_arithmetic(bench.folder(case.model), bench.size)
    times_more = case.pairs / timed.pairs
    released = [each * times_more for each in seconds[ReleasedWay.name]]
    rows = []
    for name in (ReleasedWay.name, *timed.ours):
        ours = name != ReleasedWay.name
        factor = 1.0 if ours else times_more
        counts = Counts(**{k: round(v * factor) for k, v in timed.counts[name].to_dict().items()})
        whole = [each * factor for each in seconds[name]]
        operations = work.total(counts, exits=ours and name != "discffusion")
        row = ScoreRow(
            case=case.name,
            title=case.title if not bench.quick else f"{case.title} (narrow, small)",
            contender=f"diffenc, {name}" if ours else name,
            pairs=case.pairs,
            timed_pairs=case.pairs if ours else timed.pairs,
            seconds=median(whole),
            calls=list(seconds[name]),
            **counts.to_dict(),
            operations=operations,
            share=operations / median(whole) / bench.rate,
        )
        if ours:
            kind: Kind = name  # type: ignore[assignment]
            row.speedup = median([a / b for a, b in zip(released, whole, strict=True)])
            row.goal = None if bench.quick else case.goals[kind]
            row.passes, row.floor = _floor(kind, counts, seconds, bench.batch_size)
            row.difference = apart[kind]
        rows.append(row)
    return rows


def _floor(kind: Kind, counts: Counts, seconds: Seconds, rows: int) -> tuple[float, float]:
    """Shares of diffenc's time: of the bare passes alone, and of all bare parts."""
    calls = seconds["bare whole pass" if kind == "discffusion" else "bare pass"]
    passes, floors = [], []
    for index, whole in enumerate(seconds[kind]):
        of_passes = counts.unet_rows / rows * calls[index]
        others = counts.vae_pictures * seconds["bare VAE"][index]
        others += counts.texts * seconds["bare text"][index]
        passes.append(of_passes / whole)
        floors.append((of_passes + others) / whole)
    return median(passes), median(floors)
