"""Exact answers and perplexity as evaluate.Metric: they work alone and offline."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

import datasets
import evaluate

from .answers import IN_REFERENCES, RULES, concluded, plain

MACRO = "accuracy_macro"  # the mean over tasks
NUMBER = re.compile(r"([-+]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]+))?(?:[eE]([-+]?[0-9]{1,3}))?")


def normalize_answer(answer: str | None) -> str:
    """One spelling for equal answers: '1,280.0.' -> '1280', '+.50' -> '0.5', '5e-1' -> '0.5', ' Yes. ' -> 'Yes',
    None -> ''.

    Only an answer that is a number as a whole is rewritten; a comma that does not part thousands ('1,28') stays.
    """
    text = (answer or "").strip().rstrip(".").rstrip()
    number = NUMBER.fullmatch(text)
    if not number or not (number[2] or number[3]):
        return text
    # By text, not float or Decimal: those would round long numbers and call unequal ones equal.
    whole, fraction = _shifted(number[2].replace(",", ""), number[3] or "", int(number[4] or 0))
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    sign = "-" if number[1] == "-" and (whole, fraction) != ("0", "") else ""
    return sign + whole + (f".{fraction}" if fraction else "")


def _shifted(whole: str, fraction: str, exponent: int) -> tuple[str, str]:
    """The digits on both sides of the point, moved by so many places: to the right for more than 0."""
    if exponent < 0:
        fraction, whole = _shifted(fraction[::-1], whole[::-1], -exponent)
        return whole[::-1], fraction[::-1]
    fraction = fraction.ljust(exponent, "0")
    return whole + fraction[:exponent], fraction[exponent:]


def reference_answer(text: str, pattern: str) -> str:
    """A reference as `extract_answer` would give it: what is found in it, else (normalised) the whole of it."""
    if pattern in RULES:
        text = concluded(text)
        return normalize_answer(IN_REFERENCES[pattern](text) or plain(text))
    return extract_answer(text, pattern) or normalize_answer(text)


def extract_answer(text: str, pattern: str) -> str | None:
    """The answer in a text, normalised; None where there is none (or only blanks).

    pattern: the name of a rule of answers.py (gsm8k, boxed, last_number, auto), which looks behind </think> alone, or
    a regular expression, group 1 of whose last match is the answer. Raises ValueError if the expression has no group.
    """
    if pattern in RULES:
        return normalize_answer(RULES[pattern](concluded(text))) or None
    compiled = re.compile(pattern)
    if not compiled.groups:
        raise ValueError(f"answer_pattern {pattern!r} has no group; put the answer in parentheses, as in '#### (.+)'.")
    found = list(compiled.finditer(text))
    return (normalize_answer(found[-1][1]) or None) if found else None


def is_hit(prediction: str | None, reference: str | None) -> bool:
    """Whether an answer equals its reference; no answer is never right."""
    return normalize_answer(prediction) == normalize_answer(reference) != ""


class _InMemoryMetric(evaluate.Metric):
    """A metric that keeps its inputs in memory: nothing to lock, share or leave behind in the user's home."""

    inputs: dict[str, datasets.Value]
    description: str

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "keep_in_memory": True})

    def _build_data_dir(self) -> str:
        # The base class makes this folder at once, though it is used only by metrics on disk.
        return self._data_dir_root

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description=self.description,
            features=datasets.Features(self.inputs),
        )


class ExactAnswer(_InMemoryMetric):
    """Share of answers that equal their reference, over all and by task.

    compute(predictions, references, tasks=None): three lists of strings. None or '' in either of the first two
    means there is no answer, which is never right; a task of None counts only in the overall figure.
    Returns {'accuracy': 0..1, 'accuracy_<task>': 0..1, ...} and, of two tasks or more, 'accuracy_macro', the mean of
    theirs; raises ValueError where there is nothing to score.
    """

    inputs = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
    description = __doc__ or ""

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add lists of answers; None means no answer."""
        blank = ["" if p is None else p for p in predictions], ["" if r is None else r for r in references]
        super().add_batch(predictions=blank[0], references=blank[1], **kwargs)

    def _compute(self, predictions: Any, references: Any, tasks: Any = None) -> dict[str, float]:
        predictions, references = list(predictions), list(references)
        tasks = [None] * len(predictions) if tasks is None else list(tasks)
        if not predictions:
            raise ValueError("There are no predictions; give at least one prediction and its reference.")
        if len(tasks) != len(predictions):
            raise ValueError(f"There are {len(predictions)} predictions but {len(tasks)} tasks; give one task each.")
        hits: dict[str, list[bool]] = defaultdict(list)
        for prediction, reference, task in zip(predictions, references, tasks, strict=True):
            hit = is_hit(prediction, reference)
            hits["accuracy"].append(hit)
            if task not in (None, ""):  # 0 is a task
                hits[f"accuracy_{task}"].append(hit)
        if MACRO in hits:
            raise ValueError("A task is named 'macro', as the mean over tasks is; give it another name.")
        found = {name: sum(values) / len(values) for name, values in hits.items()}
        tasks = [value for name, value in found.items() if name != "accuracy"]
        return {**found, MACRO: math.fsum(tasks) / len(tasks)} if len(tasks) > 1 else found


class Perplexity(_InMemoryMetric):
    """Mean negative log-likelihood of a token (nats) and its exponential.

    compute(nll, tokens): the sum over each sample's supervised tokens, and how many there are. Every token weighs
    the same, whatever sample it is in. Returns {'loss': ..., 'perplexity': ...}.
    """

    inputs = {"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")}
    description = __doc__ or ""

    def _compute(self, nll: Any, tokens: Any) -> dict[str, float]:
        count = sum(tokens)
        if not count:
            raise ValueError("No token is supervised, so there is no perplexity; check the rows' labels.")
        loss = math.fsum(nll) / count
        return {"loss": loss, "perplexity": math.inf if loss >= 700 else math.exp(loss)}
