"""How teachers are brought to the student: `alignment` and `projector`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TokenAlignment:
    """How teacher positions are found for student positions (see alignment/tokens.py)."""

    method: Literal["spans"] = "spans"


@dataclass
class TimeAlignment:
    """How positions of texts that differ are found (see alignment/time.py).

    same_text: they are not; only text that both models read is aligned. linear: the whole sequence is resampled.
    truncate: position i to position i, up to the end of the shorter one; what is often done, to compare with.
    segment_aware: prompt, reasoning and answer each for itself, where their texts differ. rkv: the same, but of a
    reasoning that differs, the positions that R-KV selects, layer by layer and head by head.
    """

    method: Literal["same_text", "linear", "truncate", "segment_aware", "rkv"] = "same_text"
    budget: int | None = field(
        default=None, metadata={"help": "rkv: at most this many positions; default as many as the student reasons in."}
    )

    def __post_init__(self) -> None:
        if self.budget is not None and self.method != "rkv":
            raise ValueError(f"budget is {self.budget}, but method {self.method} has no use for it; leave it out")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget is {self.budget}; give at least 1, or null for as many as the student has")


@dataclass
class LayerAlignment:
    """How teacher layers are found for student layers (see alignment/layers.py)."""

    method: Literal["relative_depth", "nearest", "explicit", "cka"] = "relative_depth"
    map: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "explicit: teacher name -> one teacher layer for each student layer."}
    )

    def __post_init__(self) -> None:
        if (self.method == "explicit") != (self.map is not None):
            raise ValueError("method: explicit and map need each other; give both, or neither")


@dataclass
class RopeAlignment:
    """Whether keys are compared before RoPE, or after one that both sides share (see alignment/rope.py)."""

    keys: Literal["before", "after"] = field(
        default="before", metadata={"help": "after: both sides are turned by the student's base, at its positions."}
    )


@dataclass
class AlignmentConfig:
    tokens: TokenAlignment = field(default_factory=TokenAlignment)
    time: TimeAlignment = field(default_factory=TimeAlignment)
    layers: LayerAlignment = field(default_factory=LayerAlignment)
    rope: RopeAlignment = field(default_factory=RopeAlignment)


@dataclass
class ProjectorConfig:
    """The trainable map of heads and head widths that the `kv` loss needs (see alignment/heads.py).

    mlp_ratio, dropout, layer_norm, activation: of the elastic bottleneck alone.
    """

    method: Literal["linear", "elastic_bottleneck", "none"] = "linear"
    direction: Literal["teacher_to_student", "student_to_teacher"] = "student_to_teacher"
    mlp_ratio: float | Literal["auto"] = "auto"
    dropout: float = 0.1
    layer_norm: bool = True
    activation: Literal["silu", "relu", "gelu"] = "silu"
    init: Literal["auto", "grouped", "xavier", "kaiming", "normal"] = "auto"
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if not isinstance(self.mlp_ratio, str) and self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio:g}; give a number above 0, or auto.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout:g}; give a share from 0 up to 1.")
