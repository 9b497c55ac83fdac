"""What a store is of, written before its first shard, and held against what its folder has already."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..arguments import Recipe, StoreConfig
from ..fusion import method_of
from ..manifest import differences, files_fingerprint, tokenizer_hash
from ..trainer import MultiTeacherKVTrainer
from .shards import FORMAT, RECORD, damaged, opens, read_record
from .teacher import how_loaded, keys_of, what_is_read

BITS = 8
BEGUN = "begun.json"  # what a store is being made of, until store.json is written


def describe(trainer: MultiTeacherKVTrainer, recipe: Recipe) -> dict[str, Any]:
    """What the store is of, known before it is written."""
    args, shape = recipe.args, trainer.student_shape
    needs, fusion = trainer.bridge.teacher_needs(), args.fusion
    form = {} if form_of(args.store) == "raw" else {"num_layers": shape.num_layers, "kv_layers": []}
    teachers = {
        name: {
            **{k: v for k, v in trainer.manifest["teachers"][name].items() if k != "weight"},
            "asked_revision": recipe.teachers[name].revision, "chat": recipe.teachers[name].chat,
            "files": files_fingerprint(str(recipe.teachers[name].model), recipe.teachers[name].revision),
            "text": what_is_read(args.data, name), "loaded": how_loaded(recipe.teachers[name]),
            "shape": {**asdict(teacher.shape), **form, "aligned": False},
            "scores": len(trainer.teachers) > 1, "importance": needs.importance,
            "data": digest_of_rows(trainer.train_dataset, name, form_of(args.store)),
        }
        for name, teacher in trainer.teachers.items()
    }  # fmt: skip
    return {
        "format": FORMAT, "form": form_of(args.store), "bits": args.store.bits or BITS,
        "rows_per_shard": args.store.rows_per_shard,
        "rows": len(trainer.train_dataset), "teachers": teachers, "alignment": asdict(args.alignment),
        "student": {
            "tokenizer": tokenizer_hash(trainer.processing_class), "chat": trainer.reader.chat,
            "layers": shape.num_layers, **({} if trainer.matched_by is None else {"weights": trainer.matched_by}),
        },
        "fusion": {"method": method_of(fusion), **asdict(fusion)},
        "weights": {name: teacher.weight for name, teacher in trainer.teachers.items()},
    }  # fmt: skip


def digest_of_rows(rows: Dataset, name: str, form: str) -> str:
    """Of all that a teacher reads, in its order: a shard is that of a number of rows."""
    return hashlib.sha256(json.dumps(list(keys_of(rows, name, form))).encode()).hexdigest()[:16]


def to_make_again(folder: Path, repair: bool) -> set[str]:
    """Shards that cannot be opened and, with `repair`, that are not as store.json has them.

    ValueError for these without it: to write store.json anew would call them whole.
    """
    known = (folder / RECORD).exists()
    bad = set(damaged(folder, read_record(folder), whole=True)) if known else set()
    if not repair and any((folder / shard).exists() for shard in bad):
        raise ValueError(
            f"{folder} is damaged: {', '.join(sorted(bad)[:5])}; run kv-trainer precompute RECIPE --repair."
        )
    return bad | {str(p.relative_to(folder)) for p in folder.glob("*/*.safetensors") if not opens(p)}


def form_of(store: StoreConfig) -> str:
    return store.form or "aligned"


def check_same(folder: Path, begun: dict[str, Any]) -> None:
    """ValueError if the folder holds, or was to hold, a store of something else."""
    path = folder / BEGUN
    if path.exists():
        saved, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(begun))
        for name, teacher in saved["teachers"].items():  # of an older version, which did not say
            told = now["teachers"].get(name, {})
            for key in ("files", "data"):
                teacher.setdefault(key, told.get(key))
            teacher["loaded"] = {**told.get("loaded", {}), **teacher.get("loaded", {})}
        found = differences(saved, now)
        if found:
            raise ValueError(f"{folder} holds a store of something else: {'; '.join(found)}. Give a new store.path.")
