"""`kv-trainer precompute`: every training row through every teacher, once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..alignment.mapping import align
from ..arguments import Recipe
from ..calibration import ROWS as CALIBRATION_ROWS
from ..files import write_text
from ..profiling import clocks
from ..run import build_trainer, side_job
from ..trainer import MultiTeacherKVTrainer
from .begin import BEGUN, BITS, check_same, describe, form_of, to_make_again
from .shards import RECORD, checksum, shard_figures, write_shard
from .teacher import WHOLE, check_has, key_of


def precompute(recipe: Recipe, repair: bool = False) -> dict[str, Any]:
    """Write the store of a recipe; go on where an interrupted run stopped. Returns what store.json holds.

    repair: only the shards whose checksum is not that of store.json. Several processes share the shards. ValueError if
    the folder holds a store of something else.
    """
    store = recipe.args.store
    if not store.path:
        raise ValueError("store.path is missing: say where the store is to be, store: {path: ./store}.")
    if not recipe.teachers:
        raise ValueError("The recipe has no teachers, so there is nothing to store.")
    live = {name: replace(teacher, source="live") for name, teacher in recipe.teachers.items()}
    job = side_job(replace(recipe, teachers=live))
    job.args.data = replace(job.args.data, eval_split=None)
    trainer = build_trainer(job)
    raw, folder, console = form_of(store) == "raw", Path(store.path), Console(quiet=not trainer.is_world_process_zero())
    check_placement(trainer.teachers, trainer.args.world_size)
    begun = describe(trainer, recipe)
    check_same(folder, begun)
    for name in trainer.teachers:  # before the pass that nobody could use
        check_has(name, WHOLE, trainer.bridge.teacher_needs(), form_of(store))
    bad = to_make_again(folder, repair)
    trainer.calibrate()
    for name, teacher in trainer.teachers.items():  # likelihoods too: they are cheap now, and every fusion may ask
        needs = replace(trainer.bridge.teacher_needs(), scores=len(trainer.teachers) > 1)
        teacher.prepare(teacher.shape.layer_numbers if raw else trainer.bridge.layer_maps[name].needed, needs)
    if trainer.is_world_process_zero():
        write_text(folder / BEGUN, json.dumps(begun, indent=1) + "\n")
    trainer.accelerator.wait_for_everyone()
    began, made = clocks(), 0
    shards = range(0, len(trainer.train_dataset), store.rows_per_shard)
    mine = [s for i, s in enumerate(shards) if i % trainer.args.world_size == trainer.args.process_index]
    for start in track(mine, "precomputing", console=console):
        files = {name: f"{name}/{start // store.rows_per_shard:05d}.safetensors" for name in trainer.teachers}
        missing = {name: file for name, file in files.items() if not (folder / file).exists() or file in bad}
        if missing:
            end = min(start + store.rows_per_shard, len(trainer.train_dataset))
            write_rows(trainer, folder, missing, range(start, end))
            made += end - start
    spent = {name: then - began[name] for name, then in clocks().items()}
    pace = pace_of_ranks([(made, spent)] if trainer.args.world_size == 1 else gather_object([(made, spent)]))
    trainer.accelerator.wait_for_everyone()
    pace = pace or pace_of(folder)
    record = finish(trainer, folder, {**begun, "seconds_a_row": pace})
    took = "" if pace is None else f"; {pace['wall']:.3g} s a row, {pace['processor']:.3g} of them the processor's"
    console.print(
        f"{folder}: {record['bytes'] / 1e6:,.1f} MB, {record['share_of_raw']:.1%} of the teachers' own keys and values "
        f"in float16; error {record['relative_error']:.2%} of their size{took}"
    )
    return record


def pace_of_ranks(told: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float] | None:
    """Of the slowest rank's seconds, by all rows that were made; None where none was."""
    rows = sum(made for made, _ in told)
    return {name: max(spent[name] for _, spent in told) / rows for name in told[0][1]} if rows else None


def pace_of(folder: Path) -> dict[str, float] | None:
    """Seconds a row, of every clock, as they were when the folder's rows were stored; None: nobody knows."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")).get("seconds_a_row") if path.exists() else None


def check_placement(teachers: Mapping[str, Any], processes: int) -> None:
    """ValueError for weights that all processes must gather at once, where each of several stores other rows."""
    for name, teacher in teachers.items():
        if processes > 1 and teacher.placement == "sharded":
            raise ValueError(
                f"teachers.{name}.placement is sharded: its weights are gathered by all processes at once, but each "
                "stores other rows. Take placement: replicated or offloaded, or a device_map, or one process."
            )


def write_rows(trainer: MultiTeacherKVTrainer, folder: Path, names: dict[str, str], numbers: range) -> None:
    """One shard of each teacher in `names`, of these rows of the data set."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in trainer.teachers}
    raw = dict.fromkeys(trainer.teachers, 0)
    size = trainer.args.per_device_train_batch_size
    for first in range(numbers.start, numbers.stop, size):
        some = [trainer.train_dataset[i] for i in range(first, min(first + size, numbers.stop))]
        for name, found, length in signals(trainer, some, first):
            rows[name] += found
            raw[name] += length
    for name, file in names.items():
        write_shard(folder / file, rows[name], trainer.args.store.bits or BITS, raw[name])


