"""Keys and values of a teacher that is given only as a cache: `past_key_values`, un-rotated."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .alignment.rope import unrotate
from .types import KVStates

INTERLEAVED = frozenset({"glm", "glm4", "cohere", "cohere2", "chatglm", "gptj", "codegen"})
LATENT = frozenset({"deepseek_v2", "deepseek_v3", "longcat_flash", "kimi_k2"})


def states_from_cache(model: PreTrainedModel, cache: Cache, mask: Tensor, position_ids: Tensor | None = None) -> KVStates:
    """KVStates of a filled cache: keys un-rotated with the model's own rotary module.

    model: gives the rotary module and the config; its attention weights are not used.
    cache: every layer [B, H, S, D], keys after RoPE. mask: [B, S] attention mask of the cached tokens.
    position_ids: [B, S], as the model saw them; default 0 .. S-1.
    ValueError for a cache that a sliding window truncated, and for families whose cache does not hold K and V.
    """
    family = model.config.get_text_config().model_type
    if family in INTERLEAVED | LATENT:
        raise ValueError(f"A cache of model_type '{family}' cannot be read: its keys are not half-rotated K. Use capture_kv.")
    layers = cache.layers
    if any(layer.keys is None for layer in layers):
        raise ValueError("The cache is empty in some layers; fill it with a forward pass with use_cache=True.")
    short = [i for i, layer in enumerate(layers) if layer.keys.shape[2] != mask.shape[1]]
    if short:
        raise ValueError(
            f"Layers {short} of the cache hold {layers[short[0]].keys.shape[2]} positions, the mask {mask.shape[1]}: a "
            "sliding window dropped the others. Fill a DynamicCache() that was made without a config."
        )
    keys = tuple(layer.keys for layer in layers)
    rotary = rotary_module(model)
    if rotary is not None:
        if position_ids is None:
            position_ids = mask.new_ones(mask.shape).long().cumsum(1) - 1
        cos, sin = rotary(keys[0], position_ids)
        keys = tuple(unrotate(k, cos, sin) for k in keys)
    count = len(layers)
    return KVStates(keys, tuple(layer.values for layer in layers), mask.bool(), tuple(range(count)), count)


def rotary_module(model: nn.Module) -> nn.Module | None:
    """The model's rotary embedding, None for absolute positions. ValueError where layers differ in their base."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()) or getattr(config, "no_rope_layers", None):
        raise ValueError(f"model_type '{config.model_type}' has RoPE that differs by layer; use capture_kv instead of a cache.")
    return next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)
