"""Taking over what another deployer left: replicas that serve go on serving."""

from collections.abc import Iterable, Mapping, Sequence

from uellm.convert import device_shards, seconds
from uellm.convert_topology import model_from_proto, planned_from_proto
from uellm.core.model import ModelProfile
from uellm.placement.memory import Need
from uellm.placement.views import PlannedReplica, PlannedStage
from uellm.v1 import common_pb2, deployer_pb2, topology_pb2
from uellm_deployer.replica import Phase, Replica

HANDOVER_SECONDS = 4.0
"""What workers may take besides to turn to another deployer: a call to the one before has to time
out where that one is stopped, or its host cut off."""


def adopt(
    published: topology_pb2.Deployment,
    routes: Mapping[str, tuple[int, str]],
    wanted: deployer_pb2.PlanRequest,
    now: float,
    patience_seconds: float,
) -> list[Replica]:
    """The replicas of a deployment as another deployer published it.

    One whose stages are of the generation that is routed to is taken to serve: its workers will
    say so within their next heartbeats, or it is formed again. Any other is formed again, where it
    was if that can be.

    Args:
        published: the deployment.
        routes: epoch and state of its replicas, by id.
        wanted: what is wanted of it now.
        now: monotonic seconds.
        patience_seconds: how long to wait for the workers of one that is to be formed again.
    """
    profile = model_from_proto(published.profile) if published.profile.layers else None
    matches = _matches(published, wanted)
    found = []
    for message in published.replicas:
        epoch, state = routes.get(message.id, (0, ""))
        stages = tuple(message.stages)
        serves = bool(stages) and state == "READY" and stages[0].generation == epoch
        found.append(
            Replica(
                id=message.id,
                index=int(message.id.rpartition("-")[2]),
                phase=Phase.READY if serves and matches else Phase.IDLE,
                epoch=epoch,
                assignments=stages,
                planned=planned_from_proto(message.planned)
                if message.HasField("planned")
                else planned_of(stages, profile)
                if profile is not None
                else None,
                trusted_at=now + HANDOVER_SECONDS,
                since=now,
                patience_seconds=patience_seconds + HANDOVER_SECONDS,
                moved_at=tuple(map(seconds, message.moved_at)),
            )
        )
    return found


def _matches(published: topology_pb2.Deployment, wanted: deployer_pb2.PlanRequest) -> bool:
    """Whether what runs was formed for what is wanted."""
    return (
        published.wanted_stages == wanted.stages
        and published.model.source == wanted.model.source
        and published.model.revision == wanted.model.revision
        and (not wanted.dtype or published.dtype == wanted.dtype)
        and published.slots <= wanted.slots
        and published.wanted_kv_tokens == wanted.kv_tokens
        and _sources(published.adapters) == _sources(wanted.adapters)
    )


def _sources(adapters: Iterable[common_pb2.ModelRef]) -> list[tuple[str, str, str]]:
    return [(adapter.name, adapter.source, adapter.revision) for adapter in adapters]


def planned_of(
    stages: Sequence[topology_pb2.ShardAssignment], profile: ModelProfile
) -> PlannedReplica:
    """The plan behind assignments."""
    return PlannedReplica(
        tuple(
            PlannedStage(
                device_id=part.device_id,
                first_layer=part.first_layer,
                last_layer=part.last_layer,
                has_embed=stage.has_embed and part.first_layer == stage.first_layer,
                has_head=stage.has_head and part.last_layer == stage.last_layer,
                memory_bytes=Need(profile, 0, 0).stage(part.first_layer, part.last_layer)
                + part.kv_bytes,
                kv_bytes=part.kv_bytes,
            )
            for stage in stages
            for part in device_shards(stage)
        )
    )
