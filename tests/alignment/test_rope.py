"""`unrotate` against the models' own rotation, and as the inverse of ours, over shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as apply_partly
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as apply_wholly

from kv_trainer.alignment.rope import inverse, rerotate, rotate, rotate_half, rotates, rotation_of, unrotate
from kv_trainer.capture import attention_layers

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


OWN = {  # family -> how many of the channels turn, and how many of its three layers
    "llama": (8, 3), "cohere": (8, 3), "cohere2": (12, 2), "glm": (6, 3), "glm4": (6, 3), "ernie4_5": (8, 3),
    "gpt_neox": (2, 3), "phi": (4, 3), "gpt_oss": (12, 3), "smollm3": (8, 2), "exaone4": (8, 2), "gemma3_text": (12, 3),
}  # fmt: skip


@pytest.mark.parametrize("family", OWN)
def test_a_familys_own_rotation_is_linear_and_undone(tiny_model, family):
    model, (width, turning) = tiny_model(family), OWN[family]
    layers = [layer.module for layer in attention_layers(model)]
    assert sum(map(rotates, layers)) == turning
    rotary = next(m for name, m in model.named_modules() if name.endswith("rotary_emb"))
    keys = torch.randn(2, 3, 20, layers[0].head_size if family == "gpt_neox" else layers[0].head_dim)
    kind = (model.config.layer_types[0],) if family == "gemma3_text" else ()
    embeddings = rotary(keys, torch.arange(20).expand(2, -1) + torch.tensor([[0], [90]]), *kind)
    rotation = rotation_of(layers[0])
    turned = rotation(keys, embeddings)
    assert torch.equal(turned[..., width:], keys[..., width:])
    scaling = embeddings[0].amax()  # GPT-OSS's YaRN has one
    torch.testing.assert_close(turned[0, :, 0, :width], scaling * keys[0, :, 0, :width])
    assert (turned - keys)[..., :width].abs().amax((0, 1, 2)).gt(1e-3).all(), "every channel that should turns"
    torch.testing.assert_close(rotation(turned, inverse(embeddings)), keys, atol=2e-6, rtol=0)
    scaled = tuple(1.3 * x for x in embeddings)  # as YaRN does
    torch.testing.assert_close(rotation(rotation(keys, scaled), inverse(scaled)), keys, atol=2e-6, rtol=0)


def test_a_family_without_a_known_rotation_is_refused_by_name(tiny_model):
    model = tiny_model("gptj", vocab_size=32, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    with pytest.raises(ValueError, match="GPTJAttention has no apply_rotary_pos_emb"):
        rotation_of(attention_layers(model)[0].module)


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rerotate_is_the_rotation_of_a_model_with_that_base(tiny_model, theta):
    rotary = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": theta}).model.rotary_emb
    keys, positions = torch.randn(2, 3, 30, 8), torch.randint(200, (2, 30))
    _, theirs = apply_wholly(keys, keys, *rotary(keys, positions))
    torch.testing.assert_close(rerotate(keys, positions, theta), theirs, atol=1e-5, rtol=0)


def test_rerotate_turns_the_first_channels_only(tiny_model):
    rotary = tiny_model("gpt_neox").gpt_neox.rotary_emb
    keys, positions = torch.randn(2, 3, 30, 8), torch.randint(200, (2, 30))
    _, theirs = apply_partly(keys, keys, *rotary(keys, positions))
    torch.testing.assert_close(rerotate(keys, positions, 1e4, rotary_dim=2), theirs, atol=1e-5, rtol=0)
    for wrong in (3, 0, 10):
        with pytest.raises(ValueError, match=f"rotary_dim is {wrong}; give an even number up to the head width 8"):
            rerotate(keys, positions, 1e4, rotary_dim=wrong)


@given(start=st.integers(0, 2000), shift=st.integers(-500, 500), theta=st.floats(100, 1e6))
def test_rerotated_products_depend_on_distance_alone(start, shift, theta):
    draw = torch.Generator().manual_seed(start)
    queries, keys = torch.randn(2, 1, 2, 4, 6, generator=draw, dtype=torch.float64)
    positions = 1000 + start + torch.arange(4)[None]

    def products(at: Tensor) -> Tensor:
        return rerotate(queries, at, theta) @ rerotate(keys, at, theta).mT

    torch.testing.assert_close(products(positions), products(positions + shift), atol=5e-3, rtol=0)
