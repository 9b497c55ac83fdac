"""export.py: what was written answers as the student did, step by step, and nothing half-done stays behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from kv_trainer import export as exporting
from kv_trainer.adapters import load_trained
from kv_trainer.cli import main
from kv_trainer.export import export
from kv_trainer.onnx_graph import check_graph, empty_cache

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
WINDOW = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}  # layers 1 and 2 of qwen2 slide


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """`llama` and `qwen2`, grouped-query and each with its tokenizer, and `adapters` on qwen2 that change it a lot."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    for family, config in {"llama": {"num_hidden_layers": 2}, "qwen2": WINDOW}.items():
        tiny_model(family, **config).save_pretrained(folder / family)
        tiny_tokenizer().save_pretrained(folder / family)
    base = AutoModelForCausalLM.from_pretrained(folder / "qwen2")
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapters")  # no tokenizer: it is the base's
    return folder


@pytest.fixture(scope="module")
def llama(models: Path) -> exporting.Exported:
    return export(str(models / "llama"), "onnx", models / "out" / "llama")


@pytest.fixture(scope="module")
def qwen2(models: Path) -> Path:
    assert main(["export", str(models / "adapters"), "--format", "onnx", "--output", str(models / "qwen2_onnx")]) == 0
    return models / "qwen2_onnx"


def run(folder: Path, ids: Any, mask: Any, past: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """One step of the graph with numpy alone: logits, and the cache to give it next."""
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    if past is None:
        shapes = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values")}
        past = {name: np.zeros((len(ids), s[1], 0, s[3]), np.float32) for name, s in shapes.items()}
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    outputs = session.run(None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})
    named = dict(zip([o.name for o in session.get_outputs()], outputs))
    logits = named.pop("logits")
    return logits, {name.replace("present", "past_key_values"): states for name, states in named.items()}


def left_padded(*lengths: int) -> tuple[Any, Any]:
    """Ids and mask, one row a length, padded on the left."""
    ids = np.random.default_rng(0).integers(3, 290, (len(lengths), max(lengths)))
    mask = (np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]).astype(np.int64)
    return ids * mask, mask


# ---- ONNX


def test_folder_is_complete_and_names_no_place_of_this_machine(models: Path, llama: exporting.Exported) -> None:
    names = {path.name for path in llama.files}
    assert {"model.onnx", "config.json", "generation_config.json", "tokenizer.json"} <= names
    folder = models / "out" / "llama"
    assert sorted(llama.files) == sorted(folder.iterdir()) and list(folder.parent.iterdir()) == [folder]
    assert 0 < llama.difference < 1e-4
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert AutoTokenizer.from_pretrained(folder)("seven").input_ids
    for path in llama.files:
        assert b"site-packages" not in path.read_bytes() and str(models).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("lengths", [(1,), (9,), (5, 5, 5), (2, 9, 30, 7)], ids=str)
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_logits_at_any_size_with_and_without_a_cache(
    models: Path, llama: exporting.Exported, lengths: tuple[int, ...], cut: int
) -> None:
    """The last `cut` tokens come after a cache of the others."""
    ids, mask = left_padded(*lengths)
    cut = min(cut, ids.shape[1] - 1)
    split = ids.shape[1] - cut
    logits, past = run(models / "out" / "llama", ids[:, :split], mask[:, :split])
    if cut:
        logits, past = run(models / "out" / "llama", ids[:, split:], mask, past)
    assert past["past_key_values.1.key"].shape == (*ids.shape[:1], 2, ids.shape[1], 8)
    model = AutoModelForCausalLM.from_pretrained(models / "llama", attn_implementation="eager").eval()
    positions = torch.tensor(mask).cumsum(1).sub(1).clamp(min=0)
    with torch.no_grad():
        want = model(torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=positions).logits.numpy()
    real = mask[:, -logits.shape[1] :] == 1
    np.testing.assert_allclose(logits[real], want[:, -logits.shape[1] :][real], atol=1e-4, rtol=0)


