"""Where each family of models keeps its queries, keys and values.

Most families need no entry: an attention module with q_proj, k_proj, v_proj, head_dim and layer_idx says it all. The
tables name the others; what neither fits is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

Parts = dict[str, Tensor]  # "queries", "keys", "values" -> [B, H, S, D]; "shared" -> [B, 1, S, rotary]

TESTED = (
    "Llama, Qwen2, Qwen2-MoE, Qwen3, Qwen3-MoE, Qwen3-Next, Mistral, Gemma, Gemma-2, Gemma-3, Phi, Phi-3, GPT-2, "
    "GPT-NeoX, GPT-OSS, OLMo-2, OPT, Cohere, Cohere-2, StarCoder2, Granite, StableLM, Falcon, Bloom, DeepSeek-V2, "
    "DeepSeek-V3, SmolLM3, GLM, GLM-4, Exaone-4, ERNIE-4.5, Seed-OSS, Apertus, Nemotron, HunYuan, Falcon-H1, LFM2, "
    "Bamba, Jamba, MiniMax"
)


def split_heads(x: Tensor, head_dim: int, given: Tensor | None = None) -> Tensor:
    """[B, S, H * D], [B, S, H, D] or [B, H, S, D] -> [B, H, S, D].

    The two 4-D forms occur at the output of a q_norm / k_norm, and S may equal H; `given`, the norm's input, tells
    them apart: a transposed view has the larger stride on its third axis. With one head both strides are D.
    """
    if x.dim() == 3:
        return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    assert given is not None, "only a norm puts out four axes"
    one_head = given.stride(1) == given.stride(2) and given.shape[1] == 1
    return x if one_head or given.stride(1) < given.stride(2) else x.transpose(1, 2)


def in_blocks(layer: AttentionLayer, out: Tensor) -> Parts:
    """GPT-2, Phi-3: all queries, then all keys, then all values."""
    keys = layer.kv_heads * layer.head_dim
    blocks = out.split((out.shape[-1] - 2 * keys, keys, keys), dim=-1)
    return {name: split_heads(x, layer.head_dim) for name, x in zip(("queries", "keys", "values"), blocks, strict=True)}


def in_groups(layer: AttentionLayer, out: Tensor) -> Parts:
    """GPT-NeoX, Bloom, Falcon: the queries of each key/value head, then its key and its value."""
    groups = out.unflatten(-1, (layer.kv_heads, -1, layer.head_dim))  # [B, S, H, queries + 2, D]
    queries, keys, values = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
    return {"queries": queries.transpose(1, 2), "keys": keys.transpose(1, 2), "values": values.transpose(1, 2)}


FUSED: dict[str, tuple[str, Callable[[AttentionLayer, Tensor], Parts], str]] = {
    # class of the attention module -> its fused projection, how to take it apart, and where its number of KV heads is
    "Phi3Attention": ("qkv_proj", in_blocks, "num_key_value_heads"),
    "GPT2Attention": ("c_attn", in_blocks, "num_attention_heads"),
    "GPTNeoXAttention": ("query_key_value", in_groups, "num_attention_heads"),
    "BloomAttention": ("query_key_value", in_groups, "num_attention_heads"),
    "FalconAttention": ("query_key_value", in_groups, "num_kv_heads"),  # in the module: the config may differ
}
SEPARATE = {
    "queries": ("q_norm", "q_layernorm", "q_proj"),
    "keys": ("k_norm", "k_layernorm", "k_proj"),
    "values": ("v_norm", "v_proj"),
}
# Multi-head latent attention: keys are the part of each head without RoPE and, behind it, the part with it, that all
# heads share; so keys are wider than values. What is cached is their latent, not they.
LATENT = frozenset({
    "DeepseekV2Attention", "DeepseekV3Attention", "Glm4MoeLiteAttention", "MiniCPM3Attention", "YoutuAttention",
    "AXK1Attention",
})  # fmt: skip
# The norm comes after RoPE. Without weights it commutes with the rotation; otherwise only k_proj's output is a key
# before RoPE, and nothing leads from it to the logits.
NORM_AFTER_ROPE = {
    "NanoChatAttention": True, "HunYuanDenseV1Attention": False, "HunYuanMoEV1Attention": False,
    "Llama4TextAttention": False,
}  # fmt: skip
WITHOUT_KV = frozenset({"linear_attention", "mamba", "conv", "recurrent", "moe", "mlp"})  # entries of layer_types


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module, and its submodules that put out queries, keys and values."""

    index: int
    module: Any  # an nn.Module; what it has differs from family to family
    config: PreTrainedConfig
    path: str

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def head_dim(self) -> int:
        """Width of queries and keys."""
        names = ("qk_head_dim",) if self.kind in LATENT else ("head_dim", "head_size")
        return next(getattr(self.module, n) for n in names if hasattr(self.module, n))

    @property
    def value_dim(self) -> int:
        if self.kind in LATENT:
            return self.module.v_head_dim
        features = getattr(getattr(self.module, "v_proj", None), "out_features", None)
        return features // self.kv_heads if features else self.head_dim

    @property
    def kv_heads(self) -> int:
        if self.kind in LATENT:
            return self.module.num_heads
        if self.kind in FUSED:
            name = FUSED[self.kind][2]
            return getattr(self.module if hasattr(self.module, name) else self.config, name)
        features = getattr(self.module.k_proj, "out_features", None)  # some families have another number in some layers
        if features:
            return features // self.head_dim
        return getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads

    def sources(self) -> dict[str, nn.Module]:
        """part -> submodule; a norm after the projection is the later and therefore the right one."""
        has = {name: child for name, child in self.module.named_children() if child is not None}
        if self.kind in FUSED:
            return {"all": has[FUSED[self.kind][0]]}
        if self.kind in LATENT:
            queries = has["q_b_proj"] if "q_b_proj" in has else has["q_proj"]
            return {"queries": queries, "latent": has["kv_b_proj"], "shared": has["kv_a_proj_with_mqa"]}
        early = self.kind in NORM_AFTER_ROPE
        return {
            part: next(has[n] for n in (names[-1:] if early else names) if n in has) for part, names in SEPARATE.items()
        }

    def parts(self, source: str, given: Tensor, out: Tensor) -> Parts:
        """What one source's output holds; `finish` makes the whole of all of them."""
        if source == "all":
            return FUSED[self.kind][1](self, out)
        if source == "latent":
            nope = self.module.qk_nope_head_dim
            expanded = split_heads(out[:, 0] if out.dim() == 4 else out, nope + self.value_dim)  # 4: [B, 1, S, H * D]
            return {"keys": expanded[..., :nope], "values": expanded[..., nope:]}
        if source == "shared":
            return {"shared": out[:, None, :, -self.module.qk_rope_head_dim :]}
        return {source: split_heads(out, self.value_dim if source == "values" else self.head_dim, given)}

    def finish(self, parts: Parts) -> Parts:
        if self.kind in LATENT:
            shared = parts["shared"].expand(-1, self.kv_heads, -1, -1)
            parts = {**parts, "keys": torch.cat((parts["keys"], shared), dim=-1)}
        if NORM_AFTER_ROPE.get(self.kind):
            norms = {"queries": self.module.q_norm, "keys": self.module.k_norm}
            parts = {name: norms[name](x) if name in norms else x for name, x in parts.items()}
        factor = getattr(self.module, "key_multiplier", None)  # Falcon-H1 multiplies what k_proj puts out
        return parts if factor is None else {**parts, "keys": factor * parts["keys"]}


