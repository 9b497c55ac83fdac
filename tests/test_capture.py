"""Captured keys and values against a reference that never looks at a projection: the model's own cache, un-rotated."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers_models import FAMILIES
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from kv_trainer.alignment.heads import TeacherProjectors
from kv_trainer.capture import KVCapture, StopForward, attention_layers, capture_kv, kv_shape, require_gradient
from kv_trainer.data import Reader
from kv_trainer.losses.base import stacked
from kv_trainer.teachers import Teacher, TeacherNeeds
from kv_trainer.types import KVStates

LENGTH, PADDED = 9, 3
ROWS = [
    *((family, {}) for family in FAMILIES),
    ("gemma3_text", {"num_key_value_heads": 1}),
    ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}),
    ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False}),
]
NAMES = [family + "-".join(["", *(f"{k}={v}" for k, v in config.items())]) for family, config in ROWS]
# The cache of these holds a latent, or keys normalised after RoPE; of MiniMax, it is of a kind of its own.
CACHELESS = ("deepseek_v2", "deepseek_v3", "hunyuan_v1_dense", "minimax")
COMPARED = [(row, name) for row, name in zip(ROWS, NAMES, strict=True) if row[0] not in CACHELESS]
PAIRED = {"cohere": "twice", "cohere2": "twice", "glm": "halves", "glm4": "halves", "ernie4_5": "halves"}
NOPE = {"cohere2": (1,), "exaone4": (1,), "smollm3": (1,), "jamba": (1, 3)}  # layers without RoPE
NO_QUERIES = {"bloom": "ALiBi", "hunyuan_v1_dense": "after RoPE"}
ATTENDING = [(row, name) for row, name in zip(ROWS, NAMES, strict=True) if row[0] not in NO_QUERIES]


def make_batch(side: str = "right", vocabulary: int = 320) -> dict[str, Tensor]:
    """Two rows of LENGTH tokens, the second with PADDED padding positions."""
    ids = torch.randint(3, vocabulary, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, slice(0, PADDED) if side == "left" else slice(LENGTH - PADDED, None)] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": positions}


def turn_back(keys: Tensor, cos: Tensor, sin: Tensor, paired: str | None = None) -> Tensor:
    """Rotate every pair of channels back, written out by component; the channels past the rotary ones stay.

    paired: neighbouring channels make a pair, and the table has each of its entries "twice", or in both "halves".
    """
    width = cos.shape[-1]
    one, two = (slice(0, width, 2), slice(1, width, 2)) if paired else (slice(width // 2), slice(width // 2, width))
    entries = one if paired == "twice" else slice(width // 2)
    c, s = cos[:, None, :, entries], sin[:, None, :, entries]
    x, y = keys[..., one], keys[..., two]
    plain = keys.clone()
    plain[..., one] = (x * c + y * s) / (c * c + s * s)
    plain[..., two] = (y * c - x * s) / (c * c + s * s)
    return plain


def reference(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys (before RoPE) and values by layer, from a cache that no sliding window cuts short."""
    family, layers = model.config.model_type, kv_layers(model)
    hybrid = len(layers) < model.config.num_hidden_layers or family == "falcon_h1"
    cache = DynamicCache(config=model.config) if hybrid else DynamicCache()
    model(**batch, past_key_values=cache, use_cache=True)
    keys, values = [cache.layers[i].keys for i in layers], [cache.layers[i].values for i in layers]
    if getattr(model.config, "new_decoder_architecture", False):  # Falcon caches every key once for each of its queries
        keys, values = [key[:, ::2] for key in keys], [value[:, ::2] for value in values]
    rotary = next((m for n, m in model.named_modules() if n.endswith("rotary_emb")), None)
    for place, (i, key) in enumerate(zip(layers, keys, strict=True)):
        if rotary is not None and i not in NOPE.get(family, ()):
            kind = (model.config.layer_types[i],) if family == "gemma3_text" else ()
            cos, sin = rotary(key, batch["position_ids"], *kind)
            if family == "gpt_oss":  # one entry a pair
                cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
            keys[place] = turn_back(key, cos, sin, PAIRED.get(family))
    return keys, values


def kv_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """The layers with keys and values: in the hybrids of FAMILIES every second one."""
    return (0, 1, 2) if model.config.num_hidden_layers == 3 else (1, 3)


