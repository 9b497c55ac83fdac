"""Metrics against hand counts, and the evaluation loop against token-by-token references."""

from __future__ import annotations

import ast
import logging
import math
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kv_trainer import evaluation
from kv_trainer.arguments import EvaluationConfig
from kv_trainer.evaluation import (
    check_prompts,
    evaluate_model,
    evaluate_rows,
    generate_texts,
    read_predictions,
    sequence_nll,
    write_predictions,
)
from kv_trainer.metrics import ExactAnswer, Perplexity, extract_answer, normalize_answer
from kv_trainer.models import stop_where_taught

PATTERN = r"####\s*(.+)"
WORDS = ["<pad>", "<s>", "</s>", *"abcdefghij", *"0123456789", "####"]


def build_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = special or {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        attention_dropout=0.5, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(11):
        ids = torch.randint(3, len(WORDS), (4 + 2 * (i % 5),), generator=generator).tolist()
        cut = 1 + i % 3
        task = "even" if i % 2 == 0 else "odd"
        labels = [-100] * cut + ids[cut:]
        rows.append({"input_ids": ids, "labels": labels, "prompt_ids": ids[:cut], "task": task, "answer": str(i)})
    return rows


def naive_nll(model: LlamaForCausalLM, row: dict) -> float:
    """One token after another, without batch, padding or mask."""
    total = 0.0
    for t in range(1, len(row["input_ids"])):
        if row["labels"][t] != -100:
            logits = model(torch.tensor([row["input_ids"][:t]])).logits[0, -1].double()
            total -= logits.log_softmax(-1)[row["labels"][t]].item()
    return total


def naive_answer(model: LlamaForCausalLM, prompt: list[int], steps: int) -> list[int]:
    new: list[int] = []
    while len(new) < steps:
        best = model(torch.tensor([prompt + new])).logits[0, -1].argmax().item()
        if best == 2:
            break
        new.append(best)
    return new


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 #### 4 .", "4"),
        ("#### 1\nno, #### 2\n", "2"),
        ("#### 1,280.", "1280"),
        ("#### Yes.", "Yes"),
        ("nothing", None),
        ("#### .", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text, PATTERN) == answer


def test_extract_answer_needs_a_group() -> None:
    with pytest.raises(ValueError, match="has no group"):
        extract_answer("#### 4", r"####\s*.+")


@pytest.mark.parametrize("same", [("128", "128.0", "+128.", "0128", "128.00"), ("1,280", "1280"), ("-0", "0", "0.0"),
                                  (".5", "0.50"), ("1,234,567.10", "1234567.1")])  # fmt: skip
def test_equal_numbers_are_spelt_alike(same: tuple[str, ...]) -> None:
    assert len({normalize_answer(answer) for answer in same}) == 1


@pytest.mark.parametrize(
    "unlike", [("1,28", "128"), ("12,80", "1280"), ("1.28", "128"), ("-5", "5"), ("1,2345", "12345"), ("", "0")]
)
def test_unlike_answers_stay_unlike(unlike: tuple[str, str]) -> None:
    assert normalize_answer(unlike[0]) != normalize_answer(unlike[1])


@given(st.integers(-(10**40), 10**40), st.integers(-(10**40), 10**40))
def test_numbers_of_any_length_compare_exactly(a: int, b: int) -> None:
    assert normalize_answer(f"{a:,}") == normalize_answer(f"{a}.0")
    assert (normalize_answer(str(a)) == normalize_answer(f"{b:,}.")) == (a == b)


@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(-12, 12))
def test_powers_of_ten_are_written_out(digits: int, places: int, exponent: int) -> None:
    number = Decimal(digits).scaleb(-places)
    assert normalize_answer(f"-{number:f}e{exponent}") == normalize_answer(f"-{number.scaleb(exponent):f}")
    assert normalize_answer("1e1000") == "1e1000"  # a thousand digits that nobody wrote


def test_exact_answer_counts_by_task_and_takes_no_answer_as_wrong() -> None:
    metric = ExactAnswer()
    arguments = {
        "predictions": [None, "1,000", "a", ""],
        "references": ["1", "1000.0", "b", ""],
        "tasks": ["x", "x", "y", None],
    }
    expected = {"accuracy": 0.25, "accuracy_x": 0.5, "accuracy_y": 0.0, "accuracy_macro": 0.25}
    assert metric.compute(**arguments) == expected
    assert metric.compute(**arguments) == expected  # nothing is carried over
    assert metric.compute(predictions=["a"], references=["a"]) == {"accuracy": 1.0}
    metric.add_batch(predictions=["a", None], references=["a", "b"])
    assert metric.compute() == {"accuracy": 0.5}


