"""`--quick`: any recipe as a run of a minute or two, to see that it works before it is given a night."""

from __future__ import annotations

from typing import Any

from .recipe_tree import Node

STEPS, TRAIN_ROWS, EVAL_ROWS = 20, 128, 32
SUFFIX = "-quick"
HERE = "in the preset of --quick"


def quick_preset(recipe: Node, overrides: Node, output_dir: str) -> Node:
    """What --quick lays over a recipe and under the command line: few steps and rows, nothing saved on the way.

    What the recipe or the command line sets lower stays so, and a run that the command line measures in epochs is not
    cut to steps. output_dir: of a recipe that names none.
    """

    def given(tree: Node, section: str, key: str) -> Any:
        node = tree.value.get(section)
        child = node.value.get(key) if node is not None and isinstance(node.value, dict) else None
        return child.value if child is not None else None

    def lower(section: str, key: str, most: int) -> int:
        value = given(recipe, section, key)
        return value if isinstance(value, int) and 0 < value < most else most

    folder = str(given(recipe, "training", "output_dir") or output_dir).rstrip("/\\") + SUFFIX
    training: dict[str, Any] = {  # save_steps: as by default, for it has no effect
        "output_dir": folder, "save_strategy": "no", "save_steps": 500, "load_best_model_at_end": False,
        "push_to_hub": False, "logging_steps": lower("training", "logging_steps", 5),
    }  # fmt: skip
    in_epochs = given(overrides, "training", "num_train_epochs") is not None
    training["max_steps"] = -1 if in_epochs else lower("training", "max_steps", STEPS)
    data = {
        "max_train_samples": lower("data", "max_train_samples", TRAIN_ROWS),
        "max_eval_samples": lower("data", "max_eval_samples", EVAL_ROWS),
    }
    preset: dict[str, dict[str, Any]] = {"training": training, "data": data}
    if recipe.value.get("early_stopping") is not None:  # it needs checkpoints to go back to
        preset["early_stopping"] = {"patience": None, "threshold": 0.0}

    def node(value: Any) -> Node:
        inner = {key: node(child) for key, child in value.items()} if isinstance(value, dict) else value
        return Node(inner, HERE, recipe.folder)

    return node(preset)
