"""Rows to ids, labels and position maps: every row form, templates, alignment through them, and the collator."""

from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import ByT5Tokenizer

from kv_trainer import data as encoding
from kv_trainer.alignment.tokens import BOS, EOS, span_index
from kv_trainer.arguments import DataConfig, TimeAlignment
from kv_trainer.data import EVALUATED, IGNORED, KVCollator, Reader, aligned_share, encode_rows, load_split, task_names
from kv_trainer.examples import Example, example_of
from kv_trainer.experiments.fingerprints import shared_prompts
from kv_trainer.recipes import load_recipe
from kv_trainer.text import Encoded, encode, render, turn_end

PLAIN = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
# What Llama-3 and Gemma do: a system prompt of their own, contents stripped, marks that hold the words of an answer.
STRIPS = (
    "{% if messages[0].role != 'system' %}[system] you are the assistant. answer the question [/system]{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} [/{{ m.role }}]{% endfor %} done"
)
SHOUTS = "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}{% endfor %}"
QUESTION = [{"role": "user", "content": "what is two times three?"}]
SIX = Example(QUESTION, " two times three is six")


def supervised(tokenizer, encoded: Encoded) -> str:
    assert all(label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))
    assert len(encoded.labels) == len(encoded.input_ids) == len(encoded.spans)
    return tokenizer.decode([label for label in encoded.labels if label != IGNORED])


@pytest.fixture
def plain(tiny_tokenizer):
    return tiny_tokenizer()


# Row forms


def test_every_row_form_gives_its_turns_and_its_answer():
    config = DataConfig()
    assert example_of({"prompt": "a", "completion": "b", "task": "t"}, config) == Example(
        [{"role": "user", "content": "a"}], "b"
    )
    turns = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "x"))]
    assert example_of({"messages": turns}, config) == Example(turns[:2], "x")
    assert example_of({"messages": turns}, config).prompt == "s\nu"
    assert example_of({"text": "abc"}, config) == Example([], "abc")
    for form in ({"prompt": turns[:2], "completion": turns[2:]}, {"prompt": turns[:1], "completion": turns[1:]}):
        assert example_of(form, config) == Example(turns[:2], "x"), "as TRL has conversations"
    assert example_of({"prompt": turns[:2], "completion": "x"}, config) == Example(turns[:2], "x")
    assert example_of({"prompt": "u", "completion": turns[2:]}, config) == Example(turns[1:2], "x")
    parts = {"prompt": turns[:2], "reasoning": "r ", "answer": 6}
    assert example_of(parts, config) == Example(turns[:2], "r 6", 2)
    row = {"question": "two?", "solution": "2", "n": 7}
    templates = DataConfig(prompt="Q{n}: {question}", response="A: {solution}")
    assert example_of(row, templates) == Example([{"role": "user", "content": "Q7: two?"}], "A: 2")
    assert example_of(row, DataConfig(response="{solution}")) == Example([], "2")
    assert example_of({"prompt": "p", "completion": "c"}, templates_over()).completion == "c!", "templates come first"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("2 x 3 = 6\n#### 6", "#### 6"),
        ("<think>six? #### no</think> 6", " 6"),
        ("a #### 5 b #### 6", "#### 6"),
        ("six", "six"),
        ("hm</think>", ""),
    ],
)
def test_the_answer_begins_at_its_marker(completion, answer):
    """The first marker of the list that is there at all, where it is last; a closing tag belongs to the reasoning."""
    rows = [
        {"prompt": "q", "completion": completion},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": completion}]},
        {"text": completion},
    ]
    for row in rows:
        found = example_of(row, DataConfig())
        assert (found.answer, found.reasoning + found.answer) == (answer, completion)
    none = example_of(rows[0], DataConfig(answer_markers=[]))
    assert (none.reasoning, none.answer) == ("", completion)


def test_reasoning_and_answer_as_columns_make_the_completion():
    row = {"prompt": "q", "reasoning": "2 x 3 #### = 6. ", "answer": 6}
    found = example_of(row, DataConfig())
    assert (found.completion, found.reasoning, found.answer) == ("2 x 3 #### = 6. 6", "2 x 3 #### = 6. ", "6")
    assert example_of({**row, "reasoning": None}, DataConfig()).completion == "6"
    assert example_of({**row, "completion": "six"}, DataConfig()).completion == "six"


def templates_over() -> DataConfig:
    return DataConfig(prompt="{prompt}", response="{completion}!")


ANSWERED = [{"role": "assistant", "content": "a"}]
IMAGE = [{"role": "user", "content": [{"type": "image"}]}]
CALLED = "The assistant's content in the column messages is None, no text; .* without tool calls and images"


@pytest.mark.parametrize(
    ("row", "config", "says"),
    [
        ({"question": "q", "answer": "a"}, DataConfig(), "columns question, answer; give prompt"),
        ({"completion": "a"}, DataConfig(), "columns completion; give prompt"),
        ({"question": "q"}, DataConfig(prompt="{qestion}", response="x"), "column 'qestion', but .* have question"),
        ({"question": "q"}, DataConfig(prompt="{question}"), "data.response is not given"),
        ({"messages": [{"role": "user", "content": "q"}]}, DataConfig(), "messages is by 'user'"),
        (
            {"prompt": "q", "completion": [{"role": "user", "content": "q"}]},
            DataConfig(),
            "The last of a row's completion is by 'user'; it must be the assistant's answer",
        ),
        ({"messages": []}, DataConfig(), "The column messages is an empty list; give .* or filter such rows out"),
        ({"messages": None}, DataConfig(), "The column messages is None; give a list of messages"),
        ({"messages": "q"}, DataConfig(), "The column messages is 'q'; give a list of messages"),
        ({"messages": ["q"]}, DataConfig(), "The column messages has 'q', which has no role; give a list"),
        ({"messages": [{"from": "human", "value": "q"}]}, DataConfig(), "has {'from': 'human', .* has no role"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, DataConfig(), CALLED),
        ({"messages": [{"role": "user", "content": None}, *ANSWERED]}, DataConfig(), "The user's content in the col"),
        ({"messages": [*IMAGE, *ANSWERED]}, DataConfig(), r"content in the column messages is \[\{'type': 'image'\}\]"),
        ({"prompt": IMAGE, "completion": "a"}, DataConfig(), "The user's content in the column prompt is .*image"),
        ({"prompt": None, "completion": "a"}, DataConfig(), "The column prompt is None, no text; filter such rows out"),
        ({"prompt": "q", "completion": 6}, DataConfig(), "The column completion is 6, .* data.prompt and data.resp"),
        ({"prompt": "q", "completion": []}, DataConfig(), "The column completion is an empty list"),
        ({"text": None}, DataConfig(), "The column text is None, no text"),
    ],
)
def test_a_row_that_cannot_be_read_names_what_it_has(row, config, says):
    with pytest.raises(ValueError, match=says):
        example_of(row, config)


