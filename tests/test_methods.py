"""The table of methods: every row trains through a recipe and the real trainer, and costs nothing when it is off."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_trainer import curve
from torch import nn

from kv_trainer.cli import main
from kv_trainer.fusion import FUSIONS
from kv_trainer.losses import LOSSES
from kv_trainer.methods import METHODS, Method
from kv_trainer.recipes import load_recipe
from kv_trainer.run import build_trainer
from kv_trainer.trainer import MultiTeacherKVTrainer

LAYERS = 3
TEACHERS = {"sums": ("qwen3", {"num_hidden_layers": 4}, 0), "words": ("llama", {"hidden_size": 48}, 25)}
RECIPE = """
student: {{model: ./student}}
teachers: {{sums: {{model: ./sums}}, words: {{model: ./words}}}}
fusion: {{method: uniform}}
losses: {{cross_entropy: {{weight: 1}}, kv_relation: {{weight: 1}}}}
data: {{path: ./rows.jsonl, eval_split: null{data}}}
training: {{max_steps: 2, per_device_train_batch_size: 4, logging_steps: 1, save_strategy: "no", use_cpu: true,
            disable_tqdm: true, output_dir: {output}}}
"""
OWN_TEXT = ", teacher_text: {sums: '{long}'}"


def row(i: int) -> dict[str, str]:
    return {
        "prompt": f"what is two plus {i}? ", "reasoning": f"two plus {i} is{' not less than' * (i % 3)} {i + 2}. ",
        "answer": f"#### {i + 2}", "task": ("sums", "words")[i % 2],
        "long": f"first two, then {i}, so that it is two plus {i}, which is {i + 2} then. #### {i + 2}",
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """A student, two unlike teachers, and rows whose teacher has a longer text of its own."""
    folder = tmp_path_factory.mktemp("methods")
    tiny_model("llama", num_hidden_layers=LAYERS).save_pretrained(folder / "student")
    tiny_tokenizer(40).save_pretrained(folder / "student")
    for name, (family, config, merges) in TEACHERS.items():
        tiny_model(family, seed=7, **config).save_pretrained(folder / name)
        tiny_tokenizer(merges).save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(8)))
    return folder


def build(folder: Path, tmp_path: Path, switch: tuple[str, ...] = (), data: str = "") -> MultiTeacherKVTrainer:
    recipe = folder / f"recipe{abs(hash((switch, data)))}.yaml"
    recipe.write_text(RECIPE.format(output=tmp_path / "out", data=data))
    return build_trainer(load_recipe(recipe, list(switch)))


def switch_of(method: Method) -> tuple[str, ...]:
    """The table writes T for a teacher; here are two, and three student layers."""
    return tuple(re.sub(r"^\{T: .*\}$", "{sums: [0, 0, 1], words: [0, 1, 2]}", part) for part in method.switch)


def named(method: Method) -> str:
    return f"{method.section}-{method.name}"


def state(trainer: MultiTeacherKVTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for n, p in trainer.model.named_parameters() if "kv_bridge" not in n]


def test_the_table_holds_every_loss_and_every_fusion() -> None:
    rows = {(m.section, m.name) for m in METHODS}
    assert len(rows) == len(METHODS)
    assert {("losses", name) for name in LOSSES} | {("fusion.method", name) for name in FUSIONS} <= rows
    assert all(m.what and m.needs and m.source and m.switch for m in METHODS)


ALREADY = {  # what the recipe has already, or what shows nothing within two steps of equal teacher weights
    ("alignment.tokens.method", "spans"), ("alignment.time.method", "same_text"), ("alignment.rope.keys", "before"),
    ("alignment.layers.method", "relative_depth"), ("fusion.method", "uniform"), ("fusion.method", "fixed"),
    ("losses.kv_relation.schedule", "constant"), ("freeze", "{projectors_after: 1}"),
    ("monitor.loss_scales_every", "1"),
}  # fmt: skip
UNSEEN = {"projector.method", "projector.direction", "losses.kv.metric", "accumulation"}


@pytest.fixture(scope="module")
def without(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[torch.Tensor]]:
    """The student after the same two steps with every method off, by the texts of the teachers."""
    found = {}
    for data in ("", OWN_TEXT):
        trainer = build(folder, tmp_path_factory.mktemp("plain"), (), data)
        trainer.train()
        found[data] = state(trainer)
    return found


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_every_method_trains_and_changes_the_student(
    method: Method, folder: Path, tmp_path: Path, without: dict[str, list[torch.Tensor]]
) -> None:
    """For two steps, against the same recipe with the method off: a switch that does nothing is found here."""
    own = OWN_TEXT if method.section == "alignment.time.method" and method.name != "same_text" else ""
    trainer = build(folder, tmp_path, switch_of(method), own)
    before = state(trainer)
    trainer.train()
    logs, after = curve(trainer), state(trainer)
    assert len(logs) >= 2 and all(math.isfinite(v) for log in logs for k, v in log.items() if k.startswith("loss"))
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if method.section == "losses":
        assert logs[0][f"loss_{method.name}"] > 0
    if method.section == "fusion.method":
        shares = [logs[0]["share_sums"], logs[0]["share_words"]]
        assert sum(shares) == pytest.approx(1, abs=1e-5) and "share_sums/words" in logs[0]
    if (method.section, method.name) not in ALREADY and method.section not in UNSEEN:
        assert any(not torch.equal(a, b) for a, b in zip(without[own], after, strict=True))


# ---- off costs nothing


def count_work(trainer: MultiTeacherKVTrainer, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Hooks on all models, forward passes of teachers' layers and heads, and calls of what only some methods need."""
    work: Counter[str] = Counter()
    models = {"student": trainer.model, **{n: t.model for n, t in trainer.teachers.items()}}
    for name, model in models.items():
        own = "student" if name == "student" else "teacher"
        work[f"{own} hooks"] += sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    for teacher in trainer.teachers.values():
        for module_name, module in teacher.model.named_modules():
            if isinstance(module, nn.Linear):
                kind = "head" if module_name == "lm_head" else "teacher linear"
                module.register_forward_pre_hook(lambda *_, kind=kind: work.update([kind]))
    mapping = "kv_trainer.alignment.mapping"
    for target in ("kv_trainer.supervision.importance", "kv_trainer.teachers.importance",
                   "kv_trainer.teachers.attention_mass", f"{mapping}.rotated_pairs", f"{mapping}.mapped_hidden",
                   "kv_trainer.monitor.gradient_norms"):  # fmt: skip
        module, function = target.rsplit(".", 1)
        owner = __import__(module, fromlist=[function])
        original = getattr(owner, function)

        def counted(*args: Any, original: Any = original, name: str = function, **kwargs: Any) -> Any:
            work[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, function, counted)
    trainer.train()
    work["bridge parameters"] = sum(p.numel() for p in trainer.bridge.parameters())
    return work


