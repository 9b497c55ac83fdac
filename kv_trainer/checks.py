"""Settings of a run that would be silently inert or wrong."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sized
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from datasets import Dataset

from .answers import wrong_with
from .arguments import AlignmentConfig, MultiTeacherKVConfig, ProjectorConfig
from .fusion import Confidence, Fixed, Router
from .losses import KVRelationLoss, LayerwiseLoss, needs_teacher

logger = logging.getLogger(__name__)
# Of Trainer's own evaluation, which ours takes the place of.
TRAINERS_EVALUATION = (
    "per_device_eval_batch_size", "eval_accumulation_steps", "bf16_full_eval", "fp16_full_eval", "prediction_loss_only",
)  # fmt: skip
SAVE_STEPS = next(f.default for f in fields(MultiTeacherKVConfig) if f.name == "save_steps")


def check_arguments(args: MultiTeacherKVConfig, weights: Mapping[str, float]) -> None:
    """Refuse what would be silently wrong, warn about what would be inert. weights: each teacher's own, by name."""
    for message in [*ignored(args, weights), *doubtful(args, weights)]:
        logger.warning(message)
    if args.n_gpu > 1:
        logger.warning(
            "One process sees %d GPUs and trains on the first; accelerate launch uses all of them. The others are free "
            "for teachers with a device_map.", args.n_gpu,
        )  # fmt: skip
        args._n_gpu = 1  # else Trainer takes nn.DataParallel, whose replicas would share one bridge
    check_launcher(args.deepspeed)
    check_wrong(args)


def doubtful(args: MultiTeacherKVConfig, weights: Mapping[str, float]) -> list[str]:
    """Settings that do not go well together, a sentence each. weights: each teacher's own, by name."""
    found, size = [], args.per_device_train_batch_size
    relation = args.losses.get("kv_relation")
    group = relation.samples if isinstance(relation, KVRelationLoss) else 1
    for name, loss in args.losses.items() if args.gradient_accumulation_steps > 1 else ():
        samples = getattr(loss, "samples", 1)
        if size % samples:
            found.append(
                f"losses.{name}.samples is {samples}, and a micro-batch has {size} samples: its last group is "
                "smaller, and a step depends on how it is cut into micro-batches."
            )
    if group > 1 and len(weights) > 1 and args.fusion.needs:
        found.append(
            f"losses.kv_relation.samples is {group}: where a group's samples are trusted to different "
            "teachers, each one's states are centred over its own samples and the student's over all, so the term "
            "does not reach 0. Compare it with samples: 1, or take fusion: {method: uniform}."
        )
    if args.torch_compile and args.gradient_checkpointing:
        found.append(
            "torch_compile with gradient checkpointing breaks the student's graph in every layer, where keys and "
            "values are taken: the results are right, but little is gained. Set one of them to false."
        )
    return found


