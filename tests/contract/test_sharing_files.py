"""Workers give each other model files: checked, resumed, bounded, and to their mesh only."""

import asyncio
import gc
import json
import os
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file
from uellm_worker.files import drawing, receiving, sending
from uellm_worker.files.cache import SPARE_BYTES, FileCache, file_to_proto
from uellm_worker.files.fetching import Fetcher
from uellm_worker.files.host import HostFiles
from uellm_worker.files.part_file import PartFile
from uellm_worker.files.supply import Supply

from tests.support.checkpoints import write_adapter
from tests.support.sharing import (
    SECRET,
    Host,
    Peer,
    adapter_ref,
    host_at,
    model_ref,
    peer_with,
    random_checkpoint,
    secret,
    serving,
    stage,
)
from tests.support.waiting import HANG_SECONDS, eventually
from uellm.core.errors import ModelFilesError, ResourceExhaustedError, UnavailableError
from uellm.models import adapters, blocks, files, manifest
from uellm.models.manifest import Manifest, read_manifest
from uellm.models.safetensors import read_header
from uellm.rpc import channel
from uellm.v1 import common_pb2, files_pb2, files_pb2_grpc

BLOCK = 4096


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return random_checkpoint(tmp_path / "model", shards=3, layers=4)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return host_at(tmp_path / "cache")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and messages so small that tiny tensors have several."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(sending, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(sending, "MESSAGE_BYTES", BLOCK // 4)


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


def dying_after(num_messages: int) -> Any:
    """A worker that is killed while it sends."""
    left = iter(range(num_messages))
    return lambda message: None if next(left, None) is None else message


async def test_a_stage_gets_its_own_tensors_and_no_others(model: Path, host: Host) -> None:
    ref = model_ref(model)
    peer = peer_with(model, "p", ref)
    async with serving(peer):
        found = await host.fetch(stage(ref, (1, 2)), peer.holder(ref))
        held = tensors_in(found.model)
        assert same(held, tensors_in(model))
        layers = {name for name in tensors_in(model) if ".1." in name or ".2." in name}
        assert held.keys() == layers | {"model.norm.weight"}
        assert (
            json.loads((found.model / files.INDEX).read_bytes())["weight_map"].keys() == held.keys()
        )
        total = sum(tensor.nbytes for tensor in held.values())
        assert peer.sent == total
        assert host.told[0] == (0, total)
        assert host.told[-1] == (total, total)
        for name in files.TEXTS:
            assert (found.model / name).read_bytes() == (model / name).read_bytes()
        # What is there already is not fetched again for a stage that overlaps.
        await host.fetch(stage(ref, (2, 3), head=True), peer.holder(ref))
        more = tensors_in(found.model)
        assert peer.sent == sum(tensor.nbytes for tensor in more.values())
        assert more.keys() - held.keys() == {
            name for name in tensors_in(model) if ".3." in name or name.startswith("lm_head")
        }


@pytest.mark.parametrize(("tied", "head"), [(True, {"embedding"}), (False, {"head"})])
def test_ends_of_a_model_need_what_they_share(tmp_path: Path, tied: bool, head: set[str]) -> None:
    found = read_manifest(random_checkpoint(tmp_path / "m", tied=tied))
    whole = {"rest", "0", "1", "2", "3"}
    assert set(found.needed(manifest.Span(0, 3, False, False))) == whole
    assert set(found.needed(manifest.Span(0, 3, True, False))) == whole | {"embedding"}
    assert set(found.needed(manifest.Span(0, 3, False, True))) == whole | head


async def test_what_was_fetched_serves_again_without_anybody(model: Path, host: Host) -> None:
    ref = model_ref(model)
    peer = peer_with(model, "p", ref)
    async with serving(peer):
        await host.fetch(stage(ref, (0, 3), embed=True, head=True), peer.holder(ref))
    again = host_at(host.cache.directory)  # as after a start
    found = await again.fetch(stage(ref, (0, 3), embed=True, head=True))
    assert same(tensors_in(found.model), tensors_in(model))
    assert tensors_in(found.model).keys() == tensors_in(model).keys()
    assert again.told == []


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("damage", ["flipped", "cut", "digests"])
async def test_a_damaged_part_is_found_and_fetched_again(
    model: Path, host: Host, damage: str
) -> None:
    ref = model_ref(model)
    peer = peer_with(model, "p", ref)
    async with serving(peer):
        found = await host.fetch(stage(ref, (0, 3)), peer.holder(ref))
        part = found.model / "layer-00002.safetensors"
        content = part.read_bytes()
        if damage == "flipped":
            part.write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
        elif damage == "cut":
            part.write_bytes(content[:-5])
        else:
            part.with_suffix(".sha256").write_bytes(b"")
        sent = peer.sent
        again = host_at(host.cache.directory)
        await again.fetch(stage(ref, (0, 3)), peer.holder(ref))
        assert part.read_bytes() == content
        tensors = read_manifest(model).parts["2"].tensor_bytes
        assert peer.sent - sent == tensors


