"""The head axis: starting weights, the map against loops, and the statistics of calibration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_trainer.alignment.heads import (
    ElasticBottleneck,
    KVProjector,
    TeacherProjectors,
    grouped_average,
)
from kv_trainer.types import KVShape, KVStates

COUNT = st.integers(1, 24)


def shape(layers: int, heads: int, width: int) -> KVShape:
    return KVShape("llama", layers, heads, width, 1e4, 100, 1000)


def states_of(layers: int, heads: int, width: int, length: int = 7, offset: float = 0.0, seed: int = 0) -> KVStates:
    draw = torch.Generator().manual_seed(seed)
    every = torch.randn(2, layers, 3, heads, length, width, generator=draw) * 2 + offset
    mask = torch.rand(3, length, generator=draw) < 0.6
    mask[0, 0] = True
    return KVStates(tuple(every[0]), tuple(every[1]), mask, tuple(range(layers)), layers)


@given(outputs=COUNT, inputs=COUNT)
def test_every_output_averages_what_it_covers(outputs, inputs):
    found = grouped_average(outputs, inputs)
    assert found.shape == (outputs, inputs) and found.dtype == torch.float32 and (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(outputs))
    for o in range(outputs):
        for i in range(inputs):
            shared = min((o + 1) / outputs, (i + 1) / inputs) - max(o / outputs, i / inputs)
            assert found[o, i].item() == pytest.approx(max(0.0, shared) * outputs, abs=1e-6)


def test_known_averages():
    assert torch.equal(grouped_average(5, 5), torch.eye(5))
    assert grouped_average(2, 4).tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    assert grouped_average(4, 2).tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    torch.testing.assert_close(grouped_average(2, 3), torch.tensor([[2, 1, 0], [0, 1, 2]]) / 3)


@pytest.mark.parametrize("init", ["auto", "grouped"])
def test_linear_projector_starts_as_the_identity_where_shapes_agree(init):
    x = torch.randn(2, 3, 5, 8)
    assert torch.equal(KVProjector((3, 8), (3, 8), init=init)(x), x)


def test_linear_projector_starts_as_the_mean_of_a_group():
    x = torch.randn(2, 4, 5, 8)
    expected = x.unflatten(1, (2, 2)).mean(2).unflatten(-1, (4, 2)).mean(-1)
    torch.testing.assert_close(KVProjector((4, 8), (2, 4))(x), expected)


@pytest.mark.parametrize("method", ["linear", "elastic_bottleneck"])
@pytest.mark.parametrize(("inputs", "outputs"), [((2, 8), (3, 6)), ((4, 6), (1, 12)), ((3, 8), (3, 8))])
def test_projector_is_the_loop(method, inputs, outputs):
    torch.manual_seed(0)
    projector = KVProjector(inputs, outputs, method=method, init="xavier").eval()
    torch.nn.init.normal_(projector.heads.weight)
    x = torch.randn(2, inputs[0], 5, inputs[1])
    found = projector(x)
    assert found.shape == (2, outputs[0], 5, outputs[1])
    for b in range(2):
        for o in range(outputs[0]):
            for t in range(5):
                mixing = projector.heads.weight[o]
                naive = sum(mixing[i] * projector.width(x[b, i, t]) for i in range(inputs[0]))
                torch.testing.assert_close(found[b, o, t], naive, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["linear", "elastic_bottleneck"])
@pytest.mark.parametrize("init", ["auto", "xavier", "kaiming", "normal"])
def test_gradient_reaches_both_steps_and_the_input(method, init):
    projector = KVProjector((2, 8), (3, 6), method=method, init=init, dropout=0.0)
    x = torch.randn(2, 2, 5, 8, requires_grad=True)
    projector(x).square().sum().backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert x.grad.abs().sum() > 0


def test_inits_differ_in_spread():
    inits = ("xavier", "kaiming", "normal")
    spread = {init: KVProjector((2, 64), (2, 64), init=init).width.weight.std().item() for init in inits}
    assert spread["normal"] == pytest.approx(0.02, rel=0.1)
    assert spread["xavier"] == pytest.approx((2 / 128) ** 0.5, rel=0.1)
    assert spread["kaiming"] == pytest.approx((2 / 64) ** 0.5, rel=0.1)


def test_bfloat16_states_are_mapped_in_float32():
    assert KVProjector((2, 8), (3, 6))(torch.randn(1, 2, 3, 8).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("ratio", "hidden"), [(0.5, 4), (1.0, 8), (2.0, 16), (0.01, 1)])
def test_bottleneck_width_dropout_and_eval(ratio, hidden):
    bottleneck = ElasticBottleneck(8, 6, ratio, dropout=0.5, init="xavier")
    assert bottleneck[1].out_features == bottleneck[4].in_features == hidden and bottleneck[4].out_features == 6
    x = torch.randn(3, 4, 8)
    assert bottleneck(x).shape == (3, 4, 6)
    many = torch.randn(400, 8)
    assert not torch.equal(bottleneck(many), bottleneck(many)), "dropout is on in training"
    bottleneck.eval()
    assert torch.equal(bottleneck(x), bottleneck(x))
    norm = torch.nn.functional.layer_norm(x, (8,))
    naive = torch.nn.functional.silu(norm @ bottleneck[1].weight.T) @ bottleneck[4].weight.T
    torch.testing.assert_close(bottleneck(x), naive, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("layer_norm", "activation"), [(False, "relu"), (True, "gelu"), (False, "silu")])
def test_bottleneck_with_other_parts(layer_norm: bool, activation: str):
    knobs = {"method": "elastic_bottleneck", "layer_norm": layer_norm, "activation": activation}
    bottleneck = KVProjector((2, 8), (3, 6), **knobs).eval().width
    x = torch.randn(3, 4, 8)
    start = torch.nn.functional.layer_norm(x, (8,)) if layer_norm else x
    inner = getattr(torch.nn.functional, activation)(start @ bottleneck[1].weight.T)
    torch.testing.assert_close(bottleneck(x), inner @ bottleneck[4].weight.T, atol=1e-6, rtol=1e-5)


def test_grouped_bottleneck_is_refused():
    with pytest.raises(ValueError, match="'grouped', which only a linear projector has"):
        KVProjector((2, 8), (2, 8), method="elastic_bottleneck", init="grouped")


@pytest.mark.parametrize("direction", ["teacher_to_student", "student_to_teacher"])
def test_direction_says_whose_states_are_mapped(direction):
    student, teacher = (3, 2, 8), (5, 4, 6)
    maps = TeacherProjectors(shape(*student), shape(*teacher), direction)
    assert len(maps.keys) == len(maps.values) == 3 and maps.mean.shape == maps.scale.shape == (2, 3, 4, 1, 6)
    given_states = states_of(3, *(teacher if direction == "teacher_to_student" else student)[1:])
    mapped = maps(given_states)
    heads, width = (student if direction == "teacher_to_student" else teacher)[1:]
    assert {x.shape for x in (*mapped.keys, *mapped.values)} == {(3, heads, 7, width)}
    assert mapped.mask is given_states.mask and mapped.layers == given_states.layers
    assert torch.equal(mapped.keys[1], maps.keys[1](given_states.keys[1]))
    assert torch.equal(mapped.values[2], maps.values[2](given_states.values[2]))


def test_none_passes_equal_shapes_and_refuses_others():
    maps = TeacherProjectors(shape(2, 2, 8), shape(5, 2, 8), "student_to_teacher", method="none")
    states = states_of(2, 2, 8)
    assert not list(maps.parameters())
    assert all(torch.equal(a, b) for a, b in zip(maps(states).keys, states.keys, strict=True))
    with pytest.raises(ValueError, match="student has 2 KV heads of width 8, and the teacher 4 of width 8"):
        TeacherProjectors(shape(2, 2, 8), shape(5, 4, 8), "student_to_teacher", method="none")


def test_calibrated_states_have_mean_zero_and_deviation_one_where_real():
    maps = TeacherProjectors(shape(3, 2, 8), shape(3, 4, 6), "student_to_teacher")
    batches = [states_of(3, 4, 6, length=length, offset=5.0, seed=length) for length in (40, 60)]
    for batch in batches:  # what is not real must not count
        for x in (*batch.keys, *batch.values):
            x.masked_fill_(~batch.mask[:, None, :, None], 1e4)
    maps.calibrate(batches)
    for part in ("keys", "values"):
        for layer in range(3):
            rows = [getattr(maps.standardise(b), part)[layer].transpose(1, 2)[b.mask] for b in batches]
            real = torch.cat(rows)
            assert real.shape[1:] == (4, 6) and 100 < len(real) < 300
            torch.testing.assert_close(real.mean(0), torch.zeros(4, 6), atol=1e-5, rtol=0)
            torch.testing.assert_close(real.std(0, correction=0), torch.ones(4, 6), atol=1e-5, rtol=0)
    assert set(dict(maps.named_buffers())) == {"mean", "scale"}, "saved with the maps"


def test_a_channel_that_moves_by_a_rounding_step_does_not_move() -> None:
    """Where a bias is large, one step of bfloat16 among thousands of positions would be all of the loss."""
    maps = TeacherProjectors(shape(1, 1, 8), shape(1, 1, 8), "student_to_teacher")
    states = states_of(1, 1, 8, length=60)
    states.keys[0][..., 0] = 100.0
    states.keys[0][0, 0, 3, 0] = 100.5
    states.keys[0][..., 1] += 100.0  # a large mean is no reason by itself
    maps.calibrate([states])
    scale = maps.deviation(0, 0, 8)[0, 0]
    assert 0.5 < scale[0] < 4 and 0.5 < scale[1] < 4


def test_calibration_of_a_constant_channel_stays_finite_and_of_nothing_is_refused():
    maps = TeacherProjectors(shape(1, 2, 8), shape(1, 2, 8), "student_to_teacher")
    states = states_of(1, 2, 8).map(torch.ones_like)
    maps.calibrate([states])
    assert maps.standardise(states).keys[0].eq(0).all()
    nothing = states.map(lambda x: x, mask=torch.zeros_like(states.mask))
    maps.calibrate([states, nothing])
    with pytest.raises(ValueError, match="No student position is aligned"):
        maps.calibrate([nothing])
    assert maps.mean.isfinite().all()
