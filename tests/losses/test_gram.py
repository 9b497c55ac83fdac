"""The blocked comparison of Gram matrices against whole matrices and autograd."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kv_trainer.losses.gram import directions, relative_error
from kv_trainer.losses.relation import fuse, root


def drawn(*sizes: int, seed: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(positions: int, teachers: int, seed: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """Two layers, three groups, positions that some teacher or none is trusted with."""
    x = drawn(2, 3, positions, 4, seed=seed)
    others = [drawn(2, 3, positions, 3 + m, seed=seed + 1 + m) for m in range(teachers)]
    return x, others, drawn(teachers, 3, positions, seed=seed + 9).clamp_min(0)


def whole(x: Tensor, teachers: list[Tensor], shares: Tensor) -> Tensor:
    ours = directions(x, trusted(shares))
    target, weight = fuse(teachers, shares)
    energy = target.square().sum((2, 3))
    error = (ours @ ours.mT * weight - target).square().sum((2, 3))
    return torch.where(energy > 1e-6, error / energy.clamp_min(1e-6), 0)


def blocked(x: Tensor, teachers: list[Tensor], shares: Tensor, block: int) -> Tensor:
    scaled = [directions(y, length) for y, length in zip(teachers, root(shares))]
    return relative_error(x, trusted(shares), scaled, root(shares), block)


def trusted(shares: Tensor) -> Tensor:
    return (shares > 0).any(0).double()


@given(positions=st.integers(1, 11), teachers=st.integers(1, 3), block=st.integers(1, 12), seed=st.integers(0, 30))
def test_blocks_are_the_whole_with_its_gradient(positions: int, teachers: int, block: int, seed: int) -> None:
    x, others, shares = inputs(positions, teachers, seed)
    found = []
    for error in (blocked(x.requires_grad_(), others, shares, block), whole(x, others, shares)):
        found.append((error.detach(), *torch.autograd.grad((error * torch.arange(6.0).view(2, 3)).sum(), x)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_the_gradient_is_that_of_finite_differences() -> None:
    x, others, shares = inputs(7, 2, 0)
    assert torch.autograd.gradcheck(lambda z: blocked(z, others, shares, 3), x.requires_grad_())


def test_one_tensor_of_the_size_of_the_states_waits_for_the_backward_pass() -> None:
    x, others, shares = inputs(64, 2, 0)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        blocked(x.requires_grad_(), others, shares, 16)
    assert kept == [x.numel()]
