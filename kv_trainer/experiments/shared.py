"""Runs that another experiment has finished already, with the same recipe, settings and seed: not run again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_text
from ..recipes import saved_recipe, settings_of
from .archive import runs_in
from .jobs import LOG, RECORD, Job, changed_since, read_record

TAKEN = "taken_from"  # in the record: the run that was copied
LEFT = ("checkpoint-*", LOG, "progress-*.json")


def take_finished(job: Job) -> bool:
    """Copy a finished run of the same settings and files, from `runs_from`, to where this one would be.

    Whether there was one. Of an arm whose length is another's seconds there is none: it belongs to that other run. A
    begun run stays what it is.
    """
    begun = job.folder.exists() and any(path.name != LOG for path in job.folder.iterdir())
    if job.experiment.arms[job.arm].seconds_of is not None or begun:
        return False
    wanted = without_place(settings_of(job.recipe_text()))
    for place in job.experiment.runs_from:
        for path in finished(place, job.seed):
            if settings(path) != wanted:
                continue
            record = read_record(path)
            if record.get("processes", 1) == 1 and not changed_since(record, wanted):
                copy(path.parent, job, f"{place}/{path.parent.name}")
                return True
    return False


def finished(place: str, seed: int | str = "*") -> list[Path]:
    """The records of the finished runs of an experiment: in its folder, or in an archive."""
    return sorted(runs_in(place).glob(f"*-{seed}/{RECORD}"))


def settings(record: Path) -> dict[str, Any] | None:
    """Of a finished run; None where they cannot be read here, and so are not those of any run that can be made here."""
    try:
        return without_place(settings_of(saved_recipe(record.parent)))
    except (ValueError, OSError):
        return None


def without_place(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resolved recipe, but where it is written."""
    return {**recipe, "training": {k: v for k, v in recipe["training"].items() if k != "output_dir"}}


def copy(found: Path, job: Job, name: str) -> None:
    """Whole or not at all; the copy says where it is from: `name`."""
    target = job.folder
    beside = target.with_name(f".{target.name}-taken")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(found, beside, ignore=shutil.ignore_patterns(*LEFT))
    record = read_record(found / RECORD)
    write_text(beside / "recipe.yaml", job.recipe_text())
    write_text(beside / RECORD, json.dumps({TAKEN: name, **record}) + "\n")
    shutil.rmtree(target, ignore_errors=True)  # at most a log
    os.replace(beside, target)
