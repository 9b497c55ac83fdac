"""`kv-trainer diagnose`: how hard every loss term of a recipe pulls, what it costs, and what to change."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..arguments import Recipe
from ..files import write_text
from ..recipes import dump_recipe, load_recipe
from ..report import print_whole
from ..run import build_trainer, side_job
from ..trainer import MultiTeacherKVTrainer
from .advice import COLLAPSED, INERT, LIMIT, Advice, advise, as_patch, is_inert, refuse_to_overwrite, write_copy
from .measure import Figure, Measured, Term, measure

FILE = "diagnosis.json"


def diagnose(recipe: Recipe, samples: int = 64, write: str | None = None, console: Console | None = None) -> Measured:
    """Measure a recipe's terms on some of its training rows, print them with advice, and write diagnosis.json.

    write: a new recipe file with the suggested settings, which extends this one or, where the command line changed it,
    holds all that was measured. The student is not trained.
    ValueError if there is nothing to measure, or `write` is there already.
    """
    if samples < 1:
        raise ValueError(f"--samples is {samples}; give 1 or more.")
    if write is not None:
        refuse_to_overwrite(write)
    if recipe.args.world_size > 1:
        raise ValueError("diagnose runs in one process; start it without accelerate or torchrun.")
    asked = dump_recipe(recipe)  # before the trainer, which changes some of the arguments it is given
    transformers.logging.set_verbosity_warning()
    trainer = build_trainer(side_job(recipe))
    if trainer.taught:
        with output_elsewhere(trainer):
            trainer.calibrate()
    measured = measure(trainer, samples)
    advice = advise(measured, trainer.bridge.fusion.in_target_space)
    patch = as_patch(advice)
    found = {"recipe": recipe.path, **asdict(measured), "advice": [one.words for one in advice], "patch": patch}
    file = Path(str(trainer.args.output_dir)) / FILE
    write_text(file, json.dumps(found, indent=2) + "\n")
    console = console or Console()
    print_diagnosis(console, measured, advice, trainer.args.per_device_train_batch_size)
    if write is not None and patch:
        alone = asked == dump_recipe(load_recipe(recipe.path))
        write_copy(write, recipe.path, patch, None if alone else asked)
    tell(console, "diagnosis", str(file))
    if write is not None:
        tell(console, "recipe", write if patch else f"nothing to change, so {write} was not written")
    return measured


@contextmanager
def output_elsewhere(trainer: MultiTeacherKVTrainer) -> Iterator[None]:
    """What calibration draws for a run is not kept: it is no run."""
    kept = trainer.args.output_dir
    with tempfile.TemporaryDirectory() as folder:
        trainer.args.output_dir = folder
        try:
            yield
        finally:
            trainer.args.output_dir = kept


def tell(console: Console, label: str, path: str) -> None:
    # soft_wrap: a path must stay one piece to be copied.
    console.print(f"{label}: {path}", soft_wrap=True, markup=False, highlight=False)


def print_diagnosis(console: Console, measured: Measured, advice: Sequence[Advice], batch_size: int) -> None:
    """The table of terms, what its columns mean, and the advice; 120 columns hold it."""
    batches = f"{measured.batches} micro-batch{'es' if measured.batches > 1 else ''}"
    console.print(
        f"[dim]{measured.samples} training samples in {batches} of up to {batch_size}: mean ± deviation over them. "
        "Every term in full: weight at its peak, all layers in, attention weighting on.[/]"
    )
    console.print()
    print_whole(console, table_of(measured.terms))
    console.print()
    notes = Table(box=None, pad_edge=False, show_header=False)
    notes.add_column(style="dim")
    notes.add_column()
    for title, (meaning, applies) in MEANINGS.items():
        if any(applies(term) for term in measured.terms.values()):
            notes.add_row(title, meaning)
    if measured.collapse is not None:
        style = "yellow" if measured.collapse < COLLAPSED else ""
        notes.add_row("target of kv", f"variance {measured.collapse:+.0%} when its projectors learn alone", style=style)
    console.print(notes)
    console.print()
    for one in advice:
        console.print(f"- {escape(one.words)}", highlight=False)
    if not advice:
        console.print("Nothing to change.")


MEANINGS: dict[str, tuple[str, Callable[[Term], bool]]] = {
    "weight *": ("follows a share of the gradient, and would begin here", lambda term: term.follows is not None),
    "gradient": (
        "norm of the weighted term's gradient on the student, over the cross-entropy's",
        lambda term: term.gradient_share is not None,
    ),
    "other text": (
        f"cosine of its gradients with own teachers and with another row's; above {INERT}: inert",
        lambda term: term.shuffled_cosine is not None,
    ),
    "attention": ("what attention weighting changes in the value", lambda term: term.attention_percent is not None),
    "memory, time": ("what the term adds to a micro-batch, beside the student's own passes", lambda term: True),
}


def table_of(terms: dict[str, Term]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("term", no_wrap=True)
    for title in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    for name, term in terms.items():
        pull, cosine = term.gradient_share, term.shuffled_cosine
        table.add_row(
            name,
            f"{term.weight:.4g}" + ("" if term.follows is None else " *"),
            show(term.value),
            show(term.weighted),
            f"{term.share.mean:.1%}±{term.share.std:.1%}",
            "-" if pull is None else marked(show(pull), pull.mean > LIMIT),
            "-" if cosine is None else marked(f"{cosine:.2f}", is_inert(term)),
            "-" if term.attention_percent is None else f"{term.attention_percent:+.1f}%",
            f"{term.memory / 2**20:.1f} MiB",
            f"{1000 * term.seconds:.3g} ms",
        )
    return table


COLUMNS = ("weight", "raw value", "weighted", "of total", "gradient", "other text", "attention", "memory", "time")


def show(figure: Figure) -> str:
    """Three digits of the mean, and the deviation to the same place: 1.30±0.01."""
    places = 2 - math.floor(math.log10(abs(figure.mean))) if figure.mean else 2
    places = min(5, max(0, places))
    return f"{figure.mean:.{places}f}±{figure.std:.{places}f}"


def marked(text: str, wrong: bool) -> str:
    return f"[yellow]{text}[/]" if wrong else text
