"""A recipe carried out: what `kv-trainer train` and `kv-trainer evaluate` do."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import transformers
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from . import report
from .adapters import load_trained
from .arguments import EarlyStoppingConfig, Recipe, StudentConfig
from .blueprint import check_places
from .callbacks import METRICS_FILE, peak_memory_mb, read_metrics
from .data import EVALUATED, Reader, encode_rows, load_split
from .evaluation import evaluate_rows, write_predictions
from .facts import seconds_trained
from .files import read_json, write_text
from .manifest import STATE_FILE, differences, last_whole
from .models import load_tokenizer, same_tokenizer, stop_where_taught
from .quick import SUFFIX
from .recipe_tree import RecipeError
from .recipes import dump_recipe, saved_recipe, settings_of
from .resolve import loading
from .store.teacher import StoredTeacher
from .text import turn_end
from .trainer import MultiTeacherKVTrainer

logger = logging.getLogger(__name__)

PREDICTIONS, RESULTS = "predictions.jsonl", "all_results.json"


def build_trainer(recipe: Recipe) -> MultiTeacherKVTrainer:
    """The trainer a recipe describes; weights are loaded or drawn from its seed here."""
    data = recipe.args.data
    train = load_split(data, data.train_split, data.max_train_samples)
    evaluation = load_split(data, data.eval_split, data.max_eval_samples) if data.eval_split else None
    return MultiTeacherKVTrainer(
        model=recipe.student,
        teachers=recipe.teachers,
        args=recipe.args,
        train_dataset=train,
        eval_dataset=evaluation,
    )


def side_job(recipe: Recipe) -> Recipe:
    """The recipe for a trainer that trains nothing: it asks for no evaluations, and for no repository of the Hub."""
    args = copy(recipe.args)  # not `replace`, which would make TrainingArguments anew
    args.eval_strategy, args.load_best_model_at_end, args.push_to_hub = IntervalStrategy.NO, False, False
    args.eval_steps = args.metric_for_best_model = None
    args.early_stopping = EarlyStoppingConfig()
    return replace(recipe, args=args)


def check_folder(folder: Path, asked: str) -> None:
    """ValueError if an earlier run has left what a new one would overwrite, or --resume go on with.

    asked: the recipe of the new one. The same settings give the same run again, and those of --quick are trials.
    """
    found, _ = last_whole(folder)
    if found is not None:
        raise ValueError(
            f"{folder} holds {found.name} of an earlier run. Go on from it with --resume; or, to begin anew, give "
            "another training.output_dir, or remove its checkpoint-* folders."
        )
    weights = [path.name for path in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")) if (path / STATE_FILE).exists()]
    if weights:  # as with training.save_only_model: nothing can go on from them, but they are somebody's work
        raise ValueError(
            f"{folder} holds {', '.join(weights)} of an earlier run, which cannot be resumed; give another "
            "training.output_dir, or remove them."
        )
    if (folder / RESULTS).exists() and (folder / "recipe.yaml").exists() and not folder.name.endswith(SUFFIX):
        try:
            changed = differences(settings_of(saved_recipe(folder)), settings_of(asked))
        except RecipeError as error:  # of another version, or its files are gone
            changed = [str(error)]
        if changed:
            raise ValueError(
                f"{folder} holds a finished run of other settings ({'; '.join(changed[:3])}), which would be "
                "overwritten; give another training.output_dir, or remove it."
            )


def train(
    recipe: Recipe, resume: bool | Literal["auto"] = False, watch: Callable[[MultiTeacherKVTrainer], None] | None = None
) -> dict[str, float]:
    """Train, evaluate, and write everything a reader of output_dir looks for. Returns all results.

    resume: from the newest whole checkpoint; `auto`: from there, or from the start where there is none. watch: is given
    the trainer before it trains. ValueError, before anything is written, if there is no checkpoint to resume from, or
    one from which it is not asked to.
    """
    transformers.logging.set_verbosity_warning()
    args, folder = recipe.args, Path(str(recipe.args.output_dir))
    if resume == "auto":
        resume = last_whole(folder)[0] is not None
    wanted = args.resume_from_checkpoint or resume
    asked = dump_recipe(recipe)  # before the trainer, which changes some of the arguments it is given
    check_places(recipe)
    if not wanted:
        check_folder(folder, asked)
    trainer = build_trainer(recipe)
    trainer.recipe, trainer.recipe_text = recipe, asked
    if watch is not None:
        watch(trainer)
    main = trainer.is_world_process_zero()
    console = Console(quiet=not main)
    if args.store.path and not any(isinstance(t, StoredTeacher) for t in trainer.teachers.values()):
        logger.warning("store.path has no effect here: no teacher has source: store.")
    show_header(console, trainer)
    checkpoint = trainer.find_checkpoint(wanted) if wanted else None
    if main:
        write_text(folder / "recipe.yaml", asked)
    if checkpoint is not None:
        console.print(f"resuming from {checkpoint}")
    fit = trainer.train(resume_from_checkpoint=checkpoint)
    best = trainer.state.best_model_checkpoint
    if args.load_best_model_at_end and best is not None:
        how = f"{args.metric_for_best_model} {trainer.state.best_metric:.4g}"
        console.print(f"back to {Path(best).name} of {trainer.state.global_step} steps: {how}", highlight=False)
    last = {k: v for log in trainer.state.log_history for k, v in log.items() if k.startswith("loss_")}
    took = {**fit.metrics, "peak_memory_mb": peak_memory_mb()}
    if checkpoint is not None:
        took = told_before(folder) if trainer.ended else took | of_the_whole_run(folder, fit.metrics)
    results = {**took, **last}
    trainer.save_model(_internal_call=True)  # else it would push, and without the files that follow
    if trainer.eval_dataset is not None:
        results.update(trainer.evaluate())
    trainer.save_state()
    if main:
        write_text(folder / RESULTS, json.dumps(results, indent=2) + "\n")
        (folder / PREDICTIONS).unlink(missing_ok=True)  # of a run in this folder that had some
        if trainer.predictions:
            write_predictions(folder / PREDICTIONS, trainer.predictions)
        trainer.routing.save(folder)
        curve = trainer.draw_curve(folder)
        trainer.create_model_card()
        report.print_results(console, results, curve, folder)
    if args.push_to_hub:
        trainer.push_to_hub()
    return results


def told_before(folder: Path) -> dict[str, float]:
    """What training took, of a run that had come to its end before: as its results say, if it got as far as these."""
    found = read_json(folder / RESULTS) if (folder / RESULTS).exists() else {}
    return {name: value for name, value in found.items() if name.startswith("train_") or name == "peak_memory_mb"}


def of_the_whole_run(folder: Path, session: Mapping[str, float]) -> dict[str, float]:
    """What Trainer measures of a resumed run's last session, of the whole run: as metrics.jsonl has it.

    Trainer divides the steps of the run by the seconds of the session, and its losses by the steps of the run.
    """
    rows = [row for row in read_metrics(folder / METRICS_FILE) if row.get("loss") is not None and "event" not in row]
    seconds, found = seconds_trained(folder), {}
    if rows:
        steps = [now["step"] - before for now, before in zip(rows, [0, *(row["step"] for row in rows)])]
        found["train_loss"] = sum(n * row["loss"] for n, row in zip(steps, rows)) / max(1, sum(steps))
    if seconds:
        share = session["train_runtime"] / seconds
        speeds = {name: value * share for name, value in session.items() if name.endswith("_per_second")}
        found |= {"train_runtime": seconds, **speeds}
    return found


def show_header(console: Console, trainer: MultiTeacherKVTrainer) -> None:
    student = trainer.student_shape
    shapes = {name: teacher.shape for name, teacher in trainer.teachers.items()}
    same = {n: same_tokenizer(trainer.processing_class, t.reader.tokenizer) for n, t in trainer.teachers.items()}
    projector = sum(p.numel() for p in trainer.bridge.parameters())
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    report.print_header(
        console,
        student=student,
        teachers=shapes,
        differs=report.axes_that_differ(student, shapes, same),
        trainable=trainable - projector,
        projector=projector,
        projector_lr=trainer.args.projector.learning_rate if projector else None,
        learning_rate=trainer.args.learning_rate,
        losses=trainer.bridge.losses,
    )
    for name in trainer.teachers:
        share = trainer.aligned_share(name)  # encode_rows warns of less than half
        console.print(f"{name}: {share:.1%} of the student's positions are aligned")


def evaluate(model: str, recipe: Recipe, predictions: str | None = None) -> dict[str, float]:
    """The results table of a checkpoint on a recipe's evaluation split, without any teacher.

    predictions: a file for what was found of each row.
    """
    transformers.logging.set_verbosity_warning()
    data = recipe.args.data
    if not data.eval_split:
        raise ValueError("data.eval_split is null in the recipe, so there is nothing to evaluate on.")
    if predictions is not None and Path(predictions).is_dir():  # else the results would be lost at the end
        raise ValueError(
            f"--predictions {predictions} is a folder; name a file in it, such as {predictions}/rows.jsonl."
        )
    with loading("MODEL", model):
        student, tokenizer = load_evaluated(model, recipe.student)
        student = student.to(recipe.args.device)
    rows = load_split(data, data.eval_split, data.max_eval_samples)
    reader = Reader(tokenizer, recipe.student.chat)
    stop_where_taught(student, tokenizer, turn_end(reader))
    encoded = encode_rows(rows, reader, {}, data, keep=EVALUATED)
    results, found = evaluate_rows(student, tokenizer, encoded, recipe.args.evaluation)
    if predictions is not None:
        write_predictions(predictions, found)
    report.print_results(Console(), results, None, model)
    return results


def load_evaluated(model: str, section: StudentConfig) -> tuple[Any, PreTrainedTokenizerBase]:
    """A student that was saved, and its tokenizer; what its folder does not say is as the recipe's student has it."""
    options: dict[str, Any] = {"revision": section.revision} if model == section.model and section.revision else {}
    if section.dtype != StudentConfig.dtype:
        options["dtype"] = section.dtype
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    student = load_trained(model, section.model, section.trust_remote_code, **options)
    own = StudentConfig(model=model, revision=options.get("revision"), trust_remote_code=section.trust_remote_code)
    try:
        return student, load_tokenizer(own)
    except (OSError, ValueError):
        if section.tokenizer is None:
            raise
        logger.warning("%s holds no tokenizer that can be read; the recipe's is taken: %s.", model, section.tokenizer)
        return student, load_tokenizer(section)


def leave_together() -> None:
    """A rank that exits while another still talks to it would make that one fail at the very end."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
