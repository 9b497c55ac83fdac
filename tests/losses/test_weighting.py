"""What the losses on keys and values share: weights by attention, layers that come in late, shares, fusions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_losses import map_inputs, pad, random_inputs
from helpers_trainer import World, assert_same_run, curve, weights
from scipy.optimize import minimize
from torch import Tensor, nn

from kv_trainer import supervision, teachers
from kv_trainer.fusion import FUSIONS, Fusion
from kv_trainer.importance import position_weights
from kv_trainer.losses import CrossEntropy, KVLoss, KVRelationLoss, LossInputs
from kv_trainer.losses.base import LayerwiseLoss
from kv_trainer.trainer import MultiTeacherKVTrainer

DIRECTIONS = ("student_to_teacher", "teacher_to_student")
# name -> loss, and the direction of the projectors
KINDS: dict[str, tuple[type[LayerwiseLoss], str]] = {
    "relation": (KVRelationLoss, DIRECTIONS[0]),
    "kv to teacher": (KVLoss, DIRECTIONS[0]),
    "kv to student": (KVLoss, DIRECTIONS[1]),
}
SHARED_SPACE = ["relation", "kv to student"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_side = pytest.mark.parametrize("side", ["student", "teacher"])


def loss_of(kind: str, **knobs) -> LayerwiseLoss:
    return KINDS[kind][0](**knobs)


def inputs_of(kind: str, **changes) -> LossInputs:
    found = random_inputs(2, direction=KINDS[kind][1], teachers=((3, 4), (1, 5), (2, 3)), layers=3)
    return replace(found, **changes)


def at_once(kind: str, side: str, **knobs) -> LayerwiseLoss:
    return loss_of(kind, attention=side, attention_warmup_steps=0, **knobs)


# ---- against a loop


def mean_one(mass: Tensor, mask: Tensor) -> list[float]:
    """One sample: mass [T], mask [T] bool."""
    total = sum(float(m) for m, keep in zip(mass, mask) if keep)
    return [float(m) * int(mask.sum()) / total if keep else 0.0 for m, keep in zip(mass, mask)]


def flat(x: Tensor) -> Tensor:
    """[H, T, D] -> [T, H * D]."""
    return x.transpose(0, 1).flatten(1).double()


def cosines(x: Tensor, mask: Tensor) -> Tensor:
    """[T, T] of the True positions of x [T, C] about their mean, zero elsewhere."""
    found = torch.zeros(len(x), len(x), dtype=torch.float64)
    places = mask.nonzero()[:, 0].tolist()
    mean = x[places].mean(0)
    for i in places:
        for j in places:
            one, two = x[i] - mean, x[j] - mean
            found[i, j] = one @ two / (one.norm() * two.norm())
    return found


Mix = Callable[[Tensor, Tensor], Tensor]  # differences [M, ...] and weights [M, ...] -> how much each counts


def plain(differences: Tensor, weight: Tensor) -> Tensor:
    return weight


def naive_relation(inputs: LossInputs, side: str | None, mix: Mix = plain) -> Tensor:
    """Every sample for itself. A fusion sees all layers, keys and values of a sample at once."""
    total, masks = 0.0, [t.mask for t in inputs.teachers.values()]
    pieces = [(part, layer) for part in ("keys", "values") for layer in range(inputs.student.num_layers)]
    for b in range(len(inputs.labels)):
        anywhere = torch.stack([m[b] for m in masks]).any(0)
        weights = mean_one(inputs.importance[side][b], anywhere) if side else anywhere.tolist()
        root = torch.tensor(weights, dtype=torch.float64).sqrt()
        pairs = root[:, None] * root * (1 - torch.eye(len(root)))
        ours = torch.stack([cosines(flat(getattr(inputs.student, p)[n][b].detach()), anywhere) for p, n in pieces])
        theirs = torch.stack([
            torch.stack([cosines(flat(getattr(t, p)[n][b]), t.mask[b]) for p, n in pieces])
            for t in inputs.teachers.values()
        ])
        trust = torch.stack([
            w * pairs * m[b][:, None] * m[b] for w, m in zip(inputs.weights[:, b], masks, strict=True)
        ])
        mixed = mix(theirs - ours, trust[:, None].expand_as(theirs))
        weight = mixed.sum(0)
        target = (mixed * theirs).sum(0) / weight.clamp_min(1e-12)
        error, energy = (weight * (ours - target) ** 2).sum((1, 2)), (weight * target**2).sum((1, 2))
        total = total + (error / energy).mean()
    return total / inputs.num_samples


def naive_compare(ours: Tensor, target: Tensor, mask: Tensor, mass: Tensor | None) -> float:
    """One sample, layer and part: ours, target [H, T, D]; the weighted mean over positions of the squared error."""
    x, y = flat(ours.detach()), flat(target.detach())
    scale = (y[mask] - y[mask].mean(0)).square().mean().sqrt()
    weights = mean_one(mass, mask) if mass is not None else mask.double().tolist()
    each = [w * float(((x[t] - y[t]) / scale).square().mean()) for t, w in enumerate(weights)]
    return sum(each) / int(mask.sum())


def naive_kv(inputs: LossInputs, side: str | None, mix: Mix = plain) -> Tensor:
    """A fusion sees one layer's keys, or values, of a sample at a time."""
    total = 0.0
    pieces = [(part, layer) for part in ("keys", "values") for layer in range(inputs.student.num_layers)]
    masses = inputs.importance[side] if side else [None] * len(inputs.labels)
    for b, mass in enumerate(masses):
        for part, layer in pieces:
            ours = getattr(inputs.student, part)[layer][b : b + 1]
            shares, mapped = [], []
            for share, (name, teacher) in zip(inputs.weights[:, b], inputs.teachers.items(), strict=True):
                projector, theirs = inputs.projectors[name], getattr(teacher, part)[layer][b : b + 1]
                turned = getattr(projector, part)[layer]
                if projector.direction == "student_to_teacher":
                    compared = naive_compare(turned(ours)[0], theirs[0], teacher.mask[b], mass)
                    total += float(share) * compared / len(pieces)
                else:
                    mapped.append(turned(theirs)[0].detach())
                    shares.append((share * teacher.mask[b])[None, :, None].expand_as(mapped[-1]))
            if mapped:
                targets, anywhere = torch.stack(mapped), (torch.stack(shares) > 0).any(0)[0, :, 0]
                mixed = mix(targets - ours.detach(), torch.stack(shares))
                target = (mixed * targets).sum(0) / mixed.sum(0).clamp_min(1e-12)
                total += naive_compare(ours[0], target, anywhere, mass) / len(pieces)
    return torch.tensor(total / inputs.num_samples)


