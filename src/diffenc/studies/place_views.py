"""Correspondence of surfaces at every place: cells of two views matched, and errors in space."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffenc.encoder import DiffusionEncoder
from diffenc.evals.dense.data import View
from diffenc.evals.dense.views import GRID, Matches, matches_of, recalls
from diffenc.studies.places import Figures, Place, Text, kept_places, named


@dataclass(frozen=True, slots=True, eq=False)
class Views:
    """Share of matches between two views of an object that are near the truth, in space.

    Attributes:
        name: Beginning of the names of the figures.
        pairs: Pairs of views.
    """

    name: str
    pairs: Sequence[tuple[View, View]]

    @property
    def total(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def measure(
        self, encoder: DiffusionEncoder, texts: Sequence[Text], done: Callable[[int], object]
    ) -> Figures:
        """See `Measure`."""
        matches: defaultdict[Place, list[Matches]] = defaultdict(list)
        read = kept_places(encoder, texts)
        for pair in self.pairs:
            sightings = (pair[0].sighting(GRID), pair[1].sighting(GRID))
            maps = read(
                [view.name for view in pair],
                [view.image() for view in pair],
                [view.caption for view in pair],
            )
            for place, (first, second) in maps.items():
                measured = matches_of(
                    sightings, (first.to(encoder.device), second.to(encoder.device))
                )
                if measured is not None:
                    matches[place].append(measured)
            done(1)
        return {place: named(self.name, recalls(each)) for place, each in matches.items()}
