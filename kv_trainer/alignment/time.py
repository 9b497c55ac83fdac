"""The time axis: positions of texts that differ, by resampling or by selection.

A position is a number on the source's time axis: an integer takes that state, a fraction is between two of them, and
a negative one is masked. Source of the selection: R-KV as KaVa uses it, arXiv 2510.02312.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_indices(
    batch: int, source_length: int | Tensor, target_length: int | Tensor, device: torch.device | str | None = None
) -> Tensor:
    """[B, T] float positions u_i = i (S - 1) / (T - 1): the first target on the first source, the last on the last.

    Lengths are ints or [B] tensors; then T is the longest and a row is -1 behind its own end. T = 1 takes the first
    source position (as linspace does), S = 1 the only one, S = 0 gives -1, and T = 0 is [B, 0]. T > S is defined.
    """
    source = torch.as_tensor(source_length, dtype=torch.long, device=device).expand(batch)[:, None]
    target = torch.as_tensor(target_length, dtype=torch.long, device=device).expand(batch)[:, None]
    steps = torch.arange(int(target.max()) if batch else 0, device=device)
    parts = (target - 1).clamp_min(1)
    at = steps * (source - 1)
    # Whole part and rest apart: whole numbers are met exactly, however long the sequence.
    positions = at.div(parts, rounding_mode="floor") + at.remainder(parts) / parts
    return positions.masked_fill((steps >= target) | (source < 1), -1.0)


def neighbours(indices: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Which positions are unmasked, the source positions below and above, and how far in between (None: integers)."""
    indices = indices if indices.is_floating_point() else indices.long()
    keep = (indices >= 0) & (size > 0)
    at = torch.where(keep, indices, 0).clamp(0, max(size - 1, 0))
    if not at.is_floating_point():
        return keep, at.long(), at.long(), None
    low = at.floor()
    return keep, low.long(), at.ceil().long(), at - low


def time_resample(x: Tensor, indices: Tensor) -> Tensor:
    """States of `x` at positions of its time axis.

    x: [B, H, S, D] or [B, S, C]. indices: [B, T], or [B, H, T] for positions of each head's own; any integer or float
    type on any device. Integers gather; floats interpolate linearly between the two nearest positions. Positions
    beyond S - 1 are clamped to it; negative ones (and all, where S = 0) give zeros. Returns [B, H, T, D] or [B, T, C],
    with gradient to x.
    """
    if indices.dim() > x.dim() - 1 or indices.dim() < 2 or len(indices) != len(x):
        raise ValueError(
            f"indices are {list(indices.shape)} for states {list(x.shape)}; give one row of positions for each sample, "
            "[B, T], or [B, H, T] with states [B, H, S, D]."
        )
    if not x.shape[-2]:
        x, indices = F.pad(x, (0, 0, 0, 1)), torch.full_like(indices, -1, dtype=torch.long)
    keep, low, high, between = neighbours(indices.to(x.device), x.shape[-2])

    def over_heads(t: Tensor) -> Tensor:
        t = t[:, None] if t.dim() < x.dim() - 1 else t
        return t.expand(*x.shape[:-2], -1)[..., None]

    def gather(at: Tensor) -> Tensor:
        return x.gather(-2, over_heads(at).expand(*x.shape[:-2], -1, x.shape[-1]))

    out = gather(low)
    if between is not None:
        out = out.lerp(gather(high), over_heads(between).to(x.dtype))
    return out.masked_fill(~over_heads(keep), 0)


def segment_indices(source_segments: Tensor, target_segments: Tensor) -> Tensor:
    """[B, T] float positions, linear within each segment: prompt to prompt, reasoning to reasoning, answer to answer.

    source_segments, target_segments: [B, S] and [B, T] int, the segment of each position, negative for none. The
    first position of a segment goes to the first of its counterpart, the last to the last; -1 where the source has
    no such segment. Where a segment is in several pieces, no position falls between two pieces.
    """
    out = torch.full(target_segments.shape, -1.0, device=target_segments.device)
    for row, (source, target) in enumerate(zip(source_segments, target_segments, strict=True)):
        for segment in target[target >= 0].unique():
            theirs, ours = (source == segment).nonzero()[:, 0], target == segment
            if len(theirs):
                ranks = linear_indices(1, len(theirs), int(ours.sum()), out.device)[0]
                low, high = theirs[ranks.floor().long()], theirs[ranks.ceil().long()]
                within = low + (ranks - ranks.floor())
                out[row, ours] = torch.where(high - low > 1, theirs[ranks.round().long()].float(), within)
    return out


def rkv_select(
    keys: Tensor, importance: Tensor, mask: Tensor, budget: int | Tensor, tradeoff: float = 0.1
) -> tuple[Tensor, Tensor]:
    """The positions of every head that are looked at and unlike the others: top-`budget` of lambda I + (1 - lambda) R.

    keys: [B, H, S, D]. importance I: [B, S] or [B, H, S], mean attention of the answer's queries. mask: [B, S] bool,
    the positions to choose from (the real ones of the reasoning). budget: how many, an int or [B]. tradeoff: lambda.
    R_i = softmax_i(-(1/N) sum_{j != i} cos(k_i, k_j)) over the N positions of the mask. Others are never chosen.
    Returns positions [B, H, longest budget] long, rising in time, -1 where there are no more, and their mask.
    """
    if not 0 <= tradeoff <= 1:
        raise ValueError(f"tradeoff is {tradeoff}; it is the share of importance in the score, between 0 and 1.")
    budget = torch.as_tensor(budget, device=keys.device).expand(len(keys))
    mask = mask.bool()[:, None].expand(keys.shape[:3])
    importance = importance if importance.dim() == 3 else importance[:, None]
    unit = F.normalize(keys.float(), dim=-1) * mask[..., None]
    # The cosines to all others sum to a product with the sum of all: no S x S matrix.
    others = (unit * unit.sum(2, keepdim=True)).sum(-1) - unit.square().sum(-1)
    count = mask.sum(2, keepdim=True).clamp_min(1)
    redundancy = (-others / count).masked_fill(~mask, torch.finfo(torch.float32).min).softmax(2)
    score = (tradeoff * importance + (1 - tradeoff) * redundancy).masked_fill(~mask, -torch.inf)
    longest, size = int(budget.max()) if len(budget) else 0, keys.shape[2]
    best = score.argsort(dim=2, descending=True, stable=True)[..., :longest]
    best = F.pad(best, (0, longest - best.shape[2]), value=size)
    rank = torch.arange(longest, device=keys.device)
    real = rank < torch.minimum(budget[:, None, None], mask.sum(2, keepdim=True))
    ordered = best.masked_fill(~real, size).sort(2).values  # what is not real goes last
    return ordered.masked_fill(ordered == size, -1), ordered < size


def place_selected(index: Tensor, rank: Tensor, selected: Tensor) -> Tensor:
    """[B, H, T] positions: the r-th selected one where `rank` is r >= 0, and `index` elsewhere.

    index: [B, T], -1 = none. rank: [B, T] long, -1 = none. selected: [B, H, M] long, of `rkv_select`.
    """
    selected = F.pad(selected, (0, 1), value=-1)  # an empty selection can be asked too
    last = selected.shape[2] - 1
    at = torch.where((rank < 0) | (rank > last), last, rank)[:, None].expand(-1, selected.shape[1], -1)
    return torch.where(rank[:, None] >= 0, selected.gather(2, at), index[:, None])
