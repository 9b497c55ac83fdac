"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SAVING = ".saving-"
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


@contextmanager
def beside(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A path in the folder of `target` to write to; it becomes `target` when the block ends, and is gone on an error.

    A reader never sees half a file. Makes the folder.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A new folder inside `target`; its files move into `target`, each whole, when the block ends without an error.

    What a killed process left of such a folder is removed first.
    """
    target.mkdir(parents=True, exist_ok=True)
    sweep(target)
    temporary = target / f"{SAVING}{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            place = target / file.relative_to(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written in a folder that only this run writes to."""
    for left in folder.glob(f"{SAVING}*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in folder.glob(".*.tmp"):
        if left.is_file() and TEMPORARY.fullmatch(left.name):
            left.unlink(missing_ok=True)


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole, in UTF-8."""
    with beside(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """A JSON file's content; ValueError names a file that is damaged."""
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is damaged, for it is no JSON: {error}") from error
