"""Write data/{train,dev,test}.jsonl: disjoint by prompt, from a seed.

python recipes/quickstart/make_data.py [--rows 4000] [--output recipes/quickstart/data] [--short]

--rows: to train on, half of them of each task; more of them hold the same ones too. Test and dev stay as they are.
--short: with the column `short`, a shorter reasoning with the same answer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from itertools import islice
from pathlib import Path

from tasks import TASKS, unique_rows

HERE = Path(__file__).parent
ROWS = {"test": 500, "dev": 100, "train": 2000}  # a task
SEED = 2026


def prompt_hash(row: dict[str, str]) -> str:
    return hashlib.sha256(row["prompt"].encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2 * ROWS["train"])
    parser.add_argument("--output", type=Path, default=HERE / "data")
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    splits: dict[str, list[dict[str, str]]] = {name: [] for name in ROWS}
    for task in TASKS:
        stream = unique_rows(task, SEED)
        for name, count in {**ROWS, "train": options.rows // 2}.items():
            splits[name] += list(islice(stream, count))
    options.output.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        random.Random(SEED).shuffle(rows)
        rows = [{key: text for key, text in row.items() if key != "short" or options.short} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (options.output / f"{name}.jsonl").write_text(text)
        print(f"{name}: {len(rows)} rows, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}")
    hashes = {name: {prompt_hash(row) for row in rows} for name, rows in splits.items()}
    for a in hashes:
        for b in hashes:
            assert a == b or not hashes[a] & hashes[b], f"{a} and {b} share prompts"


if __name__ == "__main__":
    main()
