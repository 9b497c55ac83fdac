"""A trained student in the form that serves it: one ONNX graph with its cache, or adapters merged into their base."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from .adapters import load_trained
from .onnx_graph import check_graph, empty_cache, limit_of, prepare, random_ids, write_graph
from .resolve import loading

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
ROUNDED = 0.1  # of the largest logit: more than 16 bits lose, less than a wrong merge does


@dataclass(frozen=True)
class Exported:
    """files: all that were written. difference: the largest of a logit from the model as it was loaded."""

    files: tuple[Path, ...]
    difference: float


def export(model: str, format: str, output: str | os.PathLike[str], trust_remote_code: bool = False) -> Exported:
    """Write a trained student, or any causal LM, into a new folder `output`: all of it or nothing.

    model: a folder or a hub name. format: a key of FORMATS. trust_remote_code: whether code that comes with the model
    may run; a recipe beside it is not asked. ValueError for a folder that is not empty, missing packages, a model that
    cannot be written so, and one that does not answer as before once it is.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; give one of {', '.join(FORMATS)}.")
    with new_folder(output) as (folder, target):
        difference = FORMATS[format](model, folder, trust_remote_code)
        with loading("MODEL", model):
            tokenizer = tokenizer_of(model, trust_remote_code)
        tokenizer.save_pretrained(folder)
    return Exported(tuple(sorted(path for path in target.rglob("*") if path.is_file())), difference)


@contextmanager
def new_folder(output: str | os.PathLike[str]) -> Iterator[tuple[Path, Path]]:
    """A folder to write to, and `output`, which it becomes when the block ends; after an error neither is there."""
    target = Path(output).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"'{output}' exists and is not an empty folder; give another folder, or empty this one.")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary, target
        if target.exists():
            target.rmdir()  # empty; refuses if somebody has written to it meanwhile
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tokenizer_of(model: str, trust_remote_code: bool) -> Any:
    """The tokenizer saved with a model, else that of the base of its adapters."""
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        if find_adapter_config_file(model) is None:
            raise
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(model).base_model_name_or_path
    return AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)


def write_merged(model: str, folder: Path, trust_remote_code: bool) -> float:
    """Adapters and their base as one plain checkpoint, in the base's dtype. Returns the largest change of a logit."""
    with loading("MODEL", model):
        if find_adapter_config_file(model) is None:
            AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)  # or it is no model at all
            raise ValueError(f"'{model}' has no adapters, so there is nothing to merge: it is a plain checkpoint.")
        adapted = load_trained(model, trust_remote_code=trust_remote_code).eval()
    ids = random_ids(adapted, 2, 12)
    with torch.no_grad():
        before = adapted(ids).logits.float()
        merged = merge(adapted, model)
        difference = float((merged(ids).logits.float() - before).abs().max())
    limit = limit_of(before)
    if merged.dtype != torch.float32:  # merged weights of 16 bits are rounded, which is reported but no error
        limit = max(limit, ROUNDED * float(before.abs().max()))
    if not difference <= limit:  # `not <=`, for NaN
        raise ValueError(f"'{model}': merged, logits are off by {difference:.2g} (limit {limit:.2g}); use it unmerged.")
    merged.save_pretrained(folder)
    return difference


def merge(adapted: Any, name: str) -> PreTrainedModel:
    """The base of a PeftModel with its adapters merged in. ValueError for a method that has no merged form."""
    try:
        return adapted.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError) as error:
        kind = adapted.active_peft_config.peft_type.value.lower()
        raise ValueError(f"'{name}': adapters of {kind} cannot be merged into their base: {error}") from error


def write_onnx(model: str, folder: Path, trust_remote_code: bool) -> float:
    """The model as float32 `model.onnx`, checked against torch. Returns the largest difference of a logit."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"format onnx needs {', '.join(missing)}, not installed: pip install kv_trainer[export].")
    with loading("MODEL", model):
        student = load_trained(model, trust_remote_code=trust_remote_code)
    if find_adapter_config_file(model) is not None:
        student = merge(student, model)
    student = student.float().eval()
    student.config.dtype = torch.float32
    student.config.save_pretrained(folder)
    if student.generation_config is not None:
        student.generation_config.save_pretrained(folder)
    prepare(student)
    past = empty_cache(student, model)
    write_graph(student, past, folder / "model.onnx", model)
    return check_graph(student, past, folder / "model.onnx", model)


FORMATS: dict[str, Callable[[str, Path, bool], float]] = {"onnx": write_onnx, "merged": write_merged}
