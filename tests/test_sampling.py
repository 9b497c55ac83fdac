"""Sampled answers: decided by the seed and the row alone, and drawn as often as the model says."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kv_trainer.arguments import EvaluationConfig
from kv_trainer.evaluation import evaluate_model, evaluate_rows, generate_texts
from kv_trainer.sampling import RowSampler, decoding


def sampled(**settings) -> EvaluationConfig:
    return EvaluationConfig(**{"do_sample": True, "max_new_tokens": 12, **settings})


@pytest.fixture
def tokenizer(tiny_tokenizer) -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def model(tiny_model, tokenizer) -> PreTrainedModel:
    return tiny_model("llama", vocab_size=len(tokenizer)).eval()


@pytest.fixture
def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer(f"what is {'1 plus ' * (i % 4)}{i}?").input_ids for i in range(11)]


@pytest.fixture
def rows(prompts) -> list[dict]:
    return [{"input_ids": ids, "labels": ids, "prompt_ids": ids, "answer": "1"} for ids in prompts]


def test_a_seed_gives_the_same_answers_at_any_batch_size(model, tokenizer, prompts) -> None:
    texts = [generate_texts(model, tokenizer, prompts, sampled(batch_size=size, seed=3)) for size in (1, 3, 64)]
    assert texts[0] == texts[1] == texts[2]
    assert generate_texts(model, tokenizer, prompts, sampled(seed=4)) != texts[0]
    assert generate_texts(model, tokenizer, prompts, EvaluationConfig(max_new_tokens=12)) != texts[0]
    first = generate_texts(model, tokenizer, prompts[:4], sampled(seed=3))
    assert first == texts[0][:4], "fewer rows change nothing for those that are left"


def test_a_row_without_an_answer_changes_nothing_for_the_others(model, tokenizer, rows) -> None:
    rows = [{**row, "row": i} for i, row in enumerate(rows)]
    config = sampled(seed=3, answer_pattern="(?s)(.+)")
    found = evaluate_rows(model, tokenizer, rows, config, progress=False)[1]
    fewer = evaluate_rows(model, tokenizer, [{**rows[0], "answer": None}, *rows[1:]], config, progress=False)[1]
    assert [row["prediction"] for row in fewer] == [None, *(row["prediction"] for row in found[1:])]
    assert len({row["prediction"] for row in found}) > 1


def test_equal_prompts_are_answered_apart(model, tokenizer, prompts) -> None:
    assert len(set(generate_texts(model, tokenizer, [prompts[0]] * 20, sampled()))) > 10


def test_the_random_state_is_left_as_it_was_found(model, tokenizer, rows) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    found = evaluate_model(model, tokenizer, rows, sampled(), progress=False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    torch.manual_seed(99)
    assert evaluate_model(model, tokenizer, rows, sampled(), progress=False) == found


@pytest.mark.parametrize("settings", [{"temperature": 1e-4}, {"top_p": 1e-6}])
def test_the_certain_limit_is_greedy(model, tokenizer, prompts, settings) -> None:
    greedy = generate_texts(model, tokenizer, prompts, EvaluationConfig(max_new_tokens=12))
    assert generate_texts(model, tokenizer, prompts, sampled(**settings)) == greedy


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7)])
def test_tokens_are_drawn_as_often_as_the_model_says(temperature: float, top_p: float) -> None:
    n, logits = 2000, torch.tensor([-9.0, 1.0, 2.0, 0.5, 2.2, -torch.inf])
    # Evenly spaced draws: the count of each token is its share, to one in n at either end.
    draws = ((torch.arange(n) + 0.5) / n)[:, None]
    sampler = RowSampler(sampled(temperature=temperature, top_p=top_p), draws, start=7)
    scores = sampler(torch.zeros(n, 7, dtype=torch.long), logits.expand(n, -1))
    assert (scores.isfinite().sum(-1) == 1).all()
    shares = (logits.double() / temperature).softmax(-1)
    order = shares.argsort(descending=True)
    kept = order[: int((shares[order].cumsum(0) < top_p).sum()) + 1]
    expected = torch.zeros_like(shares).index_put((kept,), shares[kept] / shares[kept].sum())
    counts = scores.argmax(-1).bincount(minlength=6) / n
    assert torch.allclose(counts.double(), expected, atol=1.5 / n)


@pytest.mark.parametrize("draw", [0.0, 1.0 - 1e-12])
def test_the_ends_of_the_range_never_take_what_has_no_share(draw: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.3, 0.1, -torch.inf]])
    sampler = RowSampler(sampled(), torch.tensor([[draw]], dtype=torch.float64), start=1)
    assert sampler(torch.zeros(1, 1, dtype=torch.long), logits).argmax().item() in (1, 2)


def test_every_step_has_a_draw_of_its_own() -> None:
    sampler = decoding(sampled(max_new_tokens=3, seed=5), [4, 0], start=2)[0]
    assert sampler.draws.shape == (2, 3) and len(set(sampler.draws.flatten().tolist())) == 6
    assert torch.equal(sampler.draws[1:], decoding(sampled(max_new_tokens=3, seed=5), [0], start=9)[0].draws)
    assert not decoding(EvaluationConfig(), [0], start=2)
