"""How much each loss pulls on the student: gradient norms, and the weights that follow them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .losses import DistillationLoss, GradientShare

if TYPE_CHECKING:
    from .bridge import KVBridge

logger = logging.getLogger(__name__)
REFERENCE = "cross_entropy"
LIMIT = 10.0
Reduce = Callable[[Tensor], Tensor]  # mean over ranks


def measured_of(losses: Mapping[str, DistillationLoss]) -> dict[str, GradientShare]:
    """The losses whose weight follows a share of the gradient."""
    return {name: loss.weight for name, loss in losses.items() if isinstance(loss.weight, GradientShare)}


def check_reference(losses: Mapping[str, DistillationLoss], watched: int = 0) -> None:
    """ValueError if gradients are to be measured against a cross-entropy that does not count.

    watched: steps between two measurements for the logs, 0 = none.
    """
    reference = losses.get(REFERENCE)
    counts = reference is not None and reference.active
    if reference is not None and counts and isinstance(reference.weight, GradientShare):
        raise ValueError("losses.cross_entropy.weight is a gradient_share, which is a share of its own; give a number.")
    shared = list(measured_of(losses))
    if shared and not counts:
        raise ValueError(
            f"losses.{shared[0]}.weight is a gradient_share, a share of the cross-entropy's gradient, but "
            "losses.cross_entropy does not count; give a number, or cross_entropy a weight above 0."
        )
    if watched and not counts:
        raise ValueError(
            "monitor.loss_scales_every measures gradients against the cross-entropy's, but losses.cross_entropy does "
            "not count; leave it out, or give cross_entropy a weight above 0."
        )


def gradient_norms(
    terms: Mapping[str, Tensor], parameters: Sequence[nn.Parameter], mean_over_ranks: Reduce, scale: float = 1.0
) -> dict[str, Tensor]:
    """Norm of each raw term's gradient in the parameters, a scalar tensor each; the graph stays whole.

    With several ranks, the root of the mean square over them. scale: what the terms are multiplied by on the way, so
    that float16 does not round small gradients to 0.
    """
    norms = {}
    for name, term in terms.items():
        square = torch.zeros((), device=term.device)
        if term.requires_grad:
            found = torch.autograd.grad(term * scale, parameters, retain_graph=True, allow_unused=True)
            parts = [(g.float() / scale).square().sum() for g in found if g is not None]
            square = torch.stack(parts or [square]).sum()
        norms[name] = mean_over_ranks(square).sqrt()
    return norms


class Balance(nn.Module):
    """The current base weight of every loss: its own, or what its GradientShare has measured.

    A buffer, so that it is saved with the bridge, restored on resume, and the same on all ranks.
    """

    weights: Tensor
    measured: Tensor

    def __init__(self, losses: Mapping[str, DistillationLoss]) -> None:
        super().__init__()
        self.shared = measured_of(losses)
        self.names = list(losses)
        self.register_buffer("weights", torch.ones(len(losses)), persistent=bool(self.shared))
        self.register_buffer("measured", torch.zeros(len(losses)), persistent=bool(self.shared))

    def of(self, name: str) -> Tensor | float:
        """The factor beside the loss's own schedule."""
        return self.weights[self.names.index(name)] if name in self.shared else 1.0

    def due(self, step: int) -> bool:
        return any(step % share.every == 0 for share in self.shared.values())

    def follow(self, norms: Mapping[str, Tensor], reference: float, step: int) -> None:
        """Move the measured weights towards their shares. reference: the weight of the cross-entropy now."""
        for name, share in self.shared.items():
            if step % share.every or reference <= 0:  # of a cross-entropy that does not count yet there is no share
                continue
            index = self.names.index(name)
            wanted = share.gradient_share * reference * norms[REFERENCE] / norms[name].clamp_min(1e-20)
            # A term without any gradient now, as one that is annealed in later, keeps its weight; and one whose
            # gradient float16 could not hold, until the scale of the losses has come down.
            told = (norms[name] > 0) & norms[name].isfinite() & norms[REFERENCE].isfinite()
            wanted = torch.where(told, wanted, self.weights[index]).clamp(1e-6, 1e6)
            mixed = self.weights[index] ** share.smoothing * wanted ** (1 - share.smoothing)
            self.weights[index] = torch.where(self.measured[index] > 0, mixed, wanted)
            self.measured[index] = torch.maximum(self.measured[index], told.float())


def loss_scales(bridge: KVBridge, norms: Mapping[str, Tensor], progress: float) -> dict[str, float]:
    """For the logs: `gradient_share_<loss>`, each weighted term's gradient norm over the cross-entropy's.

    Warns of one beyond LIMIT: it swamps the text. Without those that float16 could not hold.
    """
    known = [n for n in bridge.losses if norms[n].isfinite()]
    weighted = {n: bridge.weight_now(n, progress) * float(norms[n]) for n in known}
    reference = weighted.get(REFERENCE) or 0.0
    if not reference:
        return {}
    shares = {n: x / reference for n, x in weighted.items() if n != REFERENCE}
    for name, share in shares.items():
        if share > LIMIT:
            logger.warning(
                "losses.%s pulls %.1f times as hard as the cross-entropy; lower its weight, or set it to "
                "{gradient_share: 0.3}.", name, share,
            )  # fmt: skip
    return {f"gradient_share_{name}": share for name, share in shares.items()}