@torch.no_grad()
def signals(
    trainer: MultiTeacherKVTrainer, rows: list[Any], first: int
) -> Iterator[tuple[str, list[dict[str, Any]], int]]:
    """Of some rows, teacher by teacher: what is stored of each, and the bytes of its own states in float16.

    first: the number of the first of them. Those that calibration reads are stored whole, whoever has a share of them.
    """
    batch: dict[str, Any] = trainer._prepare_inputs(trainer.data_collator(rows))
    panel, bridge = trainer.panel, trainer.bridge
    said = {name: t.signal(batch["teachers"][name]) for name, t in trainer.teachers.items()}
    shares = None
    if panel.fusion.remembered and len(said) > 1:
        nll, entropy = (torch.stack([getattr(s, what) for s in said.values()]) for what in ("nll", "entropy"))
        shares = panel.shares(batch, nll, entropy)
    for number, (name, signal) in enumerate(said.items()):
        if form_of(trainer.args.store) == "raw":
            states, weighs = signal.kv, signal.importance
        else:
            aligned = align(signal, bridge.layer_maps[name], batch["attention_mask"])
            states, weighs = aligned.kv, aligned.importance
        width = sum(x[0].shape[0] * x[0].shape[-1] for k, v in zip(signal.kv.keys, signal.kv.values) for x in (k, v))
        flat = {part: flattened(getattr(states, part)) for part in ("keys", "values")}
        found = []
        for b, row in enumerate(rows):
            measured = first + b < CALIBRATION_ROWS
            asked = shares is None or measured or bool(shares[number, b] > 0)  # else it is never asked for
            position = states.mask[b].nonzero()[:, 0] if asked else torch.zeros(0, dtype=torch.long)
            position = position.to(batch["labels"].device)
            found.append({
                "key": key_of(row, name, form_of(trainer.args.store)), "position": position.cpu(), "asked": asked,
                "nll": None if signal.nll is None else signal.nll[b].cpu(),
                "entropy": None if signal.entropy is None else signal.entropy[b].cpu(),
                "importance": None if weighs is None else weighs[b][position].cpu(),
                **{part: x[b][position].cpu() for part, x in flat.items()},
            })  # fmt: skip
        yield name, found, 2 * width * int(signal.kv.mask.sum())


def flattened(states: tuple[Tensor, ...]) -> Tensor:
    """[B, H, T, D] a layer -> [B, T, L * H * D]."""
    return torch.stack(states, dim=2).permute(0, 3, 2, 1, 4).flatten(2)


def finish(trainer: MultiTeacherKVTrainer, folder: Path, begun: dict[str, Any]) -> dict[str, Any]:
    """Write store.json, with the size and checksum of each shard, and what was lost."""
    files = sorted(p for name in trainer.teachers for p in (folder / name).glob("*.safetensors"))
    figures = [shard_figures(path) for path in files]
    size = sum(p.stat().st_size for p in files)
    raw, errors, squares = (sum(f[name] for f in figures) for name in ("raw_bytes", "errors", "squares"))
    record = {
        **begun, "bytes": size, "share_of_raw": size / max(1.0, raw),
        "left_out": int(sum(f["left_out"] for f in figures)), "relative_error": (errors / max(1e-12, squares)) ** 0.5,
        "shards": {str(p.relative_to(folder)): told(p) for p in files},
    }  # fmt: skip
    for name, teacher in trainer.teachers.items():
        shape = teacher.shape
        layers = len(shape.layer_numbers) if begun["form"] == "raw" else trainer.student_shape.num_layers
        heads = shape.num_kv_heads
        widths = {"keys": shape.head_dim, "values": shape.value_dim or shape.head_dim}
        record["teachers"][name]["channels"] = {part: layers * heads * width for part, width in widths.items()}
        record["teachers"][name]["aligned_share"] = trainer.aligned_share(name)
    if trainer.is_world_process_zero():
        write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    trainer.accelerator.wait_for_everyone()
    return record


def told(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": checksum(path)}
