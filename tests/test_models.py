"""Pruning, freezing and loading, against models built by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers_models import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

from kv_trainer.arguments import ModelConfig, StudentConfig, TeacherConfig
from kv_trainer.capture import attention_layers
from kv_trainer.models import freeze, keep_layers, load_pretrained, load_student, load_tokenizer, same_tokenizer

LAYERS = {name: "transformer.h" if name == "gpt2" else "gpt_neox.layers" if name == "gpt_neox" else "model.layers"
          for name in FAMILIES}  # fmt: skip
IDS = torch.arange(3, 15)[None]


@pytest.mark.parametrize("kept", [[0, 2], [2], [2, 0, 1]], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3", "mistral", "phi3"])
def test_pruned_model_is_the_one_built_from_those_layers(tiny_model, tmp_path, family, kept):
    model = tiny_model(family)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    by_hand = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    weights = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(LAYERS[family] + "."):
            weights[name] = tensor
            continue
        layer, rest = name[len(LAYERS[family]) + 1 :].split(".", 1)
        if int(layer) in kept:
            weights[f"{LAYERS[family]}.{kept.index(int(layer))}.{rest}"] = tensor
    by_hand.load_state_dict(weights)
    whole = model(IDS).logits
    keep_layers(model, kept)
    assert model.config.to_dict() == config.to_dict()
    assert [layer.index for layer in attention_layers(model)] == list(range(len(kept)))
    expected = by_hand(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    assert not torch.allclose(whole, expected, atol=1e-2)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(again(IDS).logits, expected)
    cached = model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(cached, model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False))


def test_lists_of_the_config_follow(tiny_model, tmp_path):
    """SmolLM3 leaves RoPE out of every fourth layer, by a list in its config."""
    model = tiny_model("smollm3", **{**FAMILIES["llama"], "num_hidden_layers": 5, "no_rope_layer_interval": 2})
    asked = model.config.no_rope_layers
    assert sorted(set(asked)) == [0, 1]
    keep_layers(model, [1, 2, 4])
    assert model.config.no_rope_layers == [asked[i] for i in (1, 2, 4)]
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kept", [[0, 1], [2], [1, 2]], ids=str)
def test_layers_of_one_kind_of_attention_may_be_kept(tiny_model, tmp_path, kept):
    """Gemma 3 has RoPE for each kind; a model without one of the two has no words for its RoPE, and needs none."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    model = tiny_model("gemma3_text", **{**FAMILIES["gemma3_text"], "num_hidden_layers": 3, "layer_types": kinds})
    keep_layers(model, kept)
    assert model.config.layer_types == [kinds[i] for i in kept]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(again(IDS).logits, model.eval()(IDS).logits)


MIXED = {
    "first layers dense": ("deepseek_v3", {"first_k_dense_replace": 1}),
    "some layers dense": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "every second layer of experts": ("qwen3_moe", {"decoder_sparse_step": 2}),
}


@pytest.mark.parametrize("kept", [[0, 1], [0, 2], [1, 2], [1]], ids=str)
@pytest.mark.parametrize("name", [*FAMILIES, *MIXED])
def test_a_pruned_model_is_saved_as_it_is_or_refused(tiny_model, tmp_path, name, kept):
    """A config that derives a layer's kind from its place would load with other, random, weights."""
    family, knobs = MIXED.get(name, (name, {}))
    model = tiny_model(family, **{**FAMILIES[family], **knobs})
    try:
        keep_layers(model, kept)
    except ValueError as error:
        assert "student.keep_layers is [" in str(error) and "derives what a layer is from its place" in str(error)
        assert family in ("bamba", "jamba") or name in MIXED
        return
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ours, theirs = (m(IDS, use_cache=False).logits for m in (model, again))  # a cache wants some attention
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("kept", [[], [3], [-1], [0, 0]], ids=str)
def test_impossible_layers_are_refused(tiny_model, kept):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"student.keep_layers is \[.*different layers from 0 to 2"):
        keep_layers(model, kept)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3


def test_a_model_with_two_lists_of_layers_is_refused(tiny_model):
    model = tiny_model("llama")
    model.other = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
    with pytest.raises(ValueError, match="LlamaForCausalLM has 2 lists of 3 layers"):
        keep_layers(model, [0])


