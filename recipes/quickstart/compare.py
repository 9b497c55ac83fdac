"""Every quickstart recipe over several seeds, two processes at a time; prints exact answers on the test split.

python recipes/quickstart/compare.py [--seeds 1 2 3] [--arms two_teachers ce_only ...] [--output outputs/compare]

The arms share rows, row order, steps and, for each seed, the student's first weights. A finished run is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ARMS: dict[str, tuple[str, list[str]]] = {
    # arm -> recipe, overrides
    "two_teachers": ("two_teachers", []),
    "ce_only": ("ce_only", []),
    "chain_teacher": ("one_teacher", []),
    "letters_teacher": ("two_teachers", ["--teachers.chain", "null"]),
    "shuffled_teacher": ("shuffled_teacher", []),
}
FUSIONS = ("uniform", "entropy", "task_wise", "similarity", "router", "govern", "min_norm")  # confidence: two_teachers
ARMS |= {f"fusion_{name}": ("two_teachers", ["--fusion", f"{{method: {name}}}"]) for name in FUSIONS}
ARMS["fusion_ca_mkd"] = ("two_teachers", ["--fusion", "{method: confidence, form: ca_mkd}"])
MAIN = [arm for arm in ARMS if not arm.startswith("fusion_")]


def run(arm: str, seed: int, output: Path, extra: list[str]) -> None:
    folder = output / f"{arm}-{seed}"
    if (folder / "all_results.json").exists():
        return
    recipe, overrides = ARMS[arm]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "kv_trainer", "train", str(HERE / f"{recipe}.yaml"), *overrides, *extra]
    command += ["--training.seed", str(seed), "--training.output_dir", str(folder), "--training.disable_tqdm", "true"]
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    print(f"{arm} seed {seed}: {accuracy(folder):.1%}", flush=True)


def accuracy(folder: Path, name: str = "eval_accuracy") -> float:
    return json.loads((folder / "all_results.json").read_text())[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=MAIN, choices=ARMS)
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--processes", type=int, default=2)
    options, extra = parser.parse_known_args()
    with ThreadPoolExecutor(options.processes) as pool:
        jobs = [pool.submit(run, a, s, options.output, extra) for s in options.seeds for a in options.arms]
        for job in jobs:
            job.result()
    print(f"\n| arm | {' | '.join(f'seed {s}' for s in options.seeds)} | mean | chain | letters | perplexity |")
    print("|---" * (len(options.seeds) + 5) + "|")
    for arm in options.arms:
        folders = [options.output / f"{arm}-{seed}" for seed in options.seeds]
        each = [accuracy(f) for f in folders]
        tasks = [statistics.mean(accuracy(f, f"eval_accuracy_{t}") for f in folders) for t in ("chain", "letters")]
        perplexity = statistics.mean(accuracy(f, "eval_perplexity") for f in folders)
        cells = [f"{x:.1%}" for x in (*each, statistics.mean(each), *tasks)]
        print(f"| {arm} | {' | '.join(cells)} | {perplexity:.3f} |")


if __name__ == "__main__":
    main()
