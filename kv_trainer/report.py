"""What a person reads of a run: the header before it and the results after it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .alignment.layers import LayerMap
from .files import write_text
from .losses import DistillationLoss
from .types import KVShape


def axes_that_differ(student: KVShape, teachers: dict[str, KVShape], same_tokenizer: dict[str, bool]) -> list[str]:
    """The axes on which some teacher is unlike the student, in the order in which they are bridged."""
    differs: dict[str, Callable[[str, KVShape], bool]] = {
        "tokenizer": lambda name, shape: not same_tokenizer[name],
        "layers": lambda name, shape: shape.num_layers != student.num_layers,
        "heads": lambda name, shape: shape.num_kv_heads != student.num_kv_heads,
        "head width": lambda name, shape: shape.head_dim != student.head_dim,
        "RoPE base": lambda name, shape: shape.rope_theta != student.rope_theta,
        "family": lambda name, shape: shape.family != student.family,
    }
    return [axis for axis, test in differs.items() if any(test(name, shape) for name, shape in teachers.items())]


def print_header(
    console: Console,
    student: KVShape,
    teachers: dict[str, KVShape],
    differs: list[str],
    trainable: int,
    projector: int,
    projector_lr: float | None,
    learning_rate: float,
    losses: dict[str, DistillationLoss],
) -> None:
    """The models side by side, the axes that differ, and what is trained how.

    trainable: trainable parameters of the student; projector: those of the projectors, on top of them.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("student", *teachers):
        table.add_column(name, justify="right")
    shapes = (student, *teachers.values())
    for label, show in SHAPE_ROWS.items():
        own = show(student)
        marked = [f"[yellow]{v}[/]" if v != own and label not in UNMARKED else v for v in map(show, shapes)]
        table.add_row(f"[dim]{label}[/]", *marked)
    print_whole(console, table)
    console.print()
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="dim")
    facts.add_column()
    facts.add_row("differ in", ", ".join(differs) or "nothing")
    share = trainable / max(1, student.num_parameters)
    facts.add_row("trainable", f"{trainable:,} student parameters ({share:.0%}), learning rate {learning_rate:g}")
    if projector:
        rate = "" if projector_lr is None else f", learning rate {projector_lr:g}"
        facts.add_row("", f"{projector:,} projector parameters{rate}")
    for i, (name, loss) in enumerate(losses.items()):
        facts.add_row("" if i else "losses", _describe_loss(name, loss))
    console.print(facts)


def print_whole(console: Console, table: Table) -> None:
    """A table with all of its figures, on however narrow a terminal: its lines wrap rather than end."""
    needed = Measurement.get(console, console.options.update(max_width=10**4), table).maximum
    terminal, console.width = console.width, max(console.width, needed)
    console.print(table)
    console.width = terminal


def print_methods(section: str = "", console: Console | None = None) -> None:
    """What METHODS holds, or the part of it whose section begins with `section`. ValueError where nothing does."""
    from .methods import METHODS

    chosen = [method for method in METHODS if method.section.startswith(section)]
    if not chosen:
        known = ", ".join(dict.fromkeys(method.section for method in METHODS))
        raise ValueError(f"No method's section begins with '{section}'. Sections: {known}.")
    console, shown = console or Console(), ""
    for method in chosen:
        if method.section != shown:
            shown = method.section
            console.print(Text(shown, "bold"))
        console.print(Padding(Text(method.name), (0, 0, 0, 2), expand=False))
        more = {"needs": method.needs, "source": method.source}
        known = "; ".join(f"{name}: {value}" for name, value in more.items() if value != "-")
        console.print(Padding(Text.assemble(f"{method.what}. ", (known, "dim")), (0, 0, 0, 6), expand=False))


