"""Files that were fetched from other workers, kept for the next time.

One directory per model or adapter, named by its digest:

    manifest            what the model consists of: its files as workers tell each other
    config.json …       the small ones of them
    layer-00003.safetensors, layer-00003.sha256
                        a part, and the digests of its blocks
    head.safetensors.partial, head.sha256
                        a part that was begun, and the digests of the blocks that are there
    model.safetensors.index.json
                        which tensor is in which part, of the parts that are whole

Whoever uses a directory holds a lock beside it, which ends with its process: shared to read,
exclusive to add to it or to remove it. Several workers of a host may have one cache.
"""

import asyncio
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from google.protobuf.message import DecodeError
from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed

from uellm.core.errors import ModelFilesError
from uellm.logs import logger
from uellm.models import files
from uellm.models.manifest import WHOLE, Manifest, Part, StoredFile
from uellm.placement.explain import size
from uellm.v1 import files_pb2
from uellm_worker.files.part_file import PartFile, PartWriter

_log = logger("cache")
SPARE_BYTES = 256 << 20
"""Of a disk, what is left free."""
RECENT_SECONDS = 60.0
"""What was used so shortly before is not removed to make room."""
_LOCK_POLL_SECONDS = 0.05
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MANIFEST = "manifest"


@dataclass(slots=True)
class _Known:
    """What this process has read of a cache, and the stamps of the files then.

    Attributes:
        sound: parts whose blocks were checked.
        manifests: by directory.
    """

    sound: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    manifests: dict[Path, tuple[tuple[int, ...], Manifest]] = field(default_factory=dict)


