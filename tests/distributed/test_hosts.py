"""A recipe on two hosts, with the launch lines that deepspeed_configs/README.md gives."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from backends import ROOT
from datasets import Dataset
from helpers_trainer import ROWS, STUDENT
from safetensors.torch import load_file
from two_hosts import HUNG, available, run_on_both

pytestmark = [
    pytest.mark.distributed, pytest.mark.slow, pytest.mark.xdist_group("distributed"),
    pytest.mark.skipif(not available(), reason="needs root and network namespaces"),
]  # fmt: skip
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "2", "--num_processes", "2",
              "--machine_rank", "{rank}", "--main_process_ip", "{address}", "--main_process_port", "29511",
              "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
            "--node_rank", "{rank}", "--master_addr", "{address}", "--master_port", "29511"]  # fmt: skip
LAUNCHERS = {
    "DDP": (TORCHRUN, ["--training.use_cpu", "true"]),
    "ZeRO-2": ([*ACCELERATE, "--use_deepspeed", "--deepspeed_config_file", str(ROOT / "deepspeed_configs/zero2.json"),
                "--deepspeed_multinode_launcher", "standard"], []),
}  # fmt: skip


def test_two_hosts_train_as_one(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    for name, seed in (("student", 0), ("teacher", 7)):
        tiny_model("llama", seed=seed, **STUDENT).save_pretrained(tmp_path / name)
        tiny_tokenizer(40).save_pretrained(tmp_path / name)
    Dataset.from_list(ROWS).to_json(tmp_path / "train.jsonl")
    recipe = {
        "student": {"model": "./student"}, "teachers": {"t": {"model": "./teacher"}},
        "losses": {"cross_entropy": {}, "kv_relation": {}}, "data": {"path": "./train.jsonl", "eval_split": None},
        "training": {"max_steps": 4, "per_device_train_batch_size": 2, "disable_tqdm": True, "ddp_backend": "gloo",
                     "dataloader_drop_last": True, "optim": "sgd", "learning_rate": 0.05},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    finals = []
    for backend, (launcher, settings) in LAUNCHERS.items():
        command = [*launcher, "-m", "kv_trainer", "train", str(tmp_path / "recipe.yaml"), *settings]
        found = run_on_both([*command, "--training.output_dir", str(tmp_path / backend)], environment)
        if any(code == HUNG for code, _ in found) and (tmp_path / backend / "README.md").exists():
            # Seldom gloo never lets a process go that has done all its work (pytorch/pytorch#190489).
            warnings.warn(f"{backend} hung as it ended:\n{found[0][1][-6000:]}\n{found[1][1][-6000:]}", stacklevel=1)
            shutil.rmtree(tmp_path / backend)
            found = run_on_both([*command, "--training.output_dir", str(tmp_path / backend)], environment)
        assert [code for code, _ in found] == [0, 0], f"{backend}: {found[0][1][-3000:]}\n{found[1][1][-3000:]}"
        finals.append(load_file(tmp_path / backend / "model.safetensors"))
    start = load_file(tmp_path / "student" / "model.safetensors")
    assert max(float((x - start[name]).abs().max()) for name, x in finals[0].items()) > 1e-4, "it has learnt"
    assert max(float((x - finals[1][name]).abs().max()) for name, x in finals[0].items()) <= 1e-6
