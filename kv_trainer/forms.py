"""How each attention layer makes logits of its queries and keys; families where that is not known, by name."""

from __future__ import annotations

import inspect
from typing import Any

from .alignment.rope import Turn, rotates, rotation_of
from .families import NORM_AFTER_ROPE, SEPARATE, AttentionLayer
from .types import AttentionForm

SCALING_NAMES = ("scaling", "inv_norm_factor")
# What an attention module may hold besides its sources without a change to the logits of queries and keys.
HARMLESS = frozenset({
    "o_proj", "out_proj", "dense", "c_proj", "gate_proj", "gate_bias", "g_proj", "attn_sub_norm", "rotary_emb", "sinks",
    "attention_dropout", "attn_dropout", "resid_dropout", "dropout", "groupnorm", "lambda_q1", "lambda_q2", "lambda_k1",
    "lambda_k2", "q_a_proj", "q_a_layernorm", "kv_a_layernorm",
})  # fmt: skip


def check_form(layer: AttentionLayer) -> None:
    """ValueError, by name, where the logits cannot be made of captured queries and keys."""
    why = unknown_form(layer)
    if why:
        raise ValueError(
            f"{layer.kind} (model_type '{layer.config.model_type}') gives keys and values, but no queries: {why}. "
            "Leave out what needs attention (importance weighting, attention losses), or take another model."
        )


def unknown_form(layer: AttentionLayer) -> str | None:
    """What stands between captured queries and keys and the logits, None if nothing does."""
    module, config = layer.module, layer.config
    takes = inspect.signature(type(module).forward).parameters
    rope = getattr(config, "rope_parameters", None) or {}
    if ("alibi" in takes and getattr(config, "alibi", True)) or "position_bias" in takes:
        return "it adds a bias to the logits of each distance (ALiBi)"
    if NORM_AFTER_ROPE.get(layer.kind) is False:
        return "it normalises queries and keys after RoPE"
    if "attention_scaling" in takes or rope.get("llama_4_scaling_beta"):
        return "it scales queries by their position"
    known = HARMLESS.union(*SEPARATE.values())
    sources = [id(source) for source in layer.sources().values()]
    held = [*module.named_children(), *module.named_parameters(recurse=False)]
    other = [name for name, part in held if name not in known and id(part) not in sources]
    if other:
        return f"it has parts that are not known here: {', '.join(other)}"
    if not any(hasattr(module, name) for name in SCALING_NAMES):
        return "it does not say how it scales logits"
    if "position_embeddings" not in takes:
        own = rope or getattr(config, "rotary_dim", None)
        return "it does not receive its position_embeddings" if own else None
    try:
        rotation_of(module)
    except ValueError as error:
        return f"its rotation is not known: {error}"
    return None


def attention_form(layer: AttentionLayer, received: dict[str, Any]) -> AttentionForm:
    """How a layer makes logits in one forward pass; received: what its module was called with, by name."""
    module, rotate = layer.module, None
    embeddings = received.get("position_embeddings")
    if embeddings is not None and rotates(module):
        rotate = Turn(rotation_of(module), embeddings)
    return AttentionForm(
        scaling=float(next(getattr(module, name) for name in SCALING_NAMES if hasattr(module, name))),
        rotate=rotate,
        window=window_of(layer),
        softcap=getattr(module, "attn_logit_softcapping", None),
        sinks=getattr(module, "sinks", None),
    )


def window_of(layer: AttentionLayer) -> int | None:
    """How many of the newest positions a query sees, None for all."""
    types = getattr(layer.config, "layer_types", None) or ()
    own = hasattr(layer.module, "sliding_window")
    if (own and types or "sliding_attention" in types) and types[layer.index] != "sliding_attention":
        return None
    return getattr(layer.module if own else layer.config, "sliding_window", None) or None  # Qwen2-MoE says 0 for none
