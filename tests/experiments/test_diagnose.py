"""kv-trainer diagnose: its figures against another way to the same ones, its advice, and all that it leaves alone."""

from __future__ import annotations

import io
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from helpers_trainer import ROWS, World, weights
from rich.console import Console

from kv_trainer.arguments import ControlConfig, DataConfig, ProjectorConfig
from kv_trainer.cli import main
from kv_trainer.data import Reader, encode_rows
from kv_trainer.experiments.advice import advise, as_patch, percent, write_copy
from kv_trainer.experiments.diagnose import print_diagnosis
from kv_trainer.experiments.measure import Figure, Measured, Term, hear, measure, real_batches, run_student, trainable
from kv_trainer.experiments.probes import Costs, collapse, gradient_cosine, target_variance, without_student
from kv_trainer.losses import CKALoss, CrossEntropy, DistillationLoss, GradientShare, KVLoss, KVRelationLoss, LossInputs
from kv_trainer.publish import HubTrainer
from kv_trainer.recipes import load_recipe
from kv_trainer.supervision import Supervision

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
TO_STUDENT = {"projector": ProjectorConfig(direction="teacher_to_student", learning_rate=0.05)}


@pytest.fixture
def world(tiny_model: Any, tiny_tokenizer: Any) -> World:
    return World(tiny_model, tiny_tokenizer)


def losses(**others: DistillationLoss) -> dict[str, DistillationLoss]:
    return {"cross_entropy": CrossEntropy(weight=2.0), **others}


def one_teacher(world: World, tmp_path: Path, model: Any, **options: Any) -> Any:
    """A trainer with one teacher that reads as the student does."""
    reader = Reader(world.tokenizer(40))
    rows = encode_rows(Dataset.from_list(ROWS), Reader(world.tokenizer(40)), {"one": reader}, DataConfig())
    return world.trainer(tmp_path, teachers={"one": (model, world.tokenizer(40))}, rows=rows, **options)