def save_layer_match(folder: Path, teacher: str, similarity: Tensor, layers: LayerMap) -> None:
    """The similarity [Ls, Lt] of matched layers and the map: layers_<teacher>.json, and a heat map beside it."""
    from .heatmap import draw_heatmap  # matplotlib takes a while to import

    chosen = list(layers.lower)
    text = json.dumps({"teacher": teacher, "layers": chosen, "cka": similarity.tolist()}, indent=1)
    write_text(folder / f"layers_{teacher}.json", text + "\n")
    draw_heatmap(
        similarity.tolist(), folder / f"layers_{teacher}.png", title=f"CKA with the layers of {teacher}",
        rows=[str(i) for i in range(similarity.shape[0])], columns=[str(i) for i in range(similarity.shape[1])],
        row_label="student layer", column_label="teacher layer", marks=chosen,
    )  # fmt: skip


def print_results(
    console: Console, results: dict[str, float], curve: Path | None, output_dir: str | os.PathLike[str]
) -> None:
    """The figures of a finished run, then where its files are.

    Known keys, all optional: eval_accuracy, eval_accuracy_<task> and _macro, eval_loss, eval_perplexity, loss_<term>,
    train_steps_per_second, peak_memory_mb, train_runtime (seconds). Others are not shown.
    """
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for label, value in result_rows(results):
        table.add_row(label, value)
    if table.row_count:
        console.print(table)
    for label, path in (("model", output_dir), ("curve", curve)):
        if path is not None:
            # soft_wrap: a path must stay one piece to be copied.
            console.print(f"{label}: {os.fspath(path)}", soft_wrap=True, markup=False, highlight=False)


def result_rows(results: dict[str, float]) -> list[tuple[str, str]]:
    """Label and printed value of every known figure, tasks before the overall answers."""
    tasks = [name for name in results if name.startswith("eval_accuracy_") and name != "eval_accuracy_macro"]
    terms = [name for name in results if name.startswith("loss_")]
    known: dict[str, tuple[str, Callable[[float], str]]] = {
        **{name: (f"exact answers, {name.removeprefix('eval_accuracy_')}", "{:.1%}".format) for name in tasks},
        "eval_accuracy_macro": ("exact answers, mean of the tasks", "{:.1%}".format),
        "eval_accuracy": ("exact answers", "{:.1%}".format),
        "eval_perplexity": ("perplexity", "{:.4g}".format),
        "eval_loss": ("evaluation loss", "{:.4g}".format),
        **{name: (f"last {name.removeprefix('loss_')} loss", "{:.4g}".format) for name in terms},
        "train_steps_per_second": ("steps per second", "{:.3g}".format),
        "peak_memory_mb": ("peak memory", lambda mb: f"{mb / 1024:.2f} GiB" if mb >= 1024 else f"{mb:.0f} MiB"),
        "train_runtime": ("training time", format_duration),
    }
    return [(label, show(results[name])) for name, (label, show) in known.items() if name in results]


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def format_count(count: int) -> str:
    """A number of parameters as people say it: 135.2M, 1.24B, 832k."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count < 100 * size else f"{count / size:.1f}{unit}"
    return str(count)


def _describe_loss(name: str, loss: DistillationLoss) -> str:
    rise = f", warmed up over {loss.warmup_ratio:.0%} of the run" if loss.warmup_ratio else ""
    return f"{name} x {loss.described_weight}, {loss.schedule}{rise}"


SHAPE_ROWS: dict[str, Callable[[KVShape], str]] = {
    "family": lambda shape: shape.family,
    "layers": lambda shape: str(shape.num_layers),
    "KV heads": lambda shape: str(shape.num_kv_heads),
    "head width": lambda shape: f"{shape.head_dim}" + (f" / {shape.value_dim}" if shape.value_dim else ""),
    "RoPE base": lambda shape: "none" if shape.rope_theta is None else f"{shape.rope_theta:,.0f}",
    "vocabulary": lambda shape: f"{shape.vocab_size:,}",
    "parameters": lambda shape: format_count(shape.num_parameters),
}
UNMARKED = ("vocabulary", "parameters")  # sizes, not axes to bridge