async def test_what_is_damaged_on_the_way_comes_from_another(model: Path, host: Host) -> None:
    ref = model_ref(model)
    bad, good = peer_with(model, "bad", ref, spoil=corrupt), peer_with(model, "good", ref)
    async with serving(bad, good):
        found = await host.fetch(stage(ref, (0, 3)), bad.holder(ref), good.holder(ref))
    assert same(tensors_in(found.model), tensors_in(model))
    assert bad.calls["FetchTensors"] == 1  # It is trusted no more.


async def test_what_is_damaged_everywhere_is_refused(model: Path, host: Host) -> None:
    ref = model_ref(model)
    one, two = (peer_with(model, name, ref, spoil=corrupt) for name in ("one", "two"))
    async with serving(one, two):
        with pytest.raises(ModelFilesError) as caught:
            await host.fetch(stage(ref, (0, 3)), one.holder(ref), two.holder(ref))
    for said in ("/nowhere/model", "one: block 0 of", "two: block 0 of", "SHA-256", "uellm up"):
        assert said in caught.value.message
    entry = host.cache.peek(ref.digest)
    assert not list(entry.directory.glob("layer-*.safetensors"))


@pytest.mark.usefixtures("small_blocks")
async def test_another_goes_on_where_one_was_killed(tmp_path: Path, host: Host) -> None:
    model = random_checkpoint(tmp_path / "model", hidden=64, layers=2)
    ref = model_ref(model)
    first, second = peer_with(model, "1", ref, spoil=dying_after(21)), peer_with(model, "2", ref)
    second.gate = asyncio.Event()
    async with serving(first, second):
        fetching = asyncio.create_task(
            host.fetch(stage(ref, (0, 1)), first.holder(ref), second.holder(ref))
        )
        await eventually(lambda: any(done >= first.whole > 0 for done, _ in host.told))
        second.gate.set()
        found = await fetching
    assert same(tensors_in(found.model), tensors_in(model))
    # Blocks that were whole are not sent again.
    total = sum(tensor.nbytes for tensor in tensors_in(found.model).values())
    assert second.sent == total - first.whole


@pytest.mark.usefixtures("small_blocks")
async def test_what_was_fetched_before_all_were_killed_is_kept(tmp_path: Path, host: Host) -> None:
    model = random_checkpoint(tmp_path / "model", hidden=64, layers=2)
    ref = model_ref(model)
    dying, good = peer_with(model, "1", ref, spoil=dying_after(21)), peer_with(model, "2", ref)
    async with serving(dying, good):
        with pytest.raises(UnavailableError, match=r"1: killed.*goes on where it stopped"):
            await host.fetch(stage(ref, (0, 1)), dying.holder(ref))
        again = host_at(host.cache.directory)  # as after a start
        found = await again.fetch(stage(ref, (0, 1)), good.holder(ref))
    assert same(tensors_in(found.model), tensors_in(model))
    total = sum(tensor.nbytes for tensor in tensors_in(found.model).values())
    assert good.sent == total - dying.whole


async def test_parts_come_from_several(model: Path, tmp_path: Path, host: Host) -> None:
    ref = model_ref(model)
    whole = peer_with(model, "whole", ref)
    half = host_at(tmp_path / "half")
    async with serving(whole):
        await half.fetch(stage(ref, (0, 1)), whole.holder(ref))
        sent = whole.sent
        partly = Peer(HostFiles(half.cache), "partly")
        async with serving(partly):
            found = await host.fetch(stage(ref, (0, 3)), partly.holder(ref), whole.holder(ref))
            assert partly.sent > 0
            with pytest.raises(ModelFilesError, match="partly: has not all of it"):
                await host_at(tmp_path / "third").fetch(stage(ref, (0, 3)), partly.holder(ref))
    assert same(tensors_in(found.model), tensors_in(model))
    assert whole.sent > sent


