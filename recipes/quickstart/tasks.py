"""The two task families of the quickstart, from a seed.

chain    chained arithmetic; every step states the running total.
         37+48-12+55= -> 37+48=85 85-12=73 73+55=128 #### 128
letters  a word rewritten step by step; every step states the word.
         KQWZTB swap25 rev rot2 = -> swap25 KTWZQB rev BQZWTK rot2 ZWTKBQ #### ZWTKBQ

`short` is the completion with the results of the steps alone: 85 73 128 #### 128.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator

Row = dict[str, str]


def chain(rng: random.Random, steps: int = 3) -> Row:
    """Add and subtract two-digit numbers from left to right; no total is negative."""
    total = rng.randint(10, 99)
    prompt, worked, results = str(total), [], []
    for _ in range(steps):
        operand = rng.randint(10, 99)
        sign = "-" if operand <= total and rng.random() < 0.5 else "+"
        result = total + operand if sign == "+" else total - operand
        prompt += f"{sign}{operand}"
        worked.append(f"{total}{sign}{operand}={result}")
        total = result
        results.append(str(total))
    return {
        "task": "chain",
        "prompt": f"{prompt}=",
        "completion": f" {' '.join(worked)} #### {total}",
        "answer": str(total),
        "short": f" {' '.join(results)} #### {total}",
    }


def letters(rng: random.Random, steps: int = 3, length: int = 6) -> Row:
    """Swap two places (counted from 1), reverse, or rotate a word to the left."""
    word = "".join(rng.sample(string.ascii_uppercase, length))
    operations, worked, results = [], [], []
    prompt = word
    for _ in range(steps):
        kind = rng.choice(("swap", "rev", "rot"))
        if kind == "swap":
            i, j = sorted(rng.sample(range(length), 2))
            name, places = f"swap{i + 1}{j + 1}", list(word)
            places[i], places[j] = places[j], places[i]
            word = "".join(places)
        elif kind == "rev":
            name, word = "rev", word[::-1]
        else:
            k = rng.randint(1, 3)
            name, word = f"rot{k}", word[k:] + word[:k]
        operations.append(name)
        worked.append(f"{name} {word}")
        results.append(word)
    return {
        "task": "letters",
        "prompt": f"{prompt} {' '.join(operations)} =",
        "completion": f" {' '.join(worked)} #### {word}",
        "answer": word,
        "short": f" {' '.join(results)} #### {word}",
    }


TASKS: dict[str, Callable[[random.Random], Row]] = {"chain": chain, "letters": letters}


def unique_rows(task: str, seed: int, exclude: set[str] | None = None) -> Iterator[Row]:
    """An endless stream of rows of one task whose prompts are not in `exclude` and never repeat."""
    rng, seen = random.Random(f"{task}-{seed}"), set(exclude or ())
    while True:
        row = TASKS[task](rng)
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield row
