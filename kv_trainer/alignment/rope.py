"""The position axis: keys as they were before rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_half(x: Tensor) -> Tensor:
    """(x1, x2) -> (-x2, x1) over the two halves of the last axis."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to the first `rotary_dim` channels.

    keys [B, H, S, D]; cos, sin [B, S, rotary_dim] from the model's own rotary module (they include its attention
    scaling). Families that rotate halves, not interleaved pairs.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    return torch.cat((turned * cos + rotate_half(turned) * sin, rest), dim=-1)


def unrotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The exact inverse of `rotate`: k = (k' cos - rotate_half(k') sin) / (cos^2 + sin^2).

    The divisor is the square of the attention scaling that YaRN and others fold into cos and sin.
    Measured error on Qwen2, Qwen3, Llama-3, YaRN and partial rotary: see tests/alignment/test_rope.py.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    plain = (turned * cos - rotate_half(turned) * sin) / (cos.square() + sin.square())
    return torch.cat((plain, rest), dim=-1)
