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
    perplexity,
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
    warming = {"loss": 2.0, "loss_kv": 0.5, "learning_rate": 1e-3}
    assert training_line(warming | {"attn_warmup_left": 500}).endswith("kv 0.5 lr 1e-3 attn-warmup: 500 steps left")
    assert training_line(warming | {"attn_warmup_left": 0}).endswith("lr 1e-3 attn-warmup: on")
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
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 3, 3, 3]
    assert [row.get("event") for row in rows] == [None] * 5 + ["epoch_end", None]
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
    assert [(row["step"], row.get("event")) for row in rows] == [(row["step"], row.get("event")) for row in whole]
    assert [row.get("loss") for row in rows] == pytest.approx([row.get("loss") for row in whole])
    times = [row["time"] for row in rows]
    assert times == sorted(times), "time goes on, it does not start again"
    assert all(json.loads(line) for line in file.read_text().splitlines())


class Counted(Trainer):
    """As MultiTeacherKVTrainer: it counts, and logs a term of cross-entropy and one more."""

    def get_batch_samples(self, *args, **kwargs):
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        file = next(c for c in self.callback_handler.callbacks if isinstance(c, MetricsFile))
        file.count(torch.tensor(float(sum(len(b["input_ids"]) for b in batches))), tokens)
        return batches, tokens

    def log(self, logs, *args) -> None:
        if "loss" in logs:
            logs |= {"loss_cross_entropy": logs["loss"], "loss_kv": float(self.state.global_step)}
        super().log(logs, *args)


def epochs_trainer(folder: Path, **settings) -> Trainer:
    """Four steps an epoch; every third one is logged, and every second one saved."""
    trainer = build_trainer(folder, 8, include_num_input_tokens_seen="all", **settings)
    trainer.__class__ = Counted
    trainer.args.logging_steps = 3
    projector = torch.nn.Linear(2, 1)
    trainer.model.add_module("kv_bridge", projector)
    own = [p for n, p in trainer.model.named_parameters() if "kv_bridge." not in n]
    groups = [{"params": own[:3], "weight_decay": 0.1}, {"params": own[3:]}]
    trainer.optimizer = torch.optim.AdamW([*groups, {"params": [*projector.parameters()], "lr": 1e-2}], lr=1e-3)
    return trainer


def test_a_training_line_holds_rates_throughput_memory_and_perplexity(tmp_path: Path) -> None:
    epochs_trainer(tmp_path).train()
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8], "checkpoints and the ends of epochs are logged too"
    for row in rows:
        left = 1 - (row["step"] - 1) / 8  # the schedule's share in the step itself
        assert row["learning_rate"] == row["learning_rate_student"] == pytest.approx(1e-3 * left)
        assert row["learning_rate_projectors"] == pytest.approx(1e-2 * left)
        assert "learning_rate_student_2" not in row, "both student groups have one rate"
        assert row["perplexity"] == pytest.approx(math.exp(row["loss_cross_entropy"]))
        assert row["peak_memory_mb"] > 0 and row["grad_norm"] > 0
        per_sample = row["tokens_per_second"] / row["samples_per_second"], row["input_tokens_per_second"]
        assert per_sample[0] == pytest.approx(5), "six tokens, the first of them not predicted"
        assert per_sample[1] == pytest.approx(6 * row["samples_per_second"])


def test_throughput_leaves_evaluations_and_saves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("kv_trainer.callbacks.metrics.time.monotonic", lambda: now[0])
    args, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"), TrainerControl()
    state, file = TrainerState(is_world_process_zero=True, epoch=0.0), MetricsFile()
    file.on_train_begin(args, state, control)
    for event, seconds in (("on_step_end", 2), ("on_evaluate", 50), ("on_step_end", 2), ("on_save", 30)):
        now[0] += seconds
        getattr(file, event)(args, state, control)
    file.count(torch.tensor(8.0), None)
    file.on_log(args, state, control, logs={"loss": 1.0})
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert row["samples_per_second"] == 2.0 and "tokens_per_second" not in row


def test_an_epoch_ends_with_the_means_of_all_its_steps(tmp_path: Path) -> None:
    epochs_trainer(tmp_path).train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    ends = [row for row in rows if row.get("event") == "epoch_end"]
    assert [(row["step"], row["epoch"]) for row in ends] == [(4, 1.0), (8, 2.0)]
    logs = {row["step"]: row for row in rows if "loss" in row}
    for end, parts in zip(ends, (((2, 2), (3, 1), (4, 1)), ((6, 2), (8, 2)))):
        mean = sum(logs[step]["loss"] * steps for step, steps in parts) / 4
        assert end["mean_loss"] == end["mean_loss_cross_entropy"] == pytest.approx(mean)
        assert end["mean_loss_kv"] == sum(step * steps for step, steps in parts) / 4
        assert end["perplexity"] == pytest.approx(math.exp(mean)) and end["mean_grad_norm"] > 0


def test_an_epoch_cut_by_a_crash_has_the_means_of_the_whole(tmp_path: Path) -> None:
    epochs_trainer(tmp_path).train()
    file = tmp_path / "metrics.jsonl"
    whole = [row for row in read_metrics(file) if row.get("event")]
    epochs_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    again = [row for row in read_metrics(file) if row.get("event")]
    assert again[0] == whole[0] and len(again) == 2
    assert again[1]["mean_loss"] == pytest.approx(whole[1]["mean_loss"])


def test_perplexity_of_anything() -> None:
    assert perplexity(0.0) == 1.0 and perplexity(1e4) == math.inf and math.isnan(perplexity(math.nan))


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