def supervised(trainer: Any, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
    """All raw terms as the bridge's hook makes them in training, with gradient."""
    labels, found = batch["labels"], {}
    given = Supervision(
        trainer.panel.signals(batch), labels, batch["attention_mask"], (labels[:, 1:] != -100).sum(), len(labels),
        progress=1.0, step=step, measure=found.update,
    )  # fmt: skip
    with trainer.bridge.supervise(given):
        trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"])
    return found


# ---- figures


def test_values_and_gradients_are_those_of_separate_backward_passes(world: World, tmp_path: Path) -> None:
    trainer = world.trainer(tmp_path, losses(kv_relation=KVRelationLoss(weight=3.0), kv=KVLoss(weight=0.2)))
    trainer.calibrate()
    found = measure(trainer, 9)  # the last micro-batch holds one sample
    assert (found.samples, found.batches, found.collapse) == (9, 3, None)
    values: dict[str, list[float]] = {name: [] for name in found.terms}
    pulls: dict[str, list[float]] = {name: [] for name in found.terms}
    for batch in real_batches(trainer, 9, 4):
        for name in found.terms:
            trainer.model.zero_grad()
            term = supervised(trainer, batch, 0)[name]
            term.backward()
            values[name].append(term.item())
            squares = [float(p.grad.square().sum()) for p in trainable(trainer) if p.grad is not None]
            pulls[name].append(math.sqrt(sum(squares)))
    trainer.model.zero_grad()
    for name, weight in (("cross_entropy", 2.0), ("kv_relation", 3.0), ("kv", 0.2)):
        term, text = found.terms[name], pulls["cross_entropy"]
        expected = [weight * x / (2.0 * y) for x, y in zip(pulls[name], text, strict=True)]
        for figure, numbers in (
            (term.value, values[name]),
            (term.weighted, [weight * x for x in values[name]]),
            (term.gradient_share, expected),
        ):
            assert figure.mean == pytest.approx(statistics.fmean(numbers), rel=1e-4)
            assert figure.std == pytest.approx(statistics.stdev(numbers), rel=1e-2, abs=1e-6)
        totals = [2.0 * a + 3.0 * b + 0.2 * c for a, b, c in zip(*values.values(), strict=True)]
        shares = [weight * x / total for x, total in zip(values[name], totals, strict=True)]
        assert term.share.mean == pytest.approx(statistics.fmean(shares), rel=1e-4)
        assert term.seconds > 0 and (term.memory > 0 or name == "cross_entropy") and term.follows is None
    assert sum(term.share.mean for term in found.terms.values()) == pytest.approx(1.0)


def test_the_batches_are_random_rows_of_the_seed_once_each(world: World, tmp_path: Path) -> None:
    trainer = world.trainer(tmp_path)
    rows = [batch["row"].tolist() for batch in real_batches(trainer, 10, 4)]
    assert [len(x) for x in rows] == [4, 4, 2] and sorted(sum(rows, [])) == list(range(10)) != sum(rows, [])
    assert rows == [batch["row"].tolist() for batch in real_batches(trainer, 10, 4)]
    assert measure(trainer, 1000).samples == 10


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_the_effect_of_attention_weighting(world: World, tmp_path: Path, whose: str) -> None:
    trainer = world.trainer(
        tmp_path,
        losses(kv_relation=KVRelationLoss(attention=whose), kv=KVLoss(attention=whose, attention_warmup_steps=0)),
    )
    trainer.calibrate()
    found, ratios = measure(trainer, 8).terms, {"kv_relation": [], "kv": []}
    with torch.no_grad():
        for batch in real_batches(trainer, 8, 4):
            off, on = supervised(trainer, batch, -1), supervised(trainer, batch, 1000)
            for name in ratios:
                ratios[name].append(float(on[name] / off[name]))
    for name, each in ratios.items():
        expected = 100 * (statistics.fmean(each) - 1)
        assert found[name].attention_percent == pytest.approx(expected, abs=1e-2) and abs(expected) > 0.1
    assert found["cross_entropy"].attention_percent is None


def test_a_warmed_up_or_annealed_term_is_measured_in_full(world: World, tmp_path: Path) -> None:
    plain = measure(world.trainer(tmp_path / "a", losses(kv_relation=KVRelationLoss(weight=0.7))), 8)
    knobs = {"weight": 0.7, "warmup_ratio": 0.5, "schedule": "cosine", "annealing_ratio": 0.5}
    moving = measure(world.trainer(tmp_path / "b", losses(kv_relation=KVRelationLoss(**knobs))), 8)
    for name, term in plain.terms.items():
        assert moving.terms[name].gradient_share.mean == pytest.approx(term.gradient_share.mean, rel=1e-5)
        assert moving.terms[name].weighted.mean == pytest.approx(term.weighted.mean, rel=1e-5)


def test_a_followed_share_is_what_the_first_step_would_follow(world: World, tmp_path: Path) -> None:
    trainer = world.trainer(tmp_path, losses(kv_relation=KVRelationLoss(weight=GradientShare(0.25))))
    found = measure(trainer, 4)  # one micro-batch
    term = found.terms["kv_relation"]
    assert term.follows == 0.25 and term.gradient_share.mean == pytest.approx(0.25, rel=1e-4)
    assert term.gradient_share.std == 0.0 and advise(found, False) == []


def test_without_a_teacher_there_is_the_text_alone(world: World, tmp_path: Path) -> None:
    found = measure(world.trainer(tmp_path, teachers={}), 6)
    term = found.terms["cross_entropy"]
    assert (term.share.mean, term.gradient_share.mean, term.shuffled_cosine) == (1.0, 1.0, None)


def test_without_the_text_there_is_no_share(world: World, tmp_path: Path) -> None:
    found = measure(
        world.trainer(tmp_path, {"cross_entropy": CrossEntropy(weight=0.0), "kv_relation": KVRelationLoss()}), 4
    )
    assert found.terms["kv_relation"].gradient_share is None
    assert "shares of it cannot be measured" in advise(found, False)[0].words


class Squares(DistillationLoss):
    """Keeps one tensor of the size of the first keys, twice, and the keys themselves, which are there anyway."""

    requires = frozenset({"student_kv", "teacher_kv"})

    def __call__(self, inputs: LossInputs) -> torch.Tensor:
        double = 2 * inputs.student.keys[0]
        return (double * double * inputs.student.keys[0].detach()).sum()


def test_memory_counts_a_storage_once_and_not_what_is_there(world: World, tmp_path: Path) -> None:
    trainer = world.trainer(tmp_path, losses(kv_relation=KVRelationLoss()))
    passed = run_student(trainer, next(real_batches(trainer, 4, 4)))
    size = 4 * passed.states.keys[0].numel()
    kept, _ = Costs(trainer.bridge, passed).of(Squares())
    # `double`, and its square, whose factor is detached: that product keeps the keys alone.
    assert kept == size


# ---- who hears whom


def deaf_teacher(world: World) -> Any:
    """Its states depend on the position, not on the text."""
    model = world.model("gpt2", seed=7)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight[:1].clone().expand(320, -1))
    return model


