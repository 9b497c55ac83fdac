"""The controls: every sample is taught by another one's teachers, or every position by another one of its sample."""

from __future__ import annotations

import torch
from torch import Tensor


def other_rows(samples: int, tasks: Tensor | None = None) -> Tensor:
    """For every sample of a batch another one, a permutation without fixed points: long [B].

    The one before it; with tasks [B], the one before it of its task. Samples that are alone of their task take turns
    among themselves, and one that is left over joins the samples of another task.
    """
    order = torch.arange(samples).roll(1)
    if tasks is None:
        return order
    groups = [(tasks == task).nonzero()[:, 0].cpu() for task in tasks.unique()]
    turns = [group for group in groups if len(group) > 1]
    if alone := [group for group in groups if len(group) == 1]:
        if len(alone) > 1 or not turns:
            turns.append(torch.cat(alone))
        else:
            turns[0] = torch.cat([turns[0], *alone])
    for turn in turns:
        order[turn] = turn.roll(1)
    return order


def other_positions(mask: Tensor, seed: int, step: int) -> Tensor:
    """For every real position of mask [B, T] another real one of the same sample, for padding itself: long [B, T].

    A permutation of each sample's real positions in one random cycle, so that none stays where it is (unless it is the
    only one). Drawn anew for every step, from `seed`; where the padding lies does not matter.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    found = torch.arange(mask.shape[1]).repeat(len(mask), 1)
    for row, real in zip(found, mask.bool().cpu(), strict=True):
        positions = real.nonzero()[:, 0]
        order = positions[torch.randperm(len(positions), generator=generator)]
        row[order] = order.roll(1)
    return found.to(mask.device)


def moved(x: Tensor, source: Tensor) -> Tensor:
    """What lies at other positions: x [B, H, T, D], [B, T, C] or [B, T]; source [B, T] as `other_positions` says."""
    dim = 2 if x.dim() == 4 else 1
    shape = [len(x), *[1] * (x.dim() - 1)]
    shape[dim] = source.shape[1]
    return x.gather(dim, source.reshape(shape).expand(x.shape))