def test_readers_without_offsets_or_template_are_refused(plain):
    with pytest.raises(ValueError, match="is a slow one"):
        Reader(ByT5Tokenizer())
    with pytest.raises(ValueError, match="has no chat template; set chat: false"):
        Reader(plain, chat=True)


# One row


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("merges", [0, 40, 120])
def test_only_the_completion_and_the_end_are_learned(tiny_tokenizer, merges, bos):
    tokenizer = tiny_tokenizer(merges, bos=bos)
    found = encode(SIX, Reader(tokenizer), 999)
    assert supervised(tokenizer, found) == " two times three is six</s>"
    text = "what is two times three? two times three is six</s>"
    assert tokenizer.decode(found.input_ids) == ("<s>" if bos else "") + text
    assert found.spans[-1] == EOS and (found.spans[0] == BOS) == bos
    everything = encode(SIX, Reader(tokenizer), 999, train_on_prompt=True)
    assert supervised(tokenizer, everything) == text and everything.input_ids == found.input_ids


def test_text_alone_is_learned_whole(plain):
    assert supervised(plain, encode(Example([], "the lazy dog"), Reader(plain), 999)) == "the lazy dog</s>"


def test_turns_without_a_template_are_lines(plain):
    turns = [{"role": "system", "content": "be"}, {"role": "user", "content": "what?"}]
    found = encode(Example(turns, " six"), Reader(plain), 999)
    assert plain.decode(found.input_ids) == "be\nwhat? six</s>" and supervised(plain, found) == " six</s>"
    assert {s[0] for s in found.spans if s} == {0, 1, 2, EOS[0]}
    assert sum(s is None for s in found.spans) == 1, "the line end between the turns is nobody's text"


def test_an_end_token_that_the_tokenizer_adds_is_learned_once(tiny_tokenizer):
    tokenizer = tiny_tokenizer(bos=True)
    own = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), own])
    found = encode(SIX, Reader(tokenizer), 999)
    assert found == encode(SIX, Reader(tiny_tokenizer(bos=True)), 999)
    assert supervised(tokenizer, found).endswith("six</s>") and found.spans[-1] == EOS


def test_a_token_across_the_border_is_learned(tiny_tokenizer):
    """Left to the prompt it would never be learned, and the prompt of an evaluation would give the answer away."""
    tokenizer = tiny_tokenizer(120)
    assert len(tokenizer(" six")["input_ids"]) == 1
    row = {"prompt": "what is two times three? ", "completion": "six"}
    found = encode(example_of(row, DataConfig()), Reader(tokenizer), 999)
    assert supervised(tokenizer, found) == " six</s>"
    assert found.spans[-2] == (1, -1, 3), "it has read the completion to its end"
    encoded = encode_rows(Dataset.from_list([row]), Reader(tokenizer), {}, DataConfig(), keep=("prompt_ids",))
    assert tokenizer.decode(encoded[0]["prompt_ids"]) == "what is two times three?"


@pytest.mark.parametrize("length", [1, 5, 12, 999])
def test_truncation_keeps_the_front(plain, length):
    whole, short = encode(SIX, Reader(plain), 999), encode(SIX, Reader(plain), length)
    assert short.input_ids == whole.input_ids[:length] and short.labels == whole.labels[:length]
    assert short.spans == whole.spans[:length]


@pytest.mark.parametrize("length", [2, 5, 12, 999])
@pytest.mark.parametrize("bos", [False, True])
def test_truncation_on_the_left_keeps_the_end_and_the_start_token(tiny_tokenizer, length, bos):
    tokenizer = tiny_tokenizer(bos=bos)
    whole = encode(SIX, Reader(tokenizer), 999)
    short = encode(SIX, Reader(tokenizer), length, truncation_side="left")
    count = min(length, len(whole.input_ids)) - bos
    for name in ("input_ids", "labels", "spans", "segments"):
        values = getattr(whole, name)
        assert getattr(short, name) == values[:bos] + values[-count:], name
    assert short.supervised == whole.supervised
    at = whole.answer_position - (len(whole.input_ids) - count - bos)
    assert short.answer_position == (at if at >= bos else -1)


@given(ours=st.integers(3, 40), theirs=st.integers(3, 40))
def test_indices_of_rows_cut_on_the_left_meet_the_same_text(tiny_tokenizer, ours, theirs):
    student, teacher = tiny_tokenizer(40, bos=True), tiny_tokenizer(0)
    a, b = (
        encode(SIX, Reader(t), length, truncation_side="left") for t, length in ((student, ours), (teacher, theirs))
    )
    index = span_index(a.spans, b.spans)
    assert index[-1] == len(b.input_ids) - 1
    for i, j in enumerate(index):
        if j >= 0:
            left, right = student.decode(a.input_ids[i:]), teacher.decode(b.input_ids[j:])
            assert left.endswith(right[1:]) and a.spans[i][::2] == b.spans[j][::2]


