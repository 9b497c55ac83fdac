"""Every fusion against what its formula says, written out; and what holds for all of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kv_trainer.fusion import (
    FUSIONS,
    MIN_SHARE,
    Confidence,
    Entropy,
    Fixed,
    Fusion,
    FusionInputs,
    Govern,
    MinNorm,
    Router,
    Similarity,
    TaskWise,
    Uniform,
    check_given,
    method_of,
    teacher_shares,
    to_the_heard,
)  # fmt: skip
from kv_trainer.fusion.learned import k_means, pooled
from kv_trainer.fusion.targets import min_norm_weights
from kv_trainer.types import KVShape, KVStates

TEACHERS, SAMPLES, LENGTH, LAYERS = 3, 5, 7, 2
every_fusion = pytest.mark.parametrize("name", FUSIONS)


def states(generator: torch.Generator, heads: int, width: int) -> KVStates:
    mask = torch.rand((SAMPLES, LENGTH), generator=generator) < 0.7
    mask[:, 2] = True
    tensors = [torch.randn((SAMPLES, heads, LENGTH, width), generator=generator) for _ in range(2 * LAYERS)]
    return KVStates(tuple(tensors[:LAYERS]), tuple(tensors[LAYERS:]), mask, tuple(range(LAYERS)), LAYERS)


def inputs_for(fusion: Fusion, seed: int = 0) -> FusionInputs:
    generator = torch.Generator().manual_seed(seed)
    teachers = [states(generator, heads, 4) for heads in (1, 2, 3)]
    found = FusionInputs(
        given=torch.tensor([1.0, 3.0, 4.0]),
        tokens=torch.tensor([3, 4, 5, 6, 2]),
        nll=torch.rand((TEACHERS, SAMPLES), generator=generator) * 9,
        entropy=torch.rand((TEACHERS, SAMPLES), generator=generator),
        tasks=torch.tensor([0, 1, 1, 0, 1]),
        task_nll=torch.tensor([[0.1, 2.0], [1.0, 0.5], [3.0, 3.0]]),
        teachers=teachers,
        student=states(generator, 2, 4),
    )
    if isinstance(fusion, Similarity):
        rows = [pooled(t, t.mask).transpose(0, 1).flatten(1) for t in teachers]
        own = torch.tensor([0, 0, 1, 1, 2])
        found.prototypes = [fusion.make_prototypes(x, own == i) for i, x in enumerate(rows)]
    if isinstance(fusion, Router):
        torch.manual_seed(seed)
        found.router = fusion.module(KVShape("x", LAYERS, 2, 4, None, 10, 10), TEACHERS)
        for parameter in found.router.parameters():
            torch.nn.init.normal_(parameter)
    return found


@every_fusion
def test_shares_sum_to_one_and_do_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    fusion = FUSIONS[name]()
    found = inputs_for(fusion)
    shares = teacher_shares(fusion, found)
    assert shares.shape == (TEACHERS, SAMPLES) and (shares >= 0).all()
    torch.testing.assert_close(shares.sum(0), torch.ones(SAMPLES))
    order = torch.tensor([4, 1, 0, 3, 2])

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[..., order]

    for kv in found.teachers + [found.student]:
        kv_moved = kv.map(lambda x: x[order], kv.mask[order])
        object.__setattr__(kv, "keys", kv_moved.keys)
        object.__setattr__(kv, "values", kv_moved.values)
        object.__setattr__(kv, "mask", kv_moved.mask)
    found.nll, found.entropy, found.tasks = moved(found.nll), moved(found.entropy), moved(found.tasks)
    found.tokens = moved(found.tokens)
    torch.testing.assert_close(teacher_shares(fusion, found), shares[:, order])


@every_fusion
def test_is_documented_and_named(name: str) -> None:
    kind = FUSIONS[name]
    assert method_of(kind()) == name
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
    if kind not in (Uniform, Fixed):
        assert kind.source and "Source:" in kind.__doc__


@every_fusion
def test_a_lone_teacher_has_it_all(name: str) -> None:
    lone = FusionInputs(given=torch.ones(1), tokens=torch.tensor([2, 3]))
    assert torch.equal(teacher_shares(FUSIONS[name](), lone), torch.ones(1, 2))


@every_fusion
def test_padding_does_not_count(name: str) -> None:
    fusion = FUSIONS[name]()
    found, other = inputs_for(fusion), inputs_for(fusion)
    other.router = found.router
    for kv in other.teachers + [other.student]:
        for x in (*kv.keys, *kv.values):
            x.transpose(1, 2)[~kv.mask] = 1e4
    torch.testing.assert_close(teacher_shares(fusion, other), teacher_shares(fusion, found))


def test_uniform_and_fixed() -> None:
    found = inputs_for(Uniform())
    torch.testing.assert_close(Uniform().shares(found), torch.full((3, SAMPLES), 1 / 3))
    torch.testing.assert_close(Fixed().shares(found)[:, 2], torch.tensor([1.0, 3.0, 4.0]) / 8)


@pytest.mark.parametrize("given", [[-1.0, 2.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_impossible_weights_are_refused(given: list[float]) -> None:
    with pytest.raises(ValueError, match="The teachers' weights are"):
        check_given(given)


def test_confidence_is_the_softmax_of_nats_a_student_token() -> None:
    found = inputs_for(Confidence())
    shares = Confidence(temperature=0.7).shares(found)
    for b in range(SAMPLES):
        odds = [torch.exp(-found.nll[m, b] / found.tokens[b] / 0.7) for m in range(TEACHERS)]
        torch.testing.assert_close(shares[:, b], torch.stack(odds) / sum(odds))


def test_ca_mkd() -> None:
    found = inputs_for(Confidence())
    shares = Confidence(form="ca_mkd").shares(found)
    for b in range(SAMPLES):
        odds = [torch.exp(found.nll[m, b] / found.tokens[b]) for m in range(TEACHERS)]
        torch.testing.assert_close(shares[:, b], torch.stack([(1 - x / sum(odds)) / (TEACHERS - 1) for x in odds]))
    assert shares.max() <= 1 / (TEACHERS - 1)


def test_entropy_prefers_the_sure_teacher() -> None:
    found = inputs_for(Entropy())
    shares = Entropy(temperature=0.2).shares(found)
    assert torch.equal(shares.argmax(0), found.entropy.argmin(0))
    torch.testing.assert_close(shares, torch.softmax(-found.entropy / 0.2, 0))


def test_task_wise_reads_the_table() -> None:
    found = inputs_for(TaskWise())
    shares = TaskWise(temperature=0.5).shares(found)
    for b, task in enumerate(found.tasks.tolist()):
        torch.testing.assert_close(shares[:, b], torch.softmax(-found.task_nll[:, task] / 0.5, 0))


@pytest.mark.parametrize("kind", ["mean", "kmeans"])
def test_similarity_finds_the_home_ground(kind: str) -> None:
    """Two teachers, rows of two kinds far apart: rows like those a teacher was best at go to it."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn((2, 2 * LAYERS * 4), generator=generator) * 5
    kinds = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1])
    rows = centres[kinds] + torch.randn((8, 2 * LAYERS * 4), generator=generator)
    fusion = Similarity(prototypes=kind, clusters=2)
    made = [fusion.make_prototypes(rows, kinds == i) for i in range(2)]
    assert made[0].shape[0] == 1 + (1 if kind == "mean" else 2)

    def as_states(x: Tensor) -> KVStates:
        parts = x[:, None, None].expand(-1, 1, 3, -1).split(4, dim=-1)
        return KVStates(parts[::2], parts[1::2], torch.ones(len(x), 3, dtype=torch.bool), (0, 1), 2)

    test = centres[torch.tensor([1, 0])] + torch.randn((2, 16), generator=generator)
    found = FusionInputs(torch.ones(2), torch.ones(2), teachers=[as_states(test)] * 2, prototypes=made)
    assert fusion.shares(found).argmax(0).tolist() == [1, 0]