def inputs_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without what the model does not take."""
    return batch if model.config.model_type != "bloom" else {k: v for k, v in batch.items() if k != "position_ids"}


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
@pytest.mark.parametrize(("family", "config"), [row for row, _ in COMPARED], ids=[name for _, name in COMPARED])
def test_states_and_gradients_equal_those_of_the_cache(tiny_model, family, config, checkpointing, side):
    model = tiny_model(family, **config)
    batch = inputs_of(model, make_batch(side))
    mask = batch["attention_mask"]
    keys, values = reference(model, batch)
    expected = gradients(model, keys, values, mask)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    states = captured(model, batch)
    assert states.layers == kv_layers(model) and states.num_layers == model.config.num_hidden_layers
    assert torch.equal(states.mask, mask.bool())
    real = mask.bool()
    for ours, theirs in zip((*states.keys, *states.values), (*keys, *values), strict=True):
        assert ours.shape == theirs.shape
        assert theirs.abs().max() > 0.1, "the reference says something"
        torch.testing.assert_close(ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real], atol=1e-5, rtol=0)
    require_gradient(states)
    found = gradients(model, states.keys, states.values, mask)
    assert found.keys() == expected.keys() and any("layers." in n or "h.0" in n for n in found)
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
        assert hooks_of(model) == plain + 12
        raise RuntimeError("mine")
    assert hooks_of(model) == plain


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_attention_backend_does_not_matter(tiny_model, attn):
    batch = make_batch("left")
    keys, _ = reference(tiny_model("llama"), batch)
    states = captured(tiny_model("llama", attn=attn), batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(states.keys[2].transpose(1, 2)[real], keys[2].transpose(1, 2)[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "config"), [row for row, _ in ATTENDING], ids=[name for _, name in ATTENDING])
def test_queries_have_the_shape_of_the_query_heads(tiny_model, family, config):
    model = tiny_model(family, **config)
    states = captured(model, make_batch(), queries=True)
    assert len(states.queries) == len(states.attention) == len(kv_layers(model))
    assert {q.shape for q in states.queries} == {(2, 4, LENGTH, states.keys[0].shape[-1])}
    plain = captured(model, make_batch())
    assert plain.queries is None and plain.attention is None


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_queries_equal_the_projection_of_the_hidden_states(tiny_model, family):
    model, batch = tiny_model(family), make_batch()
    hidden = model(**batch, output_hidden_states=True).hidden_states
    states = captured(model, batch, queries=True)
    for i, layer in enumerate(model.model.layers):
        plain = layer.self_attn.q_proj(layer.input_layernorm(hidden[i])).view(2, LENGTH, 4, -1)
        plain = layer.self_attn.q_norm(plain) if family == "qwen3" else plain
        torch.testing.assert_close(states.queries[i], plain.transpose(1, 2), atol=1e-5, rtol=0)


def attention_of(states: KVStates, place: int) -> Tensor:
    """Attention probabilities rebuilt from what was captured: [B, Hq, S, S]."""
    form, queries, keys = states.attention[place], states.queries[place], states.keys[place]
    if form.rotate is not None:
        queries, keys = form.rotate(queries), form.rotate(keys)
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    logits = queries @ keys.mT * form.scaling
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    at = torch.arange(keys.shape[2])
    seen = at <= at[:, None]
    if form.window is not None:
        seen = seen & (at > at[:, None] - form.window)
    logits = logits.masked_fill(~(seen & states.mask[:, None, None]), -1e30)
    if form.sinks is None:
        return logits.softmax(-1)
    sinks = form.sinks[None, :, None, None].expand(*logits.shape[:3], 1)
    return torch.cat((logits, sinks), dim=-1).softmax(-1)[..., :-1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "config"), [row for row, _ in ATTENDING], ids=[name for _, name in ATTENDING])
def test_attention_rebuilt_from_what_was_captured_is_the_models_own(tiny_model, family, config, side):
    model, batch = tiny_model(family, **config), make_batch(side)
    if family == "gpt_oss":
        for layer in model.model.layers:
            nn.init.normal_(layer.self_attn.sinks)
    with torch.no_grad(), capture_kv(model, queries=True) as capture:
        output = model(**batch, use_cache=False, output_attentions=True)
        states = capture.stop(batch["attention_mask"])
    theirs = [a for a in output.attentions if a is not None]
    if len(theirs) == model.config.num_hidden_layers:
        theirs = [theirs[i] for i in states.layers]
    real = batch["attention_mask"].bool()
    for place, expected in enumerate(theirs):
        ours = attention_of(states, place)
        torch.testing.assert_close(ours.transpose(1, 2)[real], expected.transpose(1, 2)[real], atol=1e-5, rtol=0)
        assert expected.std() > 0.05, "attention is no plain mean"


def test_forms_say_what_is_special(tiny_model):
    def forms(family: str) -> list:
        states = captured(tiny_model(family), make_batch(), queries=True)
        return list(states.attention)

    assert [form.rotate is None for form in forms("smollm3")] == [False, True, False]
    assert all(form.rotate is None for form in (*forms("gpt2"), *forms("opt"), *forms("jamba")))
    assert [form.window for form in forms("cohere2")] == [4, None, 4]
    assert {form.window for form in forms("mistral")} == {4} and {form.window for form in forms("llama")} == {None}
    assert {form.softcap for form in forms("gemma2")} == {50.0} and forms("gemma")[0].softcap is None
    assert forms("gpt_oss")[0].sinks.shape == (4,)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latent_values_are_what_attention_sums(tiny_model, family):
    model, batch, given = tiny_model(family), make_batch(), {}
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, i=i: given.update({i: args[0]}))
    with capture_kv(model) as capture:
        attentions = model(**batch, use_cache=False, output_attentions=True).attentions
        states = capture.stop(batch["attention_mask"])
    for i, values in enumerate(states.values):
        torch.testing.assert_close((attentions[i] @ values).transpose(1, 2).flatten(2), given[i], atol=1e-5, rtol=0)
    require_gradient(states)


@pytest.mark.parametrize(("family", "config"), ROWS, ids=NAMES)
def test_hidden_states_are_those_of_the_model(tiny_model, family, config):
    model = tiny_model(family, **config)
    batch = inputs_of(model, make_batch())
    expected = model(**batch, use_cache=False, output_hidden_states=True).hidden_states
    states = captured(model, batch, hidden=True)
    assert len(states.hidden) == 1 + len(states.layers) and states.queries is None
    pairs = list(zip(states.hidden, [expected[0], *(expected[i + 1] for i in states.layers)], strict=True))
    assert all(ours.shape == (2, LENGTH, 32) for ours, _ in pairs)
    for ours, theirs in pairs[:-1]:  # transformers norms the last
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert captured(model, batch).hidden is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_hidden_states_carry_the_gradient_under_checkpointing(tiny_model, family):
    model, batch = tiny_model(family).train(), make_batch()
    plain = captured(model, batch, hidden=True)
    expected = gradients(model, plain.hidden, (), batch["attention_mask"][:, 0:1])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    capture = KVCapture(model, hidden=True)
    capture.start()
    model(**batch)
    states = capture.stop(batch["attention_mask"])
    found = gradients(model, states.hidden, (), batch["attention_mask"][:, 0:1])
    assert capture._recorded is None and found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5, msg=name)
    assert any("embed" in name or "wte" in name for name in found)


def test_only_what_is_asked_for_is_hooked(tiny_model):
    model = tiny_model("llama")
    for options, expected in (({}, 6), ({"queries": True}, 12), ({"hidden": True}, 10), ({"layers": [1]}, 2)):
        capture = KVCapture(model, **options)
        assert hooks_of(model) == expected, options
        capture.close()
        assert hooks_of(model) == 0


def test_map_keeps_queries_and_hidden(tiny_model):
    states = captured(tiny_model("llama"), make_batch(), queries=True, hidden=True)
    mapped = states.map(lambda x: 2 * x)
    assert torch.equal(mapped.keys[1], 2 * states.keys[1])
    assert mapped.queries is states.queries and mapped.hidden is states.hidden and mapped.attention is states.attention


def test_layers_of_a_hybrid_go_by_their_number_in_the_model(tiny_model):
    model, batch = tiny_model("lfm2"), make_batch()
    assert captured(model, batch, layers=[3]).layers == (3,)
    with pytest.raises(ValueError, match=r"layers is \[0, 1\], .* keys and values in layers \[1, 3\] only"):
        KVCapture(model, [0, 1])


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
    expected = turn_back(cache.layers[1].keys, cos, -sin)
    raw = captured(model, batch).keys[1]
    torch.testing.assert_close(attention_layers(model)[1].module.k_norm(raw), expected, atol=1e-5, rtol=0)


SMALL = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
UNCAPTURED = {
    "mamba": {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    "persimmon": SMALL,
    "gpt_bigcode": {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 32, "d_model": 32, "n_layers": 2, "n_heads": 4},
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


def test_layers_that_change_keys_in_an_unknown_way_are_refused_by_name(tiny_model):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.k_sconv = nn.Identity()
    with pytest.raises(ValueError, match=r"\(model_type 'llama'\) cannot be captured: .* by k_sconv, which"):
        KVCapture(model)


@pytest.mark.parametrize("family", [*NO_QUERIES, "doge", "gptj", "ministral3"])
def test_a_family_whose_logits_are_not_known_gives_no_queries(tiny_model, family):
    more = {
        "gptj": {"vocab_size": 320, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
        "doge": FAMILIES["llama"],
        "ministral3": {**FAMILIES["llama"], "head_dim": 8},
    }  # fmt: skip
    gptj = "(how it scales|its rotation)"  # the first until transformers 5.23
    why = {**NO_QUERIES, "doge": "dt_proj", "gptj": gptj, "ministral3": "by their position"}[family]
    model = tiny_model(family, **more.get(family, {}))
    with pytest.raises(ValueError, match=rf"model_type '{family}'\) gives keys and values, but no queries: .*{why}"):
        KVCapture(model, queries=True)
    assert hooks_of(model) == 0
    assert len(captured(model, inputs_of(model, make_batch())).keys) == 3


def test_reentrant_checkpointing_is_refused(tiny_model):
    model, batch = tiny_model("llama").train(), make_batch()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    states = captured(model, batch)
    with pytest.raises(ValueError, match="use_reentrant: false"):
        require_gradient(states)
    with torch.no_grad():
        require_gradient(states)


@pytest.mark.parametrize(("family", "config"), ROWS, ids=NAMES)
def test_kv_shape_is_that_of_the_captured_tensors(tiny_model, caplog, family, config):
    model = tiny_model(family, **config)
    shape = kv_shape(model)
    logged = [record.getMessage() for record in caplog.records if record.name == "kv_trainer.capture"]
    states = captured(model, inputs_of(model, make_batch()))
    hybrid = model.config.num_hidden_layers == 4
    assert (shape.family, shape.num_layers, shape.vocab_size) == (family, 2 if hybrid else 3, 320)
    assert shape.kv_layers == ((1, 3) if hybrid else ()) and shape.layer_numbers == kv_layers(model)
    assert len(logged) == hybrid and all("layers [0, 2] have no keys and values" in line for line in logged)
    assert {k.shape for k in states.keys} == {(2, shape.num_kv_heads, LENGTH, shape.head_dim)}
    width = shape.value_dim or shape.head_dim
    assert {v.shape for v in states.values} == {(2, shape.num_kv_heads, LENGTH, width)}
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())


def test_kv_shape_knows_the_base(tiny_model):
    assert [kv_shape(tiny_model(family)).rope_theta for family in ("llama", "gpt2")] == [10000.0, None]
    assert kv_shape(tiny_model("gemma3_text")).rope_theta


def test_layers_with_unlike_heads_are_refused_by_name(tiny_model):
    wide = {**FAMILIES["qwen3_moe"], "n_routed_experts": 4, "swa_num_key_value_heads": 1, "v_head_dim": 12}
    model = tiny_model("mimo_v2_flash", **{**wide, "n_group": 1, "topk_group": 1, "sliding_window": 4})
    with pytest.raises(ValueError, match=r"model_type 'mimo_v2_flash'\) has layers with unlike keys and values"):
        kv_shape(model)


def test_wider_keys_than_values_reach_projectors_and_flattening(tiny_model):
    """DeepSeek's, as teacher and as student."""
    latent, plain = tiny_model("deepseek_v3"), tiny_model("llama")
    theirs, ours = captured(latent, make_batch()), captured(plain, make_batch())
    for (student, states), (teacher, target) in (((plain, ours), (latent, theirs)), ((latent, theirs), (plain, ours))):
        projectors = TeacherProjectors(kv_shape(student), kv_shape(teacher), "student_to_teacher")
        projectors.calibrate([target])
        mapped, fixed = projectors.standardise(projectors(states)), projectors.standardise(target)
        for x, y in zip((*mapped.keys, *mapped.values), (*fixed.keys, *fixed.values), strict=True):
            assert x.shape == y.shape and x.isfinite().all()
            assert y.detach().transpose(1, 2)[target.mask].std().item() == pytest.approx(1, abs=0.05)
    flat = stacked(theirs, ("keys", "values"), [0, 2])
    assert flat.shape == (4, 2, LENGTH, 48)
    gram = flat[3] @ flat[3].mT
    values = theirs.values[2].transpose(1, 2).flatten(2)
    torch.testing.assert_close(gram, values @ values.mT)


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
    teacher.prepare((0, 1), TeacherNeeds(scores=True))
    calls.clear()  # the head is tried out once
    full = teacher.signal(batch)
    assert calls["layer 2"] == 1 and calls["lm_head"] == 1 and full.nll.shape == (2,)
    calls.clear()
    teacher.prepare((0, 1), TeacherNeeds())
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


def test_early_stop_waits_for_all_that_is_asked_for(tiny_model):
    model, batch = tiny_model("llama"), make_batch()
    whole = captured(model, batch, queries=True, hidden=True)
    ran: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    capture = KVCapture(model, [0, 1], queries=True, hidden=True)
    capture.stop_early = True
    capture.start()
    with pytest.raises(StopForward):
        model(**batch)
    states = capture.stop(batch["attention_mask"])
    assert ran == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(states.hidden, whole.hidden[:3], strict=True))
    assert torch.equal(states.queries[1], whole.queries[1])