def naive(kind: str, inputs: LossInputs, side: str | None = None, mix: Mix = plain) -> Tensor:
    return (naive_relation if kind == "relation" else naive_kv)(inputs, side, mix)


@every_kind
@every_side
def test_attention_weighs_as_the_loop_does(kind: str, side: str) -> None:
    inputs = inputs_of(kind)
    found = at_once(kind, side)(inputs)
    torch.testing.assert_close(found.double(), naive(kind, inputs, side).double(), rtol=1e-4, atol=1e-6)
    other = at_once(kind, "teacher" if side == "student" else "student")(inputs)
    assert (found - loss_of(kind)(inputs)).abs() > 1e-3 and (found - other).abs() > 1e-3
    torch.testing.assert_close(loss_of(kind)(inputs).double(), naive(kind, inputs).double(), rtol=1e-4, atol=1e-6)


def test_the_weights_are_those_of_anyone_s_attention() -> None:
    inputs = random_inputs()
    mask = inputs.teachers["t0"].mask
    found = at_once("kv to teacher", "student").position_weights(inputs, mask)
    torch.testing.assert_close(found, position_weights(inputs.importance["student"], mask))
    torch.testing.assert_close(found.sum(1), mask.sum(1).float())
    assert (found[~mask] == 0).all()


@every_kind
@every_side
def test_equal_importance_is_no_weighting_and_none_at_all_too(kind: str, side: str) -> None:
    inputs = inputs_of(kind)
    for value in (0.25, 0.0):
        inputs.importance[side].fill_(value)
        torch.testing.assert_close(at_once(kind, side)(inputs), loss_of(kind)(inputs))


