"""The position axis: rotary position embedding put on and taken off, as each family does it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Embeddings = tuple[Tensor, Tensor] | Tensor  # cos, sin [B, S, rotary]; or complex [B, S, rotary / 2]
Rotation = Callable[[Tensor, Embeddings], Tensor]

# Attention modules that rotate in some layers only, and how they say so; most have the attribute `use_rope`.
ROTATES: dict[str, Callable[[Any], bool]] = {
    "AfmoeAttention": lambda a: a.is_local_attention,
    "Cohere2Attention": lambda a: a.sliding_window is not None,
    "Cohere2MoeAttention": lambda a: a.sliding_window is not None or a.force_rope,
    "Exaone4Attention": lambda a: a.sliding_window is None or a.is_sliding,
    "ExaoneMoeAttention": lambda a: a.sliding_window is None or a.is_sliding,
    "FlintAttention": lambda a: a.sliding_window is not None,
}


@dataclass(frozen=True)
class Turn:
    """RoPE of one layer at the positions of one forward pass: turn(x) for x [B, H, S, D].

    rotation: how the family rotates; embeddings: its tables, [B, S, ...] or, alike in all samples, [1, S, ...].
    """

    rotation: Rotation
    embeddings: Embeddings

    def __call__(self, x: Tensor) -> Tensor:
        return self.rotation(x, self.embeddings)

    def to(self, device: torch.device) -> Turn:
        tables = self.embeddings
        moved = tables.to(device) if isinstance(tables, Tensor) else (tables[0].to(device), tables[1].to(device))
        return replace(self, embeddings=moved)

    def at(self, positions: Tensor) -> Turn:
        """The same for x [B, H, Q, D] that holds some positions [B, Q] only."""

        def pick(table: Tensor) -> Tensor:
            index = positions[..., None].expand(-1, -1, table.shape[-1])
            return table.expand(len(positions), -1, -1).gather(1, index)

        tables = self.embeddings
        picked = pick(tables) if isinstance(tables, Tensor) else (pick(tables[0]), pick(tables[1]))
        return replace(self, embeddings=picked)


def rotate_half(x: Tensor) -> Tensor:
    """(x1, x2) -> (-x2, x1) over the two halves of the last axis."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE, half against half, to the first `rotary_dim` channels.

    keys [B, H, S, D]; cos, sin [B, S, rotary_dim], with the attention scaling in them if there is one.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    return torch.cat((turned * cos + rotate_half(turned) * sin, rest), dim=-1)


def unrotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The exact inverse of `rotate`: k = (k' cos - rotate_half(k') sin) / (cos^2 + sin^2)."""
    return rotate(keys, *inverse((cos, sin)))


def rerotate(keys: Tensor, positions: Tensor, theta: float, rotary_dim: int | None = None) -> Tensor:
    """Keys before RoPE, rotated half against half at other positions and another base: a teacher's at the student's.

    keys [B, H, S, D]; positions [B, S] long; theta: the base; rotary_dim: how many channels turn, default all D.
    """
    width = keys.shape[-1] if rotary_dim is None else rotary_dim
    if width % 2 or not 0 < width <= keys.shape[-1]:
        raise ValueError(f"rotary_dim is {width}; give an even number up to the head width {keys.shape[-1]}.")
    steps = torch.arange(0, width, 2, device=keys.device, dtype=torch.float32) / width
    phase = positions[..., None].float() * theta**-steps
    phase = torch.cat((phase, phase), dim=-1)
    return rotate(keys, phase.cos().to(keys.dtype), phase.sin().to(keys.dtype))


def inverse(embeddings: Embeddings) -> Embeddings:
    """The embeddings that undo these: the opposite angle, and one over the square of the attention scaling."""
    if isinstance(embeddings, Tensor):
        return embeddings.conj() / embeddings.abs().square()
    cos, sin = embeddings
    square = cos.square() + sin.square()
    return cos / square, -sin / square


def rotates(attention: nn.Module) -> bool:
    """Whether this layer of a model with RoPE has it."""
    named = ROTATES.get(type(attention).__name__)
    return named(attention) if named else bool(getattr(attention, "use_rope", True))


def rotation_of(attention: nn.Module) -> Rotation:
    """How the family of this attention module rotates [B, H, S, D], whatever its pairing: by its own function.

    Rotation is linear in each pair of channels, so the same function with `inverse(embeddings)` takes it off again.
    Where fewer channels turn than D, they are the first, or the last in multi-head latent attention. ValueError where
    the family has no function of a known form.
    """
    code = sys.modules[type(attention).__module__]
    latent = getattr(attention, "qk_rope_head_dim", None)
    interleaved = latent and getattr(attention.config, "rope_interleave", False)
    theirs: Any = getattr(code, "apply_rotary_pos_emb_interleave" if interleaved else "apply_rotary_pos_emb", None)
    names = list(inspect.signature(theirs).parameters) if callable(theirs) else []
    known = names[:4] == ["q", "k", "cos", "sin"] or names[:3] == ["x", "cos", "sin"]
    if not known and not hasattr(code, "apply_rotary_emb"):  # of complex numbers: Llama 4, DeepSeek-V2
        raise ValueError(f"{type(attention).__name__} has no apply_rotary_pos_emb(q, k, cos, sin)")

    def turn(x: Tensor, embeddings: Embeddings) -> Tensor:
        if isinstance(embeddings, Tensor):
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * embeddings.unsqueeze(1)).flatten(3).type_as(x)
        return theirs(x, *embeddings) if names[0] == "x" else theirs(x, x, *embeddings)[0]

    def rotation(x: Tensor, embeddings: Embeddings) -> Tensor:
        if latent:
            return torch.cat((x[..., :-latent], turn(x[..., -latent:], embeddings)), dim=-1)
        width = table_width(attention, embeddings)
        return torch.cat((turn(x[..., :width], embeddings), x[..., width:]), dim=-1)

    return rotation


def table_width(attention: nn.Module, embeddings: Embeddings) -> int:
    """How many channels these embeddings turn. GPT-OSS's tables, like complex ones, have one entry a pair."""
    if isinstance(embeddings, Tensor):
        return 2 * embeddings.shape[-1]
    return embeddings[0].shape[-1] * (2 if type(attention).__name__ == "GptOssAttention" else 1)
