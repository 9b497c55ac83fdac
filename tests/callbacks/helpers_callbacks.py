"""A plain Trainer of a tiny student, with the callbacks that its arguments ask for and no teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from kv_trainer.arguments import MultiTeacherKVConfig
from kv_trainer.callbacks import FiniteGuard, GrowingAccumulation, default_callbacks

LAYERS = 4


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int = 14) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.arange(i, i + 6) % 20
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(6) < i % 4, -100)}


class Wired(Trainer):
    """What MultiTeacherKVTrainer does for these callbacks, and nothing else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        held = self.callback_handler.callbacks
        self.growth = next((c for c in held if isinstance(c, GrowingAccumulation)), None)
        self.guard = next(c for c in held if isinstance(c, FiniteGuard))
        self.batches: list[int] = []

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        values = super().set_initial_training_values(args, dataloader)
        return self.growth.run_values(args, values) if self.growth else values

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._init_training_state(*args, **kwargs)
        return self.growth.position(self.state.global_step) if self.growth else found

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        if batches:
            self.batches.append(len(batches))
        return batches, tokens

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.guard.watch({"total": loss}, inputs["input_ids"][:, 0])
        return loss


def student(bridge: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if bridge:
        model.add_module("kv_bridge", nn.Linear(3, 1))

        def add(module: nn.Module, args: Any, output: Any) -> Any:
            output["loss"] = output["loss"] + 0.1 * module.kv_bridge(torch.ones(1, 3)).sum()
            return output

        model.register_forward_hook(add)
    return model


def arguments(folder: Path, **settings: Any) -> MultiTeacherKVConfig:
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "weight_decay": 0.1,
        "learning_rate": 1e-2, "max_grad_norm": 0.1,
    }  # fmt: skip
    return MultiTeacherKVConfig(**{**options, **settings})


class Snapshots(TrainerCallback):
    """The weights before the first step and after every one."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})

    on_step_end = on_train_begin

    def moved(self, step: int) -> set[str]:
        """The names of the parameters that step number `step`, from 0, changed."""
        before, after = self.weights[step : step + 2]
        return {name for name in before if not torch.equal(before[name], after[name])}


def trainer(folder: Path, model: Any = None, rows: int = 14, callbacks: Any = (), **settings: Any) -> Wired:
    args = arguments(folder, **settings)
    return Wired(
        model or student(), args, train_dataset=Rows(rows), eval_dataset=Rows(4),
        callbacks=[*default_callbacks(args), *callbacks],
    )  # fmt: skip


def run(folder: Path, model: Any = None, **settings: Any) -> tuple[Wired, Snapshots]:
    seen = Snapshots()
    built = trainer(folder, model, callbacks=[seen], **settings)
    built.train()
    return built, seen
