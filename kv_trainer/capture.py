"""Keys and values of a model, before RoPE, taken from its projections while it runs.

A projection's output is the one place that every attention backend, training mode and cache policy shares: under
gradient checkpointing `past_key_values` is None, sliding windows truncate it, and flash attention never shows K.
The table LAYOUTS says where each kind of attention module keeps them; what is not in it is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .types import KVShape, KVStates

Parts = dict[str, Tensor]  # "queries", "keys", "values" -> [B, H, S, D]


class StopForward(Exception):
    """Raised inside a teacher once its deepest layer that is needed has been recorded."""


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


def grouped_sizes(attention: nn.Module) -> tuple[int, int, int]:
    """Query, key/value heads, and head width, of an attention module with a transformers config."""
    config = attention.config
    return config.num_attention_heads, config.num_key_value_heads, attention.head_dim


def from_qkv_proj(attention: nn.Module, out: Tensor) -> Parts:
    """Phi-3: query, key and value channels one after the other."""
    queries, pairs, width = grouped_sizes(attention)
    parts = out.split((queries * width, pairs * width, pairs * width), dim=-1)
    return {name: split_heads(x, width) for name, x in zip(("queries", "keys", "values"), parts, strict=True)}


def from_c_attn(attention: nn.Module, out: Tensor) -> Parts:
    """GPT-2: three equal blocks from one Conv1D."""
    parts = out.chunk(3, dim=-1)
    width = attention.head_dim
    return {name: split_heads(x, width) for name, x in zip(("queries", "keys", "values"), parts, strict=True)}


def from_neox(attention: nn.Module, out: Tensor) -> Parts:
    """GPT-NeoX: query, key and value interleaved by head."""
    parts = out.unflatten(-1, (-1, 3 * attention.head_size)).transpose(1, 2).chunk(3, dim=-1)
    return dict(zip(("queries", "keys", "values"), parts, strict=True))


FUSED: dict[str, tuple[str, Callable[[nn.Module, Tensor], Parts]]] = {
    # class of the attention module -> its fused projection, and how to take it apart
    "Phi3Attention": ("qkv_proj", from_qkv_proj),
    "GPT2Attention": ("c_attn", from_c_attn),
    "GPTNeoXAttention": ("query_key_value", from_neox),
}
SEPARATE = {
    "queries": ("q_norm", "q_layernorm", "q_proj"),
    "keys": ("k_norm", "k_layernorm", "k_proj"),
    "values": ("v_norm", "v_proj"),
}
NORM_AFTER_ROPE = frozenset({"NanoChatAttention"})  # its norms put out rotated keys: take the projections
TESTED = (
    "Llama, Qwen2, Qwen3, Qwen3-MoE, Mistral, Gemma, Gemma-2, Gemma-3, Phi-3, GPT-2, GPT-NeoX, OLMo-2, Cohere, "
    "StarCoder2, Granite, StableLM"
)


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module, and its submodules that put out queries, keys and values."""

    index: int
    module: nn.Module

    @property
    def head_dim(self) -> int:
        return self.module.head_dim if hasattr(self.module, "head_dim") else self.module.head_size

    def sources(self) -> dict[str, nn.Module]:
        """part -> submodule; a norm after the projection is the later and therefore the right one."""
        if type(self.module).__name__ in FUSED:
            return {"all": getattr(self.module, FUSED[type(self.module).__name__][0])}
        late = type(self.module).__name__ in NORM_AFTER_ROPE
        return {
            part: next(
                getattr(self.module, n)
                for n in (names[-1:] if late else names)
                if isinstance(getattr(self.module, n, None), nn.Module)
            )
            for part, names in SEPARATE.items()
        }

    def parts(self, name: str, given: Tensor, out: Tensor) -> Parts:
        if name == "all":
            return FUSED[type(self.module).__name__][1](self.module, out)
        return {name: split_heads(out, self.head_dim, given)}


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The attention modules of a decoder, by layer. ValueError names a family that cannot be captured."""
    found: dict[int, list[AttentionLayer]] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        separate = all(isinstance(getattr(module, n, None), nn.Module) for n in ("q_proj", "k_proj", "v_proj"))
        known = type(module).__name__ in FUSED or (separate and hasattr(module, "head_dim"))
        if isinstance(index, int) and known and not getattr(module, "is_cross_attention", False):
            found.setdefault(index, []).append(AttentionLayer(index, module))
    config = model.config.get_text_config()
    missing = [i for i in range(config.num_hidden_layers) if len(found.get(i, ())) != 1]
    if missing:
        raise ValueError(
            f"{type(model).__name__} (model_type '{config.model_type}') cannot be captured: layers {missing} do not "
            f"hold one set of query, key and value projections each. Tested families: {TESTED}; any other works if "
            "each attention module has q_proj, k_proj, v_proj, head_dim and layer_idx."
        )
    return [found[i][0] for i in range(config.num_hidden_layers)]


def kv_shape(model: PreTrainedModel) -> KVShape:
    """The coordinates of a model's keys and values."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta") or next((r["rope_theta"] for r in rope.values() if isinstance(r, dict)), None)
    return KVShape(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=attention_layers(model)[0].head_dim,
        rope_theta=theta,
        vocab_size=config.vocab_size,
        num_parameters=sum(p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in model.parameters()),
    )


