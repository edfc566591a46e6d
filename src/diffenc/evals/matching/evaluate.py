"""Score the items of a benchmark with several models, in several trials, resumably."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffenc.errors import ConfigError, ImageError, NonFiniteError, ShapeError
from diffenc.evals.inspection import Progress, summary, unreadable
from diffenc.evals.items import Problem, check_unique
from diffenc.evals.matching.base import Item, Matcher, MatchingBenchmark
from diffenc.evals.matching.inspection import Inspection, inspect
from diffenc.evals.matching.metrics import Results, by_label, correct, overall
from diffenc.evals.records import SCORES, RecordsFile


@dataclass(frozen=True)
class Evaluation:
    """Scores of a benchmark's items.

    Attributes:
        benchmark: Benchmark whose items were scored.
        items: Items that could be scored.
        scores: Scores of each model by name, (trials items 2 2), with one more axis if the model
            gives parts.
        seeds: Seeds of the trials of each model, by name of the model.
        descriptions: Everything that the scores of a model depend on, by name of the model.
        problems: Reasons why other items were left out.
        notes: Remarks on data and texts that do not stop an evaluation.
        fresh: Number of item scores that were computed in this run; the others were in the results
            file.
        parameters: Numbers of parameters of image tower, text tower and whole, by name of the
            model; models that do not tell theirs are left out.
    """

    benchmark: MatchingBenchmark
    items: tuple[Item, ...]
    scores: Mapping[str, Tensor]
    seeds: Mapping[str, tuple[int, ...]]
    descriptions: Mapping[str, Mapping[str, Any]]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    fresh: int = field(default=0, compare=False)
    parameters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def results(self, name: str) -> Results:
        """Text, image and group score of a model, in percent."""
        return results_of(self.scores[name], self)

    def by_label(self, name: str, kind: str | None = None) -> dict[str, Results]:
        """Text, image and group score per label of a kind; None is the benchmark's own kind."""
        right = correct(self.scores[name])
        return by_label(right, self.items, kind or self.benchmark.label_kind)

    def label_kinds(self) -> tuple[str, ...]:
        """Kinds of labels that items carry."""
        return tuple(dict.fromkeys(kind for item in self.items for kind in item.labels))


def results_of(scores: Float[Tensor, "trials items 2 2"], evaluation: Evaluation) -> Results:
    """Text, image and group score, in percent, of scores of an evaluation's items."""
    benchmark = evaluation.benchmark
    return overall(
        correct(scores),
        evaluation.items,
        average=benchmark.average,
        label_kind=benchmark.label_kind,
    )


def evaluate(
    benchmark: MatchingBenchmark,
    matchers: Sequence[Matcher],
    *,
    trials: int = 3,
    seed: int = 0,
    results: "Path | None" = None,
    skip_broken: bool = False,
    inspection: Inspection | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score every item with every model.

    All pictures are looked at before the first is scored. With a results file nothing that is in it
    is scored again, so a run that was interrupted is repeated with the same call.

    Args:
        benchmark: Benchmark whose items are scored.
        matchers: Models that score the items; those for which the seed changes nothing run once.
        trials: Number of trials, 1 or more; trial k has the noise of seed + k.
        seed: Seed of the first trial.
        results: JSON lines file that keeps the scores; None keeps nothing.
        skip_broken: Whether items that cannot be read, before the first is scored or later, are
            left out, instead of raising an error.
        inspection: Result of `inspect`, if it was called before; None inspects the benchmark first.
        progress: Function that is called with the number of item scores that are done and the
            number of all of them; None reports nothing.

    Returns:
        Scores of all items, and what was found on the way.

    Raises:
        ConfigError: Broken items, two of an id, fewer than one trial, two models of one name, or a
            results file of something else.
        ImageError: A picture that could be read before cannot be read any more.
        OutputError: The results file cannot be written.
        ShapeError: A model returns something else than (images, texts).
        NonFiniteError: A model returns NaN or infinity.

    Examples:
        >>> from diffenc.evals import ClipMatcher, shapes_benchmark
        >>> clip = ClipMatcher.from_pretrained("shapes-clip")
        >>> evaluation = evaluate(shapes_benchmark("winoground", per_label=1), [clip])
        >>> evaluation.results("shapes-clip")["group"].items
        5
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ConfigError(f"trials must be an int of 1 or more, got {trials!r}")
    names = [matcher.name for matcher in matchers]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"models must be one or more, each with a name of its own; got {names}")
    check_unique((item.id for item in benchmark.items), benchmark.source)
    inspection = inspection or inspect(benchmark, matchers)
    inspection.check(benchmark.source, skip_broken=skip_broken)
    seeds = {
        matcher.name: tuple(range(seed, seed + (1 if matcher.deterministic else trials)))
        for matcher in matchers
    }
    with nullcontext() if results is None else scores_file(results, benchmark) as file:
        for matcher in matchers:
            if file is not None:
                file.add_model(matcher.name, matcher.description)
        run = _Run(benchmark, inspection, file, seeds, skip_broken, progress)
        rows = {matcher.name: run.score(matcher) for matcher in matchers}
        others = {name: file.others(name, inspection.digests) if file else [] for name in names}
    items = tuple(item for item in inspection.items if item.id not in run.broken)
    if not items:
        raise ConfigError(f"no item of {benchmark.source} is left: {summary(run.broken.values())}")
    return Evaluation(
        benchmark=benchmark,
        items=items,
        scores={
            name: torch.stack([each[item.id] for item in items], dim=1)
            for name, each in rows.items()
        },
        seeds=seeds,
        descriptions={matcher.name: dict(matcher.description) for matcher in matchers},
        problems=(*inspection.problems, *run.broken.values()),
        notes=(
            *inspection.notes,
            *(
                f"scores of {name} for {len(ids)} items that are not scored here are in "
                f"{results} ({', '.join(ids[:3])}{', ...' * (len(ids) > 3)})"
                for name, ids in others.items()
                if ids
            ),
        ),
        fresh=run.fresh,
        parameters={
            matcher.name: sizes
            for matcher in matchers
            if (sizes := getattr(matcher, "parameters", None))
        },
    )