@pytest.mark.parametrize("deaf", [True, False])
def test_an_inert_term_is_found(world: World, tmp_path: Path, deaf: bool) -> None:
    model = deaf_teacher(world) if deaf else world.model("gpt2", seed=7)
    trainer = one_teacher(
        world, tmp_path, model, losses=losses(kv_relation=KVRelationLoss(), cka=CKALoss(layers="all"))
    )
    found = measure(trainer, 8)
    for name in ("kv_relation", "cka"):
        cosine = found.terms[name].shuffled_cosine
        assert cosine == pytest.approx(1.0, abs=1e-4) if deaf else cosine < 0.99
    words = [one.words for one in advise(found, False) if "is inert" in one.words]
    if deaf:
        assert [text.split()[0] for text in words] == ["losses.kv_relation", "losses.cka"]


def test_the_cosine_is_that_of_whole_gradients(world: World, tmp_path: Path) -> None:
    """Both directions through the bridge's own hook, on rows of one length, where no mask differs."""
    trainer = world.trainer(tmp_path, losses(kv_relation=KVRelationLoss()))
    pair = next(real_batches(trainer, 2, 2))
    pair = {**pair, "teachers": {n: {**t, "index": t["index"].clone()} for n, t in pair["teachers"].items()}}
    for part in pair["teachers"].values():  # aligned where both rows are
        part["index"][(part["index"] < 0).any(0).expand(2, -1)] = -1
    flat = []
    for how in (None, "rows"):
        trainer.bridge.control.shuffle = how
        grads = torch.autograd.grad(supervised(trainer, pair, 0)["kv_relation"], trainable(trainer), allow_unused=True)
        flat.append(torch.cat([g.flatten() for g in grads if g is not None]))
    trainer.bridge.control.shuffle = None
    expected = float(torch.cosine_similarity(*flat, dim=0))
    assert hear(trainer, pair)["kv_relation"] == pytest.approx(expected, abs=1e-4) and expected < 0.99


def test_a_term_without_gradient_has_no_cosine(world: World, tmp_path: Path) -> None:
    trainer = world.trainer(tmp_path, losses(kv_relation=KVRelationLoss()))
    passed = run_student(trainer, next(real_batches(trainer, 4, 4)))
    inputs = trainer.bridge.inputs(passed.given, passed.logits, passed.states)

    class Nothing(DistillationLoss):
        def __call__(self, inputs: LossInputs) -> torch.Tensor:
            return 0 * inputs.logits.sum()

    assert gradient_cosine(Nothing(), inputs, inputs, trainable(trainer)) is None
    assert gradient_cosine(CrossEntropy(), inputs, inputs, trainable(trainer)) == pytest.approx(1.0)


