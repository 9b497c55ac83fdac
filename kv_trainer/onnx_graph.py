"""One ONNX graph of a causal LM that reads a prompt and goes on token by token with its cache, checked against torch.

Inputs: input_ids and position_ids [B, T], attention_mask [B, S + T], past_key_values.N.key and .value [B, H, S, D] of
S cached tokens, which may be none. Outputs: logits [B, T, V], present.N.key and .value [B, H, S + T, D].
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

TOLERANCE = 1e-4  # of a logit in float32: absolute, or as a share of the largest logit where that is above 1
# batch, length, past length: a first token and prompts, then one and several tokens after a cache
CHECKED = ((1, 1, 0), (1, 7, 0), (3, 11, 0), (1, 1, 1), (3, 1, 11), (2, 4, 9))
GENERATED = 8  # tokens
Cache = Sequence[tuple[Tensor, Tensor]]  # keys and values [B, H, S, D] of each layer, after RoPE


class OnnxStep(nn.Module):
    """Some tokens after a cache, with plain tensors on both sides: what the graph does."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.positions = "position_ids" in inspect.signature(model.forward).parameters  # not in ALiBi's families

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Cache) -> tuple[Any, ...]:
        # without a config, sliding layers keep every token too: all layers have one length, and the mask hides the old
        cache = DynamicCache([tuple(layer) for layer in past])
        more = {"position_ids": position_ids} if self.positions else {}
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **more
        )
        layers: list[Any] = cache.layers
        return out.logits, *(states for layer in layers for states in (layer.keys, layer.values))


class OnnxModel:
    """The written graph on the CPU."""

    def __init__(self, path: Path, past: Cache):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = input_names(past)

    def __call__(self, ids: Tensor, mask: Tensor, past: Cache) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """[B, T] ids and [B, S + T] mask after S cached tokens -> logits [B, T, V], and the cache of S + T."""
        positions = positions_of(mask)[:, -ids.shape[1] :]
        tensors = (ids, mask, positions, *(states for layer in past for states in layer))
        given = {name: tensor.contiguous().numpy() for name, tensor in zip(self.names, tensors)}
        logits, *states = map(torch.from_numpy, self.session.run(None, given))
        return logits, list(zip(states[::2], states[1::2]))


def prepare(model: PreTrainedModel) -> None:
    """Set implementations that can be exported: sdpa where the family has it, experts without a loop over them."""
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:
        model.set_attn_implementation("eager")
    model.set_experts_implementation("batched_mm")  # changes nothing in families without experts


