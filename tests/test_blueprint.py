"""blueprint.py: what a model would be is what it is."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_models import FAMILIES

from kv_trainer.arguments import StudentConfig
from kv_trainer.blueprint import shape_of
from kv_trainer.capture import kv_shape
from kv_trainer.models import keep_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_weights_has_the_shape_of_one_with_them(tiny_model, family: str) -> None:
    model = tiny_model(family)
    with torch.device("meta"):
        assert shape_of(model.config, None, taught=True) == kv_shape(model)


def test_the_students_layers_are_pruned(tiny_model) -> None:
    model = tiny_model("llama")
    with torch.device("meta"):
        section = StudentConfig(model="anywhere", keep_layers=[0, 2], freeze=["embed_tokens"])
        found = shape_of(copy.deepcopy(model.config), section, taught=True)
    keep_layers(model, [0, 2])
    assert found == kv_shape(model) and found.num_layers == 2


def test_adapters_that_look_at_their_weights_are_not_refused(tiny_model) -> None:
    """BOFT asks for numbers, which the meta device has none of; a target that is not there is still told."""
    boft = {"type": "boft", "boft_block_size": 4, "target_modules": ["k_proj"]}
    model = tiny_model("llama")
    with torch.device("meta"):
        assert shape_of(model.config, StudentConfig(model="anywhere", peft=boft), taught=True) == kv_shape(model)
        with pytest.raises(ValueError, match="no_proj"):
            shape_of(model.config, StudentConfig(model="x", peft={**boft, "target_modules": ["no_proj"]}), taught=True)


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "olora"])
def test_adapters_are_laid_on_even_if_they_are_drawn_from_weights(tiny_model, init: bool | str) -> None:
    lora = {"type": "lora", "target_modules": ["k_proj"], "init_lora_weights": init}
    model = tiny_model("llama")
    with torch.device("meta"):
        assert shape_of(model.config, StudentConfig(model="anywhere", peft=lora), taught=True) == kv_shape(model)