# ---- what is left alone


@pytest.mark.parametrize("control", [None, "rows"])
def test_nothing_is_changed(world: World, tmp_path: Path, control: Any) -> None:
    chosen = losses(kv=KVLoss(), kv_relation=KVRelationLoss(attention="student"))
    trainer = world.trainer(tmp_path, chosen, control=ControlConfig(control), **TO_STUDENT)
    trainer.model.train()
    before = weights(trainer)
    assert measure(trainer, 8).collapse is not None
    assert trainer.bridge.control.shuffle == trainer.args.control.shuffle == control
    after = weights(trainer)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in trainer.model.parameters()) and trainer.model.training
    assert all(p.requires_grad for p in trainer.bridge.projectors.parameters()) and trainer.state.global_step == 0


def test_the_control_is_restored_after_an_error(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = world.trainer(tmp_path, losses(kv_relation=KVRelationLoss()))
    trainer.model.train()
    asked = trainer.bridge.inputs

    def broken(*args: Any) -> LossInputs:
        if trainer.bridge.control.shuffle == "rows":
            raise RuntimeError("broken")
        return asked(*args)

    monkeypatch.setattr(trainer.bridge, "inputs", broken)
    with pytest.raises(RuntimeError, match="broken"):
        measure(trainer, 4)
    assert trainer.bridge.control.shuffle is None and trainer.model.training


def test_a_term_that_is_not_finite_is_named(world: World, tmp_path: Path) -> None:
    trainer = world.trainer(tmp_path, losses(kv_relation=KVRelationLoss()))
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the loss is not finite: cross_entropy = nan"):
        measure(trainer, 4)


def test_a_frozen_student_is_refused(world: World, tmp_path: Path) -> None:
    student = world.student()
    trainer = world.trainer(tmp_path, losses(kv=KVLoss()), student=student)
    student.requires_grad_(False)
    trainer.bridge.projectors.requires_grad_(True)
    with pytest.raises(ValueError, match="no trainable parameter"):
        measure(trainer, 4)


# ---- collapse


def test_a_trainable_target_collapses_to_a_quiet_student(world: World, tmp_path: Path) -> None:
    student = world.student()
    with torch.no_grad():
        for layer in student.model.layers:
            layer.self_attn.k_proj.weight.mul_(0.01)
            layer.self_attn.v_proj.weight.mul_(0.01)
    trainer = world.trainer(tmp_path, losses(kv=KVLoss()), student=student, **TO_STUDENT)
    found = measure(trainer, 8)
    assert found.collapse < -0.2
    patch = as_patch(advise(found, target_space=False))
    assert patch["projector"] == {"direction": "student_to_teacher"}
    only_words = advise(found, target_space=True)
    assert "projector" not in as_patch(only_words) and "use losses.kv_relation" in only_words[-1].words


def test_a_target_that_is_reached_already_does_not(world: World, tmp_path: Path) -> None:
    trainer = one_teacher(world, tmp_path, world.student(), losses=losses(kv=KVLoss()), **TO_STUDENT)
    found = measure(trainer, 8)
    assert found.terms["kv"].value.mean == pytest.approx(0, abs=1e-9)
    assert found.collapse == pytest.approx(0, abs=1e-5)
    fixed = one_teacher(world, tmp_path / "b", world.student(), losses=losses(kv=KVLoss()))
    assert measure(fixed, 4).collapse is None


def test_the_variance_is_that_of_the_mapped_states(world: World, tmp_path: Path) -> None:
    trainer = world.trainer(tmp_path, losses(kv=KVLoss()), **TO_STUDENT)
    passed = run_student(trainer, next(real_batches(trainer, 3, 3)))
    inputs = without_student(trainer.bridge.inputs(passed.given, passed.logits, passed.states))
    assert not any(x.requires_grad for x in (*inputs.student.keys, *inputs.student.values))
    found, expected = target_variance(trainer.bridge.projectors, [inputs], [0, 1]), []
    with torch.no_grad():
        for name, teacher in inputs.teachers.items():
            mapped = trainer.bridge.projectors[name](teacher)
            for layer in range(2):
                for x in (mapped.keys[layer], mapped.values[layer]):
                    rows = [x[b][:, teacher.mask[b]] for b in range(3)]  # [H, positions, D]
                    each = [(r - r.mean(1, keepdim=True)).square().mean() if r.shape[1] else r.sum() for r in rows]
                    expected.append(torch.stack(each).mean())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-8)
    change = collapse(trainer.bridge, [inputs], 0.001)
    assert change == collapse(trainer.bridge, [inputs], 0.001) and abs(change) < abs(
        collapse(trainer.bridge, [inputs], 0.1)
    )


