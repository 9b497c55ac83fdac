"""Encoded rows to padded batches."""

from __future__ import annotations

import torch
from datasets import Dataset

from kv_trainer.arguments import DataConfig
from kv_trainer.collator import KVCollator
from kv_trainer.data import IGNORED, Reader, encode_rows

ROWS = [
    {"prompt": "what is two times three?", "completion": " six", "task": "times", "answer": "6"},
    {"prompt": "what is seven plus five? seven plus five?", "completion": " twelve", "task": "plus", "answer": "12"},
]


def test_collator_pads_on_the_right_and_masks(tiny_tokenizer):
    student, teacher = tiny_tokenizer(40), tiny_tokenizer(0)
    rows = list(encode_rows(Dataset.from_list(ROWS), Reader(student), {"t": Reader(teacher)}, DataConfig()))
    batch = KVCollator(pad_token_id=0, teacher_pad_ids={"t": 7})(rows)
    ours = {"row", "answer_position", "task", "supervised", "teachers"}
    read = {"input_ids", "attention_mask", "labels"}
    assert set(batch) == ours | read
    assert set(batch["teachers"]["t"]) == read | {"index", "supervised", "answer_position"}
    check_padding(batch, rows, "", {"input_ids": 0, "labels": IGNORED})
    check_padding(batch["teachers"]["t"], rows, "t/", {"input_ids": 7, "labels": IGNORED})
    assert batch["teachers"]["t"]["index"].shape == batch["input_ids"].shape, "one teacher position a student position"
    check_padding(batch["teachers"]["t"], rows, "t/", {"index": -1}, masked=False)
    assert set(KVCollator(0, {})(rows)["teachers"]) == set()


def check_padding(batch, rows, prefix: str, values: dict[str, int], masked: bool = True) -> None:
    for name, value in values.items():
        assert batch[name].dtype == torch.long
        for found, row in zip(batch[name].tolist(), rows, strict=True):
            plain = row[prefix + name]
            assert found == plain + [value] * (len(found) - len(plain))
    lengths = [len(row[f"{prefix}input_ids"]) for row in rows]
    assert len(set(lengths)) == 2
    if masked:
        assert batch["attention_mask"].sum(1).tolist() == lengths
        assert all(m == sorted(m, reverse=True) for m in batch["attention_mask"].tolist())
