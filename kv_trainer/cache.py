"""Keys and values of a teacher that is given only as a cache: `past_key_values`, un-rotated."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .alignment.rope import Rotation, inverse, rotates, rotation_of
from .families import LATENT, NORM_AFTER_ROPE, AttentionLayer, attention_layers
from .types import KVStates


def states_from_cache(
    model: PreTrainedModel, cache: Cache, mask: Tensor, position_ids: Tensor | None = None
) -> KVStates:
    """KVStates of a filled cache: keys un-rotated layer by layer, with the model's own rotary module and function.

    model: gives these and the config; its attention weights are not used.
    cache: every layer with keys and values [B, H, S, D], keys after RoPE, filled by one forward pass (dynamic and
    longrope scaling depend on its length). mask: [B, S] attention mask of the cached tokens.
    position_ids: [B, S], as the model saw them; default 0 .. S-1.
    ValueError for a cache that a sliding window truncated, and for families whose cache does not hold K and V.
    """
    layers = attention_layers(model)
    for layer in layers:
        check_readable(layer)
    each: list[Any] = cache.layers
    held = {i: entry for i, entry in enumerate(each) if getattr(entry, "keys", None) is not None}
    if any(layer.index not in held for layer in layers):
        raise ValueError("The cache is empty in some layers; fill it with a forward pass with use_cache=True.")
    short = [layer.index for layer in layers if held[layer.index].keys.shape[2] != mask.shape[1]]
    if short:
        raise ValueError(
            f"Layers {short} of the cache hold {held[short[0]].keys.shape[2]} positions, the mask {mask.shape[1]}: a "
            "sliding window dropped the others. Fill a DynamicCache() that was made without a config."
        )
    if position_ids is None:
        position_ids = mask.new_ones(mask.shape).long().cumsum(1) - 1
    rotary = rotary_module(model)
    keys = tuple(unrotated(layer, rotary, once(layer, held[layer.index].keys), position_ids) for layer in layers)
    values = tuple(once(layer, held[layer.index].values) for layer in layers)
    numbers = tuple(layer.index for layer in layers)
    return KVStates(keys, values, mask.bool(), numbers, layers[0].config.num_hidden_layers)


def check_readable(layer: AttentionLayer) -> None:
    """ValueError, by name, for a family whose cached keys are not rotated keys, or whose rotation is not known."""
    why, config = None, layer.config
    if layer.kind in LATENT:
        why = "caches a latent instead of keys and values"
    elif NORM_AFTER_ROPE.get(layer.kind) is False:
        why = "normalises keys after RoPE"
    elif layer.kind == "MiMoV2FlashAttention":
        why = "scales values before it caches them"
    elif has_rope(layer):
        try:
            rotation_of(layer.module)
        except ValueError as error:
            why = f"has a rotation that is not known: {error}"
    if why:
        raise ValueError(
            f"A cache of model_type '{config.model_type}' cannot be read: the model {why}. Try capture_kv instead."
        )


def has_rope(layer: AttentionLayer) -> bool:
    """Whether this layer rotates its keys."""
    config = layer.config
    rope = getattr(config, "rope_parameters", None) or {}
    if not (rope or getattr(config, "rotary_dim", None)) or getattr(config, "alibi", False):
        return False
    if any(isinstance(value, dict) for value in rope.values()):  # one entry for each kind of layer that rotates
        return config.layer_types[layer.index] in rope and rotates(layer.module)
    return rotates(layer.module)


def once(layer: AttentionLayer, x: Tensor) -> Tensor:
    """[B, H, S, D] of the KV heads; Falcon's large models cache each of them once for every query head."""
    return x[:, :: x.shape[1] // layer.kv_heads]


def rotary_module(model: nn.Module) -> nn.Module | None:
    """The model's rotary embedding, None for absolute positions."""
    return next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)


def unrotated(layer: AttentionLayer, rotary: nn.Module | None, keys: Tensor, position_ids: Tensor) -> Tensor:
    """One layer's keys before RoPE: [B, H, S, D]."""
    if rotary is None or not has_rope(layer):
        return keys
    rotation: Rotation = rotation_of(layer.module)
    options: dict[str, Any] = {}
    if "layer_type" in inspect.signature(type(rotary).forward).parameters:  # another base in some layers: Gemma-3
        options["layer_type"] = layer.config.layer_types[layer.index]
    return rotation(keys, inverse(rotary(keys, position_ids, **options)))
