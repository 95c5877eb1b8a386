"""Every causal architecture of transformers as a small random model: what `lm.check` is tried on, and its table."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
WINDOW = 8
"""Of attention that sees only so far: shorter than the rows that are tried."""
SPREAD = 0.3
"""Of the noise that is added to weights, so that no wrong position or mask goes unnoticed."""


def _each(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SMALL: dict[str, Any] = {
    **_each("hidden_size d_model n_embd embedding_dim emb_dim lru_width embedding_size word_embed_proj_dim n_ctx", 64),
    **_each("input_embedding_size output_embedding_size hidden_size_per_layer_input ple_embed_dim", 64),
    **_each("attention_hidden_size", 128),
    **_each("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim moe_intermediate_size n_inner dff dim_ff", 96),
    **_each("d_inner shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size", 96),
    **_each("ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size", 96),
    **_each("feed_forward_size moe_shared_expert_intermediate_size mamba_d_ssm router_hidden_size", 64),
    **_each("num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads", 4),
    **_each("encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads linear_num_heads", 4),
    **_each("swa_num_attention_heads linear_num_value_heads linear_num_key_heads index_n_heads num_query_groups", 4),
    **_each("mamba_n_heads mamba_num_heads n_mamba_heads", 8),
    **_each("head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim d_head dim_head", 16),
    **_each("kv_channels v_head_dim index_head_dim attention_head_size global_head_dim d_rel qk_head_dim", 16),
    **_each("kv_lora_rank q_lora_rank o_lora_rank laurel_rank gated_norm_rank adapter_rank hc_lowrank", 16),
    **_each("qk_nope_head_dim qk_rope_head_dim rotary_dim", 8),
    **_each("num_experts n_routed_experts num_local_experts moe_num_experts", 4),
    **_each("num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts o_groups zero_expert_num", 2),
    **_each("n_shared_experts num_shared_experts moe_num_shared_experts num_expert_group n_group topk_group", 1),
    **_each("mamba_n_groups mamba_ngroups n_groups", 1),
    **_each("state_size mamba_d_state ssm_state_size time_step_rank mamba_dt_rank", 8),
    **_each("mamba_d_head mamba_headdim mamba_head_dim", 16),
    **_each("max_position_embeddings n_positions max_seq_len model_max_length max_target_positions context_length", 128),
    **_each("rel_extent max_source_positions", 128),
    **_each("sliding_window window_size attention_window_size sliding_window_size attention_chunk_size", WINDOW),
    **_each("local_attention local_attention_window_len keep_window_size", WINDOW),
    **_each("chunk_size mamba_chunk_size index_topk index_block_size block_size", 4),
    **_each("vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size", VOCABULARY),
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
"""Field -> its value in a small model."""


def small(config: PretrainedConfig, **options: Any) -> PretrainedConfig:
    """A config of the same kind, a few layers of width 64, in which each kind of layer shows."""
    given = config.to_dict()
    own = {name: SMALL[name] for name, value in given.items() if name in SMALL and value is not None}
    for heads, groups in (("num_attention_heads", "num_key_value_heads"), ("swa_num_attention_heads", "swa_num_key_value_heads"), ("num_attention_heads", "num_kv_heads")):
        if given.get(groups) is not None:
            own[groups] = 1 if given[groups] == 1 else 4 if given[groups] == given.get(heads) else 2
    own |= _layers(given)
    for name, kind in config.sub_configs.items():
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            own[name] = small(part)
    own |= EXCEPTIONS.get(config.model_type, {}) | options
    for name in ("per_layer_config", "transformers_version", "id2label", "label2id"):
        given.pop(name, None)
    usual = type(config)().to_dict()  # a None that the class replaces is not to be handed back to it
    given = {name: value for name, value in given.items() if value is not None or usual.get(name) is not None}
    return type(config)(**{**given, **own})


DEPTHS = "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers num_blocks".split()
FIRST = "moe_layer_start_index moe_layer_end_index"

def _layers(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fewer layers: of the lists with an entry a layer those entries that show every kind."""
    depth = next((given[name] for name in DEPTHS if given.get(name) is not None), None)
    lists = {name: value for name, value in given.items() if isinstance(value, list) and len(value) == depth}
    kinds = list(zip(*lists.values(), strict=True)) if lists else [()] * (depth or 0)
    kept = sorted({kinds.index(kind) for kind in kinds if all(isinstance(part, str | int | bool) for part in kind)})
    while len(kept) < min(2, depth or 0):
        kept = sorted({*kept, next(at for at in range(depth) if at not in kept)})
    kept = kept[:6]
    return {
        **{name: len(kept) for name in DEPTHS if given.get(name) is not None},
        **{name: [value[at] for at in kept] for name, value in lists.items()},
    }


_NONE_SHARED = {"num_kv_shared_layers": 0}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v3", "youtu", "longcat_flash"), {"head_dim": 8}),  # of the rotary part alone
    **dict.fromkeys(("gemma3n_text", "gemma4_unified_text"), _NONE_SHARED),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 16}),
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}},
    **dict.fromkeys(
        ("qwen4_exp_text", "qwen4_exp"),
        {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    ),
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_in_dim": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zaya": {"num_experts_per_tok": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "mamba2": {"num_heads": 8},
}


def build(config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random causal LM whose weights are far from the initialisation, in eval mode."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * SPREAD)
    return model.eval()
