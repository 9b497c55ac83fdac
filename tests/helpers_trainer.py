"""A tiny student with two teachers that share nothing with it, nor with each other, and padding in many forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from kv_trainer.arguments import DataConfig, EvaluationConfig, MultiTeacherKVConfig
from kv_trainer.collator import KVCollator
from kv_trainer.data import IGNORED, Reader, encode_rows
from kv_trainer.losses import CrossEntropy, DistillationLoss
from kv_trainer.trainer import MultiTeacherKVTrainer

SUMS = ("two plus two is four", "seven plus five is twelve", "two times three is six, not five", "nine #### 9", "# 12")
ROWS = [
    {"prompt": f"what is question {i}?" + " please" * (i % 4), "completion": " " + SUMS[i % 5] + "!" * (i % 3)}
    for i in range(10)
]
STUDENT = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
# name -> family, its config, merges and BOS of its tokenizer
TEACHERS: dict[str, tuple[str, dict[str, int], int, bool]] = {
    "fine": ("qwen3", {"num_hidden_layers": 3, "head_dim": 12, "num_key_value_heads": 1}, 0, True),
    "deep": (
        "gpt_neox",
        {"num_hidden_layers": 4, "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3},
        25,
        False,
    ),
}


@dataclass
class World:
    """Makes trainers; everything in it is built anew, and alike, for every call."""

    model: Callable[..., PreTrainedModel]
    tokenizer: Callable[..., Any]
    encoded: Dataset = field(init=False)

    def __post_init__(self) -> None:
        readers = {name: Reader(self.tokenizer(t[2], bos=t[3])) for name, t in TEACHERS.items()}
        self.encoded = encode_rows(Dataset.from_list(ROWS), Reader(self.tokenizer(40)), readers, DataConfig())

    def student(self, **config: Any) -> PreTrainedModel:
        return self.model("llama", **{**STUDENT, **config})

    def teachers(self) -> dict[str, Any]:
        return {
            name: (self.model(family, seed=7, **config), self.tokenizer(merges, bos=bos))
            for name, (family, config, merges, bos) in TEACHERS.items()
        }

    def arguments(self, folder: Path, losses: dict[str, DistillationLoss] | None = None, **changes: Any) -> Any:
        options: dict[str, Any] = {
            "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 3,
            "save_strategy": "no", "logging_steps": 1, "max_steps": 3, "per_device_train_batch_size": 4,
            "optim": "sgd", "learning_rate": 0.05, "evaluation": EvaluationConfig(generate=False),
        }  # fmt: skip
        return MultiTeacherKVConfig(**{**options, **changes}, losses=losses or {"cross_entropy": CrossEntropy()})

    def trainer(
        self, folder: Path, losses: dict[str, DistillationLoss] | None = None, *, student: Any = None,
        teachers: Any = None, rows: Dataset | None = None, collator: Any = None, callbacks: Any = None,
        eval_rows: Dataset | None = None, peft_config: Any = None, **changes: Any,
    ) -> MultiTeacherKVTrainer:  # fmt: skip
        torch.manual_seed(0)
        return MultiTeacherKVTrainer(
            student or self.student(),
            self.teachers() if teachers is None else teachers,
            self.arguments(folder, losses, **changes),
            self.encoded if rows is None else rows,
            eval_rows,
            processing_class=self.tokenizer(40),
            data_collator=collator,
            callbacks=callbacks,
            peft_config=peft_config,
        )


def weights(trainer: MultiTeacherKVTrainer) -> dict[str, Tensor]:
    """Everything that is trained or calibrated, projectors too."""
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def curve(trainer: MultiTeacherKVTrainer) -> list[dict[str, float]]:
    """The training logs, without what depends on the clock."""
    return [log for log in trainer.state.log_history if "loss" in log]


def assert_same_run(one: MultiTeacherKVTrainer, other: MultiTeacherKVTrainer, tolerance: float = 1e-6) -> None:
    """Equal losses, gradient norms and weights, to an absolute `tolerance` (losses ten times as much, relative)."""
    assert len(curve(one)) == len(curve(other)) > 0
    for a, b in zip(curve(one), curve(other), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name.startswith(("loss", "grad_norm", "weight")):
                assert a[name] == pytest.approx(b[name], rel=10 * tolerance, abs=tolerance), name
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() <= tolerance, name


def moved(rows: Tensor, left: Sequence[int], right: int, fill: float) -> Tensor:
    """Each row of [B, T] moved left[b] places to the right in a longer one; what falls off is padding."""
    out = rows.new_full((len(rows), rows.shape[1] + max(left) + right), int(fill))
    for b, start in enumerate(left):
        out[b, start : start + rows.shape[1]] = rows[b]
    return out


@dataclass
class PaddedOtherwise(KVCollator):
    """The same rows with padding elsewhere, another amount of it, and any tokens in it.

    side: "left" moves the padding of each row to its front. extra: so many more masked positions on that side, one
    fewer for the teachers. token: what the padding holds.
    """

    side: str = "right"
    extra: int = 0
    token: int | None = None

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch = super().__call__(rows)
        teachers = batch.pop("teachers")
        starts = self.starts(batch["attention_mask"], self.extra)
        found = self.text(batch, starts, self.extra)
        found["teachers"] = {}
        for name, theirs in teachers.items():
            extra = max(0, self.extra - 1)
            begin = self.starts(theirs["attention_mask"], extra)
            index = theirs["index"]
            index = self.move(torch.where(index >= 0, index + torch.tensor(begin)[:, None], -1), starts, self.extra, -1)
            found["teachers"][name] = {**theirs, **self.text(theirs, begin, extra), "index": index}
        return found

    def starts(self, mask: Tensor, extra: int) -> list[int]:
        if self.side == "right":
            return [0] * len(mask)
        return [extra + int(n) for n in (mask == 0).sum(1)]

    def move(self, x: Tensor, starts: list[int], extra: int, fill: int) -> Tensor:
        if self.side == "right":
            return moved(x, starts, extra, fill)
        return moved(x, starts, 0, fill)[:, : x.shape[1] + extra]

    def text(self, batch: dict[str, Tensor], starts: list[int], extra: int) -> dict[str, Tensor]:
        fills = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        found = {name: self.move(batch[name], starts, extra, fill) for name, fill in fills.items()}
        if self.token is not None:
            found["input_ids"] = found["input_ids"].masked_fill(found["attention_mask"] == 0, self.token)
        return found
