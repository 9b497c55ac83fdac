"""The head and head-width axes: trainable maps between unlike heads."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..types import KVShape, KVStates

Init = Literal["auto", "grouped", "xavier", "kaiming", "normal"]
Direction = Literal["teacher_to_student", "student_to_teacher"]
# `mlp_ratio: auto`, bottleneck width over input width: the best of 0.5, 1 and 2 in docs/results/projectors, where 0.5
# lost half of the answers.
AUTO_MLP_RATIO = 2.0
DEAD = 1e-4  # of the median deviation of a layer: a channel that moves less does not move
ROUNDING = 2**-9  # of a channel's mean: half a step of bfloat16, in which most teachers compute
ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU}


def grouped_average(outputs: int, inputs: int) -> Tensor:
    """[outputs, inputs] matrix that averages the inputs each output covers.

    The identity where the counts agree, the mean of a group where `outputs` divides `inputs`, a repeat where
    `inputs` divides `outputs`, and the overlap-weighted mean otherwise. Rows sum to one.
    """
    edge = torch.arange(outputs + 1, dtype=torch.float64) * inputs / outputs
    start, end = edge[:-1, None], edge[1:, None]
    left = torch.arange(inputs, dtype=torch.float64)[None]
    overlap = (torch.minimum(end, left + 1) - torch.maximum(start, left)).clamp_min(0)
    return (overlap / overlap.sum(1, keepdim=True)).float()


def initialise(weight: Tensor, init: str) -> None:
    """Fill a [outputs, inputs] weight in place."""
    with torch.no_grad():
        if init == "grouped":
            weight.copy_(grouped_average(*weight.shape))
        elif init == "xavier":
            nn.init.xavier_uniform_(weight)
        elif init == "kaiming":
            nn.init.kaiming_uniform_(weight, nonlinearity="relu")
        else:
            nn.init.normal_(weight, std=0.02)


class ElasticBottleneck(nn.Sequential):
    """LayerNorm -> Linear(d, h = mlp_ratio d) -> SiLU -> Dropout -> Linear(h, d_out), over the last axis.

    layer_norm, activation: without the first, or with ReLU or GELU in the middle.
    """

    def __init__(
        self, inputs: int, outputs: int, mlp_ratio: float, dropout: float, init: str, layer_norm: bool = True,
        activation: str = "silu",
    ) -> None:  # fmt: skip
        hidden = max(1, round(mlp_ratio * inputs))
        first, last = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        for layer in (first, last):
            initialise(layer.weight, init)
            nn.init.zeros_(layer.bias)
        norm = nn.LayerNorm(inputs) if layer_norm else nn.Identity()
        super().__init__(norm, first, ACTIVATIONS[activation](), nn.Dropout(dropout), last)


class KVProjector(nn.Module):
    """Maps one layer's keys (or values) in two steps: head width, then heads.

    [B, H_in, T, D_in] -> width -> [B, H_in, T, D_out] -> mixing of heads -> [B, H_out, T, D_out].
    With method "linear" and init "grouped" it starts as the grouped average over both axes; where the shapes agree
    that is the identity.
    """

    def __init__(
        self,
        inputs: tuple[int, int],
        outputs: tuple[int, int],
        method: str = "linear",
        init: Init = "auto",
        mlp_ratio: float = 0.5,
        dropout: float = 0.1,
        layer_norm: bool = True,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        if method == "linear":
            self.width: nn.Module = nn.Linear(inputs[1], outputs[1])
            initialise(self.width.weight, "grouped" if init == "auto" else init)
            nn.init.zeros_(self.width.bias)
        else:
            if init == "grouped":
                raise ValueError("projector.init is 'grouped', which only a linear projector has; use 'auto'.")
            bottleneck_init = "xavier" if init == "auto" else init
            self.width = ElasticBottleneck(
                inputs[1], outputs[1], mlp_ratio, dropout, bottleneck_init, layer_norm, activation
            )
        self.heads = nn.Linear(inputs[0], outputs[0], bias=False)
        initialise(self.heads.weight, "grouped")

    def forward(self, x: Tensor) -> Tensor:
        wide = self.width(x.to(self.heads.weight.dtype))
        return torch.einsum("oi,bitd->botd", self.heads.weight, wide)


class TeacherProjectors(nn.Module):
    """All maps between one teacher and the student: keys and values apart, one pair a student layer.

    direction "student_to_teacher": maps student states to the teacher's shape, where `standardise` makes the
    teacher's states the fixed target; "teacher_to_student": maps teacher states to the student's shape.
    method "none" has no trainable map: for a student whose heads are the teacher's, such as a pruned one.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, student: KVShape, teacher: KVShape, direction: Direction, method: str = "linear", **knobs: Any
    ) -> None:
        super().__init__()
        self.direction = direction

        def projectors(our_width: int, their_width: int) -> nn.ModuleList:
            ours, theirs = (student.num_kv_heads, our_width), (teacher.num_kv_heads, their_width)
            inputs, outputs = (ours, theirs) if direction == "student_to_teacher" else (theirs, ours)
            if method == "none" and ours != theirs:
                raise ValueError(
                    f"projector.method is 'none', but the student has {ours[0]} KV heads of width {ours[1]}, and the "
                    f"teacher {theirs[0]} of width {theirs[1]}; use 'linear'."
                )
            return nn.ModuleList(
                nn.Identity() if method == "none" else KVProjector(inputs, outputs, method=method, **knobs)
                for _ in range(student.num_layers)
            )

        widths = teacher.head_dim, teacher.value_dim or teacher.head_dim
        self.keys = projectors(student.head_dim, widths[0])
        self.values = projectors(student.value_dim or student.head_dim, widths[1])
        # Per-channel statistics of the teacher's keys and values, from calibration: [2, L, H, 1, D], of the wider.
        shape = (2, student.num_layers, teacher.num_kv_heads, 1, max(widths))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def forward(self, states: KVStates) -> KVStates:
        keys = tuple(p(k) for p, k in zip(self.keys, states.keys, strict=True))
        values = tuple(p(v) for p, v in zip(self.values, states.values, strict=True))
        return KVStates(keys, values, states.mask, states.layers, states.num_layers)

    def standardise(self, states: KVStates) -> KVStates:
        """States of the teacher's shape less its calibrated mean, over its calibrated deviation, by channel."""

        layers = range(len(states.keys))
        keys = tuple(self.standard(k, 0, i) for i, k in zip(layers, states.keys))
        values = tuple(self.standard(v, 1, i) for i, v in zip(layers, states.values))
        return KVStates(keys, values, states.mask, states.layers, states.num_layers)

    def standard(self, x: Tensor, part: int, layer: int) -> Tensor:
        """One [B, H, T, D] of keys (part 0) or values (1) of a student layer, standardised."""
        return (x - self.mean[part, layer, ..., : x.shape[-1]]) / self.deviation(part, layer, x.shape[-1])

    def deviation(self, part: int, layer: int, width: int) -> Tensor:
        """[H, 1, D]: the calibrated deviation of the first `width` channels of a student layer's keys, or values."""
        return self.scale[part, layer, ..., :width]

    @torch.no_grad()
    def calibrate(self, batches: list[KVStates]) -> None:
        """Set mean and deviation from aligned teacher states, counting True positions only.

        A channel that does not move is divided by the median deviation of its layer: else it alone would be the loss.
        """
        if not any(b.mask.any() for b in batches):
            raise ValueError("No student position is aligned with the teacher, so its states cannot be standardised.")
        for part, name in enumerate(("keys", "values")):
            for layer in range(self.mean.shape[1]):
                rows = torch.cat([getattr(b, name)[layer].transpose(1, 2)[b.mask] for b in batches]).float()
                spread = rows.std(0, correction=0)
                mean = rows.mean(0)
                self.mean[part, layer, :, 0, : rows.shape[-1]] = mean
                self.scale[part, layer, :, 0, : rows.shape[-1]] = alive(spread, mean).clamp_min(1e-4)


def alive(spread: Tensor, mean: Tensor) -> Tensor:
    """Deviations of a layer's channels about their means, those of dead ones replaced by the median."""
    middle = spread.median()
    return torch.where((spread > DEAD * middle) & (spread > ROUNDING * mean.abs()), spread, middle)
