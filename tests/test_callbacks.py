"""The bar's text and the metrics file, on logs as a real Trainer sends them."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ProgressCallback

from kv_trainer.callbacks import (
    LossTermsProgress,
    MetricsFile,
    metrics_line,
    peak_memory_mb,
    read_metrics,
    training_line,
)

LOGS = {
    "loss": 1.2345, "grad_norm": 3.0, "learning_rate": 1e-3, "loss_cross_entropy": 0.6123, "loss_kv_relation": 0.4219,
    "weight_cross_entropy": 1.0, "weight_kv_relation": 3.0, "epoch": 0.5,
}  # fmt: skip


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict:
        ids = torch.arange(i, i + 6) % 20
        return {"input_ids": ids, "labels": ids}


def build_trainer(folder: Path, max_steps: int, **settings) -> Trainer:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    args = TrainingArguments(
        output_dir=str(folder), max_steps=max_steps, per_device_train_batch_size=2, logging_steps=1, save_steps=2,
        eval_strategy="steps", eval_steps=2, report_to="none", use_cpu=True, **settings,
    )  # fmt: skip
    trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=Rows(), eval_dataset=Rows())
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossTermsProgress)
    trainer.add_callback(MetricsFile)
    return trainer


def test_lines_are_compact() -> None:
    assert training_line(LOGS) == "loss 1.23 ce 0.612 kv_relation 0.422 lr 1e-3"
    assert training_line({"loss": 2.0, "learning_rate": 0.0}) == "loss 2 lr 0"
    assert training_line({"loss": 2.0, "learning_rate": 1.5e-5}) == "loss 2 lr 1.5e-5"
    evaluation = {"eval_loss": 1.23, "eval_perplexity": 3.421, "eval_accuracy": 0.4521, "eval_accuracy_chain": 1.0,
                  "eval_runtime": 2.0, "eval_samples_per_second": 3.0, "epoch": 1.0}  # fmt: skip
    assert metrics_line(evaluation) == "loss 1.23, perplexity 3.42, accuracy 45.2%, accuracy_chain 100.0%"


def test_bar_shows_terms_and_prints_no_dict(tmp_path: Path, capsys) -> None:
    trainer = build_trainer(tmp_path, 4)
    bar = next(c for c in trainer.callback_handler.callbacks if isinstance(c, LossTermsProgress))
    postfixes = []

    def keep(args, state, control, logs=None, **kwargs) -> None:
        more = {"loss_kv": 0.5} if "loss" in logs else {}
        LossTermsProgress.on_log(bar, args, state, control, logs=logs | more)
        postfixes.append(bar.training_bar.postfix)

    bar.on_log = keep
    trainer.train()
    out, err = capsys.readouterr()
    assert postfixes[0].startswith("loss ") and " kv 0.5 lr " in postfixes[0]
    assert " kv 0.5 lr " in err, "the postfix is on the bar"
    lines = [line for line in out.splitlines() if line.strip()]
    assert [line for line in lines if "step 2 evaluation: loss " in line]
    assert [line for line in lines if "step 4 training: train_loss " in line]
    assert not any("{" in line for line in lines)


def test_a_fresh_run_empties_an_older_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 99, "loss": 1.0}\n')
    build_trainer(tmp_path, 3).train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 3, 3]
    assert all(isinstance(row["loss"], float) and "learning_rate" in row for row in rows if "grad_norm" in row)
    assert "eval_loss" in rows[2] and "train_runtime" in rows[-1]
    times = [row["time"] for row in rows]
    assert times == sorted(times) and times[0] >= 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".metrics")] == []


def test_a_resumed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    build_trainer(tmp_path, 6).train()
    whole = read_metrics(tmp_path / "metrics.jsonl")
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 7, "lo')  # as a crash leaves it
    before = [row for row in whole if row["step"] <= 4]
    build_trainer(tmp_path, 6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    rows = read_metrics(file)
    assert rows[: len(before)] == before
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    assert [row.get("loss") for row in rows] == pytest.approx([row.get("loss") for row in whole])
    times = [row["time"] for row in rows]
    assert times == sorted(times), "time goes on, it does not start again"
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_logs_outside_a_run_are_not_of_its_curve(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, 2)
    trainer.evaluate()
    assert not (tmp_path / "metrics.jsonl").exists()
    trainer.train()
    trainer.evaluate()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 2]


def test_other_ranks_write_nothing_and_nan_is_null(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    control = TrainerControl()
    for main in (False, True):
        state = TrainerState(is_world_process_zero=main, global_step=0, epoch=0.0)
        callback = MetricsFile()
        callback.on_train_begin(args, state, control)
        callback.on_log(args, state, control, logs={"loss": math.nan, "note": "text", "loss_kv": np.float32(1)})
        assert (tmp_path / "metrics.jsonl").exists() == main
    line = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in line
    row = json.load(io.StringIO(line))
    assert row["loss"] is None and row["loss_kv"] == 1.0 and "note" not in row


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="reads Linux's own count of RAM")
def test_peak_memory_is_the_one_linux_counts() -> None:
    status = Path("/proc/self/status").read_text()
    assert peak_memory_mb() == pytest.approx(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024, rel=0.02)