@every_kind
@every_side
def test_before_its_start_attention_does_nothing_and_is_not_asked_for(kind: str, side: str) -> None:
    loss = loss_of(kind, attention=side, attention_warmup_steps=3)
    inputs = inputs_of(kind)
    without = replace(inputs, importance={})
    for step in (0, 2):
        assert torch.equal(loss(replace(without, step=step)), loss_of(kind)(inputs))
    assert (loss(replace(inputs, step=3)) - loss_of(kind)(inputs)).abs() > 1e-3
    with pytest.raises(KeyError):
        loss(replace(without, step=3))


@pytest.mark.parametrize(("side", "steps"), [("student", 1000), ("teacher", 500)])
def test_default_starts(side: str, steps: int) -> None:
    assert KVLoss(attention=side).attention_starts == steps and KVLoss().attention_starts == 0
    assert KVLoss(attention=side).needs - KVLoss.requires == {f"{side}_importance"}


@every_kind
@every_side
@pytest.mark.parametrize(("left", "right"), [(0, 5), (4, 0), (2, 3)])
def test_padding_changes_nothing(kind: str, side: str, left: int, right: int) -> None:
    inputs = inputs_of(kind)
    loss = at_once(kind, side)
    torch.testing.assert_close(loss(pad(inputs, left, right, 7.0)), loss(inputs), rtol=1e-5, atol=1e-6)


@every_kind
@every_side
def test_masked_importance_does_not_count(kind: str, side: str) -> None:
    """Positions in which no teacher is aligned keep whatever attention they have."""
    inputs = inputs_of(kind)
    nowhere = ~torch.stack([t.mask for t in inputs.teachers.values()]).any(0)
    for teacher in inputs.teachers.values():
        teacher.mask[:, 3] = False
    nowhere[:, 3] = True
    loss = at_once(kind, side)
    before = loss(inputs)
    inputs.importance[side][nowhere] = 100.0
    torch.testing.assert_close(loss(inputs), before)


@every_kind
@every_side
def test_micro_batches_add_up(kind: str, side: str) -> None:
    inputs, loss = inputs_of(kind), at_once(kind, side)
    parts = [loss(map_inputs(inputs, lambda x, i=i: x[i : i + 1])) for i in range(3)]
    torch.testing.assert_close(sum(parts), loss(inputs), rtol=1e-5, atol=1e-6)


# ---- layers


def only_layer(inputs: LossInputs, layer: int) -> LossInputs:
    """The same inputs of one layer alone, with its shares."""

    def states(kv):
        return replace(kv, keys=kv.keys[layer : layer + 1], values=kv.values[layer : layer + 1], layers=(0,))

    projectors = copy.deepcopy(inputs.projectors)
    for module in projectors.values():
        module.keys, module.values = (nn.ModuleList([maps[layer]]) for maps in (module.keys, module.values))
        module.mean, module.scale = module.mean[:, layer : layer + 1], module.scale[:, layer : layer + 1]
    return replace(
        inputs, student=states(inputs.student), teachers={n: states(t) for n, t in inputs.teachers.items()},
        projectors=projectors, weights=inputs.weights if inputs.weights.dim() == 2 else inputs.weights[:, layer],
    )  # fmt: skip


@every_kind
@pytest.mark.parametrize(
    ("progress", "factors"), [(0, (1, 0, 0)), (0.1, (1, 0.5, 0)), (0.25, (1, 1, 0.25)), (0.4, (1, 1, 1)), (1, (1,) * 3)]
)
def test_layers_come_in_one_after_the_other(kind: str, progress: float, factors: tuple[float, ...]) -> None:
    """Under annealing_ratio 0.4 layer l of three begins at 0.2 (l - 1) and is all in at 0.2 l."""
    inputs = inputs_of(kind, progress=progress)
    each = [loss_of(kind)(only_layer(inputs, layer)) for layer in range(3)]
    expected = sum(f * x for f, x in zip(factors, each, strict=True)) / 3
    torch.testing.assert_close(loss_of(kind, annealing_ratio=0.4)(inputs), expected, rtol=1e-5, atol=1e-6)


