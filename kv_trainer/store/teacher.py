"""A stored teacher: to the rest, one that reads as the student does and has as many layers, or, stored raw, itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
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
from ..model_checks import is_here, tokenizer_place
from ..models import load_tokenizer
from ..teachers import TeacherNeeds
from ..types import KVShape, KVStates, TeacherSignal
from .quantise import restore
from .shards import PARTS, RECORD, StoreReader, damaged, read_record, row_key

WHOLE = {"importance": True, "scores": True}  # what a store has at most


class StoredTeacher:
    """What `Teacher` is to the trainer, without a model: signals come from the batch, where the collator put them.

    A row that was left out, since no share of it was this teacher's, comes back empty.
    """

    placement = "stored"

    def __init__(self, name: str, record: Mapping[str, Any], folder: Path, reader: Reader, weight: float) -> None:
        told = record["teachers"][name]
        self.name, self.told, self.reader, self.weight = name, told, reader, weight
        self.form = record["form"]
        self.shape = shape_in(record, name)
        self.aligned_share: float | None = None if self.raw else told["aligned_share"]
        self.store = StoreReader(folder, [s for s in record["shards"] if s.startswith(f"{name}/")])
        self.channels = told["channels"]
        self.needs = TeacherNeeds()
        pace = record.get("seconds_a_row") or {}  # of all teachers of the store together
        self.pass_seconds = {clock: seconds * record["rows"] for clock, seconds in pace.items()}

    @property
    def raw(self) -> bool:
        return self.form == "raw"

    @property
    def tokens(self) -> str:
        """The column of encoded rows that has a token for each stored position, or may have."""
        return f"{self.name}/input_ids" if self.raw else "input_ids"

    def describe(self) -> dict[str, Any]:
        """As in the manifest of a run with the live teacher, so that either may go on with the other's checkpoint."""
        told = ("model", "revision", "weights", "tokenizer", "random")
        return {k: self.told[k] for k in told if k in self.told} | {"weight": self.weight}

    def place(self, name: str, device: torch.device) -> None:
        """Nothing lies anywhere."""

    def prepare(self, layers: tuple[int, ...], needs: TeacherNeeds) -> None:
        """ValueError for what is not stored."""
        check_has(self.name, self.told, needs, self.form)
        self.needs = needs

    def read(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """For the collator: what is stored of encoded rows. KeyError for a row that is not."""
        length = max(len(row[self.tokens]) for row in rows)
        return self.store.read([key_of(row, self.name, self.form) for row in rows], length)

    def check_rows(self, rows: Dataset) -> None:
        """ValueError if a row of encoded data is not stored."""
        for number, key in enumerate(keys_of(rows, self.name, self.form)):
            if key not in self.store:
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
            states, batch["index"] if self.raw else places(stored["mask"]), some["nll"] if asked else None, rows,
            some["entropy"] if asked else None, some["importance"] if self.needs.importance and weighing else None,
        )  # fmt: skip

    def _states(self, stored: Mapping[str, Tensor], part: str) -> tuple[Tensor, ...]:
        data = stored[f"{part}.data"]
        x = restore(data, stored.get(f"{part}.low"), stored.get(f"{part}.step"), self.channels[part])
        x = x.unflatten(-1, (len(self.shape.layer_numbers), self.shape.num_kv_heads, -1))  # [B, T, L, H, D]
        return tuple((x * stored["mask"][..., None, None, None]).permute(2, 0, 3, 1, 4))


def places(mask: Tensor) -> Tensor:
    """[B, T]: every position is its own. Which of them a teacher speaks of, the mask says."""
    return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)


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