def test_states_in_half_precision_are_averaged_in_full() -> None:
    """Where every channel has a large mean, what tells samples apart is in the digits that bfloat16 has no room for."""
    generator = torch.Generator().manual_seed(0)
    keys = (100 + torch.randn((2, 1, 300, 4), generator=generator)).bfloat16()
    states = KVStates((keys,), (keys,), torch.ones(2, 300, dtype=torch.bool), (0,), 1)
    expected = keys.double().mean(2).flatten(1)
    found = pooled(states, states.mask)[0, :, :4]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["mean", "kmeans"])
def test_a_teacher_that_is_the_likeliest_everywhere_is_near_to_all(kind: str) -> None:
    """A large teacher beside a small one: its prototype less the mean of all rows would be rounding."""
    fusion, generator = Similarity(prototypes=kind), torch.Generator().manual_seed(0)
    both = [states(generator, heads, 4) for heads in (1, 2)]
    rows = [pooled(s, s.mask).transpose(0, 1).flatten(1) for s in both]
    best = torch.tensor([True] * len(rows[0]))
    made = [fusion.make_prototypes(rows[0], best), fusion.make_prototypes(rows[1], ~best)]
    ones = torch.ones(len(best))
    shares = fusion.shares(FusionInputs(torch.ones(2), ones, teachers=both, prototypes=made))
    assert (shares[0] > 0.8).all()


