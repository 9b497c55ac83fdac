"""Adapters: from a recipe to a folder that peft alone can load, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import ROWS, TEACHERS, World, assert_same_run, weights
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kv_trainer.adapters import load_trained, peft_config
from kv_trainer.arguments import StudentConfig
from kv_trainer.checkpoints import BRIDGE_FILE
from kv_trainer.cli import main
from kv_trainer.losses import CrossEntropy, KVLoss, KVRelationLoss
from kv_trainer.models import load_student
from kv_trainer.recipes import RecipeError, load_recipe, save_recipe
from kv_trainer.run import build_trainer
from kv_trainer.trainer import MultiTeacherKVTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "v_proj"]}
RECIPE = """
student: {{model: ./student, peft: {peft}}}
teachers: {{fine: {{model: ./fine}}, deep: {{model: ./deep}}}}
fusion: {{method: uniform}}
losses: {{cross_entropy: {{weight: 0}}, kv: {{weight: 1}}}}
data: {{path: ./rows.jsonl, eval_split: train}}
evaluation: {{generate: false}}
training: {{max_steps: 4, per_device_train_batch_size: 4, logging_steps: 1, save_steps: 2, save_total_limit: 5,
            learning_rate: 0.05, use_cpu: true, disable_tqdm: true, output_dir: {output}{more}}}
