"""Stored teachers: what comes back is what was stored, and a run on it is the run with the live teachers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from helpers_trainer import ROWS, STUDENT, TEACHERS, curve
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kv_trainer.cli import main
from kv_trainer.recipes import load_recipe
from kv_trainer.run import build_trainer
from kv_trainer.store.precompute import check_placement, precompute
from kv_trainer.store.quantise import quantise, restore
from kv_trainer.store.shards import StoreReader, row_key, write_shard
from kv_trainer.trainer import MultiTeacherKVTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
STORED = ["--teachers.fine.source", "store", "--teachers.deep.source", "store"]


# ---- numbers


@given(st.integers(0, 40), st.integers(1, 9), st.sampled_from([16, 8, 4]), st.integers(0, 10**6))
def test_what_comes_back_is_within_half_a_step(count: int, channels: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, generator=generator) * torch.logspace(-2, 2, channels)
    stored = quantise(x, bits)
    back = restore(stored["data"], stored.get("low"), stored.get("step"), channels)
    assert back.shape == x.shape and back.dtype == torch.float32
    allowed = 1e-3 * x.abs() + 1e-7 if bits == 16 else 0.501 * stored["step"] + 1e-6 * x.abs()
    assert ((back - x).abs() <= allowed).all()
    assert stored["data"].shape[1] == (channels if bits > 4 else -(-channels // 2))


def test_a_channel_that_is_constant_comes_back() -> None:
    x = torch.tensor([[3.0, -1.0]] * 5)
    for bits in (8, 4):
        stored = quantise(x, bits)
        torch.testing.assert_close(restore(stored["data"], stored["low"], stored["step"], 2), x)


def test_rows_are_found_by_key_whatever_their_order(tmp_path: Path) -> None:
    rows = [
        {"key": row_key([i, 7], [0, 7]), "position": torch.arange(i % 3), "keys": torch.full((i % 3, 4), float(i)),
         "values": torch.full((i % 3, 4), -float(i)), "nll": torch.tensor(i / 2), "entropy": torch.tensor(0.1),
         "asked": True}
        for i in range(6)
    ]  # fmt: skip
    for number, some in enumerate((rows[:4], rows[4:])):
        write_shard(tmp_path / f"{number}.safetensors", some, 16, 1)
    reader = StoreReader(tmp_path, ["0.safetensors", "1.safetensors"])
    found = reader.read([row_key([i, 7], [0, 7]) for i in (5, 1, 0)], length=4)
    assert found["nll"].tolist() == [2.5, 0.5, 0.0]
    assert found["mask"].tolist() == [[True, True, False, False], [True, False, False, False], [False] * 4]
    assert found["keys.data"][:, 0, 0].tolist() == [5.0, 1.0, 0.0]
    assert row_key([9, 9], [9, 9]) not in reader and row_key([5, 7], [5, 7]) not in reader, "other tokens are learned"
    with pytest.raises(KeyError):
        reader.read([row_key([9, 9], [9, 9])], 4)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_row_that_was_left_out_does_not_hide_one_alike(tmp_path: Path, order: list[int]) -> None:
    """As where the fusion goes by task, and two rows of unlike tasks have one text."""
    full, empty = ({"key": 5, "position": torch.arange(n), "keys": torch.ones(n, 4), "values": torch.ones(n, 4),
                    "asked": n > 0} for n in (2, 0))  # fmt: skip
    write_shard(tmp_path / "0.safetensors", [(full, empty)[i] for i in order], 16, 1)
    assert StoreReader(tmp_path, ["0.safetensors"]).read([5], 3)["mask"].tolist() == [[True, True, False]]


def test_what_float16_cannot_hold_is_refused() -> None:
    x = torch.tensor([[1e5, 1.0], [0.0, 2.0]])
    with pytest.raises(ValueError, match="store.bits is 16, float16, and a teacher's states reach 1e.05"):
        quantise(x, 16)
    stored = quantise(x, 8)
    torch.testing.assert_close(restore(stored["data"], stored["low"], stored["step"], 2), x)


# ---- runs


@pytest.fixture(scope="module", autouse=True)
def few_rows_to_measure():
    """Else these few rows would all be stored for every teacher."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("calibration.ROWS", "store.precompute.CALIBRATION_ROWS"):
            patch.setattr(f"kv_trainer.{module}", 2)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """recipe.yaml on saved tiny models, and a store of it in 16 bits."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("home")
    tiny_model("llama", **STUDENT).save_pretrained(folder / "student")
    tiny_tokenizer(40).save_pretrained(folder / "student")
    for name, (family, config, merges, bos) in TEACHERS.items():
        tiny_model(family, seed=7, **config).save_pretrained(folder / name)
        tiny_tokenizer(merges, bos=bos).save_pretrained(folder / name)
    Dataset.from_list(ROWS).to_json(folder / "train.jsonl")
    recipe = {
        "student": {"model": "./student"},
        "teachers": {name: {"model": f"./{name}"} for name in TEACHERS},
        "losses": {"cross_entropy": {}, "kv_relation": {}},
        "data": {"path": "./train.jsonl", "eval_split": None},
        "store": {"path": "./store", "bits": 16, "rows_per_shard": 4},
        "training": {"output_dir": str(folder / "out"), "max_steps": 7, "per_device_train_batch_size": 3, "seed": 3,
                     "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "optim": "sgd",
                     "learning_rate": 0.05},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    precompute(load_recipe(folder / "recipe.yaml"))
    return folder


@pytest.fixture
def start(home: Path) -> Callable[..., MultiTeacherKVTrainer]:
    return lambda *overrides: build_trainer(load_recipe(home / "recipe.yaml", overrides))


def losses_of(trainer: MultiTeacherKVTrainer) -> list[dict[str, float]]:
    trainer.train()
    return [{k: v for k, v in log.items() if k.startswith(("loss", "share", "grad_norm"))} for log in curve(trainer)]


KV = ["--losses.kv_relation", "null", "--losses.kv.weight", "0.5", "--projector.dropout", "0"]


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["--training.gradient_accumulation_steps", "2", "--training.dataloader_num_workers", "1"],
        KV,
        [*KV, "--projector.direction", "teacher_to_student"],
        ["--control.shuffle", "rows"],
        ["--control.shuffle", "rows_of_task", "--data.task", "'{prompt}'"],
        ["--control.shuffle", "positions"],
        ["--fusion", "{method: task_wise}", "--data.task", "'{prompt}'"],
        ["--teachers.deep", "null"],
    ],
)
def test_a_run_on_the_store_is_the_run_with_live_teachers(
    home: Path, start, tmp_path: Path, settings: list[str]
) -> None:
    """To the rounding of float16, over more than two epochs of shuffled rows."""
    stored = STORED
    if {"--teachers.deep", "--fusion"} & set(settings):  # rows were left out for another set of shares
        stored = STORED[:2] if "--teachers.deep" in settings else STORED
        settings = [*settings, "--store.path", str(tmp_path / "store")]
        precompute(load_recipe(home / "recipe.yaml", settings))
    assert_same(losses_of(start(*settings)), losses_of(start(*settings, *stored)))


def assert_same(live: list[dict[str, float]], stored: list[dict[str, float]]) -> None:
    assert len(live) == len(stored) == 7
    for a, b in zip(live, stored):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-4)


def test_no_model_of_a_stored_teacher_is_loaded(home: Path, tmp_path: Path) -> None:
    """Nor is any file of it looked at."""
    for name in ("student", "store"):
        shutil.copytree(home / name, tmp_path / name)
    for name in TEACHERS:
        (tmp_path / name).mkdir()
    for name in ("recipe.yaml", "train.jsonl"):
        shutil.copy(home / name, tmp_path / name)
    trainer = build_trainer(load_recipe(tmp_path / "recipe.yaml", STORED))
    assert [t.placement for t in trainer.teachers.values()] == ["stored", "stored"]
    trainer.train()


def test_half_the_bits_half_the_bytes(home: Path, tmp_path: Path) -> None:
    records = [
        precompute(load_recipe(home / "recipe.yaml", ["--store.path", str(tmp_path / bits), "--store.bits", bits,
                                                      "--store.rows_per_shard", "64"]))
        for bits in ("16", "8", "4")
    ]  # fmt: skip
    errors = [record["relative_error"] for record in records]
    assert errors[0] < 1e-3 < errors[1] < 0.01 < errors[2] < 0.12
    sizes = [record["bytes"] for record in records]
    assert sizes[0] > sizes[1] > sizes[2]


# ---- what does not match, and what is damaged


@pytest.fixture(scope="module")
def raw(home: Path) -> list[str]:
    """Settings of a run on a raw store of the same recipe."""
    precompute(load_recipe(home / "recipe.yaml", ["--store.form", "raw", "--store.path", str(home / "raw")]))
    return [*STORED, "--store.path", str(home / "raw")]


@pytest.mark.parametrize(
    "settings",
    [
        [],
        KV,
        ["--student.keep_layers", "[0]"],
        ["--alignment.layers.method", "nearest"],
        ["--alignment.time.method", "linear"],
        ["--alignment.layers.method", "cka"],
        ["--losses.kv_relation.attention", "student", "--losses.kv_relation.attention_warmup_steps", "0"],
    ],
)
def test_a_raw_store_serves_any_student_and_alignment(start, raw: list[str], settings: list[str]) -> None:
    live, stored = losses_of(start(*settings)), losses_of(start(*raw, *settings))
    assert_same(live, stored)


def test_a_raw_store_serves_another_tokenizer(home: Path, start, raw: list[str], tiny_tokenizer: Any) -> None:
    tiny_tokenizer(55).save_pretrained(home / "other")
    settings = ["--student.tokenizer", str(home / "other")]
    assert_same(losses_of(start(*settings)), losses_of(start(*raw, *settings)))


def test_what_no_store_has_is_told_before_the_pass(home: Path, tmp_path: Path) -> None:
    recipe = load_recipe(home / "recipe.yaml", ["--store.path", str(tmp_path / "new"), "--losses.codi.weight", "1"])
    with pytest.raises(ValueError, match="has no hidden states, .*source: live.$"):
        precompute(recipe)
    assert not list((tmp_path / "new").rglob("*.safetensors"))


def copied(home: Path, tmp_path: Path) -> list[str]:
    return [*STORED, "--store.path", str(shutil.copytree(home / "store", tmp_path / "store"))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--alignment.layers.method", "nearest"], "alignment.layers.method was .*relative_depth.*, is .*nearest"),
        (["--teachers.fine.model", "other"], "teachers.fine.model was .*fine.*, is .*other"),
        (["--teachers.fine.revision", "v2"], "teachers.fine.revision was not there, is .*v2"),
        (["--teachers.fine.random", "true"], "teachers.fine.random was not there, is 3"),
        (["--student.tokenizer", "./deep"], "student.tokenizer was"),
        (["--student.keep_layers", "[0]"], "student.layers was 2, is 1"),
        (["--data.teacher_text", "{fine: 'another text'}"], "teachers.fine.text.teacher_text was not there, is"),
        (["--data.train_on_prompt", "true"], "teachers.deep.text.train_on_prompt was false, is true"),
        (["--losses.codi.weight", "1"], "has no hidden states, which this recipe needs"),
        (["--losses.logit_kd.weight", "1"], "has no logits, which this recipe needs"),
        (["--losses.kv_relation.attention", "teacher"], "has no importance, which this recipe needs"),
        (["--teachers.fine.dtype", "float16"], 'teachers.fine.loaded.dtype was .*, is "float16"'),
        (["--store.bits", "8"], "store.bits is 8, but .*store was made with 16"),
        (["--store.form", "raw"], "store.form is raw, but .*store was made with aligned"),
        (["--teachers.deep", "null"], "weights.deep was 1.0, is not there"),
        (["--teachers.fine.tokenizer", "./deep"], 'teachers.fine.loaded.tokenizer was not there, is ".*deep'),
        (["--data.max_length", "12"], "teachers.deep.text.max_length was 1024, is 12"),
    ],
)
def test_a_store_of_something_else_is_refused(start, settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(*(STORED[:2] if "--teachers.deep" in settings else STORED), *settings)


def test_another_teacher_in_a_folder_of_the_same_name_is_refused(home: Path, start, tmp_path: Path) -> None:
    moved = shutil.copytree(home / "fine", tmp_path / "fine")
    start(*STORED, "--teachers.fine.model", str(moved))
    weights = load_file(moved / "model.safetensors")
    save_file({name: x + 1e-3 if x.ndim > 1 else x for name, x in weights.items()}, moved / "model.safetensors")
    with pytest.raises(ValueError, match=r"teachers.fine.weights was \"\w+\", is \"\w+\""):
        start(*STORED, "--teachers.fine.model", str(moved))
    (moved / "model.safetensors").unlink()  # the weights are elsewhere: the store need not have them
    start(*STORED, "--teachers.fine.model", str(moved))


def test_a_store_of_before_weights_were_noted_is_read(home: Path, start, tmp_path: Path) -> None:
    settings = copied(home, tmp_path)
    for name in ("store.json", "begun.json"):
        record = json.loads((tmp_path / "store" / name).read_text())
        assert all(teacher.pop("files") for teacher in record["teachers"].values())
        (tmp_path / "store" / name).write_text(json.dumps(record))
    start(*settings)
    precompute(load_recipe(home / "recipe.yaml", settings))


@pytest.mark.parametrize("form", ["aligned", "raw"])
def test_a_tokenizer_that_changed_is_refused(home: Path, start, tmp_path: Path, tiny_tokenizer: Any, form: str) -> None:
    moved = shutil.copytree(home / "fine", tmp_path / "fine")
    settings = ["--teachers.fine.model", str(moved), "--store.path", str(tmp_path / "store"), "--store.form", form]
    precompute(load_recipe(home / "recipe.yaml", settings))
    tiny_tokenizer(17).save_pretrained(moved)
    with pytest.raises(ValueError, match=r'teachers.fine.tokenizer was "\w+", is "\w+"'):
        start(*settings, *STORED)


def test_layers_that_were_matched_with_another_student_are_refused(home: Path, start, tmp_path: Path) -> None:
    settings = ["--alignment.layers.method", "cka", "--store.path", str(tmp_path / "store")]
    precompute(load_recipe(home / "recipe.yaml", settings))
    assert_same(losses_of(start(*settings)), losses_of(start(*settings, *STORED)))
    other = shutil.copytree(home / "student", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: -x for name, x in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r'student.weights was "\w+", is "\w+"'):
        start(*settings, *STORED, "--student.model", str(other))


def test_a_raw_store_weighs_no_positions_by_its_teachers(home: Path, start, tmp_path: Path, raw: list[str]) -> None:
    """Importance is a mean over the layers that a student is mapped to, and asks the queries of its segments."""
    weighed = ["--losses.kv_relation.attention", "teacher"]
    with pytest.raises(ValueError, match="has no importance, which this recipe needs"):
        start(*raw, *weighed)
    settings = [*weighed, "--store.form", "raw", "--store.path", str(tmp_path / "store")]
    with pytest.raises(ValueError, match="has no importance, which this recipe needs; .* or take store.form: aligned"):
        precompute(load_recipe(home / "recipe.yaml", settings))
    assert not (tmp_path / "store").exists()


def test_what_is_measured_first_is_stored_whoever_has_a_share_of_it(home: Path, start, tmp_path: Path) -> None:
    """Projectors are standardised by the first rows of every teacher, also where a task is another one's alone."""
    Dataset.from_list([{**row, "kind": "a" if i < 7 else "b"} for i, row in enumerate(ROWS)]).to_json(
        tmp_path / "rows.jsonl"
    )
    settings = [*KV, "--fusion", "{method: task_wise, temperature: 0.001}", "--data.task", "'{kind}'",
                "--data.path", str(tmp_path / "rows.jsonl"), "--store.path", str(tmp_path / "store")]  # fmt: skip
    record = precompute(load_recipe(home / "recipe.yaml", settings))
    assert record["left_out"] > 0
    assert_same(losses_of(start(*settings)), losses_of(start(*settings, *STORED)))


