"""How alike two sets of features are: HSIC and CKA with linear kernels. Pure maths, batched over leading axes.

Shapes: features [..., P, C] (P positions, any C on either side), Gram matrices [..., P, P], mask [..., P] bool, True =
counts. Results are [...]. Biased CKA reads nearly 1 on unrelated features of more channels than positions (0.986 at 32
positions), so everything that is compared here uses the debiased form (Song et al. 2012; arXiv 2010.15327).
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_POSITIONS = 4  # HSIC_1 divides by n (n - 3)
FLOOR = 1e-6  # of HSIC(K, K) at unit mean square length, below which there is no geometry to compare


def standardise(x: Tensor, mask: Tensor) -> Tensor:
    """Centred over the True positions and scaled to a mean square length of one, zero outside the mask.

    All zero where the positions differ from their mean by rounding alone. The scale carries no gradient: CKA does not
    see it, it only keeps products of any model's states within float32.
    """
    where = mask.unsqueeze(-1)
    count = mask.sum(-1).clamp_min(1)[..., None, None]
    mean = torch.where(where, x, 0).sum(-2, keepdim=True) / count
    centred = torch.where(where, x - mean, 0)
    with torch.no_grad():
        length = (centred.square().sum((-2, -1), keepdim=True) / count).sqrt()
        spread = length > 1e-5 * torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
        scale = torch.where(spread, 1 / length.clamp_min(1e-30), 0)
    return centred * scale


def u_centred(gram: Tensor, mask: Tensor) -> Tensor:
    """Gram matrix without its diagonal, centred so that the plain product of two is unbiased; zero where masked.

    With the diagonal at zero: K_ij - sum_l K_il / (n - 2) - sum_l K_lj / (n - 2) + sum_kl K_kl / ((n - 1)(n - 2)).
    """
    pair = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    pair = pair & ~torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    gram = torch.where(pair, gram, 0)
    n = mask.sum(-1)[..., None, None]
    rows = gram.sum(-1, keepdim=True) / (n - 2).clamp_min(1)
    whole = gram.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2)).clamp_min(1)
    return torch.where(pair, gram - rows - rows.mT + whole, 0)


def centred_product(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """HSIC_1 of two Gram matrices that are U-centred already; 0 below 4 positions."""
    n = mask.sum(-1)
    return torch.where(n >= MIN_POSITIONS, (a * b).sum((-2, -1)) / (n * (n - 3)).clamp_min(1), 0)


def linear_hsic(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """HSIC_1 of the linear kernels of x with y, of x with itself, and of y; both as `standardise` leaves them.

    The same as `centred_product` of U-centred Gram matrices, but these are never made where there are more positions
    than channels. Centred features have rows of zero sum, so that with the diagonal d taken out a Gram matrix K sums to
    K1 = -d, and tr(KL) is |X'Y|^2 - d_x d_y: one product of [C, P] and [P, C'], linear in the number of positions.
    """
    if x.shape[-2] >= max(x.shape[-1], y.shape[-1]):
        products = [(a.mT @ b).square().sum((-2, -1)) for a, b in ((x, y), (x, x), (y, y))]
    else:
        k, m = x @ x.mT, y @ y.mT
        products = [(a * b).sum((-2, -1)) for a, b in ((k, m), (k, k), (m, m))]
    n = mask.sum(-1)
    dx, dy = x.square().sum(-1), y.square().sum(-1)
    found = []
    for product, (a, b) in zip(products, ((dx, dy), (dx, dx), (dy, dy)), strict=True):
        middle = a.sum(-1) * b.sum(-1) / ((n - 1) * (n - 2)).clamp_min(1)
        total = product + middle - (a * b).sum(-1) * (1 + 2 / (n - 2).clamp_min(1))
        found.append(torch.where(n >= MIN_POSITIONS, total / (n * (n - 3)).clamp_min(1), 0))
    return found[0], found[1], found[2]


def debiased_hsic(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """HSIC_1 of two Gram matrices: zero on average for unrelated features; 0 below 4 positions.

    The same as [tr(KL) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2 / (n-2) 1'KL1] / (n (n-3)) with diagonals of zero.
    """
    return centred_product(u_centred(first, mask), u_centred(second, mask), mask)


def cka_ratio(cross: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), each factor of the denominator kept off zero."""
    return cross / (first.clamp_min(FLOOR).sqrt() * second.clamp_min(FLOOR).sqrt())


def debiased_cka(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Debiased linear CKA of two sets of features, -1 to 1; 0 below 4 positions or where one side has no spread."""
    return cka_ratio(*linear_hsic(standardise(x, mask), standardise(y, mask), mask))


def biased_cka(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Linear CKA as first defined (Kornblith et al., arXiv 1905.00414), 0 to 1: for reference only."""
    a, b = (z @ z.mT for z in (standardise(x, mask), standardise(y, mask)))
    cross, first, second = ((p * q).sum((-2, -1)) for p, q in ((a, b), (a, a), (b, b)))
    return cross / (first * second).clamp_min(1e-30).sqrt()
