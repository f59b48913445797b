"""Tiny checkpoints of every family of models, with random weights."""

from pathlib import Path
from typing import Any

import torch
import transformers

LAYERS, VOCAB, CONTEXT = 4, 97, 96
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MHA = {"num_key_value_heads": 4}
HEAD = {"head_dim": 8}
SCALED = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.4,
}
# Windows are shorter than prompts and answers, so that they matter.
LOCAL = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "head_dim": 8,
}
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
HYBRID = {"layer_types": ["conv", "full_attention", "conv", "conv"]}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-mha": ("LlamaConfig", MHA | {"attention_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 11}),
    "qwen2": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    "qwen3": (
        "Qwen3Config",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
        },
    ),
    "gemma": ("GemmaConfig", HEAD),
    "gemma2": ("Gemma2Config", HEAD | {"sliding_window": 9, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", HEAD | LOCAL | {"query_pre_attn_scalar": 8}),
    "vaultgemma": ("VaultGemmaConfig", HEAD | LOCAL | {"query_pre_attn_scalar": 8}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {"sliding_window": 13}),
    "olmo": ("OlmoConfig", {"clip_qkv": 2.0}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", LOCAL),
    "smollm3": ("SmolLM3Config", {}),
    "granite": ("GraniteConfig", SCALED),
    "hyperclovax": ("HyperCLOVAXConfig", SCALED),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 7}),
    "stablelm": ("StableLmConfig", {}),
    "cohere": ("CohereConfig", {"logit_scale": 2.0}),
    "cohere2": ("Cohere2Config", LOCAL | {"logit_scale": 2.0}),
    "glm": ("GlmConfig", HEAD),
    "glm4": ("Glm4Config", HEAD),
    "exaone4": ("Exaone4Config", LOCAL),
    "seed_oss": ("SeedOssConfig", HEAD),
    "arcee": ("ArceeConfig", {}),
    "apertus": ("ApertusConfig", {}),
    "helium": ("HeliumConfig", HEAD),
    "ernie4_5": ("Ernie4_5Config", HEAD),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", HEAD),
    "nemotron": ("NemotronConfig", {}),
    "persimmon": ("PersimmonConfig", MHA),
    "jais2": ("Jais2Config", {}),
    "cwm": ("CwmConfig", HEAD | LOCAL),
    "ministral": ("MinistralConfig", HEAD | LOCAL),
    "ministral3": (
        "Ministral3Config",
        HEAD
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.5,
            }
        },
    ),
    "gpt2": ("GPT2Config", MHA | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode": ("GPTBigCodeConfig", {"n_inner": 48}),
    "gpt_bigcode-mha": ("GPTBigCodeConfig", MHA | {"n_inner": 48, "multi_query": False}),
    "gpt_neox": ("GPTNeoXConfig", MHA | {"rotary_pct": 0.5}),
    "gpt_neox-serial": ("GPTNeoXConfig", MHA | {"use_parallel_residual": False}),
    "opt": ("OPTConfig", MHA | {"ffn_dim": 48}),
    "opt-projected": (
        "OPTConfig",
        MHA | {"ffn_dim": 48, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    ),
    "falcon": ("FalconConfig", {}),
    "falcon-grouped": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon-serial": ("FalconConfig", {"multi_query": False, "parallel_attn": False}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": 11}),
    "qwen2_moe": ("Qwen2MoeConfig", MOE | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        MOE | {"head_dim": 16, "num_experts": 5, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "olmoe": ("OlmoeConfig", MOE),
    "flex_olmo": ("FlexOlmoConfig", MOE),
    "granitemoe": ("GraniteMoeConfig", SCALED | {"num_local_experts": 4}),
    "granitemoeshared": (
        "GraniteMoeSharedConfig",
        SCALED | {"num_local_experts": 4, "shared_intermediate_size": 24},
    ),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        HEAD | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    ),
    "glm4_moe": ("Glm4MoeConfig", ROUTED),
    "dots1": ("Dots1Config", ROUTED),
    "solar_open": ("SolarOpenConfig", ROUTED),
    "lfm2": ("Lfm2Config", HYBRID),
    "lfm2_moe": ("Lfm2MoeConfig", HYBRID | MOE | {"num_dense_layers": 1}),
    "bamba": ("BambaConfig", MAMBA2 | {"attn_layer_indices": [1]}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        SCALED
        | MAMBA2
        | {
            "layer_types": ["linear_attention"] * 2 + ["full_attention", "linear_attention"],
            "num_local_experts": 4,
            "shared_intermediate_size": 24,
            "position_embedding_type": "rope",
        },
    ),
    "granitemoehybrid-dense": (
        "GraniteMoeHybridConfig",
        MAMBA2
        | {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 24,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {"attention_window_size": 9, "block_types": ["recurrent", "attention", "recurrent"]},
    ),
}
"""Name of a config class and what to make it with, by family and variant."""
PROMPT_LENGTHS = (1, 5, 17, 30, 3, 41)


def save_model(directory: Path, family: str) -> Any:
    """Save a tiny model with random weights; returns it in float32."""
    name, fields = FAMILIES[family]
    config = getattr(transformers, name)(**{**BASE, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # Buffers too: some checkpoints store what is no parameter.
        for tensor in model.state_dict().values():
            if tensor.ndim > 1:
                tensor.normal_(0, 0.4)
            elif "norm" not in family:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(directory)
    return model.eval()


def prompts() -> list[list[int]]:
    """Six of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
