"""Rows to ids, labels and position maps, for the student and every teacher."""

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

from kv_trainer import data as encoding
from kv_trainer.arguments import DataConfig, TimeAlignment
from kv_trainer.collator import KVCollator
from kv_trainer.data import EVALUATED, Reader, encode_rows, load_split, task_names
from kv_trainer.examples import example_of
from kv_trainer.experiments.fingerprints import shared_prompts
from kv_trainer.recipes import load_recipe
from kv_trainer.row_checks import aligned_share
from kv_trainer.text import encode

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
    assert set(found.column_names) == {"row", "input_ids", "labels", "answer_position", "supervised", *keep} | {
        f"{t}/{c}" for t in readers for c in ("input_ids", "labels", "index", "supervised", "answer_position")
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
    with caplog.at_level(logging.WARNING, logger="kv_trainer.row_checks"):
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
    with caplog.at_level(logging.WARNING, logger="kv_trainer.row_checks"):
        found = encode_rows(Dataset.from_list([row]), Reader(plain), {}, DataConfig(max_length=24))
    assert len(found) == 1 and ("1 of 1 rows lack the first token of their answer" in caplog.text) == said


def test_a_streamed_data_set_is_refused(plain):
    with pytest.raises(ValueError, match="without streaming=True"):
        encode_rows(Dataset.from_list(ROWS).to_iterable_dataset(), Reader(plain), {}, DataConfig())


def test_a_missing_column_is_named_from_the_data_set(plain):
    with pytest.raises(ValueError, match="columns q, a; give prompt"):
        encode_rows(Dataset.from_list([{"q": "x", "a": "y"}]), Reader(plain), {}, DataConfig())


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
    with caplog.at_level(logging.WARNING, logger="kv_trainer.row_checks"):
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


def kept(count: int, length: int, side: str, start: bool) -> list[int]:
    """The positions that are left of `count`; a start token always is."""
    if count <= length or side == "right":
        return list(range(min(count, length)))
    return [*range(start), *range(count - length + start, count)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", ["linear", "segment_aware", "rkv"])
@pytest.mark.parametrize("length", [12, 25, 60])
def test_a_cut_leaves_each_position_where_it_was(tiny_tokenizer, method, length, side):
    """Else what is left of the student's text would be taught the whole of the teacher's."""
    whole = encode_own(tiny_tokenizer, TimeAlignment("segment_aware" if method == "rkv" else method))
    options = {"max_length": length, "truncation_side": side, "train_on_prompt": True}
    met = 0
    for row, before in zip(encode_own(tiny_tokenizer, TimeAlignment(method), **options), whole, strict=True):
        ours = kept(len(before["input_ids"]), length, side, start=True)
        theirs = kept(len(before["math/input_ids"]), length, side, start=False)
        assert row["input_ids"] == [before["input_ids"][i] for i in ours]
        for i, at in zip(ours, row["math/index"], strict=True):
            if at >= 0:
                there = theirs[math.floor(at)] + at - math.floor(at)
                assert there == pytest.approx(before["math/index"][i], abs=1e-4)
                met += 1
        if method == "rkv":
            assert len(theirs) == len(before["math/input_ids"]) or set(row["math/rank"]) == {-1}
    assert met


def test_each_side_says_its_own_answer(tiny_tokenizer):
    """Behind its own reasoning, not at the position that has read the same as the other."""
    rows = [{"prompt": "what is two times three?", "completion": "#### 6", "long": " two times three #### 6"}]
    config, readers = DataConfig(teacher_text={"math": "{long}"}), {"math": Reader(tiny_tokenizer(0))}
    row = encode_rows(
        Dataset.from_list(rows), Reader(tiny_tokenizer(40)), readers, config, time=TimeAlignment("segment_aware")
    )[0]
    ours, theirs = row["answer_position"], row["math/answer_position"]
    assert tiny_tokenizer(40).decode(row["input_ids"][: ours + 1]) == "what is two times three?"
    assert tiny_tokenizer(0).decode(row["math/input_ids"][: theirs + 1]) == "what is two times three? two times three "
    assert row["math/index"][ours] != theirs
    first, second = encode_own(tiny_tokenizer, TimeAlignment())
    assert first["math/answer_position"] > 0 and second["math/answer_position"] == -1, "9 is not 12"
    assert encode_own(tiny_tokenizer, TimeAlignment("segment_aware"))[1]["math/answer_position"] > 0


def test_files_that_are_no_rows_are_told(tmp_path):
    (tmp_path / "r.jsonl").write_text("")
    with pytest.raises(ValueError, match="r.jsonl cannot be read as rows: it is empty."):
        load_split(DataConfig(path=str(tmp_path / "r.jsonl")), "train", None)
    (tmp_path / "r.jsonl.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="r.jsonl.gz, a file of another kind than .jsonl, .json, .parquet, .csv"):
        load_split(DataConfig(path=str(tmp_path / "r.jsonl.gz")), "train", None)
    with pytest.raises(ValueError, match="data.name is 'main', but data.path is the file .*; leave data.name out"):
        load_split(DataConfig(path=str(tmp_path / "r.jsonl"), name="main"), "train", None)


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


@pytest.mark.parametrize("template", ["{q:d}", "{q!x}"])
def test_a_format_that_a_column_cannot_have_is_told(template):
    with pytest.raises(ValueError, match="A data template writes a column as '.[dx]', which 'what' cannot be .* alone"):
        example_of({"q": "what"}, DataConfig(response=template))
    assert example_of({"q": 0.5}, DataConfig(response="{q:.2f}")).completion == "0.50"


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
    with caplog.at_level(logging.WARNING, logger="kv_trainer.row_checks"):
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
