"""From a plan to what its workers are told."""

from itertools import groupby

from uellm.addresses import host_of
from uellm.convert import cost_to_proto
from uellm.core.errors import FailedPreconditionError
from uellm.placement.speed import first_guess
from uellm.placement.views import PlannedReplica
from uellm.v1 import queue_pb2, topology_pb2
from uellm_deployer.catalog import ResolvedModel
from uellm_deployer.planning import Planned
from uellm_deployer.workers import Worker


def assignments(
    planned: Planned,
    replica: PlannedReplica,
    model: ResolvedModel,
    replica_id: str,
    generation: int,
    workers: dict[str, Worker],
) -> tuple[topology_pb2.ShardAssignment, ...]:
    """A planned replica as it is pushed to its workers, in stage order.

    Devices of one worker that follow each other become one stage of it.

    Raises:
        FailedPreconditionError: if the plan comes back to a worker, which holds one stage of it.
    """
    stages = [
        (worker, tuple(parts))
        for worker, parts in groupby(
            replica.stages, key=lambda part: planned.devices[part.device_id].worker
        )
    ]
    names = [worker for worker, _ in stages]
    for name in names:
        if names.count(name) > 1:
            raise FailedPreconditionError(
                f"the plan of {replica_id} comes back to worker {name} after another one, and a "
                "worker holds consecutive layers; give each device a worker of its own",
                reason="PLACEMENT_INFEASIBLE",
            )
    peers = [
        topology_pb2.Peer(stage=index, worker=name, host=host_of(workers[name].address))
        for index, name in enumerate(names)
    ]
    return tuple(
        topology_pb2.ShardAssignment(
            deployment=model.ref.name,
            replica=replica_id,
            generation=generation,
            stage_index=index,
            stage_count=len(stages),
            device_ids=[part.device_id for part in parts],
            first_layer=parts[0].first_layer,
            last_layer=parts[-1].last_layer,
            has_embed=parts[0].has_embed,
            has_head=parts[-1].has_head,
            model=model.ref,
            dtype=planned.dtype,
            kv_bytes=sum(part.kv_bytes for part in parts),
            slots=planned.plan.slots,
            peers=peers,
            max_tokens=planned.plan.max_tokens,
            shards=[
                topology_pb2.DeviceShard(
                    device_id=part.device_id,
                    first_layer=part.first_layer,
                    last_layer=part.last_layer,
                    kv_bytes=part.kv_bytes,
                )
                for part in parts
            ],
            adapters=model.adapter_refs,
        )
        for index, (_, parts) in enumerate(stages)
    )


def first_report(
    planned: Planned, replica: PlannedReplica, generation: int
) -> queue_pb2.ReplicaReport:
    """What schedulers go by until the replica reports for itself."""
    cost = first_guess(replica, planned.profile, planned.devices)
    tokens = planned.plan.kv_tokens
    return queue_pb2.ReplicaReport(
        epoch=generation,
        kv_tokens_free=tokens,
        kv_tokens_total=tokens,
        slots=planned.plan.slots,
        prefill_seconds_per_token=cost.per_token,
        decode_step_seconds=cost.overhead + cost.weights,
        cost=cost_to_proto(cost),
    )