def test_a_teacher_without_a_home_is_near_to_nothing() -> None:
    made = Similarity().make_prototypes(torch.randn(4, 6), torch.zeros(4, dtype=torch.bool))
    assert made.shape == (2, 6) and not made[1].any()


def test_k_means_finds_blobs() -> None:
    generator = torch.Generator().manual_seed(1)
    blobs = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    x = (blobs[:, None] + torch.randn((3, 20, 2), generator=generator) * 0.3).flatten(0, 1)
    found = k_means(x, 3)
    assert torch.cdist(blobs, found).amin(1).max() < 0.5


def test_the_router_starts_even_and_learns_from_the_shares() -> None:
    shape = KVShape("x", LAYERS, 2, 4, None, 10, 10)
    for per_layer, kind in itertools.product((False, True), ("linear", "mlp")):
        fusion = Router(kind=kind, per_layer=per_layer)
        found = inputs_for(fusion)
        found.router = fusion.module(shape, TEACHERS)
        shares = teacher_shares(fusion, found)
        assert shares.shape == ((TEACHERS, LAYERS, SAMPLES) if per_layer else (TEACHERS, SAMPLES))
        torch.testing.assert_close(shares, torch.full_like(shares, 1 / 3))
        torch.testing.assert_close(fusion.regulariser(shares), torch.zeros(SAMPLES), atol=1e-6, rtol=0)
        (shares[0] * torch.randn(SAMPLES)).sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in found.router.parameters())


def test_the_router_gives_the_student_no_gradient() -> None:
    fusion = Router()
    found = inputs_for(fusion)
    for x in (*found.student.keys, *found.student.values):
        x.requires_grad_(True)
    fusion.shares(found).square().sum().backward()
    assert all(x.grad is None for x in (*found.student.keys, *found.student.values))


def test_govern_counts_the_majority_only() -> None:
    differences = torch.tensor([[1.0, -1.0, 2.0, 0.0], [2.0, -3.0, -1.0, 1.0], [-5.0, -1.0, -4.0, -1.0]])[:, None]
    weight = torch.full((3, 1, 1), 1 / 3)
    mixed = Govern().mixing(differences, weight, keep=1)
    assert (mixed[:, 0] > 0).tolist() == [
        [True, True, False, True], [True, True, True, True], [False, True, True, True],
    ]  # fmt: skip


@pytest.mark.parametrize("count", [2, 3, 4])
def test_min_norm_is_the_shortest_mixture(count: int) -> None:
    """Against a fine grid of the simplex."""
    generator = torch.Generator().manual_seed(count)
    pulls = torch.randn((6, count, 5), generator=generator) + torch.randn((6, 1, 5), generator=generator)
    weights = min_norm_weights(pulls @ pulls.mT)
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    assert (weights >= 0).all()
    length = torch.einsum("bm,bmd->bd", weights, pulls).norm(dim=1)
    ticks = 20
    grid = [g for g in itertools.product(range(ticks + 1), repeat=count) if sum(g) == ticks]
    every = torch.einsum("gm,bmd->bgd", torch.tensor(grid) / ticks, pulls).norm(dim=2).amin(1)
    assert (length <= every + 1e-4).all()


def test_min_norm_of_equal_teachers_is_finite() -> None:
    weights = min_norm_weights(torch.ones(2, 3, 3))
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert min_norm_weights(torch.zeros(1, 2, 2)).isfinite().all()


