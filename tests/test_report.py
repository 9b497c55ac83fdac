"""Header, results, curve and model card, on figures like those of a run."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from matplotlib import pyplot
from matplotlib.image import imread
from rich.console import Console

from kv_trainer import curve
from kv_trainer.arguments import DataConfig, MultiTeacherKVConfig, Recipe, StudentConfig, TeacherConfig
from kv_trainer.curve import draw_curve
from kv_trainer.hub import write_model_card
from kv_trainer.losses import CrossEntropy, KVLoss, KVRelationLoss
from kv_trainer.report import axes_that_differ, format_count, print_header, print_results
from kv_trainer.types import KVShape

STUDENT = KVShape("llama", 6, 3, 64, 1e5, 49_152, 49_600_000)
TEACHERS = {"math": KVShape("qwen2", 28, 2, 128, 1e6, 151_936, 1_540_000_000), "twin": STUDENT}
RESULTS = {
    "eval_accuracy": 0.4521, "eval_accuracy_chain": 0.5, "eval_accuracy_letters": 0.4, "eval_accuracy_macro": 0.45,
    "eval_perplexity": 3.4215, "eval_loss": 1.23, "loss_cross_entropy": 0.61, "loss_kv_relation": 0.42,
    "train_steps_per_second": 2.345,
    "peak_memory_mb": 2048.0, "train_runtime": 3725.0, "epoch": 3.0,
}  # fmt: skip


def console(width: int = 110) -> Console:
    return Console(file=StringIO(), width=width)


def curve_rows(evaluations: int, steps: int = 40) -> list[dict]:
    rows = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "loss": 4 / step, "loss_cross_entropy": 3 / step, "loss_kv": 1 / step,
                     "learning_rate": 1e-3 * (1 - step / steps)})  # fmt: skip
    for i in range(1, evaluations + 1):
        step = steps * i // evaluations
        rows.append({"step": step, "eval_loss": 1 / i, "eval_perplexity": math.exp(1 / i), "eval_accuracy": i / 10,
                     "eval_accuracy_chain": i / 9})  # fmt: skip
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_axes_that_differ_are_named_each_alone() -> None:
    same = {"t": True}
    assert axes_that_differ(STUDENT, {"t": STUDENT}, same) == []
    assert axes_that_differ(STUDENT, {"t": replace(STUDENT, vocab_size=9, num_parameters=9)}, same) == []
    assert axes_that_differ(STUDENT, {"t": STUDENT}, {"t": False}) == ["tokenizer"]
    for field, name in {"num_layers": "layers", "num_kv_heads": "heads", "head_dim": "head width",
                        "rope_theta": "RoPE base"}.items():  # fmt: skip
        assert axes_that_differ(STUDENT, {"t": replace(STUDENT, **{field: 999})}, same) == [name]
    assert axes_that_differ(STUDENT, {"t": replace(STUDENT, family="gpt2", rope_theta=None)}, same) == [
        "RoPE base",
        "family",
    ]
    every = ["tokenizer", "layers", "heads", "head width", "RoPE base", "family"]
    assert axes_that_differ(STUDENT, TEACHERS, {"math": False, "twin": True}) == every


def test_header_names_everything() -> None:
    screen = console()
    relation = KVRelationLoss(weight=3, schedule="cosine", warmup_ratio=0.1)
    losses = {"cross_entropy": CrossEntropy(), "kv_relation": relation}
    differs = axes_that_differ(STUDENT, TEACHERS, {"math": False, "twin": True})
    print_header(screen, STUDENT, TEACHERS, differs, 24_800_000, 12_345, 1e-3, 5e-5, losses)
    text = screen.file.getvalue()
    for words in ("student", "math", "twin", "qwen2", "151,936", "1,000,000", "1.54B", "49.6M", "head width",
                  "differ in", "tokenizer, layers, heads, head width, RoPE base, family", "24,800,000", "50%",
                  "learning rate 5e-05", "12,345 projector", "learning rate 0.001", "cross_entropy x 1, constant",
                  "kv_relation x 3, cosine, warmed up over 10% of the run"):  # fmt: skip
        assert words in text, words


def test_header_of_like_models_without_projector() -> None:
    screen = console()
    print_header(screen, STUDENT, {}, [], 1000, 0, None, 1e-3, {"cross_entropy": CrossEntropy()})
    assert "nothing" in screen.file.getvalue() and "projector" not in screen.file.getvalue()


def test_results_table(tmp_path: Path) -> None:
    screen = console(60)
    long = tmp_path / ("x" * 80) / "curve.png"
    print_results(screen, RESULTS, long, tmp_path)
    text = screen.file.getvalue()
    for words in ("45.2%", "chain", "50.0%", "letters", "40.0%", "3.421", "last kv_relation loss", "0.42", "2.35",
                  "mean of the tasks", "2.00 GiB", "1 h 02 min", f"curve: {long}\n", f"model: {tmp_path}"):  # fmt: skip
        assert words in text, words
    assert "epoch" not in text and "macro" not in text
    screen = console()
    print_results(screen, {}, None, tmp_path)
    assert "curve" not in screen.file.getvalue()


def test_counts_read_as_people_say_them() -> None:
    assert [format_count(n) for n in (7, 12_345, 832_000, 135_234_000, 1_240_000_000)] == [
        "7", "12.3k", "832.0k", "135.2M", "1.24B",
    ]  # fmt: skip


@pytest.mark.parametrize(("evaluations", "steps"), [(0, 40), (1, 40), (4, 200), (3, 1)])
def test_curve_is_a_picture(tmp_path: Path, evaluations: int, steps: int) -> None:
    metrics = write_rows(tmp_path / "metrics.jsonl", curve_rows(evaluations, steps))
    target = tmp_path / "curve.png"
    assert draw_curve(metrics, target, "a $x_$ title") == target
    image = imread(target)
    height, width = image.shape[:2]
    assert width > 1200 and height > 400
    assert 0.02 < (image[..., :3].min(-1) < 0.9).mean() < 0.5, "something is drawn, on white"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "metrics.jsonl"]
    assert pyplot.get_fignums() == []


def test_every_task_of_many_has_a_line_and_their_mean_has_none(tmp_path: Path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(curve, "_legend", lambda axes, handles, **more: drawn.append(handles))
    many = {f"eval_accuracy_task{i}": i / 20 for i in range(10)} | {"eval_accuracy_macro": 0.3}
    rows = [row | many if "eval_loss" in row else row for row in curve_rows(3)]
    draw_curve(write_rows(tmp_path / "metrics.jsonl", rows), tmp_path / "curve.png", "title")
    assert [line.get_label() for line in drawn[-1]] == [
        "all", *sorted(["chain", *(f"task{i}" for i in range(10))]), "perplexity",
    ]  # fmt: skip
    assert len({(line.get_color(), line.get_marker()) for line in drawn[-1]}) == 13


def test_evaluations_take_the_place_of_the_learning_rate(tmp_path: Path) -> None:
    pictures = []
    once = curve_rows(1)
    for count, rows in enumerate((once, curve_rows(2), [*once, once[-1]])):
        metrics = write_rows(tmp_path / "metrics.jsonl", rows)
        pictures.append(imread(draw_curve(metrics, tmp_path / f"{count}.png", "title")))
    assert (pictures[0] == pictures[2]).all(), "the last step evaluated twice is still one point"
    half = pictures[0].shape[1] * 2 // 3
    assert (pictures[0][:, half:] != pictures[1][:, half:]).mean() > 0.005


def test_no_picture_without_training_logs(tmp_path: Path) -> None:
    target = tmp_path / "curve.png"
    assert draw_curve(tmp_path / "missing.jsonl", target, "") is None
    assert draw_curve(write_rows(tmp_path / "m.jsonl", [{"step": 0, "eval_loss": 1.0}]), target, "") is None
    assert draw_curve(write_rows(tmp_path / "m.jsonl", [{"step": 1, "loss": None}]), target, "") is None
    assert not target.exists()


def test_zero_and_null_terms_do_not_stop_the_picture(tmp_path: Path) -> None:
    rows = curve_rows(2)
    rows[3] |= {"loss": None, "loss_kv": 0.0}
    for row in rows:
        row["loss_new"] = None
    assert draw_curve(write_rows(tmp_path / "m.jsonl", rows), tmp_path / "curve.png", "")


def build_recipe(folder: Path, **student) -> Recipe:
    (folder / "teachers" / "letters").mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir(exist_ok=True)
    args = MultiTeacherKVConfig(
        output_dir=str(folder / "out"), use_cpu=True, report_to="none", hub_token="hf_secretsecret",
        losses={"cross_entropy": CrossEntropy(), "kv": KVLoss(), "kv_relation": KVRelationLoss(weight=3.0)},
        data=DataConfig(path=str(folder / "data")),
    )  # fmt: skip
    teachers = {
        "math": TeacherConfig(model="Qwen/Qwen2-7B", revision="abc123"),
        "letters": TeacherConfig(model=str(folder / "teachers" / "letters")),
    }
    origin = student or {"model": "HuggingFaceTB/SmolLM2-135M", "revision": "v1", "keep_layers": [0, 5]}
    return Recipe(StudentConfig(**origin), teachers, args, str(folder / "recipe.yaml"))


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_card_holds_the_run_and_is_read_by_the_hub(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    shapes = {"student": STUDENT, "math": TEACHERS["math"]}
    path = write_model_card(output, build_recipe(tmp_path), RESULTS, shapes)
    assert path == output / "README.md" and list(output.iterdir()) == [path]
    text = path.read_text()
    data = ModelCard.load(path).data
    assert data.library_name == "transformers" and data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert "kv-distillation" in data.tags and data.datasets is None
    figures = {result.metric_name: result.metric_value for result in data.eval_results}
    assert figures == {
        "accuracy": 0.4521, "accuracy chain": 0.5, "accuracy letters": 0.4, "accuracy macro": 0.45,
        "perplexity": 3.4215,
    }  # fmt: skip
    assert front_matter(text)["model-index"][0]["name"] == "out"
    for words in ("`Qwen/Qwen2-7B` at `abc123`", "| letters | `letters` | - |", "layers 0, 5", "from 2 teachers",
                  "`linear` projector", "151,936", "45.2%", "kv-trainer train recipe.yaml",
                  'from_pretrained("out")', "`kv_relation` | 3 |",
                  "[arXiv 2510.02312](https://arxiv.org/abs/2510.02312)",
                  "[arXiv 2012.15828](https://arxiv.org/abs/2012.15828)"):  # fmt: skip
        assert words in text, words


def test_card_gives_away_no_path_name_or_token(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    student = {"config": str(tmp_path / "private" / "tiny"), "tokenizer": str(tmp_path / "private" / "tok")}
    recipe = build_recipe(tmp_path, **student)
    recipe.teachers["far"] = TeacherConfig(model="/home/alice/models/far-teacher/")
    recipe.args.data.path = "C:\\Users\\someone\\rows.jsonl"
    text = write_model_card(output, recipe, RESULTS, {"student": STUDENT, **TEACHERS}).read_text()
    assert "`tiny`" in text and "`far-teacher`" in text and "rows.jsonl" in text
    for secret in (str(tmp_path), str(Path.home()), tmp_path.name, "private", "someone", "alice", "hf_secret"):
        assert secret not in text, secret
    assert not re.search(r"(?<![\w:/)])/(?!/)\w+/", text), "no absolute path"
    assert "base_model" not in front_matter(text)


def test_local_folders_that_look_like_hub_names_are_told_apart(tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = build_recipe(tmp_path, model="teachers/letters")
    recipe.args.data.path = "openai/gsm8k"
    front = front_matter(write_model_card(output, recipe, {}, {}).read_text())
    assert "base_model" not in front and front["datasets"] == "openai/gsm8k" and "model-index" not in front


def test_cards_of_controls_and_baselines_say_so(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    recipe = build_recipe(tmp_path)
    recipe.args.control.shuffle = "rows"
    assert "This is a control run" in write_model_card(output, recipe, {}, {}).read_text()
    recipe.teachers, recipe.args.losses = {}, {"cross_entropy": CrossEntropy()}
    text = write_model_card(output, recipe, {}, {}).read_text()
    assert "without any teacher" in text and "aligned by" not in text and "None: only the text" in text


def test_hub_name_of_the_run_is_the_one_to_load(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    recipe = build_recipe(tmp_path)
    recipe.args.hub_model_id = "someorg/student"
    text = write_model_card(output, recipe, {"eval_accuracy": math.nan}, {}).read_text()
    assert 'from_pretrained("someorg/student")' in text and "# student\n" in text
    assert "model-index" not in front_matter(text), "what is no number is no result"
