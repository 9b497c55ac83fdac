"""Tensors in 16, 8 or 4 bits, each channel on a scale of its own.

Keys before RoPE, and values, differ by channel far more than by position: KIVI, arXiv 2402.02750, and KVQuant, arXiv
2401.18079, quantise keys by channel for that.
"""

from __future__ import annotations

import torch
from torch import Tensor

Parts = dict[str, Tensor]  # data [N, C] (4 bits: [N, ceil(C / 2)]); below 16 bits low and step [C]


def quantise(x: Tensor, bits: int) -> Parts:
    """x [N, C] float, N positions of C channels, in `bits` bits a value: 16 (float16), 8 or 4 (even levels).

    ValueError for what float16 cannot hold.
    """
    if bits == 16:
        if len(x) and (most := float(x.abs().max())) > torch.finfo(torch.float16).max:
            raise ValueError(
                f"store.bits is 16, float16, and a teacher's states reach {most:.3g}, which it cannot hold; take bits: "
                "8, where every channel has a scale of its own."
            )
        return {"data": x.to(torch.float16)}
    x = x.float()
    low = x.amin(0) if len(x) else x.new_zeros(x.shape[1])
    high = x.amax(0) if len(x) else low
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    levels = ((x - low) / step).round().clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        levels = torch.nn.functional.pad(levels, (0, levels.shape[1] % 2))
        levels = levels[:, 0::2] | levels[:, 1::2] << 4
    return {"data": levels, "low": low, "step": step}


def restore(data: Tensor, low: Tensor | None, step: Tensor | None, channels: int) -> Tensor:
    """[..., C] float32 of data [..., C or ceil(C / 2)]; low, step: broadcast to it, None for float16."""
    if low is None or step is None:
        return data.float()
    if data.shape[-1] != channels:
        data = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)[..., :channels]
    return low + step * data
