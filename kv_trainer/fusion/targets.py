"""Fusions that look at the targets themselves, element by element or through their inner products."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from .static import Uniform


@dataclass
class Govern(Uniform):
    """Element by element, the teachers vote whether the student's state must rise or fall; the majority is averaged.

    Teachers that pull the other way do not count in that element.
    Source: GOVERN, arXiv 2405.03764, section 3.2, there on one logit a sample, here on each element of the target.
    """

    in_target_space: ClassVar[bool] = True
    source: ClassVar[str] = "GOVERN, arXiv 2405.03764"

    def mixing(self, differences: Tensor, weight: Tensor, keep: int) -> Tensor:
        sign = differences.sign()
        vote = (sign * weight).sum(0).sign()
        # A tie, or a student that agrees, lets all of them count.
        return weight * ((sign == vote) | (vote == 0))


@dataclass
class MinNorm(Uniform):
    """Sample by sample, the convex mixture of the teachers' pulls that is shortest: no teacher is worked against.

    A teacher's pull is its target less the student's state, the negative gradient of the squared error, so no backward
    pass is needed. The weights minimise |sum_m w_m pull_m|^2 over the simplex, exactly, by trying all faces of it.
    Source: AE-KD, Du et al., NeurIPS 2020, eq. 7, after MGDA, arXiv 1810.04650.
    """

    in_target_space: ClassVar[bool] = True
    source: ClassVar[str] = "AE-KD, NeurIPS 2020"

    def mixing(self, differences: Tensor, weight: Tensor, keep: int) -> Tensor:
        others = [axis for axis in range(1, differences.dim()) if axis != keep]
        # An element in which a teacher has no share, such as a masked one, is no pull.
        scaled = differences * weight.sqrt()
        pulls = scaled.movedim(keep, 1).flatten(2).transpose(0, 1)  # [B, M, elements]
        there = (weight > 0).movedim(keep, 1).flatten(2).any(2).T  # [B, M]
        found = min_norm_weights(pulls @ pulls.mT, there).T  # [M, B]
        for axis in others:
            found = found.unsqueeze(axis)
        found = found * weight
        # Where only teachers speak that the mixture leaves out, they are better than nobody.
        return torch.where(found.sum(0) > 0, found, weight)


def min_norm_weights(products: Tensor, there: Tensor | None = None) -> Tensor:
    """Weights [B, M] on the simplex that minimise w' A w; products A [B, M, M], symmetric and positive semidefinite.

    there: [B, M] bool, the teachers that have anything to say; the pull of another is zero, and would be the shortest.
    On the face of the teachers S, w is proportional to (A_S)^-1 1; the best face whose weights are all positive is
    the answer. There are 2^M - 1 faces: meant for a handful of teachers.
    """
    batch, count, _ = products.shape
    dtype = products.dtype
    products = products.double()  # teachers that are nearly one make faces that float32 cannot tell from singular
    size = products.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-20)
    best = products.new_full((batch,), torch.inf)
    weights = products.new_full((batch, count), 1 / count)
    there = torch.ones_like(weights, dtype=torch.bool) if there is None else there
    for number in range(1, count + 1):
        for face in combinations(range(count), number):
            index = torch.tensor(face, device=products.device)
            part = products[:, index][:, :, index] / size[:, None, None]
            part = part + 1e-7 * torch.eye(number, device=products.device, dtype=products.dtype)
            solved = torch.linalg.solve(part, part.new_ones(batch, number, 1)).squeeze(2)
            share = solved / solved.sum(1, keepdim=True)
            value = torch.einsum("bi,bij,bj->b", share, part, share)
            better = (share >= 0).all(1) & (value < best) & there[:, index].all(1)
            best = torch.where(better, value, best)
            full = torch.zeros_like(weights).index_copy(1, index, share)
            weights = torch.where(better[:, None], full, weights)
    return weights.to(dtype)