def test_the_macro_average_weighs_tasks_not_rows() -> None:
    metric = ExactAnswer()
    found = metric.compute(predictions=["a"] * 5, references=[*"aaab", "a"], tasks=["x", "x", "x", "y", None])
    assert found == {"accuracy": 0.8, "accuracy_x": 1.0, "accuracy_y": 0.0, "accuracy_macro": 0.5}
    assert set(metric.compute(predictions=["a"], references=["a"], tasks=["x"])) == {"accuracy", "accuracy_x"}


def test_metrics_refuse_what_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="named 'macro'"):
        ExactAnswer().compute(predictions=["a"], references=["a"], tasks=["macro"])
    with pytest.raises(ValueError, match="no predictions"):
        ExactAnswer().compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="2 tasks"):
        ExactAnswer().compute(predictions=["a"], references=["a"], tasks=["x", "y"])
    with pytest.raises(ValueError, match="No token is supervised"):
        Perplexity().compute(nll=[0.0], tokens=[0])


def test_perplexity_weighs_tokens_not_samples() -> None:
    found = Perplexity().compute(nll=[2.0, 9.0], tokens=[1, 9])
    assert found == pytest.approx({"loss": 1.1, "perplexity": math.exp(1.1)})
    assert Perplexity().compute(nll=[1e6], tokens=[1])["perplexity"] == math.inf