def test_a_character_cut_in_its_bytes_was_not_read(tiny_tokenizer):
    tokenizer = tiny_tokenizer(0)
    example = Example([], "a東b")
    whole = encode(example, Reader(tokenizer), 999)
    for length, aligned in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 5)):
        short = encode(example, Reader(tokenizer), length)
        last = max(j for j in span_index(whole.spans, short.spans))
        assert last == aligned - 1, length


@pytest.mark.parametrize("merges", [0, 40, 120])
@pytest.mark.parametrize("template", [None, PLAIN, STRIPS], ids=["none", "plain", "strips"])
def test_segments_and_the_position_before_the_answer(tiny_tokenizer, template, merges):
    tokenizer = tiny_tokenizer(merges, chat_template=template, bos=template is None)
    example = Example(QUESTION, " two times three</think> is six", len(" two times three</think>"))
    found = encode(example, Reader(tokenizer, chat=template is not None), 999)
    texts = {
        s: tokenizer.decode([t for t, of in zip(found.input_ids, found.segments, strict=True) if of == s])
        for s in (-1, 0, 1, 2)
    }
    assert texts[0].strip() == QUESTION[0]["content"] and texts[2] == " is six"
    assert texts[1].strip() == "two times three</think>"
    assert found.segments[found.answer_position : found.answer_position + 2] == [1, 2]
    if template is None:
        assert texts[-1] == "<s></s>"
    plain = encode(SIX, Reader(tokenizer), 999)
    assert plain.segments[plain.answer_position + 1] == 2 and plain.labels[plain.answer_position] == IGNORED
    assert encode(Example(QUESTION, "hm", 2), Reader(tokenizer), 999).answer_position == -1, "no answer, no position"


# Templates


@pytest.mark.parametrize("template", [PLAIN, STRIPS], ids=["plain", "strips"])
@pytest.mark.parametrize("merges", [0, 60])
@pytest.mark.parametrize("lead", ["", "  \n"])
def test_segments_are_the_right_characters_in_a_template(tiny_tokenizer, template, merges, lead):
    tokenizer = tiny_tokenizer(merges, chat_template=template)
    parts = [f"{lead}über seven plus 東京", f"{lead}twelve is five ", f"{lead}fox over dog"]
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": part} for role, part in zip(roles, parts, strict=True)]
    example, answer = Example(turns, f"{lead}jumps 🦊 lazy "), f"{lead}jumps 🦊 lazy "
    text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
    found = encode(example, Reader(tokenizer, chat=True), 999)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert len(offsets) == len(found.spans)
    cores = [part.strip() if template is STRIPS else part for part in (*parts, answer)]
    leads = [len(part) - len(part.lstrip()) if template is STRIPS else 0 for part in (*parts, answer)]
    covered = set()
    for (start, end), span in zip(offsets, found.spans, strict=True):
        places = [i for i, core in enumerate(cores) if text.index(core) < end <= text.index(core) + len(core)]
        if not places:
            assert span is None
            continue
        place = text.index(cores[places[0]])
        assert span == (places[0], start - place + leads[places[0]], end - place + leads[places[0]])
        covered.update((places[0], i) for i in range(max(start, place), end))
    assert len(covered) == sum(map(len, cores)), "every character of the row is in some token"


@pytest.mark.parametrize("answer", ["assistant", "user", "s", "what is two times three?"])
@pytest.mark.parametrize("template", [PLAIN, STRIPS], ids=["plain", "strips"])
def test_an_answer_that_the_markup_holds_too_is_found_in_its_place(tiny_tokenizer, template, answer):
    tokenizer = tiny_tokenizer(chat_template=template)
    reader = Reader(tokenizer, chat=True)
    text, places = render(Example(QUESTION, answer), reader)
    assert text == tokenizer.apply_chat_template([*QUESTION, {"role": "assistant", "content": answer}], tokenize=False)
    assert text[places[-1].start : places[-1].end] == answer and text.count(answer) > 1
    assert text[: places[-1].start].endswith("<|assistant|>\n" if template is PLAIN else "[assistant] ")
    assert text[places[0].start : places[0].end] == QUESTION[0]["content"]
    closing = "<|end|>\n" if template is PLAIN else " [/assistant] done"
    learned = supervised(tokenizer, encode(Example(QUESTION, answer), reader, 999))
    assert learned.lstrip() == answer + closing, "the first token may hold the space before it"


def test_chat_adds_no_end_token_or_start_token_of_its_own(tiny_tokenizer):
    tokenizer = tiny_tokenizer(bos=True, chat_template=PLAIN)
    text = "<|user|>\nwhat is two times three?<|end|>\n<|assistant|>\nsix<|end|>\n"
    assert tokenizer.decode(encode(Example(QUESTION, "six"), Reader(tokenizer, chat=True), 999).input_ids) == text


WORDS = st.text("ab é\n🦊[]", min_size=1, max_size=12)
TEMPLATES = st.sampled_from([PLAIN, STRIPS])


@given(question=WORDS, answer=WORDS, left=st.none() | TEMPLATES, right=TEMPLATES)
def test_two_templates_align_shared_text_only(tiny_tokenizer, question, answer, left, right):
    example = Example([{"role": "user", "content": question}], answer)
    student = tiny_tokenizer(40, chat_template=left)
    teacher = tiny_tokenizer(10, chat_template=right)
    readers = Reader(student, chat=left is not None), Reader(teacher, chat=True)
    try:
        ours, theirs = (encode(example, reader, 999) for reader in readers)
    except ValueError as error:  # a part of spaces only cannot be told from the template's own
        assert "changes the text" in str(error) and not (question.strip() and answer.strip())
        return
    index = span_index(ours.spans, theirs.spans)
    parts = [question, answer]
    for i, j in enumerate(index):
        if j >= 0:
            (segment, _, end), (other, _, same) = ours.spans[i], theirs.spans[j]
            assert (segment, end) == (other, same) and segment in (0, 1) and 0 < end <= len(parts[segment])
    aligned = {ours.spans[i][:1] + ours.spans[i][2:] for i, j in enumerate(index) if j >= 0}
    shared = {(s[0], s[2]) for s in ours.spans if s} & {(s[0], s[2]) for s in theirs.spans if s}
    assert aligned == shared
    if left is right is PLAIN and question.strip() and answer.strip():
        assert aligned, "the same text was read twice, so something aligns"


