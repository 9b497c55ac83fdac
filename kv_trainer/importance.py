"""How much attention the answer pays to each position, from captured queries and keys: never a T x T tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from .alignment.tokens import ANSWER
from .types import AttentionForm, KVStates

QUERIES = 64  # evenly spaced supervised positions that are asked; more add cost, and hardly change the mean


def answer_queries(labels: Tensor, count: int = QUERIES) -> tuple[Tensor, Tensor]:
    """Positions [B, Q] of evenly spaced supervised tokens, Q <= count, and which of them are real [B, Q].

    labels: [B, T], -100 where not supervised. All of them see everything before the first one, so there no early
    position is favoured as it is by the mean over all queries of a causal model; a position behind it is seen by the
    later ones alone.
    """
    asked = labels != -100
    number = asked.sum(1, keepdim=True)
    rank = torch.arange(min(count, labels.shape[1]), device=labels.device)[None].expand(len(labels), -1)
    spread = torch.where(number > count, rank * number // count, rank)
    order = (~asked).long().argsort(dim=1, stable=True)
    return order.gather(1, spread.clamp_max(labels.shape[1] - 1)), spread < number


def attention_rows(queries: Tensor, keys: Tensor, form: AttentionForm, mask: Tensor, positions: Tensor) -> Tensor:
    """Attention probabilities of some queries: [B, Hq, Q, S], what the layer itself computes in these rows.

    queries [B, Hq, S, D], keys [B, H, S, D] before RoPE, mask [B, S] True = real, positions [B, Q].
    """
    heads, samples, count = keys.shape[1], *positions.shape
    asked = queries.gather(2, positions[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))
    if form.rotate is not None:  # of the queries only what is asked: a third of all that is done here
        asked, keys = form.rotate.at(positions)(asked), form.rotate(keys)
    asked = (asked * form.scaling).unflatten(1, (heads, -1)).flatten(2, 3)  # [B, H, G * Q, D]
    logits = (asked @ keys.mT).unflatten(2, (-1, count)).flatten(1, 2).float()  # [B, Hq, Q, S]
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    at = torch.arange(keys.shape[2], device=keys.device)
    seen = (at <= positions[..., None]) & mask[:, None]
    if form.window is not None:
        seen = seen & (at > positions[..., None] - form.window)
    logits.masked_fill_(~seen[:, None], torch.finfo(logits.dtype).min)
    if form.sinks is not None:
        sinks = form.sinks.float()[None, :, None, None].expand(samples, -1, count, 1)
        return torch.softmax(torch.cat([logits, sinks], dim=-1), dim=-1)[..., :-1]
    return torch.softmax(logits, dim=-1)


def answer_labels(labels: Tensor, segments: Tensor | None) -> Tensor:
    """Labels of the answer alone, where segments [B, T] say which that is; a row without one keeps all of its labels.

    Reasoning is supervised too, but its own queries favour what is read early: whoever asks what the *answer* looks at
    must not ask them.
    """
    if segments is None:
        return labels
    answer = labels.masked_fill(segments != ANSWER, -100)
    return torch.where((answer != -100).any(1, keepdim=True), answer, labels)


@torch.no_grad()
def attention_mass(states: KVStates, labels: Tensor, by_head: bool = False, count: int = QUERIES) -> list[Tensor]:
    """Per layer the mean attention that the answer's queries pay to each position: [B, S], or by KV head [B, H, S].

    states: with queries and attention forms. Padding gets 0. Peak memory O(heads x count x S), a layer at a time.
    """
    assert states.queries is not None and states.attention is not None
    positions, real = answer_queries(labels, count)
    found = []
    for queries, keys, form in zip(states.queries, states.keys, states.attention, strict=True):
        rows = attention_rows(queries, keys, form, states.mask, positions)
        mass = torch.einsum("bhqs,bq->bhs", rows, real / real.sum(1, keepdim=True).clamp_min(1))
        mass = mass.unflatten(1, (keys.shape[1], -1)).mean(2) * states.mask[:, None]
        found.append(mass if by_head else mass.mean(1))
    return found


@torch.no_grad()
def importance(states: KVStates, labels: Tensor, count: int = QUERIES) -> Tensor:
    """[B, S]: attention mass times the L1 norm of the value, averaged over heads and captured layers.

    A sink takes mass but has a tiny value, so it does not count as important.
    Source: VATP, arXiv 2406.12335, eq. 5.
    """
    total = torch.zeros(states.mask.shape, device=states.mask.device)
    for mass, values in zip(attention_mass(states, labels, by_head=True, count=count), states.values, strict=True):
        size = values.detach().float().abs().sum(-1)  # [B, H, S]
        weighed = (mass * size).mean(1)
        total = total + weighed / weighed.sum(1, keepdim=True).clamp_min(1e-20)
    return total / max(1, len(states.values))


def position_weights(attention: Tensor, mask: Tensor, queries: Tensor | None = None) -> Tensor:
    """Position weights [B, T], mean 1 over the True positions of mask [B, T], detached, of anyone's attention weights.

    attention: [B, H, T, T] or [B, T, T], rows are queries; or [B, T], mass already summed. queries: [B, T] bool, the
    queries that count; default those of the mask. For attention that a caller has at hand; the trainer needs none.
    """
    attention = attention.detach().float()
    if attention.dim() == 4:
        attention = attention.mean(1)
    if attention.dim() == 3:
        rows = (mask if queries is None else queries).to(attention.dtype)
        attention = torch.einsum("bqt,bq->bt", attention, rows)
    if attention.shape != mask.shape:
        raise ValueError(f"attention has the shape {tuple(attention.shape)}, the mask {tuple(mask.shape)}.")
    mass = attention * mask
    total = mass.sum(1, keepdim=True)
    return torch.where(total > 0, mass * mask.sum(1, keepdim=True) / total.clamp_min(1e-20), mask.float())
