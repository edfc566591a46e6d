"""Captions of other images as prompts: no image keeps one of its own."""

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diffenc.errors import ConfigError
from diffenc.evals.captioning.data import CaptionItem


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Captions of other images as prompts, one for each image.

    Attributes:
        donors: Index of the item whose caption each item gets.
        prompts: Caption that each item gets as its prompt.
    """

    donors: tuple[int, ...]
    prompts: tuple[str, ...]


def derangement(count: int, *, seed: int) -> tuple[int, ...]:
    """A permutation that leaves nothing in its place, each of them equally likely.

    Args:
        count: Number of things to permute, 2 or more.
        seed: Seed of the permutation; equal seed and count give the equal permutation.

    Raises:
        ConfigError: Fewer than two things, which cannot change places.
    """
    if count < 2:
        raise ConfigError(f"a derangement needs two images or more, got {count}")
    rng = random.Random(f"derangement/{seed}/{count}")
    order = list(range(count))
    while True:  # a random permutation is one in e cases, 2.7 tries on the average
        rng.shuffle(order)
        if all(place != thing for place, thing in enumerate(order)):
            return tuple(order)


def mismatched_prompts(items: Sequence[CaptionItem], *, seed: int) -> tuple[Mismatch, Mismatch]:
    """Two prompts per image, each a caption of another image, and of two different ones.

    Every image gives one caption to each of the two. A caption that is also one of the image's own
    references is exchanged with that of another image.

    Args:
        items: Images and their captions, three or more.
        seed: Seed of the derangements and of the choice among captions.

    Raises:
        ConfigError: Too few images, or too many equal captions.
    """
    if len(items) < 3:
        raise ConfigError(f"two foreign captions per image need three images, got {len(items)}")
    own = [{_plain(text) for text in item.references} for item in items]
    made: list[Mismatch] = []
    for turn in range(2):
        rng = random.Random(f"prompts/{seed}/{turn}")
        texts = [rng.choice(item.references) for item in items]
        donors = list(derangement(len(items), seed=2 * seed + turn))

        def fits(place: int, donor: int, texts: Sequence[str] = texts) -> bool:
            taken = any(donor == other.donors[place] for other in made)
            return donor != place and not taken and _plain(texts[donor]) not in own[place]

        _exchange(donors, fits)
        made.append(Mismatch(tuple(donors), tuple(texts[donor] for donor in donors)))
    return made[0], made[1]


def _exchange(donors: list[int], fits: Callable[[int, int], bool]) -> None:
    """Change donors until all fit, along shortest chains of exchanges; those that fit may stay.

    Raises:
        ConfigError: There is no way.
    """
    count = len(donors)
    owners: dict[int, int] = {}
    unfit = []
    for place, donor in enumerate(donors):
        if fits(place, donor):
            owners[donor] = place
        else:
            unfit.append(place)
    for first in unfit:
        chain = _chain(first, count, owners, fits)
        if chain is None:
            raise ConfigError(
                f"{count} images have too few different captions: image {first} finds none that "
                "is not its own. Take more images, or ones that differ more"
            )
        for place, donor in chain:
            donors[place] = donor
            owners[donor] = place


def _chain(
    first: int, count: int, owners: Mapping[int, int], fits: Callable[[int, int], bool]
) -> list[tuple[int, int]] | None:
    """Find a chain of exchanges that gives `first` a donor and leaves nobody without one."""
    taken_by: dict[int, int] = {}  # donor to the place that asks for it
    wants: dict[int, int] = {}  # place to the donor that it gives up
    asking = deque([first])
    while asking:
        place = asking.popleft()
        for step in range(1, count):
            donor = (place + step) % count
            if donor in taken_by or not fits(place, donor):
                continue
            taken_by[donor] = place
            if donor in owners:
                wants[owners[donor]] = donor  # its owner gives it up, and asks for another one
                asking.append(owners[donor])
                continue
            chain = [(place, donor)]
            while chain[-1][0] != first:
                given_up = wants[chain[-1][0]]
                chain.append((taken_by[given_up], given_up))
            return chain
    return None


def _plain(text: str) -> str:
    return " ".join(text.lower().rstrip(" .").split())
