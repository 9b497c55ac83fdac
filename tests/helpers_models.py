"""Tiny random models of many families and tiny tokenizers, made here: no test needs a network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 320
GROUPED = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
WIDE = {**GROUPED, "head_dim": 12}  # a head width that is not hidden_size / heads
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
LATENT = {  # keys of width 12, values of width 10
    **GROUPED, **ROUTED, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 10,
}  # fmt: skip
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FOUR = {**GROUPED, "num_hidden_layers": 4}  # hybrids: layers 1 and 3 have keys and values
STATE = {"mamba_d_state": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
HYBRID = ["linear_attention", "full_attention"] * 2
# family -> its configuration, by model_type; head_dim 8 unless it says otherwise
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": WIDE,
    "mistral": {**WIDE, "sliding_window": 4},
    "gemma": WIDE,
    "gemma2": {**WIDE, "sliding_window": 4, "query_pre_attn_scalar": 12},
    "gemma3_text": {**WIDE, "sliding_window": 4, "query_pre_attn_scalar": 12},
    "phi3": GROUPED,
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": None,
        "eos_token_id": 1, "pad_token_id": 0,
    },
    "gpt_neox": {
        **GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    },
    "olmo2": GROUPED,
    "cohere": {**GROUPED, "use_qk_norm": True},
    "starcoder2": {**GROUPED, "sliding_window": 4},
    "granite": GROUPED,
    "qwen3_moe": {**WIDE, **EXPERTS},
    "qwen2_moe": {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16},
    "stablelm": {**GROUPED, "qk_layernorm": True},
    "gpt_oss": {**WIDE, **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi": GROUPED,  # rotates half of the channels
    "cohere2": {**WIDE, **SLIDING},  # RoPE in sliding layers only, like Exaone
    "exaone4": {**GROUPED, **SLIDING},
    "smollm3": {**GROUPED, "no_rope_layer_interval": 2},
    "glm": WIDE,
    "glm4": WIDE,
    "falcon": {**GROUPED, "new_decoder_architecture": True, "num_kv_heads": 2},
    "bloom": {**GROUPED, "n_layer": 3, "n_head": 4},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "opt": {**GROUPED, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "ernie4_5": {**GROUPED, "head_dim": 8},
    "seed_oss": {**WIDE, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "apertus": GROUPED,
    "nemotron": GROUPED,
    "hunyuan_v1_dense": WIDE,
    "falcon_h1": {**GROUPED, **STATE, "mamba_d_ssm": 64, "key_multiplier": 0.4},
    "qwen3_next": {
        **FOUR, **EXPERTS, "head_dim": 12, "layer_types": HYBRID, "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "lfm2": {**FOUR, "layer_types": ["conv", "full_attention"] * 2},
    "bamba": {**FOUR, **STATE, "attn_layer_indices": [1, 3]},
    "jamba": {**FOUR, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "num_experts": 4},
    "minimax": {**FOUR, "layer_types": HYBRID, "num_local_experts": 4},
}  # fmt: skip


CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the other dog jumps over the fox",
    "what is seven plus five? seven plus five is twelve. what is two times three? two times three is six.",
    "#### 12 #### 6 user assistant system question answer 0 1 2 3 4 5 6 7 8 9",
)



_built: dict[str, PreTrainedModel] = {}


def build_model(family: str, seed: int = 0, attn: str = "eager", **config: Any) -> PreTrainedModel:
    """A random decoder of its own for every call, in float32 and eval mode.

    family: a key of FAMILIES, or any model_type with all of its config given. Weights are large enough (std 0.2) for
    attention to differ from a plain mean, and dropout is off. Equal arguments give equal weights.
    """
    key = repr((family, seed, attn, sorted(config.items(), key=str)))
    if key not in _built:
        no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}
        known = {**FAMILIES.get(family, {}), **no_dropout, **config, "initializer_range": 0.2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shape = AutoConfig.for_model(family, **known)
            _built[key] = AutoModelForCausalLM.from_config(shape, attn_implementation=attn).eval()
    return copy.deepcopy(_built[key])


def build_tokenizer(
    merges: int = 40, bos: bool = False, chat_template: str | None = None, corpus: Sequence[str] = CORPUS
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on CORPUS.

    merges: how many byte pairs are merged; 0 gives one token a byte, and unlike counts cut text unlike. Every text
    can be read. Ids are below 259 + merges; <pad> 0, </s> 1, <s> 2, which `bos` puts in front of every text.
    """
    special = ["<pad>", "</s>", "<s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + merges, special_tokens=special, initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    steps = [processors.ByteLevel(trim_offsets=False)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)]))
    tokenizer.post_processor = processors.Sequence(steps)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", bos_token="<s>" if bos else None
    )
    fast.chat_template = chat_template
    return fast
