"""Two processes against one, each of one thread and as many rows a step: how well a step of the quickstart scales.

python benchmarks/processes.py [--repeats 3] [--steps 60] [--json FILE]

Weak scaling: with twice the rows a step, two processes (DDP, gloo) would at best have twice the throughput. Both are
run in turn, whole trainings of the recipe without evaluation; rows a second are counted from the tenth step on.
Needs two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart" / "two_teachers.yaml"
WARM, ROWS = 10, 32


def rows_per_second(processes: int, steps: int) -> float:
    """Of all processes together."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    settings = {
        "training.max_steps": steps, "training.logging_steps": 1, "training.disable_tqdm": "true",
        "training.per_device_train_batch_size": ROWS, "training.use_cpu": "true", "data.eval_split": "null",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"--{key}={value}" for key, value in {**settings, "training.output_dir": folder}.items()]
        command = [sys.executable, *torchrun, "-m", "kv_trainer", "train", str(RECIPE), *overrides]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-8000:]}")
        logs = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    times = {row["step"]: row["time"] for row in logs if "loss" in row}
    return processes * ROWS * (steps - WARM) / (times[steps] - times[WARM])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ratios = []
    for _ in range(options.repeats):
        one, two = rows_per_second(1, options.steps), rows_per_second(2, options.steps)
        ratios.append(two / one)
        print(f"one process {one:.1f} rows/s, two {two:.1f} rows/s: {two / one:.2f}", flush=True)
    print(f"two processes over one: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    if options.json:
        options.json.write_text(json.dumps({"ratios": ratios}) + "\n")


if __name__ == "__main__":
    main()
