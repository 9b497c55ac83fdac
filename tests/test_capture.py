"""Captured keys and values against a reference that never looks at a projection: the model's own cache, un-rotated."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kv_trainer.capture import KVCapture, StopForward, attention_layers, capture_kv, kv_shape, require_gradient
from kv_trainer.data import Reader
from kv_trainer.teachers import Teacher
from kv_trainer.types import KVStates

LENGTH, PADDED = 9, 3
ROWS = [*((family, {}) for family in FAMILIES), ("gemma3_text", {"num_key_value_heads": 1})]
NAMES = [family + "-".join(["", *(f"{k}={v}" for k, v in config.items())]) for family, config in ROWS]
PAIRED = ("cohere",)  # rotates neighbouring channels


def make_batch(side: str = "right", vocabulary: int = 320) -> dict[str, Tensor]:
    """Two rows of LENGTH tokens, the second with PADDED padding positions."""
    ids = torch.randint(3, vocabulary, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, slice(0, PADDED) if side == "left" else slice(LENGTH - PADDED, None)] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": positions}


def turn_back(keys: Tensor, cos: Tensor, sin: Tensor, paired: bool) -> Tensor:
    """Rotate every pair of channels back, written out by component; the channels past the rotary ones stay."""
    width = cos.shape[-1]
    one, two = (slice(0, width, 2), slice(1, width, 2)) if paired else (slice(width // 2), slice(width // 2, width))
    c, s = cos[:, None, :, one], sin[:, None, :, one]
    x, y = keys[..., one], keys[..., two]
    plain = keys.clone()
    plain[..., one] = (x * c + y * s) / (c * c + s * s)
    plain[..., two] = (y * c - x * s) / (c * c + s * s)
    return plain


def reference(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys (before RoPE) and values by layer, from a cache that no sliding window cuts short."""
    cache = DynamicCache()
    model(**batch, past_key_values=cache, use_cache=True)
    keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
    rotary = next((m for n, m in model.named_modules() if n.endswith("rotary_emb")), None)
    if rotary is not None:
        family = model.config.model_type
        for i, key in enumerate(keys):
            kind = (model.config.layer_types[i],) if family == "gemma3_text" else ()
            keys[i] = turn_back(key, *rotary(key, batch["position_ids"], *kind), family in PAIRED)
    return keys, values


def captured(model: PreTrainedModel, batch: dict[str, Tensor], **options: Any) -> KVStates:
    with capture_kv(model, **options) as capture:
        model(**batch, use_cache=False)
        return capture.stop(batch["attention_mask"])


def gradients(model: nn.Module, keys: Any, values: Any, mask: Tensor) -> dict[str, Tensor]:
    """Of a loss in which every real element of every key and value has a weight of its own."""
    draw = torch.Generator().manual_seed(9)
    real = mask[:, None, :, None]
    total = sum((x * torch.randn(x.shape, generator=draw) * real).sum() for x in (*keys, *values))
    model.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(("family", "config"), ROWS, ids=NAMES)
def test_states_and_gradients_equal_those_of_the_cache(tiny_model, family, config, checkpointing, side):
    model, batch = tiny_model(family, **config), make_batch(side)
    mask = batch["attention_mask"]
    keys, values = reference(model, batch)
    expected = gradients(model, keys, values, mask)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    states = captured(model, batch)
    assert states.layers == (0, 1, 2) and states.num_layers == 3 and torch.equal(states.mask, mask.bool())
    real = mask.bool()
    for ours, theirs in zip((*states.keys, *states.values), (*keys, *values), strict=True):
        assert ours.shape == theirs.shape
        assert theirs.abs().max() > 0.1, "the reference says something"
        torch.testing.assert_close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], atol=1e-5, rtol=0)
    require_gradient(states)
    found = gradients(model, states.keys, states.values, mask)
    assert found.keys() == expected.keys() and any("layers.0" in n or "h.0" in n for n in found)
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp_min(1)
        torch.testing.assert_close(found[name] / scale, gradient / scale, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3_moe"])
def test_checkpointing_changes_no_gradient(tiny_model, family):
    model, batch = tiny_model(family).train(), make_batch()
    plain = captured(model, batch)
    expected = gradients(model, plain.keys, plain.values, batch["attention_mask"])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = Counter()
    layer = attention_layers(model)[0].module
    handle = layer.register_forward_hook(lambda *_: calls.update(["first"]))
    states = captured(model, batch)
    assert calls["first"] == 1
    found = gradients(model, states.keys, states.values, batch["attention_mask"])
    handle.remove()
    assert calls["first"] == 2, "the layer was computed again in the backward pass"
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0, msg=name)


