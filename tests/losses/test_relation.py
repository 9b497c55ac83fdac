"""The relational loss against a loop over pairs of positions, and all that it must not see."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers_losses import pad, random_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kv_trainer.losses import KVRelationLoss, LossInputs
from kv_trainer.losses.gram import directions
from kv_trainer.losses.relation import fuse, pick_positions

PARTS = {"keys": ("keys",), "values": ("values",), "both": ("keys", "values")}
Position = tuple[int, int]  # sample, place in it


def gram(x: Tensor, mask: Tensor) -> Tensor:
    """Cosines [N, P, P] between the centred positions of one group: x [N, P, C], mask [P]."""
    unit = directions(x[:, None], mask[None].float())[:, 0]
    return unit @ unit.mT


def naive_gram(x: Tensor, positions: list[Position]) -> dict[tuple[Position, Position], Tensor]:
    """Cosines of all pairs, after centring over `positions`; x [B, H, T, D]."""
    rows = {(b, t): x[b, :, t].reshape(-1).double() for b, t in positions}
    mean = sum(rows.values()) / len(rows)
    centred = {at: row - mean for at, row in rows.items()}
    return {
        (i, j): (centred[i] @ centred[j]) / (centred[i].norm() * centred[j].norm())
        for i in positions
        for j in positions
        if i != j
    }


def naive(inputs: LossInputs, parts: str, samples: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    pieces = [(part, layer) for part in PARTS[parts] for layer in range(inputs.student.num_layers)]
    count, length = inputs.labels.shape
    for first in range(0, count, samples):
        group = range(first, min(first + samples, count))
        aligned = [[(b, t) for b in group for t in range(length) if kv.mask[b, t]] for kv in inputs.teachers.values()]
        anywhere = sorted({at for positions in aligned for at in positions})
        for part, layer in pieces:
            ours = naive_gram(getattr(inputs.student, part)[layer], anywhere)
            theirs = [
                naive_gram(getattr(kv, part)[layer], positions)
                for kv, positions in zip(inputs.teachers.values(), aligned, strict=True)
            ]
            error, energy = 0.0, 0.0
            for (i, j), value in ours.items():
                trust = [(w[i[0]] * w[j[0]]).sqrt() for w in inputs.weights.double()]
                said = [(w, g[i, j]) for w, g in zip(trust, theirs, strict=True) if (i, j) in g]
                if said:  # a mean over the teachers in which both positions are aligned
                    weight = sum(w for w, _ in said)
                    target = sum(w * g for w, g in said) / weight
                    error, energy = error + weight * (value - target) ** 2, energy + weight * target**2
            total = total + len(group) * error / energy / len(pieces)
    return total / inputs.num_samples


@pytest.mark.parametrize("samples", [1, 2, 8])
@pytest.mark.parametrize("parts", PARTS)
def test_equals_the_loop_with_its_gradients(parts: str, samples: int) -> None:
    """Three samples: one by one, a pair and a rest, or all in one group."""
    inputs = random_inputs(4, samples=3, length=5, teachers=((3, 4), (1, 5), (2, 2)))
    ours, theirs = KVRelationLoss(parts=parts, samples=samples)(inputs), naive(inputs, parts, samples)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    points = [*inputs.student.keys, *inputs.student.values]
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
    generator = torch.Generator().manual_seed(0)
    stacks = [torch.randn((2, 6, width), generator=generator) for width in (12, 5)]
    shares = torch.tensor([[0.2, 0.2, 0.2, 0.7, 0.7, 0.0], [0.8, 0.8, 0.0, 0.3, 0.0, 0.0]])  # 0: not aligned
    target, weight = (x.squeeze(-3) for x in fuse([x[:, None] for x in stacks], shares[:, None]))
    target, weight = target / weight.clamp_min(1e-12), weight.square()
    grams = [gram(x, share > 0) for x, share in zip(stacks, shares, strict=True)]
    for i in range(6):
        for j in range(6):
            trust = [math.sqrt(share[i] * share[j]) for share in shares]
            assert float(weight[i, j]) == pytest.approx(0 if i == j else sum(trust), abs=1e-6)
            for n in range(2):
                said = 0 if i == j else sum(w * float(g[n, i, j]) for w, g in zip(trust, grams, strict=True))
                assert float(target[n, i, j]) == pytest.approx(said / sum(trust) if said else 0, abs=1e-5)


def test_the_same_teacher_twice_is_one_teacher() -> None:
    inputs = random_inputs(teachers=((3, 4), (3, 4)))
    inputs.teachers["t1"] = inputs.teachers["t0"]
    inputs.weights = torch.tensor([[0.3], [0.7]]).expand(2, len(inputs.labels))
    alone = dataclasses.replace(
        inputs, teachers={"t0": inputs.teachers["t0"]}, weights=torch.ones(1, len(inputs.labels))
    )
    torch.testing.assert_close(KVRelationLoss()(inputs), KVRelationLoss()(alone))


def test_a_pair_that_no_teacher_is_trusted_with_does_not_count() -> None:
    """Each of two teachers is trusted with one sample alone: no relation between the two samples is taught."""
    inputs = random_inputs(samples=2, length=4, layers=1, teachers=((3, 4), (1, 5)))
    inputs.weights = torch.eye(2)
    seen = fuse([torch.randn(1, 1, 8, 3)] * 2, torch.eye(2).repeat_interleave(4, 1)[:, None])[1][0]
    assert (seen[:4, 4:] == 0).all() and (seen[4:, :4] == 0).all() and (seen.sum() == 2 * 4 * 3)
    assert KVRelationLoss()(inputs).isfinite()


def test_relations_across_samples_are_seen_in_a_group_alone() -> None:
    """A student whose samples are shifted apart has the same relations in each, and others between them."""
    inputs = random_inputs()
    apart = torch.arange(len(inputs.labels)).view(-1, 1, 1, 1) * 5.0
    changed = dataclasses.replace(inputs, student=inputs.student.map(lambda x: x + apart))
    alone, group = KVRelationLoss(samples=1), KVRelationLoss(samples=8)
    torch.testing.assert_close(alone(changed), alone(inputs), rtol=1e-4, atol=1e-5)
    assert (group(changed) - group(inputs)).abs() > 0.01


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


@pytest.mark.parametrize("samples", [1, 3])
def test_a_limit_that_no_group_reaches_changes_nothing(samples: int) -> None:
    """At the limit, above it, and where padding alone is above it."""
    inputs = random_inputs(samples=3, length=6)
    full = KVRelationLoss(samples=samples)(inputs)
    for limit in (6 * samples, 6 * samples + 1, 512):
        loss = KVRelationLoss(samples=samples, max_positions=limit)
        torch.testing.assert_close(loss(inputs), full, rtol=0, atol=0)
        torch.testing.assert_close(loss(pad(inputs, 4, 9, 1.0)), full, rtol=1e-5, atol=1e-6)


@settings(max_examples=20)
@given(
    limit=st.integers(2, 30), left=st.integers(0, 6), right=st.integers(0, 6), seed=st.integers(0, 5),
    samples=st.integers(1, 4),
)  # fmt: skip
def test_under_a_limit_padding_changes_nothing(limit: int, left: int, right: int, seed: int, samples: int) -> None:
    inputs = random_inputs(seed, length=9)
    loss = KVRelationLoss(max_positions=limit, samples=samples)
    torch.testing.assert_close(loss(pad(inputs, left, right, -7.0)), loss(inputs), rtol=1e-5, atol=1e-6)


def test_a_limit_takes_just_the_picked_positions() -> None:
    """Every sample on its own here; the rest of the positions masked everywhere is the same."""
    inputs = random_inputs(length=9)
    chosen = pick_positions(torch.stack([t.mask for t in inputs.teachers.values()]).any(0), 4)
    kept = torch.zeros_like(inputs.labels, dtype=torch.bool).scatter(1, chosen, True)
    few = dataclasses.replace(
        inputs, teachers={n: dataclasses.replace(t, mask=t.mask & kept) for n, t in inputs.teachers.items()}
    )
    torch.testing.assert_close(KVRelationLoss(max_positions=4, samples=1)(inputs), KVRelationLoss(samples=1)(few))


@pytest.mark.parametrize(("knob", "value"), [("max_positions", 1), ("samples", 0)])
def test_impossible_settings_are_refused(knob: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{knob} is {value}"):
        KVRelationLoss(**{knob: value})


def test_gram_is_zero_outside_the_mask_and_one_on_its_diagonal() -> None:
    mask = torch.tensor([True, False, True, True])
    found = gram(torch.randn((2, 4, 6), generator=torch.Generator().manual_seed(0)), mask)
    assert (found[:, 1] == 0).all() and (found[:, :, 1] == 0).all()
    torch.testing.assert_close(found.diagonal(dim1=1, dim2=2)[:, mask], torch.ones(2, 3))
    torch.testing.assert_close(found, found.mT)
