"""A stored teacher: to the rest, one that reads as the student does and has as many layers, or, stored raw, itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..arguments import DataConfig, MultiTeacherKVConfig, StoreConfig, TeacherConfig
from ..data import Reader
from ..fusion import method_of
from ..manifest import differences, files_fingerprint, tokenizer_hash
from ..models import load_tokenizer
from ..teachers import TeacherNeeds
from ..types import KVShape, KVStates, TeacherSignal
from .quantise import restore
from .shards import PARTS, RECORD, StoreReader, damaged, read_record, row_key


class StoredTeacher:
    """What `Teacher` is to the trainer, without a model: signals come from the batch, where the collator put them.

    A row that was left out, since no share of it was this teacher's, comes back empty.
    """

    placement = "stored"

    def __init__(self, name: str, record: Mapping[str, Any], folder: Path, reader: Reader, weight: float) -> None:
        told = record["teachers"][name]
        self.name, self.told, self.reader, self.weight = name, told, reader, weight
        self.raw = record["form"] == "raw"
        self.shape = shape_in(record, name)
        self.column = column_of(name, record["form"])
        self.aligned_share: float | None = None if self.raw else told["aligned_share"]
        self.store = StoreReader(folder, [s for s in record["shards"] if s.startswith(f"{name}/")])
        self.channels = told["channels"]
        self.needs = TeacherNeeds()
        pace = record.get("seconds_a_row") or {}  # of all teachers of the store together
        self.pass_seconds = {clock: seconds * record["rows"] for clock, seconds in pace.items()}

    def describe(self) -> dict[str, Any]:
        """As in the manifest of a run with the live teacher, so that either may go on with the other's checkpoint."""
        told = ("model", "revision", "weights", "tokenizer", "random")
        return {k: self.told[k] for k in told if k in self.told} | {"weight": self.weight}

    def place(self, name: str, device: torch.device) -> None:
        """Nothing lies anywhere."""

    def prepare(self, layers: tuple[int, ...], needs: TeacherNeeds) -> None:
        """ValueError for what is not stored."""
        check_has(self.name, self.told, needs)
        self.needs = needs

    def read(self, rows: list[list[int]], length: int) -> dict[str, Tensor]:
        """For the collator: what is stored of rows of tokens, those of `column`. KeyError for a row that is not."""
        return self.store.read([row_key(ids) for ids in rows], length)

    def check_rows(self, rows: Dataset) -> None:
        """ValueError if a row of encoded data is not stored."""
        for number, ids in enumerate(rows[self.column]):
            if row_key(ids) not in self.store:
                raise ValueError(
                    f"Row {number} of the training data is not in the store of teacher '{self.name}': the data or its "
                    "encoding changed; run kv-trainer precompute RECIPE into a new folder."
                )

    def signal(
        self, batch: Mapping[str, Any], rows: Tensor | None = None, scores: bool = True, weighing: bool = True
    ) -> TeacherSignal:
        """As `Teacher.signal`; states are at the student's layers and positions, or at the teacher's own."""
        stored: dict[str, Tensor] = batch["stored"]
        some = stored if rows is None else {name: x[rows] for name, x in stored.items()}
        found = {part: self._states(some, part) for part in PARTS}
        states = KVStates(found["keys"], found["values"], some["mask"], self.shape.layer_numbers, self.shape.num_layers)
        asked = scores and self.needs.scores
        return TeacherSignal(
            states, batch["index"], some["nll"] if asked else None, rows, some["entropy"] if asked else None,
            some["importance"] if self.needs.importance and weighing else None,
        )  # fmt: skip

    def _states(self, stored: Mapping[str, Tensor], part: str) -> tuple[Tensor, ...]:
        data = stored[f"{part}.data"]
        x = restore(data, stored.get(f"{part}.low"), stored.get(f"{part}.step"), self.channels[part])
        x = x.unflatten(-1, (len(self.shape.layer_numbers), self.shape.num_kv_heads, -1))  # [B, T, L, H, D]
        return tuple((x * stored["mask"][..., None, None, None]).permute(2, 0, 3, 1, 4))


def shape_in(record: Mapping[str, Any], name: str) -> KVShape:
    """A stored teacher as the bridge sees it."""
    told = record["teachers"][name]["shape"]
    return KVShape(**{**told, "kv_layers": tuple(told["kv_layers"]), "aligned": record["form"] != "raw"})


def stored_shapes(names: Sequence[str], config: StoreConfig) -> dict[str, KVShape]:
    """These teachers, once there is a store. ValueError if it has not all of them."""
    folder = Path(str(config.path))
    if not names or not (folder / RECORD).exists():
        return {}
    record = read_record(folder)
    for name in names:
        check_holds(folder, record, name)
    return {name: shape_in(record, name) for name in names}