def empty_cache(model: PreTrainedModel, name: str) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [1, H, 0, D] of each layer. ValueError where layers keep anything else, such as a state."""
    with torch.no_grad():
        cache = model(random_ids(model, 1, 2), use_cache=True).past_key_values
    layers = getattr(cache, "layers", [])
    others = {type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if others or not layers:
        held = ", ".join(sorted(others)) or type(cache).__name__
        raise ValueError(
            f"'{name}' ({model.config.model_type}) caches {held}, and only keys and values can be exported to ONNX; "
            "serve it with transformers or vLLM."
        )
    return [(layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in layers]


def cache_of(past: Cache, batch: int, length: int) -> list[tuple[Tensor, Tensor]]:
    """Zeros [B, H, S, D] in the heads and widths of an empty cache."""
    heads = [[(states.shape[1], states.shape[3]) for states in layer] for layer in past]
    keys, values = ([torch.zeros(batch, h, length, d) for h, d in side] for side in zip(*heads))
    return list(zip(keys, values))


def cache_names(past: Cache, prefix: str) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(len(past)) for part in ("key", "value")]


def input_names(past: Cache) -> list[str]:
    return ["input_ids", "attention_mask", "position_ids", *cache_names(past, "past_key_values")]


def random_ids(model: Any, batch: int, length: int) -> Tensor:
    """[B, T] token ids, the same every time."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def positions_of(mask: Tensor) -> Tensor:
    """[B, S] mask -> positions that count real tokens only, as transformers' generate gives them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def limit_of(logits: Tensor) -> float:
    """How far logits that stand for these may be off."""
    return TOLERANCE * max(1.0, float(logits.abs().max()))


def write_graph(model: PreTrainedModel, past: Cache, path: Path, name: str) -> None:
    """Trace one step, with free batch, length and past length. ValueError says what stopped the exporter."""
    mask, positions = torch.ones(2, 8, dtype=torch.long), torch.arange(3, 8).repeat(2, 1)
    free = {0: "batch", 1: "length"}
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                OnnxStep(model).eval(),
                (random_ids(model, 2, 5), mask, positions, cache_of(past, 2, 3)),
                dynamo=True,
                verbose=False,
                input_names=input_names(past),
                output_names=["logits", *cache_names(past, "present")],
                dynamic_shapes=(
                    free, {0: "batch", 1: "total_length"}, free, [({0: "batch", 2: "past_length"},) * 2] * len(past),
                ),
            )  # fmt: skip
    except Exception as error:  # of many kinds, torch's and the family's own
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(
            f"'{name}' ({model.config.model_type}) cannot be exported to ONNX by torch {torch.__version__}; serve it "
            f"with transformers or vLLM. The exporter says: {str(cause)[:300]}"
        ) from error
    assert program is not None, "dynamo=True gives a program"
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces: longer than the graph, and they name folders of this machine
    program.save(path)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the exporter says of axis names, and of packages that are not here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def check_graph(model: PreTrainedModel, past: Cache, path: Path, name: str) -> float:
    """Compare a written graph with its model: logits of CHECKED, with left padding, and GENERATED greedy tokens.

    Returns the largest difference of a logit. ValueError where one is above the limit, or the tokens are others.
    """
    graph, largest = OnnxModel(path, past), 0.0
    for batch, length, before in CHECKED:
        ids, mask = padded(model, batch, before + length)
        cache = cache_of(past, batch, 0)
        if before:
            cache = graph(ids[:, :before], mask[:, :before], cache)[1]
        got, want = graph(ids[:, before:], mask, cache)[0], torch_logits(model, ids, mask)[:, before:]
        difference, limit = float((got - want)[mask[:, before:] == 1].abs().max()), limit_of(want)
        if not difference <= limit:  # `not <=`, for NaN
            raise ValueError(
                f"'{name}': the logits of the ONNX graph are off from torch's by {difference:.2g} (limit {limit:.2g}) "
                f"at batch {batch}, length {length}, past length {before}; serve it with transformers or vLLM."
            )
        largest = max(largest, difference)
    ids, mask = padded(model, 2, 6)
    got_ids, want_ids = greedy(graph, ids, mask, cache_of(past, 2, 0)), generated(model, ids, mask)
    if got_ids != want_ids:
        raise ValueError(f"'{name}': the ONNX graph generates {got_ids}, but torch {want_ids}; serve it with torch.")
    return largest


def padded(model: PreTrainedModel, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T], two tokens of padding on the left of the first row of more than two."""
    ids = random_ids(model, batch, length)
    mask = torch.ones_like(ids)
    if length > 2:
        mask[0, :2] = 0
    return ids, mask


@torch.no_grad()
def torch_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, T, V] of the whole text at once, without a cache."""
    more = {"position_ids": positions_of(mask)} if OnnxStep(model).positions else {}
    return model(ids, attention_mask=mask, use_cache=False, **more).logits


def generated(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Greedy tokens of transformers' generate, without the penalties and stops that the model's own config has."""
    own, model.generation_config = model.generation_config, GenerationConfig(pad_token_id=0)
    try:
        out: Any = model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, max_new_tokens=GENERATED, do_sample=False
        )
    finally:
        model.generation_config = own
    return out[:, ids.shape[1] :].tolist()


def greedy(graph: OnnxModel, ids: Tensor, mask: Tensor, past: Cache) -> list[list[int]]:
    """The same of the graph, token by token."""
    tokens = []
    for _ in range(GENERATED):
        logits, past = graph(ids, mask, past)
        ids = logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        tokens.append(ids)
    return torch.cat(tokens, 1).tolist()
