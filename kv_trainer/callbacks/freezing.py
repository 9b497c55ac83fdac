"""Parameters that rest for a part of the run: attention at first, layer groups one after the other, projectors at last.

A resting parameter keeps `requires_grad`, and gradient flows through it to earlier layers: only its own gradient is
made zero where it arises, and taken away before the optimizer steps. An optimizer skips a parameter without gradient:
weight decay and momentum leave it alone too, its optimizer state waits, and the gradient norm counts only what moves.
This is the same on one device and under DDP, whose reducer waits for the gradient of every parameter it was built
with. It costs the gradients of the resting parameters, which are computed in vain: freezing steadies a run, it does not
make it faster (`student.freeze` does). Under FSDP the gradient norm, and so clipping, counts resting parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..arguments import FreezeConfig
from ..capture import attention_layers
from .progress import announce

BRIDGE = "kv_bridge."


class Freezing(TrainerCallback):
    """Carries out the `freeze` section. What rests follows from the step alone, so a resumed run needs no memory.

    config: what rests and until when. What does not require a gradient when training begins is never touched.
    """

    def __init__(self, config: FreezeConfig) -> None:
        self.config = config
        self._attention: dict[str, nn.Parameter] = {}
        self._groups: list[dict[str, nn.Parameter]] = []
        self._projectors: dict[str, nn.Parameter] = {}
        self._resting: dict[str, tuple[nn.Parameter, Any]] = {}  # name -> parameter, handle of its hook

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Sort the parameters. ValueError where there is nothing to freeze, or the gradients are not ours."""
        self.release()
        if getattr(args, "deepspeed_plugin", None) is not None:
            raise ValueError("freeze does not work with DeepSpeed, which keeps the gradients; use DDP or FSDP.")
        student = extract_model_from_parallel(model)
        trainable = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self._projectors = {name: p for name, p in trainable.items() if BRIDGE in name}
        own = {name: p for name, p in trainable.items() if BRIDGE not in name}
        prefixes = attention_names(student)
        self._attention = {n: p for n, p in own.items() if n.startswith(tuple(f"{a}." for a in prefixes))}
        if self.config.layer_groups:
            self._groups = layer_groups(own, [n for n, _ in student.named_parameters()], prefixes, self.config)
        if self.config.attention and not self._attention:
            raise ValueError("freeze.attention has no effect: no parameter of the student's attention is trained.")
        if self.config.projectors_after and not self._projectors:
            raise ValueError("freeze.projectors_after has no effect: this run trains no projectors.")

    def resting(self, step: int) -> dict[str, dict[str, nn.Parameter]]:
        """What rests in the step after `step` optimizer steps: a line about it -> its parameters by name."""
        found: dict[str, dict[str, nn.Parameter]] = {}
        c = self.config
        if c.until_step and step < c.until_step:
            found[f"attention until step {c.until_step}"] = self._attention
        if self._groups and c.unfreeze_every:
            active = 1 + step // c.unfreeze_every
            if active < len(self._groups):
                later = {n: p for group in self._groups[active:] for n, p in group.items()}
                found[f"{len(self._groups) - active} of {len(self._groups)} layer groups"] = later
        if c.projectors_after and step >= c.projectors_after:
            found["projectors"] = self._projectors
        return found

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first micro-batch of a step: hooks on what rests now, none on what woke up."""
        found = self.resting(state.global_step)
        wanted = {name: p for part in found.values() for name, p in part.items()}
        if wanted.keys() == self._resting.keys():
            return
        self.release()
        self._resting = {name: (p, p.register_hook(torch.zeros_like)) for name, p in wanted.items()}
        announce(state, f"freeze: {', '.join(found) or 'nothing rests any more'}")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for parameter, _ in self._resting.values():
            parameter.grad = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let all move again: at the end of a run, and where it breaks off."""
        for _, handle in self._resting.values():
            handle.remove()
        self._resting = {}


def attention_names(student: nn.Module) -> list[str]:
    """The names of the student's attention modules, by layer."""
    names = {id(module): name for name, module in student.named_modules()}
    return [names[id(layer.module)] for layer in attention_layers(student)]


def layer_groups(
    own: dict[str, nn.Parameter], every: list[str], attention: list[str], config: FreezeConfig
) -> list[dict[str, nn.Parameter]]:
    """The student's parameters in the order in which they wake up, `config.layer_groups` groups.

    Layers are cut into groups of equal size. What stands before them in the model (embeddings) belongs to the lowest
    group, what stands after them (last norm, head) to the highest; a head tied to the embeddings is one with them.
    own: trainable parameters; every: all names in the order of the model; attention: an attention module a layer.
    """
    count = config.layer_groups
    assert count is not None
    layers = [name.rpartition(".")[0] + "." for name in attention]
    if count > len(layers):
        raise ValueError(f"freeze.layer_groups is {count}, but the student has {len(layers)} layers; give fewer.")
    first = next(i for i, name in enumerate(every) if name.startswith(layers[0]))
    low = set(every[:first])
    groups: list[dict[str, nn.Parameter]] = [{} for _ in range(count)]
    for name, parameter in own.items():
        layer = next((i for i, prefix in enumerate(layers) if name.startswith(prefix)), None)
        if layer is None:
            layer = 0 if name in low else len(layers) - 1
        groups[layer * count // len(layers)][name] = parameter
    return groups if config.order == "bottom_up" else groups[::-1]
