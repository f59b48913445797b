"""What a model needs, from its config alone: for plans before there are weights.

Of decoders with gated or plain MLPs, with or without experts, with heads of their own or latent
ones; anything else is read from a checkpoint (``uellm.models.profile``), which this agrees with to
a few norms.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uellm.core.errors import ModelFilesError
from uellm.core.model import LayerProfile, ModelProfile
from uellm.models.attention import read_attention
from uellm.models.families import Number
from uellm.models.files import CONFIG, read_json
from uellm.models.profile import EXPERTS, dtype_bytes

_PLAIN_MLP = {"gpt2", "gpt_neox", "opt", "starcoder2", "phi", "gptj", "falcon"}


def _shape(
    layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, vocab: int, **more: Any
) -> Mapping[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        **more,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": _shape(32, 4096, 32, 32, 11008, 32000),
    "llama-2-13b": _shape(40, 5120, 40, 40, 13824, 32000),
    "llama-2-70b": _shape(80, 8192, 64, 8, 28672, 32000),
    "llama-3-8b": _shape(32, 4096, 32, 8, 14336, 128256, max_position_embeddings=8192),
    "llama-3-70b": _shape(80, 8192, 64, 8, 28672, 128256, max_position_embeddings=8192),
    "llama-3-405b": _shape(126, 16384, 128, 8, 53248, 128256, max_position_embeddings=8192),
    "chatglm2-6b": _shape(28, 4096, 32, 2, 13696, 65024, max_position_embeddings=8192),
    "mistral-7b": _shape(32, 4096, 32, 8, 14336, 32000, max_position_embeddings=8192),
    "mixtral-8x7b": _shape(
        *(32, 4096, 32, 8, 14336, 32000),
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=8192,
    ),
    "qwen2.5-0.5b": _shape(
        24, 896, 14, 2, 4864, 151936, tie_word_embeddings=True, max_position_embeddings=8192
    ),
    "qwen2.5-32b": _shape(64, 5120, 40, 8, 27648, 152064, max_position_embeddings=8192),
}
"""Of well-known models, by name."""


_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": SHAPES["llama-2-7b"],
    "mistral": SHAPES["mistral-7b"],
    "gemma3_text": _shape(
        *(26, 2304, 8, 4, 9216, 262_208),
        head_dim=256,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
    ),
}
"""What configs of models with images leave out of their decoder's, by its model_type."""


def decoder_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the decoder: all of it, or its ``text_config``."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    shared = {
        name: config[name] for name in ("architectures", "tie_word_embeddings") & config.keys()
    }
    return {**_DEFAULTS.get(str(text.get("model_type")), {}), **text, **shared}


def read_decoder_shape(directory: Path, dtype: str) -> ModelProfile:
    """What the decoder of a model needs that takes images, or of any other, by its config alone.

    Raises:
        InvalidArgumentError: for a dtype that is not offered.
        ModelFilesError: naming the file and what it lacks.
    """
    path = directory / CONFIG
    config = read_json(path, "name a directory that holds a model")
    return profile_of_shape(decoder_config(config), dtype, str(path))


def read_shape(path: Path, dtype: str) -> ModelProfile:
    """What a model needs by its ``config.json``.

    Raises:
        InvalidArgumentError: for a dtype that is not offered.
        ModelFilesError: naming the file and what it lacks.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path}: {error}; name a model's config.json") from None
    if not isinstance(content, dict):
        raise ModelFilesError(f"{path}: not an object; name a model's config.json")
    return profile_of_shape(content, dtype, str(path))


def profile_of_shape(config: Mapping[str, Any], dtype: str, source: str) -> ModelProfile:
    """What a model of a shape needs.

    Args:
        config: as of transformers.
        dtype: compute dtype.
        source: where it was read, for messages.

    Raises:
        InvalidArgumentError: for a dtype that is not offered.
        ModelFilesError: naming what is missing.
    """
    size = dtype_bytes(dtype)

    def number(*names: str, default: int | None = None) -> int:
        for name in names:
            value = config.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        if default is None:
            raise ModelFilesError(f"{source} has no {names[0]}; it describes no decoder")
        return default

    hidden, vocab = number("hidden_size", "n_embd"), number("vocab_size")
    plain = config.get("model_type") in _PLAIN_MLP
    return ModelProfile(
        layers=_layers(number, size, matrices=2 if plain else 3),
        embed_bytes=vocab * hidden * size,
        head_bytes=(vocab + 1) * hidden * size,
        tied=bool(config.get("tie_word_embeddings", plain)),
        activation_bytes_per_token=hidden * size,
        max_tokens=number("max_position_embeddings", "n_positions", "n_ctx"),
        vocab_size=vocab,
        hidden_size=hidden,
        architecture=str((config.get("architectures") or [""])[0]),
        stored_dtype=dtype,
    )


def _layers(number: Number, size: int, matrices: int) -> tuple[LayerProfile, ...]:
    """All layers; of a mixture of experts the first may be dense."""
    layers, hidden = number("num_hidden_layers", "n_layer"), number("hidden_size", "n_embd")
    attention = read_attention(number)
    experts = number(*EXPERTS, default=1)
    used = number("num_experts_per_tok", default=1) if experts > 1 else 1
    shared = number("n_shared_experts", default=0) if experts > 1 else 0
    dense = matrices * hidden * number("intermediate_size", "n_inner", default=4 * hidden)
    wide = number("moe_intermediate_size", "intermediate_size", "n_inner", default=4 * hidden)
    expert, router = matrices * hidden * wide, hidden * experts if experts > 1 else 0

    def layer(held: int, met: int) -> LayerProfile:
        return LayerProfile(
            weight_bytes=(attention.weights + held + 2 * hidden) * size,
            kv_bytes_per_token=attention.cached * size,
            flops_per_token=2.0 * (attention.weights + met),
        )

    mixed = layer((experts + shared) * expert + router, (used + shared) * expert + router)
    first = min(number("first_k_dense_replace", default=0), layers) if experts > 1 else 0
    return (layer(dense, dense),) * first + (mixed,) * (layers - first)
