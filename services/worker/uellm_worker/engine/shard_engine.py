"""The engine that computes: a layer range of a model, stepping packed batches over a slot cache."""

import gc
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import torch
from torch.distributed import TCPStore

from uellm.convert import device_shards
from uellm.core.errors import ModelFilesError
from uellm.v1.engine_pb2 import (
    BlockProbed,
    CopiesProbed,
    PrepareShard,
    ProbeBlock,
    ProbeCopies,
    ProbeLink,
)
from uellm.v1.topology_pb2 import ShardAssignment
from uellm_worker.engine.block_probe import probe_block
from uellm_worker.engine.capacity import Capacity, Prepared, Vocabulary
from uellm_worker.engine.copy_probe import probe_copies
from uellm_worker.engine.device import Device
from uellm_worker.engine.group import Group, advertised_host
from uellm_worker.engine.heap import trim_heap
from uellm_worker.engine.inbox import Inbox
from uellm_worker.engine.member import ShardMember
from uellm_worker.engine.part import Part, shard_capacity
from uellm_worker.engine.runner import Progress, Tell
from uellm_worker.engine.shard import DTYPES, Shard, load_shard
from uellm_worker.engine.shard_stage import ShardStage
from uellm_worker.engine.transport import (
    ProcessGroupTransport,
    TransportCarrier,
    open_store,
)
from uellm_worker.engine.weights import ShardSpec


class ShardEngine:
    """The shard engine in a child process: holds at most one stage."""

    def __init__(self) -> None:
        self._stage: ShardStage | None = None
        self._host = ""
        self._store: TCPStore | None = None

    def prepare(self, command: PrepareShard, progress: Progress) -> Prepared:
        """See ``uellm_worker.engine.runner.Engine``.

        Raises:
            ConfigurationError: if a device is not there.
            MemoryError: if a simulated device is too small.
        """
        if command.threads:
            torch.set_num_threads(command.threads)
        self._host = advertised_host(command)
        specs = shard_specs(command)
        earlier = {part.device.id: part.shard for part in self._stage.parts} if self._stage else {}
        self._stage = None
        self._stage = stage = load_stage(command.assignment, specs, earlier, progress)
        return Prepared(
            capacity=stage.capacity,
            vocabulary=Vocabulary(stage.first.config.vocab_size, stage.first.eos_ids),
            device=stage.parts[0].device.unique_name,
            kept_bytes=sum(part.shard.kept_bytes for part in stage.parts),
            total_bytes=sum(part.shard.total_bytes for part in stage.parts),
            held=tuple((part.device.id, part.held_bytes) for part in stage.parts),
        )

    def offer(self, bind_host: str) -> str:
        """The port of a store for forming the process group."""
        self._store = open_store(bind_host)
        return str(self._store.port)

    def join(self, group: Group | None, inbox: Inbox) -> ShardMember:
        """See ``uellm_worker.engine.runner.Engine``."""
        if self._stage is None:
            raise RuntimeError("no stage is loaded")
        if group is None:
            return ShardMember(self._stage, None)
        store, self._store = self._store, None
        first = self._stage.first
        transport = ProcessGroupTransport(
            group,
            inbox,
            self._host,
            store,
            device=first.spec.device,
            hidden_size=first.config.hidden_size,
            dtype=first.spec.dtype,
        )
        return ShardMember(self._stage, transport, group.assignment.stage_count)

    def probe_block(self, command: ProbeBlock, tell: Tell) -> BlockProbed:
        """See ``uellm_worker.engine.block_probe``."""
        return probe_block(command, tell)

    def probe_copies(self, command: ProbeCopies) -> CopiesProbed:
        """See ``uellm_worker.engine.copy_probe``."""
        return probe_copies(command)

    def place(self, device_id: str) -> str:
        """See ``uellm_worker.engine.runner.Engine``."""
        return Device.named(device_id).unique_name

    def carrier(self, group: Group, inbox: Inbox, command: ProbeLink) -> TransportCarrier:
        """See ``uellm_worker.engine.runner.Engine``."""
        store, self._store = self._store, None
        place, dtype = Device.named(command.device_id).place, DTYPES[command.dtype or "float32"]
        transport = ProcessGroupTransport(
            group,
            inbox,
            command.bind_host,
            store,
            device=place,
            hidden_size=command.hidden_size,
            dtype=dtype,
        )
        return TransportCarrier(transport, place, command.hidden_size, dtype)


def shard_specs(command: PrepareShard) -> list[tuple[Device, ShardSpec]]:
    """What an assignment asks for, by device in layer order.

    Raises:
        ConfigurationError: if a device is not there.
        ModelFilesError: if the dtype is unknown.
    """
    assignment = command.assignment
    dtype = assignment.dtype or "float32"
    if dtype not in DTYPES:
        raise ModelFilesError(f"dtype {dtype!r}: one of {', '.join(DTYPES)}")
    wanted = device_shards(assignment)
    specs = []
    for index, each in enumerate(wanted):
        device = Device.named(each.device_id, command.simulated)
        spec = ShardSpec(
            model_dir=Path(command.model_dir),
            digest=assignment.model.digest,
            dtype=DTYPES[dtype],
            device=device.place,
            first_layer=each.first_layer,
            last_layer=each.last_layer,
            has_embed=assignment.has_embed and index == 0,
            has_head=assignment.has_head and index == len(wanted) - 1,
            adapters=tuple(map(Path, command.adapter_dirs)),
        )
        specs.append((device, spec))
    return specs


def load_stage(
    assignment: ShardAssignment,
    specs: Sequence[tuple[Device, ShardSpec]],
    earlier: dict[str, Shard],
    progress: Progress,
) -> ShardStage:
    """Load the parts of a stage one after another, and make their caches of one capacity.

    Args:
        assignment: the stage.
        specs: of its parts.
        earlier: what was held until now, by device id; emptied, so that its memory is free before
            it is taken again.
        progress: told the bytes of all parts so far.

    Raises:
        MemoryError: if a simulated device is too small.
        ModelFilesError: if the checkpoint cannot be served.
    """
    gone = earlier.keys() - {device.id for device, _ in specs}
    for device_id in gone:
        del earlier[device_id]
    if gone:
        gc.collect()  # Modules refer to each other in circles.
    shards: list[Shard] = []
    for device, spec in specs:
        before = sum(shard.total_bytes for shard in shards)

        def tell(loaded: int, total: int, device: Device = device, before: int = before) -> None:
            # Told before anything is read: what does not fit is not read in vain.
            device.check_room(total, "weights")
            progress(before + loaded, before + total)

        shards.append(load_shard(spec, earlier.pop(device.id, None), tell))
    trim_heap()
    capacities = [
        shard_capacity(shard, assignment, each.kv_bytes)
        for shard, each in zip(shards, device_shards(assignment), strict=True)
    ]
    capacity = reduce(Capacity.at_most, capacities)
    parts = [
        Part(shard, capacity, device) for (device, _), shard in zip(specs, shards, strict=True)
    ]
    return ShardStage(parts, capacity)
