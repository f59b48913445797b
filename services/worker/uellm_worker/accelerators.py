"""Accelerators other than NVIDIA's, found by asking torch in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

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


def find_accelerators(wanted: Mapping[str, int]) -> list[Accelerator]:
    """The accelerators of these names.

    Args:
        wanted: bytes of memory that each has, by name; 0: as torch says.

    Raises:
        ConfigurationError: if one is not there, saying what is.
    """
    if not wanted:
        return []
    version, there = _probe()
    found = []
    for name, told in wanted.items():
        if name not in there:
            nvml = "NVML finds no device, and " if name.startswith("cuda:") else ""
            raise ConfigurationError(
                f"UELLM_WORKER_DEVICES: {name} is not there: {nvml}torch {version} finds "
                f"{', '.join(there) or 'no accelerator'}; install the torch that drives it, or use "
                "cpu",
                field="devices",
            )
        memory_bytes = told or there[name].memory_bytes
        if not memory_bytes:
            raise ConfigurationError(
                f"UELLM_WORKER_DEVICES: torch {version} does not say how much memory {name} has, "
                f"and nothing can be planned without; say it, as {name}:memory=16GiB, or use cpu",
                field="devices",
            )
        found.append(replace(there[name], memory_bytes=memory_bytes))
    return found


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
