"""One teacher's signal in the student's coordinates: layers and positions. Heads are the losses' own business."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..types import KVStates, TeacherSignal
from .layers import LayerMap
from .shuffle import moved
from .time import place_selected, rkv_select, time_resample
from .tokens import REASONING, take

RotatedPair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AlignedTeacher:
    """What one teacher says of a batch, at the student's layers and positions.

    kv: [B, Ht, T, Dt] a student layer, mask [B, T]; importance [B, T]; last [B, T, Ct].
    hidden: L + 1 of [B, Ct], where the teacher says its answer; answered: [B] bool, whether it and the student do.
    attention: per student layer queries (scaled) and keys after RoPE. nll, entropy: the signal's, never shuffled.
    """

    kv: KVStates
    hidden: tuple[Tensor, ...] | None = None
    answered: Tensor | None = None
    importance: Tensor | None = None
    last: Tensor | None = None
    attention: tuple[RotatedPair, ...] | None = None
    nll: Tensor | None = None
    entropy: Tensor | None = None


def align(
    signal: TeacherSignal, layers: LayerMap, mask: Tensor, kv: bool = True, order: Tensor | None = None,
    positions: Tensor | None = None, answers: Tensor | None = None,
) -> AlignedTeacher:  # fmt: skip
    """mask: [B, T] of the student. kv: whether keys and values themselves are wanted, or only their mask.

    order: [B], for the control of rows: every sample gets what belongs to this one, a permutation. positions:
    [B, T], for that of positions: every student position gets what belongs to this one of its sample.
    answers: [B], the student's position from which it says each answer, -1 for none, where hidden states are wanted:
    they are the teacher's where it says its own. None: nowhere.
    """
    rows, samples = signal.rows, len(mask)
    index = signal.index if rows is None else signal.index[rows]

    def batch(x: Tensor) -> Tensor:
        """Some samples [b, ...] as a whole batch [B, ...], zero in the others."""
        x = x if rows is None else x.new_zeros(samples, *x.shape[1:]).index_copy_(0, rows, x)
        return x if order is None else x.index_select(0, order)

    def whole(x: Tensor) -> Tensor:
        x = batch(x)
        return x if positions is None else moved(x, positions)

    def place(x: Tensor) -> Tensor:
        return whole(time_resample(x, index))

    def hidden(answers: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Of the one position alone: all others would be resampled in every layer, and looked at by nobody."""
        assert signal.kv.hidden is not None and signal.answers is not None
        theirs = signal.answers[:, None]
        if positions is not None:
            theirs = signal.index.gather(1, positions.gather(1, answers.clamp_min(0)[:, None]))
        theirs = theirs if rows is None else theirs[rows]
        taken = [batch(time_resample(x, theirs))[:, 0] for x in signal.kv.hidden]
        return mapped_hidden(taken, signal.kv.layers, layers), batch(theirs[:, 0] >= 0) & (answers >= 0)

    states = signal.kv if kv else replace(signal.kv, keys=(), values=(), layers=())
    states = replace(states, queries=None, attention=None, hidden=None)
    if kv and signal.rank is not None:
        mapped = take_selected(layers.apply(states), signal, layers, index)
    else:
        mapped = take(layers.apply(states) if kv else states, index)
    said, answered = hidden(answers) if signal.kv.hidden is not None and answers is not None else (None, None)
    mask = mask.bool()
    own = mapped.mask & (mask if rows is None else mask[rows])
    return AlignedTeacher(
        mapped.map(whole, mask=whole(own) & mask),
        hidden=said,
        answered=answered,
        importance=None if signal.importance is None else place(signal.importance[..., None])[..., 0],
        last=None if signal.last is None else place(signal.last),
        attention=rotated_pairs(signal.kv, layers, place) if signal.kv.queries is not None else None,
        nll=signal.nll,
        entropy=signal.entropy,
    )


def nearer(layers: LayerMap) -> list[int]:
    """The nearer of the two teacher layers of every student layer."""
    return [hi if f >= 0.5 else lo for lo, hi, f in zip(layers.lower, layers.upper, layers.fraction, strict=True)]


def take_selected(states: KVStates, signal: TeacherSignal, layers: LayerMap, index: Tensor) -> KVStates:
    """As `take`, with the teacher's reasoning reduced to what R-KV selects, layer by layer and head by head.

    states: already at the student's layers. Student positions with a rank get the selected position of that rank; all
    else that a teacher says (hidden states, logits, importance) is taken at their index, as under segment_aware.
    """
    assert signal.rank is not None and signal.segments is not None and signal.mass is not None
    rank = signal.rank if signal.rows is None else signal.rank[signal.rows]
    reasoning = (signal.segments[:, : states.mask.shape[1]] == REASONING) & states.mask
    budget = rank.amax(1) + 1
    mass = dict(zip(signal.kv.layers, signal.mass, strict=True))
    keys, values = [], []
    for layer, k, v in zip(nearer(layers), states.keys, states.values, strict=True):
        chosen, _ = rkv_select(k, mass[layer], reasoning, budget)
        at = place_selected(index, rank, chosen)
        keys.append(time_resample(k, at))
        values.append(time_resample(v, at))
    plain = take(replace(states, keys=(), values=(), layers=()), index).mask & (rank < 0)
    kept = (rank >= 0) & (rank < reasoning.sum(1, keepdim=True))
    return replace(states, keys=tuple(keys), values=tuple(values), mask=plain | kept)


def mapped_hidden(hidden: Sequence[Tensor], captured: Sequence[int], layers: LayerMap) -> tuple[Tensor, ...]:
    """The embeddings, then one tensor a student layer, as LayerMap mixes those after the captured layers."""
    embeddings, *outputs = hidden
    at = dict(zip(captured, outputs, strict=True))
    mixed = [
        at[lo].lerp(at[hi], f) if f else at[lo]
        for lo, hi, f in zip(layers.lower, layers.upper, layers.fraction, strict=True)
    ]
    return (embeddings, *mixed)


def rotated_pairs(
    states: KVStates, layers: LayerMap | None = None, place: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[RotatedPair, ...]:
    """Scaled queries and keys after RoPE, one pair a student layer: of the nearer of two teacher layers.

    A mean of two layers' queries would belong to neither's keys. layers: None for the student itself.
    """
    assert states.queries is not None and states.attention is not None
    each = zip(states.queries, states.keys, states.attention, strict=True)
    captured = dict(zip(states.layers, each, strict=True))

    def pair(layer: int) -> RotatedPair:
        queries, keys, form = captured[layer]
        rotate = form.rotate or (lambda x: x)
        return place(rotate(queries) * form.scaling), place(rotate(keys))

    chosen = states.layers if layers is None else nearer(layers)
    found = {layer: pair(layer) for layer in set(chosen)}
    return tuple(found[layer] for layer in chosen)
