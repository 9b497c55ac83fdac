"""The evaluation of a student: answers and likelihoods of rows, fed to the metrics."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import datasets
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .files import write_text
from .metrics import ExactAnswer, Perplexity, extract_answer, is_hit, reference_answer
from .model_checks import positions_of
from .models import end_tokens
from .sampling import decoding

if TYPE_CHECKING:
    from .arguments import EvaluationConfig

logger = logging.get_logger(__name__)

# At most so many logits in one forward (1 GiB in float32): a big vocabulary gets fewer rows at a time.
MAX_LOGITS = 2**28


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
    eval_accuracy, eval_accuracy_<task> and eval_accuracy_macro; rows without an answer are left out of those. Every
    rank that calls this sees all rows. Raises ValueError where no row or no token can be scored.
    """
    return evaluate_rows(model, tokenizer, rows, config, progress)[0]


def evaluate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset | list[dict[str, Any]],
    config: EvaluationConfig,
    progress: bool = True,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`evaluate_model`, and beside it what it found of each row, in order.

    A row's dict holds row (its number), task, prediction and reference (None where no answer was asked for), hit,
    nll (nats, summed over its supervised tokens) and tokens.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("There are no rows to evaluate on; check data.eval_split and data.max_eval_samples.")
    with _evaluating(model):
        nll, tokens = sequence_nll(model, tokenizer, rows, config.batch_size, progress)
        results = Perplexity().compute(nll=nll, tokens=tokens)
        found = [
            {"row": row.get("row", i), "task": row.get("task"), "prediction": None, "reference": None, "hit": None,
             "nll": nll[i], "tokens": tokens[i]}
            for i, row in enumerate(rows)
        ]  # fmt: skip
        asked = [i for i, row in enumerate(rows) if row.get("answer") not in (None, "")] if config.generate else []
        if asked:
            prompts, numbers = [rows[i]["prompt_ids"] for i in asked], [found[i]["row"] for i in asked]
            texts = generate_texts(model, tokenizer, prompts, config, progress, numbers)
            for i, text in zip(asked, texts, strict=True):
                answer, pattern = rows[i]["answer"], config.answer_pattern
                prediction, reference = extract_answer(text, pattern), reference_answer(answer, pattern)
                found[i] |= {"prediction": prediction, "reference": reference, "hit": is_hit(prediction, reference)}
            results |= ExactAnswer().compute(
                predictions=[found[i]["prediction"] for i in asked],
                references=[found[i]["reference"] for i in asked],
                tasks=[rows[i].get("task") for i in asked],
            )
        elif config.generate:
            logger.warning_once(
                "evaluation.generate is on, but no evaluation row has an answer: accuracy is not reported. "
                "Set data.answer, or evaluation.generate to false."
            )
    return {f"eval_{name}": value for name, value in results.items()}, found


def check_prompts(rows: datasets.Dataset, config: EvaluationConfig, student: PreTrainedConfig | None = None) -> None:
    """ValueError, before anything is trained, where an answer is asked for that could not be generated."""
    if not config.generate:
        return
    columns = rows.select_columns(["prompt_ids", "answer"])
    asked = [row["prompt_ids"] for row in columns if row["answer"] not in (None, "")]
    if not all(asked):
        raise ValueError(
            "Evaluation rows have an answer but no prompt that it could be generated from; give data.prompt, or "
            "set evaluation.generate to false."
        )
    if student is not None:
        check_room(asked, config, student)


def check_room(prompts: Sequence[Sequence[int]], config: EvaluationConfig, student: PreTrainedConfig) -> None:
    """ValueError where a prompt with the longest answer is longer than the student's table of positions."""
    longest, most = max(map(len, prompts), default=0), positions_of(student)
    if most is not None and longest + config.max_new_tokens > most:
        raise ValueError(
            f"The longest prompt has {longest} tokens and evaluation.max_new_tokens is {config.max_new_tokens}, but "
            f"this {student.model_type} has {most} positions and fails beyond them; lower evaluation.max_new_tokens "
            "or data.max_length, or set evaluation.generate to false."
        )


def write_predictions(target: str | os.PathLike[str], found: list[dict[str, Any]]) -> None:
    """What `evaluate_rows` found, a line of JSON a row. The file appears whole."""
    write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))


def read_predictions(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What `write_predictions` wrote; ValueError names a file that is damaged."""
    with open(path, encoding="utf-8") as lines:
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is damaged, for a line is no JSON: {error}") from error


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
    numbers: Sequence[int] | None = None,
) -> list[str]:
    """Each prompt's continuation, greedy or sampled, up to one of `end_tokens` or `config.max_new_tokens`.

    numbers: of the prompts' rows, by which they are sampled; default their places in the list.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("A row has an answer but an empty prompt_ids; there is nothing to generate from.")
    check_room(prompts, config, model.config.get_text_config())
    texts = [""] * len(prompts)
    with _bar("answers", len(prompts), progress) as bar, _greedy(model, tokenizer, config.max_new_tokens):
        for batch in _batches([len(prompt) for prompt in prompts], config.batch_size):
            ids, mask = _pad([prompts[i] for i in batch], _pad_id(tokenizer), "left", model.device)
            inputs = {"input_ids": ids, "attention_mask": mask}
            drawn = decoding(config, [numbers[i] for i in batch], ids.shape[1])
            with torch.no_grad():
                output: torch.Tensor = model.generate(**inputs, logits_processor=drawn)  # type: ignore[operator]
            # The padding behind an answer that ends early is special too.
            new = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(batch, new, strict=True):
                texts[i] = text
            bar.update(len(batch))
    return texts


@contextmanager
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Iterator[None]:
    """Plain greedy decoding with a cache, whatever the checkpoint's own generation config asks for.

    Sampled answers are decoded so too: sampling.py leaves one token to take.
    """
    # generate() fills what it is not given from the model's config (and warns of its temperature): swap it out.
    # Under PEFT the config that counts is the wrapped model's.
    owner: Any = getattr(model, "get_base_model", lambda: model)()
    former = owner.generation_config
    owner.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(tokenizer, former) or None,
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
