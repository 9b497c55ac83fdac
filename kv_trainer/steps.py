"""One training step: its batch counted, the teachers asked, all losses computed, and what is logged of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from .callbacks import FiniteGuard, GrowingAccumulation, MetricsFile
from .checks import check_batches
from .collator import tokens_of
from .losses import CrossEntropy, LossInputs
from .monitor import StepMonitor
from .panel import TeacherPanel
from .profiling import part
from .publish import HubTrainer
from .supervision import Supervision

GRACE = 3.0  # seconds until the end of a loader worker is known


class StepTrainer(HubTrainer):
    """What MultiTeacherKVTrainer overrides of a step.

    taught: whether any teacher runs. sharded: whether parameters are dealt out to the ranks.
    samples_in_step: of the accumulated, all-ranks batch that is trained on.
    """

    train_dataset: Dataset
    panel: TeacherPanel
    monitor: StepMonitor
    metrics_file: MetricsFile
    guard: FiniteGuard
    growth: GrowingAccumulation | None
    taught: bool
    sharded: bool
    samples_in_step: Tensor | float = 1.0

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device):
        """The micro-batches of one step, their supervised tokens, and (kept here) their samples, over all ranks."""
        try:
            with part("data"):
                batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        except (ConnectionError, EOFError) as error:  # a worker died while it handed over a batch
            if not self.args.dataloader_num_workers:
                raise
            time.sleep(GRACE)  # where torch learns of its end, it says which one, here and not while we leave
            raise RuntimeError(f"A DataLoader worker exited unexpectedly while it sent a batch ({error}).") from error
        samples = torch.tensor(float(sum(len(b["input_ids"]) for b in batches)), device=device)
        if self.args.world_size > 1:
            samples = self.accelerator.gather(samples).sum()
        self.samples_in_step = samples
        if batches:  # accumulation that grows asks once more at the end of an epoch
            self.monitor.count_step()
            self.metrics_file.count(samples, num_items)
        return batches, num_items

    def set_initial_training_values(self, args: Any, dataloader: Any):
        check_batches(args, dataloader, self.train_dataset)
        values = super().set_initial_training_values(args, dataloader)
        return self.growth.run_values(args, values) if self.growth else values

    def _init_training_state(self, *args: Any):
        """Also once more where a batch size did not fit, and all begins anew."""
        found = super()._init_training_state(*args)
        self.monitor.restart()
        return self.growth.position(self.state.global_step) if self.growth and not self.ended else found

    def _prepare_input(self, data: Any) -> Any:
        """A batch on its device, as it is: Trainer would cast all floats to the dtype of a DeepSpeed engine's weights,
        and positions, which bf16 counts to 256, are among them.
        """
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with part("backward"):  # and what little is around it: the parts of the forward pass are counted apart
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """All losses of one micro-batch; outside training, its cross-entropy alone."""
        labels, text = inputs["labels"], {k: inputs[k] for k in ("input_ids", "attention_mask")}
        tokens = (labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        if not model.training:
            outputs = model(**text, use_cache=False)
            loss = CrossEntropy()(LossInputs(labels, tokens, len(labels), logits=outputs.logits))
            return (loss, outputs) if return_outputs else loss
        step, steps = self.state.global_step, max(1, self.state.max_steps)
        self.bridge.step = step
        weighing = "teacher_importance" in self.bridge.weighing(step)
        supervision = Supervision(
            self.panel.signals(inputs, weighing) if self.taught else {}, labels, text["attention_mask"], tokens,
            self.samples_in_step, step / steps, step, inputs.get("task"), inputs.get("answer_position"),
            inputs.get("segments"), tokens_of(inputs),
            self.monitor.measure(self.model, self.accelerator, step, step / steps),
        )  # fmt: skip
        # A compiled graph cannot be walked back twice: what it saved for the first time is overwritten by then.
        eager = torch.compiler.set_stance("force_eager") if supervision.measure else nullcontext()
        with self.bridge.supervise(supervision), eager, part("student forward"):
            outputs = model(**text, use_cache=False)
        watched = {**self.bridge.terms, "total": self.bridge.loss}
        if self.bridge.weights is not None:  # one that is NaN counts for no position: no term would show it
            watched["teachers' shares"] = self.bridge.weights.sum()
        self.guard.watch(watched, inputs.get("row", ()), self.bridge.take_states(), self.bridge.heard)
        self.monitor.add(inputs.get("task"))
        # FSDP hands the loss on in the dtype it computes in: its gradient is the same, its value has lost digits.
        loss = outputs["loss"].float()
        loss = loss + (self.bridge.loss - loss.detach())
        # Ranks average their gradients, but each has already divided by the counts of all ranks.
        loss = loss * self.accelerator.num_processes
        if self.sharded and "logits" not in self.bridge.requires:  # layers are gathered where a gradient reaches them
            loss = loss + outputs["logits"][..., :0].sum()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean raw value and the current weight of every loss term to the training logs."""
        if "loss" in logs:
            step = self.state.global_step
            trained = max(0, step - 1)  # the last step went by the weights of what was done before it
            logs |= self.monitor.logs(self.accelerator, step, trained / max(1, self.state.max_steps))
        super().log(logs, start_time)
