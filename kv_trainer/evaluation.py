"""Exact answers and perplexity: two metrics that work alone and offline, and the loop that feeds them."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import datasets
import evaluate
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

if TYPE_CHECKING:
    from .arguments import EvaluationConfig

logger = logging.get_logger(__name__)

NUMBER = re.compile(r"([-+]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]+))?")
# At most so many logits in one forward (1 GiB in float32): a big vocabulary gets fewer rows at a time.
MAX_LOGITS = 2**28


def normalize_answer(answer: str | None) -> str:
    """One spelling for equal answers: '1,280.0.' -> '1280', '+.50' -> '0.5', ' Yes. ' -> 'Yes', None -> ''.

    Only an answer that is a number as a whole is rewritten; a comma that does not part thousands ('1,28') stays.
    """
    text = (answer or "").strip().rstrip(".").rstrip()
    number = NUMBER.fullmatch(text)
    if not number or not (number[2] or number[3]):
        return text
    # By text, not float or Decimal: those would round long numbers and call unequal ones equal.
    whole = number[2].replace(",", "").lstrip("0") or "0"
    fraction = (number[3] or "").rstrip("0")
    sign = "-" if number[1] == "-" and (whole, fraction) != ("0", "") else ""
    return sign + whole + (f".{fraction}" if fraction else "")


def extract_answer(text: str, pattern: str) -> str | None:
    """Group 1 of the last match of `pattern`, normalised; None where nothing (or only blanks) is matched.

    Raises ValueError if the pattern has no group.
    """
    compiled = re.compile(pattern)
    if not compiled.groups:
        raise ValueError(f"answer_pattern {pattern!r} has no group; put the answer in parentheses, as in '#### (.+)'.")
    found = list(compiled.finditer(text))
    return (normalize_answer(found[-1][1]) or None) if found else None


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
    Returns {'accuracy': 0..1, 'accuracy_<task>': 0..1, ...}; raises ValueError where there is nothing to score.
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
            ours, theirs = normalize_answer(prediction), normalize_answer(reference)
            hit = ours == theirs != ""
            hits["accuracy"].append(hit)
            if task:
                hits[f"accuracy_{task}"].append(hit)
        return {name: sum(values) / len(values) for name, values in hits.items()}


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
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset | list[dict[str, Any]],
    config: EvaluationConfig,
    progress: bool = True,
) -> dict[str, float]:
    """Loss, perplexity and exact answers of `model`, which is left as it was found.

    rows: dicts with input_ids and labels (-100 = not supervised), and for answers prompt_ids, answer and task. A
    reference that holds `config.answer_pattern` itself, as GSM8K's do, is reduced to what the pattern finds.
    Returns eval_loss (nats a token), eval_perplexity and, where `config.generate` and rows have answers,
    eval_accuracy and eval_accuracy_<task>; rows without an answer are left out of those. Every rank that calls
    this sees all rows. Raises ValueError where no row or no token can be scored.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("There are no rows to evaluate on; check data.eval_split and data.max_eval_samples.")
    with _evaluating(model):
        nll, tokens = sequence_nll(model, tokenizer, rows, config.batch_size, progress)
        results = Perplexity().compute(nll=nll, tokens=tokens)
        asked = [row for row in rows if row.get("answer") not in (None, "")] if config.generate else []
        if asked:
            prompts = [row["prompt_ids"] for row in asked]
            texts = generate_texts(model, tokenizer, prompts, config, progress)
            results |= ExactAnswer().compute(
                predictions=[extract_answer(text, config.answer_pattern) for text in texts],
                references=[extract_answer(r["answer"], config.answer_pattern) or r["answer"] for r in asked],
                tasks=[row.get("task") for row in asked],
            )
        elif config.generate:
            logger.warning_once(
                "evaluation.generate is on, but no evaluation row has an answer: accuracy is not reported. "
                "Set data.answer, or evaluation.generate to false."
            )
    return {f"eval_{name}": value for name, value in results.items()}


def sequence_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    batch_size: int,
    progress: bool = False,
) -> tuple[list[float], list[int]]:
    """Each row's negative log-likelihood (nats), summed over its supervised tokens, and their number."""
    nll, tokens = [0.0] * len(rows), [0] * len(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    max_tokens = MAX_LOGITS // model.config.get_text_config().vocab_size
    with _bar("perplexity", len(rows), progress) as bar:
        for batch in _batches(lengths, batch_size, max_tokens):
            ids, mask = _pad([rows[i]["input_ids"] for i in batch], _pad_id(tokenizer), "right", model.device)
            targets, _ = _pad([rows[i]["labels"] for i in batch], -100, "right", model.device)
            counted = targets[:, 1:] != -100
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            # Only the rows that count are widened: prompts and padding cost nothing.
            losses = F.cross_entropy(logits[:, :-1][counted].float(), targets[:, 1:][counted], reduction="none")
            sums = torch.zeros(len(batch), dtype=losses.dtype, device=losses.device)
            sums.index_add_(0, counted.nonzero()[:, 0], losses)
            for i, total, count in zip(batch, sums.tolist(), counted.sum(1).tolist(), strict=True):
                nll[i], tokens[i] = total, count
            bar.update(len(batch))
    return nll, tokens


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    config: EvaluationConfig,
    progress: bool = False,
) -> list[str]:
    """The greedy continuation of each prompt, up to the end-of-text token or `config.max_new_tokens`."""
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("A row has an answer but an empty prompt_ids; there is nothing to generate from.")
    texts = [""] * len(prompts)
    with _bar("answers", len(prompts), progress) as bar, _greedy(model, tokenizer, config.max_new_tokens):
        for batch in _batches([len(prompt) for prompt in prompts], config.batch_size):
            ids, mask = _pad([prompts[i] for i in batch], _pad_id(tokenizer), "left", model.device)
            with torch.no_grad():
                output: torch.Tensor = model.generate(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
            # The padding behind an answer that ends early is special too.
            new = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(batch, new, strict=True):
                texts[i] = text
            bar.update(len(batch))
    return texts


@contextmanager
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Iterator[None]:
    """Plain greedy decoding with a cache, whatever the checkpoint's own generation config asks for."""
    # generate() fills what it is not given from the model's config (and warns of its temperature): swap it out.
    # Under PEFT the config that counts is the wrapped model's.
    owner: Any = getattr(model, "get_base_model", lambda: model)()
    former = owner.generation_config
    owner.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=_pad_id(tokenizer),
    )
    try:
        yield
    finally:
        owner.generation_config = former


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, then each back in its own: frozen parts may have been in it already."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _batches(lengths: list[int], batch_size: int, max_tokens: int | None = None) -> Iterator[list[int]]:
    """Indices in batches of like lengths, longest first, so that what does not fit fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        rows = batch_size if max_tokens is None else min(batch_size, max_tokens // max(1, lengths[order[0]]))
        batch, order = order[: max(1, rows)], order[max(1, rows) :]
        yield batch


def _pad(rows: Iterable[list[int]], value: int, side: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids as one [B, T] long tensor filled up with `value`, and its mask (1 = real)."""
    tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tensors], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, else the end-of-text one, else 0: the attention mask hides it anyway."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _bar(name: str, total: int, progress: bool) -> tqdm:
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    # None: shown only on a terminal.
    return tqdm(total=total, desc=name, leave=False, dynamic_ncols=True, disable=None if progress and first else True)
