"""Refuses kinds of model that are not served, and says why."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from uellm.core.errors import ModelFilesError
from uellm.models.families import Family, architectures, family

_OTHER_SENSES = ("vision_config", "audio_config", "vision_tower", "speech_config")


def check_architecture(path: Path, config: dict[str, Any]) -> Family:
    """The family that a config belongs to.

    Args:
        path: where the config was read, for the message.
        config: what config.json holds.

    Raises:
        ModelFilesError: naming the kind, why it is not served, and what is.
    """
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    found = family(architecture) if architecture else None
    if found is None or found.model_type != config.get("model_type"):
        raise ModelFilesError(
            f"{path}: architecture {architecture or '(none)'!r} of type "
            f"{config.get('model_type')!r} is not served: {_reason(architecture, config, found)}; "
            f"{_nearest(architecture)}; docs/models.md lists the {len(architectures())} that are"
        )
    if config.get("alibi"):
        raise ModelFilesError(
            f"{path}: alibi = true is not served: {_ALIBI}; use a checkpoint with rotary positions"
        )
    return found


def _nearest(architecture: str) -> str:
    """The names that are served and most like this one."""
    close = get_close_matches(architecture, architectures(), n=3, cutoff=0.0)
    return f"the nearest that are served: {', '.join(close)}"


_ALIBI = "attention with ALiBi biases is not implemented"


def _reason(architecture: str, config: dict[str, Any], found: Family | None) -> str:
    """What stands in the way of a kind of model."""
    if found is not None:
        return f"models of this architecture are of type {found.model_type!r}"
    if config.get("is_encoder_decoder"):
        return "it is an encoder and a decoder, and only decoders are served"
    if any(config.get(name) for name in _OTHER_SENSES):
        return "it takes images or sound, and only text is served; use its text model alone"
    if _has_alibi(config):
        return _ALIBI
    if architecture and not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "it is no causal language model"
    return "the architecture is unknown"


def _has_alibi(config: dict[str, Any]) -> bool:
    """A family, or a setting, that puts biases in the place of positions."""
    inner = config.get("attn_config")
    nested = isinstance(inner, dict) and inner.get("alibi")
    return bool(config.get("alibi") or nested or config.get("model_type") == "bloom")