def test_off_costs_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No head, no importance, no hidden states, no projectors; hooks just on k and v, two on the student itself."""
    work = count_work(build(folder, tmp_path), monkeypatch)
    assert work["student hooks"] == 2 + 2 * LAYERS
    assert work["teacher hooks"] == 2 * (4 + 3)  # the middle student layer lies between two of the four
    for name in ("head", "importance", "attention_mass", "rotated_pairs", "mapped_hidden", "gradient_norms"):
        assert work[name] == 0, name
    assert work["bridge parameters"] == 0


@pytest.mark.parametrize(
    ("switch", "grows"),
    [
        (("--fusion.method", "confidence"), "head"),
        (("--losses.logit_kd.weight", "1"), "head"),
        (("--losses.kv_relation", "{attention: teacher, attention_warmup_steps: 1}"), "importance"),
        (("--losses.kv_relation", "{attention: student, attention_warmup_steps: 1}"), "importance"),
        (("--losses.codi.weight", "1"), "mapped_hidden"),
        (("--losses.attention_kl.weight", "1"), "rotated_pairs"),
        (("--losses.kv.weight", "1"), "bridge parameters"),
        (("--monitor.loss_scales_every", "1"), "gradient_norms"),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_on_does_the_work(
    switch: tuple[str, ...], grows: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the test above cannot pass by counting the wrong thing."""
    assert count_work(build(folder, tmp_path, switch), monkeypatch)[grows] > 0


def test_without_a_loss_that_needs_them_no_teacher_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(folder, tmp_path)
    args = dataclasses.replace(trainer.args, losses={"cross_entropy": trainer.args.losses["cross_entropy"]})
    alone = MultiTeacherKVTrainer(
        str(folder / "student"), {n: str(folder / n) for n in TEACHERS}, args, trainer.train_dataset
    )
    work = count_work(alone, monkeypatch)
    assert work["teacher linear"] == 0 and work["student hooks"] == 2


# ---- the command


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for method in METHODS:  # all of it, on however narrow a terminal
        assert all(" ".join(text.split()) in printed for text in (method.section, method.name, method.what))
        assert all(text == "-" or text in printed for text in (method.needs, method.source))
    assert main(["methods", "fusion"]) == 0
    printed = capsys.readouterr().out
    assert "govern" in printed and "logit_kd" not in printed
    assert main(["methods", "fusi0n"]) == 2
    assert "No method's section begins with 'fusi0n'. Sections: alignment.tokens.method" in capsys.readouterr().err
