"""Keys and values of a teacher that is given only as a cache: `past_key_values`, un-rotated."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .alignment.rope import rotate_half, unrotate
from .types import KVStates

# model_type -> why its cached keys are not half-rotated K; most such families are seen by their code instead.
PAIRED = "does not rotate half against half"
UNREADABLE = {
    "gptj": PAIRED,
    "codegen": PAIRED,
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe"), "normalises keys after RoPE"),
    **dict.fromkeys(("exaone4", "exaone_moe", "afmoe", "granitemoehybrid"), "rotates some layers only"),
}


def states_from_cache(
    model: PreTrainedModel, cache: Cache, mask: Tensor, position_ids: Tensor | None = None
) -> KVStates:
    """KVStates of a filled cache: keys un-rotated with the model's own rotary module.

    model: gives the rotary module and the config; its attention weights are not used.
    cache: every layer [B, H, S, D], keys after RoPE. mask: [B, S] attention mask of the cached tokens.
    position_ids: [B, S], as the model saw them; default 0 .. S-1.
    ValueError for a cache that a sliding window truncated, and for families whose cache does not hold K and V.
    """
    rotary = rotary_module(model)
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
    if rotary is not None:
        if position_ids is None:
            position_ids = mask.new_ones(mask.shape).long().cumsum(1) - 1
        cos, sin = rotary(keys[0], position_ids)
        keys = tuple(unrotate(k, cos, sin) for k in keys)
    count = len(layers)
    return KVStates(keys, tuple(layer.values for layer in layers), mask.bool(), tuple(range(count)), count)


def rotary_module(model: nn.Module) -> nn.Module | None:
    """The model's rotary embedding, None for absolute positions. ValueError where `unrotate` is not its inverse."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    rotary = next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)
    why = UNREADABLE.get(config.model_type)
    if getattr(config, "kv_lora_rank", None):
        why = "caches a latent instead of keys and values"
    elif any(isinstance(value, dict) for value in rope.values()) or getattr(config, "no_rope_layers", None):
        why = "has RoPE that differs by layer"
    elif rotary is not None and not rotates_halves(rotary):
        why = PAIRED
    if why:
        name = config.model_type
        raise ValueError(f"A cache of model_type '{name}' cannot be read: the model {why}. Try capture_kv instead.")
    return rotary


def rotates_halves(rotary: nn.Module) -> bool:
    """Whether the family's own code, beside its rotary module, turns (x1, x2) to (-x2, x1) as `unrotate` assumes."""
    theirs = getattr(sys.modules[type(rotary).__module__], "rotate_half", None)
    probe = torch.arange(4.0)
    return theirs is not None and torch.equal(theirs(probe), rotate_half(probe))