async def test_a_damaged_cache_gives_nothing_out(model: Path, tmp_path: Path, host: Host) -> None:
    ref = model_ref(model)
    whole = peer_with(model, "whole", ref)
    other = host_at(tmp_path / "other")
    async with serving(whole):
        found = await other.fetch(stage(ref, (0, 0)), whole.holder(ref))
    part = found.model / "layer-00000.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged = Peer(HostFiles(other.cache), "damaged")
    async with serving(damaged):
        with pytest.raises(UnavailableError, match="is damaged on this host"):
            await host.fetch(stage(ref, (0, 0)), damaged.holder(ref))
    assert not part.exists()


async def test_layers_can_be_measured_without_the_files(model: Path, host: Host) -> None:
    ref = model_ref(model)
    peer = peer_with(model, "p", ref)
    supply = Supply(HostFiles(host.cache), Fetcher(host.cache, secret), allow_download=False)
    async with serving(peer):
        async with supply.shaped_like(ref, [peer.holder(ref)]) as (shape, stands_in):
            assert stands_in
            assert files.digest(shape) == ref.digest
        assert not shape.exists()
        async with supply.shaped_like(model_ref(model, str(model)), []) as (shape, stands_in):
            assert (shape, stands_in) == (model, False)
        with pytest.raises(ModelFilesError, match="no other worker of the mesh has it"):
            async with supply.shaped_like(ref, []):
                pass
    assert peer.sent == 0
    assert not host.cache.directory.exists()


async def test_two_stages_fetch_the_same_once(model: Path, tmp_path: Path) -> None:
    ref = model_ref(model)
    peer = peer_with(model, "p", ref)
    # As two processes of a host, which share nothing but the directory.
    hosts = [host_at(tmp_path / "cache") for _ in range(3)]
    async with serving(peer):
        found = await asyncio.gather(
            *(host.fetch(stage(ref, (0, 3)), peer.holder(ref)) for host in hosts)
        )
    total = sum(tensor.nbytes for tensor in tensors_in(found[0].model).values())
    assert peer.sent == total
    assert sum(bool(host.told) for host in hosts) == 1


async def test_adapters_are_fetched_whole_and_checked(tmp_path: Path, host: Host) -> None:
    model, lora = random_checkpoint(tmp_path / "model"), write_adapter(tmp_path / "lora")
    ref, adapter = model_ref(model), adapter_ref(lora)
    here = adapter_ref(lora, str(lora))
    peer = peer_with(model, "p", ref, here)
    wrong = peer_with(model, "w", ref, here, spoil=_wrong_but_digested)
    async with serving(peer, wrong):
        assignment = stage(ref, (0, 3), adapter)
        with pytest.raises(ModelFilesError, match="not the adapter that was deployed"):
            await host.fetch(assignment, peer.holder(ref), wrong.holder(adapter))
        found = await host.fetch(assignment, peer.holder(ref, adapter))
    assert adapters.digest(found.adapters[0]) == adapter.digest
    assert (await host.fetch(assignment)).adapters == found.adapters


class Mistaken(Peer):
    """Tells of another adapter's files than it has."""

    other: Path

    async def ListFiles(self, request: Any, context: Any) -> Any:
        for file in read_manifest(self.other, adapter=True).files:
            yield file_to_proto(file)


@pytest.mark.parametrize("wrong", ["told", "sent"])
async def test_an_adapter_that_one_gets_wrong_comes_from_another(
    tmp_path: Path, host: Host, wrong: str
) -> None:
    model, lora = random_checkpoint(tmp_path / "model"), write_adapter(tmp_path / "lora")
    ref, adapter = model_ref(model), adapter_ref(lora)
    here = adapter_ref(lora, str(lora))
    good = peer_with(model, "good", ref, here)
    if wrong == "told":
        bad = Mistaken(good.host, "bad")
        bad.other = write_adapter(tmp_path / "other", alpha_pattern={})
    else:
        bad = peer_with(model, "bad", ref, here, spoil=_wrong_but_digested)
    async with serving(good, bad):
        found = await host.fetch(
            stage(ref, (0, 3), adapter), bad.holder(adapter), good.holder(ref, adapter)
        )
    assert adapters.digest(found.adapters[0]) == adapter.digest
    assert bad.calls["FetchTensors"] == 1


