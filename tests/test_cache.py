"""Keys and values read from a filled cache equal those captured while the model ran."""

from __future__ import annotations

import pytest
import torch
from helpers_models import FAMILIES
from torch import Tensor
from transformers import DynamicCache

from kv_trainer.cache import states_from_cache
from kv_trainer.capture import capture_kv

LENGTH = 10
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
READABLE = {
    "llama": ("llama", {}),
    "llama3 scaling": ("llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama linear": ("llama", {"rope_parameters": LINEAR}),
    "phi3 longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 8}),
    "qwen2 dynamic": ("qwen2", {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "gemma2": ("gemma2", {}),
    "phi3": ("phi3", {}),
    "phi3 half": ("phi3", {"rope_parameters": HALF}),
    "gpt_neox quarter": ("gpt_neox", {}),
    "nanochat": ("nanochat", FAMILIES["llama"]),
    "helium": ("helium", {**FAMILIES["llama"], "head_dim": 8}),
    **{name: (name, {}) for name in (
        "gpt2", "olmo2", "stablelm", "cohere", "cohere2", "glm", "glm4", "gemma3_text", "gpt_oss", "smollm3", "exaone4",
        "phi", "falcon", "ernie4_5", "nemotron", "opt", "falcon_h1", "qwen3_next", "lfm2", "bamba", "jamba",
    )},
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
    model, batch = tiny_model(family, **config), make_batch(padded)
    hybrid = model.config.num_hidden_layers == 4 or family == "falcon_h1"
    cache = DynamicCache(config=model.config) if hybrid else DynamicCache()
    with torch.no_grad(), capture_kv(model) as capture:
        model(**batch, past_key_values=cache, use_cache=True)
        expected = capture.stop(batch["attention_mask"])
    states = states_from_cache(model, cache, batch["attention_mask"], batch.get("position_ids"))
    assert torch.equal(states.mask, expected.mask) and states.layers == expected.layers
    assert states.num_layers == expected.num_layers
    for ours, theirs in zip((*states.keys, *states.values), (*expected.keys, *expected.values), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    if family not in ("gpt2", "opt", "jamba", "falcon"):
        last = cache.layers[expected.layers[-1]].keys
        assert (last - expected.keys[-1]).abs().max() > 0.1, "RoPE had been applied"


def test_attention_scaling_is_taken_off(tiny_model):
    """The tests above take it off: it is there."""
    assert tiny_model("llama", rope_parameters=YARN).model.rotary_emb.attention_scaling > 1.1
    long = tiny_model("phi3", rope_parameters=LONG, original_max_position_embeddings=8)
    assert long.model.rotary_emb.attention_scaling > 1.1


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


REFUSED = {
    "gptj": ({"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "rotation that is not"),
    "deepseek_v3": ({}, "caches a latent"),
    "hunyuan_v1_dense": ({}, "normalises keys after RoPE"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_cache_that_does_not_hold_plain_keys_is_refused_by_name(tiny_model, family):
    config, why = REFUSED[family]
    model, cache = tiny_model(family, **config), DynamicCache()
    ids = torch.arange(3, 9)[None]
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=f"model_type '{family}' cannot be read.*{why}"):
        states_from_cache(model, cache, torch.ones_like(ids))


def test_alibi_cache_is_read_as_it_is(tiny_model):
    """Bloom's keys carry no position at all."""
    model = tiny_model("bloom", vocab_size=32, hidden_size=32, n_layer=2, n_head=4)
    ids, cache = torch.arange(3, 9)[None], DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    states = states_from_cache(model, cache, torch.ones_like(ids))
    first, body = model.transformer.h[0], model.transformer
    hidden = first.input_layernorm(body.word_embeddings_layernorm(body.word_embeddings(ids)))
    fused = first.self_attention.query_key_value(hidden)
    expected = fused.view(1, 6, 4, 3, 8)[..., 1, :].transpose(1, 2)
    torch.testing.assert_close(states.keys[0], expected, atol=1e-5, rtol=0)
