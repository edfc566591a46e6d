"""A look at every picture and text before hours of work start."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from diffenc.errors import ConfigError, ImageError
from diffenc.evals.inspection import NAMED, Progress, summary, unreadable
from diffenc.evals.items import Problem
from diffenc.evals.matching.base import Item, Matcher, MatchingBenchmark

_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Inspection:
    """Result of `inspect`.

    Attributes:
        items: Items that can be scored.
        digests: Digest of the captions and pictures of each of these items, by id.
        problems: Reasons why other items cannot be scored.
        notes: Remarks on duplicates, texts that are cut, and missing items.
    """

    items: tuple[Item, ...]
    digests: Mapping[str, str]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    def check(self, source: str, *, skip_broken: bool) -> None:
        """Refuse what is broken.

        Raises:
            ConfigError: There are problems and they are not to be skipped, or nothing is left.
        """
        if self.problems and not skip_broken:
            raise ConfigError(
                f"{source} has {len(self.problems)} problems: {summary(self.problems, NAMED)}. "
                f"{len(self.items)} items are whole; go on with those by --skip-broken "
                "(skip_broken=True)"
            )
        if not self.items:
            reasons = f": {summary(self.problems)}" if self.problems else ""
            raise ConfigError(f"{source} has no item that can be scored{reasons}")


def inspect(
    benchmark: MatchingBenchmark,
    matchers: Sequence[Matcher] = (),
    *,
    progress: Progress | None = None,
) -> Inspection:
    """Read every picture once, and count what is broken, doubled or cut.

    Args:
        benchmark: Benchmark whose items are read.
        matchers: Models whose limits on the length of texts are checked.
        progress: Function that is called with the number of items read so far and the number of all
            items; None reports nothing.
    """
    problems, digests = list(benchmark.problems), {}
    whole, ids_by_digest = [], defaultdict(list)
    alike = 0
    for done, item in enumerate(benchmark.items):
        readings = []
        for picture in item.pictures:
            try:
                readings.append(picture.read()[1])
            except ImageError as error:
                problems.append(unreadable(f"id {item.id}", error))
        if len(readings) == 2:
            digests[item.id] = item.digest(readings)
            ids_by_digest[digests[item.id]].append(item.id)
            alike += readings[0] == readings[1]
            whole.append(item)
        if progress is not None:
            progress(done + 1, len(benchmark.items))
    notes = [*benchmark.notes, *_size_notes(benchmark, len(whole))]
    if alike:
        notes.append(f"{alike} items have the same picture twice and cannot be right")
    notes += _doubles(whole, ids_by_digest.values())
    notes += _cut(benchmark, whole, matchers)
    return Inspection(tuple(whole), digests, tuple(problems), tuple(notes))


def _size_notes(benchmark: MatchingBenchmark, count: int) -> list[str]:
    if benchmark.expected is None or count == benchmark.expected:
        return []
    return [
        f"{count} items where {benchmark.name} has {benchmark.expected}: results are not those of "
        "the benchmark"
    ]


def _doubles(items: Sequence[Item], same: Iterable[Sequence[str]]) -> list[str]:
    notes = []
    if equal := [item.id for item in items if item.captions[0] == item.captions[1]]:
        notes.append(
            f"{len(equal)} items have the same caption twice and cannot be right "
            f"({', '.join(equal[:_EXAMPLES])})"
        )
    uses = Counter(caption for item in items for caption in set(item.captions))
    if shared := sum(count > 1 for count in uses.values()):
        notes.append(f"{shared} captions occur in several items")
    if copies := sum(len(ids) - 1 for ids in same):
        notes.append(f"{copies} items are copies of others: same pictures, same captions")
    return notes


def _cut(
    benchmark: MatchingBenchmark, items: Sequence[Item], matchers: Sequence[Matcher]
) -> list[str]:
    texts = [text for item in items for text in benchmark.texts(item)]
    notes = []
    for matcher in matchers:
        if cut := [count for count in (matcher.truncated(texts) if texts else ()) if count > 0]:
            notes.append(
                f"{matcher.name} does not read all of {len(cut)} of {len(texts)} texts: up to "
                f"{max(cut)} tokens are cut"
            )
    return notes
