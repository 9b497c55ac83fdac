"""What flows between the parts, and the shape legend that every docstring uses.

L layers, B batch, H key/value heads (``num_key_value_heads``), T student positions, S teacher positions,
D head width, M teachers. Keys and values are always [B, H, S, D], keys always *before* RoPE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .alignment.rope import Turn


@dataclass(frozen=True)
class AttentionForm:
    """How one attention layer makes logits of queries and keys: all that captured, unrotated q and k lack.

    scaling: factor of q k^T. rotate: [B, H, S, D] before RoPE -> after it, at the positions of this batch; None for a
    layer without RoPE. window: a query sees this many newest positions, itself included; None for all.
    softcap: c tanh(logits / c) where given. sinks: [H_query] logits of a sink that takes mass, where the layer has it.
    """

    scaling: float
    rotate: Turn | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def to(self, device: torch.device) -> AttentionForm:
        return replace(
            self, rotate=None if self.rotate is None else self.rotate.to(device),
            sinks=None if self.sinks is None else self.sinks.to(device),
        )  # fmt: skip


@dataclass(frozen=True)
class KVStates:
    """Keys and values of some layers of one model.

    keys, values: one [B, H, S, D] tensor a captured layer, keys before RoPE.
    mask: [B, S] bool, True where the position is real (not padding, and aligned once the states are mapped).
    layers: the index of each captured layer in the model; num_layers: how many layers the model has.
    queries: one [B, H_query, S, D] tensor a captured layer, before RoPE, where they were asked for; attention: beside
    them, how each of these layers makes logits.
    hidden: where asked for, [B, S, C] tensors: the embeddings, then the output of each captured decoder layer.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor
    layers: tuple[int, ...]
    num_layers: int
    queries: tuple[Tensor, ...] | None = None
    attention: tuple[AttentionForm, ...] | None = None
    hidden: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        assert len(self.keys) == len(self.values) == len(self.layers), "one key and one value tensor a layer"

    def map(self, function: Callable[[Tensor], Tensor], mask: Tensor | None = None) -> KVStates:
        """The same states with `function` applied to all keys and values; queries and hidden stay as they are."""
        return replace(
            self,
            keys=tuple(function(k) for k in self.keys),
            values=tuple(function(v) for v in self.values),
            mask=self.mask if mask is None else mask,
        )

    def to(self, device: torch.device) -> KVStates:
        """The same states on one device."""
        if all(x.device == device for x in (*self.keys, *(self.hidden or ()))):
            return self

        def moved(tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
            return None if tensors is None else tuple(x.to(device) for x in tensors)

        forms = None if self.attention is None else tuple(form.to(device) for form in self.attention)
        return replace(
            self.map(lambda x: x.to(device)), queries=moved(self.queries), attention=forms, hidden=moved(self.hidden)
        )


@dataclass(frozen=True)
class KVShape:
    """The coordinates of a model's keys and values: what the header prints and the bridge maps between.

    num_layers: how many layers have keys and values; kv_layers: their numbers in the model, empty where all have.
    head_dim: width of keys; value_dim: width of values where it is another (multi-head latent attention).
    """

    family: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float | None
    vocab_size: int
    num_parameters: int
    hidden_size: int = 0
    kv_layers: tuple[int, ...] = ()
    value_dim: int | None = None
    aligned: bool = False  # of a stored teacher: its layers and positions are the student's

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The number in the model of each layer that has keys and values."""
        return self.kv_layers or tuple(range(self.num_layers))


@dataclass(frozen=True)
class TeacherSignal:
    """What one teacher says about one batch, without gradient.

    kv: states in the teacher's own coordinates.
    index: [B, T], the teacher position aligned with each student position (long, or float between two of them), -1
    where there is none.
    nll: [B] float, negative log-likelihood of the supervised text summed over the sample (nats), or None.
    rows: [b] long, the samples of the batch that kv, importance and last hold, in order; None for all of them.
    entropy: [B], mean entropy at the supervised positions as a share of the log of the vocabulary, or None.
    importance: [b, S], how much the answer attends to each position, or None. last: [b, S, C], last hidden states.
    answers: [B] long, the teacher position from which it says its answer's first token, -1 where there is none.
    rank [B, T], segments [b, S] and mass, per captured layer [b, H, S], where R-KV selects: see data.encode_rows.
    """

    kv: KVStates
    index: Tensor
    nll: Tensor | None = None
    rows: Tensor | None = None
    entropy: Tensor | None = None
    importance: Tensor | None = None
    last: Tensor | None = None
    answers: Tensor | None = None
    rank: Tensor | None = None
    segments: Tensor | None = None
    mass: list[Tensor] | None = None

    def repeated(self, rows: Tensor) -> TeacherSignal:
        """What was said about some samples, as said about a batch in which they come again: rows [B] of [b]."""

        def take(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        kv, mass = self.kv, self.mass
        assert kv.queries is None, "how queries become logits may depend on the sample"
        hidden = None if kv.hidden is None else tuple(x[rows] for x in kv.hidden)
        return replace(
            self, kv=replace(kv.map(lambda x: x[rows], kv.mask[rows]), hidden=hidden), nll=take(self.nll),
            entropy=take(self.entropy), importance=take(self.importance), last=take(self.last),
            segments=take(self.segments), mass=None if mass is None else [x[rows] for x in mass],
        )  # fmt: skip

    def scored(self, nll: Tensor, entropy: Tensor) -> TeacherSignal:
        """The same signal with scores [B] that were known already."""
        return replace(self, nll=nll, entropy=entropy)
