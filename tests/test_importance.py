"""Attention mass and importance against what the models themselves attend to, and the memory they take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kv_trainer.alignment.rope import Turn
from kv_trainer.capture import capture_kv
from kv_trainer.importance import (
    answer_labels,
    answer_queries,
    attention_mass,
    attention_rows,
    importance,
    position_weights,
)
from kv_trainer.types import AttentionForm, KVStates

LENGTH, PADDED = 11, 3
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"num_key_value_heads": 1},
    "gemma2": {"attn_logit_softcapping": 1.5},  # and a window of 4
    "gpt2": {},
    "cohere": {},
    "phi": {},
    "gpt_oss": {},  # sinks
    "smollm3": {},  # RoPE in some layers only
    "deepseek_v2": {},  # complex tables, and values of another width
}
families = pytest.mark.parametrize("family", FAMILIES)
sides = pytest.mark.parametrize("side", ["left", "right"])


def attended(model: nn.Module, side: str = "right") -> tuple[KVStates, Tensor, list[Tensor]]:
    """Captured states, labels [2, T], and the model's own attentions [2, Hq, T, T] a layer; the second row is padded.

    The first row is supervised in five places, not all neighbours, the second in its last three real ones.
    """
    ids = torch.randint(3, 320, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, slice(0, PADDED) if side == "left" else slice(LENGTH - PADDED, None)] = 0
    labels = torch.full_like(ids, -100)
    labels[0, [4, 6, 7, 9, 10]] = 1
    last = LENGTH if side == "left" else LENGTH - PADDED
    labels[1, last - 3 : last] = 1
    with torch.no_grad(), capture_kv(model, queries=True) as capture:
        theirs = model(input_ids=ids * mask, attention_mask=mask, use_cache=False, output_attentions=True).attentions
        return capture.stop(mask), labels, list(theirs)


def naive_mass(attentions: Tensor, labels: Tensor, chosen: list[list[int]] | None = None) -> Tensor:
    """[B, Hq, T]: the mean row of the supervised, or chosen, queries of attentions [B, Hq, T, T]."""
    rows = chosen or [row.nonzero()[:, 0].tolist() for row in labels != -100]
    return torch.stack([sum(a[:, t] for t in at) / len(at) for a, at in zip(attentions.float(), rows, strict=True)])


def naive_importance(states: KVStates, labels: Tensor, attentions: list[Tensor]) -> Tensor:
    total = torch.zeros(labels.shape)
    for layer, theirs in enumerate(attentions):
        mass, values = naive_mass(theirs, labels), states.values[layer].float()
        for b in range(len(labels)):
            each = torch.zeros(labels.shape[1])
            for head in range(mass.shape[1]):
                group = head * values.shape[1] // mass.shape[1]
                for t in range(labels.shape[1]):
                    each[t] += mass[b, head, t] * values[b, group, t].abs().sum() * bool(states.mask[b, t])
            total[b] += each / each.sum() / len(attentions)
    return total


@families
@sides
def test_rows_are_those_of_the_model(tiny_model, family: str, side: str) -> None:
    model = tiny_model(family, **FAMILIES[family])
    if family == "gpt_oss":
        for layer in model.model.layers:
            nn.init.normal_(layer.self_attn.sinks)
    states, labels, theirs = attended(model, side)
    positions, real = answer_queries(labels)
    for i, expected in enumerate(theirs):
        rows = attention_rows(states.queries[i], states.keys[i], states.attention[i], states.mask, positions)
        for b in range(2):
            at = positions[b, real[b]]
            torch.testing.assert_close(rows[b, :, real[b]], expected[b][:, at], atol=1e-5, rtol=0)


@families
@sides
def test_mass_is_the_mean_over_the_answer(tiny_model, family: str, side: str) -> None:
    states, labels, theirs = attended(tiny_model(family, **FAMILIES[family]), side)
    heads = states.keys[0].shape[1]
    plain, by_head = attention_mass(states, labels), attention_mass(states, labels, by_head=True)
    for mass, grouped, attentions in zip(plain, by_head, theirs, strict=True):
        expected = naive_mass(attentions, labels)
        torch.testing.assert_close(mass, expected.mean(1), atol=1e-5, rtol=0)
        torch.testing.assert_close(grouped, expected.unflatten(1, (heads, -1)).mean(2), atol=1e-5, rtol=0)
        assert (mass[~states.mask] == 0).all() and mass.std() > 0.01


@families
@sides
def test_importance_equals_the_loop(tiny_model, family: str, side: str) -> None:
    states, labels, theirs = attended(tiny_model(family, **FAMILIES[family]), side)
    found = importance(states, labels)
    torch.testing.assert_close(found, naive_importance(states, labels, theirs), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    assert (found[~states.mask] == 0).all() and not found.requires_grad


def test_padding_and_its_side_change_nothing(tiny_model) -> None:
    """The padded row is the same row on either side."""
    model = tiny_model("gpt_neox")
    found = []
    for left in (0, PADDED):
        ids = torch.arange(20, 28)[None]
        padded = torch.cat((ids.new_zeros(1, left), ids, ids.new_zeros(1, PADDED - left)), dim=1)
        mask = (padded > 0).long()
        labels = torch.where(padded > 23, padded, -100)
        with torch.no_grad(), capture_kv(model, queries=True) as capture:
            model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=False)
            found.append(importance(capture.stop(mask), labels)[mask.bool()])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)


# ---- which queries ask


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64])
def test_fewer_queries_than_answer_tokens_are_evenly_spaced(tiny_model, count: int) -> None:
    states, labels, theirs = attended(tiny_model("llama"))
    answers = [row.nonzero()[:, 0].tolist() for row in labels != -100]
    chosen = [at if len(at) <= count else [at[r * len(at) // count] for r in range(count)] for at in answers]
    positions, real = answer_queries(labels, count)
    assert [row[keep].tolist() for row, keep in zip(positions, real, strict=True)] == chosen
    for mass, attentions in zip(attention_mass(states, labels, count=count), theirs, strict=True):
        torch.testing.assert_close(mass, naive_mass(attentions, labels, chosen).mean(1), atol=1e-5, rtol=0)


def test_a_sample_without_supervised_tokens_has_no_mass(tiny_model) -> None:
    states, labels, theirs = attended(tiny_model("llama"))
    before = importance(states, labels)
    labels[1] = -100
    found = importance(states, labels)
    assert (found[1] == 0).all() and torch.equal(found[0], before[0])
    weights = position_weights(found, states.mask)
    assert torch.equal(weights[1], states.mask[1].float()), "without importance all positions count alike"


# ---- values


def test_with_equal_values_importance_is_the_mass(tiny_model) -> None:
    states, labels, _ = attended(tiny_model("llama"))
    equal = replace(states, values=tuple(torch.ones_like(v) for v in states.values))
    mass = torch.stack(attention_mass(states, labels)).mean(0)
    torch.testing.assert_close(importance(equal, labels), mass / mass.sum(1, keepdim=True))


def test_with_equal_keys_too_all_that_the_answer_sees_counts_alike(tiny_model) -> None:
    states, labels, _ = attended(tiny_model("gpt2"))
    labels[0] = -100
    labels[0, -1] = 1
    equal = replace(states.map(torch.ones_like), queries=tuple(map(torch.ones_like, states.queries)))
    torch.testing.assert_close(importance(equal, labels)[0], torch.full((LENGTH,), 1 / LENGTH))


def test_the_answer_is_asked_where_the_rows_tell_it(tiny_model) -> None:
    """Reasoning is supervised too, but its queries see only what is before them."""
    states, labels, _ = attended(tiny_model("gpt2"))
    labels[:] = 1
    segments = torch.tensor([[0] * 4 + [1] * (LENGTH - 6) + [2] * 2, [0] * 4 + [1] * (LENGTH - 4)])
    answer = answer_labels(labels, segments)
    assert (answer[0] != -100).tolist() == [False] * (LENGTH - 2) + [True] * 2
    assert torch.equal(answer[1], labels[1]), "no answer was found: all that is supervised"
    assert answer_labels(labels, None) is labels
    flat = replace(states.map(torch.ones_like), queries=tuple(map(torch.ones_like, states.queries)))
    mass = attention_mass(flat, answer)[0][0]
    torch.testing.assert_close(mass[: LENGTH - 1], mass[:1].expand(LENGTH - 1))
    every = attention_mass(flat, labels)[0][0]
    assert every[0] > 1.5 * every[LENGTH - 3], "where all are asked, what is read early is favoured"


def test_a_sink_with_a_tiny_value_is_not_important(tiny_model) -> None:
    """All look at the first position; what is taken from there is next to nothing."""
    states, labels, _ = attended(tiny_model("gpt2"))
    keys = [k.clone() for k in states.keys]
    for key, queries in zip(keys, states.queries, strict=True):
        key[:, :, 0] = 3 * queries.mean(2).unflatten(1, (key.shape[1], -1)).mean(2)
    sink = replace(states, keys=tuple(keys))
    tiny = [v.clone() for v in states.values]
    for value in tiny:
        value[:, :, 0] *= 1e-4
    mass = torch.stack(attention_mass(sink, labels)).mean(0)
    assert (mass.argmax(1) == 0).all() and (mass[:, 0] > 0.3).all()
    assert (position_weights(importance(sink, labels), states.mask)[:, 0] > 1).all()
    weights = position_weights(importance(replace(sink, values=tuple(tiny)), labels), states.mask)
    assert (weights[:, 0] < 1e-2).all() and (weights[0, 1:] > weights[0, 0]).all()


def test_bfloat16_states_are_weighed_in_float32(tiny_model) -> None:
    model = tiny_model("llama")
    found = importance(*attended(model)[:2])
    half = importance(*attended(model.bfloat16())[:2])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, found, atol=1e-2, rtol=5e-2)


# ---- weights of anyone's attention


def test_attention_with_four_three_and_two_axes_gives_the_same_weights(tiny_model) -> None:
    states, labels, theirs = attended(tiny_model("llama"))
    attention = theirs[1].requires_grad_()
    asking = labels != -100
    by_head = position_weights(attention, states.mask, asking)
    mean = position_weights(attention.mean(1), states.mask, asking)
    mass = position_weights(torch.stack([a.mean(0)[q].sum(0) for a, q in zip(attention, asking)]), states.mask)
    torch.testing.assert_close(by_head, mean)
    torch.testing.assert_close(by_head, mass)
    assert not by_head.requires_grad and (by_head[~states.mask] == 0).all()
    torch.testing.assert_close(by_head.sum(1), states.mask.sum(1).float())
    expected = naive_mass(attention.detach(), labels).mean(1) * states.mask
    torch.testing.assert_close(by_head, expected / expected.sum(1, keepdim=True) * states.mask.sum(1, keepdim=True))


def test_without_queries_those_of_the_mask_ask(tiny_model) -> None:
    states, _, theirs = attended(tiny_model("llama"))
    expected = position_weights(theirs[0], states.mask, states.mask)
    assert torch.equal(position_weights(theirs[0], states.mask), expected)


def test_attention_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention has the shape \(2, 5\), the mask \(2, 4\)"):
        position_weights(torch.ones(2, 3, 5, 5), torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5))


# ---- memory


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation inside makes."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def largest(length: int, heads: int = 2) -> int:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[Tensor, ...]:
        return (torch.randn((1, count, length, 4), generator=generator),)

    cos, sin = (torch.ones(length, 4), torch.zeros(length, 4))
    turn = Turn(lambda x, tables: x * tables[0][:, None] + x * tables[1][:, None], (cos[None], sin[None]))
    form = AttentionForm(0.5, turn, window=100, softcap=5.0, sinks=torch.zeros(2 * heads))
    mask = torch.ones((1, length), dtype=torch.bool)
    states = KVStates(draw(heads), draw(heads), mask, (0,), 1, queries=draw(2 * heads), attention=(form,))
    labels = torch.where(torch.arange(length) >= length // 2, 1, -100)[None]
    with Largest() as seen:
        found = importance(states, labels)
    assert found.isfinite().all() and found.max() > 0
    return seen.bytes


def test_no_tensor_is_of_the_square_of_the_length() -> None:
    sizes = [largest(length) for length in (1024, 2048, 4096)]
    assert sizes[2] < 4096 * 4096, "not even one byte a pair of positions"
    for one, two in zip(sizes, sizes[1:]):
        assert two / one < 2.05
