"""Lists the accelerators that torch drives, as JSON: for agents, which do not import torch.

``python -m uellm_worker.engine.accelerators`` prints ``{"torch": version, "devices": [...]}``, each
device with kind, index, name and memory_bytes (0: not known).
"""

import contextlib
import json
import sys
from typing import Any

import torch

from uellm_worker.engine.device import accelerators


def describe(device: str) -> dict[str, Any]:
    """An accelerator's facts."""
    kind, _, index = device.partition(":")
    name, memory = kind, 0
    # Not every backend knows its names and its memory, and they raise what they like.
    with contextlib.suppress(Exception):
        name = str(torch.get_device_module(kind).get_device_name(int(index)))
    with contextlib.suppress(Exception):
        memory = int(torch.accelerator.get_memory_info(int(index))[1])
    return {"kind": kind, "index": int(index), "name": name, "memory_bytes": memory}


if __name__ == "__main__":
    found = {"torch": torch.__version__, "devices": [describe(each) for each in accelerators()]}
    sys.stdout.write(json.dumps(found))
