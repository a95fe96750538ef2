"""One tiny random model of any type that transformers' AutoModelForCausalLM maps, made from generic tiny values."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 64

# What configurations call their sizes, and the tiny value of each; a name that a configuration lacks is left out.
SIZES: tuple[tuple[int, str], ...] = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (32, "hidden_size n_embd d_model dim emb_dim embedding_size dim_model word_embed_proj_dim width lru_width"),
    (
        2,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers "
        "num_key_value_heads n_kv_heads num_experts_per_tok top_k_experts moe_topk num_experts_per_token moe_top_k moe_k "
        "kv_n_heads linear_num_key_heads mamba_n_groups n_groups mamba_ngroups",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
        "num_local_experts n_routed_experts moe_num_experts num_linear_heads linear_num_value_heads mamba_n_heads "
        "num_global_key_value_heads mamba_num_heads mamba_d_conv",
    ),
    (
        64,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_ff ffn_hidden_size dim_ff d_inner "
        "intermediate_size_mlp",
    ),
    (
        16,
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank "
        "expert_ffn_hidden_size hidden_size_per_layer_input index_head_dim attention_hidden_size mamba_d_head mamba_headdim "
        "mamba_head_dim ssm_state_size index_n_heads",
    ),
    (
        8,
        "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim state_size mamba_d_state linear_key_head_dim "
        "linear_value_head_dim time_step_rank mamba_dt_rank mamba_chunk_size chunk_size attention_chunk_size sliding_window "
        "window_size attention_window_size global_head_dim d_kv rotary_dim linear_head_dim index_topk",
    ),
    (
        1,
        "n_group num_expert_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts "
        "first_k_dense_replace",
    ),
    (128, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length"),
)
MOST_LAYERS = 4
TINY = {name: value for value, names in SIZES for name in names.split()}


# Types whose sizes must agree in ways that the names do not tell.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4,
}  # fmt: skip
AGREEING: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [2, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"adapter_in_dim": 32, "audio_config": {"adapter_in_dim": 32}},
    "dots3_note_text": {"shared_experts_intermediate_size": 16},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 8,
        "feed_forward_size": 64, "local_attn_chunk_length": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 4, "mamba_headdim": 16},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of a type with tiny sizes; nested configurations are made tiny too."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_values(kind(), AGREEING.get(model_type, {})))


def _values(default: PreTrainedConfig, agreeing: dict[str, Any]) -> dict[str, Any]:
    own = default.to_dict()
    values = {name: TINY[name] for name in own if name in TINY and isinstance(own[name], int)}
    heads = own.get("num_attention_heads")
    for name in ("num_key_value_heads", "mamba_num_heads"):
        if name in values and own[name] == heads:
            values[name] = values["num_attention_heads"]  # as many as before
    values |= {name: 0 for name in own if name.endswith("_token_id") and isinstance(own[name], int)}
    values |= _layers(own)
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            values[name] = type(value)(**_values(value, agreeing.get(name, {})))
    return values | {name: value for name, value in agreeing.items() if not isinstance(values.get(name), PreTrainedConfig)}


def _layers(own: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, two to `MOST_LAYERS`, for a configuration with lists that have an entry for each layer."""
    count = own.get("num_hidden_layers")
    lists = {name: value for name, value in own.items() if isinstance(value, list | tuple) and len(value) == count}
    if not lists or not count:
        return {}
    kinds = [tuple(map(str, kinds)) for kinds in zip(*lists.values(), strict=True)]
    chosen = sorted({kinds.index(kind) for kind in kinds})[:MOST_LAYERS]
    chosen = chosen if len(chosen) > 1 else [0, 1]
    return {name: [value[layer] for layer in chosen] for name, value in lists.items()} | {"num_hidden_layers": len(chosen)}


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model, float32, frozen, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.requires_grad_(False).eval()
