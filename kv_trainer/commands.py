"""What each subcommand of kv-trainer does; heavy imports wait until one is chosen."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .arguments import Recipe


def train(options: argparse.Namespace, overrides: list[str]) -> int:
    recipe = load(options.recipe, overrides, options.quick)
    from .callbacks import ProfileSteps
    from .manifest import last_whole
    from .run import leave_together
    from .run import train as run_train

    watch = (lambda trainer: trainer.add_callback(ProfileSteps)) if options.profile else None
    try:
        run_train(recipe, resume="auto" if options.auto_resume else options.resume, watch=watch)
    except KeyboardInterrupt:
        found, _ = last_whole(Path(str(recipe.args.output_dir)))
        goes_on = f"--resume goes on from {found.name}" if found else "there is no checkpoint to go on from"
        if os.environ.get("RANK", "0") == "0":
            print(f"kv-trainer: stopped; {goes_on}", file=sys.stderr)
        return 130
    leave_together()
    return 0


def evaluate(options: argparse.Namespace, overrides: list[str]) -> int:
    recipe = load(options.recipe, overrides)
    from .run import evaluate as run_evaluate

    run_evaluate(options.model, recipe, options.predictions)
    return 0


def validate(options: argparse.Namespace, overrides: list[str]) -> int:
    """Check every recipe, also after one has failed: an `ok` line or an error each."""
    from .blueprint import check_models
    from .checks import check_wrong, doubtful, ignored
    from .experiments.experiment import is_experiment

    failed = False
    for path in options.recipes:
        try:
            if is_experiment(path):
                from .experiments.checks import describe

                refuse(overrides, "an experiment")
                line, told = describe(path, options.quick)
            else:
                recipe = load(path, overrides, options.quick)
                check_wrong(recipe.args)
                told = [*ignored(recipe.args, recipe.weights), *doubtful(recipe.args, recipe.weights)]
                told += check_models(recipe)
                line = summary(recipe)
            for message in told:
                print(f"kv-trainer: warning: {path}: {message}", file=sys.stderr)
        except (ValueError, OSError) as error:
            if options.traceback:
                raise
            complain(error)
            failed = True
        else:
            print(line)
    return 2 if failed else 0


def precompute(options: argparse.Namespace, overrides: list[str]) -> int:
    recipe = load(options.recipe, overrides)
    from .run import leave_together
    from .store.precompute import precompute as run_precompute

    run_precompute(recipe, options.repair)
    leave_together()
    return 0


def diagnose(options: argparse.Namespace, overrides: list[str]) -> int:
    recipe = load(options.recipe, overrides)
    from .experiments.diagnose import diagnose as run_diagnose

    run_diagnose(recipe, options.samples, options.write)
    return 0


def compare(options: argparse.Namespace, overrides: list[str]) -> int:
    """The runs of an experiment, and its report; the recipe's settings are in the file, for every arm."""
    refuse(overrides, "an experiment")
    if options.report_only and options.runs_from:
        raise ValueError("--runs-from takes runs, and --report-only reports those that are there; leave one out.")
    from .experiments.compare import compare as run_compare

    try:
        run_compare(
            options.experiment, options.quick, options.arms, options.seeds, options.report_only, options.runs_from
        )
    except KeyboardInterrupt:
        print("kv-trainer: stopped; the same command goes on with what is not finished", file=sys.stderr)
        return 130
    return 0


def export(options: argparse.Namespace, overrides: list[str]) -> int:
    """Every file written, a line each, and how far its logits are off; no recipe is read."""
    refuse(overrides, "export")
    from .export import export as run_export

    exported = run_export(options.model, options.format, options.output, options.trust_remote_code)
    for path in exported.files:
        print(path)
    print(f"largest difference of a logit: {exported.difference:.2g}")
    return 0


def methods(options: argparse.Namespace, overrides: list[str]) -> int:
    """The table of methods; no recipe is read."""
    refuse(overrides, "methods")
    from .report import print_methods

    print_methods(options.section)
    return 0


def refuse(overrides: list[str], what: str) -> None:
    """ValueError for settings where no recipe is read that they could change."""
    if overrides:
        hint = "; put them under overrides or arms in its file" if what == "an experiment" else ""
        raise ValueError(f"{what} takes no settings, but got {' '.join(overrides)}{hint}.")


def load(path: str, overrides: list[str], quick: bool = False) -> Recipe:
    """load_recipe, its warnings as one line each on stderr; a line of its own for a quick run."""
    from .recipes import load_recipe

    with warnings.catch_warnings(record=True) as caught:
        for category in (UserWarning, FutureWarning):  # ours, and what transformers calls deprecated
            warnings.simplefilter("default", category)
        recipe = load_recipe(path, overrides, quick)
    for warning in caught:
        print(f"kv-trainer: warning: {path}: {warning.message}", file=sys.stderr)
    if quick and os.environ.get("RANK", "0") == "0":
        print(describe_quick(recipe))
    return recipe


def describe_quick(recipe: Recipe) -> str:
    args, data = recipe.args, recipe.args.data
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    rows = [f"{data.max_train_samples or 'all'} rows to train on"]
    rows += [f"{data.max_eval_samples or 'all'} to evaluate on"] if data.eval_split else []
    saved = "no checkpoints" if args.save_strategy == "no" else "checkpoints"
    return f"quick run of {recipe.path}: {length}, {', '.join(rows)}, {saved}, in {args.output_dir}"


def summary(recipe: Recipe) -> str:
    teachers = [f"{name} ({teacher.model})" for name, teacher in recipe.teachers.items()]
    losses = [f"{name} x {loss.described_weight}" for name, loss in recipe.args.losses.items()]
    student = recipe.student.model or f"{recipe.student.config} (random weights)"
    return f"ok {recipe.path}: student {student}; teachers {', '.join(teachers) or 'none'}; losses {', '.join(losses)}"


def complain(error: Exception) -> None:
    print(f"kv-trainer: error: {' '.join(str(error).split())}", file=sys.stderr)
