"""Losses of a denoiser over the cells that a text speaks of, and over those beside them.

In a crowded scene a caption speaks of a few cells in a hundred: what it is worth drowns in the mean
over all.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MARK = (1.0, -1.0, 1.0, -1.0)
"""Direction in which a prediction is to miss under a false caption.

That it must miss says not where to. At the best prediction the error's own gradient is zero on the
average, so that a margin between two errors alone is learnt very slowly.
"""


def spoken_about(ids: Tensor, bits: Tensor, nouns: Tensor) -> Tensor:
    """Per text the objects that its nouns name, as bits; without a noun those of all its words.

    Args:
        ids: Token ids (b tokens).
        bits: Per token the objects that it names (b tokens).
        nouns: Token ids of nouns.
    """
    by_noun = _joined(torch.where(torch.isin(ids, nouns), bits, 0))
    return torch.where(by_noun == 0, _joined(bits), by_noun)


def concerned(ids: Tensor, false_ids: Tensor, bits: Tensor, nouns: Tensor) -> Tensor:
    """Per text the objects of which a false one says something else, as bits.

    Where the words that differ name nothing, as those of a relation, all objects of its nouns.
    """
    of_nouns = spoken_about(ids, bits, nouns)
    changed = _joined(torch.where(ids == false_ids, 0, bits)) & of_nouns
    return torch.where(changed == 0, of_nouns, changed)


def _joined(bits: Tensor) -> Tensor:
    joined = torch.zeros(len(bits), dtype=torch.long)
    for column in bits.long().unbind(dim=1):
        joined |= column
    return joined


def cells(objects: Tensor, shares: Tensor) -> Tensor:
    """How much each cell (b h w) has to do with a set of objects, 0 to 1, their neighbours too.

    Args:
        objects: Objects as bits (b).
        shares: How much of each cell the objects cover (b objects h w).
    """
    chosen = ((objects[:, None] >> torch.arange(shares.shape[1])) & 1).to(shares.dtype)
    covered = torch.einsum("bo,bohw->bhw", chosen, shares).clamp(max=1)
    return F.max_pool2d(covered[:, None], 3, stride=1, padding=1)[:, 0]


def mean_inside(values: Tensor, inside: Tensor) -> Tensor:
    """Per row the mean of values (b h w) over cells by their weights; 0 where there are none."""
    size = inside.sum(dim=(1, 2))
    return (values * inside).sum(dim=(1, 2)) / size.clamp(min=1)


def missed(true: Tensor, false: Tensor, noise: Tensor, inside: Tensor, margin: float) -> Tensor:
    """How far a prediction is from right under a true caption, and from the mark under a false one.

    Args:
        true: Prediction under the true caption (b 4 h w), in units of its usual error.
        false: The same under the false one.
        noise: What they should be, in the same units.
        inside: Cells that the captions disagree about (b h w).
        margin: By how much the false one's squared error is to be larger.
    """
    mark = margin**0.5 * torch.tensor(MARK).view(1, 4, 1, 1)
    right = (true - noise).square().mean(dim=1)
    marked = (false - true - mark).square().mean(dim=1)
    return mean_inside(right + marked, inside).mean()


def beside(one: Tensor, other: Tensor, inside: Tensor) -> Tensor:
    """Mean squared difference of two predictions (b 4 h w) over the cells beside those inside."""
    return ((one - other).square().mean(dim=1) * (1 - inside)).mean()
