"""A deployment as it is published."""

from collections.abc import Sequence
from typing import Protocol

from uellm.convert_topology import model_to_proto
from uellm.core.model import ModelProfile
from uellm.v1 import common_pb2, deployer_pb2, topology_pb2
from uellm_deployer.catalog import ResolvedModel
from uellm_deployer.replica import Phase, Replica


class Published(Protocol):
    """What publishing looks at; see ``Deployment``."""

    request: deployer_pb2.PlanRequest
    model: ResolvedModel | None
    profile: ModelProfile | None
    replicas: list[Replica]
    copies: int
    changes: dict[str, topology_pb2.PlacementChange]


def as_published(deployment: Published, status: str) -> topology_pb2.Deployment:
    """As it is published, its version aside; ``status``: what there is to say beside replicas."""
    request, replicas, model = deployment.request, deployment.replicas, deployment.model
    stages = [stage for replica in replicas for stage in replica.assignments]
    served = [r for r in replicas if r.phase is Phase.READY] or replicas
    running = [stage for replica in served for stage in replica.assignments] or stages
    many = len(replicas) > 1
    messages = [
        f"{replica.id}: {replica.message}" if many else replica.message
        for replica in replicas
        if replica.message
    ]
    ref: common_pb2.ModelRef = model.ref if model is not None else request.model
    adapters: Sequence[common_pb2.ModelRef] = (
        model.adapter_refs if model is not None else request.adapters
    )
    return topology_pb2.Deployment(
        name=request.model.name,
        model=running[0].model if running else ref,
        profile=model_to_proto(deployment.profile) if deployment.profile is not None else None,
        replicas=[replica.to_proto() for replica in replicas],
        status="; ".join(filter(None, [status, *messages])),
        max_tokens=min((stage.max_tokens for stage in running), default=0),
        wanted_replicas=deployment.copies,
        wanted_stages=request.stages,
        wanted_kv_tokens=request.kv_tokens,
        dtype=running[0].dtype if running else request.dtype,
        slots=min((stage.slots for stage in running), default=0),
        adapters=running[0].adapters if running else adapters,
        objective=request.objective,
        changes=[deployment.changes[name] for name in sorted(deployment.changes)],
    )