def check_has(name: str, told: Mapping[str, Any], needs: TeacherNeeds, form: str) -> None:
    """ValueError for what the losses and the fusion ask of a teacher and its store does not have.

    told: of the store, whether there is `importance` and whether there are `scores`.
    """
    weighed = told["importance"] and form != "raw"  # it is a mean over the layers that one student is mapped to
    live = {"logits": needs.final, "queries": needs.queries, "hidden states": needs.hidden,
            "attention for R-KV": needs.mass, "importance": needs.importance and not weighed,
            "likelihoods": needs.scores and not told["scores"]}  # fmt: skip
    missing = [what for what, wanted in live.items() if wanted]
    if missing:
        instead = ""  # of what no store has, none can be made
        if missing[0] in ("importance", "likelihoods"):
            raw = missing[0] == "importance" and form == "raw"
            instead = ", or take store.form: aligned" if raw else ", or precompute with this recipe's losses and fusion"
        raise ValueError(
            f"The store of teacher '{name}' has no {missing[0]}, which this recipe needs; set "
            f"teachers.{name}.source: live{instead}."
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
    if there:
        record = read_record(folder)
        form, known = record["form"], record["teachers"]
    else:
        form, known = config.form or "aligned", dict.fromkeys(names, WHOLE)
    for name in names:
        check_has(name, known[name], needs, form)
    return [] if there else [f"store.path {folder} holds no store yet: kv-trainer precompute makes it."]


def key_of(row: Mapping[str, Any], name: str, form: str) -> int:
    """By what a store of this form finds an encoded row.

    Raw, what the teacher reads; aligned, what the student reads and, where the teacher has a text of its own, that.
    """
    if form == "raw":
        return row_key(row[f"{name}/input_ids"], row[f"{name}/labels"])
    return row_key(row["input_ids"], row["labels"], row.get(f"{name}/own_text"))


def keys_of(rows: Dataset, name: str, form: str) -> Iterator[int]:
    """`key_of` of all encoded rows, in their order."""
    read = {"input_ids", "labels"}
    columns = (read | {f"{name}/{column}" for column in (*read, "own_text")}) & set(rows.column_names)
    return (key_of(row, name, form) for row in rows.select_columns(sorted(columns)))


def what_is_read(data: DataConfig, name: str) -> dict[str, Any]:
    """The settings that decide which text a teacher reads, besides the rows themselves."""
    ours = ("prompt", "response", "answer", "answer_markers", "max_length", "truncation_side", "train_on_prompt")
    return {key: getattr(data, key) for key in ours} | {"teacher_text": data.teacher_text.get(name)}


def how_loaded(given: TeacherConfig) -> dict[str, Any]:
    """The settings that decide how a teacher's weights are rounded, and how it reads, besides its name."""
    tokenizer = None if given.tokenizer is None else name_of(given.tokenizer)
    return {"dtype": given.dtype, "quantization": given.quantization, "tokenizer": tokenizer}


def tokenizer_here(given: TeacherConfig) -> str | None:
    """The hash of a teacher's tokenizer where it is on this machine, which a stored teacher's need not be."""
    place, revision = tokenizer_place(given)
    if not is_here(str(place), "tokenizer_config.json", revision):
        return None
    with suppress(OSError, ValueError):  # a folder of weights alone
        return tokenizer_hash(load_tokenizer(given))
    return None


def name_of(model: str) -> str:
    """A model of the Hub by its whole name, one in a folder by the folder's own: stores move with their models."""
    return Path(model).name if Path(model).is_absolute() or Path(model).exists() else model


def open_teacher(
    name: str, given: TeacherConfig, args: MultiTeacherKVConfig, reader: Reader, layers: int,
    weights: Mapping[str, float], matched_by: str | None = None,
) -> StoredTeacher:  # fmt: skip
    """The stored teacher that a recipe asks for. ValueError if the store is damaged, or of anything else.

    layers: how many of the student's have keys and values. weights: of all teachers of the recipe, by name. matched_by:
    the fingerprint of the student whose layers are matched with a teacher's, where they are.
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
        "student": {
            "tokenizer": tokenizer_hash(reader.tokenizer), "chat": reader.chat, "layers": layers,
            **({} if matched_by is None else {"weights": matched_by}),
        },
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
            "text": told["text"], "loaded": {**how_loaded(given), **told.get("loaded", {})},
            "random": told.get("random"),
        }},
    }  # fmt: skip
    if record["form"] == "raw":  # of any student
        for said in (now, saved):
            del said["alignment"], said["student"]
    tokenizer = tokenizer_hash(reader.tokenizer) if record["form"] == "raw" else tokenizer_here(given)
    if tokenizer:  # the teacher must read what it read then
        now["teachers"][name]["tokenizer"], saved["teachers"][name]["tokenizer"] = tokenizer, told["tokenizer"]
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
