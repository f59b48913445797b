"""Workers' files without the workers: what gives them out on a server, and what fetches them."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from safetensors.numpy import load_file, save_file
from uellm_worker.files.cache import FileCache
from uellm_worker.files.fetching import Fetcher
from uellm_worker.files.host import HostFiles
from uellm_worker.files.sending import Sender
from uellm_worker.files.servicer import FilesServicer
from uellm_worker.files.supply import Directories, Supply

from tests.support.checkpoints import write_checkpoint
from uellm.models import adapters, files
from uellm.models.blocks import block_digest, block_sizes
from uellm.models.manifest import Span, read_manifest
from uellm.rpc import SERVER_OPTIONS, ClosingInterceptor, ErrorInterceptor
from uellm.v1 import common_pb2, files_pb2, files_pb2_grpc, topology_pb2, worker_pb2

SECRET = "of the mesh"  # noqa: S105
NOWHERE = "/nowhere/model"


async def secret() -> str:
    """The mesh's."""
    return SECRET


def random_checkpoint(directory: Path, seed: int = 0, **config: Any) -> Path:
    """A tiny checkpoint whose tensors differ."""
    write_checkpoint(directory, **config)
    rng = np.random.default_rng(seed)
    for path in files.tensor_files(directory):
        tensors = load_file(path)
        save_file({n: rng.normal(size=t.shape).astype(t.dtype) for n, t in tensors.items()}, path)
    return directory


def model_ref(directory: Path, source: str = NOWHERE) -> common_pb2.ModelRef:
    """A model as it is deployed, for hosts that have it elsewhere or not at all."""
    return common_pb2.ModelRef(name="m", source=source, digest=files.digest(directory))


def adapter_ref(directory: Path, source: str = NOWHERE) -> common_pb2.ModelRef:
    """The same of an adapter."""
    return common_pb2.ModelRef(name="a", source=source, digest=adapters.digest(directory))


def stage(
    model: common_pb2.ModelRef,
    layers: tuple[int, int],
    *lora: common_pb2.ModelRef,
    embed: bool = False,
    head: bool = False,
) -> topology_pb2.ShardAssignment:
    """A stage of it."""
    return topology_pb2.ShardAssignment(
        deployment="m",
        replica="m-0",
        generation=1,
        stage_count=1,
        first_layer=layers[0],
        last_layer=layers[1],
        has_embed=embed,
        has_head=head,
        model=model,
        adapters=lora,
    )


@dataclass
class Peer(FilesServicer):
    """A worker that has files, and does with what it sends what it is told to.

    Attributes:
        spoil: what becomes of a message; None ends the call as if the worker died.
        sent: bytes of tensors that were sent.
        whole: of these, in blocks that were sent to their end.
        calls: how often each method was called.
    """

    host: HostFiles
    name: str
    uploads: int = 2
    busy: Callable[[], bool] = lambda: False
    spoil: Callable[[files_pb2.FetchTensorsResponse], Any] = lambda message: message
    gate: asyncio.Event | None = None
    sent: int = 0
    whole: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    address: str = ""

    def __post_init__(self) -> None:
        super().__init__(self.host, Sender(self.host, self.uploads, self.busy), secret)

    async def ListFiles(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        self.calls["ListFiles"] += 1
        async for message in super().ListFiles(request, context):
            yield message

    async def FetchTensors(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        self.calls["FetchTensors"] += 1
        async with aclosing(super().FetchTensors(request, context)) as messages:
            async for message in messages:
                if self.gate is not None:
                    await self.gate.wait()
                given = self.spoil(message)
                if given is None:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
                self.sent += len(given.data)
                self.whole = self.sent if given.sha256 else self.whole
                yield given

    def holder(self, *refs: common_pb2.ModelRef) -> worker_pb2.FilesHolder:
        """As the deployer names it."""
        digests = [ref.digest for ref in refs]
        return worker_pb2.FilesHolder(worker=self.name, address=self.address, digests=digests)


@asynccontextmanager
async def serving(*peers: Peer) -> AsyncIterator[None]:
    """Peers on servers of their own."""
    servers = []
    for peer in peers:
        server = grpc.aio.server(
            interceptors=[ClosingInterceptor(), ErrorInterceptor()], options=SERVER_OPTIONS
        )
        files_pb2_grpc.add_FilesServiceServicer_to_server(peer, server)
        peer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        servers.append(server)
    try:
        yield
    finally:
        await asyncio.gather(*(server.stop(0) for server in servers))


def peer_with(
    directory: Path, name: str, ref: common_pb2.ModelRef, *more: common_pb2.ModelRef, **facts: Any
) -> Peer:
    """A worker that has a model where it says, and adapters."""
    host = HostFiles(FileCache(directory.parent / f"cache-of-{name}"))
    here = common_pb2.ModelRef()
    here.CopyFrom(ref)
    here.source = str(directory)
    assert host.look(here) is not None
    for adapter in more:
        assert host.look(adapter, adapter=True) is not None
    return Peer(host, name, **facts)


@dataclass
class Host:
    """A host without files but those it fetches.

    Attributes:
        told: the bytes that it had, and had to have.
    """

    cache: FileCache
    told: list[tuple[int, int]] = field(default_factory=list)

    async def fetch(
        self, assignment: topology_pb2.ShardAssignment, *holders: worker_pb2.FilesHolder
    ) -> Directories:
        """Have a stage's files at hand, and let go of them."""
        supply = Supply(HostFiles(self.cache), Fetcher(self.cache, secret), allow_download=False)
        tell = lambda done, total: self.told.append((done, total))  # noqa: E731
        async with supply.at_hand(assignment, holders, tell) as found:
            return found


def host_at(directory: Path, **facts: Any) -> Host:
    """A host whose cache is in a directory."""
    return Host(FileCache(directory, **facts))


def copy_parts(source: Path, cache: FileCache, span: Span) -> Path:
    """A directory with those parts of a checkpoint that a stage needs, as if they were fetched."""
    manifest = read_manifest(source)
    entry = cache.peek(manifest.digest)
    entry.write_manifest(manifest)
    for name in manifest.needed(span):
        writer = entry.writer(manifest.parts[name])
        number = 0
        for tensor in writer.file.part.tensors:
            with (source / tensor.file).open("rb") as file:
                file.seek(tensor.start)
                for size in block_sizes(tensor.size):
                    block = file.read(size)
                    writer.put(number, memoryview(block))
                    writer.note(block_digest(block))
                    number += 1
        writer.finish()
        writer.close()
    entry.finish(manifest)
    return entry.directory


def tensors_in(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, by name."""
    return {n: t for path in files.tensor_files(directory) for n, t in load_file(path).items()}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return all(
        found[name].dtype == expected[name].dtype and np.array_equal(found[name], expected[name])
        for name in found
    )


def corrupt(message: files_pb2.FetchTensorsResponse) -> files_pb2.FetchTensorsResponse:
    if message.data:
        message.data = bytes([message.data[0] ^ 1]) + message.data[1:]
    return message
