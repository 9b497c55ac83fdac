"""Keys and values read from a filled cache equal those captured while the model ran."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES
from torch import Tensor
from transformers import DynamicCache

from kv_trainer.cache import rotary_module, states_from_cache
from kv_trainer.capture import capture_kv

LENGTH = 10
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
READABLE = {
    "llama": ("llama", {}),
    "llama3 scaling": ("llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2 dynamic": ("qwen2", {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "gemma2": ("gemma2", {}),
    "phi3": ("phi3", {}),
    "phi3 half": ("phi3", {"rope_parameters": HALF}),
    "gpt_neox quarter": ("gpt_neox", {}),
    "gpt2": ("gpt2", {}),
    "olmo2": ("olmo2", {}),
    "stablelm": ("stablelm", {}),
}


def make_batch(padded: str) -> dict[str, Tensor]:
    """Two rows; padded: "left" with positions that start at the text, "right", or "none" without any positions."""
    ids = torch.randint(3, 320, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded == "none":
        return {"input_ids": ids, "attention_mask": mask}
    mask[1, slice(0, 4) if padded == "left" else slice(6, None)] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


@pytest.mark.parametrize("padded", ["none", "left", "right"])
@pytest.mark.parametrize("name", READABLE)
def test_cache_equals_capture(tiny_model, name, padded):
    family, config = READABLE[name]
    model, batch, cache = tiny_model(family, **config), make_batch(padded), DynamicCache()
    with torch.no_grad(), capture_kv(model) as capture:
        model(**batch, past_key_values=cache, use_cache=True)
        expected = capture.stop(batch["attention_mask"])
    states = states_from_cache(model, cache, batch["attention_mask"], batch.get("position_ids"))
    assert torch.equal(states.mask, expected.mask) and states.layers == expected.layers and states.num_layers == 3
    for ours, theirs in zip((*states.keys, *states.values), (*expected.keys, *expected.values), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    if family != "gpt2":
        assert (cache.layers[2].keys - expected.keys[2]).abs().max() > 0.1, "RoPE had been applied"


def test_attention_scaling_is_taken_off(tiny_model):
    model = tiny_model("llama", rope_parameters=YARN)
    assert rotary_module(model).attention_scaling > 1.1


def test_default_positions_are_wrong_for_left_padding(tiny_model):
    """The test above can fail: without its position_ids a left-padded row is turned back by the wrong angle."""
    model, batch, cache = tiny_model("llama"), make_batch("left"), DynamicCache()
    with capture_kv(model) as capture:
        model(**batch, past_key_values=cache, use_cache=True)
        expected = capture.stop(batch["attention_mask"])
    states = states_from_cache(model, cache, batch["attention_mask"])
    error = (states.keys[0] - expected.keys[0]).abs().amax((1, 2, 3))
    assert error[0] < 1e-5 and error[1] > 0.1


def test_truncated_sliding_cache_is_refused(tiny_model):
    model, batch = tiny_model("mistral"), make_batch("none")
    cache = model(**batch, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"Layers \[0, 1, 2\] of the cache hold 3 positions, the mask 10"):
        states_from_cache(model, cache, batch["attention_mask"])


def test_empty_cache_is_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="use_cache=True"):
        states_from_cache(model, DynamicCache(config=model.config), torch.ones(1, 4))


SMALL = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0,
         "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
REFUSED = {
    "cohere": ({}, "half against half"),
    "glm": ({**SMALL, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}, "half against half"),
    "helium": ({**SMALL, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}, "half against half"),
    "gpt_oss": ({**SMALL, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32, "num_local_experts": 2,
                 "num_experts_per_tok": 1}, "half against half"),
    "gptj": ({"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "half against half"),
    "nanochat": (FAMILIES["llama"], "half against half"),
    "gemma3_text": ({}, "differs by layer"),
    "deepseek_v3": ({
        **SMALL, "num_key_value_heads": 4, "intermediate_size": 32, "moe_intermediate_size": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    }, "latent"),
    "exaone4": ({**SMALL, "num_key_value_heads": 2, "intermediate_size": 32, "sliding_window": 4}, "some layers only"),
    "hunyuan_v1_dense": ({**SMALL, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}, "after RoPE"),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_a_cache_that_does_not_hold_plain_keys_is_refused_by_name(tiny_model, family):
    config, why = REFUSED[family]
    model, cache = tiny_model(family, **config), DynamicCache()
    ids = torch.arange(3, 9)[None]
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=f"model_type '{family}' cannot be read.*{why}"):
        states_from_cache(model, cache, torch.ones_like(ids))


def test_alibi_cache_is_read_as_it_is(tiny_model):
    """Bloom's fused projection cannot be captured, but its keys carry no position at all."""
    model = tiny_model("bloom", vocab_size=32, hidden_size=32, n_layer=2, n_head=4)
    ids, cache = torch.arange(3, 9)[None], DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    states = states_from_cache(model, cache, torch.ones_like(ids))
    first, body = model.transformer.h[0], model.transformer
    hidden = first.input_layernorm(body.word_embeddings_layernorm(body.word_embeddings(ids)))
    fused = first.self_attention.query_key_value(hidden)
    expected = fused.view(1, 6, 4, 3, 8)[..., 1, :].transpose(1, 2)
    torch.testing.assert_close(states.keys[0], expected, atol=1e-5, rtol=0)
