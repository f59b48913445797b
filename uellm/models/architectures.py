"""Refuses kinds of model that are not served."""

from pathlib import Path
from typing import Any

from uellm.core.errors import ModelFilesError
from uellm.models.families import Family, architectures, family


def check_architecture(path: Path, config: dict[str, Any]) -> Family:
    """The family that a config belongs to.

    Args:
        path: where the config was read, for the message.
        config: what config.json holds.

    Raises:
        ModelFilesError: naming the kind, and those that are served, if it is not served.
    """
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    found = family(architecture) if architecture else None
    if found is None or found.model_type != config.get("model_type"):
        raise ModelFilesError(
            f"{path}: architecture {architecture or '(none)'!r} of type "
            f"{config.get('model_type')!r} is not served; served are {', '.join(architectures())}"
        )
    return found
