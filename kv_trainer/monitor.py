"""What is logged of the training steps: the loss terms, how hard each pulls, and the teachers' shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from .balance import REFERENCE, gradient_norms, loss_scales
from .bridge import NAME, KVBridge
from .losses import LayerwiseLoss
from .routing import RoutingLog


def loss_scale(accelerator: Accelerator) -> float:
    """What a run in float16 multiplies its loss by now; 1 for any other."""
    if accelerator.scaler is not None:
        return accelerator.scaler.get_scale()
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    return float(getattr(wrapped.engine.optimizer, "cur_scale", 1.0)) if wrapped is not None else 1.0


class StepMonitor:
    """Sums since the last log, kept on the device; read, over all ranks, when something is logged.

    scales_every: steps between two logs of every term's share of the gradient; 0 = never.
    """

    def __init__(self, bridge: KVBridge, routing: RoutingLog, scales_every: int) -> None:
        self.bridge = bridge
        self.routing = routing
        self.scales_every = scales_every
        self.restart()

    @property
    def measures(self) -> bool:
        """Whether any step of the run measures gradients."""
        return bool(self.scales_every or self.bridge.balance.shared)

    def restart(self) -> None:
        """Before a run, or once its sums are logged."""
        self._measured_step = -1
        self._forget()

    def _forget(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._observed: dict[str, float] = {}
        self._steps = 0

    def count_step(self) -> None:
        self._steps += 1

    def add(self, tasks: Tensor | None) -> None:
        """The bridge's terms and shares of one micro-batch; tasks [B], where known."""
        for name, term in self.bridge.terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + term
        if self.bridge.weights is not None and len(self.bridge.layer_maps) > 1:
            self.routing.add(self.bridge.weights, tasks)

    def measure(
        self, model: nn.Module, accelerator: Accelerator, step: int, progress: float
    ) -> Callable[[Mapping[str, Tensor]], None] | None:
        """In the first micro-batch of a step that asks for it: measures gradients, and lets weights follow them."""
        watched = bool(self.scales_every) and step % self.scales_every == 0
        if step == self._measured_step or not (watched or self.bridge.balance.due(step)):
            return None
        self._measured_step = step

        def found(terms: Mapping[str, Tensor]) -> None:
            parameters = [p for n, p in model.named_parameters() if p.requires_grad and f"{NAME}." not in n]
            norms = gradient_norms(terms, parameters, lambda x: accelerator.reduce(x, "mean"), loss_scale(accelerator))
            reference = self.bridge.losses.get(REFERENCE)
            self.bridge.balance.follow(norms, reference.weight_at(progress) if reference else 1.0, step)
            if watched:
                self._observed |= loss_scales(self.bridge, norms, progress)

        return found

    def logs(self, accelerator: Accelerator, step: int, progress: float) -> dict[str, Any]:
        """The mean raw value and the current weight of every term, and what was observed; starts anew."""
        if not self._terms:
            return {}
        logs: dict[str, Any] = {}
        for name, term in self._terms.items():
            logs[f"loss_{name}"] = float(accelerator.reduce(term, "sum")) / self._steps
            if name in self.bridge.losses:
                logs[f"weight_{name}"] = self.bridge.weight_now(name, progress)
        logs |= self.routing.logs(lambda x: accelerator.reduce(x, "sum"))
        logs |= self._observed
        starts = [x.attention_starts for x in self.bridge.losses.values() if isinstance(x, LayerwiseLoss)]
        if any(starts):
            logs["attn_warmup_left"] = max(0, max(starts) - step)
        self._forget()
        return logs
