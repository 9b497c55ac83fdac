"""Keys and values of a model, before RoPE, taken from its projections while it runs; queries and hidden states too.

A projection's output is the one place that every attention backend, training mode and cache policy shares: under
gradient checkpointing `past_key_values` is None, sliding windows truncate it, and flash attention never shows K.
Where each kind of attention module keeps them is the business of families.py.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import AttentionLayer, Parts, attention_layers
from .forms import attention_form, check_form
from .types import KVShape, KVStates

__all__ = [
    "KVCapture", "StopForward", "attention_layers", "capture_kv", "kv_shape", "require_gradient",
]  # fmt: skip
logger = logging.getLogger(__name__)
EMBEDDINGS = -1  # the layer number of what the first decoder layer is given


class StopForward(Exception):
    """Raised inside a teacher once its deepest layer that is needed has been recorded."""


def kv_shape(model: PreTrainedModel) -> KVShape:
    """The coordinates of a model's keys and values; logs which layers of a hybrid model have none.

    ValueError for a family that cannot be captured, or whose layers differ in heads or head width.
    """
    config = model.config.get_text_config()
    layers = attention_layers(model)
    sizes = {(layer.kv_heads, layer.head_dim, layer.value_dim) for layer in layers}
    if len(sizes) > 1:
        raise ValueError(
            f"{type(model).__name__} (model_type '{config.model_type}') has layers with unlike keys and values (heads, "
            f"key width, value width): {sorted(sizes)}. Take a model whose layers agree."
        )
    heads, width, value_width = sizes.pop()
    numbers = tuple(layer.index for layer in layers)
    without = sorted(set(range(config.num_hidden_layers)) - set(numbers))
    if without:
        logger.warning("%s: layers %s have no keys and values (linear attention); skipped.", config.model_type, without)
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta") or next((r["rope_theta"] for r in rope.values() if isinstance(r, dict)), None)
    return KVShape(
        family=config.model_type,
        num_layers=len(layers),
        num_kv_heads=heads,
        head_dim=width,
        rope_theta=theta,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_parameters=count_parameters(model),
        kv_layers=numbers if without else (),
        value_dim=None if value_width == width else value_width,
    )


def count_parameters(model: nn.Module) -> int:
    """As the model has them: ZeRO-3 keeps a shard of each tensor, and bitsandbytes packs two weights into a byte."""

    def entries(parameter: nn.Parameter) -> int:
        packed = getattr(parameter, "quant_state", None)
        return getattr(parameter, "ds_numel", parameter.numel()) if packed is None else packed.shape.numel()

    return sum(entries(parameter) for parameter in model.parameters())


class KVCapture:
    """Records keys and values of chosen layers in the forward passes between `start` and `stop`.

    layers: their numbers in the model; default every layer that has keys and values. queries: also the queries, and
    how each layer makes logits of them (ValueError for a family where that is not known). hidden: also the embeddings
    and the output of every chosen decoder layer. What is not asked for installs no hook.

    The recomputation of gradient checkpointing runs in the backward pass, after `stop`, so nothing is recorded
    twice. Gradients flow through what was recorded under non-reentrant checkpointing only.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[int] | None = None, queries: bool = False, hidden: bool = False
    ) -> None:
        every = {layer.index: layer for layer in attention_layers(model)}
        config: Any = model.config
        self.num_layers = config.get_text_config().num_hidden_layers
        self.layers = tuple(every) if layers is None else tuple(layers)
        if not set(self.layers) <= set(every):
            has = f"layers 0 to {self.num_layers - 1}"
            has = has if len(every) == self.num_layers else f"keys and values in layers {list(every)} only"
            raise ValueError(f"layers is {list(self.layers)}, but the model has {has}.")
        self.queries, self.hidden = queries, hidden
        self.stop_early = False
        self._every = every
        self._recorded: dict[int, dict[str, Any]] | None = None
        self._expected: dict[int, int] = {}
        self._handles: list[Any] = []
        for index in self.layers if queries else ():
            check_form(every[index])
        for index in dict.fromkeys(self.layers):
            self._hook_layer(model, every[index])
        if hidden:
            first = decoder_layers(model, every[self.layers[0]])[0]
            self._handles.append(first.register_forward_pre_hook(self._embeddings(first), with_kwargs=True))
            self._expected[EMBEDDINGS] = 1

    def _hook_layer(self, model: nn.Module, layer: AttentionLayer) -> None:
        sources = {name: s for name, s in layer.sources().items() if name != "queries" or self.queries}
        for name, source in sources.items():
            self._handles.append(source.register_forward_hook(self._projection(layer, name)))
        self._expected[layer.index] = len(sources) + self.queries + self.hidden
        if self.queries:
            self._handles.append(layer.module.register_forward_pre_hook(self._form(layer), with_kwargs=True))
        if self.hidden:
            decoder_layer = decoder_layers(model, layer)[layer.index]
            self._handles.append(decoder_layer.register_forward_hook(self._output(layer.index)))

    def _record(self, index: int, name: str, what: Any) -> None:
        recorded = self._recorded
        if recorded is None:
            return
        recorded.setdefault(index, {})[name] = what
        if self.stop_early and all(len(recorded.get(i, ())) == n for i, n in self._expected.items()):
            raise StopForward

    def _projection(self, layer: AttentionLayer, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if self._recorded is not None:
                self._record(layer.index, name, layer.parts(name, args[0], out))

        return record

    def _form(self, layer: AttentionLayer) -> Callable[..., None]:
        names = list(inspect.signature(type(layer.module).forward).parameters)[1:]

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._recorded is not None:
                self._record(layer.index, "form", attention_form(layer, dict(zip(names, args)) | kwargs))

        return record

    def _output(self, index: int) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, out: Tensor | tuple[Tensor, ...]) -> None:
            self._record(index, "hidden", out if isinstance(out, Tensor) else out[0])

        return record

    def _embeddings(self, first: nn.Module) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._record(EMBEDDINGS, "hidden", args[0] if args else kwargs["hidden_states"])

        return record

    def start(self) -> None:
        self._recorded = {}

    def forget(self) -> None:
        """What was recorded since `start`, after a forward that broke off: nothing is recorded until the next."""
        self._recorded = None

    def stop(self, mask: Tensor) -> KVStates:
        """The states recorded since `start`; mask [B, S], True where the position is real."""
        recorded, self._recorded = self._recorded, None
        assert recorded is not None, "stop without start"
        missing = [i for i, n in self._expected.items() if len(recorded.get(i, ())) < n]
        if missing:
            raise ValueError(f"Layers {missing} did not run, so their keys and values were not captured.")
        layers = [self._finish(i, recorded[i]) for i in self.layers]
        hidden = [recorded[i]["hidden"] for i in (EMBEDDINGS, *self.layers)] if self.hidden else None
        return KVStates(
            keys=tuple(parts["keys"] for parts in layers),
            values=tuple(parts["values"] for parts in layers),
            mask=mask.bool(),
            layers=self.layers,
            num_layers=self.num_layers,
            queries=tuple(parts["queries"] for parts in layers) if self.queries else None,
            attention=tuple(recorded[i]["form"] for i in self.layers) if self.queries else None,
            hidden=tuple(hidden) if hidden else None,
        )

    def _finish(self, index: int, recorded: dict[str, Any]) -> Parts:
        parts: Parts = {}
        for name, found in recorded.items():
            if name not in ("form", "hidden"):
                parts.update(found)
        return self._every[index].finish(parts)

    def close(self) -> None:
        self._recorded = None
        for handle in self._handles:
            handle.remove()


def decoder_layers(model: nn.Module, layer: AttentionLayer) -> nn.ModuleList:
    """The list of decoder layers that an attention module is in."""
    names = layer.path.split(".")
    above = [model.get_submodule(".".join(names[:i])) for i in range(len(names))]
    lists = [module for module in above if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} keeps no list of decoder layers; hidden states cannot be captured.")
    return lists[0]


@contextmanager
def capture_kv(
    model: nn.Module, layers: Sequence[int] | None = None, queries: bool = False, hidden: bool = False
) -> Iterator[KVCapture]:
    """Capture one forward pass: ``with capture_kv(model) as capture: model(**batch); kv = capture.stop(mask)``.

    mask: [B, S] attention mask of the batch. The hooks are gone after the block, also after an error.
    """
    capture = KVCapture(model, layers, queries, hidden)
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
            "gradient_checkpointing_kwargs: {use_reentrant: false}; otherwise unfreeze its k_proj and v_proj, or, with "
            "PEFT, put k_proj and v_proj among target_modules."
        )
