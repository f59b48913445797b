"""Which kinds of model are served."""

from pathlib import Path
from typing import Any

from uellm.core.errors import ModelFilesError

ARCHITECTURES = {
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "GemmaForCausalLM": "gemma",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}
"""Architectures whose sharded answers were found equal to the whole model's, and their types."""


def check_architecture(path: Path, config: dict[str, Any]) -> None:
    """Fail unless a model of this kind is served.

    Args:
        path: where the config was read, for the message.
        config: what config.json holds.

    Raises:
        ModelFilesError: naming the kind, and those that are served.
    """
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    if not architecture or ARCHITECTURES.get(architecture) != config.get("model_type"):
        raise ModelFilesError(
            f"{path}: architecture {architecture or '(none)'!r} of type "
            f"{config.get('model_type')!r} is not served; served are {', '.join(ARCHITECTURES)}"
        )
