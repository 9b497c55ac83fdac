"""`unrotate` against the models' own rotation, and as the inverse of ours, over shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as apply_partly
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as apply_wholly

from kv_trainer.alignment.rope import rotate, rotate_half, unrotate

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS = [("qwen2", {}), ("qwen3", {}), ("llama", {"rope_parameters": LLAMA3}), ("llama", {"rope_parameters": YARN})]


def angles(positions: Tensor, rotary: int, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos, sin [B, S, rotary] at base 10,000, written out."""
    frequency = 1e4 ** (-torch.arange(0, rotary, 2) / rotary)
    phase = positions[..., None] * frequency
    return torch.cat((phase.cos(),) * 2, -1) * scaling, torch.cat((phase.sin(),) * 2, -1) * scaling


@given(
    batch=st.integers(1, 3), heads=st.integers(1, 4), length=st.integers(1, 9), half=st.integers(1, 8),
    rest=st.integers(0, 7), scaling=st.floats(0.5, 2.0), start=st.integers(0, 4000), seed=st.integers(0, 9),
)  # fmt: skip
def test_unrotate_is_the_inverse_of_rotate(batch, heads, length, half, rest, scaling, start, seed):
    keys = torch.randn(batch, heads, length, 2 * half + rest, generator=torch.Generator().manual_seed(seed))
    cos, sin = angles(start + torch.arange(length).expand(batch, -1), 2 * half, scaling)
    turned = rotate(keys, cos, sin)
    torch.testing.assert_close(unrotate(turned, cos, sin), keys, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotate(unrotate(keys, cos, sin), cos, sin), keys, atol=1e-5, rtol=0)
    assert torch.equal(turned[..., 2 * half :], keys[..., 2 * half :]), "channels past the rotary ones stay"
    length_of = keys[..., : 2 * half].norm(dim=-1)
    torch.testing.assert_close(turned[..., : 2 * half].norm(dim=-1), scaling * length_of, atol=1e-4, rtol=1e-5)


def test_rotate_half_and_a_quarter_turn():
    assert rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-3, -4, 1, 2]
    keys = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0]).view(1, 1, 1, 5)
    cos, sin = torch.zeros(1, 1, 4), torch.full((1, 1, 4), 2.0)
    assert rotate(keys, cos, sin).flatten().tolist() == [-6, -8, 2, 4, 9]


@pytest.mark.parametrize(("family", "config"), MODELS, ids=["qwen2", "qwen3", "llama3", "yarn"])
def test_rotation_is_the_models_own(tiny_model, family, config):
    rotary = tiny_model(family, **config).model.rotary_emb
    width = 12 if family == "qwen3" else 8
    keys = torch.randn(2, 3, 100, width, generator=torch.Generator().manual_seed(1))
    cos, sin = rotary(keys, torch.arange(100).expand(2, -1) + torch.tensor([[0], [20]]))
    _, theirs = apply_wholly(keys, keys, cos, sin)
    torch.testing.assert_close(rotate(keys, cos, sin), theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(unrotate(theirs, cos, sin), keys, atol=2e-6, rtol=0)


def test_partial_rotation_is_the_models_own(tiny_model):
    rotary = tiny_model("gpt_neox").gpt_neox.rotary_emb
    keys = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(1))
    cos, sin = rotary(keys, torch.arange(50).expand(2, -1))
    assert cos.shape[-1] == 2
    _, theirs = apply_partly(keys, keys, cos, sin)
    torch.testing.assert_close(rotate(keys, cos, sin), theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(unrotate(theirs, cos, sin), keys, atol=2e-6, rtol=0)


def test_gradient_is_turned_back_too():
    keys = torch.randn(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = (x.double() for x in angles(torch.arange(4)[None], 4, 1.3))
    assert torch.autograd.gradcheck(lambda k: unrotate(k, cos, sin), keys)
