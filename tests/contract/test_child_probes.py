"""Probes in real child processes of the shard engine: layers, and the way between two of them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from safetensors.numpy import load_file
from uellm_worker.children import ChildSpawner, EngineChild
from uellm_worker.files.stand_in import write_stand_in

from tests.support.checkpoints import write_checkpoint
from uellm.models import files
from uellm.models.manifest import read_manifest
from uellm.placement.measuring import BlockSample, fit_block, fit_link
from uellm.v1.engine_pb2 import (
    BlockProbed,
    EngineCommand,
    EngineEvent,
    PrepareShard,
    ProbeBlock,
    ProbeCopies,
    ProbeLink,
    SimulatedDevice,
)
from uellm.v1.topology_pb2 import ShardAssignment

pytestmark = pytest.mark.asyncio(loop_scope="module")
PATIENCE = 240.0


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def spawner() -> AsyncIterator[ChildSpawner]:
    spawner = ChildSpawner("shard")
    await spawner.start()
    yield spawner
    await spawner.close()


async def answer(child: EngineChild, command: EngineCommand) -> EngineEvent:
    await child.send(command)
    return await event_of(child.events())


async def event_of(events: Any) -> EngineEvent:
    async with asyncio.timeout(PATIENCE):
        return await anext(events)  # type: ignore[no-any-return]


async def block(
    spawner: ChildSpawner,
    directory: str = "",
    budget_seconds: float = 1.0,
    room_bytes: int = 0,
    *,
    stand_in: bool = False,
    **shard: Any,
) -> EngineEvent:
    assignment = ShardAssignment(device_ids=["w/cpu:0"], dtype="float32")
    shard = {"assignment": assignment, "model_dir": directory, "threads": 1} | shard
    child = await spawner.spawn()
    command = ProbeBlock(
        shard=PrepareShard(**shard),
        budget_seconds=budget_seconds,
        room_bytes=room_bytes,
        stand_in=stand_in,
    )
    event = await answer(child, EngineCommand(probe_block=command))
    await child.kill()
    return event


def check(probed: BlockProbed) -> None:
    tokens = {point.tokens for point in probed.points}
    assert {1, 16} <= tokens
    for point in probed.points:
        assert point.layer_seconds > 0
        assert point.step_seconds >= 0
        assert (point.pairs > 0) != (point.context_tokens > 0)
    assert any(point.ends_seconds > 0 for point in probed.points)
    assert probed.weight_bytes > 0
    assert probed.leader_seconds > 0
    assert (probed.share == 1) == (probed.period_seconds == 0)


async def test_layers_of_a_model_are_timed(spawner: ChildSpawner, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", layers=4, hidden=64)
    event = await block(spawner, str(model))
    check(event.block_probed)
    # Two for every weight that a token meets; norms are weights as well.
    assert event.block_probed.flops_per_token == event.block_probed.weight_bytes / 2


async def test_where_there_is_no_room_for_the_ends_layers_are_timed(
    spawner: ChildSpawner, tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path / "model", layers=4, hidden=64)
    weight = (await block(spawner, str(model))).block_probed.weight_bytes
    probed = (await block(spawner, str(model), room_bytes=3 * weight)).block_probed
    assert {1, 16} <= {point.tokens for point in probed.points}
    assert not any(point.ends_seconds for point in probed.points)
    assert probed.leader_seconds == 0


async def test_layers_are_timed_without_their_numbers(
    spawner: ChildSpawner, tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path / "model", layers=4, hidden=64, shards=2)
    shape = tmp_path / "shape"
    shape.mkdir()
    write_stand_in(read_manifest(model), shape)
    assert files.digest(shape) == files.digest(model)
    known = (await block(spawner, str(model))).block_probed
    probed = (await block(spawner, str(shape), stand_in=True)).block_probed
    check(probed)
    assert (probed.weight_bytes, probed.flops_per_token) == (
        known.weight_bytes,
        known.flops_per_token,
    )
    filled = {
        name: tensor.any()
        for path in files.tensor_files(shape)
        for name, tensor in load_file(path).items()
    }
    # No more was written than had to be measured.
    assert filled["model.layers.2.mlp.up_proj.weight"]
    assert not filled["model.embed_tokens.weight"]


async def test_a_shape_stands_for_any_model(spawner: ChildSpawner) -> None:
    probed = (await block(spawner, budget_seconds=3.0)).block_probed
    check(probed)
    samples = [
        BlockSample(p.tokens, p.context_tokens, p.pairs, p.layer_seconds, p.step_seconds)
        for p in probed.points
    ]
    cost = fit_block(samples, probed.weight_bytes, probed.flops_per_token, 0.0)
    # More tokens take longer, and a core does less than 2 TFLOP/s.
    assert cost.layer.seconds(64) > cost.layer.seconds(1)
    assert cost.layer.per_token > probed.flops_per_token / 2e12


async def test_a_paced_device_is_as_slow_as_it_says(spawner: ChildSpawner) -> None:
    pace = 2e9
    simulated = [
        SimulatedDevice(device_id="w/sim:0", memory_bytes=4 << 30, memory_bytes_per_second=pace)
    ]
    assignment = ShardAssignment(device_ids=["w/sim:0"], dtype="float32")
    probed = (await block(spawner, assignment=assignment, simulated=simulated)).block_probed
    # Of one layer, the step that was timed whole: a difference of two shrinks on a busy host.
    one = min(p.layer_seconds + p.step_seconds for p in probed.points if p.tokens == 1)
    assert one >= 0.99 * probed.weight_bytes / pace


async def test_what_cannot_be_measured_is_said(spawner: ChildSpawner, tmp_path: Path) -> None:
    event = await block(spawner, str(tmp_path))
    assert event.failed.reason == "LOAD_FAILED"
    assert "config.json" in event.failed.message
    event = await block(spawner, room_bytes=1000)
    assert event.failed.reason == "OUT_OF_MEMORY"


async def test_devices_that_share_the_hosts_memory_have_no_copies(spawner: ChildSpawner) -> None:
    child = await spawner.spawn()
    command = ProbeCopies(device_ids=["w/cpu:0", "w/cpu:0"], budget_seconds=0.1)
    event = await answer(child, EngineCommand(probe_copies=command))
    assert event.WhichOneof("event") == "copies_probed"
    assert not event.copies_probed.copies
    await child.kill()


async def test_the_way_between_two_children_is_timed(spawner: ChildSpawner) -> None:
    """Small activations go with their announcement, large ones over the process group."""
    sender, receiver = await spawner.spawn(), await spawner.spawn()
    command = ProbeLink(
        device_id="w/cpu:0",
        bind_host="127.0.0.1",
        hidden_size=1024,
        dtype="float32",
        budget_seconds=30.0,  # Not used up: it is for a busy host that all sizes are tried.
    )
    events = sender.events()
    await sender.send(EngineCommand(probe_link=command))
    rendezvous = (await event_of(events)).link_listening.rendezvous
    assert rendezvous.startswith("127.0.0.1:")
    command.rendezvous = rendezvous
    other = asyncio.create_task(answer(receiver, EngineCommand(probe_link=command)))
    probed = (await event_of(events)).link_probed
    await other
    sizes = [sample.bytes for sample in probed.samples]
    assert sizes == sorted(sizes)
    assert sizes[0] == 4096
    assert sizes[-1] > 256 << 10, "beyond what goes with the announcement"
    assert 0 < probed.wire_seconds <= probed.samples[0].seconds
    speed = fit_link([(sample.bytes, sample.seconds) for sample in probed.samples])
    assert speed.latency_seconds < 1.0
    assert speed.bytes_per_second > 1e6
    for child in (sender, receiver):
        await child.kill()
