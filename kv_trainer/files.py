"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole, in UTF-8."""
    with beside(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