class Entry:
    """What is here of one model or adapter; to be changed only under its lock.

    Args:
        directory: of the model.
        known: what was read of the cache; shared by entries.
    """

    def __init__(self, directory: Path, known: _Known) -> None:
        self.directory = directory
        self._known = known

    def manifest(self) -> Manifest | None:
        """What the model consists of; None if that is not known here, or damaged."""
        path, found = self.directory / _MANIFEST, []
        try:
            stat = path.stat()
            stamp = (stat.st_ino, stat.st_size)  # It is touched whenever it is used.
            known = self._known.manifests.get(path)
            if known is not None and known[0] == stamp:
                return known[1]
            stream = BytesIO(path.read_bytes())
            while message := parse_length_prefixed(files_pb2.ListFilesResponse, stream):
                found.append(file_from_proto(message))
            manifest = Manifest(tuple(found))
        except (OSError, DecodeError, ModelFilesError):
            return None
        self._known.manifests[path] = stamp, manifest
        return manifest

    def write_manifest(self, manifest: Manifest) -> None:
        """Note what the model consists of, and write its small files."""
        self.directory.mkdir(parents=True, exist_ok=True)
        stream = BytesIO()
        for file in manifest.files:
            serialize_length_prefixed(file_to_proto(file), stream)
            if not file.has_tensors:
                _write(self.directory / file.name, file.content)
        _write(self.directory / _MANIFEST, stream.getvalue())

    def part(self, part: Part) -> PartFile:
        """The file of a part."""
        return PartFile(self.directory, part)

    def writer(self, part: Part) -> PartWriter:
        """Begin a part, or go on with it. Blocks while what is there is checked."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return PartWriter(PartFile(self.directory, part))

    def check(self, part: Part) -> bool:
        """Whether a part is here, whole and undamaged; what is damaged is removed.

        All blocks are read, once in the life of the process unless the file changes.
        """
        file = PartFile(self.directory, part)
        stamp = file.stamp()
        if stamp is None:
            return False
        if self._known.sound.get(file.path) == stamp:
            return True
        if not file.sound():
            _log.warning("a damaged file is fetched again", path=str(file.path))
            file.remove()
            return False
        self._known.sound[file.path] = stamp
        return True

    def finish(self, manifest: Manifest) -> None:
        """Say where each tensor of a model is, of the parts that are whole."""
        self.touch()
        if WHOLE in manifest.parts:
            return
        whole = [part for part in manifest.parts.values() if self.part(part).stamp() is not None]
        index = {tensor.name: part.file for part in whole for tensor in part.tensors}
        content = json.dumps({"metadata": {}, "weight_map": index}, indent=1)
        _write(self.directory / files.INDEX, content.encode())

    def touch(self) -> None:
        """Note that it is used."""
        os.utime(self.directory / _MANIFEST)

    def remove(self) -> None:
        """Leave nothing of it."""
        shutil.rmtree(self.directory, ignore_errors=True)
        for known in (self._known.sound, self._known.manifests):
            for path in list(known):  # Other threads add to it.
                if path.parent == self.directory:
                    known.pop(path, None)

    @property
    def used_at(self) -> float:
        """When it was used last, in seconds since the epoch."""
        try:
            return (self.directory / _MANIFEST).stat().st_mtime
        except OSError:
            return 0.0

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        found = 0
        for path in self.directory.glob("*"):
            # Another process may be at work here: what was begun gets its name when it is whole.
            with suppress(FileNotFoundError):
                found += path.stat().st_size
        return found


class FileCache:
    """The files that a host's workers fetched.

    Args:
        directory: where they are; made when something is to be kept.
        most_bytes: what they may take together; 0: what the disk has.
        free_bytes: of the disk that a directory is on.
    """

    def __init__(
        self,
        directory: Path,
        most_bytes: int = 0,
        free_bytes: Callable[[Path], int] = lambda directory: shutil.disk_usage(directory).free,
    ) -> None:
        self.directory = directory
        self._most_bytes = most_bytes
        self._free_bytes = free_bytes
        self._known = _Known()

    def peek(self, digest: str) -> Entry:
        """What is here of a model, to be read without its lock: it may go at any time.

        Raises:
            ModelFilesError: if this is no digest.
        """
        if not _DIGEST.fullmatch(digest):
            raise ModelFilesError(f"{digest[:80]!r} is no digest of a model", field="digest")
        return Entry(self.directory / digest, self._known)

    @asynccontextmanager
    async def entry(self, digest: str) -> AsyncIterator["LockedEntry"]:
        """What is here of a model, locked; waits for whoever has it.

        Raises:
            ModelFilesError: if the cache cannot be written.
        """
        entry = self.peek(digest)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._lock_path(digest), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise unwritable(self.directory, error) from None
        try:
            while not _lock(lock, fcntl.LOCK_EX):  # noqa: ASYNC110 - of another process
                await asyncio.sleep(_LOCK_POLL_SECONDS)
            yield LockedEntry(entry, lock)
        finally:
            os.close(lock)

    def make_room(self, needed_bytes: int, kept: Entry, what: str) -> None:
        """Remove what was not used for the longest time, until so much more can be kept.

        Args:
            needed_bytes: still to be written.
            kept: not to be removed.
            what: the bytes are for, in errors.

        Raises:
            ModelFilesError: if there is not enough to be removed; nothing is then.
        """
        entries = sorted(self._entries(), key=lambda entry: entry.used_at)
        sizes = {entry.directory: entry.bytes for entry in entries}
        lacking = self._lacking(needed_bytes, sum(sizes.values()))
        going: list[tuple[Entry, int]] = []
        try:
            for entry in entries:
                if lacking <= 0:
                    break
                recent = time.time() - entry.used_at < RECENT_SECONDS
                if entry.directory == kept.directory or recent:
                    continue
                lock = os.open(
                    self._lock_path(entry.directory.name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                )
                going.append((entry, lock))
                if _lock(lock, fcntl.LOCK_EX):
                    lacking -= sizes[entry.directory]
                else:
                    os.close(going.pop()[1])
            if lacking > 0:
                raise self._full(needed_bytes, sum(sizes.values()), what)
            for entry, _ in going:
                _log.info("makes room", removed=str(entry.directory))
                entry.remove()
        finally:
            for _, lock in going:
                os.close(lock)

    def _lacking(self, needed_bytes: int, used_bytes: int) -> int:
        lacking = needed_bytes + SPARE_BYTES - self._free_bytes(self.directory)
        if self._most_bytes:
            lacking = max(lacking, used_bytes + needed_bytes - self._most_bytes)
        return lacking if needed_bytes else 0

    def _full(self, needed_bytes: int, used_bytes: int, what: str) -> ModelFilesError:
        free = self._free_bytes(self.directory)
        limit = f" of {size(self._most_bytes)} granted" if self._most_bytes else ""
        return ModelFilesError(
            f"{what} takes {size(needed_bytes)} more in {self.directory}; its disk has "
            f"{size(free)} free, of which {size(SPARE_BYTES)} stay so, and files that were fetched "
            f"before take {size(used_bytes)}{limit}; make room, name a directory on another disk "
            "(UELLM_WORKER_CACHE_DIRECTORY), or grant more (UELLM_WORKER_CACHE_BYTES)",
            reason="DISK_FULL",
        )

    def _entries(self) -> Iterable[Entry]:
        for path in self.directory.glob("*/"):
            if _DIGEST.fullmatch(path.name):
                yield Entry(path, self._known)

    def _lock_path(self, digest: str) -> Path:
        return self.directory / f"{digest}.lock"


class LockedEntry(Entry):
    """What is here of a model, for its only user.

    Args:
        entry: the same, not locked.
        lock: descriptor of the lock's file.
    """

    def __init__(self, entry: Entry, lock: int) -> None:
        super().__init__(entry.directory, entry._known)
        self._lock = lock

    def share(self) -> None:
        """Let others read as well."""
        _lock(self._lock, fcntl.LOCK_SH)


def unwritable(path: Path, error: OSError) -> ModelFilesError:
    """What says that a file of the cache cannot be written."""
    return ModelFilesError(
        f"{path} cannot be written ({error.strerror}); make room, or name a directory on another "
        "disk (UELLM_WORKER_CACHE_DIRECTORY)",
        reason="DISK_FULL" if error.errno == 28 else None,
    )


def file_to_proto(file: StoredFile) -> files_pb2.ListFilesResponse:
    """A file as workers tell each other of it."""
    return files_pb2.ListFilesResponse(
        name=file.name, size_bytes=file.size, content=file.content, has_tensors=file.has_tensors
    )


def file_from_proto(message: files_pb2.ListFilesResponse) -> StoredFile:
    """A file that another worker told of."""
    return StoredFile(message.name, message.size_bytes, message.content, message.has_tensors)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(path: Path, content: bytes) -> None:
    """Write a file, at once and whole; not if it is the same already."""
    try:
        if path.is_file() and path.read_bytes() == content:
            return
        draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
        try:
            draft.write_bytes(content)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None
