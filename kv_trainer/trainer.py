"""MultiTeacherKVTrainer: what it is put together from, evaluation, and training; a step is steps.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from . import profiling
from .adapters import add_adapters, students_peft
from .arguments import MultiTeacherKVConfig
from .bridge import NAME, KVBridge
from .calibration import Calibration
from .callbacks import FiniteGuard, Freezing, GrowingAccumulation, LossTermsProgress, MetricsFile, default_callbacks
from .capture import kv_shape
from .checkpoints import zero_stage
from .checks import check_arguments, check_best_task
from .data import Reader, task_names
from .encoding import collator, encoded, encoded_to_evaluate, has_text
from .evaluation import evaluate_rows
from .facts import recipe_of
from .losses import needs_teacher
from .manifest import describe_run, fingerprint
from .models import stop_where_taught, whole_weights
from .monitor import StepMonitor
from .optimizer import add_missing, set_apart
from .panel import TeacherPanel
from .report import save_layer_match
from .resolve import (
    Loadable,
    check_rows,
    check_together,
    check_types,
    checkpoint_large_student,
    numbered_rows,
    resolve_student,
    resolve_teachers,
)
from .routing import RoutingLog
from .row_checks import aligned_share
from .steps import StepTrainer
from .teachers import Teacher
from .text import turn_end


class MultiTeacherKVTrainer(StepTrainer):
    """A Trainer whose student also learns from the keys and values of several teachers.

    model: a name, a folder, a StudentConfig or an instance.
    teachers: name -> a model name, a TeacherConfig, an instance, or a pair (instance, tokenizer).
    args: losses, alignment, fusion and all TrainingArguments in one object.
    train_dataset, eval_dataset: rows of text (prompt + completion, messages, text, or any through templates), as
    datasets.Dataset; they are encoded here for the student and every teacher.
    processing_class: the student's tokenizer, or a Reader, which says whether rows are a chat; default that of `model`.
    peft_config: a peft.PeftConfig to train adapters instead of all weights.

    Every loss divides by the tokens or samples of the whole accumulated, all-ranks batch, so a step does not depend
    on how it is cut into micro-batches. The trainable maps of teachers' heads live in `model.kv_bridge`, learn at
    `args.projector.learning_rate`, and are saved apart from the student, in kv_bridge.safetensors.
    """

    args: MultiTeacherKVConfig
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: Loadable,
        teachers: Mapping[str, Any] | None = None,
        args: MultiTeacherKVConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | Reader | None = None,
        data_collator: Callable[..., Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ) -> None:
        args = MultiTeacherKVConfig() if args is None else args
        check_types(args, teachers, train_dataset, eval_dataset, data_collator)
        set_seed(args.seed)  # before random students and projectors are drawn; Trainer does it again, too late
        self.recipe = recipe_of(model, teachers or {}, args, peft_config)
        args.remove_unused_columns = False
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False
        peft_config = students_peft(model, peft_config)
        with whole_weights(args):
            student, self.reader = resolve_student(model, processing_class)
            stop_where_taught(student, self.reader.tokenizer, turn_end(self.reader))  # also where its users load it
            if isinstance(former := getattr(student, NAME, None), KVBridge):  # of an earlier trainer
                former.detach(student)
            shape: Any = kv_shape(student) if teachers else None  # without teachers any model can be trained
            self.matched_by = fingerprint(student) if args.alignment.layers.method == "cka" else None
            layers = shape.num_layers if shape else 0
            self.teachers = resolve_teachers(teachers or {}, args, self.reader, layers, self.matched_by)
            check_together(student, self.teachers, args.data.max_length if has_text(train_dataset) else 0)
        self.manifest = describe_run(student, self.reader, self.teachers, args, peft_config)  # while teachers are whole
        checkpoint_large_student(args, student)
        check_arguments(args, {name: t.weight for name, t in self.teachers.items()})
        if peft_config is not None:
            student = add_adapters(student, peft_config)
        self._build_bridge(student, shape, args)
        train_dataset, eval_dataset = self._encode(train_dataset, eval_dataset, args, student.config.get_text_config())
        ours = self._watchers(args, train_dataset, layers or 1)
        self.use_cache = getattr(getattr(student, "config", None), "use_cache", None)
        self.predictions: list[dict[str, Any]] = []
        self.matched = False  # whether layers are, by CKA
        if "logits" not in self.bridge.requires and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # the head rests, and under checkpointing DDP would wait for it
        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator or collator(self.reader, self.teachers),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.reader.tokenizer,
            callbacks=[*ours, *(callbacks or [])],
            optimizers=optimizers,
        )
        self._settle_engine()
        if ProgressCallback in {type(c) for c in self.callback_handler.callbacks}:
            self.remove_callback(ProgressCallback)
            self.add_callback(LossTermsProgress)
        self.remove_callback(PrinterCallback)

    # ---- what __init__ puts together

    def _build_bridge(self, student: PreTrainedModel, shape: Any, args: MultiTeacherKVConfig) -> None:
        """The bridge, in the student; and every teacher, where it belongs and ready for what the bridge needs."""
        self.bridge = KVBridge(
            shape, {n: t.shape for n, t in self.teachers.items()}, args, [t.weight for t in self.teachers.values()]
        )
        self.manifest["bridge"] = {name: list(tensor.shape) for name, tensor in self.bridge.state_dict().items()}
        self.manifest["resting"] = [name for name, p in self.bridge.named_parameters() if not p.requires_grad]
        needs = self.bridge.teacher_needs()
        for name, teacher in self.teachers.items():
            teacher.place(name, args.device)
            teacher.prepare(self.bridge.layer_maps[name].needed, needs)
            if args.torch_compile and isinstance(teacher, Teacher) and teacher.placement == "replicated":
                teacher.compile(args.torch_compile_backend, args.torch_compile_mode)
            if needs.final:
                width = student.config.get_text_config().vocab_size
                self.bridge.heads[name] = teacher.vocabulary(self.reader.tokenizer, width)
        self.bridge.attach(student)
        self.taught = needs_teacher(self.bridge.requires)  # else no teacher ever runs

    def _encode(
        self, train: Dataset | None, evaluation: Any, args: MultiTeacherKVConfig, student: PreTrainedConfig
    ) -> tuple[Dataset | None, Any]:
        """The rows to train on, for the student and every teacher, and those to evaluate on, for the student."""
        if train is not None:
            train = encoded(train, args, self.reader, self.teachers)
        if isinstance(evaluation, dict):
            each = evaluation.items()
            return train, {name: encoded_to_evaluate(rows, args, self.reader, student) for name, rows in each}
        found = None if evaluation is None else encoded_to_evaluate(evaluation, args, self.reader, student)
        check_best_task(args, found)
        return train, found

    def _watchers(self, args: MultiTeacherKVConfig, rows: Dataset | None, layers: int) -> list[TrainerCallback]:
        """What runs the teachers, and what counts, logs and guards a step; returned are the callbacks among them."""
        self.panel = TeacherPanel(self.teachers, args.fusion, numbered_rows(rows))
        self.routing = RoutingLog(list(self.teachers), task_names(rows) if rows is not None else (), layers)
        self.monitor = StepMonitor(self.bridge, self.routing, args.monitor.loss_scales_every)
        ours = default_callbacks(args)
        self.metrics_file = next(c for c in ours if isinstance(c, MetricsFile))
        self.guard = next(c for c in ours if isinstance(c, FiniteGuard))
        self.growth = next((c for c in ours if isinstance(c, GrowingAccumulation)), None)
        return ours

    def _settle_engine(self) -> None:
        """What can be said once accelerate is there: how shards are saved, and what cannot be measured on them."""
        if self.is_fsdp_enabled:  # with accelerate's own default, shards, no student would be written at all
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self.sharded = self.is_fsdp_enabled or zero_stage(self.accelerator) == 3
        if self.monitor.measures and self.sharded:
            raise ValueError(
                "gradient_share and monitor.loss_scales_every measure gradients of whole parameters, which ZeRO-3 and "
                "FSDP deal out; give losses a number (kv-trainer diagnose --write finds one), or use ZeRO-2 or DDP."
            )
        sinks = any(name.endswith(".sinks") for name, _ in self.model.named_parameters())
        if self.sharded and sinks and "student_importance" in self.bridge.requires:
            raise ValueError(
                "attention: student reads the student's attention sinks, which ZeRO-3 and FSDP deal out; take "
                "attention: teacher, or ZeRO-2 or DDP."
            )
        self._loss_shifts_labels = True  # our losses do, whatever the student's own would: tokens are counted so
        # Our losses are sums over the micro-batch divided by counts of the whole accumulated batch.
        self.loss_is_scaled_for_ga = True
        # The tokens are counted for our losses, whether or not the student's own forward would take the count.
        self.model_accepts_loss_kwargs = True

    def aligned_share(self, name: str) -> float:
        """Share of the student's positions that are aligned with a teacher, over the first rows."""
        told = getattr(self.teachers[name], "aligned_share", None)  # of one that was stored aligned
        return aligned_share(self.train_dataset, name) if told is None else told

    # ---- evaluation

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Perplexity and exact answers of the student alone; see evaluation.evaluate_model.

        What it found of each row is kept in `predictions` until the next one. Of several data sets by name, the metrics
        are called eval_NAME_...
        """
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise ValueError("There is nothing to evaluate: give eval_dataset.")
        if isinstance(rows, dict):
            each = (self.evaluate(some, ignore_keys, f"{metric_key_prefix}_{name}") for name, some in rows.items())
            return {name: value for found in each for name, value in found.items()}
        check_rows("eval_dataset", rows)
        rows = encoded_to_evaluate(rows, self.args, self.reader)
        student = self.accelerator.unwrap_model(self.model)
        progress = not self.args.disable_tqdm and self.is_world_process_zero()
        if callable(average := getattr(self.optimizer, "eval", None)):  # schedule-free ones keep two sets of weights
            average()
        tokenizer = self.processing_class
        # accelerate has wrapped forward in it already, but the generate of adapters passes that by.
        with self.accelerator.autocast():
            found, self.predictions = evaluate_rows(student, tokenizer, rows, self.args.evaluation, progress)
        metrics = {f"{metric_key_prefix}{name.removeprefix('eval')}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any):
        """Refused: it would return logits alone, of encoded rows."""
        raise ValueError("Call evaluate() instead; what it finds of each row is in trainer.predictions.")

    # ---- projectors: their learning rate and calibration

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's groups, with the bridge's parameters in groups of their own learning rate.

        ValueError if the caller's optimizer lacks them and cannot take them, for it has a scheduler already.
        """
        given = self.optimizer is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)  # these own them
        optimizer = super().create_optimizer(model)
        ours = [p for n, p in self.model.named_parameters() if f"{NAME}." in n]
        if given:
            add_missing(optimizer, ours, self.lr_scheduler is not None)
        set_apart(optimizer, ours, self.args.projector.learning_rate)
        return optimizer

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Trainer.train, after what calibration.py measures on the first training rows.

        resume_from_checkpoint: a folder, or True for the newest whole checkpoint in output_dir. ValueError if there is
        none, or if it is of another run.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self.find_checkpoint(resume_from_checkpoint)
        if self.taught:
            self.calibrate()
        try:
            found = super().train(resume_from_checkpoint, *args, **kwargs)
            self.routing.finish(self.summed)
            return found
        finally:
            profiling.start(None)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Freezing):
                    callback.release()
            if self.use_cache is not None:
                self.model.config.use_cache = self.use_cache

    def calibrate(self) -> None:
        """See calibration.py; a map of matched layers is written to output_dir.

        Layers are matched once, with the student as it began: a second train() goes on with what they were taught by.
        """
        calibration = Calibration(
            self.bridge,
            self.teachers,
            self.train_dataset,
            lambda rows: self._prepare_inputs(self.data_collator(rows)),
            self.accelerator.autocast,
        )
        fixed_target = bool(self.bridge.projectors) and self.args.projector.direction == "student_to_teacher"
        match = self.args.alignment.layers.method == "cka" and not self.matched
        matched = calibration.run(self.model, match, fixed_target)
        self.matched |= bool(matched)
        self.panel.task_nll = self.bridge.task_nll
        if self.is_world_process_zero():
            for name, similarity in matched.items():
                save_layer_match(Path(str(self.args.output_dir)), name, similarity, self.bridge.layer_maps[name])
