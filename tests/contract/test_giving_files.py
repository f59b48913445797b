"""What workers give to each other and to whom, how much at once, and how fast."""

import asyncio
import gc
import json
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from uellm_worker.files import drawing, receiving, sending
from uellm_worker.files.cache import FileCache
from uellm_worker.files.host import HostFiles

from tests.support.sharing import (
    SECRET,
    Host,
    Peer,
    host_at,
    model_ref,
    peer_with,
    random_checkpoint,
    same,
    secret,
    serving,
    stage,
    tensors_in,
)
from tests.support.waiting import HANG_SECONDS, eventually
from uellm.core.errors import ModelFilesError, ResourceExhaustedError, UnavailableError
from uellm.models import files
from uellm.models.safetensors import read_header
from uellm.rpc import channel
from uellm.v1 import common_pb2, files_pb2, files_pb2_grpc


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return random_checkpoint(tmp_path / "model", shards=3, layers=4)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return host_at(tmp_path / "cache")


async def test_only_files_of_a_checkpoint_are_read(model: Path) -> None:
    ref = model_ref(model)
    (model / "modeling_m.py").write_text("raise SystemExit")
    (model / "secrets.json").write_text("{}")
    peer = peer_with(model, "p", ref)
    metadata = (("authorization", f"Bearer {SECRET}"),)
    async with serving(peer), channel(peer.address) as connection:
        stub: Any = files_pb2_grpc.FilesServiceStub(connection)
        request = files_pb2.ListFilesRequest(digest=ref.digest)
        listed = {
            m.name async for m in stub.ListFiles(request, metadata=metadata, timeout=HANG_SECONDS)
        }
        assert listed == {*files.TEXTS, *(path.name for path in files.tensor_files(model))}
        for digest in ("../model", "/etc", "0" * 64, ""):
            request = files_pb2.ListFilesRequest(digest=digest)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [
                    m
                    async for m in stub.ListFiles(request, metadata=metadata, timeout=HANG_SECONDS)
                ]
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        for name in ("../../etc/passwd", "config.json", "secrets.json", str(model / "config.json")):
            wanted = files_pb2.FetchTensorsRequest(digest=ref.digest, tensors=[name])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [
                    m
                    async for m in stub.FetchTensors(
                        wanted, metadata=metadata, timeout=HANG_SECONDS
                    )
                ]
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        for skip in (1, 1 << 40):
            wanted = files_pb2.FetchTensorsRequest(
                digest=ref.digest, tensors=["model.norm.weight"], skip_bytes=skip
            )
            with pytest.raises(grpc.aio.AioRpcError, match="skip_bytes"):
                _ = [
                    m
                    async for m in stub.FetchTensors(
                        wanted, metadata=metadata, timeout=HANG_SECONDS
                    )
                ]


