"""Centred kernel alignment: how alike two sets of features of the same pictures are."""

import math

from jaxtyping import Float
from torch import Tensor

from diffenc.errors import NonFiniteError, ShapeError


def cka(first: Float[Tensor, "n p"], second: Float[Tensor, "n q"]) -> float:
    """Linear CKA of two sets of features, by the unbiased estimator of HSIC.

    It does not change when features are turned, shifted or multiplied by a number. It is 1 for
    equal features, near 0 (on either side) for features that have nothing to do with each other,
    and never above 1: the estimator is an inner product of centred kernels.

    Args:
        first: Features, one row per picture.
        second: Features of the same pictures in the same order, with any number of channels.

    Raises:
        ShapeError: Fewer than four pictures, or other numbers of them.
        NonFiniteError: NaN or infinity, or features that are the same for all pictures.

    Source:
        Kornblith et al. 2019, arXiv:1905.00414, equations 1 and 4; the estimator is equation 5 of
        Song et al. 2012 (Feature selection via dependence maximization), JMLR 13.
    """
    if len(first) != len(second):
        raise ShapeError(f"CKA needs the same pictures twice, got {len(first)} and {len(second)}")
    return kernel_cka(*(_gram(_centred(each), _centred(each)) for each in (first, second)))


def guided_cka(
    uncond: Float[Tensor, "n c"], cond: Float[Tensor, "n c"], scales: tuple[float, ...]
) -> list[float]:
    """Linear CKA between f_u and f_u + s (f_c - f_u), for each scale s.

    The kernel of the guided features follows from those of both halves, so that each further scale
    costs nothing but numbers of pictures by pictures.

    Args:
        uncond: Unconditional features f_u, one row per picture.
        cond: Conditional features f_c of the same pictures.
        scales: Guidance scales s.

    Raises:
        ShapeError: Fewer than four pictures, or halves that do not fit.
        NonFiniteError: NaN or infinity, or features that are the same for all pictures.
    """
    if uncond.shape != cond.shape:
        raise ShapeError(f"both halves must fit, got {tuple(uncond.shape)} and {tuple(cond.shape)}")
    plain, under = _centred(uncond), _centred(cond)
    alone, mixed, other = _gram(plain, plain), _gram(plain, under), _gram(under, under)
    cross = mixed + mixed.T
    return [
        kernel_cka(alone, (1 - s) ** 2 * alone + s * (1 - s) * cross + s**2 * other) for s in scales
    ]


def kernel_cka(first: Float[Tensor, "n n"], second: Float[Tensor, "n n"]) -> float:
    """CKA of two kernels, by the unbiased estimator of HSIC."""
    own = hsic(first, first) * hsic(second, second)
    if not own > 0:
        raise NonFiniteError("CKA needs features that differ between pictures, and finite ones")
    return hsic(first, second) / math.sqrt(own)


def hsic(first: Float[Tensor, "n n"], second: Float[Tensor, "n n"]) -> float:
    """Unbiased estimator of the Hilbert-Schmidt independence criterion of two kernels.

    Raises:
        ShapeError: Fewer than four rows.
    """
    n = len(first)
    if n < 4:
        raise ShapeError(f"the unbiased estimator of HSIC needs 4 pictures or more, got {n}")
    one, two = (each.double().clone().fill_diagonal_(0) for each in (first, second))
    aligned = (one * two).sum()
    apart = one.sum() * two.sum() / ((n - 1) * (n - 2))
    along = 2 / (n - 2) * (one.sum(dim=0) @ two.sum(dim=0))
    return float(aligned + apart - along) / (n * (n - 3))


def _centred(features: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    """Without the mean, which HSIC does not see but rounding does."""
    rows = features.double()
    return rows - rows.mean(dim=0)


def _gram(first: Float[Tensor, "n c"], second: Float[Tensor, "n c"]) -> Float[Tensor, "n n"]:
    return first @ second.T