# ---- texts of its own


@pytest.fixture
def told_apart(tmp_path: Path) -> list[str]:
    """Settings for rows of which teacher fine reads another completion; two have the same one for the student."""
    rows = [{**row, "long": f" it is {row['completion']}"} for row in (*ROWS[:5], ROWS[0])]
    rows[-1]["long"] = " for another reason"
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    settings = ["--data.path", str(tmp_path / "rows.jsonl"), "--data.teacher_text", "{fine: '{long}'}"]
    return [*settings, "--alignment.time.method", "segment_aware", "--store.path", str(tmp_path / "store")]


def test_rows_that_the_student_reads_alike_are_told_apart_by_the_teachers_text(
    home: Path, start, told_apart: list[str]
) -> None:
    precompute(load_recipe(home / "recipe.yaml", told_apart))
    assert_same(losses_of(start(*told_apart)), losses_of(start(*told_apart, *STORED)))


def test_a_text_that_changed_is_not_in_the_store(home: Path, start, tmp_path: Path, told_apart: list[str]) -> None:
    precompute(load_recipe(home / "recipe.yaml", told_apart))
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text().replace("for another reason", "for a third one"))
    with pytest.raises(ValueError, match="Row 5 of the training data is not in the store of teacher 'fine'"):
        start(*told_apart, *STORED)
    with pytest.raises(ValueError, match='holds a store of something else: teachers.fine.data was "'):
        precompute(load_recipe(home / "recipe.yaml", told_apart))