def test_greedy_generation_is_that_of_the_unmerged_adapters(models: Path, qwen2: Path) -> None:
    ids, mask = left_padded(3, 8)
    model = load_trained(str(models / "adapters")).eval()
    asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    want = model.generate(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **asked)[:, 8:]
    plain = AutoModelForCausalLM.from_pretrained(models / "qwen2").eval()
    other = plain.generate(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **asked)[:, 8:]
    assert not torch.equal(want, other), "the adapters must matter"
    got, past, step = [], None, ids
    for _ in range(12):
        logits, past = run(qwen2, step, mask, past)
        step = logits[:, -1:].argmax(-1)
        mask = np.concatenate([mask, np.ones_like(step)], 1)
        got.append(step)
    assert np.concatenate(got, 1).tolist() == want.tolist()


def test_graph_of_another_model_fails_the_check(models: Path, llama: exporting.Exported) -> None:
    model = AutoModelForCausalLM.from_pretrained(models / "llama").eval()
    past, path = empty_cache(model, "llama"), models / "out" / "llama" / "model.onnx"
    assert check_graph(model, past, path, "llama") < 1e-4
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] += 0.1
    with pytest.raises(ValueError, match=r"'llama': the logits of the ONNX graph are off from torch's by .* \(limit"):
        check_graph(model, past, path, "llama")


# ---- merged


def test_merged_equals_unmerged(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(models / "adapters"), "--format", "merged", "--output", str(tmp_path / "m")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [str(path) for path in sorted((tmp_path / "m").iterdir())]
    assert lines[-1].startswith("largest difference of a logit: ")
    assert not list((tmp_path / "m").glob("adapter*")) and (tmp_path / "m" / "tokenizer.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    base = AutoModelForCausalLM.from_pretrained(models / "qwen2").eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        plain = base(ids).logits
        unmerged = PeftModel.from_pretrained(base, models / "adapters").eval()(ids).logits
        assert (plain - unmerged).abs().max() > 0.1
        torch.testing.assert_close(merged(ids).logits, unmerged, atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_a_merge_of_16_bits_may_be_rounded_but_not_wrong(
    target: str, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Adapters on the embeddings alone, merged, would change the head that is tied to them too."""
    tiny_model("llama", num_hidden_layers=2, tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    torch.manual_seed(0)
    adapters = LoraConfig(r=4, target_modules=[target], init_lora_weights=False)
    get_peft_model(base, adapters).save_pretrained(tmp_path / "adapters", save_embedding_layers=False)
    if target == "q_proj":
        assert export(str(tmp_path / "adapters"), "merged", tmp_path / "m").difference > 0
        return
    with pytest.raises(ValueError, match="merged, logits are off by"):
        export(str(tmp_path / "adapters"), "merged", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_merging_a_plain_checkpoint_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to merge"):
        export(str(models / "llama"), "merged", tmp_path / "m")
    assert not list(tmp_path.iterdir())


# ---- refusals


@pytest.mark.parametrize("format", ["onnx", "merged"])
def test_nothing_is_overwritten(models: Path, tmp_path: Path, format: str) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    for output in (tmp_path, tmp_path / "kept.txt"):
        with pytest.raises(ValueError, match="is not an empty folder"):
            export(str(models / "adapters"), format, output)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_other_caches_are_refused_and_leave_nothing(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    tiny_model("lfm2").save_pretrained(tmp_path / "lfm2")
    tiny_tokenizer().save_pretrained(tmp_path / "lfm2")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"\(lfm2\) caches LinearAttention\w*, and only keys and values"):
        export(str(tmp_path / "lfm2"), "onnx", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lfm2", "out"]
    assert not list((tmp_path / "out").iterdir())


def test_missing_packages(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ValueError, match=r"needs no_such_package, .* pip install kv_trainer\[export\]"):
        export(str(models / "llama"), "onnx", tmp_path / "out")


def test_what_the_exporter_cannot_do_is_a_users_error(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("deepseek_v2", num_hidden_layers=1).save_pretrained(tmp_path / "m")  # rotates complex numbers
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    assert main(["export", str(tmp_path / "m"), "--format", "onnx", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("kv-trainer: error: ") and "(deepseek_v2) cannot be exported to ONNX by torch" in error
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
