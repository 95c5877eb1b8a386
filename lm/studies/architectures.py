"""Any architecture of transformers as a small random model in which each kind of its layers shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Names of the architectures that transformers calls causal language models."""
VOCABULARY = 96
WINDOW = 8
"""Of attention that sees only so far: shorter than the rows that are tried."""
SPREAD = 0.3
"""Of the noise that is added to weights, so that no wrong position or mask goes unnoticed."""


def _each(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


def _types(names: str, **fields: Any) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(names.split(), fields)


OF_THE_VOCABULARY = {
    **_each("vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size", VOCABULARY),
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SMALL: dict[str, Any] = {
    **_each("hidden_size d_model n_embd embedding_dim emb_dim lru_width embedding_size word_embed_proj_dim n_ctx", 64),
    **_each("input_embedding_size output_embedding_size hidden_size_per_layer_input ple_embed_dim", 64),
    **_each("adapter_in_dim adapter_input_size", 64),
    **_each("attention_hidden_size", 128),
    **_each("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim moe_intermediate_size n_inner dff dim_ff", 96),
    **_each("d_inner shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size", 96),
    **_each("ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size", 96),
    **_each("feed_forward_size moe_shared_expert_intermediate_size router_hidden_size", 64),
    **_each("num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads", 4),
    **_each("encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads linear_num_heads", 4),
    **_each("swa_num_attention_heads linear_num_value_heads linear_num_key_heads num_query_groups", 4),
    **_each("mamba_n_heads mamba_num_heads n_mamba_heads", 8),
    **_each("head_dim swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim d_head dim_head", 16),
    **_each("kv_channels v_head_dim index_head_dim attention_head_size global_head_dim d_rel qk_head_dim", 16),
    **_each("mamba_d_head mamba_headdim mamba_head_dim", 16),
    **_each("kv_lora_rank q_lora_rank o_lora_rank laurel_rank gated_norm_rank adapter_rank hc_lowrank", 16),
    **_each("qk_nope_head_dim qk_rope_head_dim rotary_dim", 8),
    **_each("num_experts n_routed_experts num_local_experts moe_num_experts", 4),
    **_each("num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts o_groups zero_expert_num", 2),
    **_each("n_shared_experts num_shared_experts moe_num_shared_experts num_expert_group n_group topk_group", 1),
    **_each("mamba_n_groups mamba_ngroups n_groups", 1),
    **_each("state_size mamba_d_state ssm_state_size time_step_rank mamba_dt_rank", 8),
    **_each("max_position_embeddings n_positions max_seq_len model_max_length max_target_positions", 128),
    **_each("context_length rel_extent max_source_positions", 128),
    **_each("sliding_window window_size attention_window_size sliding_window_size attention_chunk_size", WINDOW),
    **_each("local_attention local_attention_window_len keep_window_size", WINDOW),
    "index_topk_blocks": 2,
    "hidden_size_global": 64,
    **_each("chunk_size mamba_chunk_size index_topk index_block_size block_size", 4),
}
"""Field of a config -> its value in a small model, where the config has one."""
DEPTHS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers "
    "num_blocks"
).split()
GROUPS = (
    ("num_attention_heads", "num_key_value_heads"),
    ("swa_num_attention_heads", "swa_num_key_value_heads"),
    ("num_attention_heads", "num_kv_heads"),
)
"""Fields with the heads of queries, and of keys."""
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_INDEXER = {
    f"indexer_{name}": value
    for name, value in {"n_heads": 2, "kv_heads": 1, "head_dim": 16, "budget": 8, "compress_ratio": 2}.items()
}
NEEDED: dict[str, dict[str, Any]] = {
    **_types("axk1 deepseek_v3 youtu longcat_flash", head_dim=8),  # of the rotary part alone
    **_types("gemma3n_text gemma4_unified_text", num_kv_shared_layers=0),
    **_types("hunyuan_v1_dense hunyuan_v1_moe ministral", head_dim=16),
    **_types("qwen4_exp_text qwen4_exp", **_INDEXER),
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_audio_encoder": {"d_model": 64},
    "falcon_h1": {"mamba_d_ssm": 128},
    "hrm_text": {"H_cycles": 1, "L_cycles": 2, "L_bp_cycles": [2]},  # more of them, at this spread, are chaos
    "mamba2": {"num_heads": 8},
    "rwkv": {"attention_hidden_size": 64},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
    },
}
"""What a type cannot be built without, in these sizes."""
SHOWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    **_types("lfm2 lfm2_moe", num_hidden_layers=2, layer_types=["conv", "full_attention"]),
    "recurrent_gemma": {"num_hidden_layers": 3},
    **_types("cohere_compass_text dots1 mellum", layer_types=["full_attention", "sliding_attention"]),
    **_types(
        "qwen2 qwen2_moe qwen3 smollm3",
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": WINDOW},
}
"""What shows a kind of layer that the type has, but not by default."""


