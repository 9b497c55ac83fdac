"""The relational loss against a loop over pairs of positions, and all that it must not see."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers_losses import leaves, pad, random_inputs, states
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_trainer.losses import KVRelationLoss, LossInputs
from kv_trainer.losses.relation import gram, pick_positions, take_positions
from kv_trainer.types import KVStates

PARTS = {"keys": ("keys",), "values": ("values",), "both": ("keys", "values")}


def naive_gram(rows: Tensor, positions: list[int]) -> dict[tuple[int, int], Tensor]:
    """Cosines of all pairs, after centring over `positions`; rows [T, C]."""
    mean = sum(rows[t] for t in positions) / len(positions)
    centred = {t: rows[t] - mean for t in positions}
    return {
        (s, t): (centred[s] @ centred[t]) / (centred[s].norm() * centred[t].norm())
        for s in positions
        for t in positions
        if s != t
    }


def rows(x: Tensor) -> Tensor:
    """[H, T, D] -> [T, H * D], position by position."""
    return torch.stack([x[:, t].reshape(-1) for t in range(x.shape[1])]).double()


def naive(inputs: LossInputs, parts: str) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    pieces = [(part, layer) for part in PARTS[parts] for layer in range(inputs.student.num_layers)]
    for b in range(len(inputs.labels)):
        masks = [t.mask[b].tolist() for t in inputs.teachers.values()]
        anywhere = [t for t in range(len(masks[0])) if any(mask[t] for mask in masks)]
        for part, layer in pieces:
            ours = naive_gram(rows(getattr(inputs.student, part)[layer][b]), anywhere)
            theirs = [
                naive_gram(rows(getattr(teacher, part)[layer][b]), [t for t, counts in enumerate(mask) if counts])
                for teacher, mask in zip(inputs.teachers.values(), masks, strict=True)
            ]
            error, energy = 0.0, 0.0
            for pair, value in ours.items():
                said = [(w, g[pair]) for w, g in zip(inputs.weights[:, b], theirs, strict=True) if pair in g]
                if said:  # a mean over the teachers in which both positions are aligned
                    target = sum(w * g for w, g in said) / sum(w for w, _ in said)
                    error, energy = error + (value - target) ** 2, energy + target**2
            total = total + error / energy / len(pieces)
    return total / inputs.num_samples


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loop_with_its_gradients(seed: int, parts: str) -> None:
    inputs = random_inputs(seed, samples=2, teachers=((3, 4), (1, 5), (2, 2)))
    ours, theirs = KVRelationLoss(parts=parts)(inputs), naive(inputs, parts)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    points = leaves(inputs)[1:]
    options = {"allow_unused": True, "materialize_grads": True}
    found, expected = torch.autograd.grad(ours, points, **options), torch.autograd.grad(theirs, points, **options)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    learns = [bool(g.abs().sum() > 0) for g in found]
    assert learns == ["keys" in PARTS[parts]] * 2 + ["values" in PARTS[parts]] * 2


def test_a_student_equal_to_its_teachers_costs_nothing() -> None:
    """Where the teachers agree on the positions; else their own means differ from the student's."""
    inputs = random_inputs(teachers=((2, 3), (2, 3)))
    mask = inputs.teachers["t0"].mask
    inputs.teachers = {n: dataclasses.replace(inputs.student.map(Tensor.detach), mask=mask) for n in inputs.teachers}
    assert KVRelationLoss()(inputs).item() == pytest.approx(0, abs=1e-9)


def test_an_unrelated_student_costs_about_one() -> None:
    """The unit of the term: with many channels, the positions of a random student are nearly orthogonal."""
    inputs = random_inputs(samples=2, length=24, layers=1, student=(4, 256), teachers=((2, 4),))
    inputs.num_samples = 2.0
    assert KVRelationLoss()(inputs).item() == pytest.approx(1, abs=0.1)


# ---- what the loss must not see


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]