def test_characters_of_several_tokens_are_aligned_as_they_were_stored(home: Path, start, tmp_path: Path) -> None:
    texts = [(f" \u6570\u5b57 {i} \u00e9 #### \u4e94", f" \u5148\u305a {i} #### \u4e94") for i in range(6)]
    rows = [{"prompt": f"{i} plus?", "completion": ours, "long": theirs} for i, (ours, theirs) in enumerate(texts)]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    settings = ["--data.path", str(tmp_path / "rows.jsonl"), "--data.teacher_text", "{fine: '{long}'}",
                "--alignment.time.method", "segment_aware", "--store.path", str(tmp_path / "store")]  # fmt: skip
    precompute(load_recipe(home / "recipe.yaml", settings))
    assert_same(losses_of(start(*settings)), losses_of(start(*settings, *STORED)))


def test_teachers_that_all_processes_gather_cannot_store_rows_apart() -> None:
    teachers = {"math": SimpleNamespace(placement="replicated"), "big": SimpleNamespace(placement="sharded")}
    check_placement(teachers, 1)
    with pytest.raises(ValueError, match="teachers.big.placement is sharded: .* but each stores other rows"):
        check_placement(teachers, 2)


def test_other_rows_are_refused(home: Path, start, tmp_path: Path) -> None:
    Dataset.from_list([{**ROWS[0], "prompt": "another question?"}, *ROWS]).to_json(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="Row 0 of the training data is not in the store of teacher 'deep'"):
        start(*STORED, "--data.path", str(tmp_path / "rows.jsonl"))


