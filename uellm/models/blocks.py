"""Tensors in blocks, each with a digest: what is checked wherever a tensor's bytes were moved."""

import hashlib
from collections.abc import Iterator

BLOCK_BYTES = 4 << 20
"""Of every block but a tensor's last."""
DIGEST_BYTES = hashlib.sha256().digest_size


def block_sizes(tensor_bytes: int) -> Iterator[int]:
    """Bytes of a tensor's blocks, in order; none of an empty tensor."""
    for start in range(0, tensor_bytes, BLOCK_BYTES):
        yield min(BLOCK_BYTES, tensor_bytes - start)


def num_blocks(tensor_bytes: int) -> int:
    """How many blocks a tensor has."""
    return -(-tensor_bytes // BLOCK_BYTES)


def block_digest(data: bytes | memoryview) -> bytes:
    """Of a block."""
    return hashlib.sha256(data).digest()
