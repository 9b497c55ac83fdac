"""The finished runs of an experiment in one file, for others to add arms and seeds to without running them again."""

from __future__ import annotations

import lzma
import re
import threading
import zipfile
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from ..callbacks import METRICS_FILE
from ..files import beside
from ..run import PREDICTIONS
from .jobs import RECORD, Job

KEPT = (RECORD, "recipe.yaml", "config.json", "routing.json", METRICS_FILE, PREDICTIONS)
MEMBER = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9_.-]*/({'|'.join(map(re.escape, KEPT))})")
LARGEST = 64 * 2**20  # bytes of one member: more is no record of a run
LARGEST_SUM = 2**30  # bytes of all of them
# What zipfile raises for an archive that is cut off or damaged, or is encrypted.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError)
SAME_DATE = (1980, 1, 1, 0, 0, 0)  # the same runs give the same file
ONE_AT_A_TIME = threading.Lock()


def pack(jobs: Iterable[Job], target: Path) -> None:
    """Write what reports need of finished runs, `KEPT`, as ARM-SEED/FILE into a zip; no weights. It appears whole."""
    with beside(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_LZMA) as archive:
        for folder in sorted(job.folder for job in jobs):
            for path in (folder / name for name in KEPT):
                if path.exists():
                    info = zipfile.ZipInfo(f"{folder.name}/{path.name}", SAME_DATE)
                    info.compress_type = zipfile.ZIP_LZMA
                    archive.writestr(info, path.read_bytes())


def runs_in(place: str) -> Path:
    """The folder with the runs of `place`: itself, or where an archive has been unpacked until this process ends.

    ValueError for an archive that holds anything else.
    """
    if not Path(place).is_file():
        return Path(place)
    with ONE_AT_A_TIME:  # a cache alone lets threads unpack it twice, and drops a folder that is in use
        return Path(unpacked(place).name)


@cache
def unpacked(place: str) -> TemporaryDirectory[str]:
    found = TemporaryDirectory(prefix="kv_trainer-runs-")
    try:
        with zipfile.ZipFile(place) as archive:
            for member in archive.infolist():
                if not MEMBER.fullmatch(member.filename) or member.file_size > LARGEST:
                    raise ValueError(
                        f"runs_from: {place} holds '{member.filename}', which is no part of a run; such a file has "
                        f"ARM-SEED/ and one of {', '.join(KEPT)}."
                    )
            size = sum(member.file_size for member in archive.infolist())
            if size > LARGEST_SUM:
                raise ValueError(
                    f"runs_from: {place} would take {size / 2**30:.1f} GiB; no archive of runs is so large."
                )
            archive.extractall(found.name)
    except DAMAGE as error:
        raise ValueError(f"runs_from: {place} is neither a folder nor a whole archive of runs: {error}.") from error
    return found
