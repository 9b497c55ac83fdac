"""The model card: what was distilled into the student, how well it went, and how to do it again."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .arguments import ModelConfig, Recipe
from .facts import RunFacts
from .files import beside
from .fusion import method_of
from .report import format_count, format_duration, result_rows
from .types import KVShape

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
ARXIV = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")
# Figures of the machine, not of the model: they have a section of their own.
MACHINE = ("train_runtime", "train_steps_per_second", "peak_memory_mb")


def write_model_card(
    output_dir: str | os.PathLike[str],
    recipe: Recipe,
    results: dict[str, float],
    shapes: dict[str, KVShape],
    facts: RunFacts | None = None,
) -> Path:
    """Write `output_dir`/README.md, a hub model card, and return its path.

    results: as for `report.print_results`. shapes: by teacher name, and under 'student'. Local folders appear by
    their last component alone, so that the card gives away no path or user name.
    """
    facts = facts or RunFacts()
    target = Path(output_dir) / "README.md"
    name = facts.name or Path(recipe.args.hub_model_id or Path(output_dir).resolve()).name
    front: dict[str, Any] = {
        "library_name": "peft" if recipe.student.peft else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": _hub_name(recipe.student.model, recipe),
        "base_model_relation": "adapter" if recipe.student.peft else None,
        "datasets": _hub_name(recipe.args.data.path, recipe),
        "tags": ["kv-distillation", "knowledge-distillation"],
        "model_name": name,
        "eval_results": _eval_results(recipe, results) or None,
        **facts.license,
        **facts.front,
    }
    sections = (
        f"# {name}",
        *([f"**Training in progress**: {facts.progress}."] if facts.progress else ()),
        _introduction(recipe, facts),
        "## Method\n\n" + _method(recipe, shapes, facts),
        "## Data\n\n" + _data(recipe),
        "## Results\n\n" + _results(results),
        "## Hardware and time\n\n" + _machine(results, facts),
        "## Use\n\n" + _use(recipe, facts.repo or recipe.args.hub_model_id or name),
        "## Reproduce\n\n" + _reproduction(recipe, facts),
        "## Licence\n\n" + _licence(front.get("license"), bool(facts.front.get("license")), recipe),
        "## Citations\n\n" + _citations(recipe),
    )
    card = ModelCard(f"---\n{ModelCardData(**front).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    with beside(target) as temporary:
        card.save(temporary)
    return target


def _hub_name(name: str | None, recipe: Recipe) -> str | None:
    """`name` if it is a repository on the hub, None if it is a file or folder here."""
    if not name or not HUB_NAME.fullmatch(name):
        return None
    here = (Path(name), Path(recipe.path).parent / name)
    return None if any(path.exists() for path in here) else name


def _shown(name: str | None, recipe: Recipe) -> str:
    """A hub name in full; a path by its last component."""
    hub_name = _hub_name(name, recipe)
    return hub_name or re.split(r"[/\\]", (name or "").rstrip("/\\"))[-1]


def _model(config: ModelConfig, recipe: Recipe, commit: str | None = None) -> str:
    """A model by its name and, where known, the very commit that was loaded."""
    revision = commit or config.revision
    at = f" at `{revision}`" if revision else ""
    return f"`{_shown(config.model, recipe)}`{at}" if config.model else UNNAMED


def _introduction(recipe: Recipe, facts: RunFacts) -> str:
    student, commit = recipe.student, facts.revisions.get("student")
    if student.keep_layers is not None:
        origin = f"{_model(student, recipe, commit)}, cut down to its layers {', '.join(map(str, student.keep_layers))}"
    elif student.model:
        origin = _model(student, recipe, commit)
    elif not student.config:
        origin = UNNAMED
    else:
        origin = f"random weights in the shape of `{_shown(student.config, recipe)}`"
    count = len(recipe.teachers)
    teachers = f"{count} teacher{'s' if count > 1 else ''} through the keys and values of attention"
    how = f"distilled with `kv_trainer` from {teachers}" if count else "trained with `kv_trainer` without any teacher"
    return f"A student {how}. It started from {origin}.{_adapters(student.peft)}"


def _adapters(peft: dict[str, Any] | None) -> str:
    """What was trained, where that is not every weight."""
    if peft is None:
        return ""
    knobs = ", ".join(f"{key} {value}" for key, value in peft.items() if key != "type")
    settings = f" ({knobs})" if knobs else ""
    return f" Its own weights stayed as they were: trained were `{peft['type']}` adapters{settings}."


def _method(recipe: Recipe, shapes: dict[str, KVShape], facts: RunFacts) -> str:
    rows = [["", "model", "family", "layers", "KV heads", "head width", "RoPE base", "vocabulary", "parameters"]]
    student, commits = recipe.student, facts.revisions
    start = f"`{_shown(student.config, recipe)}` (config)" if student.config else None
    start = start or _model(student, recipe, commits.get("student"))
    teachers = {name: _model(teacher, recipe, commits.get(name)) for name, teacher in recipe.teachers.items()}
    teachers |= {n: f"{teachers[n]}, random weights" for n, t in recipe.teachers.items() if getattr(t, "random", False)}
    for name, model in {"student": start, **teachers}.items():
        rows.append([name, model, *_shape_cells(shapes.get(name))])
    losses = [["loss", "weight", "schedule"]]
    losses += [[f"`{name}`", loss.described_weight, loss.schedule] for name, loss in recipe.args.losses.items()]
    return "\n\n".join([_table(rows), *(_bridging(recipe) if recipe.teachers else ()), _table(losses)])


def _bridging(recipe: Recipe) -> list[str]:
    """How the teachers' states come to the student's: a paragraph or two."""
    args = recipe.args
    how = f"Tokens are aligned by `{args.alignment.tokens.method}`, layers by `{args.alignment.layers.method}`"
    how += f"; teachers are fused by `{method_of(args.fusion)}`."
    if any("projectors" in loss.needs for loss in args.losses.values()):
        how += f" Heads are mapped by a `{args.projector.method}` projector, `{args.projector.direction}`."
    shuffled = f"**This is a control run**: teacher states are shuffled by `{args.control.shuffle}`."
    return [how, shuffled] if args.control.shuffle else [how]


def _shape_cells(shape: KVShape | None) -> list[str]:
    if shape is None:
        return ["-"] * 7
    base = "none" if shape.rope_theta is None else f"{shape.rope_theta:,.0f}"
    sizes = [str(shape.num_layers), str(shape.num_kv_heads), str(shape.head_dim), base, f"{shape.vocab_size:,}"]
    return [shape.family, *sizes, format_count(shape.num_parameters)]


def _data(recipe: Recipe) -> str:
    data = recipe.args.data
    if not data.path:
        return "Rows that were made in Python, and not by a recipe."
    part = f" ({data.name})" if data.name else ""
    evaluation = f", evaluated on `{data.eval_split}`" if data.eval_split else ""
    return (
        f"`{_shown(data.path, recipe)}`{part}: trained on `{data.train_split}`{evaluation}; sequences of at most "
        f"{data.max_length} tokens."
    )


def _results(results: dict[str, float]) -> str:
    rows = result_rows({name: value for name, value in results.items() if name not in MACHINE})
    return _table([["figure", "value"], *map(list, rows)]) if rows else "Not evaluated."


def _eval_results(recipe: Recipe, results: dict[str, float]) -> list[EvalResult]:
    data = recipe.args.data
    figures = {n: v for n, v in results.items() if n == "eval_perplexity" or n.startswith("eval_accuracy")}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_shown(data.path, recipe) or "unknown",
            dataset_name=_shown(data.path, recipe) or "unknown",
            dataset_config=data.name,
            dataset_split=data.eval_split,
            metric_type="perplexity" if name == "eval_perplexity" else "accuracy",
            metric_name=name.removeprefix("eval_").replace("_", " "),
            metric_value=round(value, 4),
        )
        for name, value in figures.items()
        if math.isfinite(value)
    ]


def _machine(results: dict[str, float], facts: RunFacts) -> str:
    seconds = facts.seconds if facts.seconds is not None else results.get("train_runtime")
    memory = dict(result_rows({k: v for k, v in results.items() if k == "peak_memory_mb"})).get("peak memory")
    known = [facts.hardware or None, f"trained for {format_duration(seconds)}" if seconds is not None else None]
    known += [f"peak memory {memory}" if memory else None]
    return "; ".join(part for part in known if part) + "." if any(known) else "Not recorded."


def _licence(name: str | None, chosen: bool, recipe: Recipe) -> str:
    """What is known and no more."""
    if not name:
        return "Not known: the base model does not say. Ask those whose models and data this one was made of."
    whose = "" if chosen else f", as its base model `{_shown(recipe.student.model, recipe)}`"
    return f"`{name}`{whose}. The terms of the teachers and of the data come on top."


def _reproduction(recipe: Recipe, facts: RunFacts) -> str:
    args = recipe.args
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    state = RESUME.format(folder=facts.state_folder) if facts.state_folder else ""
    return (
        "```bash\nkv-trainer train recipe.yaml\n```\n\n"
        f"{length}, {batch} rows a step and device, learning rate {args.learning_rate:g}, seed {args.seed}. "
        f"Local folders and files that the recipe names are not here; put them beside it, or give others.{state}"
    )


def _citations(recipe: Recipe) -> str:
    sources = dict.fromkeys(loss.source for loss in recipe.args.losses.values() if loss.source)
    linked = [ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", source) for source in sources]
    return "\n".join(f"- {source}" for source in linked) or "None: only the text itself was learnt from."


def _table(rows: list[list[Any]]) -> str:
    head, *body = [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _use(recipe: Recipe, name: str) -> str:
    student = recipe.student
    revision = f', revision="{student.revision}"' if student.revision else ""
    template = USE_ADAPTERS if student.peft else USE
    return template.format(name=name, base=f'"{_shown(student.model, recipe)}"{revision}')


UNNAMED = "a model made in Python"
RESUME = (
    "\n\nThe training state is in `{folder}`: put it into output_dir as `checkpoint-<step>` and add `--resume` to go "
    "on from there."
)
USE = """The student is an ordinary checkpoint; `kv_trainer` is not needed to run it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""

USE_ADAPTERS = """These are adapters for the model they were trained on; `kv_trainer` is not needed to run them.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

`model.merge_and_unload()` makes one ordinary model of both, where the method allows it."""
