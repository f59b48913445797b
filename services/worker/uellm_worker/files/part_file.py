"""The file of a part: written block by block, and checked by their digests."""

import os
import threading
from itertools import accumulate
from pathlib import Path

from uellm.models.blocks import DIGEST_BYTES, block_digest, block_sizes
from uellm.models.manifest import Part


class PartFile:
    """Where a part of a model is, or is to be.

    Args:
        directory: of the model.
        part: which.

    Attributes:
        path: of the part, once it is whole.
        part: which.
        blocks: bytes of its blocks, in the order in which they are stored.
    """

    def __init__(self, directory: Path, part: Part) -> None:
        self.path = directory / part.file
        self.part = part
        self.blocks = tuple(n for tensor in part.tensors for n in block_sizes(tensor.size))

    @property
    def partial(self) -> Path:
        """Where it is while it is written."""
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def digests_path(self) -> Path:
        """Where the digests of its blocks are."""
        return self.path.with_suffix(".sha256")

    @property
    def offsets(self) -> list[int]:
        """Where in the file each block begins; behind them, where the last one ends."""
        return list(accumulate(self.blocks, initial=self.part.file_bytes - sum(self.blocks)))

    def digests(self) -> list[bytes]:
        """Of the blocks that are there, in order."""
        try:
            content = self.digests_path.read_bytes()
        except FileNotFoundError:
            return []
        whole = len(content) // DIGEST_BYTES
        return [content[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES] for i in range(whole)]

    def stamp(self) -> tuple[int, ...] | None:
        """Changes when the file does; None if it is not there, or not whole."""
        try:
            stat = self.path.stat()
            digests = self.digests_path.stat()
        except FileNotFoundError:
            return None
        sizes = (self.part.file_bytes, len(self.blocks) * DIGEST_BYTES)
        if (stat.st_size, digests.st_size) != sizes:
            return None
        return (stat.st_ino, stat.st_mtime_ns, digests.st_ino, digests.st_mtime_ns)

    def sound(self) -> bool:
        """Whether the header and all blocks of the whole file are as they were written."""
        return self.num_sound(self.path) == len(self.blocks)

    def num_sound(self, path: Path) -> int:
        """Of the blocks that a file should have, how many come before one that is not right."""
        offsets = self.offsets
        try:
            with path.open("rb") as file:
                if file.read(offsets[0]) != self.part.head:
                    return 0
                sound = 0
                for size, digest in zip(self.blocks, self.digests(), strict=False):
                    if block_digest(file.read(size)) != digest:
                        break
                    sound += 1
                return sound
        except FileNotFoundError:
            return 0

    def remove(self) -> None:
        """Leave nothing of it."""
        for path in (self.path, self.partial, self.digests_path):
            path.unlink(missing_ok=True)


class PartWriter:
    """Writes a part, from the first block on that is not there.

    Blocks may be put in any order, and are noted in theirs.

    Args:
        file: of the part. What is there of it is checked.

    Attributes:
        done: blocks that are there and noted.
    """

    def __init__(self, file: PartFile) -> None:
        self.file = file
        self._offsets = file.offsets
        self._open = threading.Lock()
        self.done = file.num_sound(file.partial)
        self._data = os.open(file.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._digests = os.open(file.digests_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.pwrite(self._data, file.part.head, 0)
        os.ftruncate(self._digests, self.done * DIGEST_BYTES)

    @property
    def complete(self) -> bool:
        """Whether all blocks are there."""
        return self.done == len(self.file.blocks)

    @property
    def done_bytes(self) -> int:
        """Of the blocks that are there and noted."""
        return self._offsets[self.done] - self._offsets[0]

    def put(self, number: int, block: memoryview) -> None:
        """Write a block; it may be written again until it is noted."""
        left, offset = block, self._offsets[number]
        with self._open:
            # A thread that nobody waits for any more comes too late, and writes nothing.
            while left and self._data >= 0:
                written = os.pwrite(self._data, left, offset)
                left, offset = left[written:], offset + written

    def note(self, digest: bytes) -> None:
        """The next block is there, with this digest."""
        os.pwrite(self._digests, digest, self.done * DIGEST_BYTES)
        self.done += 1

    def finish(self) -> None:
        """The part is whole."""
        self.file.partial.replace(self.file.path)

    def close(self) -> None:
        """Leave it as it is."""
        with self._open:
            os.close(self._data)
            os.close(self._digests)
            self._data = self._digests = -1