class KVCapture:
    """Records keys and values (and queries) of chosen layers in the forward passes between `start` and `stop`.

    The recomputation of gradient checkpointing runs in the backward pass, after `stop`, so nothing is recorded
    twice. Gradients flow through what was recorded under non-reentrant checkpointing only.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] | None = None, queries: bool = False) -> None:
        every = attention_layers(model)
        self.num_layers = len(every)
        self.layers = tuple(range(len(every))) if layers is None else tuple(layers)
        if not set(self.layers) <= set(range(len(every))):
            raise ValueError(f"layers is {list(self.layers)}, but the model has layers 0 to {len(every) - 1}.")
        self.wanted = ("queries", "keys", "values") if queries else ("keys", "values")
        self.stop_early = False
        self._recorded: dict[int, Parts] | None = None
        self._handles = [
            source.register_forward_hook(self._hook(every[i], name))
            for i in self.layers
            for name, source in every[i].sources().items()
            if name == "all" or name in self.wanted
        ]

    def _hook(self, layer: AttentionLayer, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if self._recorded is None:
                return
            parts = self._recorded.setdefault(layer.index, {})
            parts.update({k: v for k, v in layer.parts(name, args[0], out).items() if k in self.wanted})
            done = layer.index == max(self.layers) and len(parts) == len(self.wanted)
            if self.stop_early and done:
                raise StopForward

        return record

    def start(self) -> None:
        self._recorded = {}

    def stop(self, mask: Tensor) -> KVStates:
        """The states recorded since `start`; mask [B, S], True where the position is real."""
        recorded, self._recorded = self._recorded, None
        assert recorded is not None, "stop without start"
        missing = [i for i in self.layers if len(recorded.get(i, {})) < len(self.wanted)]
        if missing:
            raise ValueError(f"Layers {missing} did not run, so their keys and values were not captured.")
        by_part = {name: tuple(recorded[i][name] for i in self.layers) for name in self.wanted}
        return KVStates(mask=mask.bool(), layers=self.layers, num_layers=self.num_layers, **by_part)

    def close(self) -> None:
        self._recorded = None
        for handle in self._handles:
            handle.remove()


@contextmanager
def capture_kv(model: nn.Module, layers: Sequence[int] | None = None, queries: bool = False) -> Iterator[KVCapture]:
    """Capture one forward pass: ``with capture_kv(model) as capture: model(**batch); kv = capture.stop(mask)``.

    mask: [B, S] attention mask of the batch. The hooks are gone after the block, also after an error.
    """
    capture = KVCapture(model, layers, queries)
    capture.start()
    try:
        yield capture
    finally:
        capture.close()


def require_gradient(states: KVStates) -> None:
    """Refuse states that training would silently ignore, as reentrant checkpointing makes them."""
    if torch.is_grad_enabled() and not any(x.requires_grad for x in (*states.keys, *states.values)):
        raise ValueError(
            "The student's keys and values carry no gradient. With gradient checkpointing, set "
            "gradient_checkpointing_kwargs: {use_reentrant: false}; otherwise unfreeze its k_proj and v_proj."
        )