def across(x: Tensor, matrix: Tensor) -> Tensor:
    """Heads and widths of x [B, H, T, D] mixed by one [H * D, H * D] matrix."""
    flat = x.transpose(1, 2).flatten(2) @ matrix
    return flat.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)


UNSEEN = {
    "rotation": lambda kv: kv.map(lambda x: across(x, orthogonal(x.shape[1] * x.shape[3], 1))),
    "scale": lambda kv: kv.map(lambda x: 1e3 * x),
    "small scale": lambda kv: kv.map(lambda x: 1e-6 * x),
    "shift": lambda kv: kv.map(lambda x: x + torch.arange(x.shape[3])),
    "order of heads": lambda kv: kv.map(lambda x: x.flip(1)),
    "heads cut otherwise": lambda kv: kv.map(lambda x: x.transpose(1, 2).flatten(2).unsqueeze(1)),
    "heads repeated": lambda kv: kv.map(lambda x: x.repeat_interleave(3, 1)),
    "wider heads": lambda kv: kv.map(lambda x: torch.cat((x, torch.zeros_like(x)), -1)),
}


@pytest.mark.parametrize("what", UNSEEN)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_does_not_see(what: str, side: str) -> None:
    inputs = random_inputs()
    changed = dataclasses.replace(inputs)
    if side == "student":
        changed.student = UNSEEN[what](inputs.student)
    else:
        changed.teachers = {**inputs.teachers, "t0": UNSEEN[what](inputs.teachers["t0"])}
    torch.testing.assert_close(KVRelationLoss()(changed), KVRelationLoss()(inputs), rtol=1e-4, atol=1e-5)


def test_sees_the_order_of_positions() -> None:
    inputs = random_inputs()
    changed = dataclasses.replace(inputs, student=inputs.student.map(lambda x: x.flip(2)))
    assert (KVRelationLoss()(changed) - KVRelationLoss()(inputs)).abs() > 0.01


# ---- several teachers


def test_fusion_is_the_weighted_mean_entry_by_entry() -> None:
    inputs = random_inputs(samples=2, length=5, layers=1, teachers=((3, 4), (1, 5)))
    masks = torch.stack([t.mask for t in inputs.teachers.values()])
    stacks = [torch.stack([t.keys[0].transpose(1, 2).flatten(2)]) for t in inputs.teachers.values()]
    target, pairs = KVRelationLoss._fuse(stacks, masks, inputs.weights)
    grams = [gram(x, mask) for x, mask in zip(stacks, masks, strict=True)]
    for b in range(2):
        for s in range(5):
            for t in range(5):
                said = [(float(inputs.weights[m, b]), float(grams[m][0, b, s, t])) for m in range(2)
                        if masks[m, b, s] and masks[m, b, t]]  # fmt: skip
                mean = sum(w * g for w, g in said) / sum(w for w, _ in said) if said else 0.0
                assert float(target[0, b, s, t]) == pytest.approx(mean, abs=1e-5)
                assert bool(pairs[b, s, t]) == (bool(said) and s != t)


def test_the_same_teacher_twice_is_one_teacher() -> None:
    inputs = random_inputs(teachers=((3, 4), (3, 4)))
    inputs.teachers["t1"] = inputs.teachers["t0"]
    alone = dataclasses.replace(
        inputs, teachers={"t0": inputs.teachers["t0"]}, weights=torch.ones(1, len(inputs.labels))
    )
    torch.testing.assert_close(KVRelationLoss()(inputs), KVRelationLoss()(alone))


def test_the_order_of_teachers_does_not_count() -> None:
    inputs = random_inputs()
    turned = dataclasses.replace(
        inputs, teachers=dict(reversed(inputs.teachers.items())), weights=inputs.weights.flip(0)
    )
    torch.testing.assert_close(KVRelationLoss()(turned), KVRelationLoss()(inputs))


# ---- at most so many positions

masks = st.lists(st.booleans(), min_size=1, max_size=40).map(lambda row: torch.tensor([row]))