def test_alignment_goes_through_different_templates(tiny_tokenizer):
    """By bytes on both sides every character of the row aligns, and nothing of the markup."""
    ours = encode(Example(QUESTION, " six "), Reader(tiny_tokenizer(0, chat_template=PLAIN), chat=True), 999)
    theirs = encode(Example(QUESTION, " six "), Reader(tiny_tokenizer(0, chat_template=STRIPS), chat=True), 999)
    index = span_index(ours.spans, theirs.spans)
    aligned = [ours.spans[i] for i, j in enumerate(index) if j >= 0]
    assert len(aligned) == len(QUESTION[0]["content"]) + len("six")
    assert all(ours.input_ids[i] == theirs.input_ids[j] for i, j in enumerate(index) if j >= 0)
    assert (1, 0, 1) not in aligned, "the space that one template strips is read by one model only"


def test_a_template_that_changes_text_is_refused(tiny_tokenizer):
    reader = Reader(tiny_tokenizer(chat_template=SHOUTS), chat=True)
    with pytest.raises(ValueError, match="refuses a row, or changes its text.*Set chat: false"):
        render(Example(QUESTION, "hm </think> six"), reader)


# Data sets

ROWS = [
    {"prompt": "what is two times three?", "completion": " six", "task": "times", "answer": "6"},
    {"prompt": "what is seven plus five? seven plus five?", "completion": " twelve", "task": "plus", "answer": "12"},
]


def test_rows_are_encoded_for_student_and_every_teacher(tiny_tokenizer):
    student, other = tiny_tokenizer(40), tiny_tokenizer(0, bos=True)
    readers = {"same": Reader(student), "bytes": Reader(other)}
    keep = ("prompt_ids", "task", "answer")
    rows = Dataset.from_list(ROWS)
    found = encode_rows(rows, Reader(student), readers, DataConfig(), keep=keep)
    assert set(found.column_names) == {"row", "input_ids", "labels", "answer_position", *keep} | {
        f"{t}/{c}" for t in readers for c in ("input_ids", "labels", "index", "supervised")
    }
    for row, given_row in zip(found, ROWS, strict=True):
        assert student.decode(row["prompt_ids"]) == given_row["prompt"]
        assert (row["task"], row["answer"]) == (given_row["task"], given_row["answer"])
        assert row["same/input_ids"] == row["input_ids"] and row["same/index"] == list(range(len(row["input_ids"])))
        assert row["bytes/index"][-1] == len(row["bytes/input_ids"]) - 1
        for i, j in enumerate(row["bytes/index"]):
            assert student.decode(row["input_ids"][: i + 1]) == other.decode(row["bytes/input_ids"][1 : j + 1])
    assert aligned_share(found, "same") == aligned_share(found, "bytes") == 1.0
    assert aligned_share(encode_rows(rows, Reader(other), {"t": Reader(student)}, DataConfig()), "t") < 0.8


def test_templates_of_task_and_answer(plain):
    config = DataConfig(prompt="{q}", response="{a}", task="{kind}-1", answer="{a}")
    rows = Dataset.from_list([{"q": "two?", "a": "2", "kind": "n"}])
    row = encode_rows(rows, Reader(plain), {}, config, keep=("task", "answer"))[0]
    assert (row["task"], row["answer"]) == ("n-1", "2")
    bare = encode_rows(rows, Reader(plain), {}, DataConfig(response="{a}"), keep=("task", "answer"))[0]
    assert (bare["task"], bare["answer"]) == (None, None)


def test_length_is_cut_on_both_sides(tiny_tokenizer):
    config = DataConfig(max_length=26)
    student, teacher = tiny_tokenizer(120), tiny_tokenizer(0)
    row = encode_rows(Dataset.from_list(ROWS[:1]), Reader(student), {"t": Reader(teacher)}, config)[0]
    assert len(row["input_ids"]) < 26 and len(row["t/input_ids"]) == len(row["t/labels"]) == 26
    assert len(row["t/index"]) == len(row["input_ids"]) and 0 < max(row["t/index"]) < 26
    assert row["t/index"][-1] == -1, "the teacher never got to the end"


def test_a_first_token_alone_is_nothing_to_learn(plain, caplog):
    """It comes after nothing: a step of such rows would divide zero by zero."""
    rows = Dataset.from_list([{"text": ""}, {"text": "two plus two"}])
    found = encode_rows(rows, Reader(plain), {}, DataConfig())
    assert len(found) == 1 and "1 of 2 rows have no supervised token" in caplog.text


def test_rows_without_a_learned_token_are_left_out_with_a_word(plain, caplog):
    rows = Dataset.from_list([ROWS[0], ROWS[1]])
    short = DataConfig(max_length=len(encode(example_of(ROWS[0], DataConfig()), Reader(plain), 999).input_ids))
    with caplog.at_level(logging.WARNING, logger="kv_trainer.data"):
        found = encode_rows(rows, Reader(plain), {}, short)
    assert len(found) == 1 and "1 of 2 rows have no supervised token" in caplog.text
    assert found[0]["input_ids"] == encode(example_of(ROWS[0], short), Reader(plain), 999).input_ids
    with pytest.raises(ValueError, match="No row has a supervised token"):
        encode_rows(rows, Reader(plain), {}, DataConfig(max_length=3))


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "two? ", "completion": ""}, True),
        ({"prompt": "two? ", "reasoning": "one and one " * 9, "answer": "2"}, True),
        ({"prompt": "two? ", "completion": "2"}, False),
        ({"text": "2"}, False),
    ],
)
def test_answers_that_are_empty_or_cut_off_are_told(plain, caplog, row, said):
    with caplog.at_level(logging.WARNING, logger="kv_trainer.data"):
        found = encode_rows(Dataset.from_list([row]), Reader(plain), {}, DataConfig(max_length=24))
    assert len(found) == 1 and ("1 of 1 rows lack the first token of their answer" in caplog.text) == said