# ---- advice


def term(share: float | None, weight: float = 2.0, **changes: Any) -> Term:
    figure = Figure(1.0, 0.1)
    found: dict[str, Any] = {
        "weight": weight, "follows": None, "value": figure, "weighted": figure, "share": figure,
        "gradient_share": None if share is None else Figure(share, 0.0), "attention_percent": None,
        "shuffled_cosine": 0.5, "memory": 10, "seconds": 0.1,
    }  # fmt: skip
    return Term(**{**found, **changes})


def advice_on(**terms: Term) -> tuple[list[str], dict[str, Any]]:
    found = advise(Measured(8, 2, {"cross_entropy": term(1.0), **terms}, None), False)
    return [one.words for one in found], as_patch(found)


@pytest.mark.parametrize(
    ("name", "share", "weight"),
    [
        ("cka", 0.16, 0.62), ("cka", 0.14, None), ("cka", 0.02, None), ("cka", 0.005, 20.0),
        ("kv", 11.0, 0.055), ("kv", 9.0, None), ("kv", 0.011, None), ("kv", 0.009, 67.0), ("cross_entropy", 20.0, None),
    ],
)  # fmt: skip
def test_weights_are_moved_towards_their_target(name: str, share: float, weight: float | None) -> None:
    words, patch = advice_on(**{name: term(share)})
    assert patch == ({} if weight is None else {"losses": {name: {"weight": weight}}})
    assert len(words) == len(patch)
    if weight is not None:
        assert ("lower" if weight < 2 else "raise") + f" its weight from 2 to {weight:g}" in words[0]


def test_what_is_not_reweighed() -> None:
    assert advice_on(kv=term(50.0, follows=0.3)) == ([], {}), "a weight that follows is left alone"
    words, patch = advice_on(kv=term(0.001, shuffled_cosine=0.99))
    assert len(words) == 1 and "is inert" in words[0] and not patch, "no more of what does nothing"
    words, patch = advice_on(kv=term(50.0, shuffled_cosine=0.99))
    assert len(words) == 2 and patch == {"losses": {"kv": {"weight": 0.012}}}, "but less of what swamps the text"
    words, patch = advice_on(kv=term(0.0))
    assert "gives the student no gradient" in words[0] and not patch


@pytest.mark.parametrize(("share", "text"), [(0.0004, "0.04%"), (0.31, "31%"), (12.4, "12x"), (15000.0, "15,000x")])
def test_shares_as_people_say_them(share: float, text: str) -> None:
    assert percent(share) == text


# ---- the copy


def original(folder: Path) -> Path:
    """The quickstart recipe as a file of its own."""
    text = (QUICKSTART / "two_teachers.yaml").read_text().replace("./", f"{QUICKSTART}/")
    path = folder / "original.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("where", ["copy.yaml", "../copy.yaml", "deeper/copy.yaml", "../elsewhere/copy.yaml"])
