"""A store's files: store.json says what it is of, shards hold a few hundred rows each, found by the row's own key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import beside
from ..text import key_of_bytes
from .quantise import Parts, quantise, restore

RECORD, FORMAT = "store.json", 3
PARTS = ("keys", "values")
FIGURES = ("raw_bytes", "errors", "squares", "left_out")


def row_key(input_ids: Sequence[int], labels: Sequence[int], own_text: int | None = None) -> int:
    """What a row is found by, whatever its place in the data set: of tokens, of which of them are learned, for
    likelihoods are of these, and of the key of a text of its own."""
    numbers = [*input_ids, *labels, *([] if own_text is None else [own_text])]
    return key_of_bytes(numpy.asarray(numbers, dtype=numpy.int64).tobytes())


def write_shard(path: Path, rows: Sequence[Mapping[str, Any]], bits: int, raw_bytes: int) -> None:
    """rows: key, position [n], keys and values [n, C], nll, entropy and, where it is stored, importance [n]; asked:
    whether the teacher has a share of the row.

    raw_bytes: what the teacher's own keys and values of the mapped layers take as float16. The shard remembers how far
    what it gives back is from what it was given.
    """
    tensors: dict[str, Tensor] = {
        "row_keys": torch.tensor([row["key"] for row in rows], dtype=torch.int64),
        "counts": torch.tensor([len(row["position"]) for row in rows], dtype=torch.int64),
        "position": torch.cat([row["position"] for row in rows]).to(torch.int32),
    }
    for name in ("nll", "entropy"):
        if rows[0].get(name) is not None:
            tensors[name] = torch.stack([row[name] for row in rows]).float()
    if rows[0].get("importance") is not None:
        tensors["importance"] = torch.cat([row["importance"] for row in rows]).float()
    errors = squares = 0.0
    for part in PARTS:
        x = torch.cat([row[part] for row in rows]).float()
        stored = quantise(x, bits)
        back = restore(stored["data"], stored.get("low"), stored.get("step"), x.shape[1])
        errors, squares = errors + float((back - x).square().sum()), squares + float(x.square().sum())
        tensors |= {f"{part}.{name}": t for name, t in stored.items()}
    left_out = sum(not row["asked"] for row in rows)
    # A tensor, since metadata come in another order each time: equal shards are equal files.
    tensors["figures"] = torch.tensor([raw_bytes, errors, squares, left_out], dtype=torch.float64)
    with beside(path) as temporary:
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary)


def shard_figures(path: Path) -> dict[str, float]:
    with safe_open(path, framework="pt") as file:
        return dict(zip(FIGURES, file.get_tensor("figures").tolist()))


def opens(path: Path) -> bool:
    """Whether a shard is one, as far as its header and size say."""
    try:
        shard_figures(path)
    except (OSError, SafetensorError):
        return False
    return True


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:  # Python 3.10
    found = hashlib.sha256()
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """store.json. ValueError where there is none: nothing was precomputed, or not to its end."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {RECORD}: run kv-trainer precompute RECIPE, to its end.") from error
    except ValueError as error:
        raise ValueError(f"{folder / RECORD} is no JSON ({error}); delete it and run kv-trainer precompute.") from error
    if record.get("format") != FORMAT:
        raise ValueError(f"{folder} is of another version of kv_trainer; run kv-trainer precompute into a new folder.")
    return record


def damaged(folder: Path, record: Mapping[str, Any], whole: bool = False) -> list[str]:
    """The shards that are not there or not as they were written: by size, or, `whole`, by checksum."""
    found = []
    for name, file in record["shards"].items():
        path = folder / name
        same = path.is_file() and path.stat().st_size == file["size"]
        if not same or whole and checksum(path) != file["sha256"]:
            found.append(name)
    return found


class StoreReader:
    """One teacher's shards. Opens its files when it first reads, in each process anew: loader workers may share it."""

    def __init__(self, folder: Path, shards: Iterable[str]) -> None:
        self.folder, self.shards = folder, list(shards)
        self._files: dict[str, Any] = {}
        self._where: dict[int, tuple[str, int, int, int]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_where": None}

    def _file(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                hint = "run kv-trainer precompute RECIPE --repair"
                raise ValueError(f"{self.folder / name} cannot be read ({error}); {hint}.") from error
        return self._files[name]

    @property
    def where(self) -> dict[int, tuple[str, int, int, int]]:
        """Row key -> its shard, its number there, and its first position there and the one behind its last."""
        if self._where is None:
            self._where = {}
            for name in self.shards:
                file = self._file(name)
                ends = file.get_tensor("counts").cumsum(0).tolist()
                keys = file.get_tensor("row_keys").tolist()
                for number, (key, first, end) in enumerate(zip(keys, [0, *ends], ends)):
                    if end > first or key not in self._where:  # one alike may have been left out, as of another task
                        self._where[key] = (name, number, first, end)
        return self._where

    def __contains__(self, key: int) -> bool:
        return key in self.where

    def read(self, keys: Sequence[int], length: int) -> Parts:
        """Stored rows as a batch: mask [B, T]; of keys and values data [B, T, C'], low and step [B, 1, C]; nll and
        entropy [B]; importance [B, T]. KeyError for a key that is not there.
        """
        rows = [self._row(*self.where[key]) for key in keys]
        batch: Parts = {}
        for name in rows[0]:
            if name == "position":
                continue
            each = [row[name] for row in rows]
            if name.endswith(".data") or name == "importance":
                placed = each[0].new_zeros(len(rows), length, *each[0].shape[1:])
                for i, row in enumerate(rows):
                    placed[i, row["position"].long()] = row[name]
                batch[name] = placed
            else:
                batch[name] = torch.stack(each)
        batch["mask"] = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            batch["mask"][i, row["position"].long()] = True
        return batch

    def _row(self, name: str, number: int, first: int, end: int) -> Parts:
        file = self._file(name)
        row: Parts = {}
        for key in file.keys():  # noqa: SIM118 - it is no dict
            if key in ("row_keys", "counts", "figures"):
                continue
            if key.endswith((".low", ".step")):
                row[key] = file.get_tensor(key)[None]
            elif key in ("nll", "entropy"):
                row[key] = file.get_slice(key)[number : number + 1][0]
            else:
                row[key] = file.get_slice(key)[first:end]
        return row
