"""The same cases under every backend, each against one process: python tests/distributed/backends.py prints the table.

Two processes on the CPU (gloo); DeepSpeed with the files of deepspeed_configs/, FSDP2 with what accelerate launch sets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-4}
# case -> what train.py makes of it
CASES: dict[str, dict[str, Any]] = {
    "relation, one teacher, checkpointing": {
        "losses": "relation", "teachers": 1, "options": {"gradient_checkpointing": True},
    },
    "relation, two teachers": {"losses": "relation", "teachers": 2},
    "projectors, one teacher": {"losses": "projectors", "teachers": 1},
    "projectors, two teachers, checkpointing": {
        "losses": "projectors", "teachers": 2, "options": {"gradient_checkpointing": True},
    },
    "keys and values alone, checkpointing": {  # the head, and most of the last layer, get no gradient
        "losses": "without logits", "teachers": 1, "options": {"gradient_checkpointing": True},
    },
    "saved on the way, the best loaded at the end": {  # turned around, so that it is not the last
        "losses": "projectors", "teachers": 2, "evaluate": True,
        "options": {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, **ADAM,
                    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True},
    },
    "saved on the way": {
        "losses": "projectors", "teachers": 2, "options": {"save_strategy": "steps", "save_steps": 2, **ADAM},
    },
    "resumed": {"losses": "projectors", "teachers": 2, "resume": "saved on the way/checkpoint-2", "options": ADAM},
    "adapters, saved and evaluated on the way": {
        "losses": "projectors", "teachers": 2, "adapters": True, "evaluate": True,
        "options": {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, **ADAM},
    },
    "adapters, resumed": {
        "losses": "projectors", "teachers": 2, "adapters": True, "options": ADAM,
        "resume": "adapters, saved and evaluated on the way/checkpoint-2",
    },
    "accumulation, learned router": {
        "losses": "projectors", "teachers": 2, "fusion": "router", "direction": "teacher_to_student", "batch": 2,
        "options": {"gradient_accumulation_steps": 2},
    },
    "gathered relation": {"losses": "gathered", "teachers": 2},
    "fusion of targets": {"losses": "relation", "teachers": 2, "fusion": "min_norm"},
    "sharded teachers, models by name": {
        "losses": "projectors", "teachers": 2, "placement": "sharded", "by_name": True,
    },
    "offloaded teachers": {"losses": "all", "teachers": 2, "placement": "offloaded"},
    # One process computes in bfloat16 where autocast says so, DeepSpeed and FSDP everywhere.
    "bfloat16": {"losses": "all", "teachers": 2, "options": {"bf16": True}, "within": 0.05},
}  # fmt: skip
ZERO = {"ZeRO-1": "zero1.json", "ZeRO-2": "zero2.json", "ZeRO-3": "zero3.json", "ZeRO-3 offload": "zero3_offload.json"}
BACKENDS: dict[str, dict[str, str]] = {
    "DDP": {},
    **{name: {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "deepspeed_configs" / file),
    } for name, file in ZERO.items()},
    "FSDP2": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    },
}  # fmt: skip
ONE = "one process"
WRAPPED = {"DDP": "DistributedDataParallel", "FSDP2": "FSDP"}  # and the name of what it wraps, which may have adapters
SECONDS = 900
Result = tuple[dict[str, Any], dict[str, Any]]


def launch(folder: Path, runs: dict[str, list[str]]) -> None:
    """Run cases in folder/backend/case, `ONE` in one process, the others in two. train.py leaves a log.txt each."""
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "job.json"
    several = [{
        "folder": str(folder / backend), "cases": {name: CASES[name] for name in cases},
        "processes": 1 if backend == ONE else 2, "environment": BACKENDS.get(backend, {}),
    } for backend, cases in runs.items()]  # fmt: skip
    job.write_text(json.dumps(several))
    own = ("ACCELERATE_", "FSDP_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "PYTEST_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(HERE / "train.py"), str(job)], env=environment, timeout=SECONDS, cwd=ROOT)


def complaint(folder: Path) -> str | None:
    """Why a backend did not run to its end, or None."""
    if (folder / "done").exists():
        return None
    log = folder / "log.txt"
    said = [line for line in log.read_text().splitlines() if "Error" in line] if log.exists() else ["it never began"]
    return f"see {log}:\n" + "\n".join(said[:5])


def result(folder: Path) -> Result:
    """A case's result.json, and all tensors it saved at the end."""
    tensors = {}
    files = sorted((folder / "final").glob("*.safetensors"))
    assert len(files) == 2, "the student's, or its adapters', and the bridge's"
    for file in files:
        tensors |= {f"{file.name}: {name}": x for name, x in load_file(file).items()}
    return json.loads((folder / "result.json").read_text()), tensors


def difference(one: Result, other: Result) -> float:
    """The largest of all differences: losses, gradient norms, shares and weights of every step, and final weights."""
    (first, tensors), (second, others) = one, other
    assert len(first["logs"]) == len(second["logs"]) > 0 and tensors.keys() == others.keys()
    assert len(first["evaluations"]) == len(second["evaluations"])
    found = [float((x - others[name]).abs().max()) for name, x in tensors.items()]
    pairs = [*zip(first["logs"], second["logs"]), *zip(first["evaluations"], second["evaluations"])]
    for a, b in pairs:
        names = [n for n in a if n.startswith(("loss", "grad_norm", "weight", "share", "eval_loss", "eval_acc"))]
        found += [abs(a[n] - b[n]) for n in names]
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        launch(folder, {backend: list(CASES) for backend in (ONE, *options.backends)})
        for backend in (ONE, *options.backends):
            if wrong := complaint(folder / backend):
                raise SystemExit(f"{backend} failed, {wrong}")
        print(f"| | {' | '.join(options.backends)} |\n|---{'|---' * len(options.backends)}|")
        for case in CASES:
            cells = [difference(result(folder / ONE / case), result(folder / b / case)) for b in options.backends]
            print(f"| {case} | {' | '.join(f'{x:.1e}' for x in cells)} |")


if __name__ == "__main__":
    main()