@given(mask=masks, count=st.integers(1, 40))
def test_picked_positions_are_evenly_spaced(mask: Tensor, count: int) -> None:
    count = min(count, mask.shape[1])
    (picked,) = pick_positions(mask, count).tolist()
    true = mask[0].nonzero()[:, 0].tolist()
    kept = [p for p in picked if mask[0, p]]
    assert len(set(picked)) == count, "no position twice"
    assert kept == sorted(kept)
    if len(true) <= count:
        assert kept == true, "a short sample keeps all of its positions"
    else:
        assert kept == picked, "a long sample keeps no padding"
        ranks = [true.index(p) for p in picked]
        gaps = {b - a for a, b in zip(ranks, [*ranks[1:], len(true)], strict=True)}
        assert ranks[0] == 0 and max(gaps) - min(gaps) <= 1


@given(mask=masks, count=st.integers(1, 20), left=st.integers(0, 9), right=st.integers(0, 9))
def test_padding_moves_no_picked_position(mask: Tensor, count: int, left: int, right: int) -> None:
    count = min(count, mask.shape[1])
    padded = torch.nn.functional.pad(mask, (left, right))
    (before,), (after,) = pick_positions(mask, count).tolist(), pick_positions(padded, count).tolist()
    assert [p for p in before if mask[0, p]] == [p - left for p in after if padded[0, p]]


def test_samples_pick_for_themselves() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 0]], dtype=torch.bool)
    assert pick_positions(mask, 3).tolist()[0] == [0, 2, 4]
    assert pick_positions(mask, 3).tolist()[1][:2] == [1, 4]


def test_take_positions() -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    index = torch.tensor([[3, 0], [1, 1], [2, 3]])
    taken = take_positions(x, index)
    assert all(torch.equal(taken[n, b, p], x[n, b, index[b, p]]) for n in range(2) for b in range(3) for p in range(2))


@pytest.mark.parametrize("limit", [6, 7, 512])
def test_a_limit_that_no_sample_reaches_changes_nothing(limit: int) -> None:
    inputs = random_inputs(length=6)
    torch.testing.assert_close(KVRelationLoss(max_positions=limit)(inputs), KVRelationLoss()(inputs), rtol=0, atol=0)


@settings(max_examples=20)
@given(limit=st.integers(2, 14), left=st.integers(0, 6), right=st.integers(0, 6), seed=st.integers(0, 5))
def test_under_a_limit_padding_changes_nothing(limit: int, left: int, right: int, seed: int) -> None:
    inputs = random_inputs(seed, length=9)
    loss = KVRelationLoss(max_positions=limit)
    torch.testing.assert_close(loss(pad(inputs, left, right, -7.0)), loss(inputs), rtol=1e-5, atol=1e-6)


def test_a_limit_takes_just_the_picked_positions() -> None:
    inputs = random_inputs(length=9)
    chosen = pick_positions(torch.stack([t.mask for t in inputs.teachers.values()]).any(0), 4)

    def cut(kv: KVStates) -> KVStates:
        index = chosen[:, None, :, None]
        return kv.map(lambda x: x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])), kv.mask.gather(1, chosen))

    few = dataclasses.replace(
        inputs, student=cut(inputs.student), teachers={n: cut(t) for n, t in inputs.teachers.items()}
    )
    torch.testing.assert_close(KVRelationLoss(max_positions=4)(inputs), KVRelationLoss()(few))


def test_fewer_than_two_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="max_positions is 1"):
        KVRelationLoss(max_positions=1)


def test_gram_is_zero_outside_the_mask_and_one_on_its_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, False, True, True]])
    kv = states(generator, 1, 1, (2, 3), mask)
    found = gram(torch.stack([kv.keys[0].transpose(1, 2).flatten(2)]), mask)[0, 0]
    assert (found[1] == 0).all() and (found[:, 1] == 0).all()
    torch.testing.assert_close(found.diagonal()[mask[0]], torch.ones(3))
    torch.testing.assert_close(found, found.T)
