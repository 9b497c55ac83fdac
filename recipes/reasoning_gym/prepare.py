"""Write the rows of nine task families, and put the models in place; all of it stays out of git. Seeded.

python recipes/reasoning_gym/prepare.py               # data/, student/, and teacher/ where smollm2 was prepared
python recipes/reasoning_gym/prepare.py --train 200   # fewer rows of each family to train on
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SMOLLM2 = HERE.parent / "smollm2"
TEACHER = SMOLLM2 / "models" / "SmolLM2-135M-Instruct"
SEED = 2026
ROWS = {"test": 100, "dev": 50, "train": 1000}  # of each family
# One exact answer each, no picture to be drawn, and short enough for a small model: settings that differ from the
# generator's own. fraction_simplification would else ask for four notations.
FAMILIES: dict[str, dict[str, Any]] = {
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "gcd": {"max_value": 200},
    "simple_equations": {"max_terms": 3, "max_value": 50},
    "fraction_simplification": {"max_value": 50, "max_factor": 20, "styles": ("plain",)},
    "leg_counting": {"min_animals": 2, "max_animals": 4, "max_instances": 9},
    "letter_counting": {"min_words": 3, "max_words": 8},
    "spell_backward": {"max_word_len": 6},
    "word_sequence_reversal": {"max_words": 5},
    "family_relationships": {"max_family_size": 5},
}

Row = dict[str, str]


def question_hash(row: Mapping[str, str]) -> str:
    """Of the words and signs of a question in any order: gcd of 12 and 18 is gcd of 18 and 12."""
    words = sorted(re.findall(r"\w+|[^\w\s]", row["prompt"].lower()))
    return hashlib.sha256(" ".join([row["task"], *words]).encode()).hexdigest()


def unique_rows(family: str, seed: int = SEED) -> Iterator[Row]:
    """An endless stream of a family's rows in which no question comes twice."""
    import reasoning_gym

    seen: set[str] = set()
    for part in range(1000):
        found = len(seen)
        name = int.from_bytes(hashlib.sha256(f"{family}-{seed}-{part}".encode()).digest()[:4], "big")
        for entry in reasoning_gym.create_dataset(family, seed=name, size=500, **FAMILIES[family]):
            answer = str(entry["answer"])
            row = {"task": family, "prompt": entry["question"].strip() + "\n", "completion": f"#### {answer}"}
            if (key := question_hash(row)) not in seen:
                seen.add(key)
                yield row | {"answer": answer}
        if len(seen) == found:
            raise SystemExit(f"{family} has no more than {found} different questions; ask for fewer rows.")


def make_splits(rows: Mapping[str, int] = ROWS) -> dict[str, list[Row]]:
    """rows: how many of each family a split gets. Each split is shuffled; no question is in two of them."""
    splits: dict[str, list[Row]] = {name: [] for name in rows}
    for family in FAMILIES:
        stream = unique_rows(family)
        for name, count in rows.items():
            splits[name] += islice(stream, count)
    for split in splits.values():
        random.Random(SEED).shuffle(split)
    hashes = [question_hash(row) for split in splits.values() for row in split]
    assert len(set(hashes)) == len(hashes), "splits share questions"
    return splits


def write_data(folder: Path, rows: Mapping[str, int] = ROWS) -> None:
    """Write data/<split>.jsonl, and print the score of who always gives the commonest answer."""
    splits = make_splits(rows)
    (folder / "data").mkdir(exist_ok=True)
    for name, split in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in split)
        partial = folder / "data" / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / "data" / f"{name}.jsonl")
        print(f"{name}: {len(split)} rows, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}")
    for family in FAMILIES:
        common = Counter(row["answer"] for row in splits["train"] if row["task"] == family).most_common(1)[0][0]
        answers = [row["answer"] for row in splits["test"] if row["task"] == family]
        print(f"{family}: always '{common}' is right in {answers.count(common) / len(answers):.0%} of the test rows")


def place_models(folder: Path) -> None:
    """student/ is a copy of smollm2's; teacher/ a link to its teacher, where that was fetched."""
    if not (folder / "student").exists():
        shutil.copytree(SMOLLM2 / "student", folder / "student")
    link = folder / "teacher"
    if link.exists():
        return
    link.unlink(missing_ok=True)  # one that leads nowhere
    if TEACHER.exists():
        link.symlink_to(os.path.relpath(TEACHER.resolve(), folder.resolve()), target_is_directory=True)
    else:
        print("No teacher: run recipes/smollm2/prepare.py and then this again, or train with --teachers null.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=ROWS["train"], metavar="N", help="rows a family to train on")
    options = parser.parse_args()
    if options.train < 1:
        parser.error(f"--train is {options.train}; give 1 or more")
    if find_spec("reasoning_gym") is None:
        raise SystemExit("reasoning-gym is missing. Install it: pip install 'kv_trainer[smollm2]'")
    write_data(HERE, {**ROWS, "train": options.train})
    place_models(HERE)


if __name__ == "__main__":
    main()
