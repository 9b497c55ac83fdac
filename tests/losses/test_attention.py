"""Attention KL against loops over queries and heads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers_losses import random_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kv_trainer.losses import AttentionKLLoss, LossInputs
from kv_trainer.losses.relation import pick_positions


def naive_attention(queries: Tensor, keys: Tensor, b: int, t: int, seen: list[int]) -> Tensor:
    """Mean over query heads of softmax(q k) over the seen positions: [seen]."""
    shared = queries.shape[1] // keys.shape[1]
    each = [
        torch.stack([queries[b, h, t].double() @ keys[b, h // shared, j].double() for j in seen]).softmax(0)
        for h in range(queries.shape[1])
    ]
    return sum(each) / len(each)


def naive(inputs: LossInputs, layers: list[int], max_queries: int = 1000) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for m, (name, kv) in enumerate(inputs.teachers.items()):
        for b, row in enumerate(inputs.labels):
            asked = [t for t in range(len(row) - 1) if row[t + 1] != -100 and kv.mask[b, t]]
            if len(asked) > max_queries:
                asked = [asked[i * len(asked) // max_queries] for i in range(max_queries)]
            for layer in layers:
                for t in asked:
                    seen = [j for j in range(t + 1) if kv.mask[b, j]]
                    p = naive_attention(*inputs.attention[name][layer], b, t, seen)
                    q = naive_attention(*inputs.attention["student"][layer], b, t, seen)
                    share = inputs.weights[m, b] / len(asked) / len(layers)
                    total = total + share * (p * (p / q).log()).sum()
    return total / inputs.num_samples


@pytest.mark.parametrize("max_queries", [1, 3, 64])
@pytest.mark.parametrize(("layers", "chosen"), [("all", [0, 1, 2]), ("middle", [1]), ([2, 0], [2, 0])])
def test_equals_the_loop_with_its_gradients(layers, chosen: list[int], max_queries: int) -> None:
    inputs = random_inputs(5, samples=2, length=7, layers=3)
    loss = AttentionKLLoss(layers=layers, max_queries=max_queries)
    ours, theirs = loss(inputs), naive(inputs, chosen, max_queries)
    assert theirs > 0
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    points = [x for layer in inputs.attention["student"] for x in layer]
    options = {"allow_unused": True, "materialize_grads": True}
    found, expected = torch.autograd.grad(ours, points, **options), torch.autograd.grad(theirs, points, **options)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert [bool(g.abs().sum() > 0) for g in found[::2]] == [layer in chosen for layer in range(3)]


def test_an_equal_student_costs_nothing() -> None:
    inputs = random_inputs(teachers=((3, 4),))
    inputs.attention["student"] = inputs.attention["t0"]
    assert float(AttentionKLLoss()(inputs)) == pytest.approx(0, abs=1e-6)


def test_heads_are_averaged() -> None:
    """Neither their order nor how often each is there counts."""
    inputs = random_inputs()
    plain = AttentionKLLoss()(inputs)
    (layer, *rest) = inputs.attention["student"]
    for changed in ([x.flip(1) for x in layer], [x.repeat_interleave(3, 1) for x in layer]):
        other = dataclasses.replace(inputs, attention={**inputs.attention, "student": (tuple(changed), *rest)})
        torch.testing.assert_close(AttentionKLLoss()(other), plain)


def test_sure_heads_stay_finite() -> None:
    """Logits of ten thousand, on either side and against each other."""
    for name in ("student", "t0"):
        inputs = random_inputs()
        inputs.attention[name] = tuple((q.detach() * 1e4, k.detach()) for q, k in inputs.attention[name])
        for q, k in inputs.attention["student"]:
            q.requires_grad_(), k.requires_grad_()
        value = AttentionKLLoss()(inputs)
        value.backward()
        assert value.isfinite() and all(x.grad.isfinite().all() for a in inputs.attention["student"] for x in a)


class Widest(TorchDispatchMode):
    """The most elements that any result had."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.most = max(self.most, x.numel())
        return out


def test_nothing_is_of_size_positions_squared() -> None:
    length, queries = 512, 8
    inputs = random_inputs(samples=1, length=length, layers=1, student=(1, 4), teachers=((2, 4),))
    with Widest() as seen:
        AttentionKLLoss(max_queries=queries)(inputs).backward()
    assert seen.most <= 4 * length * max(queries, 4) < length**2, "at most four heads x queries x positions"


def test_queries_are_evenly_spaced_supervised_positions() -> None:
    inputs = random_inputs(samples=1, length=40, layers=1, teachers=((2, 4),))
    inputs.teachers["t0"].mask[:] = True
    inputs.labels[:] = -100
    inputs.labels[:, 20:] = 1
    AttentionKLLoss(max_queries=5)(inputs).backward()
    touched = inputs.attention["student"][0][0].grad.abs().sum((1, 3))[0].nonzero()[:, 0].tolist()
    supervised = (torch.arange(40) >= 19) & (torch.arange(40) < 39)
    assert touched == pick_positions(supervised[None], 5)[0].tolist() == [19, 23, 27, 31, 35]


def test_no_query_is_refused() -> None:
    with pytest.raises(ValueError, match="max_queries is 0"):
        AttentionKLLoss(max_queries=0)
