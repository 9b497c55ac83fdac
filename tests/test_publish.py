"""Pushing to a Hub, one on loopback: during and after training, and what comes back from it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from helpers_trainer import ROWS, TEACHERS, World, assert_same_run
from hub_server import OWNER, HubServer
from huggingface_hub import ModelCard, constants, snapshot_download
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import hub as transformers_hub

from kv_trainer.checkpoints import BRIDGE_FILE
from kv_trainer.facts import base_license
from kv_trainer.losses import CrossEntropy, KVLoss
from kv_trainer.publish import PushError
from kv_trainer.recipes import load_recipe
from kv_trainer.staging import json_without_paths, recipe_without_paths, shortened

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
LOSSES = {"cross_entropy": CrossEntropy(), "kv": KVLoss()}
IDS = torch.arange(3, 23)[None]
STUDENT_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ALWAYS = STUDENT_FILES | {BRIDGE_FILE, "kv_manifest.json", "recipe.yaml", "metrics.jsonl", "README.md", "curve.png"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that this process talks to; conftest.py has switched off the real one before it was imported."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", "")
        yield server


@pytest.fixture(scope="module")
def world(tiny_model, tiny_tokenizer) -> World:
    return World(tiny_model, tiny_tokenizer)


@pytest.fixture
def start(world: World, hub: HubServer, tmp_path: Path):
    """A trainer that pushes to `tester/student` after every second of its four steps, all of which are saved."""

    def make(folder: str = "out", **changes):
        options = {
            "push_to_hub": True, "hub_model_id": "student", "hub_token": hub.token, "hub_always_push": True,
            "hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 2, "max_steps": 4,
        }  # fmt: skip
        return world.trainer(tmp_path / folder, LOSSES, **{**options, **changes})

    return make


def download(hub: HubServer, target: Path, **options) -> Path:
    snapshot_download(f"{OWNER}/student", local_dir=target, token=hub.token, **options)
    shutil.rmtree(target / ".cache")
    return target


def assert_clean(server: HubServer, secrets: list[str]) -> None:
    """No secret is in any byte or name that any commit of any repository holds."""
    commits = [c for repo in server.repos.values() for branch in repo.branches.values() for c in branch]
    assert any(commit.files for commit in commits)
    for commit in commits:
        for name, data in commit.files.items():
            for secret in secrets:
                assert secret not in name and secret.encode() not in data, (name, secret)
            assert "training_args" not in name


# ---- the round trip


def test_a_run_comes_back_and_goes_on(world, start, hub: HubServer, tmp_path: Path) -> None:
    options = {
        "eval_rows": Dataset.from_list(ROWS[:4]), "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "hub_strategy": "all_checkpoints", "hub_private_repo": True,
    }  # fmt: skip
    whole = start(**options)
    whole.train()
    assert [c.message for c in hub.commits("student")] == [
        "Training in progress, step 2", "Training in progress, step 2, checkpoint",
        "Training in progress, step 4", "Training in progress, step 4, checkpoint",
    ]  # fmt: skip
    first, second = hub.commits("student")[:2]
    assert first.files.keys() >= ALWAYS and {n.partition("/")[0] for n in second.changed} == {"checkpoint-2"}
    card = first.files["README.md"].decode()
    assert "**Training in progress**: step 2 of 4." in card and "perplexity" in card
    assert len(first.files["metrics.jsonl"].splitlines()) == 3, "two steps and an evaluation"
    best = json.loads(hub.commits("student")[-1].files["checkpoint-4/trainer_state.json"])["best_model_checkpoint"]
    assert best in ("checkpoint-2", "checkpoint-4") and hub.repos[f"{OWNER}/student"].private

    info = whole.push_to_hub()
    last = hub.commits("student")[-1]
    assert info.oid == last.sha and last.message == "End of training"
    card = last.files["README.md"].decode()
    assert "in progress**" not in card and f'AutoModelForCausalLM.from_pretrained("{OWNER}/student")' in card
    local, back = Path(whole.args.output_dir), download(hub, tmp_path / "back")
    for name in last.files:
        if name not in ("kv_manifest.json", "recipe.yaml") and not name.endswith("trainer_state.json"):
            assert (back / name).read_bytes() == (local / name).read_bytes(), name
    for folder in (back, back / "checkpoint-2"):
        sizes = json.loads((folder / "kv_manifest.json").read_text())["files"]
        assert len(sizes) > 5 and all((folder / name).stat().st_size == size for name, size in sizes.items())
    assert not (local / "_hub").exists() and not any(local.rglob("training_args.bin"))

    student = AutoModelForCausalLM.from_pretrained(back)
    torch.testing.assert_close(student(IDS).logits, whole.model(IDS).logits)
    text = "what is seven plus five?"
    assert AutoTokenizer.from_pretrained(back)(text).input_ids == world.tokenizer(40)(text).input_ids
    assert load_file(back / BRIDGE_FILE).keys() == whole.bridge.state_dict().keys() != set()
    assert_clean(hub, [hub.token, str(tmp_path), str(Path.home()) + "/"])

    shutil.rmtree(local)
    resumed = start(str(back), **{**options, "push_to_hub": False})
    resumed.train(resume_from_checkpoint=str(back / "checkpoint-2"))
    assert resumed.state.best_model_checkpoint in (str(back / "checkpoint-2"), str(back / "checkpoint-4"))
    assert_same_run(whole, resumed)


def test_the_strategies_and_a_branch(start, hub: HubServer) -> None:
    start("a", hub_model_id="end", hub_strategy="end").train()
    assert hub.commits("end") == []
    start("b", hub_model_id="last", hub_strategy="checkpoint", hub_revision="trial").train()
    assert hub.commits("last") == [] and len(hub.commits("last", "trial")) == 4
    names = {n.partition("/")[0] for n in hub.commits("last", "trial")[-1].changed}
    assert names == {"last-checkpoint"}
    state = json.loads(hub.commits("last", "trial")[-1].files["last-checkpoint/trainer_state.json"])
    assert state["global_step"] == 4
    by_user = start("c", hub_model_id="by-user", hub_strategy="end", push_to_hub=False, max_steps=1)
    by_user.train()
    assert by_user.push_to_hub("mine", blocking=False, tags="mine", license="mit").result().commit_message == "mine"
    data = ModelCard(hub.commits("by-user")[-1].files["README.md"].decode()).data
    assert data.license == "mit" and {"mine", "kv-distillation"} <= set(data.tags)
    by_user.save_model()
    assert len(hub.commits("by-user")) == 1, "not without args.push_to_hub"
    with pytest.raises(ValueError, match="dataset and dataset_args are not used"):
        by_user.create_model_card(dataset="x")


# ---- a slow Hub, and one that refuses


class Keeper(TrainerCallback):
    """Keeps the weights of every save."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, bytes]] = {}

    def on_save(self, args, state, control, **kwargs) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        names = ("model.safetensors", BRIDGE_FILE)
        self.weights[state.global_step] = {name: (folder / name).read_bytes() for name in names}


