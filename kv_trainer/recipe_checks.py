"""What no section of a recipe can see alone: each check says where in the file to look."""

from __future__ import annotations

from string import Formatter
from typing import Any

import torch
from transformers.optimization import get_scheduler

from .answers import RULES, wrong_with
from .arguments import Recipe, StudentConfig
from .balance import check_reference
from .callbacks import check_callbacks
from .losses import LOSSES, needs_teacher
from .recipe_tree import Node, RecipeError
from .recipe_values import plain, suggest

MEASURED = ("loss", "perplexity", "accuracy", "accuracy_macro")  # by an evaluation, besides each task's accuracy
TRACKERS = ("tensorboard", "wandb", "mlflow", "clearml", "trackio")  # that are called as their packages are
DTYPES = ("float32", "bfloat16", "float16", "auto")


def check_student(student: StudentConfig, tree: Node) -> None:
    where = tree.at("student")
    if student.model and student.config:
        where = tree.at("student", "config")
        raise RecipeError(f"student {where} has both 'model' and 'config'; give model (pretrained) or config (random).")
    if not student.model and not student.config:
        raise RecipeError(f"student {where} has neither 'model' nor 'config'; give one of them.")
    if student.config and student.keep_layers is not None:
        where = tree.at("student", "keep_layers")
        raise RecipeError(f"student.keep_layers {where} needs 'model': with 'config', set the layers in the config.")
    if student.config and not student.tokenizer:
        raise RecipeError(f"student {where} has 'config' but no 'tokenizer'; give a hub name or a folder.")


def check_peft(student: StudentConfig, tree: Node) -> None:
    """The section as peft would take it, which needs no model. What it targets is known once there is one."""
    if student.peft is not None:
        from .adapters import peft_config

        peft_config(tree.value["student"].value["peft"])


def check_losses(recipe: Recipe, tree: Node) -> None:
    """Losses that need a teacher, and teachers that need a loss."""
    users = [name for name, loss in recipe.args.losses.items() if needs_teacher(loss.needs)]
    if users and not recipe.teachers:
        raise RecipeError(f"losses.{users[0]} {tree.at('losses', users[0])} needs a teacher; add one under teachers.")
    if recipe.teachers and not users:
        name = next(iter(recipe.teachers))
        usable = ", ".join(loss for loss in LOSSES if needs_teacher(LOSSES[loss].requires))
        where = tree.at("teachers", name)
        raise RecipeError(f"teachers.{name} {where} would be ignored: no loss needs a teacher; add one of {usable}.")


def check_balance(recipe: Recipe, tree: Node) -> None:
    try:
        check_reference(recipe.args.losses, recipe.args.monitor.loss_scales_every)
    except ValueError as error:
        where = tree.at("losses" if str(error).startswith("losses") else "monitor")
        raise RecipeError(f"{where[0].upper()}{where[1:]}: {error}") from error


def check_store(recipe: Recipe, tree: Node) -> None:
    """Stored teachers need a store."""
    for name, teacher in recipe.teachers.items():
        if teacher.source == "store" and not recipe.args.store.path:
            where = tree.at("teachers", name, "source")
            raise RecipeError(f"teachers.{name}.source {where} is store; say where it is, store: {{path: ./store}}.")


def check_templates(recipe: Recipe, tree: Node) -> None:
    """Braces that are no template would be told of once all is loaded, without the line."""
    data = recipe.args.data
    templates = [((name,), getattr(data, name)) for name in ("prompt", "response", "answer", "task")]
    for keys, template in [*templates, *((("teacher_text", name), x) for name, x in data.teacher_text.items())]:
        try:
            columns = [column for _, column, _, _ in Formatter().parse(template or "")]
            wrong = "{} names no column" if "" in columns else None
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise RecipeError(
                f"data.{'.'.join(keys)} {tree.at('data', *keys)} is no template: {wrong}; write {{question}} for the "
                "column question, and double a brace that is text."
            )


def check_layers(recipe: Recipe, tree: Node) -> None:
    """An explicit layer map names every teacher."""
    layers, where = recipe.args.alignment.layers, tree.at("alignment", "layers", "map")
    if layers.map is not None and set(layers.map) != set(recipe.teachers):
        names, teachers = ", ".join(layers.map), ", ".join(recipe.teachers)
        raise RecipeError(f"alignment.layers.map {where} is for {names or 'nobody'}; the teachers are {teachers}.")