@pytest.mark.parametrize("apart", [1e-4, 1e-5, 1e-6])
def test_min_norm_of_teachers_that_are_nearly_one(apart: float) -> None:
    generator = torch.Generator().manual_seed(0)
    pull = torch.randn((400, 1, 50), generator=generator)
    pulls = pull + apart * torch.randn((400, 2, 50), generator=generator)
    weights = min_norm_weights(pulls @ pulls.mT)
    assert weights.dtype == torch.float32 and (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(400))


def test_min_norm_decides_for_each_sample() -> None:
    differences = torch.randn(2, 4, 3, 5)
    one = MinNorm().mixing(differences, torch.full((2, 1, 1, 1), 0.5), keep=1)
    assert one.shape[1] == 4
    for b in range(4):
        alone = MinNorm().mixing(differences[:, b : b + 1], torch.full((2, 1, 1, 1), 0.5), keep=1)
        torch.testing.assert_close(one[:, b : b + 1], alone)


def test_min_norm_leaves_out_who_says_nothing() -> None:
    """A masked teacher's pull is zero: it would be the shortest, and the sample would teach nothing."""
    differences, weight = torch.randn(3, 4, 3, 5), torch.full((3, 4, 1, 5), 1 / 3)
    weight[1, 2], differences[1, 2] = 0, 0
    found = MinNorm().mixing(differences, weight, keep=1)
    assert (found.sum(0) > 0).all() and (found[1, 2] == 0).all()
    pair = MinNorm().mixing(differences[[0, 2], 2:3], weight[[0, 2], 2:3], keep=1)
    torch.testing.assert_close(found[[0, 2], 2:3], pair)
    # Where the mixture leaves out all who speak, they count nevertheless.
    differences = torch.stack([torch.ones(1, 1, 4), torch.full((1, 1, 4), 5.0)])
    weight = torch.ones(2, 1, 1, 4)
    weight[0, ..., 3] = 0
    found = MinNorm().mixing(differences, weight, keep=1)
    assert found[..., :3].sum(0).gt(0).all() and found[1, 0, 0, 3] == 1 and found[1, 0, 0, 0] == 0


@pytest.mark.parametrize("kind", [Confidence, Entropy, TaskWise, Similarity])
@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(kind: type[Fusion], temperature: float) -> None:
    with pytest.raises(ValueError, match=f"fusion.temperature is {temperature}"):
        kind(temperature=temperature)


def test_tiny_shares_are_zero() -> None:
    found = inputs_for(Confidence())
    found.nll = torch.tensor([[0.0], [100.0], [1.0]]).expand(-1, SAMPLES)
    shares = teacher_shares(Confidence(), found)
    assert (shares[1] == 0).all() and MIN_SHARE == 1e-3
    torch.testing.assert_close(shares.sum(0), torch.ones(SAMPLES))


def test_the_share_of_a_silent_teacher_goes_to_the_others() -> None:
    share = torch.tensor([[0.5, 0.2, 0.3, 1.0], [0.3, 0.2, 0.7, 0.0], [0.2, 0.6, 0.0, 0.0]])
    heard = torch.tensor([[True, False, False, False], [True, True, False, True], [True, True, True, True]])
    found = to_the_heard(share, heard)
    assert found.T.tolist() == [
        pytest.approx(row) for row in ([0.5, 0.3, 0.2], [0, 0.25, 0.75], [0.3, 0.7, 0.0], [1.0, 0.0, 0.0])
    ], "where nobody who has a share says anything, shares stay, and count nowhere"
    assert torch.equal(found[:, 0], share[:, 0]), "to the last digit where all speak"
    by_layer = share[:, None].repeat(1, 2, 1)
    assert torch.equal(to_the_heard(by_layer, heard), found[:, None].repeat(1, 2, 1))


def test_a_router_finds_back_from_an_extreme() -> None:
    fusion = Router()
    found = inputs_for(fusion)
    gate = found.router
    with torch.no_grad():
        gate[-1].bias.copy_(torch.tensor([0.0, 0.0, -12.0]))
    shares = teacher_shares(fusion, found)
    assert (shares[2] > 0).all() and (shares[2] < MIN_SHARE).all()
    fusion.regulariser(shares).sum().backward()
    assert gate[-1].bias.grad[2] < 0, "it is drawn up again"


def test_what_is_remembered() -> None:
    assert {n for n, kind in FUSIONS.items() if kind().remembered} == {
        "uniform", "fixed", "confidence", "entropy", "task_wise", "govern", "min_norm",
    }  # fmt: skip
