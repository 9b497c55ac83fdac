"""One run of the quickstart for every default that could be otherwise; prints the test loss of each.

python recipes/quickstart/defaults.py [--steps 300] [--output outputs/defaults] [--processes 2]

Every run differs from its base in one setting. A finished run is not run again. See docs/results/defaults.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
KV = ["--losses.kv_relation", "null", "--losses.kv.weight", "1"]
BOTTLENECK = [*KV, "--projector.method", "elastic_bottleneck"]
# base -> its overrides, and the settings with their other values; the default is what the base has
BASES: dict[str, tuple[list[str], dict[str, list[str]]]] = {
    "kv_relation": ([], {
        "losses.kv_relation.parts": ["keys", "values"],
        "fusion.temperature": ["0.3", "3"],
        "alignment.layers.method": ["nearest", "cka"],
        "alignment.rope.keys": ["after"],
        "losses.cross_entropy.label_smoothing": ["0.1"],
    }),
    "kv": (KV, {
        "losses.kv.metric": ["smooth_l1", "l1", "cosine"],
        "projector.direction": ["teacher_to_student"],
        "projector.init": ["xavier", "kaiming", "normal"],
        "projector.learning_rate": ["1e-4", "1e-2"],
    }),
    "kv_bottleneck": (BOTTLENECK, {
        "projector.dropout": ["0"],
        "projector.mlp_ratio": ["0.5", "1", "2"],
        "projector.init": ["kaiming", "normal"],
    }),
}  # fmt: skip


def runs() -> dict[str, list[str]]:
    """name -> overrides."""
    found = {}
    for base, (overrides, settings) in BASES.items():
        found[base] = overrides
        for setting, values in settings.items():
            found |= {f"{base} {setting}={value}": [*overrides, f"--{setting}", value] for value in values}
    return found


def run(name: str, overrides: list[str], steps: int, output: Path) -> dict[str, float]:
    folder = output / name.replace(" ", "-")
    results = folder / "all_results.json"
    if not results.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "kv_trainer", "train", str(HERE / "two_teachers.yaml"), *overrides]
        command += ["--training.max_steps", str(steps), "--training.output_dir", str(folder)]
        command += ["--evaluation.generate", "false", "--training.disable_tqdm", "true"]
        with (folder / "log.txt").open("w") as log:
            subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    found = json.loads(results.read_text())
    print(f"{name}: test loss {found['eval_loss']:.3f} nats", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("outputs/defaults"))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with ThreadPoolExecutor(options.processes) as pool:
        jobs = {n: pool.submit(run, n, o, options.steps, options.output) for n, o in runs().items()}
        found = {name: job.result() for name, job in jobs.items()}
    print("\n| base | setting | test loss, nats | base's |\n|---|---|---|---|")
    for name, results in found.items():
        base, _, setting = name.partition(" ")
        print(f"| {base} | {setting or 'as it is'} | {results['eval_loss']:.3f} | {found[base]['eval_loss']:.3f} |")


if __name__ == "__main__":
    main()