def small(config: PretrainedConfig, *, keep_vocabulary: bool = False, **options: Any) -> PretrainedConfig:
    """A config of the same kind: layers of width 64, one or more of every kind that it has.

    Args:
        config: left as it is.
        keep_vocabulary: whether the vocabulary, and the ids of its special tokens, stay.
        options: fields of the result.
    """
    given = config.to_dict()
    sizes = SMALL if keep_vocabulary else SMALL | OF_THE_VOCABULARY
    own = {name: sizes[name] for name, value in given.items() if name in sizes and value is not None}
    for heads, groups in GROUPS:
        if given.get(groups) is not None:
            own[groups] = 1 if given[groups] == 1 else 4 if given[groups] == given.get(heads) else 2
    own |= _layers(given)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            own[name] = small(part, keep_vocabulary=keep_vocabulary)
    own |= NEEDED.get(config.model_type, {}) | options
    usual = type(config)().to_dict()  # a None that the class replaces is not to be handed back to it
    left_out = ("per_layer_config", "transformers_version", "id2label", "label2id")
    kept = {name: value for name, value in given.items() if value is not None or usual.get(name) is not None}
    made: PretrainedConfig = type(config)(**{**{n: v for n, v in kept.items() if n not in left_out}, **own})
    return made


def _layers(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fewer layers, at most 6, of every kind at least one: what the lists with an entry a layer tell apart."""
    depth = next((given[name] for name in DEPTHS if given.get(name) is not None), None)
    if not isinstance(depth, int):
        return {}
    lists = {name: value for name, value in given.items() if isinstance(value, list) and len(value) == depth}
    told = [value for value in lists.values() if all(isinstance(x, str) or x in (0, 1) for x in value)]
    kinds = list(zip(*told, strict=True)) if told else [()] * depth
    kept = sorted({kinds.index(kind) for kind in kinds})[:6]
    while len(kept) < min(2, depth):
        kept = sorted({*kept, next(at for at in range(depth) if at not in kept)})
    fewer: dict[str, Any] = {name: len(kept) for name in DEPTHS if given.get(name) is not None}
    for name, value in given.items():
        if name in lists and not _are_layers(value):
            fewer[name] = [value[at] for at in kept]
        elif _are_layers(value) and name.endswith(("layers", "layer_ids", "idxs", "indices")):
            fewer[name] = [new for new, old in enumerate(kept) if old in value]
    return fewer


def _are_layers(value: Any) -> bool:
    """Whether a list has the numbers of some layers."""
    rising = isinstance(value, list) and all(type(x) is int for x in value) and sorted(set(value)) == value
    return rising and value not in ([0, 1], [0], [1], [])


def of_type(model_type: str) -> PretrainedConfig:
    """The small config of one of TYPES; whatever its class raises where it cannot be made."""
    return small(CONFIG_MAPPING[model_type](), **SHOWN.get(model_type, {}))


def build(
    config: PretrainedConfig, *, seed: int = 0, auto: Any = AutoModelForCausalLM, **options: Any
) -> PreTrainedModel:
    """A random model whose weights are far from the initialisation, in float32 and in eval mode.

    Args:
        config: its config.
        seed: of the draws, of which nothing outside sees anything.
        auto: transformers' factory.
        options: for its `from_config`.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config, **{"dtype": torch.float32, **options})
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * SPREAD)
    return model.eval()
