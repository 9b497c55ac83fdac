"""A teacher's whole signal at the student's layers and positions, against loops over samples and positions."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import World
from torch import Tensor

from kv_trainer.alignment.layers import LayerMap
from kv_trainer.alignment.mapping import AlignedTeacher, align, nearer, rotated_pairs
from kv_trainer.alignment.shuffle import moved
from kv_trainer.alignment.time import rkv_select
from kv_trainer.losses import KVRelationLoss
from kv_trainer.types import AttentionForm, KVStates, TeacherSignal

SAMPLES, OURS, THEIRS, HEADS, WIDTH = 3, 6, 8, 2, 4
CAPTURED = (1, 3, 4)  # of a teacher of five layers
LAYERS = LayerMap((1, 3), (3, 4), (0.0, 0.75))  # its layer 1, and three quarters of the way from 3 to 4
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
ANSWERS = torch.tensor([3, -1, 4])
THEIR_ANSWERS = torch.tensor([6, 2, -1])


def turn(x: Tensor) -> Tensor:
    """Stands for RoPE: every position in a way of its own."""
    return x * (1 + torch.arange(x.shape[2])[:, None] / 10)


def signal(index: Tensor, rows: list[int] | None = None) -> TeacherSignal:
    """Everything a teacher may say; the second row of all samples is padded by two positions on the right."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones((SAMPLES, THEIRS), dtype=torch.bool)
    mask[1, -2:] = False

    def draw(*sizes: int) -> Tensor:
        x = torch.randn((SAMPLES, *sizes), generator=generator)
        return x if rows is None else x[rows]

    def layers(heads: int) -> tuple[Tensor, ...]:
        return tuple(draw(heads, THEIRS, WIDTH) for _ in CAPTURED)

    kv = KVStates(
        layers(HEADS), layers(HEADS), mask if rows is None else mask[rows], CAPTURED, 5, queries=layers(2 * HEADS),
        attention=tuple(AttentionForm(0.5 + layer, turn) for layer in CAPTURED),
        hidden=tuple(draw(THEIRS, 5) for _ in range(1 + len(CAPTURED))),
    )  # fmt: skip
    return TeacherSignal(
        kv, index, torch.arange(SAMPLES) + 1.0, None if rows is None else torch.tensor(rows),
        torch.arange(SAMPLES) + 2.0, draw(THEIRS).abs(), draw(THEIRS, 7), THEIR_ANSWERS,
    )  # fmt: skip


def spans() -> Tensor:
    return torch.tensor([[0, 1, -1, 3, 5, 7], [0, 2, 4, 6, -1, -1], [-1, 0, 1, -1, 4, 6]])


def between() -> Tensor:
    return torch.tensor([[0, 1.5, -1, 3, 5.25, 7], [0, 0.5, 5.5, 6.0, -1, -1], [-1, 0, 1, -1, 4.75, 6.5]])


def at(x: Tensor, position: float) -> Tensor:
    """x [..., S, C] at a position, linear between two; zero where there is none."""
    if position < 0:
        return torch.zeros_like(x[..., 0, :])
    low = int(position)
    part = position - low
    return x[..., low, :] * (1 - part) + (x[..., low + 1, :] * part if part else 0)


def placed(x: Tensor, index: Tensor) -> Tensor:
    """x [B, ..., S, C] at every position of index [B, T]."""
    return torch.stack([torch.stack([at(s, float(p)) for p in row], dim=-2) for s, row in zip(x, index, strict=True)])


