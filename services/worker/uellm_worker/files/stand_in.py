"""Files that stand in for a model's: all but the numbers, to measure layers of its shape."""

import json
from pathlib import Path

from uellm.models import files
from uellm.models.manifest import Manifest
from uellm.models.safetensors import framed


def write_stand_in(manifest: Manifest, directory: Path) -> None:
    """Write a model's files with holes for its tensors, which take no room on a disk."""
    for file in manifest.files:
        with (directory / file.name).open("wb") as out:
            out.write(framed(file.content) if file.has_tensors else file.content)
            out.truncate(file.size)
    index = {tensor.name: tensor.file for tensor in manifest.tensors.values()}
    if set(index.values()) != {files.WEIGHTS}:
        (directory / files.INDEX).write_text(json.dumps({"weight_map": index}))
