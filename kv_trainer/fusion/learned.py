"""Shares by what the states look like: prototypes of each teacher's best rows, and a trained router."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..types import KVShape, KVStates
from .base import Fusion, FusionInputs, Tempered


def pooled(states: KVStates, mask: Tensor) -> Tensor:
    """Mean keys and values over the True positions of mask [B, T], layer by layer: [L, B, C]."""
    share = mask / mask.sum(1, keepdim=True).clamp_min(1)
    return torch.stack([
        torch.cat([torch.einsum("bt,bhtd->bhd", share.float(), x.float()).flatten(1) for x in pair], dim=1)
        for pair in zip(states.keys, states.values, strict=True)
    ])


@dataclass
class Similarity(Tempered):
    """Sample by sample, the teacher whose home ground the sample is nearest to counts more.

    A teacher's prototypes are made before training, of the calibration rows that it finds likelier than the others
    do: the mean of its pooled keys and values (prototypes: mean), or `clusters` centres (kmeans). The similarity is
    the cosine of the sample's pooled states, less the mean of all calibration rows, to the nearest prototype;
    w_m = softmax(similarity_m / temperature). A teacher that is the likeliest on all calibration rows has them all for
    its home: nothing is taken off, and all samples are near.
    Source: prototype similarity as in ProtoNet, arXiv 1703.05175, on pooled KV; the form is this package's.
    """

    temperature: float = 0.1
    prototypes: Literal["mean", "kmeans"] = "mean"
    clusters: int = 4
    samples: int = 128

    needs: ClassVar[frozenset[str]] = frozenset({"teachers", "prototypes"})
    source: ClassVar[str] = "ProtoNet, arXiv 1703.05175"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters < 1 or self.samples < 2:
            raise ValueError(f"clusters is {self.clusters}, samples {self.samples}; give at least 1 and 2.")

    def shares(self, inputs: FusionInputs) -> Tensor:
        near = []
        for states, prototypes in zip(inputs.teachers, inputs.prototypes, strict=True):
            centre, *centres = prototypes
            found = pooled(states, states.mask).transpose(0, 1).flatten(1) - centre
            near.append(F.cosine_similarity(found[:, None], torch.stack(centres)[None], dim=-1).amax(1))
        return torch.softmax(torch.stack(near) / self.temperature, dim=0)

    def make_prototypes(self, rows: Tensor, own: Tensor) -> Tensor:
        """[1 + K, C]: the mean of all pooled rows [N, C], then the centres of the teacher's own (own [N] bool) less it.

        A teacher that is the best on no row keeps one prototype, zero, to which nothing is near. Of one that is the
        best on all, the mean of its own less that of all would be rounding.
        """
        centre = torch.zeros_like(rows[0]) if own.all() else rows.mean(0)
        count = 1 if self.prototypes == "mean" else self.clusters
        home = rows[own] - centre
        if not len(home):
            return torch.stack([centre, *[torch.zeros_like(centre)] * count])
        return torch.cat([centre[None], k_means(home, count)])


def k_means(x: Tensor, count: int, rounds: int = 20) -> Tensor:
    """Centres [count, C] of x [N, C] by Lloyd's rounds; they start far apart, so no seed is needed."""
    centres = x.mean(0, keepdim=True) if count == 1 else x[:1]
    while len(centres) < count:
        centres = torch.cat([centres, x[torch.cdist(x, centres).amin(1).argmax()][None]])
    for _ in range(rounds if count > 1 else 0):
        nearest = F.one_hot(torch.cdist(x, centres).argmin(1), count).to(x.dtype)
        filled = nearest.sum(0)[:, None]
        centres = torch.where(filled > 0, (nearest.T @ x) / filled.clamp_min(1), centres)
    return centres


@dataclass
class Router(Fusion):
    """A trained gate: shares from the student's own pooled keys and values, which get no gradient from it.

    It learns from the distillation losses alone, through the shares, so left to itself it may settle on the teacher
    that is the easiest to copy; `entropy` times (log M - entropy of the shares) is added to the loss against that.
    Under logit_kd, a sum over aligned positions, a teacher that is aligned with few of them costs little.
    kind: linear, or mlp with `hidden` channels. per_layer: one gate a student layer. Learns at
    projector.learning_rate.
    Source: the gate of a mixture of experts, arXiv 1701.06538, over teachers.
    """

    kind: Literal["linear", "mlp"] = "linear"
    hidden: int = 64
    per_layer: bool = False
    entropy: float = 0.01

    needs: ClassVar[frozenset[str]] = frozenset({"student", "router"})
    source: ClassVar[str] = "mixture of experts, arXiv 1701.06538"

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.entropy < 0:
            raise ValueError(f"hidden is {self.hidden}, entropy {self.entropy}; give at least 1 and 0.")

    def module(self, student: KVShape, teachers: int) -> nn.Module:
        """[L, B, C] pooled states -> logits over teachers, even at the start."""
        inputs = student.num_kv_heads * (student.head_dim + (student.value_dim or student.head_dim))

        def gate() -> nn.Sequential:
            width = self.hidden if self.kind == "mlp" else inputs
            last = nn.Linear(width, teachers)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            body = [nn.Linear(inputs, width), nn.SiLU()] if self.kind == "mlp" else []
            return nn.Sequential(nn.LayerNorm(inputs), *body, last)

        return nn.ModuleList(gate() for _ in range(student.num_layers)) if self.per_layer else gate()

    def shares(self, inputs: FusionInputs) -> Tensor:
        assert inputs.student is not None and inputs.router is not None
        # An engine may have cast the gates to half precision; the shares are made in float32 all the same.
        found = pooled(inputs.student, inputs.student.mask).detach().to(next(inputs.router.parameters()).dtype)
        if self.per_layer:
            logits = torch.stack([gate(x) for gate, x in zip(inputs.router, found, strict=True)])  # [L, B, M]
            return torch.softmax(logits.float(), dim=-1).permute(2, 0, 1)
        return torch.softmax(inputs.router(found.mean(0)).float(), dim=-1).T

    def regulariser(self, shares: Tensor) -> Tensor:
        """[B]: log M less the entropy of the shares, 0 where all teachers count alike."""
        entropy = -(shares * shares.clamp_min(1e-12).log()).sum(0)
        entropy = entropy.mean(0) if entropy.dim() == 2 else entropy
        return math.log(len(shares)) - entropy
