"""The layer axis by likeness: which teacher layers the student's layers already resemble."""

from __future__ import annotations

import torch
from torch import Tensor

from ..similarity import MIN_POSITIONS, cka_ratio, standardise, u_centred
from ..types import KVStates


def match_layers(similarity: Tensor) -> list[int]:
    """One teacher layer for each student layer, never going back, with the greatest total similarity.

    similarity: [Ls, Lt], student layers by teacher layers. Returns Ls indices, non-decreasing; where several are
    equally good, earlier teacher layers. ValueError where it is no matrix of finite numbers.
    """
    if similarity.dim() != 2 or not similarity.numel() or not similarity.isfinite().all():
        raise ValueError(
            f"The similarity of layers has shape {tuple(similarity.shape)}; it must be a matrix of finite numbers, "
            "student layers x teacher layers."
        )
    rows = similarity.tolist()
    totals = [0.0] * len(rows[0])  # totals[j]: the best so far with the newest student layer at teacher layer j
    origins: list[list[int]] = []  # where its best path had the layer before: at j or earlier
    for row in rows:
        best = 0
        origin = [best := j if totals[j] > totals[best] else best for j in range(len(row))]
        totals = [totals[k] + value for k, value in zip(origin, row, strict=True)]
        origins.append(origin)
    path = [totals.index(max(totals))]
    for origin in reversed(origins[1:]):
        path.append(origin[path[-1]])
    return path[::-1]


@torch.no_grad()
def layer_similarity(
    student_batches: list[KVStates], teacher_batches: list[KVStates], skip_first: int = 1, max_positions: int = 512
) -> Tensor:
    """Debiased CKA of every student layer with every teacher layer, averaged over keys and values: [Ls, Lt], CPU.

    student_batches, teacher_batches: the same batches, the teacher's states at the student's positions, with its mask
    [B, T] (True = aligned). HSIC is averaged over samples before it is divided.
    skip_first, max_positions: as in the `cka` loss. ValueError where no sample has 4 positions to compare.
    """
    samples: list[list[Tensor]] = []
    for student, teacher in zip(student_batches, teacher_batches, strict=True):
        for row, mask in enumerate(student.mask & teacher.mask):
            positions = mask.nonzero()[skip_first:, 0]
            if len(positions) > max_positions:
                positions = positions[torch.arange(max_positions, device=mask.device) * len(positions) // max_positions]
            if len(positions) >= MIN_POSITIONS:
                samples.append(_products(student, teacher, row, positions))
    if not samples:
        raise ValueError(
            f"No sample has {MIN_POSITIONS + skip_first} positions that are aligned with the teacher, so layers "
            "cannot be compared; give longer samples."
        )
    cross, ours, theirs = (torch.stack(hsic).mean(0) for hsic in zip(*samples, strict=True))
    return cka_ratio(cross, ours[:, :, None], theirs[:, None, :]).mean(0).float()


def _products(student: KVStates, teacher: KVStates, row: int, positions: Tensor) -> list[Tensor]:
    """HSIC of one sample, keys and values apart: [2, Ls, Lt] across, [2, Ls] and [2, Lt] of a layer with itself."""
    found = []
    for part in ("keys", "values"):
        ours, theirs = (_grams(getattr(states, part), row, positions) for states in (student, teacher))
        found.append((ours @ theirs.T, ours.square().sum(1), theirs.square().sum(1)))
    pairs = len(positions) * (len(positions) - 3)
    return [torch.stack(x).double().cpu() / pairs for x in zip(*found, strict=True)]


def _grams(tensors: tuple[Tensor, ...], row: int, positions: Tensor) -> Tensor:
    """U-centred Gram matrices of one sample's positions, flat: a [B, H, T, D] tensor a layer -> [L, P * P]."""
    mask = torch.ones(len(positions), dtype=torch.bool, device=positions.device)
    states = [standardise(x[row][:, positions].transpose(0, 1).flatten(1).float(), mask) for x in tensors]
    return torch.stack([u_centred(x @ x.mT, mask).flatten() for x in states])