def test_a_streamed_data_set_is_refused(plain):
    with pytest.raises(ValueError, match="without streaming=True"):
        encode_rows(Dataset.from_list(ROWS).to_iterable_dataset(), Reader(plain), {}, DataConfig())


def test_a_missing_column_is_named_from_the_data_set(plain):
    with pytest.raises(ValueError, match="columns q, a; give prompt"):
        encode_rows(Dataset.from_list([{"q": "x", "a": "y"}]), Reader(plain), {}, DataConfig())


def test_collator_pads_on_the_right_and_masks(tiny_tokenizer):
    student, teacher = tiny_tokenizer(40), tiny_tokenizer(0)
    rows = list(encode_rows(Dataset.from_list(ROWS), Reader(student), {"t": Reader(teacher)}, DataConfig()))
    batch = KVCollator(pad_token_id=0, teacher_pad_ids={"t": 7})(rows)
    assert set(batch) == {"row", "answer_position", "task", "input_ids", "attention_mask", "labels", "teachers"}
    assert set(batch["teachers"]["t"]) == {"input_ids", "attention_mask", "labels", "index", "supervised"}
    check_padding(batch, rows, "", {"input_ids": 0, "labels": IGNORED})
    check_padding(batch["teachers"]["t"], rows, "t/", {"input_ids": 7, "labels": IGNORED})
    assert batch["teachers"]["t"]["index"].shape == batch["input_ids"].shape, "one teacher position a student position"
    check_padding(batch["teachers"]["t"], rows, "t/", {"index": -1}, masked=False)
    assert set(KVCollator(0, {})(rows)["teachers"]) == set()


def check_padding(batch, rows, prefix: str, values: dict[str, int], masked: bool = True) -> None:
    for name, value in values.items():
        assert batch[name].dtype == torch.long
        for found, row in zip(batch[name].tolist(), rows, strict=True):
            plain = row[prefix + name]
            assert found == plain + [value] * (len(found) - len(plain))
    lengths = [len(row[f"{prefix}input_ids"]) for row in rows]
    assert len(set(lengths)) == 2
    if masked:
        assert batch["attention_mask"].sum(1).tolist() == lengths
        assert all(m == sorted(m, reverse=True) for m in batch["attention_mask"].tolist())


# Tasks


def test_tasks_are_numbers_in_training_and_names_in_evaluation(plain):
    rows = Dataset.from_list([*ROWS, {**ROWS[0], "task": None}])
    found = encode_rows(rows, Reader(plain), {}, DataConfig())
    assert task_names(found) == ("plus", "times") and found["task"][:] == [1, 0, None]
    assert KVCollator(0, {})(list(found))["task"].tolist() == [1, 0, -1]
    assert task_names(found.select([0])) == ("plus", "times"), "a part of the rows has the same numbers"
    named = encode_rows(rows, Reader(plain), {}, DataConfig(task="{answer}-{task}"))
    assert task_names(named) == ("12-plus", "6-times") and named["task"][2] is None
    evaluated = encode_rows(rows, Reader(plain), {}, DataConfig(), keep=("task",))
    assert evaluated["task"][:] == ["times", "plus", None] and task_names(evaluated) == ()
    assert "task" not in KVCollator(0, {})(list(evaluated))


def test_rows_without_a_task_have_no_number(plain):
    for rows in ([{"prompt": "a", "completion": "b"}], [{"prompt": "a", "completion": "b", "task": None}]):
        found = encode_rows(Dataset.from_list(rows), Reader(plain), {}, DataConfig())
        assert "task" not in found.column_names and task_names(found) == ()


# Texts that differ

LONG = " two and two and two is six. so seven plus five? twelve"
OWN = [
    {
        "prompt": "what is two times three?",
        "reasoning": " two times three",
        "answer": " #### 6",
        "long": f"{LONG} #### 6",
    },
    {"prompt": "what is seven plus five?", "reasoning": " seven", "answer": " #### 12", "long": f"{LONG}{LONG} #### 9"},
]


def encode_own(tiny_tokenizer, time: TimeAlignment, **config) -> Dataset:
    """Student and teacher cut text unlike; the teacher reasons longer, to the same answer in the first row only."""
    readers = {"math": Reader(tiny_tokenizer(0)), "other": Reader(tiny_tokenizer(20))}
    settings = DataConfig(teacher_text={"math": "{long}"}, answer_markers=[" ####"], **config)
    return encode_rows(Dataset.from_list(OWN), Reader(tiny_tokenizer(40, bos=True)), readers, settings, time=time)


def check_segments(row: dict, name: str = "math") -> None:
    """Every aligned position is in the segment of its counterpart; segments begin and end together."""
    ours, theirs, index = row["segments"], row[f"{name}/segments"], row[f"{name}/index"]
    for segment, u in zip(ours, index, strict=True):
        if u >= 0:
            assert theirs[math.floor(u)] == theirs[math.ceil(u)] == segment
    known = [u for u in index if u >= 0]
    assert known == sorted(known)