"""
IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    tiny_model("llama", num_hidden_layers=3).save_pretrained(folder / "student")
    tiny_tokenizer(40).save_pretrained(folder / "student")
    for name, (family, config, merges, bos) in TEACHERS.items():
        tiny_model(family, seed=7, **config).save_pretrained(folder / name)
        tiny_tokenizer(merges, bos=bos).save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def write(folder: Path, output: Path, peft: Any = LORA, more: str = "") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(output=output, peft=json.dumps(peft), more=more))
    return path


def build(folder: Path, output: Path, peft: Any = LORA, more: str = "") -> MultiTeacherKVTrainer:
    return build_trainer(load_recipe(write(folder, output, peft, more)))


# ---- from a recipe to a folder of adapters


@pytest.mark.parametrize("more", ["", ", gradient_checkpointing: true"], ids=["kept", "recomputed"])
def test_kv_losses_reach_the_adapters_of_keys_and_values_alone(folder: Path, tmp_path: Path, more: str) -> None:
    trainer = build(folder, tmp_path, more=more)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert isinstance(trainer.model, PeftModel) and frozen
    for name, parameter in trainer.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
        if "lora_B" in name:  # B starts at zero: it moved because the keys and values pulled it
            assert parameter.abs().max() > 0, name
    assert sum("lora_B" in n for n, _ in trainer.model.named_parameters()) == 3 * 2


def test_answers_are_generated_in_the_precision_of_the_training(folder: Path, tmp_path: Path) -> None:
    """`generate` of adapters calls the model below, which accelerate has not wrapped."""
    asked = {"data.answer": "'{completion}'", "evaluation.generate": "true", "evaluation.max_new_tokens": "2"}
    words = [word for name, value in asked.items() for word in (f"--{name}", value)]
    trainer = build_trainer(load_recipe(write(folder, tmp_path, more=", bf16: true"), words))
    trainer.train()
    seen = []
    layer = trainer.accelerator.unwrap_model(trainer.model).get_base_model().lm_head
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.evaluate()
    assert set(seen) == {torch.bfloat16} and len(seen) >= 3, "perplexity and answers alike"


def test_recomputed_activations_change_nothing(folder: Path, tmp_path: Path) -> None:
    kept, recomputed = build(folder, tmp_path), build(folder, tmp_path, more=", gradient_checkpointing: true")
    kept.train(), recomputed.train()
    assert recomputed.model.is_gradient_checkpointing
    assert_same_run(kept, recomputed)


def test_resumed_run_is_the_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    lora = {**LORA, "lora_dropout": 0.1}
    whole = build(folder, tmp_path / "whole", lora)
    whole.train()
    resumed = build(folder, tmp_path / "whole", lora)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    after = weights(resumed)
    assert all(torch.equal(after[name], tensor) for name, tensor in weights(whole).items())


def test_best_adapters_come_back_at_the_end(folder: Path, tmp_path: Path) -> None:
    more = ", eval_strategy: steps, eval_steps: 2, load_best_model_at_end: true"
    trainer = build(folder, tmp_path, more=more)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    saved = load_file(best / "adapter_model.safetensors")
    now = {n.replace(".default", ""): t for n, t in weights(trainer).items()}
    assert saved and all(torch.equal(now[name], tensor) for name, tensor in saved.items())
    assert all(torch.equal(trainer.bridge.state_dict()[n], t) for n, t in load_file(best / BRIDGE_FILE).items())


def test_command_line_from_training_to_another_program(folder, tmp_path, monkeypatch, capsys) -> None:
    """Trained, loaded by peft as the model card says, and evaluated from a folder where its base's path is wrong."""
    monkeypatch.chdir(folder)
    recipe = write(folder, tmp_path / "out", more=", eval_strategy: steps, eval_steps: 2, load_best_model_at_end: true")
    assert main(["train", str(recipe)]) == 0
    assert re.search(r"^back to checkpoint-\d of \d steps: loss \d\.\d+$", capsys.readouterr().out, re.MULTILINE)
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", BRIDGE_FILE, "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    assert all("lora_" in name for name in load_file(out / "adapter_model.safetensors"))

    card = (out / "README.md").read_text()
    assert "library_name: peft" in card and "base_model_relation: adapter" in card
    assert "trained were `lora` adapters (r 4, lora_alpha 8, " in card
    code = card.split("```python\n")[1].split("```")[0].replace('"student"', repr(str(folder / "student")))
    loaded: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(code, loaded)
    assert isinstance(loaded["model"], PeftModel)
    assert loaded["tokenizer"].get_vocab() == AutoTokenizer.from_pretrained(folder / "student").get_vocab()
    base = AutoModelForCausalLM.from_pretrained(folder / "student")
    with torch.no_grad():
        found, plain = loaded["model"].eval()(IDS).logits, base(IDS).logits
        merged = loaded["model"].merge_and_unload()(IDS).logits
    assert (found - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, found, rtol=1e-4, atol=1e-5)

    ends = GenerationConfig.from_pretrained(out)
    ends.eos_token_id = [ends.eos_token_id, 7]  # as a student that was taught the end of a chat's turns
    ends.save_pretrained(out)
    base_path = str(folder / "student")
    assert load_trained(str(out), base_path).generation_config.eos_token_id == ends.eos_token_id

    results = json.loads((out / "all_results.json").read_text())
    assert not Path(json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]).exists()
    capsys.readouterr()
    assert main(["evaluate", str(out), "--recipe", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert f"{results['eval_perplexity']:.4g}" in printed, printed


@pytest.mark.parametrize(
    "peft",
    [
        {"type": "ia3", "target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
        {**LORA, "use_dora": True},
        {"type": "loha", "r": 2, "alpha": 2, "target_modules": ["v_proj"]},
        {**LORA, "target_modules": "all-linear", "use_rslora": True, "bias": "lora_only"},
        {**LORA, "modules_to_save": ["lm_head"]},
    ],
    ids=["ia3", "dora", "loha", "all-linear", "modules_to_save"],
)
def test_other_methods_train_and_load(folder: Path, tmp_path: Path, peft: dict[str, Any]) -> None:
    trainer = build(folder, tmp_path, peft)
    trainer.train()
    base = AutoModelForCausalLM.from_pretrained(folder / "student")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "checkpoint-4")).eval()
    with torch.no_grad():
        found = loaded(IDS).logits
        torch.testing.assert_close(found, trainer.model.eval()(IDS).logits, rtol=1e-5, atol=1e-5)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(IDS).logits, found, atol=1e-4)


