"""CKA against the formulas written out, and what the debiased form is for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kv_trainer.similarity import biased_cka, debiased_cka, debiased_hsic, linear_hsic, standardise


def drawn(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def everywhere(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:-1], dtype=torch.bool)


def naive_hsic(first: Tensor, second: Tensor) -> Tensor:
    """HSIC_1 as in arXiv 2010.15327, in float64."""
    k, m = (x.double() - x.double().diag().diag() for x in (first, second))
    n = len(k)
    one = torch.ones(n, dtype=torch.float64)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return ((k @ m).trace() + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


@given(n=st.integers(4, 12), wide=st.integers(1, 9), seed=st.integers(0, 99))
def test_hsic_is_the_formula(n: int, wide: int, seed: int) -> None:
    x, y = drawn(n, wide, seed=seed), drawn(n, 5, seed=seed + 1)
    k, m = x @ x.T, y @ y.T
    found = debiased_hsic(k, m, torch.ones(n, dtype=torch.bool))
    torch.testing.assert_close(found.double(), naive_hsic(k, m), rtol=1e-3, atol=1e-4)


@given(n=st.integers(4, 12), wide=st.integers(1, 16), padding=st.integers(0, 3), seed=st.integers(0, 99))
def test_hsic_of_features_is_that_of_their_gram_matrices(n: int, wide: int, padding: int, seed: int) -> None:
    """Made of channels where there are more positions, of positions otherwise."""
    mask = torch.arange(n + padding) < n
    x, y = (standardise(drawn(n + padding, c, seed=seed + c), mask) for c in (wide, 7))
    for found, (a, b) in zip(linear_hsic(x, y, mask), ((x, y), (x, x), (y, y)), strict=True):
        expected = naive_hsic((a @ a.T)[:n, :n], (b @ b.T)[:n, :n])
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("debiased", [True, False])
def test_cka_is_the_formula(debiased: bool) -> None:
    x, y = drawn(20, 7), drawn(20, 7) @ drawn(7, 5, seed=2) + drawn(20, 5, seed=3)
    if debiased:
        k, m = x.double() @ x.double().T, y.double() @ y.double().T
        expected = naive_hsic(k, m) / (naive_hsic(k, k) * naive_hsic(m, m)).sqrt()
        found = debiased_cka(x, y, everywhere(x))
    else:
        a, b = ((z - z.mean(0)).double() for z in (x, y))
        expected = (b.T @ a).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
        found = biased_cka(x, y, everywhere(x))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_biased_form_calls_unrelated_features_alike() -> None:
    """32 positions with 1536 and 3584 channels, all independent: 0.986 against about 0.01."""
    x, y = drawn(16, 32, 1536), drawn(16, 32, 3584, seed=1)
    biased, debiased = biased_cka(x, y, everywhere(x)), debiased_cka(x, y, everywhere(x))
    torch.testing.assert_close(biased, torch.full((16,), 0.986), rtol=0, atol=0.003)
    assert debiased.abs().max() < 0.12 and debiased.mean().abs() < 0.03


def test_the_debiased_form_has_no_bias() -> None:
    x, y = drawn(400, 12, 40), drawn(400, 12, 30, seed=1)
    values = debiased_cka(x, y, everywhere(x))
    assert values.shape == (400,)
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20 and (values < 0).any() and (values > 0).any()


@pytest.mark.parametrize("measure", [debiased_cka, biased_cka])
def test_equal_geometry_is_one(measure) -> None:
    """Rotated, scaled, shifted, widened: all the same geometry."""
    x = drawn(3, 9, 6)
    turn = torch.linalg.qr(drawn(6, 6, seed=1))[0]
    for y in (x, x @ turn, 1e-4 * x, 1e4 * x, x + 50 * drawn(6, seed=2), torch.cat((x, torch.zeros_like(x)), -1)):
        torch.testing.assert_close(measure(x, y, everywhere(x)), torch.ones(3), rtol=1e-3, atol=1e-3)


@given(left=st.integers(0, 4), right=st.integers(0, 4), seed=st.integers(0, 20))
def test_masked_positions_do_not_count(left: int, right: int, seed: int) -> None:
    x, y = drawn(2, 8, 5, seed=seed), drawn(2, 8, 3, seed=seed + 1)
    wider = [torch.nn.functional.pad(z, (0, 0, left, right), value=1e4) for z in (x, y)]
    mask = torch.nn.functional.pad(everywhere(x), (left, right), value=False)
    for measure in (debiased_cka, biased_cka):
        torch.testing.assert_close(measure(*wider, mask), measure(x, y, everywhere(x)), rtol=1e-4, atol=1e-5)
    assert (standardise(wider[0], mask)[~mask] == 0).all()


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_positions_have_no_value(count: int) -> None:
    x = drawn(1, 6, 4).requires_grad_()
    mask = torch.arange(6)[None] < count
    value = debiased_cka(x, drawn(1, 6, 4, seed=1), mask)
    value.sum().backward()
    assert value.item() == 0 and x.grad.isfinite().all()


@pytest.mark.parametrize("level", [0.0, 1.0, 1e4])
def test_equal_rows_have_no_value(level: float) -> None:
    x = (torch.full((1, 9, 4), level) * torch.tensor([0.1, 0.7, -0.3, 1 / 3])).requires_grad_()
    value = debiased_cka(x, drawn(1, 9, 4), everywhere(x))
    value.sum().backward()
    assert value.item() == 0 and (x.grad == 0).all()


def test_gradient_is_the_slope() -> None:
    """The scale is taken out without gradient: the value does not see it, so its gradient stays exact."""
    x, y = 3 * drawn(10, 5).double(), drawn(10, 4, seed=1).double()
    assert torch.autograd.gradcheck(lambda z: debiased_cka(z, y, everywhere(y)), x.requires_grad_())
