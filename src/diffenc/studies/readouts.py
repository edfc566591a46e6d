"""What a linear layer can read from frozen features, in closed form."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from diffenc.errors import NonFiniteError, ShapeError

PENALTIES = tuple(10.0**power for power in range(-2, 6))
"""Ridge penalties to choose from, for standardised features."""

_NEGLIGIBLE = 1e-12  # of the largest singular value
_RIDGE = 1e-3  # of the mean variance of the scores, which sum to 1 and so lie in a plane


@dataclass(frozen=True, slots=True)
class Readout:
    """A linear classifier on standardised features.

    Attributes:
        weight: Weights of the linear layer (channels, classes).
        bias: Bias of each class.
        mean: Mean of each channel of the training features.
        scale: Standard deviation of each channel of the training features; 1 where they do not
            vary.
        penalty: Ridge penalty that was chosen, one of `PENALTIES`.
    """

    weight: Float[Tensor, "c classes"]
    bias: Float[Tensor, " classes"]
    mean: Float[Tensor, " c"]
    scale: Float[Tensor, " c"]
    penalty: float

    def predict(self, features: Float[Tensor, "n c"]) -> Int[Tensor, " n"]:
        """The class of each row."""
        standard = (features.double() - self.mean) / self.scale
        return (standard @ self.weight + self.bias).argmax(dim=1)

    def accuracy(self, features: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> float:
        """Share of rows whose class is right."""
        return float((self.predict(features) == labels).double().mean())


def fit_readout(features: Float[Tensor, "n c"], labels: Int[Tensor, " n"], classes: int) -> Readout:
    """Fit a penalised linear discriminant, with the penalty that predicts left-out rows best.

    Least squares to one-hot classes, then linear discriminants of the scores that rows get when
    they are left out. All of it is exact and costs one singular value decomposition; nothing is
    iterated and nothing random.

    Args:
        features: Features, one row per example.
        labels: Class of each example, 0 to `classes` - 1.
        classes: Number of classes; some may have no example.

    Raises:
        ShapeError: Fewer than two rows, or not one label per row, or a label out of range.
        NonFiniteError: NaN or infinity.

    Source:
        Hastie, Buja and Tibshirani 1995, Penalized Discriminant Analysis, Annals of Statistics 23.
        Hastie, Tibshirani and Friedman 2009, The Elements of Statistical Learning: section 3.4.1
        (ridge regression by singular values), equation 7.64 (left-out rows), section 4.2 (why
        regression alone loses classes).
    """
    _check(features, labels, classes)
    features = features.double().cpu()
    labels = labels.cpu()
    mean, scale = features.mean(dim=0), features.std(dim=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    left, singular, right = torch.linalg.svd((features - mean) / scale, full_matrices=False)
    kept = singular > _NEGLIGIBLE * singular.max()
    left, singular, right = left[:, kept], singular[kept], right[kept]
    targets = F.one_hot(labels, classes).double()
    centre = targets.mean(dim=0)
    projected = left.T @ (targets - centre)
    best: tuple[float, float, Tensor] | None = None
    for penalty in PENALTIES:
        shrink = singular**2 / (singular**2 + penalty)
        residuals = targets - centre - left @ (shrink[:, None] * projected)
        # The mean, fitted too, takes 1/n of the leverage of each row.
        leverage = (left**2) @ shrink + 1 / len(features)
        left_out = residuals / (1 - leverage).clamp_min(1e-9)[:, None]
        error = float((left_out**2).mean())
        if best is None or error < best[0]:
            best = (error, penalty, targets - left_out)
    assert best is not None
    _, penalty, scores = best
    weight = right.T @ ((singular / (singular**2 + penalty))[:, None] * projected)
    turn, offset = _discriminants(scores, targets)
    return Readout(weight @ turn, centre @ turn + offset, mean, scale, penalty)


def _discriminants(
    scores: Float[Tensor, "n classes"], targets: Float[Tensor, "n classes"]
) -> tuple[Float[Tensor, "classes classes"], Float[Tensor, " classes"]]:
    """Linear discriminants of regression scores: without them a class between two others is lost.

    Red, orange and yellow lie on a line: nowhere does the score of orange exceed both others.
    """
    counts = targets.sum(dim=0)
    centroids = (targets.T @ scores) / counts.clamp_min(1)[:, None]
    within = scores - targets @ centroids
    spread = within.T @ within / len(scores)
    size = spread.diagonal().mean().clamp_min(1e-12)
    identity = torch.eye(len(spread), dtype=torch.float64, device="cpu")
    inverse = torch.linalg.inv(spread + _RIDGE * size * identity)
    turn = inverse @ centroids.T
    offset = (counts / counts.sum()).log() - 0.5 * (centroids.T * turn).sum(dim=0)
    return turn, offset  # a class without examples has offset -inf and is never chosen


def _check(features: Tensor, labels: Tensor, classes: int) -> None:
    if len(features) < 2 or len(features) != len(labels):
        raise ShapeError(
            f"a readout needs two rows or more and a label for each, got {len(features)} rows and "
            f"{len(labels)} labels"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ShapeError(
            f"labels must be 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )
    if not torch.isfinite(features).all():
        raise NonFiniteError("features to be read out hold NaN or infinity")