def mixed(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """One tensor a student layer, as LAYERS says."""
    return [tensors[0], 0.25 * tensors[1] + 0.75 * tensors[2]]


def naive(given: TeacherSignal, index: Tensor) -> AlignedTeacher:
    """Of a signal on all samples."""
    kv = given.kv
    mask = torch.zeros((SAMPLES, OURS), dtype=torch.bool)
    for b in range(SAMPLES):
        for t in range(OURS):
            low, high = int(index[b, t]), int(index[b, t].float().ceil())
            mask[b, t] = bool(index[b, t] >= 0 and MASK[b, t] and kv.mask[b, low] and kv.mask[b, high])
    pairs = []
    for i in (0, 2):  # the nearer layer of 3 and 4 is 4
        queries, keys = turn(kv.queries[i]) * (0.5 + CAPTURED[i]), turn(kv.keys[i])
        pairs.append((placed(queries, index), placed(keys, index)))
    states = KVStates(*(tuple(placed(x, index) for x in mixed(y)) for y in (kv.keys, kv.values)), mask, (0, 1), 2)
    return AlignedTeacher(
        states, tuple(at_their_answers(x) for x in (kv.hidden[0], *mixed(kv.hidden[1:]))),
        torch.tensor([True, False, False]), placed(given.importance[..., None], index)[..., 0],
        placed(given.last, index), tuple(pairs),
    )  # fmt: skip


def at_answers(x: Tensor) -> Tensor:
    """x [B, T, C] at the answers, and at the first position of a sample without one."""
    return torch.stack([row[max(a, 0)] for row, a in zip(x, ANSWERS.tolist(), strict=True)])


def at_their_answers(x: Tensor) -> Tensor:
    """x [B, S, C] where the teacher says its answer; zero where it says none."""
    return torch.stack([at(row, float(a)) for row, a in zip(x, THEIR_ANSWERS.tolist(), strict=True)])


def tensors(found: AlignedTeacher) -> dict[str, Tensor]:
    named = {"mask": found.kv.mask, "answered": found.answered, "importance": found.importance, "last": found.last}
    for i in range(2):
        queries, keys = found.attention[i]
        named |= {f"keys {i}": found.kv.keys[i], f"values {i}": found.kv.values[i], f"queries {i}": queries}
        named |= {f"rotated keys {i}": keys}
    return named | {f"hidden {i}": x for i, x in enumerate(found.hidden)}


def assert_same(found: AlignedTeacher, expected: dict[str, Tensor]) -> None:
    ours = tensors(found)
    assert ours.keys() == expected.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("positions", [spans, between])
def test_equals_the_loop(positions) -> None:
    given = signal(positions())
    found = align(given, LAYERS, MASK, answers=ANSWERS)
    assert_same(found, tensors(naive(given, positions())))
    assert torch.equal(found.nll, given.nll) and torch.equal(found.entropy, given.entropy)
    assert found.kv.layers == (0, 1) and found.kv.queries is None and found.kv.hidden is None


@pytest.mark.parametrize("positions", [spans, between])
@pytest.mark.parametrize("rows", [[2], [0, 2], [1]])
def test_some_rows_are_those_of_the_whole_batch_and_the_rest_is_nothing(positions, rows: list[int]) -> None:
    whole = tensors(align(signal(positions()), LAYERS, MASK, answers=ANSWERS))
    expected = {name: torch.zeros_like(x) for name, x in whole.items()}
    for name, x in whole.items():
        expected[name][rows] = x[rows]
    found = align(signal(positions(), rows), LAYERS, MASK, answers=ANSWERS)
    assert_same(found, expected)
    assert torch.equal(found.nll, torch.arange(SAMPLES) + 1.0), "scores are of all samples"


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0]])
@pytest.mark.parametrize("rows", [None, [0, 2]])
def test_shuffled_rows_are_those_of_another_sample(rows: list[int] | None, order: list[int]) -> None:
    """A position counts where it does in both samples; scores are left to the bridge."""
    given = signal(spans(), rows)
    expected = {name: x[order] for name, x in tensors(align(given, LAYERS, MASK, answers=ANSWERS)).items()}
    expected["mask"] &= MASK.bool()
    says = torch.tensor([THEIR_ANSWERS[i] >= 0 and (rows is None or i in rows) for i in order])
    expected["answered"] = says & (ANSWERS >= 0)
    found = align(given, LAYERS, MASK, order=torch.tensor(order), answers=ANSWERS)
    assert_same(found, expected)
    assert torch.equal(found.nll, given.nll) and torch.equal(found.entropy, given.entropy)


