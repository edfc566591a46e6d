"""Models that were loaded before: a copy takes a quarter of the time that loading takes.

Its weights lie elsewhere in memory than those of a file, and sums may round otherwise: features of
a copy are equal to those of a loaded model within a tolerance, not bit for bit.
"""

import copy
from functools import cache
from pathlib import Path

from diffenc.models import load_backbone
from diffenc.models.base import Backbone


@cache
def shared(folder: Path) -> Backbone:
    """The model of a folder that no test changes; nor does a test change this model."""
    return load_backbone(folder)


def fresh(folder: Path) -> Backbone:
    """A model of the test's own, equal to one that was loaded from the folder."""
    return copy.deepcopy(shared(folder))
