"""Accelerators other than NVIDIA's, found by asking torch in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from uellm.core.errors import ConfigurationError

PROBE_SECONDS = 120.0
"""Importing torch takes seconds, and much longer from a slow disk."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """An accelerator that torch drives.

    Attributes:
        name: ``<kind>:<index>``.
        description: for people.
        memory_bytes: what it has; 0: torch does not say.
    """

    name: str
    description: str
    memory_bytes: int


def find_accelerators(names: Sequence[str]) -> list[Accelerator]:
    """The accelerators of these names.

    Raises:
        ConfigurationError: if one is not there, saying what is.
    """
    if not names:
        return []
    version, there = _probe()
    for name in names:
        if name not in there:
            raise ConfigurationError(
                f"UELLM_WORKER_DEVICES: {name} is not there: torch {version} finds "
                f"{', '.join(there) or 'no accelerator'}; install the torch that drives it, or use "
                "cpu",
                field="devices",
            )
        if not there[name].memory_bytes:
            raise ConfigurationError(
                f"UELLM_WORKER_DEVICES: torch {version} does not say how much memory {name} has, "
                "and nothing can be planned without; use cpu",
                field="devices",
            )
    return [there[name] for name in names]


def _probe() -> tuple[str, dict[str, Accelerator]]:
    """Torch's version and its accelerators, by name."""
    command = [sys.executable, "-m", "uellm_worker.engine.accelerators"]
    try:
        answer = subprocess.run(  # noqa: S603 (this interpreter, fixed arguments)
            command, capture_output=True, timeout=PROBE_SECONDS, check=True, text=True
        )
        found = json.loads(answer.stdout)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().rpartition("\n")[2]
        raise ConfigurationError(
            f"UELLM_WORKER_DEVICES: torch cannot be asked for its accelerators: {said}; "
            "pip install 'uellm[worker]', or use cpu",
            field="devices",
        ) from None
    devices = [
        Accelerator(f"{each['kind']}:{each['index']}", each["name"], each["memory_bytes"])
        for each in found["devices"]
    ]
    return found["torch"], {device.name: device for device in devices}
