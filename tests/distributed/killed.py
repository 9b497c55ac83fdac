"""Runs that are killed, again and again, until one comes to its end: python killed.py FOLDER. test_faults.py starts it.

Every run is a fork of this process, which has imported everything and started no thread, so that it begins at once.
The first kills come at a random file operation (an audit hook sees opens and renames), the others at a random time
behind one of the next checkpoints: on any machine, however fast, they come before the last step.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from helpers_models import build_model, build_tokenizer
from helpers_trainer import World

from kv_trainer.arguments import ProjectorConfig
from kv_trainer.losses import CrossEntropy, KVLoss
from kv_trainer.manifest import last_whole

BY_FILE, BY_TIME, STEPS = 16, 6, 150
Losses = {"cross_entropy": CrossEntropy(), "kv": KVLoss(weight=0.5)}


def train(folder: Path, resume: bool, **changes: Any) -> None:
    world = World(build_model, build_tokenizer)
    trainer = world.trainer(
        folder, Losses, max_steps=STEPS, optim="adamw_torch", learning_rate=1e-3,
        projector=ProjectorConfig(dropout=0.0),
        **{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, **changes},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    (folder / "curve.json").write_text(json.dumps([log["loss"] for log in trainer.state.log_history if "loss" in log]))


def kill_at_file_operation(folder: Path, count: int) -> None:
    """Die at the count-th file of `folder` that is opened or renamed from here on."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename") and str(folder) in str(arguments[0]):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def kill_behind_checkpoint(child: int, folder: Path, step: int, seconds: float) -> None:
    """Kill a run so many seconds after a checkpoint of `step`, or a later one, is there."""
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if any(step_of(path) >= step for path in folder.glob("checkpoint-*")):
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
            return
        time.sleep(0.002)


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    gc.freeze()  # Trainer collects garbage in every run; the modules are none
    draw, base = random.Random(0), Path(sys.argv[1])
    folder, records = base / "killed", []
    whole = os.fork()
    if whole == 0:
        train(base / "whole", resume=False, save_strategy="no")
        os._exit(0)
    assert os.waitpid(whole, 0)[1] == 0
    for attempt in range(BY_FILE + BY_TIME + 1):
        (before, _), operation = last_whole(folder), draw.randrange(1, 90)
        child = os.fork()
        if child == 0:
            if attempt < BY_FILE:
                kill_at_file_operation(folder, operation)
            train(folder, resume=before is not None)
            os._exit(0)
        if BY_FILE <= attempt < BY_FILE + BY_TIME:
            kill_behind_checkpoint(child, folder, step_of(before) + draw.randrange(1, 7), draw.uniform(0, 0.05))
        status = os.waitpid(child, 0)[1]
        after, passed = last_whole(folder)
        records.append({
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "status": status,
            "before": before and before.name, "after": after and after.name, "halves": passed,
            "leftovers": [str(p.relative_to(folder)) for p in folder.rglob(".saving-*")],
        })  # fmt: skip
        (base / "records.json").write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