def test_another_fusion_is_refused_where_rows_were_left_out(home: Path, start, tmp_path: Path) -> None:
    settings = copied(home, tmp_path)
    record = json.loads((tmp_path / "store/store.json").read_text())
    (tmp_path / "store/store.json").write_text(json.dumps({**record, "left_out": 3}))
    with pytest.raises(ValueError, match='fusion.method was "confidence", is "uniform"'):
        start(*settings, "--fusion", "{method: uniform}")
    (tmp_path / "store/store.json").write_text(json.dumps({**record, "left_out": 0}))
    start(*settings, "--fusion", "{method: uniform}")


def test_a_damaged_shard_is_named_and_repaired_alone(home: Path, start, tmp_path: Path) -> None:
    settings = copied(home, tmp_path)
    shards = sorted((tmp_path / "store").rglob("*.safetensors"))
    assert len(shards) == 6
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in shards}
    shards[1].write_bytes(before[shards[1]][0][:-7])
    with pytest.raises(ValueError, match=r"is damaged: deep/00001.safetensors; run kv-trainer precompute RECIPE --rep"):
        start(*settings)
    shards[4].write_bytes(b"\0" * len(before[shards[4]][0]))  # the same size: seen by --repair alone
    recipe = load_recipe(home / "recipe.yaml", settings)
    precompute(recipe, repair=True)
    assert [path.stat().st_mtime_ns != before[path][1] for path in shards] == [i in (1, 4) for i in range(6)]
    assert all(path.read_bytes() == before[path][0] for path in shards)
    start(*settings).train()