def test_same_text_aligns_the_prompt_only_and_says_so(tiny_tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="kv_trainer.data"):
        found = encode_own(tiny_tokenizer, TimeAlignment())
    assert "data.teacher_text gives teacher math" in caplog.text and "segment_aware" in caplog.text
    assert "segments" not in found.column_names and "math/rank" not in found.column_names
    wide = encode_own(tiny_tokenizer, TimeAlignment("segment_aware"))
    for row, segmented in zip(found, wide, strict=True):
        for i, j in enumerate(row["math/index"]):
            assert isinstance(j, int) and (j < 0 or segmented["segments"][i] == 0)
        assert max(row["math/index"]) >= 0 and row["other/index"] == [int(u) for u in segmented["other/index"]]


def test_linear_goes_from_end_to_end(tiny_tokenizer):
    for row in encode_own(tiny_tokenizer, TimeAlignment("linear")):
        count, there = len(row["input_ids"]), len(row["math/input_ids"])
        assert row["math/index"] == pytest.approx([i * (there - 1) / (count - 1) for i in range(count)])


@pytest.mark.parametrize("merges", [(0, 40), (40, 0)], ids=["longer", "shorter"])
def test_truncate_counts_positions_and_reads_nothing(tiny_tokenizer, merges: tuple[int, int]):
    ours, theirs = (Reader(tiny_tokenizer(count)) for count in merges)
    config = DataConfig(answer_markers=[" ####"])
    for row in encode_rows(Dataset.from_list(OWN), ours, {"math": theirs}, config, time=TimeAlignment("truncate")):
        count, there = len(row["input_ids"]), len(row["math/input_ids"])
        assert (count > there) == (merges[0] < merges[1])
        assert row["math/index"] == [*range(min(count, there)), *[-1] * max(0, count - there)]


def test_segment_aware_is_spans_where_text_is_shared_and_linear_where_not(tiny_tokenizer):
    student, teacher = tiny_tokenizer(40, bos=True), tiny_tokenizer(0)
    first, second = encode_own(tiny_tokenizer, TimeAlignment("segment_aware"))
    for row in (first, second):
        check_segments(row)
        index, ours, theirs = row["math/index"], row["segments"], row["math/segments"]
        inside = [index[i] for i, segment in enumerate(ours) if segment == 1]
        low, high = theirs.index(1), len(theirs) - 1 - theirs[::-1].index(1)
        steps = len(inside) - 1
        assert inside == pytest.approx([low + i * (high - low) / steps for i in range(steps + 1)])
        assert index[-1] == len(theirs) - 1 and index[0] == -1, "the ends meet, and only the student has a start token"
    # The same answer behind another reasoning: by spans, so by what was read of it.
    of = [i for i, segment in enumerate(first["segments"]) if segment == 2]
    begin = first["math/segments"].index(2)
    for i in of:
        j = first["math/index"][i]
        assert j == int(j)
        read = student.decode(first["input_ids"][of[0] : i + 1])
        assert teacher.decode(first["math/input_ids"][begin : int(j) + 1]) == read
    # Another answer (9 for 12): linear.
    answer = [second["math/index"][i] for i, segment in enumerate(second["segments"]) if segment == 2]
    assert answer[0] == second["math/segments"].index(2) and -1 not in answer


@pytest.mark.parametrize("budget", [None, 1, 3, 50])
def test_rkv_leaves_the_reasoning_to_the_run(tiny_tokenizer, budget):
    encoded = encode_own(tiny_tokenizer, TimeAlignment("rkv", budget=budget))
    aware = encode_own(tiny_tokenizer, TimeAlignment("segment_aware"))
    for row, plain_row in zip(encoded, aware, strict=True):
        ranks = [r for r, segment in zip(row["math/rank"], row["segments"], strict=True) if segment == 1]
        count = min(len(ranks), budget or 99)
        assert sorted(set(ranks)) == list(range(count)) and ranks == sorted(ranks), "each is used, in time order"
        for i, segment in enumerate(row["segments"]):
            assert segment == 1 or row["math/rank"][i] == -1
        assert row["math/index"] == plain_row["math/index"], "what is not selected is taken as under segment_aware"
        assert set(row["other/rank"]) == {-1} and row["other/index"] == plain_row["other/index"], "it reads the same"
    assert aligned_share(encoded, "math") == aligned_share(aware, "math")
    batch = KVCollator(0, {"math": 0, "other": 0})(list(encoded))
    assert batch["segments"].shape == batch["input_ids"].shape == batch["teachers"]["math"]["rank"].shape
    theirs = batch["teachers"]["math"]
    assert theirs["segments"].shape == theirs["input_ids"].shape and theirs["segments"][0, -1] == -1
    assert theirs["index"].dtype == torch.float32 and theirs["rank"].dtype == torch.long
    given = torch.tensor(encoded[0]["math/index"])
    torch.testing.assert_close(theirs["index"][0, : len(given)], given)


def test_a_short_reasoning_of_the_teacher_is_shared_out(tiny_tokenizer):
    rows = Dataset.from_list([{**OWN[0], "long": "x #### 6"}])
    config = DataConfig(teacher_text={"math": "{long}"}, answer_markers=[" ####"])
    readers = Reader(tiny_tokenizer(40)), {"math": Reader(tiny_tokenizer(0))}
    row = encode_rows(rows, *readers, config, time=TimeAlignment("rkv"))[0]
    assert {r for r, s in zip(row["math/rank"], row["segments"], strict=True) if s == 1} == {0}
    nothing = rows.map(lambda row: {"long": " #### 6"})
    row = encode_rows(nothing, *readers, config, time=TimeAlignment("rkv"))[0]
    assert set(row["math/rank"]) == {-1} and max(row["math/index"]) > 0
    row = encode_rows(nothing, *readers, config, time=TimeAlignment("segment_aware"))[0]
    assert {u for u, s in zip(row["math/index"], row["segments"], strict=True) if s == 1} == {-1}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", ["same_text", "linear", "truncate", "segment_aware", "rkv"])
