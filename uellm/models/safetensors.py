"""Headers of safetensors files: which tensors, of which shape and dtype. Reads no tensor data.

The format: 8 bytes of little-endian length, that much JSON, then the tensors' bytes.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uellm.core.errors import ModelFilesError

# The format's own limit: more is not a header but something else.
MOST_HEADER_BYTES = 100_000_000
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header describes it.

    Attributes:
        dtype: as safetensors names it, for instance "F16".
        shape: its dimensions.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_header_bytes(path: Path) -> bytes:
    """The header of a file, unparsed.

    Raises:
        ModelFilesError: if the file cannot be read, or ends before its header does.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(_LENGTH.size)
            if len(prefix) < _LENGTH.size:
                raise _incomplete(path, "it ends within the first 8 bytes")
            (length,) = _LENGTH.unpack(prefix)
            if length > MOST_HEADER_BYTES:
                raise ModelFilesError(
                    f"{path} is not a safetensors file: its header claims {length} bytes, and "
                    f"{MOST_HEADER_BYTES} is the most that the format allows; download it again"
                )
            header = file.read(length)
    except OSError as error:
        raise ModelFilesError(f"{path} cannot be read: {error.strerror}") from None
    if len(header) < length:
        raise _incomplete(path, f"its header claims {length} bytes and {len(header)} are there")
    return header


def read_header(path: Path) -> Mapping[str, TensorInfo]:
    """The tensors of a file, by name.

    Raises:
        ModelFilesError: if the file is not a safetensors file, or is shorter than its header says.
    """
    raw = read_header_bytes(path)
    try:
        parsed: dict[str, Any] = json.loads(raw)
        parsed.pop("__metadata__", None)
        tensors = {
            name: TensorInfo(entry["dtype"], tuple(map(int, entry["shape"])))
            for name, entry in parsed.items()
        }
        end = max((int(entry["data_offsets"][1]) for entry in parsed.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise ModelFilesError(
            f"{path} is not a safetensors file: its header is not the JSON that the format asks "
            "for; download it again"
        ) from None
    wanted = _LENGTH.size + len(raw) + end
    size = path.stat().st_size
    if size < wanted:
        raise _incomplete(path, f"{size} bytes are there, its header lists tensors up to {wanted}")
    return tensors


def _incomplete(path: Path, what: str) -> ModelFilesError:
    return ModelFilesError(f"{path} is truncated: {what}; download or copy it again")