def test_metrics_leave_nothing_in_the_home_and_ask_no_network(tmp_path: Path) -> None:
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise OSError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from kv_trainer.metrics import ExactAnswer, Perplexity\n"
        "assert ExactAnswer().compute(predictions=['a'], references=['a'])['accuracy'] == 1\n"
        "assert Perplexity().compute(nll=[0.0], tokens=[1])['perplexity'] == 1\n"
    )
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "TRANSFORMERS_"))}
    # MPLCONFIGDIR: matplotlib, imported beside, keeps a font cache of its own.
    environment = keep | {"HOME": str(tmp_path), "MPLCONFIGDIR": os.devnull, "OMP_NUM_THREADS": "1"}
    root = str(Path(evaluation.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env=environment | {"PYTHONPATH": root})
    assert not [path for path in tmp_path.rglob("*") if "metrics" in path.name or path.suffix in (".arrow", ".lock")]


def test_the_metrics_of_the_readme_work_offline(tmp_path: Path) -> None:
    root = Path(evaluation.__file__).parents[1]
    blocks = (root / "README.md").read_text(encoding="utf-8").split("```python\n")
    (example,) = [text.split("```")[0] for text in blocks if text.startswith("from kv_trainer.metrics")]
    refused = (
        "import socket\n"
        "def refuse(*a, **k): raise OSError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", refused + example], check=True, capture_output=True, text=True,
        env=environment | {"MPLCONFIGDIR": os.devnull, "PYTHONPATH": str(root)},
    )  # fmt: skip
    accuracy, perplexity = map(ast.literal_eval, done.stdout.splitlines())
    assert accuracy == {"accuracy": 1.0, "accuracy_sum": 1.0, "accuracy_half": 1.0, "accuracy_macro": 1.0}
    assert perplexity == pytest.approx({"loss": 1.1, "perplexity": math.exp(1.1)})


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_nll_matches_token_by_token(model, tokenizer, rows, batch_size: int, monkeypatch) -> None:
    model.eval()
    if batch_size == 4:
        monkeypatch.setattr(evaluation, "MAX_LOGITS", 25 * len(WORDS))  # long rows get smaller batches
    with torch.no_grad():
        expected = [naive_nll(model, row) for row in rows]
    nll, tokens = sequence_nll(model, tokenizer, rows, batch_size)
    assert nll == pytest.approx(expected, rel=1e-5)
    assert tokens == [sum(label != -100 for label in row["labels"][1:]) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_match_unpadded_greedy_decoding(model, tokenizer, rows, batch_size: int) -> None:
    model.eval()
    prompts = [row["prompt_ids"] for row in rows]
    with torch.no_grad():
        tokens = [naive_answer(model, prompt, 30) for prompt in prompts]
    assert min(map(len, tokens)) < 30 == max(map(len, tokens)), "some answers must end early, some must not"
    assert len(set(map(tuple, tokens))) > 5, "answers must depend on their prompts"
    config = EvaluationConfig(max_new_tokens=30, batch_size=batch_size)
    expected = [tokenizer.decode(new, skip_special_tokens=True) for new in tokens]
    assert generate_texts(model, tokenizer, prompts, config) == expected


def test_what_is_found_of_each_row_makes_the_metrics(model, tokenizer, rows, tmp_path) -> None:
    rows = [{**row, "answer": "" if i == 3 else row["answer"]} for i, row in enumerate(rows)]
    config = EvaluationConfig(max_new_tokens=4, batch_size=3, answer_pattern="(.+)")
    results, found = evaluate_rows(model, tokenizer, rows, config, progress=False)
    assert results == evaluate_model(model, tokenizer, rows, config, progress=False)
    assert [row["row"] for row in found] == list(range(len(rows)))
    assert found[3]["hit"] is found[3]["prediction"] is found[3]["reference"] is None
    asked = [row for row in found if row["hit"] is not None]
    assert sum(row["hit"] for row in asked) / len(asked) == results["eval_accuracy"]
    assert sum(row["nll"] for row in found) / sum(row["tokens"] for row in found) == results["eval_loss"]
    write_predictions(tmp_path / "found.jsonl", found)
    assert read_predictions(tmp_path / "found.jsonl") == found


def test_evaluate_model_and_batch_sizes_agree(model, tokenizer, rows) -> None:
    with torch.no_grad():
        model.eval()
        new = [naive_answer(model, row["prompt_ids"], 8) for row in rows]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        nll = sum(naive_nll(model, row) for row in rows)
    # The model's own words as references for a known share of the rows; the pattern takes all of a text.
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        row["answer"] = text if i % 4 == 0 else "wrong"
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    results = {}
    for batch_size in (1, 5):
        config = EvaluationConfig(max_new_tokens=8, batch_size=batch_size, answer_pattern="(.+)")
        results[batch_size] = evaluate_model(model, tokenizer, Dataset.from_list(rows), config, progress=False)
    assert results[1] == pytest.approx(results[5], rel=1e-5)
    assert results[1] == pytest.approx({
        "eval_loss": nll / count,
        "eval_perplexity": math.exp(nll / count),
        "eval_accuracy": 3 / 11,
        "eval_accuracy_even": 3 / 6,
        "eval_accuracy_odd": 0.0,
        "eval_accuracy_macro": 3 / 12,
    }, rel=1e-5)  # fmt: skip


def test_references_may_hold_the_pattern_themselves(model, tokenizer, rows) -> None:
    model.eval()
    with torch.no_grad():
        new = naive_answer(model, rows[0]["prompt_ids"], 6)
    text = tokenizer.decode(new, skip_special_tokens=True)
    row = rows[0] | {"answer": f"first this, then that: {text}"}
    first = text.split()[0]
    config = EvaluationConfig(max_new_tokens=6, answer_pattern=f"({first}.+)")
    assert evaluate_model(model, tokenizer, [row], config)["eval_accuracy"] == 1.0


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_found(model, tokenizer, rows, training: bool, caplog, recwarn) -> None:
    model.train(training)
    model.model.layers[0].eval()  # a frozen part
    model.config.use_cache = False
    model.generation_config.temperature = 0.6
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 9.0
    former, modes = model.generation_config, [m.training for m in model.modules()]
    seen = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append((m.training, k["input_ids"].shape)), with_kwargs=True)
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        evaluate_model(model, tokenizer, rows, EvaluationConfig(max_new_tokens=4))
    finally:
        library.removeHandler(caplog.handler)
    assert not caplog.records and not [w for w in recwarn if "generation" in str(w.message)]
    assert model.generation_config is former and model.config.use_cache is False
    assert [m.training for m in model.modules()] == modes
    assert not any(mode for mode, _ in seen)
    assert seen[-1][1] == (len(rows), 1), "the cache must be used: one new token at a time"
    assert all(p.grad is None for p in model.parameters())


def test_sampling_settings_of_the_checkpoint_change_nothing(model, tokenizer, rows) -> None:
    config, prompts = EvaluationConfig(max_new_tokens=12), [row["prompt_ids"] for row in rows]
    model.eval()
    plain = generate_texts(model, tokenizer, prompts, config)
    model.generation_config.repetition_penalty = 9.0
    assert generate_texts(model, tokenizer, prompts, config) == plain