def check_has(name: str, told: Mapping[str, Any], needs: TeacherNeeds) -> None:
    """ValueError for what the losses and the fusion ask of a teacher and its store does not have.

    told: of the store, whether there is `importance` and whether there are `scores`.
    """
    live = {"logits": needs.final, "queries": needs.queries, "hidden states": needs.hidden,
            "attention for R-KV": needs.mass, "importance": needs.importance and not told["importance"],
            "likelihoods": needs.scores and not told["scores"]}  # fmt: skip
    missing = [what for what, wanted in live.items() if wanted]
    if missing:
        raise ValueError(
            f"The store of teacher '{name}' has no {missing[0]}, which this recipe needs; set "
            f"teachers.{name}.source: live, or precompute with this recipe's losses and fusion."
        )


def check_holds(folder: Path, record: Mapping[str, Any], name: str) -> None:
    if name not in record["teachers"]:
        raise ValueError(f"{folder} holds the teachers {', '.join(record['teachers'])}, not '{name}'.")


def check_stored(names: Sequence[str], config: StoreConfig, needs: TeacherNeeds) -> list[str]:
    """ValueError if a store has not, or will not have, what is needed of these teachers.

    Returns a word about a store that is not there yet.
    """
    if not names:
        return []
    folder = Path(str(config.path))
    there = (folder / RECORD).exists()
    expected = {"teachers": dict.fromkeys(names, {"importance": True, "scores": True})}
    known = read_record(folder) if there else expected
    for name in names:
        check_has(name, known["teachers"][name], needs)
    return [] if there else [f"store.path {folder} holds no store yet: kv-trainer precompute makes it."]


def column_of(name: str, form: str) -> str:
    """The tokens of encoded rows by which a store of this form finds them."""
    return f"{name}/input_ids" if form == "raw" else "input_ids"


def what_is_read(data: DataConfig, name: str) -> dict[str, Any]:
    """The settings that decide which text a teacher reads, besides the rows themselves."""
    ours = ("prompt", "response", "answer", "answer_markers", "max_length", "truncation_side", "train_on_prompt")
    return {key: getattr(data, key) for key in ours} | {"teacher_text": data.teacher_text.get(name)}


def how_loaded(given: TeacherConfig) -> dict[str, Any]:
    """The settings that decide with which precision a teacher's weights are what they are."""
    return {"dtype": given.dtype, "quantization": given.quantization}


def name_of(model: str) -> str:
    """A model of the Hub by its whole name, one in a folder by the folder's own: stores move with their models."""
    return Path(model).name if Path(model).is_absolute() or Path(model).exists() else model


def open_teacher(
    name: str, given: TeacherConfig, args: MultiTeacherKVConfig, reader: Reader, layers: int,
    weights: Mapping[str, float],
) -> StoredTeacher:  # fmt: skip
    """The stored teacher that a recipe asks for. ValueError if the store is damaged, or of anything else.

    layers: how many of the student's have keys and values. weights: of all teachers of the recipe, by name.
    """
    folder = Path(str(args.store.path))
    record = read_record(folder)
    check_holds(folder, record, name)
    for key in ("bits", "form"):
        asked = getattr(args.store, key)
        if asked is not None and asked != record[key]:
            raise ValueError(f"store.{key} is {asked}, but {folder} was made with {record[key]}; leave it out.")
    told = record["teachers"][name]
    if record["form"] == "raw":
        reader = Reader(load_tokenizer(given), given.chat)
    now = {
        "alignment": asdict(args.alignment),
        "student": {"tokenizer": tokenizer_hash(reader.tokenizer), "chat": reader.chat, "layers": layers},
        "teachers": {name: {
            "model": name_of(str(given.model)), "revision": given.revision, "chat": given.chat,
            "text": what_is_read(args.data, name), "loaded": how_loaded(given),
            "random": args.seed if given.random else None,
        }},
    }  # fmt: skip
    saved = {
        "alignment": record["alignment"], "student": record["student"],
        "teachers": {name: {
            "model": told["model"], "revision": told["asked_revision"], "chat": told["chat"],
            "text": told["text"], "loaded": told.get("loaded", how_loaded(given)), "random": told.get("random"),
        }},
    }  # fmt: skip
    if record["form"] == "raw":  # of any student; but the teacher must read what it read then
        for said, tokenizer in ((now, tokenizer_hash(reader.tokenizer)), (saved, told["tokenizer"])):
            del said["alignment"], said["student"]
            said["teachers"][name]["tokenizer"] = tokenizer
    files = files_fingerprint(str(given.model), given.revision)
    if files and told.get("files"):  # two models may lie in folders of one name
        now["teachers"][name]["weights"], saved["teachers"][name]["weights"] = files, told["files"]
    if record["left_out"]:  # which rows a teacher is not asked for is up to the fusion of them all
        now |= {"fusion": {"method": method_of(args.fusion), **asdict(args.fusion)}, "weights": dict(weights)}
        saved |= {"fusion": record["fusion"], "weights": record["weights"]}
    found = differences(saved, now)
    if found:
        raise ValueError(f"{folder} was made of something else: {'; '.join(found)}. Precompute into a new folder.")
    bad = [shard for shard in damaged(folder, record) if shard.startswith(f"{name}/")]
    if bad:
        raise ValueError(f"{folder} is damaged: {', '.join(bad[:5])}; run kv-trainer precompute RECIPE --repair.")
    return StoredTeacher(name, record, folder, reader, given.weight)
