"""cli.py: what a person at a terminal sees."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedTokenizerFast,
    TrainingArguments,
)
from transformers.integrations import unset_hf_deepspeed_config

from kv_trainer.arguments import StudentConfig
from kv_trainer.capture import kv_shape
from kv_trainer.cli import main, split_overrides
from kv_trainer.run import load_evaluated, of_the_whole_run
from kv_trainer.store.shards import FORMAT
from kv_trainer.version import __version__

DEPRECATES = "activation_checkpointing" in {field.name for field in dataclasses.fields(TrainingArguments)}
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `r.yaml`, a local student and teacher (no weights) and rows."""
    monkeypatch.chdir(tmp_path)
    for name in ("student", "teacher"):
        words = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, "<unk>")), unk_token="<unk>", eos_token="</s>"
        )
        tokenizer.save_pretrained(name)
        LlamaConfig(vocab_size=4, hidden_size=8, num_hidden_layers=3, num_attention_heads=2).save_pretrained(name)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "r.yaml").write_text(
        "student: {config: ./student, tokenizer: ./student}\nteachers: {math: {model: ./teacher}}\n"
        "losses: {cross_entropy: {}, kv_relation: {weight: 2}}\ndata: {path: ./rows.jsonl}\n"
    )
    return tmp_path


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end, as by an error, where they would begin to train."""

    def stop(*args: object, **kwargs: object) -> None:
        raise ValueError("here it would train")

    monkeypatch.setattr("kv_trainer.trainer.MultiTeacherKVTrainer.train", stop)


PRETRAINED = ["--student.config=null", "--student.model=./student"]
ALONE = ["--teachers=null", "--losses.kv_relation=null", "--data.eval_split=null"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_validate_ok(capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir())
    code, out, err = run(capsys, "validate", "r.yaml", "r.yaml")
    line = "ok r.yaml: student student (random weights); teachers math (teacher); "
    line += "losses cross_entropy x 1, kv_relation x 2"
    assert (code, out, err) == (0, f"{line}\n{line}\n", "")
    assert sorted(os.listdir()) == before, "nothing is written"


def test_validate_goes_on_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("student: {modl: x}\n")
    code, out, err = run(capsys, "validate", "bad.yaml", "none.yaml", "r.yaml")
    assert code == 2 and out.startswith("ok r.yaml:") and out.count("\n") == 1
    first, second = err.splitlines()
    assert first.startswith("kv-trainer: error: Unknown key 'student.modl' in bad.yaml, line 1. Did you mean 'model'?")
    assert second == "kv-trainer: error: The recipe none.yaml does not exist."


def test_a_quick_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "validate", "--quick", "r.yaml", "--training.max_steps", "7")
    first, second = out.splitlines()
    folder = os.path.join("outputs", Path.cwd().name, "r-quick")
    assert first == (
        "quick run of r.yaml: 7 steps, 128 rows to train on, 32 to evaluate on, no checkpoints, in " + folder
    )
    assert (code, err) == (0, "") and second.startswith("ok r.yaml: student")


def test_a_quick_run_is_saved_beside_the_real_one(capsys: pytest.CaptureFixture[str], untrained: None) -> None:
    code, out, err = run(capsys, "train", "r.yaml", "--quick", *ALONE)
    assert code == 2 and "here it would train" in err
    assert out.startswith("quick run of r.yaml: 20 steps, 128 rows to train on, ")
    saved = yaml.safe_load(Path("outputs", Path.cwd().name, "r-quick", "recipe.yaml").read_text())
    assert saved["training"]["max_steps"] == 20 and saved["data"]["max_train_samples"] == 128


def test_validate_does_not_ask_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "validate", "r.yaml", "--teachers.math.model", "org/there-is-no-such-model")
    assert code == 0 and "math (org/there-is-no-such-model)" in out
    assert "teachers.math is not checked: org/there-is-no-such-model is not on this machine yet." in err


def test_a_model_of_the_hub_that_is_here_is_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Path("hub/models--org--math/snapshots/abc")
    shutil.copytree("teacher", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(Path("hub").resolve()))
    args = ("validate", "r.yaml", "--teachers.math.model", "org/math")
    assert run(capsys, *args)[::2] == (0, "")
    GPT2Config(vocab_size=3, n_embd=8, n_layer=1, n_head=2).save_pretrained(snapshot)
    code, _, err = run(capsys, *args)
    assert code == 2 and "teachers.math of r.yaml: the tokenizer has 4 tokens, the model only 3; give the" in err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--student.freeze=[nothing_like_this]"], "student of r.yaml: student.freeze: no parameter's name contains"),
        (["--losses.kv_relation.layers=[0, 3]"], "r.yaml: losses.kv_relation.layers"),
        (["--alignment.layers={method: explicit, map: {math: [0, 1, 9]}}"], "r.yaml: "),
        (["--fusion.method=min_norm", "--losses.kv_relation=null", "--losses.logit_kd={}"], "This fusion works on"),
        ([*PRETRAINED, "--student.peft={type: lora, target_modules: [no_proj]}"], "student of r.yaml: Target modules"),
        (["--training.label_smoothing_factor=0.1"], "set losses.cross_entropy.label_smoothing."),
        (["--control.shuffle=rows", "--training.per_device_train_batch_size=1"], "batch_size of 2 or more."),
    ],
)
def test_validate_builds_what_a_run_would_build(
    capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    """Without weights, of which this folder has none."""
    code, out, err = run(capsys, "validate", "r.yaml", *overrides)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_validate_of_a_recipe_for_zero_3_starts_no_engine(capsys: pytest.CaptureFixture[str]) -> None:
    engine = ROOT / "deepspeed_configs" / "zero3.json"
    try:
        code, out, _ = run(capsys, "validate", "r.yaml", "--training.deepspeed", str(engine))
    finally:
        unset_hf_deepspeed_config()
    assert code == 0 and out.startswith("ok r.yaml")


@pytest.mark.parametrize(
    ("place", "section"), [("student", "student.config"), ("teacher", "teachers.math.model")]
)
def test_nothing_is_trained_over_what_is_read(capsys: pytest.CaptureFixture[str], place: str, section: str) -> None:
    for command in ("train", "validate"):
        code, _, err = run(capsys, command, "r.yaml", "--training.output_dir", place, "--training.use_cpu", "true")
        assert code == 2 and f"training.output_dir is {place}, which {section}" in err and "would be overwritten" in err


def test_a_teacher_that_is_a_folder_of_adapters_is_passed_by(capsys: pytest.CaptureFixture[str]) -> None:
    Path("teacher/config.json").rename("teacher/adapter_config.json")
    code, _, err = run(capsys, "validate", "r.yaml")
    assert code == 0 and "teachers.math is not checked: teacher holds adapters" in err


def test_validate_names_a_family_that_cannot_be_captured(capsys: pytest.CaptureFixture[str]) -> None:
    MambaConfig(vocab_size=4, hidden_size=8, num_hidden_layers=2).save_pretrained("teacher")
    code, _, err = run(capsys, "validate", "r.yaml")
    assert code == 2 and "teachers.math of r.yaml: MambaForCausalLM" in err and "cannot be captured" in err
    MambaConfig(vocab_size=4, hidden_size=8, num_hidden_layers=2).save_pretrained("student")
    assert run(capsys, "validate", "r.yaml", *ALONE)[0] == 0, "without teachers any model can be a student"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--student.chat=true"], "student of r.yaml: chat is true, but the tokenizer student has no chat template"),
        (
            ["--teachers.math.chat", "true"],
            "teachers.math of r.yaml: chat is true, but the tokenizer teacher has no chat",
        ),
        ([*PRETRAINED, "--student.keep_layers=[0, 3]"], "layers from 0 to 2."),
        ([*PRETRAINED, "--student.keep_layers=[1, 1]"], "layers from 0 to 2."),
        (["--student.tokenizer=./"], "error:"),
    ],
)
def test_impossible_combinations(capsys: pytest.CaptureFixture[str], overrides: list[str], message: str) -> None:
    code, out, err = run(capsys, "validate", "r.yaml", *overrides)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_what_a_run_needs_and_this_machine_lacks_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    lacking = ["--teachers.math.attn_implementation=flash_attention_2", "--teachers.math.quantization=4bit"]
    lacking += ["--student.attn_implementation=flash_attention_3"]
    code, out, err = run(capsys, "validate", "r.yaml", *lacking)
    assert code == 0 and out.startswith("ok r.yaml") and err.count("\n") == 3
    assert "teachers.math.quantization needs bitsandbytes, which is not here" in err
    assert "teachers.math.attn_implementation is flash_attention_2: " in err and "FlashAttention3 has been" in err
    train = ("train", "r.yaml", "--data.eval_split=null", "--student.attn_implementation=flash_attention_2")
    code, _, err = run(capsys, *train)
    assert code == 2 and "student is 'student': FlashAttention2 has been toggled on" in err
    code, _, err = run(capsys, "validate", "r.yaml", "--student.attn_implementation=flash_atention")
    assert code == 2 and 'student of r.yaml: Specified `attn_implementation="flash_atention"` is not supported' in err


def test_a_store_is_looked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stored = ["validate", "r.yaml", "--teachers.math.source=store", "--store.path=stored"]
    code, _, err = run(capsys, *stored)
    assert code == 0 and "store.path stored holds no store yet: kv-trainer precompute makes it." in err
    code, _, err = run(capsys, *stored, "--losses.logit_kd.weight=1")
    assert code == 2 and "r.yaml: The store of teacher 'math' has no logits, which this recipe needs" in err
    (tmp_path / "stored").mkdir()
    record = {"format": FORMAT, "teachers": {"maths": {"importance": False, "scores": False}}}
    (tmp_path / "stored/store.json").write_text(json.dumps(record))
    code, _, err = run(capsys, *stored)
    assert code == 2 and "r.yaml: stored holds the teachers maths, not 'math'" in err


def test_a_stored_teacher_need_not_be_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    stored = ["validate", "r.yaml", "--teachers.math.source=store", "--store.path=stored"]
    stored += ["--teachers.math.model=org/elsewhere"]
    (tmp_path / "stored").mkdir()
    shape = dataclasses.asdict(kv_shape(LlamaForCausalLM(LlamaConfig.from_pretrained("student"))))
    teacher = {"importance": False, "scores": False, "shape": shape}
    record = {"format": FORMAT, "form": "aligned", "teachers": {"math": teacher}}
    (tmp_path / "stored/store.json").write_text(json.dumps(record))
    code, out, err = run(capsys, *stored)
    assert code == 0 and err == "" and out.startswith("ok r.yaml")
    code, _, err = run(capsys, *stored, "--losses.logit_kd.weight=1")
    assert code == 2 and "r.yaml: The store of teacher 'math' has no logits, which this recipe needs" in err
    code, _, err = run(capsys, *stored, "--losses.kv_relation.layers=[0, 3]")
    assert code == 2 and "r.yaml: losses.kv_relation.layers" in err


def test_a_tokenizer_larger_than_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads(Path("teacher/config.json").read_text())
    Path("teacher/config.json").write_text(json.dumps({**config, "vocab_size": 3}))
    code, _, err = run(capsys, "validate", "r.yaml")
    assert code == 2 and "teachers.math of r.yaml: the tokenizer has 4 tokens, the model only 3; give the" in err


def test_a_chat_template_is_enough_for_chat(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained("student")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained("student")
    assert run(capsys, "validate", "r.yaml", "--student.chat=true")[0] == 0


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "validate", "r.yaml", "--teachers.math.weight", "2")
    assert code == 0
    assert err == ("kv-trainer: warning: r.yaml: teachers.math.weight has no effect: it needs fusion.method: fixed.\n")


@pytest.mark.parametrize("trusted", ["true", "false"])
@pytest.mark.parametrize("section", ["teachers.math", "student"])
def test_validate_runs_no_code_of_a_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, section: str, trusted: str
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(Path("modules").resolve()))
    own = Path("student" if section == "student" else "teacher")
    code = f"import pathlib\npathlib.Path({str(Path('mark').resolve())!r}).touch()\nclass Own:\n    pass\n"
    (own / "own.py").write_text(code)
    maps_of = {"config": {"AutoConfig": "own.Own"}, "tokenizer_config": {"AutoTokenizer": ["own.Own", None]}}
    for name, maps in maps_of.items():
        content = json.loads((own / f"{name}.json").read_text())
        content["auto_map"] = maps
        (own / f"{name}.json").write_text(json.dumps({**content, "model_type": "unknown_to_transformers"}))
    code, out, err = run(capsys, "validate", "r.yaml", f"--{section}.trust_remote_code", trusted)
    assert not Path("mark").exists() and err.count("\n") == 1
    if trusted == "true":
        assert code == 0 and out.startswith("ok r.yaml:")
        assert err.startswith(f"kv-trainer: warning: r.yaml: {section} is not checked: it has trust_remote_code")
    else:
        assert code == 2 and "trust_remote_code" in err


@pytest.mark.skipif(not DEPRECATES, reason="this version of transformers does not deprecate gradient_checkpointing")
def test_deprecated_settings_work_and_are_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "validate", "r.yaml", "--training.gradient_checkpointing", "true")
    assert code == 0 and out.startswith("ok r.yaml:") and err.count("\n") == 1
    assert err.startswith("kv-trainer: warning: r.yaml: `gradient_checkpointing` is deprecated and will be removed")


@pytest.mark.parametrize("arguments", [["train", "r.yaml"], ["evaluate", "student", "--recipe", "r.yaml"]])
def test_user_errors_write_nothing(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    before = sorted(os.listdir())
    code, out, err = run(capsys, *arguments, "--training.sed", "1")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("kv-trainer: error: Unknown key 'training.sed' on the command line. Did you mean 'seed'?")
    assert sorted(os.listdir()) == before


def test_ctrl_c_is_told_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kv_trainer.run.train", interrupted)
    code, _, err = run(capsys, "train", "r.yaml")
    assert (code, err) == (130, "kv-trainer: stopped; there is no checkpoint to go on from\n")
    monkeypatch.setattr("kv_trainer.manifest.last_whole", lambda folder: (folder / "checkpoint-40", {}))
    assert "stopped; --resume goes on from checkpoint-40" in run(capsys, "train", "r.yaml")[2]


def test_rows_too_long_for_a_table_of_positions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    GPT2Config(vocab_size=4, n_positions=256, n_embd=8, n_layer=2, n_head=2).save_pretrained("teacher")
    code, _, err = run(capsys, "validate", "r.yaml")
    assert code == 2 and "teachers.math of r.yaml: data.max_length is 1024, but this gpt2 has 256 positions" in err
    assert run(capsys, "validate", "r.yaml", "--data.max_length", "256")[0] == 0


@pytest.mark.parametrize("command", [["evaluate", "none", "--recipe", "r.yaml"], ["export", "out/never", "--format"]])
def test_a_model_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    more = ["merged", "--output", "new"] if command[0] == "export" else []
    code, _, err = run(capsys, *command, *more)
    assert code == 2 and f"MODEL is '{command[1]}', which could not be loaded: there is no such folder" in err


def test_tensors_that_were_cut_off_are_told_by_their_folder(capsys: pytest.CaptureFixture[str]) -> None:
    LlamaForCausalLM(LlamaConfig.from_pretrained("student")).save_pretrained("student")
    weights = Path("student/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    for command in (["evaluate", "student", "--recipe", "r.yaml"],
                    ["export", "student", "--format", "onnx", "--output", "new"]):  # fmt: skip
        code, _, err = run(capsys, *command)
        assert code == 2 and "error: The weights in student cannot be read (" in err and "Traceback" not in err


def test_what_an_evaluated_folder_does_not_say_is_as_the_recipe_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    LlamaForCausalLM(LlamaConfig.from_pretrained("student")).save_pretrained("weights")
    command = ["evaluate", "weights", "--recipe", "r.yaml", "--data.eval_split", "train", "--evaluation.generate=false"]
    code, out, err = run(capsys, *command)
    assert code == 0 and "perplexity" in out, err
    code, _, err = run(capsys, *command, "--student.attn_implementation", "nonsense")
    assert code == 2 and "nonsense" in err
    section = StudentConfig(config="student", tokenizer="student")
    assert load_evaluated("weights", section)[0].dtype == torch.float32
    assert load_evaluated("weights", dataclasses.replace(section, dtype="bfloat16"))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("command", [["evaluate", "student", "--recipe", "r.yaml"], ["diagnose", "r.yaml"]])
def test_ctrl_c_leaves_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kv_trainer.recipes.load_recipe", interrupted)
    assert run(capsys, *command) == (130, "", "kv-trainer: interrupted\n")


def test_results_are_not_lost_to_a_wrong_place_for_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "evaluate", "student", "--recipe", "r.yaml", "--predictions", ".")
    assert code == 2 and "--predictions . is a folder; name a file in it" in err


def test_whole_sections_can_be_overridden(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "validate", "--teachers", "null", "r.yaml", "--losses={kv_relation: null}")
    assert (code, err) == (0, "") and out.endswith("teachers none; losses cross_entropy x 1\n")
    code, _, err = run(capsys, "validate", "r.yaml", "--teachers")
    assert code == 2 and "--teachers on the command line has no value" in err


def test_the_recipe_is_saved_before_training_as_it_was_asked(
    capsys: pytest.CaptureFixture[str], untrained: None
) -> None:
    code, _, err = run(capsys, "train", "r.yaml", *ALONE, "--training.output_dir=out")
    assert code == 2 and "here it would train" in err
    saved = yaml.safe_load(Path("out/recipe.yaml").read_text())
    assert saved["teachers"] == {} and saved["training"]["output_dir"] == "out"
    assert "dataloader_pin_memory" not in saved["training"], "the trainer's own choice on a CPU was not asked for"
    assert os.listdir("out") == ["recipe.yaml"]


def test_a_folder_with_a_run_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    """A refused resume writes nothing; neither does a second fresh start, while --resume goes on."""

    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}

    train = ["train", "r.yaml", *ALONE, "--training.output_dir=out", "--training.use_cpu=true"]
    Path("out").mkdir()
    Path("out/recipe.yaml").write_text("of an earlier run")
    code, _, err = run(capsys, *train, "--resume")
    assert code == 2 and "out has no whole checkpoint to resume from" in err
    assert content() == {"out/recipe.yaml": b"of an earlier run"}

    assert run(capsys, *train, "--training.max_steps=1", "--auto-resume")[0] == 0, "nothing to resume: from the start"
    before = content()
    assert any(name.startswith("out/checkpoint-1/") for name in before) and before["out/metrics.jsonl"]
    code, out, err = run(capsys, *train, "--training.max_steps=2", "--training.learning_rate=1")
    assert code == 2 and out == "" and content() == before
    assert "out holds checkpoint-1 of an earlier run. Go on from it with --resume; or, to begin anew, give" in err
    assert run(capsys, *train, "--training.max_steps=2", "--resume")[0] == 0 and Path("out/checkpoint-2").is_dir()
    code, out, _ = run(capsys, *train, "--training.max_steps=3", "--auto-resume")
    assert code == 0 and "resuming from out/checkpoint-2" in out and Path("out/checkpoint-3").is_dir()

    left = sorted(Path("out").glob("checkpoint-*"))
    for folder in left:  # as training.save_only_model leaves them
        (folder / "kv_manifest.json").unlink()
    code, _, err = run(capsys, *train)
    assert (
        code == 2
        and f"{', '.join(f.name for f in left)} of an earlier run, which cannot be resumed; give another" in err
    )


def test_results_of_a_resumed_run_are_of_all_of_it(tmp_path: Path) -> None:
    """Trainer divides the losses of the last session by the steps of all, and the samples of all by its seconds."""
    rows = [{"step": 4, "loss": 3.0, "time": 6.0}, {"step": 6, "loss": 1.5, "time": 9.0, "event": "epoch_end"},
            {"step": 6, "loss": 0.0, "time": 9.0}, {"step": 6, "eval_loss": 2.0, "time": 10.0}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    session = {"train_loss": 0.1, "train_runtime": 2.0, "train_steps_per_second": 3.0, "epoch": 1.0}
    assert of_the_whole_run(tmp_path, session) == {
        "train_loss": 2.0, "train_runtime": 10.0, "train_steps_per_second": pytest.approx(0.6),
    }  # fmt: skip


def test_a_finished_run_is_not_overwritten_by_another(capsys: pytest.CaptureFixture[str]) -> None:
    """One of the same settings would be the same again."""
    train = ["train", "r.yaml", *ALONE, "--training.output_dir=out", "--training.use_cpu=true"]
    train += ["--training.max_steps=1", "--training.save_strategy=no"]
    assert run(capsys, *train)[0] == 0
    before = Path("out/model.safetensors").read_bytes()
    code, _, err = run(capsys, *train, "--training.learning_rate=1")
    assert code == 2 and "out holds a finished run of other settings (training.learning_rate was" in err
    assert Path("out/model.safetensors").read_bytes() == before
    assert run(capsys, *train, "--data.num_proc=1")[0] == 0, "how many processes encoded its rows is no other run"
    saved = Path("out/recipe.yaml")
    known = yaml.safe_load(saved.read_text())
    del known["monitor"]  # as one of a version that did not have it yet
    saved.write_text(yaml.safe_dump(known))
    assert run(capsys, *train)[0] == 0
    saved.write_text(yaml.safe_dump({**known, "newer": {}}))
    code, _, err = run(capsys, *train)
    assert code == 2 and "out holds a finished run of other settings (Unknown key 'newer' in out/recipe.yaml" in err


def test_traceback_on_request() -> None:
    with pytest.raises(ValueError, match="does not exist"):
        main(["train", "none.yaml", "--traceback"])


@pytest.mark.parametrize(
    ("arguments", "plain", "overrides"),
    [
        (["train", "r.yaml", "--a.b", "1", "--resume"], ["train", "r.yaml", "--resume"], ["--a.b", "1"]),
        (["train", "--a.b", "-1e-5", "r.yaml"], ["train", "r.yaml"], ["--a.b", "-1e-5"]),
        (["train", "--a.b=1", "r.yaml"], ["train", "r.yaml"], ["--a.b=1"]),
        (["evaluate", "m", "--recipe=x.yaml"], ["evaluate", "m", "--recipe=x.yaml"], []),
        (["train", "r.yaml", "--a.b", "--c.d", "1"], ["train", "r.yaml"], ["--a.b", "--c.d", "1"]),
        (["validate", "--teachers", "null", "r.yaml"], ["validate", "r.yaml"], ["--teachers", "null"]),
        (["train", "--data={path: x}", "--teacher=1"], ["train", "--teacher=1"], ["--data={path: x}"]),
    ],
)
def test_split_overrides(arguments: list[str], plain: list[str], overrides: list[str]) -> None:
    assert split_overrides(arguments) == (plain, overrides)


@pytest.mark.parametrize(
    "arguments", [[], ["trian", "r.yaml"], ["train"], ["train", "r.yaml", "--res"], ["evaluate", "m"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("name", ["train", "evaluate", "validate", "diagnose", "compare", "methods"])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"examples:\n  kv-trainer {name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["--version"], 0, f"kv-trainer {__version__}\n", ""),
        (["train", "none.yaml"], 2, "", "kv-trainer: error: The recipe none.yaml does not exist.\n"),
    ],
)
def test_as_a_module(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    out: str,
    err: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["kv_trainer", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("kv_trainer", run_name="__main__")
    assert caught.value.code == code and tuple(capsys.readouterr()) == (out, err)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_do_not_wait_for_torch(option: str) -> None:
    code = (
        "import sys\n"
        "from kv_trainer.cli import main\n"
        "try:\n"
        f"    main([{option!r}])\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'matplotlib', 'rich'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "kv-trainer" in done.stdout


def test_every_export_is_there_when_it_is_asked_for() -> None:
    import kv_trainer

    for name in kv_trainer.__all__:
        assert getattr(kv_trainer, name) is not None and name in dir(kv_trainer), name
    assert set(kv_trainer.HOMES) == set(kv_trainer.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="module 'kv_trainer' has no attribute 'KVBrige'"):
        kv_trainer.KVBrige  # noqa: B018
