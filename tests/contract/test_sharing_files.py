"""What workers fetch of a model from each other, and what becomes of what is damaged or cut off."""

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from uellm_worker.files import sending
from uellm_worker.files.cache import SPARE_BYTES
from uellm_worker.files.fetching import Fetcher
from uellm_worker.files.host import HostFiles
from uellm_worker.files.supply import Supply

from tests.support.sharing import (
    Host,
    Peer,
    corrupt,
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
from tests.support.waiting import eventually
from uellm.core.errors import ModelFilesError, UnavailableError
from uellm.models import blocks, files, manifest
from uellm.models.manifest import read_manifest
from uellm.v1 import files_pb2, files_pb2_grpc

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