def test_freeze_by_part_of_the_name(tiny_model):
    model = tiny_model("llama")
    freeze(model, ["embed_tokens", "layers.1."])
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if "embed_tokens" in n or "layers.1." in n}
    assert frozen and len(frozen) < len(list(model.parameters()))
    with pytest.raises(ValueError, match="student.freeze: no parameter's name contains 'embed_token_'"):
        freeze(model, ["layers.0", "embed_token_"])


@pytest.fixture
def saved(tiny_model, tiny_tokenizer, tmp_path):
    """A checkpoint with its tokenizer, as a folder."""
    tiny_model("llama", seed=3).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_student_is_loaded_pruned_and_frozen(tiny_model, saved):
    student = load_student(StudentConfig(model=saved, keep_layers=[2, 0], freeze=["embed_tokens"]))
    expected = tiny_model("llama", seed=3)
    keep_layers(expected, [2, 0])
    torch.testing.assert_close(student(IDS).logits, expected(IDS).logits)
    assert not student.model.embed_tokens.weight.requires_grad
    assert load_pretrained(ModelConfig(model=saved, dtype="bfloat16")).dtype == torch.bfloat16
    for places in ("cuda:97", {"model": "cpu", "lm_head": "cuda:97"}):
        with pytest.raises(ValueError, match="device_map names cuda:97, and this process sees"):
            load_pretrained(TeacherConfig(model=saved, device_map=places))
    assert load_pretrained(ModelConfig(model=saved, attn_implementation="eager")).config._attn_implementation == "eager"


def test_a_layer_that_scales_by_its_place_is_not_moved(tiny_model):
    """It would be saved, and loaded with another scale."""
    with pytest.raises(ValueError, match=r"keep_layers is \[0, 2\], which GPT2Config has no words for"):
        keep_layers(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True), [0, 2])
    keep_layers(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True), [0, 1])


def test_layers_that_are_all_alike_can_be_kept_whatever_their_kind_is_called(tiny_model, tmp_path):
    model = tiny_model("falcon_h1")
    keep_layers(model, [0, 2])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("pinned", [None, "b" * 40], ids=["newest", "pinned"])
def test_a_student_drawn_from_a_config_has_the_revision_that_it_names(tiny_model, tmp_path, monkeypatch, pinned):
    hub = tmp_path / "models--me--small"
    for revision, layers in (("a" * 40, 2), ("b" * 40, 1)):
        tiny_model("llama", num_hidden_layers=layers).config.save_pretrained(hub / "snapshots" / revision)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    student = load_student(StudentConfig(config="me/small", revision=pinned))
    assert student.config.num_hidden_layers == (2 if pinned is None else 1)


def test_random_student_has_the_shape_and_the_seed_it_was_given(tiny_model, saved):
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return load_student(StudentConfig(config=saved, attn_implementation="eager"))(IDS).logits

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert not torch.allclose(draw(1), tiny_model("llama", seed=3)(IDS).logits, atol=1e-2)
    assert load_student(StudentConfig(config=saved, dtype="float16")).dtype == torch.float16


def test_tokenizer_gets_a_pad_token(tiny_tokenizer, saved, tmp_path):
    assert load_tokenizer(ModelConfig(model=saved)).pad_token == "<pad>"
    bare = tiny_tokenizer()
    bare.pad_token = None
    bare.save_pretrained(tmp_path / "bare")
    assert load_tokenizer(ModelConfig(model=saved, tokenizer=str(tmp_path / "bare"))).pad_token == "</s>"


def test_a_folder_without_a_tokenizer_is_told(tiny_model, tmp_path):
    """transformers makes up an empty one for some families, which would read every text as nothing."""
    tiny_model("qwen2").save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare has no tokenizer; save its own there, or name it"):
        load_tokenizer(ModelConfig(model=str(tmp_path / "bare")))


def test_same_tokenizer(tiny_tokenizer, saved):
    one, other = tiny_tokenizer(40), tiny_tokenizer(41)
    assert same_tokenizer(one, one) and same_tokenizer(one, load_tokenizer(ModelConfig(model=saved)))
    assert not same_tokenizer(one, other)
    assert not same_tokenizer(one, tiny_tokenizer(40, bos=True)), "the same vocabulary, other rules"