def test_a_damaged_shard_is_not_called_whole(home: Path, tmp_path: Path) -> None:
    """By writing the checksum of what lies there."""
    settings = copied(home, tmp_path)
    shard = tmp_path / "store/fine/00000.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-200] + bytes(200))
    recipe = load_recipe(home / "recipe.yaml", settings)
    with pytest.raises(ValueError, match=r"is damaged: fine/00000.safetensors; run kv-trainer precompute RECIPE --rep"):
        precompute(recipe)
    precompute(recipe, repair=True)
    assert shard.read_bytes() == good


@pytest.mark.parametrize("repair", [False, True])
def test_a_shard_cut_off_in_an_unfinished_store_is_written_again(home: Path, tmp_path: Path, repair: bool) -> None:
    settings = copied(home, tmp_path)
    (tmp_path / "store/store.json").unlink()
    shard = tmp_path / "store/fine/00000.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-7])
    precompute(load_recipe(home / "recipe.yaml", settings), repair=repair)
    assert shard.read_bytes() == good


def test_an_interrupted_precompute_goes_on(home: Path, tmp_path: Path) -> None:
    settings = copied(home, tmp_path)
    (tmp_path / "store/store.json").unlink()
    gone = tmp_path / "store/deep/00001.safetensors"
    data = gone.read_bytes()
    gone.unlink()
    with pytest.raises(ValueError, match="has no store.json: run kv-trainer precompute RECIPE, to its end"):
        build_trainer(load_recipe(home / "recipe.yaml", settings))
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*.safetensors")}
    record = precompute(load_recipe(home / "recipe.yaml", settings))
    assert gone.read_bytes() == data and all(p.stat().st_mtime_ns == t for p, t in kept.items())
    whole = json.loads((home / "store/store.json").read_text())
    assert record["shards"] == whole["shards"] and record["relative_error"] == whole["relative_error"]
    assert all(record["seconds_a_row"][clock] > 0 for clock in ("wall", "processor"))
    again = precompute(load_recipe(home / "recipe.yaml", settings))
    assert again["seconds_a_row"] == record["seconds_a_row"], "nothing was stored anew, so nothing was timed"


