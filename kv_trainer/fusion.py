"""How several teachers become one target: the share of each teacher in each sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import FusionConfig

MIN_SHARE = 1e-3


def check_fusion(config: FusionConfig, given: Sequence[float]) -> None:
    """ValueError for settings that give no shares. given: the recipe's teacher weights."""
    if config.temperature <= 0:
        raise ValueError(f"fusion.temperature is {config.temperature}; give a number above 0.")
    if given and (min(given) < 0 or sum(given) <= 0):
        raise ValueError(f"The teachers' weights are {list(given)}; none may be negative and one must be above 0.")


def fixed(weights: Sequence[float], samples: int, device: torch.device) -> Tensor:
    """[M, B]: the recipe's teacher weights, normalised, the same for every sample."""
    share = torch.tensor(weights, dtype=torch.float32, device=device)
    return (share / share.sum())[:, None].expand(-1, samples)


def confidence(nll: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """[M, B]: softmax over teachers of -CE_m / temperature, sample by sample.

    nll: [M, B], each teacher's negative log-likelihood of the sample's supervised text (nats).
    tokens: [B], supervised *student* tokens. Dividing all teachers by the same count keeps unlike tokenizers
    comparable: a teacher that cuts the text finer has more, easier tokens.
    Source: the confidence weighting of CA-MKD, arXiv 2201.00007, in softmax form.
    """
    return torch.softmax(-nll / tokens.clamp_min(1) / temperature, dim=0)


def teacher_weights(config: FusionConfig, given: Sequence[float], nll: Tensor | None, labels: Tensor) -> Tensor:
    """[M, B] shares that sum to one over teachers. labels: [B, T] of the student.

    A share below MIN_SHARE becomes exactly zero, so that such a teacher need not run on such a sample at all.
    """
    if config.method == "fixed" or len(given) == 1:
        share = fixed(given, len(labels), labels.device)
    else:
        assert nll is not None, "confidence needs every teacher's likelihood"
        share = confidence(nll, (labels != -100).sum(1), config.temperature)
    share = torch.where(share < MIN_SHARE, 0.0, share)
    return share / share.sum(0)