def scores_file(path: Path, benchmark: MatchingBenchmark) -> RecordsFile:
    """The file of a benchmark's scores, opened for one program; close it."""
    header = {"benchmark": benchmark.name, "template": benchmark.template}
    return RecordsFile(Path(path), SCORES, header, source=benchmark.source)


class _Run:
    """Progress and results of one call of `evaluate`."""

    def __init__(
        self,
        benchmark: MatchingBenchmark,
        inspection: Inspection,
        file: RecordsFile | None,
        seeds: Mapping[str, Sequence[int]],
        skip_broken: bool,
        progress: Progress | None,
    ) -> None:
        self.fresh = 0
        self.broken: dict[str, Problem] = {}
        self._skip_broken = skip_broken
        self._benchmark, self._inspection, self._file = benchmark, inspection, file
        self._seeds, self._progress = seeds, progress
        keys = [
            (name, seed, item.id)
            for name, each in seeds.items()
            for item in inspection.items
            for seed in each
        ]
        self._total = len(keys)
        known = [file.get(key, inspection.digests[key[2]]) for key in keys] if file else []
        self._done = sum(scores is not None for scores in known)
        if progress is not None:
            progress(self._done, self._total)

    def score(self, matcher: Matcher) -> dict[str, Tensor]:
        """Scores (trials 2 2 ...) of a model by item, without those of broken pictures."""
        rows: dict[str, Tensor] = {}
        for item in self._inspection.items:
            if item.id in self.broken:
                continue
            try:
                rows[item.id] = self._item(matcher, item)
            except ImageError as error:  # it could be read when all were looked at
                if not self._skip_broken:
                    raise
                self.broken[item.id] = unreadable(f"id {item.id}", error)
        if len({row.shape for row in rows.values()}) > 1:
            shapes = sorted({*map(_shape, rows.values())})
            raise ShapeError(f"{matcher.name} scored items in shapes {shapes}")
        return rows

    def _item(self, matcher: Matcher, item: Item) -> Tensor:
        digest, trials = self._inspection.digests[item.id], []
        images = None
        for seed in self._seeds[matcher.name]:
            key = (matcher.name, seed, item.id)
            values = self._file.get(key, digest) if self._file else None
            if values is None:
                images = images or [picture.open() for picture in item.pictures]
                scores = matcher(images, self._benchmark.texts(item), seed=seed)
                values = _checked(scores, matcher.name, item.id).tolist()
                if self._file:
                    self._file.add(key, digest, values)
                self.fresh += 1
                self._done += 1
                if self._progress is not None:
                    self._progress(self._done, self._total)
            trials.append(torch.tensor(values, dtype=torch.float64, device="cpu"))
        return torch.stack(trials)


def _checked(scores: Tensor, name: str, item: str) -> Tensor:
    scores = scores.detach().float().cpu()
    if scores.ndim not in (2, 3) or scores.shape[:2] != (2, 2):
        raise ShapeError(
            f"{name} must score (2 images, 2 texts), with parts as a third axis or none; for item "
            f"{item!r} it gave {tuple(scores.shape)}"
        )
    if not torch.isfinite(scores).all():
        raise NonFiniteError(f"{name} gave NaN or infinity for item {item!r}")
    return scores


def _shape(row: Tensor) -> tuple[int, ...]:
    return tuple(row.shape[1:])
