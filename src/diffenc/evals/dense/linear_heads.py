"""Linear heads on the cells of feature maps, in closed form and from one pass over the pictures."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffenc.errors import NonFiniteError, ShapeError

RIDGE = 1e-2
"""Share of each channel's variance that is added to it: neighbouring cells are alike."""


@dataclass(frozen=True, slots=True)
class LinearHead:
    """A linear layer that is applied to every cell.

    Attributes:
        weight: Weights of the layer.
        bias: Bias of each output.
    """

    weight: Float[Tensor, "c outputs"]
    bias: Float[Tensor, " outputs"]

    def __call__(
        self, maps: Float[Tensor, "b c _h _w"], grid: tuple[int, int]
    ) -> Float[Tensor, "b outputs gh gw"]:
        """Outputs at every cell, interpolated to a grid.

        Args:
            maps: Feature maps.
            grid: Height and width of the result.
        """
        scores = torch.einsum("bchw,ck->bkhw", maps.double().cpu(), self.weight)
        scores = scores + self.bias[:, None, None]
        return F.interpolate(scores, grid, mode="bilinear", antialias=True, align_corners=False)


class CellStatistics:
    """Sums over cells from which heads follow, whatever the number of pictures.

    A cell of a coarse map that covers several classes counts for each by its share.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._sums: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def add(
        self,
        maps: Float[Tensor, "b c h w"],
        targets: Float[Tensor, "b k _gh _gw"],
        known: Float[Tensor, "b _gh _gw"] | None = None,
    ) -> None:
        """Count the cells of some pictures.

        Args:
            maps: Feature maps.
            targets: Values to predict, on a grid that is finer or as fine; of classes, 1 for the
                class of a place and 0 for all others.
            known: 1 where the target is known, 0 elsewhere; None is everywhere.

        Raises:
            NonFiniteError: Features with NaN or infinity.
        """
        grid = (maps.shape[-2], maps.shape[-1])
        if known is None:
            known = torch.ones_like(targets[:, 0])
        shares = F.adaptive_avg_pool2d(known[:, None].double(), grid)
        sums = F.adaptive_avg_pool2d(targets.double() * known[:, None], grid)
        x = rearrange(maps.double().cpu(), "b c h w -> (b h w) c")
        if not torch.isfinite(x).all():
            raise NonFiniteError("features to be read out hold NaN or infinity")
        w = rearrange(shares, "b 1 h w -> (b h w) 1")
        y = rearrange(sums, "b k h w -> (b h w) k")  # already weighted by what is known
        added = ((w * x).sum(0), y.sum(0), x.T @ (w * x), x.T @ y)
        self._weight += float(w.sum())
        self._sums = (
            added
            if self._sums is None
            else tuple(old + new for old, new in zip(self._sums, added, strict=True))  # type: ignore[assignment]
        )

    def regressor(self) -> LinearHead:
        """Ridge regression of the targets.

        Raises:
            ShapeError: No cell was counted.

        Source:
            Hastie, Tibshirani and Friedman 2009, The Elements of Statistical Learning, equation
            3.44, with a penalty for each channel by its variance.
        """
        n, (x, y, xx, xy) = self._counted()
        mean, target = x / n, y / n
        covariance = xx / n - torch.outer(mean, mean)
        weight = _solved(covariance, xy / n - torch.outer(mean, target), covariance.diagonal())
        return LinearHead(weight, target - mean @ weight)

    def classifier(self) -> LinearHead:
        """Linear discriminants; the softmax of its outputs gives each class's probability.

        Raises:
            ShapeError: No cell was counted.

        Source:
            Hastie, Tibshirani and Friedman 2009, The Elements of Statistical Learning, equation
            4.10.
        """
        n, (x, counts, xx, xy) = self._counted()
        centroids = xy / counts.clamp_min(1e-9)
        within = (xx - (centroids * counts) @ centroids.T) / n
        variance = xx.diagonal() / n - (x / n).square()
        weight = _solved(within, centroids, variance)
        bias = (counts / n).clamp_min(1e-9).log() - 0.5 * (centroids * weight).sum(0)
        never = counts <= 0
        return LinearHead(weight, bias.masked_fill(never, -1e9))

    def _counted(self) -> tuple[float, tuple[Tensor, Tensor, Tensor, Tensor]]:
        if self._sums is None or self._weight <= 0:
            raise ShapeError(
                "a head needs pictures to be fitted to, and a cell whose value is known"
            )
        return self._weight, self._sums


def _solved(
    covariance: Float[Tensor, "c c"], values: Float[Tensor, "c k"], variance: Float[Tensor, " c"]
) -> Float[Tensor, "c k"]:
    """The ridge solution; a channel whose whole variance is nothing gets no weight."""
    scale = variance.clamp_min(0).sqrt()
    scale = torch.where(scale > 1e-9 * scale.max().clamp_min(1e-300), scale, torch.inf)
    standard = covariance / torch.outer(scale, scale)
    identity = torch.eye(len(scale), dtype=torch.float64, device="cpu")
    solution: Tensor = torch.linalg.solve(standard + RIDGE * identity, values / scale[:, None])
    return solution / scale[:, None]