async def test_an_adapter_that_was_told_wrongly_of_is_fetched_the_next_time(
    tmp_path: Path, host: Host
) -> None:
    model, lora = random_checkpoint(tmp_path / "model"), write_adapter(tmp_path / "lora")
    ref, adapter = model_ref(model), adapter_ref(lora)
    here = adapter_ref(lora, str(lora))
    peer = peer_with(model, "p", ref, here)
    mistaken = Mistaken(peer.host, "m")
    mistaken.other = write_adapter(tmp_path / "other", alpha_pattern={})
    async with serving(peer, mistaken):
        assignment = stage(ref, (0, 3), adapter)
        with pytest.raises(ModelFilesError, match="not the adapter that was deployed"):
            await host.fetch(assignment, peer.holder(ref), mistaken.holder(adapter))
        found = await host.fetch(assignment, peer.holder(ref, adapter))
    assert adapters.digest(found.adapters[0]) == adapter.digest


def _wrong_but_digested(
    message: files_pb2.FetchTensorsResponse,
) -> files_pb2.FetchTensorsResponse:
    corrupt(message)
    message.sha256 = blocks.block_digest(message.data)
    return message


async def test_a_full_disk_is_said_before_anything_comes(model: Path, tmp_path: Path) -> None:
    ref = model_ref(model)
    peer = peer_with(model, "p", ref)
    host = host_at(tmp_path / "cache", free_bytes=lambda _: SPARE_BYTES + 100)
    async with serving(peer):
        with pytest.raises(ModelFilesError) as caught:
            await host.fetch(stage(ref, (0, 3)), peer.holder(ref))
    assert caught.value.reason == "DISK_FULL"
    for said in ("'m'", str(tmp_path / "cache"), "free", "UELLM_WORKER_CACHE_DIRECTORY"):
        assert said in caught.value.message
    assert peer.calls["FetchTensors"] == 0