async def test_strangers_get_nothing(model: Path) -> None:
    ref = model_ref(model)
    peer = peer_with(model, "p", ref)
    async with serving(peer), channel(peer.address) as connection:
        stub: Any = files_pb2_grpc.FilesServiceStub(connection)
        for metadata in ((), (("authorization", "Bearer other"),), (("authorization", ""),)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.FindFiles(
                    files_pb2.FindFilesRequest(model=ref), metadata=metadata, timeout=HANG_SECONDS
                )
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            for method, request in (
                (stub.ListFiles, files_pb2.ListFilesRequest(digest=ref.digest)),
                (stub.FetchTensors, files_pb2.FetchTensorsRequest(digest=ref.digest)),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    _ = [m async for m in method(request, metadata=metadata, timeout=HANG_SECONDS)]
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_models_with_code_of_their_own_are_not_given_out(tmp_path: Path) -> None:
    model = random_checkpoint(tmp_path / "model", auto_map={"AutoModel": "modeling_x.X"})
    host = HostFiles(FileCache(tmp_path / "cache"))
    assert host.look(model_ref(model, str(model))) is None


async def test_workers_find_out_what_there_is(model: Path, tmp_path: Path) -> None:
    ref = model_ref(model)
    empty = Peer(HostFiles(FileCache(tmp_path / "none")), "empty")
    peer = Peer(HostFiles(FileCache(tmp_path / "none")), "has")
    metadata = (("authorization", f"Bearer {await secret()}"),)

    async def find(peer: Peer, ref: common_pb2.ModelRef) -> files_pb2.FindFilesResponse:
        async with channel(peer.address) as connection:
            stub: Any = files_pb2_grpc.FilesServiceStub(connection)
            request = files_pb2.FindFilesRequest(model=ref)
            answer: files_pb2.FindFilesResponse = await stub.FindFiles(
                request, metadata=metadata, timeout=HANG_SECONDS
            )
            return answer

    async with serving(peer, empty):
        assert await find(empty, ref) == files_pb2.FindFilesResponse()
        found = await find(peer, model_ref(model, str(model)))
        assert found.whole
        total = sum(tensor.nbytes for tensor in tensors_in(model).values())
        assert found.held_bytes == total


async def test_no_more_are_served_at_once_than_may_be(model: Path, tmp_path: Path) -> None:
    ref = model_ref(model)
    peer = peer_with(model, "p", ref, uploads=1)
    peer.gate = asyncio.Event()
    hosts = [host_at(tmp_path / f"cache{n}") for n in range(3)]
    async with serving(peer):
        fetching = [
            asyncio.create_task(host.fetch(stage(ref, (0, 3)), peer.holder(ref))) for host in hosts
        ]
        await eventually(lambda: peer.calls["FetchTensors"] >= 3)
        assert peer.sent == 0
        peer.gate.set()
        for task in fetching:
            assert same(tensors_in((await task).model), tensors_in(model))


class Busy(Peer):
    """Has no time for anybody, for as long as it says."""

    told_seconds: float

    async def FetchTensors(self, request: Any, context: Any) -> Any:
        self.calls["FetchTensors"] += 1
        raise ResourceExhaustedError("busy", retry_after_seconds=self.told_seconds)
        yield


@pytest.mark.parametrize("seconds", [1e9, -5.0, 0.0])
async def test_who_has_no_time_does_not_keep_others_from_giving(
    model: Path, host: Host, seconds: float
) -> None:
    ref = model_ref(model)
    good = peer_with(model, "good", ref)
    busy = [Busy(good.host, f"busy{n}") for n in range(3)]
    for one in busy:
        one.told_seconds = seconds
    async with serving(good, *busy), asyncio.timeout(HANG_SECONDS):
        holders = [peer.holder(ref) for peer in (*busy, good)]
        found = await host.fetch(stage(ref, (0, 3)), *holders)
    assert same(tensors_in(found.model), tensors_in(model))


async def test_who_has_no_time_is_asked_again_soon_whatever_it_says(
    model: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "MOST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(drawing, "LEAST_WAIT_SECONDS", 0.05)
    ref = model_ref(model)
    busy = Busy(peer_with(model, "good", ref).host, "busy")
    busy.told_seconds = 1e9
    async with serving(busy):
        fetching = asyncio.create_task(host.fetch(stage(ref, (0, 3)), busy.holder(ref)))
        await eventually(lambda: busy.calls["FetchTensors"] >= 3)
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)


async def test_a_caller_that_goes_away_is_let_go_at_once(model: Path) -> None:
    ref = model_ref(model)
    peer = peer_with(model, "p", ref, uploads=1)
    ended: list[bool] = []

    async def told(request: Any) -> Any:
        try:
            async with aclosing(tensors(request)) as messages:
                async for message in messages:
                    yield message
                    await asyncio.Event().wait()  # Whoever is called has nothing to wait for.
        finally:
            ended.append(True)

    tensors, peer._sender.tensors = peer._sender.tensors, told  # type: ignore[method-assign]
    names = list(tensors_in(model))
    metadata = (("authorization", f"Bearer {SECRET}"),)
    gc.disable()
    try:
        async with serving(peer), channel(peer.address) as connection:
            stub: Any = files_pb2_grpc.FilesServiceStub(connection)
            request = files_pb2.FetchTensorsRequest(digest=ref.digest, tensors=names)
            for number in range(1, 4):
                call = stub.FetchTensors(request, metadata=metadata, timeout=60)
                assert (await call.read()).data
                call.cancel()
                await eventually(lambda number=number: len(ended) == number)
    finally:
        gc.enable()


async def test_a_worker_may_give_nothing_out(model: Path, host: Host) -> None:
    ref = model_ref(model)
    peer = peer_with(model, "p", ref, uploads=0)
    async with serving(peer):
        with pytest.raises(ModelFilesError, match="p: this worker gives no files out"):
            await host.fetch(stage(ref, (0, 3)), peer.holder(ref))


async def test_a_worker_that_falls_silent_is_given_up(
    model: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough that who sends is not taken for silent where this process is held up.
    monkeypatch.setattr(receiving, "STALL_SECONDS", 3.0)
    ref = model_ref(model)
    silent, good = peer_with(model, "silent", ref), peer_with(model, "good", ref)
    silent.gate = asyncio.Event()
    async with serving(silent, good):
        found = await host.fetch(stage(ref, (0, 3)), silent.holder(ref), good.holder(ref))
        assert same(tensors_in(found.model), tensors_in(model))
        monkeypatch.setattr(receiving, "STALL_SECONDS", 0.2)
        with pytest.raises(UnavailableError, match=r"silent: nothing came for 0\.2 s"):
            await host.fetch(stage(ref, (0, 3), head=True), silent.holder(ref))


async def test_a_busy_worker_rests_between_blocks(
    model: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        rests.append(seconds)
        await real(0)

    monkeypatch.setattr(sending.asyncio, "sleep", sleep)
    ref = model_ref(model)
    peer = peer_with(model, "p", ref, busy=lambda: True)
    async with serving(peer):
        found = await host.fetch(stage(ref, (0, 3)), peer.holder(ref))
    assert len(rests) == len(tensors_in(found.model))
    assert min(rests) > 0


async def test_memory_is_bounded_whatever_the_tensor(tmp_path: Path, host: Host) -> None:
    model = random_checkpoint(tmp_path / "model", layers=1, vocab=33)
    large = 300 << 20
    header = {"model.layers.0.big": {"dtype": "U8", "shape": [large], "data_offsets": [0, large]}}
    raw = json.dumps(header).encode()
    with (model / "model-extra.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + large)  # Nothing is written: it reads as zeros.
    (model / "model.safetensors").rename(model / "model-first.safetensors")
    index = dict.fromkeys(read_header(model / "model-first.safetensors"), "model-first.safetensors")
    index["model.layers.0.big"] = "model-extra.safetensors"
    (model / files.INDEX).write_text(json.dumps({"weight_map": index}))
    ref = model_ref(model)
    peer = peer_with(model, "p", ref)
    process = psutil.Process()
    most = before = process.memory_info().rss

    def watch(message: files_pb2.FetchTensorsResponse) -> files_pb2.FetchTensorsResponse:
        nonlocal most
        most = max(most, process.memory_info().rss)
        return message

    peer.spoil = watch
    async with serving(peer):
        found = await host.fetch(stage(ref, (0, 0)), peer.holder(ref))
    assert (found.model / "layer-00000.safetensors").stat().st_size > large
    # Blocks on their way, and what the allocator keeps of them: not the tensor.
    assert most - before < large // 2