def test_at_other_positions_the_answer_too_is_another() -> None:
    """The hidden states go with the keys and values of the position that is looked at."""
    given, moves = signal(spans()), torch.tensor([[1, 2, 0, 5, 3, 4], [1, 0, 3, 2, 4, 5], [0, 5, 1, 2, 3, 4]])
    found = align(given, LAYERS, MASK, positions=moves, answers=ANSWERS)
    for x, state in zip(found.hidden, (given.kv.hidden[0], *mixed(given.kv.hidden[1:])), strict=True):
        torch.testing.assert_close(x, at_answers(moved(placed(state, spans()), moves)))


def test_without_keys_and_values_the_mask_and_the_rest_stay() -> None:
    given = signal(spans())
    found, full = align(given, LAYERS, MASK, kv=False), align(given, LAYERS, MASK)
    assert found.kv.keys == found.kv.values == ()
    assert torch.equal(found.kv.mask, full.kv.mask) and torch.equal(found.last, full.last)


def test_what_a_teacher_did_not_say_stays_unsaid() -> None:
    given = signal(spans())
    bare = replace(given.kv, queries=None, attention=None, hidden=None)
    found = align(TeacherSignal(bare, given.index), LAYERS, MASK)
    assert found.hidden is found.importance is found.last is found.attention is found.nll is found.entropy is None
    assert torch.equal(found.kv.keys[1], align(given, LAYERS, MASK).kv.keys[1])


def test_the_student_s_own_pairs_are_of_its_own_layers() -> None:
    states = signal(spans()).kv
    for i, (queries, keys) in enumerate(rotated_pairs(states)):
        torch.testing.assert_close(queries, turn(states.queries[i]) * (0.5 + CAPTURED[i]))
        torch.testing.assert_close(keys, turn(states.keys[i]))


