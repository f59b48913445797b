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
        start: where its bytes begin, counted from the end of the header.
        end: where they end.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.start


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
    tensors = parse_header(raw, str(path))
    wanted = data_start(raw) + max((tensor.end for tensor in tensors.values()), default=0)
    size = path.stat().st_size
    if size < wanted:
        raise _incomplete(path, f"{size} bytes are there, its header lists tensors up to {wanted}")
    return tensors


def parse_header(raw: bytes, where: str) -> dict[str, TensorInfo]:
    """The tensors of a file by name, in the header's order.

    Args:
        raw: the header.
        where: names the file in errors.

    Raises:
        ModelFilesError: if it is no header.
    """
    try:
        parsed: dict[str, Any] = json.loads(raw)
        parsed.pop("__metadata__", None)
        tensors = {
            name: TensorInfo(
                entry["dtype"], tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"])
            )
            for name, entry in parsed.items()
        }
        sound = all(0 <= tensor.start <= tensor.end for tensor in tensors.values())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        sound = False
    if not sound:
        raise ModelFilesError(
            f"{where} is not a safetensors file: its header is not the JSON that the format asks "
            "for; download it again"
        )
    return tensors


def data_start(header: bytes) -> int:
    """Where the tensors of a file begin that has this header."""
    return _LENGTH.size + len(header)


def framed(header: bytes) -> bytes:
    """A header as files begin with it."""
    return _LENGTH.pack(len(header)) + header


def _incomplete(path: Path, what: str) -> ModelFilesError:
    return ModelFilesError(f"{path} is truncated: {what}; download or copy it again")