@every_kind
@pytest.mark.parametrize(("layers", "chosen"), [([2, 0], [2, 0]), ("middle", [1]), ([1], [1])])
@pytest.mark.parametrize("by_layer", [False, True], ids=["one share", "share by layer"])
def test_chosen_layers_are_compared_and_no_other(kind: str, layers, chosen: list[int], by_layer: bool) -> None:
    """A mean over them, in their own order under annealing."""
    shares = torch.rand((3, 3, 3), generator=torch.Generator().manual_seed(0)).softmax(0)
    inputs = inputs_of(kind, progress=0.1, **({"weights": shares} if by_layer else {}))
    each = [loss_of(kind)(only_layer(inputs, layer)) for layer in chosen]
    value = loss_of(kind, layers=layers)(inputs)
    torch.testing.assert_close(value, sum(each) / len(each), rtol=1e-5, atol=1e-6)
    value.backward()
    assert [bool(k.grad is not None and k.grad.any()) for k in inputs.student.keys] == [i in chosen for i in range(3)]
    annealed = loss_of(kind, layers=layers, annealing_ratio=0.2)(inputs)
    torch.testing.assert_close(annealed, sum(each[:1] + [0.5 * x for x in each[1:]]) / len(each), rtol=1e-5, atol=1e-6)


@every_kind
@every_side
def test_shares_by_layer_are_a_loop_over_layers(kind: str, side: str) -> None:
    shares = torch.rand((3, 3, 3), generator=torch.Generator().manual_seed(0)).softmax(0)
    shares[:, 1] = torch.tensor([[1.0], [0.0], [0.0]])  # the second layer hears the first teacher alone
    inputs = inputs_of(kind, weights=shares)
    loss = at_once(kind, side)
    expected = sum(loss(only_layer(inputs, layer)) for layer in range(3)) / 3
    torch.testing.assert_close(loss(inputs), expected, rtol=1e-5, atol=1e-6)
    assert (loss(inputs) - loss(replace(inputs, weights=shares[:, 0]))).abs() > 1e-4


@every_kind
@pytest.mark.parametrize("sizes", [(2, 3), (2, 2, 3)])
@pytest.mark.parametrize("knobs", [{}, {"attention": "student", "attention_warmup_steps": 0}])
def test_a_router_learns_to_hear_the_teacher_that_the_student_is_like(kind: str, sizes: tuple, knobs: dict) -> None:
    """By sample, or by layer too: wherever it starts from, every share of the student's like goes up."""
    inputs = random_inputs(direction=KINDS[kind][1], teachers=((2, 3), (2, 3)), init="auto")
    for teacher in inputs.teachers.values():
        teacher.mask[:] = True
    inputs.student = inputs.teachers["t0"].map(lambda x: x.clone().requires_grad_())
    logits = torch.randn(sizes, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = loss_of(kind, **knobs)(replace(inputs, weights=logits.softmax(0)))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and (gradient[0] < 0).all() and (gradient[1] > 0).all()


# ---- fusions of targets


def govern(differences: Tensor, weight: Tensor) -> Tensor:
    """Element by element, the weight of the teachers on the side of the majority."""
    out = weight.clone().flatten(1)
    for column, (pulls, shares) in enumerate(zip(differences.flatten(1).T, weight.flatten(1).T, strict=True)):
        vote = sum(float(s) * (1 if p > 0 else -1 if p < 0 else 0) for p, s in zip(pulls, shares, strict=True))
        for m, pull in enumerate(pulls):
            if vote * float(pull) <= 0 and vote != 0:
                out[m, column] = 0.0
    return out.view_as(weight)


def min_norm(differences: Tensor, weight: Tensor) -> Tensor:
    """The shortest mixture of the pulls, as scipy finds it."""
    pulls = (differences * weight.sqrt()).flatten(1).double()
    products = (pulls @ pulls.T).numpy()
    found = minimize(
        lambda x: x @ products @ x, np.full(len(pulls), 1 / len(pulls)), method="SLSQP", bounds=[(0, 1)] * len(pulls),
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1}, options={"ftol": 1e-12},
    )  # fmt: skip
    return torch.from_numpy(found.x).view(-1, *(1,) * (weight.dim() - 1)) * weight


@pytest.mark.parametrize("kind", SHARED_SPACE)
@pytest.mark.parametrize(("method", "mix", "tolerance"), [("govern", govern, 1e-4), ("min_norm", min_norm, 2e-3)])
def test_a_fusion_of_targets_is_asked_where_they_are(kind: str, method: str, mix: Mix, tolerance: float) -> None:
    fusion: Fusion = FUSIONS[method]()
    inputs = inputs_of(kind, fusion=fusion, weights=torch.full((3, 3), 1 / 3))
    if method == "min_norm":
        inputs = map_inputs(inputs, lambda x: x[:2])
    found = loss_of(kind)(inputs)
    torch.testing.assert_close(found.double(), naive(kind, inputs, mix=mix).double(), rtol=tolerance, atol=1e-6)
    assert (found - loss_of(kind)(replace(inputs, fusion=None))).abs() > 1e-3


