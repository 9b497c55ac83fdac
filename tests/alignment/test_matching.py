"""Layer matching against every monotone assignment, and likeness of layers that are known to be alike."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kv_trainer.alignment.matching import layer_similarity, match_layers
from kv_trainer.similarity import debiased_cka
from kv_trainer.types import KVStates


@given(ours=st.integers(1, 5), theirs=st.integers(1, 6), seed=st.integers(0, 999), coarse=st.booleans())
def test_no_monotone_assignment_is_better(ours: int, theirs: int, seed: int, coarse: bool) -> None:
    matrix = torch.randn(ours, theirs, generator=torch.Generator().manual_seed(seed))
    matrix = matrix.round() if coarse else matrix  # with ties
    every = itertools.combinations_with_replacement(range(theirs), ours)
    totals = {path: sum(float(matrix[i, j]) for i, j in enumerate(path)) for path in every}
    found = tuple(match_layers(matrix))
    assert found == tuple(sorted(found)) and len(found) == ours
    assert totals[found] == pytest.approx(max(totals.values()), abs=1e-5)


def test_never_goes_back() -> None:
    """The best of each row alone would cross."""
    matrix = torch.tensor([[0.1, 0.2, 0.9], [1.0, 0.3, 0.1], [0.1, 0.2, 0.7]])
    assert match_layers(matrix) == [0, 0, 2]


def test_ties_go_to_earlier_layers() -> None:
    assert match_layers(torch.zeros(3, 4)) == [0, 0, 0]


@pytest.mark.parametrize("matrix", [torch.zeros(0, 3), torch.zeros(3), torch.tensor([[0.0, float("nan")]])])
def test_what_is_no_matrix_is_refused(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match="matrix of finite numbers"):
        match_layers(matrix)


def states(layers: list[Tensor], heads: int, mask: Tensor) -> KVStates:
    """Layers of [B, T, C] as keys, and backwards in time as values, in some heads."""
    keys = tuple(x.unflatten(2, (heads, -1)).transpose(1, 2) for x in layers)
    return KVStates(keys, tuple(k.flip(2) for k in keys), mask, tuple(range(len(layers))), len(layers))


def draw(count: int, width: int, samples: int = 3, length: int = 30, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((samples, length, width), generator=generator) for _ in range(count)]


def test_finds_the_layers_that_a_student_was_made_of() -> None:
    """Student layers are teacher layers 0, 2, 3, turned, shifted and noisy, in other heads of another width."""
    teacher, mask = draw(5, 12), torch.rand((3, 30), generator=torch.Generator().manual_seed(1)) < 0.8
    turn = torch.linalg.qr(draw(1, 12, 1, 12, seed=2)[0][0])[0]
    student = [3 * teacher[i] @ turn + 4 + 0.3 * noise for i, noise in zip((0, 2, 3), draw(3, 12, seed=3), strict=True)]
    real = torch.ones_like(mask)
    halves = [[kv([x[i] for x in layers], heads, m[i]) for i in (slice(0, 1), slice(1, 3))]
              for kv, layers, heads, m in ((states, student, 2, real), (states, teacher, 3, mask))]  # fmt: skip
    found = layer_similarity(*halves)
    assert found.shape == (3, 5) and found.dtype == torch.float32
    assert match_layers(found) == [0, 2, 3]
    related = torch.zeros(3, 5, dtype=torch.bool)
    related[[0, 1, 2], [0, 2, 3]] = True
    assert (found[related] > 0.9).all() and (found[~related].abs() < 0.3).all()
    assert found[~related].mean().abs() < 0.1, "unrelated layers are not alike"


def test_one_sample_is_debiased_cka() -> None:
    mask = torch.ones(1, 30).bool()
    ours, theirs = states(draw(2, 4, 1, seed=4), 2, mask), states(draw(3, 6, 1), 1, mask)
    found = layer_similarity([ours], [theirs], skip_first=2)
    for i, j in itertools.product(range(2), range(3)):
        each = []
        for part in ("keys", "values"):
            x, y = (getattr(s, part)[n].transpose(1, 2).flatten(2)[:, 2:] for s, n in ((ours, i), (theirs, j)))
            each.append(debiased_cka(x, y, torch.ones(1, 28, dtype=torch.bool)))
        torch.testing.assert_close(found[i, j], torch.stack(each).mean(), rtol=1e-3, atol=1e-4)


def test_positions_that_are_not_aligned_do_not_count() -> None:
    mask = torch.ones(2, 30).bool()
    mask[:, 20:], mask[1, :] = False, False
    ours, theirs = draw(2, 4, 2), draw(2, 6, 2, seed=1)
    wild = [torch.where(mask[..., None], x, 1e4) for x in theirs]
    wild_states, plain = (
        KVStates(tuple(x[:, None] for x in t), tuple(x[:, None] for x in t), mask, (0, 1), 2) for t in (wild, theirs)
    )
    student = states(ours, 2, torch.ones_like(mask))
    torch.testing.assert_close(layer_similarity([student], [wild_states]), layer_similarity([student], [plain]))


def test_a_limit_on_positions_changes_little() -> None:
    layers, mask = draw(3, 8, 1, 400), torch.ones(1, 400).bool()
    noisy = [x + n for x, n in zip(layers, draw(3, 8, 1, 400, seed=1), strict=True)]
    pair = [states(noisy, 1, mask)], [states(layers, 2, mask)]
    full, few = (layer_similarity(*pair, max_positions=n) for n in (400, 100))
    assert (full - few).abs().max() < 0.1 and not torch.equal(full, few)


def test_samples_that_are_too_short_are_refused() -> None:
    short = states(draw(1, 4, 2, 4), 1, torch.ones(2, 4).bool())
    with pytest.raises(ValueError, match="No sample has 5 positions"):
        layer_similarity([short], [short])
