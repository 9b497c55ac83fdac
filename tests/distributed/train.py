"""Runs over one process or two, one after another: train.py JOB.json. Not a test: test_backends.py starts it.

JOB.json: [{"folder": where results go, "processes", "environment", "cases": {name: {"losses", "teachers", ...}}}]. Each
case leaves a folder with its logs, what wrapped the student, and the final model; a run of them all, a file `done`.
Every rank is a fork of this process, which has imported everything and started no thread, so that it begins at once;
the launchers themselves are tried by test_faults.py and test_hosts.py.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from helpers_models import build_model, build_tokenizer
from helpers_trainer import ROWS, World
from peft import LoraConfig
from transformers import training_args

from kv_trainer.arguments import EvaluationConfig, ProjectorConfig, TeacherConfig
from kv_trainer.data import Reader
from kv_trainer.fusion import FUSIONS
from kv_trainer.losses import CrossEntropy, DistillationLoss, GradientShare, KVLoss, KVRelationLoss, LogitKD
from kv_trainer.teachers import Teacher

LOSSES: dict[str, dict[str, DistillationLoss]] = {
    "ce": {"cross_entropy": CrossEntropy()},
    "relation": {"cross_entropy": CrossEntropy(), "kv_relation": KVRelationLoss(samples=1)},
    "gathered": {"cross_entropy": CrossEntropy(), "kv_relation": KVRelationLoss(samples=4, gather=True)},
    "projectors": {"cross_entropy": CrossEntropy(), "kv": KVLoss(weight=0.5)},
    "all": {"cross_entropy": CrossEntropy(), "kv": KVLoss(weight=0.5), "logit_kd": LogitKD(weight=0.1)},
    "without logits": {"cross_entropy": CrossEntropy(weight=0.0), "kv_relation": KVRelationLoss(samples=1)},
    "share": {"cross_entropy": CrossEntropy(), "kv": KVLoss(weight=GradientShare(0.3, every=2))},
}


class FSDPWorld(World):
    def arguments(self, *args: Any, **changes: Any) -> Any:
        """accelerate's list of what FSDP may run on leaves the CPU out."""
        arguments = super().arguments(*args, **changes)
        assert arguments.device.type == "cpu"  # makes the state that is changed here
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return arguments


def train(world: World, folder: Path, case: dict[str, Any]) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    sharded = "ACCELERATE_USE_DEEPSPEED" in os.environ or "ACCELERATE_USE_FSDP" in os.environ
    options: dict[str, Any] = {
        "per_device_train_batch_size": case.get("batch", 4) // processes, "max_steps": 4, "dataloader_drop_last": True,
        "use_cpu": not sharded, "projector": ProjectorConfig(dropout=0.0), **case.get("options", {}),
    }  # fmt: skip
    if processes > 1:
        options["ddp_backend"] = "gloo"
    if "fusion" in case:
        options["fusion"] = FUSIONS[case["fusion"]]()
    if "direction" in case:
        options["projector"] = ProjectorConfig(dropout=0.0, direction=case["direction"])
    teachers = dict(list(world.teachers().items())[: case["teachers"]])
    place = {"placement": case["placement"]} if "placement" in case else {}
    if "by_name" in case:
        models = {"student": (world.student(), world.tokenizer(40)), **teachers}
        names = save(models, folder / "models")
        options["student"] = names.pop("student")
        teachers = {name: TeacherConfig(model=model, **place) for name, model in names.items()}
    elif place:
        teachers = {n: Teacher(m, Reader(own), **place) for n, (m, own) in teachers.items()}
    rows = Dataset.from_list([{**row, "answer": "4"} for row in ROWS[:4]]) if "evaluate" in case else None
    if rows is not None:
        options["evaluation"] = EvaluationConfig(max_new_tokens=4)
    if "adapters" in case:
        options["peft_config"] = LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
        )
    if options.get("bf16"):  # Trainer leaves a CPU out where DeepSpeed or FSDP is asked for
        training_args.is_torch_bf16_gpu_available = lambda: True
    trainer = world.trainer(folder, LOSSES[case["losses"]], teachers=teachers, eval_rows=rows, **options)
    resume = str(folder.parent / case["resume"]) if "resume" in case else None
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "loss" in log]
        found = {
            "logs": logs, "evaluations": [log for log in trainer.state.log_history if "eval_loss" in log],
            "wrapped": type(trainer.model_wrapped).__name__, "processes": trainer.args.world_size,
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(found, indent=1))
    trainer.accelerator.free_memory()


def save(models: dict[str, Any], folder: Path) -> dict[str, str]:
    """The first rank writes them all, the others wait: their folders."""
    if os.environ.get("RANK", "0") == "0":
        for name, parts in models.items():
            for part in parts:
                part.save_pretrained(folder / name)
        (folder / "written").touch()
    while not (folder / "written").exists():
        time.sleep(0.1)
    return {name: str(folder / name) for name in models}


def run(job: dict[str, Any]) -> None:
    """All cases, as one rank of them."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    world = (FSDPWorld if "ACCELERATE_USE_FSDP" in os.environ else World)(build_model, build_tokenizer)
    for name, case in job["cases"].items():
        train(world, Path(job["folder"]) / name, case)
        if dist.is_initialized():
            dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def fork(job: dict[str, Any], rank: int, port: int) -> int:
    """A rank; its process id."""
    child = os.fork()
    if child:
        return child
    log = os.open(Path(job["folder"]) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    os.environ.update(job["environment"])
    if job["processes"] > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"], "MASTER_PORT": port}
        ranks["LOCAL_WORLD_SIZE"] = job["processes"]
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in ranks.items()}})
    try:
        run(job)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main() -> None:
    gc.freeze()  # Trainer collects garbage in every run; the modules are none
    for job in json.loads(Path(sys.argv[1]).read_text()):
        folder = Path(job["folder"])
        folder.mkdir(parents=True)
        port, statuses = free_port(), []
        ranks = {fork(job, rank, port) for rank in range(job["processes"])}
        while ranks:
            ended, status = os.wait()
            ranks.discard(ended)
            statuses.append(status)
            for other in ranks if status else ():
                os.kill(other, signal.SIGKILL)
        if not any(statuses):
            (folder / "done").touch()


if __name__ == "__main__":
    main()