def check_wrong(args: MultiTeacherKVConfig) -> None:
    """ValueError for settings under which a run would be silently wrong."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and args.world_size == 1:
        raise ValueError(
            f"{launched} processes were launched, and each would train alone, into the same folder: Trainer sees no "
            "device for them. On CPUs set training.use_cpu: true."
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            "training.average_tokens_across_devices: false would count the tokens of one process, and weigh the "
            "cross-entropy by the number of processes; leave it out."
        )
    how = args.control.shuffle
    if how in ("rows", "rows_of_task") and args.per_device_train_batch_size < 2:
        raise ValueError(f"control.shuffle: {how} needs training.per_device_train_batch_size of 2 or more.")
    engine = getattr(args.deepspeed_plugin, "deepspeed_config", None) or {}
    sizes = {f"training.parallelism_config has {n}_size": getattr(args.parallelism_config, f"{n}_size", 1)
             for n in ("tp", "cp", "sp")}  # fmt: skip
    sizes["The DeepSpeed config has autotp_size"] = (engine.get("tensor_parallel") or {}).get("autotp_size", 1)
    for place, size in sizes.items():
        if size > 1:
            raise ValueError(
                f"{place} {size}: a student in parts has no whole keys and values. Leave it out; ZeRO-3 and FSDP2 deal "
                "out weights, not states."
            )
    if wrong := wrong_with(args.evaluation.answer_pattern):
        raise ValueError(f"evaluation.answer_pattern {wrong}")
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, None):
            raise ValueError(
                f"training.accelerator_config.{name} cuts batches that are already put together for all models; leave "
                "it out, and give each process its own: per_device_train_batch_size."
            )
    options = args.gradient_checkpointing_kwargs
    if args.gradient_checkpointing and isinstance(options, dict) and options.get("use_reentrant"):
        raise ValueError(
            "gradient_checkpointing_kwargs: {use_reentrant: true} gives keys and values no gradient; set it to false."
        )
    taken = [name for name in ("optimizer", "scheduler") if name in engine]
    if taken:
        raise ValueError(
            f"The DeepSpeed config has a section {' and a section '.join(taken)}, which would overrule the recipe; "
            "leave it out: training.optim, training.lr_scheduler_type and projector.learning_rate decide."
        )
    if args.label_smoothing_factor:
        raise ValueError("training.label_smoothing_factor would be ignored; set losses.cross_entropy.label_smoothing.")


def check_batches(args: MultiTeacherKVConfig, loader: Any, rows: Sized) -> None:
    """ValueError if a loader with a length has no batch: all that is there would be dropped."""
    if hasattr(loader, "__len__") and not len(loader):
        raise ValueError(
            f"Nothing would be trained: {len(rows)} rows are fewer than a batch of "
            f"{args.train_batch_size * args.world_size}, and training.dataloader_drop_last drops what is left over."
        )


def check_launcher(deepspeed: Any) -> None:
    """ValueError for DeepSpeed in a process that nobody launched: it would look for MPI, in the midst of things."""
    if deepspeed and "RANK" not in os.environ and find_spec("mpi4py") is None:
        raise ValueError("training.deepspeed needs a launcher: accelerate launch -m kv_trainer train RECIPE.")


def check_best_task(args: MultiTeacherKVConfig, rows: Dataset | None) -> None:
    """ValueError if the best checkpoint is to be told by a task that no evaluated row has."""
    name = str(args.metric_for_best_model).removeprefix("eval_")
    if rows is None or not name.startswith("accuracy_") or name == "accuracy_macro":
        return
    tasks = sorted(str(task) for task in rows.unique("task")) if "task" in rows.column_names else []
    if name.removeprefix("accuracy_") not in tasks:
        known = f"they are {', '.join(tasks)}" if tasks else "the rows have none"
        raise ValueError(f"training.metric_for_best_model is {name}, but no task of that name is evaluated; {known}.")


def ignored_of_projector(args: MultiTeacherKVConfig) -> list[str]:
    """Settings of `projector` without effect; its learning rate is that of all that is trained beside the student."""
    needs = frozenset().union(*(loss.needs for loss in args.losses.values() if loss.active))
    changed = {f.name for f in fields(ProjectorConfig) if getattr(args.projector, f.name) != f.default}
    method, mapped = args.projector.method, "projectors" in needs
    other = isinstance(args.fusion, Router) or "hidden_projectors" in needs
    bottleneck = {"mlp_ratio", "dropout", "layer_norm", "activation"}
    idle = {"init", "learning_rate", *bottleneck} if method == "none" else bottleneck
    if not mapped:
        inert = changed - ({"learning_rate"} if other else set())
        return ["projector has no effect: no loss of this recipe uses projectors."] if inert else []
    inert = changed & idle if method != "elastic_bottleneck" else set()
    inert -= {"learning_rate"} if other else set()
    why = "method none has no trainable map" if method == "none" else "it is of method elastic_bottleneck"
    return [f"projector.{knob} has no effect: {why}." for knob in sorted(inert)]


def ignored(args: MultiTeacherKVConfig, weights: Mapping[str, float]) -> list[str]:
    """Settings that differ from their defaults and have no effect. weights: each teacher's own, by name."""
    found = []
    weighted = [name for name, weight in weights.items() if weight != 1.0]
    if weighted and not isinstance(args.fusion, Fixed):
        found.append(f"teachers.{weighted[0]}.weight has no effect: it needs fusion.method: fixed.")
    found += ignored_of_projector(args)
    if args.fusion != Confidence() and len(weights) == 1:
        found.append("fusion has no effect: there is one teacher.")
    found += [
        f"training.{f.name} has no effect: the section evaluation says how it is done; see evaluation.batch_size."
        for f in fields(args) if f.name in TRAINERS_EVALUATION and getattr(args, f.name) != f.default
    ]  # fmt: skip
    for name, loss in args.losses.items():
        if isinstance(loss, LayerwiseLoss) and loss.attention != "none" and 0 < args.max_steps <= loss.attention_starts:
            found.append(
                f"losses.{name}.attention has no effect: it begins at step {loss.attention_starts:,}, and the run has "
                f"{args.max_steps:,}; set attention_warmup_steps."
            )
    rhythm = {"eval": args.eval_steps is not None, "save": args.save_steps != SAVE_STEPS}
    for what, given in rhythm.items():
        strategy = getattr(args, f"{what}_strategy")
        if given and strategy != "steps":
            found.append(
                f"training.{what}_steps has no effect: training.{what}_strategy is {strategy.value}; set it to steps."
            )
    if args.metric_for_best_model is not None and args.eval_strategy == "no":
        found.append("training.metric_for_best_model has no effect: training.eval_strategy is no.")
    if args.evaluation.do_sample and not args.evaluation.generate:
        found.append("evaluation.do_sample has no effect: evaluation.generate is false.")
    if weights and not any(needs_teacher(loss.needs) for loss in args.losses.values() if loss.active):
        found.append("teachers has no effect: no loss needs one; add to losses one that does, such as kv_relation.")
    if not weights:
        alone = {"fusion": args.fusion != Confidence(), "alignment": args.alignment != AlignmentConfig(),
                 "control.shuffle": args.control.shuffle is not None}  # fmt: skip
        found += [f"{name} has no effect: there is no teacher." for name, changed in alone.items() if changed]
    return found