def attention_layers(model: Any) -> list[AttentionLayer]:
    """The attention modules of a decoder, by layer, without layers that have no keys and values (linear attention).

    ValueError names a family that cannot be captured.
    """
    config = model.config.get_text_config()
    every = range(config.num_hidden_layers)
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    without = {i for i, kind in enumerate(types) if kind in WITHOUT_KV}
    found: dict[int, list[AttentionLayer]] = {}
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        separate = all(isinstance(getattr(module, n, None), nn.Module) for n in ("q_proj", "k_proj", "v_proj"))
        known = type(module).__name__ in (*FUSED, *LATENT) or (separate and hasattr(module, "head_dim"))
        known = known and index not in without and not getattr(module, "is_cross_attention", False)
        if isinstance(index, int) and known:
            found.setdefault(index, []).append(AttentionLayer(index, module, config, path))
    missing = [i for i in every if i not in without and len(found.get(i, ())) != 1]
    if missing or not found:
        raise ValueError(
            f"{type(model).__name__} (model_type '{config.model_type}') cannot be captured: layers "
            f"{missing or list(every)} do not hold one set of query, key and value projections each. Tested families: "
            f"{TESTED}; any other works if each attention module has q_proj, k_proj, v_proj, head_dim and layer_idx."
        )
    layers = [found[i][0] for i in sorted(found)]
    usual = {name for names in SEPARATE.values() for name in names}
    later = {n for layer in layers for n, _ in layer.module.named_children() if n[:2] in ("k_", "v_")} - usual
    if later:
        raise ValueError(
            f"{type(model).__name__} (model_type '{config.model_type}') cannot be captured: its attention changes keys "
            f"or values by {', '.join(sorted(later))}, which is not known here. Tested families: {TESTED}."
        )
    return layers