def test_the_nearer_layer_is_rotated_once_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a student of three layers, two share one of the teacher's; layer 3 is nobody's."""
    seen: list[int] = []
    states = signal(spans()).kv
    forms = tuple(AttentionForm(1.0, lambda x, i=i: (seen.append(i), turn(x))[1]) for i in CAPTURED)
    layers = LayerMap((1, 1, 3), (3, 1, 4), (0.25, 0.0, 0.5))
    assert nearer(layers) == [1, 1, 4]
    found = rotated_pairs(replace(states, attention=forms), layers)
    assert sorted(seen) == [1, 1, 4, 4] and found[0][0] is found[1][0] and len(found) == 3


# ---- R-KV


def selected(rows: list[int] | None = None, budget: int = 3) -> tuple[TeacherSignal, Tensor, Tensor]:
    """A teacher whose reasoning, in positions 2 to 6, differs: our positions 1 to 4 get the selected ones in order."""
    index = torch.tensor([[0.0, -1, -1, -1, -1, 7]]).repeat(SAMPLES, 1)
    index[1, -1] = -1
    rank = torch.tensor([[-1, 0, min(1, budget - 1), budget - 1, -1, -1]]).repeat(SAMPLES, 1)
    segments = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2]]).repeat(SAMPLES, 1)
    generator = torch.Generator().manual_seed(3)
    mass = [torch.rand((SAMPLES, HEADS, THEIRS), generator=generator) for _ in CAPTURED]
    given = signal(index, rows)
    part = slice(None) if rows is None else rows
    return replace(given, rank=rank, segments=segments[part], mass=[m[part] for m in mass]), index, rank


def test_the_reasoning_is_what_r_kv_selects_layer_by_layer_and_head_by_head() -> None:
    given, index, rank = selected()
    found = align(given, LAYERS, MASK)
    reasoning = (given.segments == 1) & given.kv.mask
    for layer, mass in ((0, given.mass[0]), (1, given.mass[2])):  # the mass of the nearer layer, 1 and 4
        keys, values = mixed(given.kv.keys)[layer], mixed(given.kv.values)[layer]
        chosen, _ = rkv_select(keys, mass, reasoning, 3)
        for b in range(SAMPLES):
            for t in range(OURS):
                for h in range(HEADS):
                    r = int(rank[b, t])
                    where = float(chosen[b, h, r]) if r >= 0 else float(index[b, t])
                    torch.testing.assert_close(found.kv.keys[layer][b, h, t], at(keys[b, h], where))
                    torch.testing.assert_close(found.kv.values[layer][b, h, t], at(values[b, h], where))
    counts = (rank >= 0) | (index >= 0) & torch.tensor([[True], [False], [True]]) | (index == 0)
    assert torch.equal(found.kv.mask, counts & MASK.bool())
    picked = [tuple(rkv_select(given.kv.keys[0], given.mass[0], reasoning, 3)[0][0, h].tolist()) for h in range(HEADS)]
    assert len(set(picked)) == HEADS, "heads differ, so the test tells them apart"


def test_what_is_not_selected_is_taken_at_the_index_under_r_kv() -> None:
    """Hidden states, logits and importance of a reasoning that differs, and keys and values without any selection."""
    given, index, rank = selected()
    everywhere = replace(given, index=between())
    found = align(everywhere, LAYERS, MASK, answers=ANSWERS)
    plain = align(replace(everywhere, rank=None, mass=None, segments=None), LAYERS, MASK, answers=ANSWERS)
    assert rank[0, ANSWERS[0]] >= 0 and rank[2, ANSWERS[2]] < 0
    for ours, theirs in zip(found.hidden, plain.hidden, strict=True):
        assert torch.equal(ours, theirs) and ours[0].abs().sum() > 0
    assert torch.equal(found.last, plain.last) and torch.equal(found.importance, plain.importance)
    chosen = align(given, LAYERS, MASK)
    where = rank >= 0
    for ours, theirs in zip(found.kv.keys, chosen.kv.keys, strict=True):
        assert torch.equal(ours.transpose(1, 2)[where], theirs.transpose(1, 2)[where])
    assert torch.equal(found.kv.mask[where], chosen.kv.mask[where])
    assert torch.equal(found.kv.mask[~where], plain.kv.mask[~where])


def test_r_kv_of_some_rows_is_that_of_the_whole_batch() -> None:
    whole = align(selected()[0], LAYERS, MASK)
    found = align(selected([0, 2])[0], LAYERS, MASK)
    for x, y in zip((*found.kv.keys, *found.kv.values), (*whole.kv.keys, *whole.kv.values), strict=True):
        torch.testing.assert_close(x[[0, 2]], y[[0, 2]])
        assert (x[1] == 0).all()
    assert torch.equal(found.kv.mask[[0, 2]], whole.kv.mask[[0, 2]]) and not found.kv.mask[1].any()


def test_a_rank_beyond_the_reasoning_is_masked() -> None:
    """The second sample has just two positions of reasoning left, so its third rank has none."""
    given, _, rank = selected()
    given.segments[1, 4:7] = 2
    found = align(given, LAYERS, torch.ones_like(MASK))
    assert found.kv.mask[0, 1:4].all() and found.kv.mask[1, 1:4].tolist() == [True, True, False]
    assert (found.kv.keys[0][1, :, 3] == 0).all()


# ---- in a run


def test_a_teacher_s_states_are_gone_before_the_next_teacher_runs(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    """What is kept of them is aligned; memory of many teachers is that of one, and of what is kept."""
    trainer = World(tiny_model, tiny_tokenizer).trainer(tmp_path, {"kv_relation": KVRelationLoss()})
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    for teacher in trainer.teachers.values():

        def watched(*args: Any, own=teacher.signal, **kwargs: Any) -> TeacherSignal:
            alive.append(sum(ref() is not None for ref in seen))
            found = own(*args, **kwargs)
            seen.extend(map(weakref.ref, (*found.kv.keys, *found.kv.values)))
            return found

        teacher.signal = watched
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    kept = trainer.panel.signals(batch)
    assert alive == [0, 0] and len(seen) > 4 and not any(ref() is not None for ref in seen)
    for name, found in kept.items():
        raw = trainer.teachers[name].signal(batch["teachers"][name])
        expected = align(raw, trainer.bridge.layer_maps[name], batch["attention_mask"])
        assert all(torch.equal(x, y) for x, y in zip(found.kv.values, expected.kv.values, strict=True))
        assert torch.equal(found.kv.mask, expected.kv.mask) and torch.equal(found.nll, raw.nll)