def test_keys_and_values_fed_by_lower_adapters_train_and_others_are_refused(tiny_model, tiny_tokenizer, tmp_path):
    world = World(tiny_model, tiny_tokenizer)
    losses = {"cross_entropy": CrossEntropy(), "kv_relation": KVRelationLoss()}
    below = world.trainer(tmp_path, losses, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    below.train()
    nothing = world.trainer(tmp_path, losses, peft_config=LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="carry no gradient.*with PEFT, put k_proj and v_proj among target_modules"):
        nothing.train()


# ---- the section


def test_the_section_survives_a_round_trip(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    recipe = load_recipe(write(folder, tmp_path), ["--student.peft.r", "8"])
    assert recipe.student.peft == {**LORA, "r": 8}
    save_recipe(recipe, "again.yaml")
    assert load_recipe("again.yaml").student == recipe.student
    other = load_recipe("recipe.yaml", ["--student.peft", "{type: ia3}"])
    assert other.student.peft == {"type": "ia3"}, "the knobs of the old type are gone"
    assert load_recipe("recipe.yaml", ["--student.peft", "null"]).student.peft is None


def test_a_number_of_iterations_goes_into_the_name_of_an_initialisation() -> None:
    """What PEFT then does at every load is random."""
    with pytest.raises(RecipeError, match="init_lora_weights is pissa_niter_16, .* another student; take pissa"):
        peft_config({**LORA, "init_lora_weights": "pissa_niter_16"})
    assert peft_config({**LORA, "init_lora_weights": "pissa"}).init_lora_weights == "pissa"
    for wrong in ("pissa_niter_", "pissa_niter_many", "pissa_niter_[number of iters]"):
        with pytest.raises(RecipeError, match="init_lora_weights"):
            peft_config({**LORA, "init_lora_weights": wrong})


def test_the_section_is_pefts_own_config() -> None:
    config = peft_config({**LORA, "lora_dropout": 0.25, "init_lora_weights": "gaussian"})
    assert isinstance(config, LoraConfig) and config.task_type == "CAUSAL_LM"
    assert (config.r, config.lora_dropout, config.init_lora_weights) == (4, 0.25, "gaussian")


@pytest.mark.parametrize(
    "peft, error",
    [
        ({"type": "lorra"}, r"student.peft.type in .*line 2 is 'lorra'; give one of .*lora.* Did you mean 'lora'\?"),
        ({"r": 4}, "student.peft.type .* is None; give one of"),
        ({"type": "lora", "rank": 4}, "Unknown key 'student.peft.rank' .*line 2.*lora takes r, target_modules"),
        ({"type": "lora", "lora_alfa": 4}, "Unknown key 'student.peft.lora_alfa'.* Did you mean 'lora_alpha'"),
        ({"type": "lora", "r": "four"}, "student.peft.r .* is 'four' .*; give an int"),
        ({"type": "lora", "bias": "some"}, "student.peft.bias .* give one of 'none', 'all', 'lora_only'"),
        ({"type": "lora", "task_type": "SEQ_CLS"}, "student.peft.task_type .* follows from the student; leave it out"),
        ({"type": "prompt_tuning", "num_virtual_tokens": 4}, "prompt_tuning cannot be used here: its virtual tokens"),
        ({"type": "prefix_tuning", "num_virtual_tokens": 4}, "prefix_tuning cannot be used here: its virtual tokens"),
        ({"type": "adalora", "total_step": 9}, "adalora cannot be used here: its ranks move only"),
        ([1], "student.peft .* is .1. .list.; give a mapping"),
    ],
)
def test_wrong_sections_are_refused_by_line(folder: Path, tmp_path: Path, peft: Any, error: str) -> None:
    with pytest.raises(RecipeError, match=error):
        load_recipe(write(folder, tmp_path, peft))


@pytest.mark.parametrize(
    "override, error",
    [
        (["--student.keep_layers", "[0]"], "student .*keep_layers cannot be used beside peft: .* base, which would be"),
        (["--student.freeze", "[embed]"], "student .*freeze would be ignored: peft freezes every weight"),
        (["--student.model", "null", "--student.config", "./student"], "config cannot be used beside peft"),
    ],
)
def test_settings_that_peft_would_lose_are_refused(folder: Path, tmp_path: Path, override: list[str], error: str):
    with pytest.raises(RecipeError, match=error):
        load_recipe(write(folder, tmp_path), override)


def test_instances_are_checked_too(tiny_model, tiny_tokenizer, tmp_path: Path, folder: Path) -> None:
    world, prompt = World(tiny_model, tiny_tokenizer), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    losses = {"cross_entropy": CrossEntropy(), "kv": KVLoss()}
    with pytest.raises(ValueError, match="prompt_tuning cannot be used here"):
        world.trainer(tmp_path, losses, peft_config=prompt)
    with pytest.raises(ValueError, match="prompt_tuning cannot be used here"):
        world.trainer(tmp_path, losses, student=get_peft_model(world.student(), prompt))
    with pytest.raises(ValueError, match="Both peft_config and StudentConfig.peft are given"):
        student = StudentConfig(model=str(folder / "student"), peft=LORA)
        world.trainer(tmp_path, losses, student=student, peft_config=LoraConfig())


# ---- code of their own


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The student, as a family that its folder alone knows."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own = Path(shutil.copytree(folder / "student", tmp_path / "own"))
    (own / "own.py").write_text(OWN)
    config = json.loads((own / "config.json").read_text())
    maps = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"], "auto_map": maps}
    (own / "config.json").write_text(json.dumps(config))
    return own


@pytest.mark.parametrize("peft", [None, LORA], ids=["plain", "adapters"])
def test_a_student_with_code_of_its_own_is_opened_where_the_user_says_so(
    folder: Path, own: Path, tmp_path: Path, peft: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out, recipe = tmp_path / "out", str(write(folder, tmp_path / "out", peft))
    alone = ["--teachers", "null", "--losses", "{cross_entropy: {weight: 1}, kv: null}"]
    alone += [f"--student.model={own}", "--training.max_steps=1", "--student.trust_remote_code"]
    assert main(["train", recipe, *alone, "true"]) == 0
    assert "trust_remote_code: true" in (out / "recipe.yaml").read_text(), "which is what must not be asked below"

    assert main(["evaluate", str(out), "--recipe", recipe, *alone, "false"]) == 2
    assert main(["evaluate", str(out), "--recipe", recipe, *alone, "true"]) == 0
    if peft:
        export = ["export", str(out), "--format", "merged", "--output", str(tmp_path / "merged")]
        assert main(export) == 2 and not (tmp_path / "merged").exists()
        assert main([*export, "--trust-remote-code"]) == 0
        merged = load_trained(str(tmp_path / "merged"), trust_remote_code=True)
        trained = load_trained(str(out), trust_remote_code=True)
        assert type(merged).__name__ == "OwnForCausalLM"
        torch.testing.assert_close(merged(IDS).logits, trained(IDS).logits)
    refusals = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kv-trainer: error: ")]
    assert len(refusals) == 1 + bool(peft) and all("trust_remote_code" in line for line in refusals)


def test_a_folder_of_adapters_is_no_student_but_a_teacher(tiny_model, tiny_tokenizer, tmp_path: Path, folder: Path):
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "student"), LoraConfig()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a folder of adapters, and nothing in it would learn"):
        load_student(StudentConfig(model=str(tmp_path)))
    loaded = load_trained(str(tmp_path))
    assert isinstance(loaded, PeftModel)
    torch.testing.assert_close(loaded(IDS).logits, AutoModelForCausalLM.from_pretrained(folder / "student")(IDS).logits)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folder / "student"), "./elsewhere"))
    with pytest.raises(ValueError, match="holds adapters on the base './elsewhere', which could not be loaded"):
        load_trained(str(tmp_path))