@pytest.mark.parametrize("length", [4, 17, 40])
def test_indices_stay_inside_rows_that_are_cut(tiny_tokenizer, method, length, side):
    time = TimeAlignment(method)
    try:
        rows = encode_own(tiny_tokenizer, time, max_length=length, truncation_side=side, train_on_prompt=True)
    except ValueError as error:
        pytest.fail(str(error))
    for row in rows:
        assert len(row["input_ids"]) <= length and len(row["math/index"]) == len(row["input_ids"])
        assert max(row["math/index"]) <= len(row["math/input_ids"]) - 1
        if method in ("segment_aware", "rkv"):
            check_segments(row)


@pytest.mark.parametrize("column", ["question", "reply"])
def test_a_null_in_a_template_is_told(tiny_tokenizer, column):
    rows = [{"question": "what", "reply": "this"}, {"question": "what", "reply": "this", column: None}]
    data = DataConfig(prompt="{question}\n", response="so {reply}")
    with pytest.raises(ValueError, match=f"column '{column}' of a data template is null"):
        encode_rows(Dataset.from_list(rows), Reader(tiny_tokenizer()), {}, data)


def test_a_null_answer_or_task_of_a_template_is_none(tiny_tokenizer):
    rows = Dataset.from_list([{**ROWS[0], "n": 3, "kind": "sum"}, {**ROWS[0], "n": None, "kind": None}])
    reader, data = Reader(tiny_tokenizer()), DataConfig(answer="{n}", task="of {kind}")
    found = encode_rows(rows, reader, {}, data, keep=EVALUATED)
    assert (found["answer"][:], found["task"][:]) == (["3", None], ["of sum", None])
    assert task_names(encode_rows(rows, reader, {}, data)) == ("of sum",)


def test_a_template_that_reaches_into_a_column(tiny_tokenizer):
    rows = Dataset.from_list([{"q": {"text": "what"}, "a": ["no", "yes"]}])
    data = DataConfig(prompt="{q[text]} ", response="{a[1]}")
    assert example_of(rows[0], data).completion == "yes" and example_of(rows[0], data).prompt == "what "
    for template in ("{q.text}", "{q[words]}", "{a[2]}", "{a[x]}"):
        with pytest.raises(ValueError, match="names the column '.*', but the rows have q, a"):
            example_of(rows[0], DataConfig(response=template))


def test_mistakes_in_teacher_text_are_named(tiny_tokenizer):
    rows, reader = Dataset.from_list(OWN), Reader(tiny_tokenizer())
    with pytest.raises(ValueError, match="names a teacher 'maths', but the teachers are math"):
        encode_rows(rows, reader, {"math": reader}, DataConfig(teacher_text={"maths": "{long}"}))
    with pytest.raises(ValueError, match="column 'lang', but the rows have prompt"):
        encode_rows(rows, reader, {"math": reader}, DataConfig(teacher_text={"math": "{lang}"}))
    with pytest.raises(ValueError, match="column without a name, but"):
        encode_rows(rows, reader, {}, DataConfig(task="{}"))
    assert len(encode_rows(rows, reader, {}, DataConfig(teacher_text={"math": "{long}"}))) == 2, "evaluation has none"


def test_a_low_share_is_told_with_the_teacher(tiny_tokenizer, caplog):
    rows, student = Dataset.from_list(ROWS), Reader(tiny_tokenizer(0))
    with caplog.at_level(logging.WARNING, logger="kv_trainer.data"):
        encode_rows(rows, student, {"near": Reader(tiny_tokenizer(0))}, DataConfig())
        assert not caplog.records
        found = encode_rows(rows, student, {"far": Reader(tiny_tokenizer(120))}, DataConfig())
    share = aligned_share(found, "far")
    assert share < 0.5 and f"Only {100 * share:.0f}%" in caplog.text and "teacher far: check" in caplog.text


def test_time_settings_in_a_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    start = "student: {config: ./s, tokenizer: ./t}\nteachers: {math: {model: ./m}}\n"
    start += "losses: {cross_entropy: {}, kv_relation: {}}\n"
    data = 'data: {path: ./d.jsonl, teacher_text: {math: "{long}"}, truncation_side: left, answer_markers: ["A:"]}\n'
    for folder in ("s", "t", "m"):
        (tmp_path / folder).mkdir()
    (tmp_path / "d.jsonl").write_text("{}\n")
    path.write_text(start + data + "alignment: {time: {method: rkv, budget: 24}}\n")
    args = load_recipe(str(path)).args
    assert args.alignment.time == TimeAlignment("rkv", 24) and args.data.teacher_text == {"math": "{long}"}
    assert (args.data.truncation_side, args.data.answer_markers) == ("left", ["A:"])
    for wrong, says in (
        ("{method: linear, budget: 3}", "linear has no use"),
        ("{method: rkv, budget: 0}", "at least 1"),
    ):
        path.write_text(start + data + f"alignment: {{time: {wrong}}}\n")
        with pytest.raises(ValueError, match=says):
            load_recipe(str(path))


