"""Where a teacher's weights lie, and how they are had for one forward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from .models import layer_list

logger = logging.getLogger(__name__)


def place(name: str, model: PreTrainedModel, placement: str, device: torch.device) -> str:
    """Put a teacher where its section says. Returns the placement that this run can have.

    replicated: whole on the student's device. sharded: the layers dealt out over all ranks (FSDP2), gathered one at a
    time; embeddings and head whole. offloaded: in host memory, brought in for its own forward only, so that the device
    holds one teacher at a time. What a device_map dispatched, or bitsandbytes quantised, stays where it is.
    """
    dispatched = placement == "dispatched" or getattr(model, "hf_device_map", None) is not None
    if placement in ("sharded", "offloaded") and (dispatched or is_quantised(model)):
        raise ValueError(f"Teacher '{name}' is quantised or dispatched, and stays as it is; leave out {placement}.")
    module: nn.Module = model  # transformers' own `to` is decorated with other types
    several = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    if is_quantised(model) and placement != "dispatched" and not several:
        check_quantised(name, model, device)
    elif dispatched:
        return "dispatched"
    elif placement == "sharded" and not (dist.is_initialized() and dist.get_world_size() > 1):
        logger.warning("teachers.%s.placement is sharded, but there is one process: it lies there whole.", name)
        placement = "replicated"
        module.to(device)
    elif placement == "sharded":
        shard(model, device)
    elif placement == "offloaded":
        module.to("cpu")
        if device.type != "cpu":
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.pin_memory()
    else:
        module.to(device)
    return placement


def is_quantised(model: Any) -> bool:
    return getattr(model, "quantization_method", None) == "bitsandbytes"


def check_quantised(name: str, model: Any, device: torch.device) -> None:
    """ValueError for quantised weights elsewhere than the student, where no device_map says so."""
    if (model.device.type, model.device.index or 0) != (device.type, device.index or 0):
        raise ValueError(
            f"Teacher '{name}' was quantised on {model.device}, but the student trains on {device}; give a "
            f"TeacherConfig with quantization, or load it with device_map={{'': '{device}'}}."
        )


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Deal the layers out over the ranks of the run, each for itself: whatever engine the student has."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parent, name = layer_list(model)
    for layer in getattr(parent, name):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    nn.Module.to(model, device)


def entry(module: nn.Module) -> torch.device:
    """Where a module takes its inputs: where accelerate's hook computes, or else where its weights lie."""
    place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    weights = next(module.parameters()).device
    return weights if place is None else torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


@contextmanager
def resident(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside the block the weights are copies on `device`; afterwards those in host memory are back, uncopied."""
    held = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
    try:
        for tensor, data in held:
            tensor.data = data.to(device, non_blocking=True, copy=True)
        yield
    finally:
        for tensor, data in held:
            tensor.data = data
