"""Hashes by which two runs are told to have begun alike: files, weights, rows, and what a split shares with another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn

from ..bridge import NAME
from ..data import IGNORED
from ..manifest import files_fingerprint

READ_WITH = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # beside weights


def digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def hash_code() -> str:
    """Of this package's own sources: two runs by one version may still be of two commits."""
    root = Path(__file__).parents[1]
    return digest(*(path.read_bytes() for path in sorted(root.rglob("*.py"))))[:12]


CODE = hash_code()  # while the sources are those that are imported


def hash_inputs(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Of all models and rows that a resolved recipe names by a path on this machine, by the place that names them."""
    teachers = recipe.get("teachers") or {}
    models = {"student": recipe.get("student"), **{f"teachers.{name}": teacher for name, teacher in teachers.items()}}
    named = {f"{place}.{key}": (hash_model, (model or {}).get(key))
             for place, model in models.items() for key in ("model", "tokenizer", "config")}  # fmt: skip
    named["data.path"] = hash_files, (recipe.get("data") or {}).get("path")
    return {place: hashed(path) for place, (hashed, path) in named.items() if path and Path(path).exists()}


@cache
def hash_model(path: str) -> str:
    """Of a folder's weights, a few values of each tensor, and of what they are read with; of a file, all of it."""
    if not Path(path).is_dir():
        return hash_files(path)
    beside = [file for name in READ_WITH if (file := Path(path, name)).exists()]
    return digest(str(files_fingerprint(path)).encode(), *(file.read_bytes() for file in beside))[:16]


@cache
def hash_files(path: str) -> str:
    """Of a file, or of all files of a folder with their names, but for hidden ones."""
    root, found = Path(path), hashlib.sha256()
    for file in sorted(f for f in root.rglob("[!.]*") if f.is_file()) if root.is_dir() else [root]:
        found.update(file.relative_to(root).as_posix().encode())
        with file.open("rb") as read:
            while part := read.read(1 << 20):
                found.update(part)
    return found.hexdigest()[:16]


def hash_weights(model: nn.Module) -> str:
    """Of the student's parameters and buffers by name, without the bridge; of adapters their base's, by its own names.

    Adapters begin as nothing, so an arm that trains them begins as one that trains the weights themselves.
    """
    found, state = hashlib.sha256(), model.state_dict()
    if isinstance(model, PeftModel):
        adapters = (str(model.base_model.prefix), "modules_to_save.")
        state = {
            name.removeprefix("base_model.model.").replace("base_layer.", "").replace("original_module.", ""): tensor
            for name, tensor in state.items() if not any(part in name for part in adapters)
        }  # fmt: skip
    for name, tensor in sorted(state.items()):
        if f"{NAME}." not in name:
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + flat.numpy().tobytes())
    return found.hexdigest()


def hash_rows(rows: Dataset) -> str:
    """Of the student's tokens and labels of all rows, in order: the text on which it learns the next token."""
    return hash_columns(rows, ("input_ids", "labels"))


def hash_evaluation(rows: Dataset) -> str:
    return hash_columns(rows, ("input_ids", "labels", "answer"))


def hash_columns(rows: Dataset, names: Iterable[str]) -> str:
    there = [name for name in names if name in rows.column_names]
    return digest(*(json.dumps([row[name] for name in there]).encode() for row in rows.select_columns(there)))


def shared_prompts(train: Dataset, evaluation: Dataset, prompts_learned: bool = False) -> int:
    """How many evaluation rows have a prompt that is trained on.

    prompts_learned: training rows do not tell where their prompt ends; one that begins with a prompt's tokens has it.
    """
    asked = [prompt(row) for row in evaluation.select_columns(["input_ids", "labels"])]
    wanted, lengths = set(asked), {len(ids) for ids in asked}
    seen: set[tuple[int, ...]] = set()
    for row in train.select_columns(["input_ids", "labels"]):
        ids = tuple(row["input_ids"])
        seen |= wanted & ({ids[:n] for n in lengths} if prompts_learned else {prompt(row)})
    return sum(ids in seen for ids in asked)


def prompt(row: Mapping[str, Sequence[Any]]) -> tuple[int, ...]:
    """The tokens before the first that is supervised; all of them where there is no prompt.

    A start token, which is never supervised, is no prompt.
    """
    ids, labels = row["input_ids"], row["labels"]
    first = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    return tuple(ids[:first] if first > 1 else ids)
