"""Runs that another experiment has finished already, with the same recipe, settings and seed: not run again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from ..files import write_text
from .jobs import RECORD, Job

TAKEN = "taken_from"  # in the record: the run that was copied
LEFT = ("checkpoint-*", "log.txt", "progress-*.json")


def take_finished(job: Job) -> bool:
    """Copy a finished run of the same settings, from the experiment's `runs_from`, to where this one would be.

    Whether there was one. Of an arm whose length is another's seconds there is none: it belongs to that other run.
    """
    if job.experiment.arms[job.arm].seconds_of is not None:
        return False
    wanted = without_place(job.recipe_text())
    for folder in job.experiment.runs_from:
        for path in sorted(Path(folder).glob(f"*-{job.seed}/{RECORD}")):
            if without_place(Job.saved(path.parent)) == wanted:
                copy(path.parent, job)
                return True
    return False


def without_place(recipe: str) -> dict[str, Any]:
    """The settings of a resolved recipe, but where it is written."""
    found = yaml.safe_load(recipe)
    return {**found, "training": {k: v for k, v in found["training"].items() if k != "output_dir"}}


def copy(found: Path, job: Job) -> None:
    """Whole or not at all; the copy says where it is from."""
    target = job.folder
    beside = target.with_name(f".{target.name}-taken")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(found, beside, ignore=shutil.ignore_patterns(*LEFT))
    record = json.loads((found / RECORD).read_text(encoding="utf-8"))
    write_text(beside / "recipe.yaml", job.recipe_text())
    write_text(beside / RECORD, json.dumps({TAKEN: found.as_posix(), **record}) + "\n")
    if target.exists():  # a begun run of the same settings
        shutil.rmtree(target)
    os.replace(beside, target)