def test_what_a_recipe_asks_of_a_training_is_not_asked_of_precompute(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations, early stopping, and a repository on the Hub."""
    monkeypatch.setattr(MultiTeacherKVTrainer, "init_hf_repo", lambda *args, **options: pytest.fail("it was made"))
    asked = ["--data.eval_split=train", "--training.eval_strategy=steps", "--training.eval_steps=2",
             "--training.save_strategy=steps", "--training.save_steps=2", "--training.load_best_model_at_end=true",
             "--early_stopping.patience=2", "--training.push_to_hub=true"]  # fmt: skip
    recipe = load_recipe(home / "recipe.yaml", [*asked, "--store.path", str(tmp_path / "store")])
    precompute(recipe)
    whole = json.loads((home / "store/store.json").read_text())
    assert json.loads((tmp_path / "store/store.json").read_text())["shards"] == whole["shards"]
    args = recipe.args
    assert args.eval_strategy == "steps" and args.push_to_hub and args.early_stopping.patience == 2, "as it was given"


def test_a_folder_of_another_store_is_left_alone(home: Path, tmp_path: Path) -> None:
    settings = copied(home, tmp_path)
    with pytest.raises(ValueError, match="holds a store of something else: bits was 16, is 8. Give a new store.path"):
        precompute(load_recipe(home / "recipe.yaml", [*settings, "--store.bits", "8"]))


def test_the_command_says_what_it_wrote(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "s")
    assert main(["precompute", str(home / "recipe.yaml"), "--store.path", path]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "of the teachers' own keys and values in float16; error 0.0" in out
    assert main(["precompute", str(home / "recipe.yaml"), "--store.path=null"]) == 2
    assert "store.path is missing" in capsys.readouterr().err
    assert main(["validate", str(home / "recipe.yaml"), *STORED, "--store.path=null"]) == 2
    assert "teachers.deep.source on the command line is store; say where it is" in capsys.readouterr().err
