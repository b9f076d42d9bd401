# ruff: noqa: C408
"""Tiny random checkpoints of real architectures, built from their configurations, with the tokenizer of `builtin:tiny`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 264
USUAL: Mapping[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
PLAIN = {key: value for key, value in USUAL.items() if key != "head_dim"}
ALL_HEADS = {**PLAIN, "num_key_value_heads": 2}
GPT = dict(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=2, n_positions=256, bos_token_id=2, eos_token_id=2)
MOE = {**USUAL, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
DEEPSEEK = {
    **PLAIN, "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 48, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "topk_method": "greedy", "n_shared_experts": 1,
}  # fmt: skip
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1}
LONGROPE = dict(
    rope_type="longrope", type="longrope", short_factor=[1.0] * 16, long_factor=[2.0 + 0.2 * i for i in range(16)],
    original_max_position_embeddings=32,
)  # fmt: skip

KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # dense
    "llama": ("llama", USUAL),
    "llama3_rope": ("llama", {**USUAL, "rope_scaling": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                                                           high_freq_factor=4.0, original_max_position_embeddings=64)}),
    "yarn": ("qwen2", {**PLAIN, "rope_scaling": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)}),
    "mistral": ("mistral", {**USUAL, "sliding_window": 8}),
    "qwen2": ("qwen2", PLAIN),
    "qwen3": ("qwen3", {**USUAL, "tie_word_embeddings": True}),
    "gemma": ("gemma", USUAL),
    "gemma2": ("gemma2", {**USUAL, "final_logit_softcapping": 5.0, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {**USUAL, "sliding_window": 8}),
    "phi": ("phi", ALL_HEADS),
    "phi3": ("phi3", {**PLAIN, "sliding_window": None}),
    "phi3_longrope": ("phi3", {**PLAIN, "sliding_window": None, "original_max_position_embeddings": 32,
                               "rope_scaling": LONGROPE}),
    "gpt2": ("gpt2", GPT),
    "gpt_neo": ("gpt_neo", dict(vocab_size=VOCABULARY, hidden_size=64, num_layers=2, num_heads=2, window_size=8,
                                attention_types=[[["global", "local"], 1]], max_position_embeddings=256, bos_token_id=2,
                                eos_token_id=2)),
    "gpt_neox": ("gpt_neox", ALL_HEADS),
    "gptj": ("gptj", {**GPT, "rotary_dim": 16}),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "opt": ("opt", dict(vocab_size=VOCABULARY, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=3,
                        num_attention_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)),
    "olmo2": ("olmo2", ALL_HEADS),
    "olmo3": ("olmo3", {**ALL_HEADS, "sliding_window": 8}),
    "smollm3": ("smollm3", PLAIN),
    "starcoder2": ("starcoder2", PLAIN),
    "stablelm": ("stablelm", ALL_HEADS),
    "glm4": ("glm4", USUAL),
    "ernie4_5": ("ernie4_5", USUAL),
    "hunyuan": ("hunyuan_v1_dense", USUAL),
    "helium": ("helium", USUAL),
    "arcee": ("arcee", USUAL),
    "exaone4": ("exaone4", {**PLAIN, "sliding_window": 8, "sliding_window_pattern": 2}),
    "seed_oss": ("seed_oss", USUAL),
    "nemotron": ("nemotron", USUAL),
    "apertus": ("apertus", USUAL),
    "minicpm3": ("minicpm3", {**ALL_HEADS, "kv_lora_rank": 16, "q_lora_rank": 32, "qk_nope_head_dim": 16,
                              "qk_rope_head_dim": 16, "v_head_dim": 32, "scale_emb": 12, "scale_depth": 1.4,
                              "dim_model_base": 32}),
    # a scale after the output layer
    "granite": ("granite", {**PLAIN, "logits_scaling": 8.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.5}),
    "cohere": ("cohere", {**PLAIN, "logit_scale": 0.25}),
    "cohere2": ("cohere2", {**USUAL, "logit_scale": 0.25, "sliding_window": 8}),
    # relative positions in the scores
    "bloom": ("bloom", dict(vocab_size=VOCABULARY, hidden_size=64, n_layer=3, n_head=2, bos_token_id=1, eos_token_id=2)),
    "mpt": ("mpt", dict(vocab_size=VOCABULARY, d_model=64, n_layers=3, n_heads=2, expansion_ratio=2, max_seq_len=256)),
    "falcon": ("falcon", dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
                              multi_query=True, alibi=False, parallel_attn=True, new_decoder_architecture=False,
                              bos_token_id=2, eos_token_id=2)),
    "falcon_alibi": ("falcon", dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
                                    multi_query=False, alibi=True, parallel_attn=False, bos_token_id=2, eos_token_id=2)),
    # experts
    "mixtral": ("mixtral", MOE),
    "qwen2_moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "olmoe": ("olmoe", {**MOE, "num_key_value_heads": 2}),
    "glm4_moe": ("glm4_moe", {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "gpt_oss": ("gpt_oss", {**MOE, "sliding_window": 8}),
    "granitemoe": ("granitemoe", {**PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0}),
    "phimoe": ("phimoe", {**PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # state-space, convolution, linear attention
    "qwen3_5": ("qwen3_5_text", {**USUAL, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
                                 "linear_key_head_dim": 32, "linear_value_head_dim": 32}),
    "qwen3_next": ("qwen3_next", {**MOE, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
                                  "linear_key_head_dim": 32, "linear_value_head_dim": 32,
                                  "shared_expert_intermediate_size": 48}),
    "lfm2": ("lfm2", {**PLAIN, "num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"],
                      "block_dim": 64, "conv_dim": 64, "conv_L_cache": 3, "block_ff_dim": 96}),
    "falcon_h1": ("falcon_h1", {**PLAIN, **MAMBA, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "bamba": ("bamba", {**PLAIN, **MAMBA, "attn_layer_indices": [1]}),
    "granite_hybrid": ("granitemoehybrid", {**PLAIN, **MAMBA, "layer_types": ["mamba", "attention", "mamba"],
                                            "num_local_experts": 0, "num_experts_per_tok": 0, "logits_scaling": 2.0,
                                            "shared_intermediate_size": 96}),
    "jamba": ("jamba", {**PLAIN, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
                        "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
    "mamba": ("mamba", dict(vocab_size=VOCABULARY, hidden_size=64, state_size=8, num_hidden_layers=2, time_step_rank=4)),
    "mamba2": ("mamba2", dict(vocab_size=VOCABULARY, hidden_size=64, state_size=8, num_hidden_layers=2, num_heads=4,
                              head_dim=32, n_groups=1, chunk_size=16)),
    "recurrent_gemma": ("recurrent_gemma", {**USUAL, "attention_window_size": 16, "lru_width": 64, "logits_soft_cap": 5.0}),
    "minimax": ("minimax", {**MOE, "block_size": 8}),
    # inputs beyond the tokens of the text
    "gemma3n": ("gemma3n_text", {**USUAL, "num_hidden_layers": 4, "vocab_size_per_layer_input": VOCABULARY,
                                 "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0,
                                 "activation_sparsity_pattern": [0.0] * 4, "final_logit_softcapping": 5.0}),
    "gemma4_text": ("gemma4_text", {**USUAL, "num_hidden_layers": 4, "sliding_window": 8, "final_logit_softcapping": 5.0,
                                    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
                                    "global_head_dim": 32}),
}  # fmt: skip


def write_family(name: str, folder: Path, **changes: Any) -> Path:
    """Write the tiny checkpoint of a family with its tokenizer; weights are large enough that each layer matters."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from rayrlhf.models.tiny import byte_tokenizer

    kind, options = KINDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**options, **changes}), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(std=0.12)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
