"""A look at every picture of a benchmark before hours of work start."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from diffenc.errors import ConfigError, ImageError
from diffenc.evals.items import Benchmark, ItemT, Picture, Problem

Progress = Callable[[int, int], None]
"""Function that is called with the number of things done so far, and the number of all things."""

_EXAMPLES = 3
NAMED = 20
"""Number of problems of a kind that an error names if work stops for them."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Result of reading every picture once.

    Attributes:
        digests: Digest of the content of each picture that can be read, by name of the picture.
        problems: Pictures that cannot be read, together with the problems that were known before.
    """

    digests: Mapping[str, str]
    problems: tuple[Problem, ...]

    def whole(self, pictures: Sequence[Picture]) -> bool:
        """Whether all of these can be read."""
        return all(picture.name in self.digests for picture in pictures)


def whole_items(
    benchmark: Benchmark[ItemT],
    *,
    skip_broken: bool,
    lacking: str,
    keep: Callable[[Sequence[ItemT]], Sequence[ItemT]] = tuple,
) -> tuple[tuple[ItemT, ...], Reading]:
    """Keep the items all of whose pictures can be read, and report on the others.

    Args:
        benchmark: Benchmark whose items are looked at.
        skip_broken: Whether broken items are left out, instead of raising an error.
        lacking: Description of what is missing if no item is left, such as "picture that can be
            captioned"; part of the error message.
        keep: Function that selects the items that count among those that can be read.

    Raises:
        ConfigError: There are problems and they are not to be skipped, or no item is left.
    """
    reading = read_pictures(
        [picture for item in benchmark.items for picture in item.pictures],
        source=benchmark.source,
        problems=benchmark.problems,
        skip_broken=skip_broken,
    )
    whole = tuple(keep([item for item in benchmark.items if reading.whole(item.pictures)]))
    if not whole:
        raise ConfigError(f"{benchmark.source} has no {lacking}")
    return whole, reading


def read_pictures(
    pictures: Sequence[Picture],
    *,
    source: str,
    problems: Sequence[Problem] = (),
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> Reading:
    """Open each picture once, and refuse what is broken, all of it in one message.

    Args:
        pictures: Pictures of all items; one that several items share is opened once. Two of one
            name are the same picture.
        source: Origin of the pictures, named in the error message.
        problems: Problems that were found when the tables were read.
        skip_broken: Whether broken items are left out, instead of raising an error.
        progress: Function that is called with the number of pictures read so far and the number of
            all pictures; None reports nothing.

    Raises:
        ConfigError: There are problems and they are not to be skipped, or two pictures differ and
            have the same name.
    """
    every = list(problems)
    digests: dict[str, str] = {}
    broken: set[str] = set()
    different = {(picture.name, id(picture.source)): picture for picture in pictures}
    for done, ((name, _), picture) in enumerate(different.items(), start=1):
        try:
            digest = picture.read()[1]
        except ImageError as error:
            if name not in broken:
                every.append(unreadable(name, error, f"cannot read the image {name}: "))
            broken.add(name)
        else:
            if digests.setdefault(name, digest) != digest:
                raise ConfigError(
                    f"{source} has two pictures that are called {name!r}, of which one would get "
                    "the answers of the other; give each a name of its own"
                )
        if progress is not None:
            progress(done, len(different))
    for name in broken:
        digests.pop(name, None)
    if every and not skip_broken:
        raise ConfigError(
            f"{source} has {len(every)} problems: {summary(every, NAMED)}. Mend them, or go on "
            "with the items that are whole by --skip-broken (skip_broken=True)"
        )
    return Reading(digests, tuple(every))


def unreadable(where: str, error: ImageError, beginning: str = "cannot read the image ") -> Problem:
    """The problem of a picture that cannot be read, without what every such error begins with."""
    return Problem("unreadable pictures", where, str(error).removeprefix(beginning))


def summary(problems: Iterable[Problem], examples: int = _EXAMPLES) -> str:
    """Counts by kind, each with a few examples, in one line."""
    kinds: defaultdict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        kinds[problem.kind].append(problem)
    parts = []
    for kind, every in kinds.items():
        some = [f"{p.where}: {p.detail}" if p.detail else p.where for p in every[:examples]]
        more = ", ..." if len(every) > examples else ""
        parts.append(f"{len(every)} {kind} ({', '.join(some)}{more})")
    return "; ".join(parts)


def left_out(problems: Sequence[Problem]) -> tuple[str, ...]:
    """A note on what was left out, or none."""
    return (f"{len(problems)} problems, left out: {summary(problems)}",) if problems else ()