def test_the_copy_loads_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    path, copy = original(Path("recipes")), Path("recipes") / where
    write_copy(copy, path, {"losses": {"kv_relation": {"weight": 1e-5}}})
    assert sorted(x.name for x in copy.parent.iterdir() if x.name.startswith(".")) == []
    content = yaml.safe_load(copy.read_text())
    assert content.pop("losses") == {"kv_relation": {"weight": 1e-5}} and list(content) == ["extends"]
    found, base = load_recipe(copy), load_recipe(path)
    assert found.args.losses["kv_relation"].weight == 1e-5 and found.teachers == base.teachers
    with pytest.raises(ValueError, match="is there already"):
        write_copy(copy, path, {})


# ---- the command


def command(folder: Path, *arguments: str) -> int:
    small = ["--data.max_train_samples=40", "--data.max_eval_samples=4", "--training.per_device_train_batch_size=4"]
    return main([
        "diagnose", str(original(folder)), "--samples", "8", "--training.use_cpu=true",
        f"--training.output_dir={folder}/out", *small, *arguments,
    ])  # fmt: skip


def test_a_swamping_weight_is_lowered_in_the_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    copy = tmp_path / "copy.yaml"
    arguments = ["--losses.kv_relation.weight=3000", "--alignment.layers.method=cka", f"--write={copy}"]
    assert command(tmp_path, *arguments) == 0
    assert os.listdir(tmp_path / "out") == ["diagnosis.json"], "nothing else is written"
    told = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    weight = load_recipe(copy).args.losses["kv_relation"].weight
    assert load_recipe(copy).args.alignment.layers.method == "cka", "what was measured, not what the file says"
    measured = told["terms"]["kv_relation"]
    assert weight == pytest.approx(3000 * 0.3 / measured["gradient_share"]["mean"], rel=0.06) and weight < 10
    assert told["patch"] == {"losses": {"kv_relation": {"weight": weight}}} and told["samples"] == 8
    assert sum(term["share"]["mean"] for term in told["terms"].values()) == pytest.approx(1.0)
    out = capsys.readouterr().out
    assert "cross_entropy" in out and f"recipe: {copy}\n" in out
    assert "lower its weight from 3000" in " ".join(out.split()), "wherever the line is broken"

    assert command(tmp_path, *arguments) == 2
    assert "copy.yaml is there already" in capsys.readouterr().err
    other = tmp_path / "other.yaml"
    assert command(tmp_path, f"--write={other}") == 0  # as published: nothing swamps, nothing is inert
    assert not other.exists() and "nothing to change, so" in capsys.readouterr().out


def test_no_repository_is_made_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HubTrainer, "init_hf_repo", lambda *args, **options: pytest.fail("it was made"))
    training = ["eval_strategy=steps", "save_strategy=steps", "load_best_model_at_end=true", "push_to_hub=true"]
    asked = [f"--training.{each}" for each in training]
    assert command(tmp_path, *asked, "--early_stopping.patience=2") == 0
    assert (tmp_path / "out" / "diagnosis.json").exists()


def test_wrong_usage_and_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, "--samples", "0") == 2
    assert "--samples is 0; give 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["diagnose", "--help"])
    assert "examples:\n  kv-trainer diagnose " in capsys.readouterr().out


def test_the_table_fits_120_columns() -> None:
    wide = {name: term(1234.5, 1234.5, follows=0.3, attention_percent=-12.3, memory=2**33, seconds=1.23456)
            for name in ("cross_entropy", "attention_kl", "kv_relation")}  # fmt: skip
    out = io.StringIO()
    print_diagnosis(Console(file=out, width=120), Measured(64, 8, wide, -0.5), [], 8)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 120 and "…" not in out.getvalue()
    header = next(line for line in lines if line.startswith("term"))
    assert header.split() == [
        "term", "weight", "raw", "value", "weighted", "of", "total", "gradient", "other", "text", "attention", "memory",
        "time",
    ]  # fmt: skip
    assert any(line.startswith("target of kv") and "-50%" in line for line in lines)
    narrow = io.StringIO()
    print_diagnosis(Console(file=narrow, width=80), Measured(64, 8, wide, -0.5), [], 8)
    assert "…" not in narrow.getvalue() and header in narrow.getvalue()