def test_a_slow_hub_gets_every_save_as_it_was(start, hub: HubServer) -> None:
    """Checkpoints are deleted, and metrics grow, long before they are uploaded."""
    hub.delay, keeper = 0.15, Keeper()
    trainer = start(save_steps=1, save_total_limit=1, callbacks=[keeper], hub_strategy="checkpoint", max_steps=5)
    trainer.train()
    commits = hub.commits("student")
    assert [c.message for c in commits[::2]] == [f"Training in progress, step {i}" for i in range(1, 6)]
    for i, commit in enumerate(commits[::2], start=1):
        assert {name: commit.files[name] for name in keeper.weights[i]} == keeper.weights[i]
        rows = [json.loads(line) for line in commit.files["metrics.jsonl"].splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, i + 1))
    for i, commit in enumerate(commits[1::2], start=1):
        assert {n: commit.files[f"last-checkpoint/{n}"] for n in keeper.weights[i]} == keeper.weights[i]
    assert [p.name for p in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-5"]


def test_without_hub_always_push_a_busy_hub_is_spared(start, hub: HubServer) -> None:
    hub.delay = 0.3
    start(save_steps=1, hub_always_push=False).train()
    messages = [c.message for c in hub.commits("student")]
    assert messages[0] == "Training in progress, step 1" and len(messages) < 4


def test_a_refused_push_is_told_and_the_run_goes_on(start, hub: HubServer, caplog) -> None:
    hub.refuse = lambda branch, message: "step 2" in message or "End" in message
    trainer = start(hub_strategy="checkpoint")
    with caplog.at_level(logging.WARNING, "kv_trainer.publish"):
        trainer.train()
    assert [c.message for c in hub.commits("student")] == [
        "Training in progress, step 4", "Training in progress, step 4, checkpoint"
    ]  # fmt: skip
    told = [r.getMessage() for r in caplog.records if r.name == "kv_trainer.publish"]
    assert len(told) == 2 and all("'Training in progress, step 2" in t and "403" in t for t in told)
    with pytest.raises(PushError, match=r"The push 'End of training' to tester/student failed: .*403.*push again with"):
        trainer.push_to_hub()
    folder = Path(trainer.args.output_dir)
    assert ALWAYS - {"recipe.yaml", "kv_manifest.json"} <= {p.name for p in folder.iterdir()}
    hub.refuse = lambda branch, message: False
    trainer.push_to_hub()
    assert hub.commits("student")[-1].message == "End of training"


def test_a_snapshot_that_fails_does_not_stop_the_run(start, hub: HubServer, caplog) -> None:
    trainer = start(save_steps=4)
    (Path(trainer.args.output_dir) / "_hub").write_text("in the way")
    with caplog.at_level(logging.WARNING, "kv_trainer.publish"):
        trainer.train()
    assert "checkpoint-4 could not be made ready for the Hub: FileExistsError" in caplog.text
    assert trainer.state.global_step == 4 and hub.commits("student") == []


# ---- from a recipe


RECIPE = """
student: {{model: {folder}/base, peft: {{type: lora, r: 4, target_modules: [k_proj, v_proj]}}}}
teachers: {{fine: {{model: {folder}/fine}}, deep: {{model: {folder}/deep}}}}
losses: {{cross_entropy: {{}}, kv: {{}}}}
data: {{path: {folder}/rows.jsonl, eval_split: train}}
evaluation: {{generate: false}}
training:
  {{max_steps: 2, per_device_train_batch_size: 4, logging_steps: 1, save_steps: 1, use_cpu: true, disable_tqdm: true,
   output_dir: {folder}/outputs/tiny, push_to_hub: true, hub_model_id: student, hub_token: {token},
   hub_strategy: all_checkpoints, hub_always_push: true}}
"""


def test_the_command_line_gives_nothing_away(tiny_model, tiny_tokenizer, hub: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "home" / "jane.doe77"
    tiny_model("llama").save_pretrained(home / "base")
    tiny_tokenizer(40).save_pretrained(home / "base")
    (home / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    for name, (family, config, merges, bos) in TEACHERS.items():
        tiny_model(family, seed=7, **config).save_pretrained(home / name)
        tiny_tokenizer(merges, bos=bos).save_pretrained(home / name)
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (home / "r.yaml").write_text(RECIPE.format(folder=home, token=hub.token))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HOME": str(home), "USER": "jane.doe77", "LOGNAME": "jane.doe77", "HF_HOME": str(home / "hf")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kv_trainer", "train", str(home / "r.yaml")]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr[-3000:]

    commits = hub.commits("student")
    assert [c.message for c in commits if "checkpoint" not in c.message] == [
        "Training in progress, step 1", "Training in progress, step 2", "End of training"
    ]  # fmt: skip
    assert all(any(Path(name).name == BRIDGE_FILE for name in c.changed) for c in commits)
    assert_clean(hub, [hub.token, "jane.doe77", str(tmp_path), str(Path(__file__).parents[1]), sys.prefix])

    local, back = home / "outputs" / "tiny", download(hub, tmp_path / "back", ignore_patterns="checkpoint-*")
    assert {"all_results.json", "curve.png", "routing.json", "adapter_model.safetensors"} <= set(os.listdir(back))
    for name in set(os.listdir(back)) - {"adapter_config.json", "recipe.yaml", "kv_manifest.json"}:
        assert (back / name).read_bytes() == (local / name).read_bytes(), name
    assert json.loads((back / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    theirs = PeftModel.from_pretrained(base, back)(IDS).logits
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    torch.testing.assert_close(theirs, PeftModel.from_pretrained(base, local)(IDS).logits, rtol=0, atol=0)

    recipe = load_recipe(back / "recipe.yaml")
    assert (recipe.args.output_dir, recipe.student.model, recipe.args.data.path) == ("tiny", "base", "rows.jsonl")
    assert recipe.args.hub_token is None
    text = (back / "README.md").read_text()
    card = ModelCard(text).data
    assert card.license == "apache-2.0" and card.eval_results[0].metric_name == "perplexity"
    for words in ("`apache-2.0`, as its base model `base`", "1 x CPU", "trained for", "kv-trainer train recipe.yaml",
                  "peak memory", "`checkpoint-<step>/`", "| fine | `fine` | qwen3"):  # fmt: skip
        assert words in text, words

    assert all("jane.doe77" in (local / name).read_text() for name in ("recipe.yaml", "adapter_config.json"))

    # Put back into output_dir, the last checkpoint is one to resume from.
    shutil.rmtree(local)
    download(hub, local, allow_patterns="checkpoint-1/*")
    ran = subprocess.run(
        [*command, "--resume", "--training.push_to_hub=false"], cwd=tmp_path, env=env, capture_output=True, text=True,
        timeout=180,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    again, first = (load_file(f / "adapter_model.safetensors") for f in (local, back))
    for name, tensor in first.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)


# ---- what is taken out


@pytest.mark.parametrize(
    ("given", "short"),
    [
        ("/mnt/jane/models/tiny", "tiny"), ("/mnt/jane/models/tiny/", "tiny"), ("~/models/tiny", "tiny"),
        ("../../jane/tiny", "tiny"), (r"C:\Users\jane\tiny", "tiny"), ("/tmp", "tmp"),
        ("file:///mnt/jane/models/tiny", "tiny"),
        # These are none: hub names, folders from here, templates, patterns, tokens.
        ("openai/gsm8k", "openai/gsm8k"), ("outputs/tiny", "outputs/tiny"), ("/think", "/think"), ("</think>",) * 2,
        ("/solve this/{question}",) * 2, (r"####\s*(.+)",) * 2, ("{{ a }}\n/b/c",) * 2, ("", ""), ("/", "/"),
        ("a/../b", "a/../b"), (f"read from {Path.home()}/x/y", "read from x/y"),
    ],
)  # fmt: skip
def test_paths_are_shortened(given: str, short: str) -> None:
    assert shortened(given) == short
    for content, expected in (({"a": [given]}, {"a": [short]}), ({"b": {given: 1}}, {"b": {short: 1}})):
        text = json.dumps(content, indent=1)
        assert json.loads(json_without_paths(text)) == expected
        assert (json_without_paths(text) == text) == (given == short)
        assert yaml.safe_load(recipe_without_paths(text)) == expected


def test_a_path_from_here_may_hold_the_users_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jane" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/jane")
    assert shortened("jane/tiny") == "tiny" and shortened("jane/on-the-hub") == "jane/on-the-hub"


def test_the_card_of_a_trainer_made_in_python(world: World, tmp_path: Path) -> None:
    teachers = world.teachers()
    config = teachers["fine"][0].config
    config.name_or_path, config._commit_hash = "Qwen/Qwen2-7B", "c03e6d358207"
    lora = LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM")
    trainer = world.trainer(tmp_path / "out", LOSSES, teachers=teachers, peft_config=lora, max_steps=1)
    trainer.train()
    trainer.create_model_card(model_name="mine", language="en")
    text = (tmp_path / "out" / "README.md").read_text()
    for words in ("| fine | `Qwen/Qwen2-7B` at `c03e6d358207` | qwen3", "started from a model made in Python", "# mine",
                  "`lora` adapters (r 2, target_modules ['k_proj'])", "Licence\n\nNot known", "last kv loss",
                  "Rows that were made in Python", "trained for "):  # fmt: skip
        assert words in text, words
    data = ModelCard(text).data
    assert (data.language, data.library_name, data.base_model, data.license) == ("en", "peft", None, None)


def test_the_licence_is_the_base_models_or_none(hub: HubServer, tmp_path: Path) -> None:
    assert base_license(None, None) == {} == base_license("org/not-there", None) == base_license(str(tmp_path), None)
    front = "license: other\nlicense_name: qwen\nlicense_link: https://x.org/l"
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\nText\n")
    assert base_license(str(tmp_path), None) == yaml.safe_load(front)
    for broken in ("license: other: see LICENSE", "tags: [a, b", "license:\tmit"):
        (tmp_path / "README.md").write_text(f"---\n{broken}\n---\nText\n")
        assert base_license(str(tmp_path), None) == {}, "a header that is no YAML costs nobody a trained model"
    (tmp_path / "README.md").write_text("No metadata at all\n")
    assert base_license(str(tmp_path), None) == {}