async def test_the_cache_keeps_within_its_bounds(tmp_path: Path) -> None:
    models = [random_checkpoint(tmp_path / f"m{n}", seed=n, vocab=33 + n) for n in range(3)]
    refs = [model_ref(model) for model in models]
    probe = host_at(tmp_path / "probe")
    peers = [peer_with(m, f"p{n}", r) for n, (m, r) in enumerate(zip(models, refs, strict=True))]

    async def fetch(host: Host, number: int) -> None:
        ref = refs[number]
        await host.fetch(stage(ref, (0, 3), embed=True, head=True), peers[number].holder(ref))

    def held(host: Host) -> set[int]:
        return {n for n, ref in enumerate(refs) if host.cache.peek(ref.digest).manifest()}

    async with serving(*peers):
        await fetch(probe, 0)
        one = probe.cache.peek(refs[0].digest).bytes
        host = host_at(tmp_path / "cache", most_bytes=round(2.5 * one))
        await fetch(host, 0)
        await fetch(host, 1)
        for number, used_at in ((0, 2000), (1, 1000)):
            manifest_path = host.cache.peek(refs[number].digest).directory / "manifest"
            os.utime(manifest_path, (used_at, used_at))
        await fetch(host, 2)
        assert held(host) == {0, 2}  # The other was not used for the longest time.
        with pytest.raises(ModelFilesError, match="granted"):
            await fetch(host_at(tmp_path / "tiny", most_bytes=one // 2), 0)
        # What is in use stays, and what was used just now.
        os.utime(host.cache.peek(refs[0].digest).directory / "manifest", (1000, 1000))
        async with FileCache(host.cache.directory).entry(refs[0].digest):
            with pytest.raises(ModelFilesError, match="granted"):
                await fetch(host, 1)
        assert held(host) == {0, 2}


async def test_nobody_has_it(model: Path, host: Host) -> None:
    with pytest.raises(ModelFilesError) as caught:
        await host.fetch(stage(model_ref(model), (0, 3)))
    for said in ("no directory '/nowhere/model'", "no other worker of the mesh has it", "uellm up"):
        assert said in caught.value.message
    assert caught.value.reason == "FILES_NOT_IN_MESH"


async def test_other_files_than_were_deployed_are_refused(model: Path, host: Host) -> None:
    ref = model_ref(model)
    peer = peer_with(model, "p", ref)
    (model / files.GENERATION_CONFIG).write_text("{}")  # After the worker looked.
    other = random_checkpoint(model.parent / "other", layers=2)
    async with serving(peer):
        with pytest.raises(ModelFilesError, match="nothing of a model with digest"):
            await host.fetch(stage(ref, (0, 3)), peer.holder(ref))
        liar = peer_with(other, "liar", model_ref(other))
        liar.host._found[ref.digest] = liar.host._found.pop(model_ref(other).digest)
        async with serving(liar):
            with pytest.raises(ModelFilesError, match="nothing of a model"):
                await host.fetch(stage(ref, (0, 3)), liar.holder(ref))


class Malicious(files_pb2_grpc.FilesServiceServicer):
    """Sends whatever it likes for a list of files."""

    def __init__(self, *sent: files_pb2.ListFilesResponse) -> None:
        self.sent = sent

    async def ListFiles(self, request: Any, context: Any) -> Any:
        for message in self.sent:
            yield message


@pytest.mark.parametrize(
    ("name", "has_tensors"),
    [("../../evil.json", False), ("modeling_x.py", False), ("../m.safetensors", True)],
)
async def test_only_files_of_a_checkpoint_are_written(
    model: Path, host: Host, name: str, has_tensors: bool
) -> None:
    ref = model_ref(model)
    evil = files_pb2.ListFilesResponse(
        name=name, size_bytes=2, content=b"{}", has_tensors=has_tensors
    )
    server = grpc.aio.server()
    files_pb2_grpc.add_FilesServiceServicer_to_server(Malicious(evil), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    peer = peer_with(model, "p", ref)
    holder = peer.holder(ref)
    holder.address = f"127.0.0.1:{port}"
    try:
        with pytest.raises(ModelFilesError, match="is no file of a checkpoint"):
            await host.fetch(stage(ref, (0, 3)), holder)
    finally:
        await server.stop(0)
    assert not list(host.cache.directory.glob("*/*"))


def test_an_adapter_has_one_file_with_tensors(tmp_path: Path) -> None:
    config, weights = read_manifest(write_adapter(tmp_path / "lora"), adapter=True).files
    for contents in ((config,), (config, weights, replace(weights, name="more.safetensors"))):
        with pytest.raises(ModelFilesError, match="one file with tensors"):
            Manifest(contents)


def test_what_goes_while_it_is_counted_does_not_count(tmp_path: Path) -> None:
    entry = FileCache(tmp_path).peek("0" * 64)
    entry.directory.mkdir()
    (entry.directory / "here").write_bytes(b"123")
    (entry.directory / "gone").symlink_to(tmp_path / "nowhere")
    assert entry.bytes == 3


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
    large = 200 << 20
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


def test_parts_are_laid_out_as_the_format_asks(tmp_path: Path) -> None:
    directory = random_checkpoint(tmp_path / "m")
    mixed = {
        "model.layers.0.a": np.ones(3, np.float16),
        "model.layers.0.b": np.ones(3, np.float64),
        "model.layers.0.c": np.ones(3, np.int8),
        "model.layers.0.d": np.ones(3, np.float32),
        "model.layers.0.e": np.ones((0, 4), np.float32),
    }
    save_file(mixed, directory / files.WEIGHTS)
    (part,) = read_manifest(directory).parts.values()
    file = PartFile(tmp_path, part)
    content = (directory / files.WEIGHTS).read_bytes()
    with file.path.open("wb") as out:
        out.write(part.head)
        for tensor in part.tensors:
            out.write(content[tensor.start : tensor.start + tensor.size])
    assert file.path.stat().st_size == part.file_bytes
    assert len(part.head) % 8 == 0
    found = load_file(file.path)
    assert found.keys() == mixed.keys()
    assert same(found, mixed)


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    found = read_manifest(random_checkpoint(tmp_path / "m"))
    *texts, weights = found.files
    short = manifest.StoredFile(weights.name, weights.size - 1, weights.content, has_tensors=True)
    with pytest.raises(ModelFilesError, match="would end at byte"):
        Manifest((*texts, short))