@pytest.mark.parametrize("kind", SHARED_SPACE)
@pytest.mark.parametrize("method", ["govern", "min_norm"])
def test_fusions_of_targets_and_attention_go_together(kind: str, method: str) -> None:
    inputs = inputs_of(kind, fusion=FUSIONS[method](), weights=torch.full((3, 3), 1 / 3))
    loss = at_once(kind, "student")
    parts = [loss(map_inputs(inputs, lambda x, i=i: x[i : i + 1])) for i in range(3)]
    torch.testing.assert_close(sum(parts), loss(inputs), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss(pad(inputs, 2, 3, 5.0)), loss(inputs), rtol=1e-5, atol=1e-6)
    if method == "govern":
        expected = naive(kind, inputs, "student", govern)
        torch.testing.assert_close(loss(inputs).double(), expected.double(), rtol=1e-4, atol=1e-6)


# ---- in a run


@pytest.fixture(scope="module")
def world(tiny_model, tiny_tokenizer) -> World:
    return World(tiny_model, tiny_tokenizer)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often importance has been computed, of the student and of teachers."""
    count = {"student": 0, "teacher": 0}
    for side, module in (("student", supervision), ("teacher", teachers)):
        monkeypatch.setattr(module, "importance", counted(module.importance, count, side))
    return count


def counted(function: Callable, count: dict[str, int], side: str) -> Callable:
    def call(*args, **kwargs):
        count[side] += 1
        return function(*args, **kwargs)

    return call


def trained(world: World, folder: Path, kind: str, loss: LayerwiseLoss, **changes):
    name = "kv_relation" if kind == "relation" else "kv"
    trainer = world.trainer(folder, {"cross_entropy": CrossEntropy(), name: loss}, **changes)
    trainer.train()
    return trainer


@pytest.fixture
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step a teacher may say all that it can."""
    monkeypatch.setattr(MultiTeacherKVTrainer, "calibrate", lambda self: None)


@pytest.mark.parametrize("kind", ["relation", "kv to teacher"])
@every_side
def test_a_run_weighs_from_its_start_on(
    world: World, tmp_path: Path, asked, uncalibrated, kind: str, side: str
) -> None:
    """Two steps as without, and without computing importance; then one a micro-batch, or one a teacher of it."""
    plain = curve(trained(world, tmp_path / "plain", kind, loss_of(kind), max_steps=4))
    assert asked == {"student": 0, "teacher": 0}
    assert all("attn_warmup_left" not in log for log in plain)
    loss = loss_of(kind, attention=side, attention_warmup_steps=2)
    two = trained(world, tmp_path / "two", kind, loss, max_steps=2)
    assert asked == {"student": 0, "teacher": 0}
    found = curve(trained(world, tmp_path / "four", kind, loss, max_steps=4))
    assert asked == {"student": 0, "teacher": 0} | {side: 2 if side == "student" else 2 * len(two.teachers)}
    assert [log["attn_warmup_left"] for log in found] == [1, 0, 0, 0]
    name = "loss_kv_relation" if kind == "relation" else "loss_kv"
    assert [log[name] for log in found[:2]] == [log[name] for log in plain[:2]]
    assert abs(found[2][name] - plain[2][name]) > 1e-4


@pytest.mark.parametrize("kind", ["relation", "kv to teacher"])
@every_side
def test_accumulation_changes_nothing(world: World, tmp_path: Path, kind: str, side: str) -> None:
    knobs = {"samples": 2} if kind == "relation" else {}
    loss = loss_of(kind, attention=side, attention_warmup_steps=1, **knobs)
    whole = trained(world, tmp_path / "whole", kind, loss)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    parts = trained(world, tmp_path / "parts", kind, loss, **sizes)
    assert_same_run(whole, parts)
    plain = trained(world, tmp_path / "plain", kind, loss_of(kind, **knobs))
    assert any((x - weights(plain)[n]).abs().max() > 1e-6 for n, x in weights(whole).items()), "weighting took part"