def test_recomputation_and_later_passes_record_nothing(tiny_model):
    model, batch = tiny_model("llama").train(), make_batch()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    capture = KVCapture(model)
    capture.start()
    loss = model(**batch).logits.sum()
    states = capture.stop(batch["attention_mask"])
    before = [k.detach().clone() for k in states.keys]
    loss.backward()
    assert capture._recorded is None
    model(**make_batch("left"))
    assert capture._recorded is None
    assert all(torch.equal(a, b) for a, b in zip(before, states.keys, strict=True))
    with pytest.raises(AssertionError, match="stop without start"):
        capture.stop(batch["attention_mask"])
    capture.start()  # the second round is its own
    model(**make_batch("left"))
    assert not torch.equal(capture.stop(batch["attention_mask"]).keys[0], before[0])
    capture.close()


def test_hooks_go_with_the_block_also_after_an_error(tiny_model):
    model, batch = tiny_model("qwen3"), make_batch()
    plain = hooks_of(model)
    with capture_kv(model) as capture:
        assert hooks_of(model) == plain + 6
        model(**batch)
        capture.stop(batch["attention_mask"])
    assert hooks_of(model) == plain
    with pytest.raises(RuntimeError, match="mine"), capture_kv(model, queries=True):
        assert hooks_of(model) == plain + 9
        raise RuntimeError("mine")
    assert hooks_of(model) == plain


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_attention_backend_does_not_matter(tiny_model, attn):
    batch = make_batch("left")
    keys, _ = reference(tiny_model("llama"), batch)
    states = captured(tiny_model("llama", attn=attn), batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(states.keys[2].transpose(1, 2)[real], keys[2].transpose(1, 2)[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "config"), ROWS, ids=NAMES)
def test_queries_have_the_shape_of_the_query_heads(tiny_model, family, config):
    model = tiny_model(family, **config)
    states = captured(model, make_batch(), queries=True)
    assert len(states.queries) == 3
    assert {q.shape for q in states.queries} == {(2, 4, LENGTH, states.keys[0].shape[-1])}
    assert captured(model, make_batch()).queries is None


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_queries_equal_the_projection_of_the_hidden_states(tiny_model, family):
    model, batch = tiny_model(family), make_batch()
    hidden = model(**batch, output_hidden_states=True).hidden_states
    states = captured(model, batch, queries=True)
    for i, layer in enumerate(model.model.layers):
        plain = layer.self_attn.q_proj(layer.input_layernorm(hidden[i])).view(2, LENGTH, 4, -1)
        plain = layer.self_attn.q_norm(plain) if family == "qwen3" else plain
        torch.testing.assert_close(states.queries[i], plain.transpose(1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 2])
def test_length_equal_to_heads_is_not_mistaken(tiny_model, heads, length):
    """Norms see [B, S, H, D] in Qwen3 and [B, H, S, D] in Gemma-3: nothing may hang on S != H."""
    for family in ("qwen3", "gemma3_text"):
        model = tiny_model(family, num_key_value_heads=heads)
        batch = {k: v[:, :length] for k, v in make_batch().items()}
        keys, _ = reference(model, batch)
        for ours, theirs in zip(captured(model, batch).keys, keys, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_chosen_layers_come_in_the_order_asked(tiny_model):
    model, batch = tiny_model("llama"), make_batch()
    every, some = captured(model, batch), captured(model, batch, layers=[2, 0])
    assert some.layers == (2, 0) and some.num_layers == 3
    assert torch.equal(some.keys[0], every.keys[2]) and torch.equal(some.values[1], every.values[0])
    for wrong in ([3], [-1]):
        with pytest.raises(ValueError, match="layers 0 to 2"):
            KVCapture(model, wrong)
    with capture_kv(model) as capture, pytest.raises(ValueError, match=r"Layers \[0, 1, 2\] did not run"):
        capture.stop(batch["attention_mask"])


def test_norm_after_rope_is_not_taken_for_a_key_before_it(tiny_model):
    """NanoChat rotates, the other way round, and then normalises without weights, so both may change places."""
    model, batch = tiny_model("nanochat", **FAMILIES["llama"]), make_batch()
    cache = DynamicCache()
    model(**batch, past_key_values=cache, use_cache=True)
    cos, sin = model.model.rotary_emb(cache.layers[1].keys, batch["position_ids"])
    expected = turn_back(cache.layers[1].keys, cos, -sin, paired=False)
    raw = captured(model, batch).keys[1]
    torch.testing.assert_close(attention_layers(model)[1].module.k_norm(raw), expected, atol=1e-5, rtol=0)


UNCAPTURED = {
    "bloom": {"vocab_size": 32, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mamba": {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "deepseek_v3": {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "bart": {  # its layers hold a cross-attention too, which must not be mistaken for the layer's own
        "vocab_size": 32, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32,
        "encoder_layers": 2, "is_decoder": True, "is_encoder_decoder": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", UNCAPTURED)
def test_a_family_that_cannot_be_captured_says_so_by_name(tiny_model, family):
    model = tiny_model(family, **UNCAPTURED[family])
    with pytest.raises(ValueError, match=rf"ForCausalLM \(model_type '{family}'\) cannot be captured") as caught:
        KVCapture(model)
    assert type(model).__name__ in str(caught.value) and "layers [0, 1]" in str(caught.value)
    assert hooks_of(model) == 0


def test_reentrant_checkpointing_is_refused(tiny_model):
    model, batch = tiny_model("llama").train(), make_batch()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    states = captured(model, batch)
    with pytest.raises(ValueError, match="use_reentrant: false"):
        require_gradient(states)
    with torch.no_grad():
        require_gradient(states)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen3"])
def test_kv_shape_is_that_of_the_captured_tensors(tiny_model, family):
    model = tiny_model(family)
    shape, states = kv_shape(model), captured(model, make_batch())
    assert (shape.family, shape.num_layers, shape.vocab_size) == (family, 3, 320)
    assert {k.shape for k in states.keys} == {(2, shape.num_kv_heads, LENGTH, shape.head_dim)}
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.rope_theta == (None if family == "gpt2" else 10000.0)
    assert kv_shape(tiny_model("gemma3_text")).rope_theta


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_is_captured_with_its_share_and_learns(tiny_model, checkpointing):
    model, batch = tiny_model("llama"), make_batch()
    plain = captured(model, batch)
    lora = LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora).train()
    if checkpointing:
        tuned.enable_input_require_grads()
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
    states = captured(tuned, batch)
    assert not torch.allclose(states.keys[0], plain.keys[0], atol=1e-2)
    require_gradient(states)
    found = gradients(tuned, states.keys, states.values, batch["attention_mask"])
    trainable = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert trainable and found.keys() == trainable
    assert all("lora_" in n and g.abs().max() > 0 for n, g in found.items())
    merged = captured(tuned.eval().merge_and_unload(), batch)
    for ours, theirs in zip((*states.keys, *states.values), (*merged.keys, *merged.values), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2"])
def test_teacher_stops_at_the_deepest_layer_it_needs(tiny_model, tiny_tokenizer, family):
    model, batch = tiny_model(family), make_batch()
    del batch["position_ids"]
    batch |= {"labels": batch["input_ids"], "index": torch.zeros(2, 4, dtype=torch.long)}
    batch |= {"supervised": (batch["labels"][:, 1:] != -100).sum(1)}
    calls: Counter[str] = Counter()
    for i, layer in enumerate(attention_layers(model)):
        layer.module.register_forward_pre_hook(lambda *_, name=f"layer {i}": calls.update([name]))
    for name, module in model.named_modules():
        if name == "lm_head" or name.endswith(("mlp", "final_layernorm", "ln_f")) or name == "model.norm":
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    teacher = Teacher(model, Reader(tiny_tokenizer()))
    teacher.prepare((0, 1), likelihood=True)
    full = teacher.signal(batch)
    assert calls["layer 2"] == 1 and calls["lm_head"] == 1 and full.nll.shape == (2,)
    calls.clear()
    teacher.prepare((0, 1), likelihood=False)
    short = teacher.signal(batch)
    ran = {name for name in calls if name.startswith("layer")}
    assert ran == {"layer 0", "layer 1"} and calls["layer 1"] == 1
    assert calls["lm_head"] == 0 and sum(n for name, n in calls.items() if "mlp" in name) == 1, calls
    assert short.nll is None and short.kv.layers == (0, 1)
    for ours, theirs in zip((*short.kv.keys, *short.kv.values), (*full.kv.keys, *full.kv.values), strict=True):
        assert torch.equal(ours, theirs) and not ours.requires_grad
    calls.clear()
    model(input_ids=batch["input_ids"])
    assert calls["lm_head"] == 1, "a pass of its own, without start, runs to the end"


def test_early_stop_waits_for_the_deepest_layer_in_any_order(tiny_model):
    model, batch = tiny_model("llama"), make_batch()
    capture = KVCapture(model, [1, 0])
    capture.stop_early = True
    capture.start()
    with pytest.raises(StopForward):
        model(**batch)
    assert capture.stop(batch["attention_mask"]).layers == (1, 0)
    capture.close()
