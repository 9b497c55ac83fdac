"""Three tasks of reasoning-gym as rows with worked solutions: one line a step, then `#### answer`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

Row = dict[str, str]
LONGEST = 192  # teacher tokens of prompt + completion
# Closes every question of gsm_symbolic; the completion shows the form of the answer, so it only costs tokens.
INSTRUCTION = " Give the result as your final answer. Do not include units."
# Settings that differ from the generators' own: sums that a small model can learn to carry out step by step.
SETTINGS: dict[str, dict[str, Any]] = {
    "gsm_symbolic": {},
    "leg_counting": {"min_animals": 2, "max_animals": 4, "max_instances": 9},
    "chain_sum": {"min_terms": 2, "max_terms": 4, "max_digits": 2},
}


def word_problem(entry: dict[str, Any]) -> str:
    """The generator's own solution. Its last line says 36.0 where the answer is 36, so that line is ours."""
    return str(entry["metadata"]["answer_cot"]).rpartition("####")[0].strip()


def count_legs(entry: dict[str, Any]) -> str:
    """`4 crabs: 4 * 10 = 40`, a line an animal, then their sum."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    lines, legs = [], []
    for name, count in entry["metadata"]["animals"].items():
        legs.append(str(count * ANIMALS[name]))
        lines.append(f"{count} {name}{'s' if count > 1 else ''}: {count} * {ANIMALS[name]} = {legs[-1]}")
    return "\n".join([*lines, f"{' + '.join(legs)} = {entry['answer']}"])


def add_up(entry: dict[str, Any]) -> str:
    """`4 - 1 - 7` is `4 - 1 = 3`, then `3 - 7 = -4`."""
    first, *rest = entry["metadata"]["expression"].split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {after}")
        total = after
    return "\n".join(lines)


SOLUTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "gsm_symbolic": word_problem,
    "leg_counting": count_legs,
    "chain_sum": add_up,
}


def same_problem(task: str, entry: dict[str, Any], template: int | None) -> tuple[Any, ...]:
    """What two rows share that are one problem told twice: with other names, or with its parts in another order."""
    if task == "gsm_symbolic":
        return (template, *re.findall(r"\d+(?:\.\d+)?", entry["question"]))
    if task == "leg_counting":
        return tuple(sorted(entry["metadata"]["animals"].items()))
    return tuple(sorted(re.findall(r"[+-]? ?\d+", "+ " + entry["metadata"]["expression"])))


def usable_rows(
    task: str, tokenizer: PreTrainedTokenizerBase, seed: int, drawn: int, dropped: Counter[str]
) -> Iterator[Row]:
    """A task's rows, without repeats, float noise and rows of more than `LONGEST` tokens; counts what it drops."""
    import reasoning_gym

    problems = reasoning_gym.create_dataset(task, seed=seed, size=drawn, **SETTINGS[task])
    templates = getattr(problems, "task_indices", [None] * drawn)
    seen = set()
    for template, entry in zip(templates, problems, strict=True):
        prompt = entry["question"].strip().removesuffix(INSTRUCTION) + "\n"
        completion = f"{SOLUTIONS[task](entry)}\n#### {entry['answer']}"
        problem = same_problem(task, entry, template)
        if problem in seen:
            dropped["repeated"] += 1
        elif re.search(r"\d\.\d{4}", prompt + completion):
            dropped["float noise such as 27.333333333333336"] += 1
        elif len(tokenizer(prompt + completion).input_ids) > LONGEST:
            dropped[f"longer than {LONGEST} teacher tokens"] += 1
        else:
            seen.add(problem)
            yield {"task": task, "prompt": prompt, "completion": completion, "answer": entry["answer"]}