# Loading


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of two splits; the cache of `datasets` is beside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        rows = [{"prompt": f"{split} {i}", "completion": "x"} for i in range(count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(ROWS).to_csv(tmp_path / "rows.csv")
    return tmp_path


def test_splits_of_a_folder(folder):
    config = DataConfig(path=str(folder / "data"))
    assert load_split(config, "train", None)["prompt"] == ["train 0", "train 1", "train 2"]
    assert load_split(config, "test", None)["prompt"] == ["test 0", "test 1"]
    assert len(load_split(config, "train", 2)) == 2 and len(load_split(config, "train", 9)) == 3
    with pytest.raises(ValueError, match="has no split 'validation'; it has train, test"):
        load_split(config, "validation", None)


@pytest.mark.parametrize("name", ["data/test.jsonl", "rows.parquet", "rows.csv"])
def test_a_file_is_its_train_split_only(folder, name):
    """Its rows must never come back as another split: they would be learned and then evaluated on."""
    config = DataConfig(path=str(folder / name))
    found = load_split(config, "train", None)
    assert len(found) == 2 and {"prompt", "completion"} <= set(found.column_names)
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        load_split(config, "test", None)


@pytest.mark.parametrize("text", ['{"prompt": "a"}\n{"prompt": \n', ""])
def test_a_file_without_whole_rows_is_named(folder, text):
    (folder / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"bad.jsonl cannot be read as rows: \S+"):
        load_split(DataConfig(path=str(folder / "bad.jsonl")), "train", None)


def test_several_processes_encode_the_same_rows(tiny_tokenizer):
    rows = Dataset.from_list([{"prompt": f"what is {i}?", "completion": f" {i}"} for i in range(5)])
    student, teachers = Reader(tiny_tokenizer()), {"t": Reader(tiny_tokenizer(0))}
    alone, together = (encode_rows(rows, student, teachers, DataConfig(num_proc=n)) for n in (None, 2))
    assert alone.to_list() == together.to_list() and len(alone) == 5
    assert len(encode_rows(rows.select([0]), student, teachers, DataConfig(num_proc=8))) == 1
    for name in ("max_train_samples", "max_eval_samples"):
        with pytest.raises(ValueError, match=f"{name} is 0; give 1 or more"):
            DataConfig(**{name: 0})
    with pytest.raises(ValueError, match="max_length is 1; a row needs 2 tokens"):
        DataConfig(max_length=1)
    with pytest.raises(ValueError, match="num_proc is 0; give 1 or more"):
        DataConfig(num_proc=0)


def test_rows_that_other_code_encoded_are_not_taken_from_the_cache(folder, tiny_tokenizer, monkeypatch):
    rows = load_split(DataConfig(path=str(folder / "data")), "train", None)

    def files() -> list[str]:
        encoded = encode_rows(rows, Reader(tiny_tokenizer(0)), {}, DataConfig())
        return [file["filename"] for file in encoded.cache_files]

    first = files()
    assert first and files() == first, "the same code: encoded once"
    monkeypatch.setattr(encoding, "CODE", "that of another version")
    other = files()
    assert other and not set(first) & set(other)
    monkeypatch.undo()
    assert files() == first


@pytest.mark.parametrize("changed", encoding.SOURCES)
def test_the_digest_of_the_code_is_that_of_every_source(tmp_path, changed):
    (tmp_path / "alignment").mkdir()
    for name in encoding.SOURCES:
        shutil.copy(Path(encoding.__file__).parent / name, tmp_path / name)
    before = encoding.digest_of(tmp_path)
    assert encoding.digest_of(tmp_path) == before
    with (tmp_path / changed).open("a") as source:
        source.write("# changed\n")
    assert encoding.digest_of(tmp_path) != before


@pytest.mark.parametrize("kept", [(), EVALUATED], ids=["trained", "evaluated"])
def test_what_is_evaluated_is_the_completion_even_where_prompts_are_learned(tiny_tokenizer, kept):
    rows = Dataset.from_list([{"prompt": "what is two?", "completion": " six", "answer": "six"}])
    reader, plain = Reader(tiny_tokenizer(bos=True)), DataConfig()
    row = encode_rows(rows, reader, {}, replace(plain, train_on_prompt=True), keep=kept)[0]
    known = encode_rows(rows, reader, {}, plain, keep=EVALUATED)[0]
    assert (row["labels"] == known["labels"]) == bool(kept)
    if kept:
        assert row["prompt_ids"] == known["prompt_ids"] and len(known["prompt_ids"]) > 1


def test_a_prompt_that_was_learned_with_another_answer_is_a_leak(tiny_tokenizer):
    pair = [{"prompt": "what is two?", "completion": c, "answer": "six"} for c in (" six", " seven")]
    train, test = (Dataset.from_list([row]) for row in pair)
    for learned in (False, True):
        reader, config = Reader(tiny_tokenizer(bos=True)), DataConfig(train_on_prompt=learned)
        rows = encode_rows(train, reader, {}, config), encode_rows(test, reader, {}, config, keep=EVALUATED)
        assert shared_prompts(*rows, learned) == 1
        other = Dataset.from_list([{**pair[0], "prompt": "what is three?"}])
        assert shared_prompts(encode_rows(other, reader, {}, config), rows[1], learned) == 0


@pytest.mark.parametrize(("template", "special"), [(PLAIN, True), (PLAIN, False), (STRIPS, True)])
def test_the_end_of_a_turn_is_the_special_token_behind_the_answer(tiny_tokenizer, template, special):
    tokenizer = tiny_tokenizer(bos=True, chat_template=template)
    assert turn_end(Reader(tokenizer)) is None, "no chat"
    tokenizer.add_tokens(["<|end|>"], special_tokens=special)
    expected = tokenizer.convert_tokens_to_ids("<|end|>") if template is PLAIN and special else None
    assert turn_end(Reader(tokenizer, chat=True)) == expected


def test_answers_that_are_numbers_and_tasks_that_are_classes_are_text(plain) -> None:
    features = Features({"prompt": Value("string"), "completion": Value("string"), "answer": Value("int64"),
                         "task": ClassLabel(names=["sum", "half"])})  # fmt: skip
    row = {"prompt": "what is 3 plus 4?", "completion": " 7", "answer": 7, "task": 0}
    rows = Dataset.from_list([row], features=features)
    (found,) = encode_rows(rows, Reader(plain), {}, DataConfig(path="x"), keep=EVALUATED)
    assert (found["answer"], found["task"]) == ("7", "sum")
    rows = Dataset.from_list([{**row, "answer": ["7", "seven"], "task": "sum"}])
    with pytest.raises(ValueError, match="column 'answer' holds .*make text of it with data.answer"):
        encode_rows(rows, Reader(plain), {}, DataConfig(path="x"), keep=EVALUATED)
