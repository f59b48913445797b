"""Tiny checkpoints with random weights, written without torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TOKENIZER = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": {"<eos>": 0, "a": 1, "b": 2}, "unk_token": "<eos>"},
}


def write_checkpoint(
    directory: Path,
    *,
    layers: int = 4,
    hidden: int = 16,
    vocab: int = 32,
    tied: bool = False,
    shards: int = 1,
    layout: str = "llama",
    **config: Any,
) -> Path:
    """A complete checkpoint; ``config`` overrides keys of config.json (None removes one)."""
    directory.mkdir(parents=True, exist_ok=True)
    facts = _llama_config(layers, hidden, vocab, tied) | {}
    tensors = _llama(layers, hidden, vocab, tied)
    if layout == "gpt2":
        facts, tensors = _gpt2_config(layers, hidden, vocab), _gpt2(layers, hidden, vocab)
    facts = {key: value for key, value in (facts | config).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(facts))
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for index in range(shards):
        name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def write_adapter(
    directory: Path,
    *,
    layers: int = 4,
    hidden: int = 16,
    rank: int = 2,
    seed: int = 0,
    module: str = "model.layers.{}.self_attn.q_proj",
    **config: Any,
) -> Path:
    """A LoRA adapter for ``write_checkpoint``, as peft writes them, with random weights.

    It adds to one square linear layer of each layer; ``config`` overrides adapter_config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    facts = {"peft_type": "LORA", "r": rank, "lora_alpha": 4 * rank, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(facts | config))
    random = np.random.default_rng(seed)
    tensors = {
        f"base_model.model.{module.format(layer)}.lora_{factor}.weight": random.normal(
            0, 0.3, (rank, hidden) if factor == "A" else (hidden, rank)
        ).astype(np.float32)
        for layer in range(layers)
        for factor in "AB"
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def _llama_config(layers: int, hidden: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


def _llama(layers: int, hidden: int, vocab: int, tied: bool) -> dict[str, np.ndarray]:
    kv = hidden // 2
    tensors = {"model.embed_tokens.weight": _f16(vocab, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.self_attn.q_proj.weight": _f16(hidden, hidden),
            f"{at}.self_attn.k_proj.weight": _f16(kv, hidden),
            f"{at}.self_attn.v_proj.weight": _f16(kv, hidden),
            f"{at}.self_attn.o_proj.weight": _f16(hidden, hidden),
            f"{at}.mlp.gate_proj.weight": _f16(2 * hidden, hidden),
            f"{at}.mlp.up_proj.weight": _f16(2 * hidden, hidden),
            f"{at}.mlp.down_proj.weight": _f16(hidden, 2 * hidden),
            f"{at}.input_layernorm.weight": _f16(hidden),
            f"{at}.post_attention_layernorm.weight": _f16(hidden),
        }
    tensors["model.norm.weight"] = _f16(hidden)
    if not tied:
        tensors["lm_head.weight"] = _f16(vocab, hidden)
    return tensors


def _gpt2_config(layers: int, hidden: int, vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": vocab,
    }


def _gpt2(layers: int, hidden: int, vocab: int) -> dict[str, np.ndarray]:
    tensors = {"wte.weight": _f16(vocab, hidden), "wpe.weight": _f16(64, hidden)}
    for layer in range(layers):
        tensors |= {
            f"h.{layer}.attn.bias": _f16(1, 1, 64, 64),
            f"h.{layer}.attn.c_attn.weight": _f16(hidden, 3 * hidden),
            f"h.{layer}.attn.c_attn.bias": _f16(3 * hidden),
            f"h.{layer}.mlp.c_fc.weight": _f16(hidden, 4 * hidden),
        }
    return tensors | {"ln_f.weight": _f16(hidden), "ln_f.bias": _f16(hidden)}


def _f16(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float16)
