"""blueprint.py: what a model would be is what it is."""

from __future__ import annotations

import pytest
import torch
from helpers_models import FAMILIES

from kv_trainer.arguments import FreezeConfig, StudentConfig, TeacherConfig
from kv_trainer.blueprint import build, shape_of
from kv_trainer.capture import kv_shape
from kv_trainer.models import keep_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_weights_has_the_shape_of_one_with_them(tiny_model, family: str) -> None:
    model = tiny_model(family)
    with torch.device("meta"):
        assert shape_of(build(model.config), TeacherConfig(model="anywhere"), taught=True) == kv_shape(model)


def test_the_students_layers_are_pruned(tiny_model) -> None:
    model = tiny_model("llama")
    with torch.device("meta"):
        section = StudentConfig(model="anywhere", keep_layers=[0, 2], freeze=["embed_tokens"])
        found = shape_of(build(model.config), section, taught=True)
    keep_layers(model, [0, 2])
    assert found == kv_shape(model) and found.num_layers == 2


def test_adapters_that_look_at_their_weights_are_not_refused(tiny_model) -> None:
    """BOFT asks for numbers, which the meta device has none of; a target that is not there is still told."""
    boft = {"type": "boft", "boft_block_size": 4, "target_modules": ["k_proj"]}
    model = tiny_model("llama")
    with torch.device("meta"):
        assert shape_of(build(model.config), StudentConfig(model="anywhere", peft=boft), taught=True) == kv_shape(model)
        with pytest.raises(ValueError, match="no_proj"):
            student = StudentConfig(model="anywhere", peft={**boft, "target_modules": ["no_proj"]})
            shape_of(build(model.config), student, taught=True)


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "olora"])
def test_adapters_are_laid_on_even_if_they_are_drawn_from_weights(tiny_model, init: bool | str) -> None:
    lora = {"type": "lora", "target_modules": ["k_proj"], "init_lora_weights": init}
    model = tiny_model("llama")
    with torch.device("meta"):
        assert shape_of(build(model.config), StudentConfig(model="anywhere", peft=lora), taught=True) == kv_shape(model)


def test_layer_groups_that_the_student_has_not_are_told(tiny_model) -> None:
    model, student = tiny_model("llama"), StudentConfig(model="anywhere")
    with torch.device("meta"):
        shape_of(build(model.config), student, True, FreezeConfig(layer_groups=3, unfreeze_every=1))
        with pytest.raises(ValueError, match="freeze.layer_groups is 4, but the student has 3 layers"):
            shape_of(build(model.config), student, True, FreezeConfig(layer_groups=4, unfreeze_every=1))