def test_an_answer_ends_where_the_checkpoint_ends_one_too(model, tokenizer, rows) -> None:
    """A chat model's turn ends at a token of its own: what would follow is not its answer."""
    config, prompts = EvaluationConfig(max_new_tokens=12), [row["prompt_ids"] for row in rows]
    model.eval()
    plain = generate_texts(model, tokenizer, prompts, config)
    words = max((text.split() for text in plain), key=len)
    stop = words[len(words) // 2]
    mark = tokenizer.convert_tokens_to_ids(stop)
    model.generation_config.eos_token_id = [2, mark]
    assert generate_texts(model, tokenizer, prompts, config) == plain, "an ordinary token, as of another vocabulary"
    stop_where_taught(model, tokenizer, None)
    assert model.generation_config.eos_token_id == 2
    tokenizer.add_tokens([stop], special_tokens=True)
    stop_where_taught(model, tokenizer, mark)
    assert model.generation_config.eos_token_id == [2, mark]
    ended = generate_texts(model, tokenizer, prompts, config)
    cut = [t.split()[: t.split().index(stop)] if stop in t.split() else t.split() for t in plain]
    assert [text.split() for text in ended] == cut and ended != plain


def test_references_are_read_by_the_rule_of_the_answers(model, tokenizer, rows, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "generate_texts", lambda *a, **k: [r"\boxed{x = 5}", "so it is 7"])
    pair = [rows[0] | {"answer": "x = 5"}, rows[1] | {"answer": "3 + 4\n#### 7.0"}]
    found = evaluate_model(model, tokenizer, pair, EvaluationConfig(answer_pattern="auto"), progress=False)
    assert found["eval_accuracy"] == 1.0


def test_adapters_generate_and_leave_the_base_alone(model, tokenizer, rows) -> None:
    from peft import LoraConfig, get_peft_model

    former = model.generation_config
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    found = evaluate_model(adapted, tokenizer, rows, EvaluationConfig(max_new_tokens=4))
    assert "eval_accuracy" in found
    assert model.generation_config is former and adapted.generation_config is former


@pytest.mark.parametrize("special", [{"eos_token": "</s>"}, {"bos_token": "<s>"}])
def test_a_missing_pad_token_changes_nothing(model, tokenizer, rows, special) -> None:
    bare = build_tokenizer(**special)
    assert bare.pad_token_id is None
    config = EvaluationConfig(max_new_tokens=3, answer_pattern="(.+)")
    ours = evaluate_model(model, bare, rows, config)
    assert ours == pytest.approx(evaluate_model(model, tokenizer, rows, config))


def test_without_answers_accuracy_is_left_out_with_one_warning(model, tokenizer, rows, caplog) -> None:
    bare = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    for _ in range(2):
        found = evaluate_model(model, tokenizer, bare, EvaluationConfig())
    assert set(found) == {"eval_loss", "eval_perplexity"}
    assert sum("no evaluation row has an answer" in r.message for r in caplog.records) == 1
    caplog.clear()
    assert set(evaluate_model(model, tokenizer, rows, EvaluationConfig(generate=False))) == set(found)
    assert not caplog.records


def test_rows_without_an_answer_are_left_out_of_accuracy(model, tokenizer, rows) -> None:
    rows[0]["answer"] = None
    rows[1]["answer"] = "x"
    config = EvaluationConfig(max_new_tokens=2, answer_pattern="(.+)")
    found = evaluate_model(model, tokenizer, rows[:2], config)
    assert found["eval_accuracy"] == 0.0 and "eval_accuracy_even" not in found


def test_errors_say_what_to_do(model, tokenizer, rows) -> None:
    with pytest.raises(ValueError, match="no rows to evaluate"):
        evaluate_model(model, tokenizer, [], EvaluationConfig())
    asked = Dataset.from_list([rows[0], rows[1] | {"prompt_ids": []}])
    check_prompts(asked, EvaluationConfig(generate=False))
    with pytest.raises(ValueError, match="no prompt that it could be generated from; give data.prompt"):
        check_prompts(asked, EvaluationConfig())
    table = GPT2Config(n_positions=8)
    asked = Dataset.from_list([rows[0] | {"prompt_ids": [1, 2, 3], "answer": "x"}])
    check_prompts(asked, EvaluationConfig(max_new_tokens=5), table)
    check_prompts(asked, EvaluationConfig(max_new_tokens=6), LlamaConfig(max_position_embeddings=8))
    with pytest.raises(ValueError, match="longest prompt has 3 tokens.*max_new_tokens is 6.*gpt2 has 8 positions"):
        check_prompts(asked, EvaluationConfig(max_new_tokens=6), table)
    with pytest.raises(ValueError, match="empty prompt_ids"):
        evaluate_model(model, tokenizer, [rows[0] | {"prompt_ids": []}], EvaluationConfig())


def test_the_first_of_numbered_tasks_counts() -> None:
    found = ExactAnswer().compute(predictions=["1", "1", "2"], references=["1", "1", "1"], tasks=[0, 1, 2])
    assert found["accuracy_0"] == 1.0 and found["accuracy_macro"] == pytest.approx(2 / 3)