def check_evaluation(recipe: Recipe, tree: Node) -> None:
    args, where = recipe.args, tree.at("evaluation", "answer_pattern")
    if args.eval_strategy != "no" and args.data.eval_split is None:
        asked = tree.at("training", "eval_strategy")
        raise RecipeError(f"training.eval_strategy {asked} needs data to evaluate on; give data.eval_split.")
    check_best(recipe, tree)
    if wrong := wrong_with(args.evaluation.answer_pattern):
        hint = suggest(args.evaluation.answer_pattern, list(RULES)) if "no group" in wrong else ""
        raise RecipeError(f"evaluation.answer_pattern {where} {wrong}{hint}")


def check_best(recipe: Recipe, tree: Node) -> None:
    """What the best checkpoint is told by must be measured; Trainer would find out after the first evaluation."""
    args, where = recipe.args, tree.at("training", "metric_for_best_model")
    if args.metric_for_best_model is None or args.eval_strategy == "no":
        return
    name = args.metric_for_best_model.removeprefix("eval_")
    if name not in MEASURED and not name.startswith("accuracy_"):
        known = [*MEASURED, "accuracy_TASK"]
        hint = suggest(name, known)
        raise RecipeError(f"training.metric_for_best_model {where} is '{name}'; give one of {', '.join(known)}.{hint}")
    if name.startswith("accuracy") and not args.evaluation.generate:
        raise RecipeError(f"training.metric_for_best_model {where} is '{name}', which needs evaluation.generate: true.")


def check_schedule(recipe: Recipe, tree: Node) -> None:
    """The schedule with its settings, made once; Trainer would make it when all is loaded."""
    args, steps = recipe.args, 10**6
    knobs: Any = args.lr_scheduler_kwargs
    dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    try:
        get_scheduler(args.lr_scheduler_type, dummy, 1, steps, scheduler_specific_kwargs=knobs)
    except (TypeError, ValueError) as error:
        where, names = tree.at("training", "lr_scheduler_type"), ", ".join(knobs or ()) or "nothing"
        raise RecipeError(
            f"training.lr_scheduler_type {where} is {plain(args.lr_scheduler_type)}, which cannot be made with "
            f"lr_scheduler_kwargs of {names}: {str(error).rstrip('.')}."
        ) from error


def check_compiler(recipe: Recipe, tree: Node) -> None:
    backend, mode = recipe.args.torch_compile_backend, recipe.args.torch_compile_mode
    if not recipe.args.torch_compile:
        return
    if backend in (None, "inductor"):
        try:
            torch.compile(lambda: None, mode=mode)
        except RuntimeError as error:  # inductor names the modes it has
            where = tree.at("training", "torch_compile_mode")
            raise RecipeError(f"training.torch_compile_mode {where}: {error}") from error
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        where, hint = tree.at("training", "torch_compile_backend"), suggest(backend, known)
        raise RecipeError(
            f"training.torch_compile_backend {where} is '{backend}'; this torch has {', '.join(known)}.{hint}"
        )


def check_trackers(recipe: Recipe, tree: Node) -> None:
    """What is to be reported to must be installed; Trainer would fail on it once all is loaded."""
    given = recipe.args.report_to
    asked = [name for name in TRACKERS if isinstance(given, list) and name in given]
    if not asked:
        return
    from transformers.integrations import get_available_reporting_integrations

    there, where = get_available_reporting_integrations(), tree.at("training", "report_to")
    for name in asked:
        if name not in there:
            raise RecipeError(f"training.report_to {where} names {name}, which is not installed: pip install {name}.")


def check_around(recipe: Recipe, tree: Node) -> None:
    """Early stopping and growing accumulation, which lean on fields of `training`."""
    try:
        check_callbacks(recipe.args)
    except ValueError as error:
        section = "early_stopping" if str(error).startswith("early_stopping") else "accumulation"
        raise RecipeError(f"{section} {tree.at(section)}: {error}") from error


def check(recipe: Recipe, tree: Node) -> None:
    """What no section can see alone. RecipeError for the impossible; what has no effect is told by checks.ignored."""
    check_student(recipe.student, tree)
    check_peft(recipe.student, tree)
    for path, model in recipe.models.items():
        if model.dtype not in DTYPES:
            hint, where = suggest(model.dtype, DTYPES), tree.at(*path.split("."), "dtype")
            raise RecipeError(f"{path}.dtype {where} is '{model.dtype}'; give one of {', '.join(DTYPES)}.{hint}")
    if not recipe.args.data.path:
        raise RecipeError(f"data {tree.at('data')} has no 'path'; give a hub name, a folder or a file.")
    check_templates(recipe, tree)
    check_losses(recipe, tree)
    check_balance(recipe, tree)
    check_layers(recipe, tree)
    check_store(recipe, tree)
    check_evaluation(recipe, tree)
    check_around(recipe, tree)
    check_schedule(recipe, tree)
    check_compiler(recipe, tree)
    check_trackers(recipe, tree)
