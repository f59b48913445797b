"""How replicas that serve are doing, as status shows it."""

import time
from collections.abc import Iterable, Mapping

from uellm.convert import load_to_proto, timestamp
from uellm.v1 import deployer_pb2
from uellm_deployer.deployment import Deployment
from uellm_deployer.replica import Phase
from uellm_deployer.stage_times import StageTimes
from uellm_deployer.store import Store


def loads(
    deployments: Iterable[Deployment], does: Mapping[str, float]
) -> list[deployer_pb2.DeploymentLoad]:
    """What is asked of deployments, as far as it is known.

    Args:
        deployments: which.
        does: requests per second that their replicas do, by name.
    """
    return [
        deployer_pb2.DeploymentLoad(
            name=deployment.name,
            offered=load_to_proto(deployment.demand.load),
            capacity_requests_per_second=does.get(deployment.name, 0.0),
            efficiency=deployment.demand.efficiency,
        )
        for deployment in deployments
        if deployment.demand.load.measured_at
    ]


async def live(
    deployments: Iterable[Deployment], store: Store, times: StageTimes, now: float
) -> list[deployer_pb2.ReplicaLive]:
    """What replicas report, and their stages' times beside what was predicted of them.

    Args:
        deployments: which.
        store: has what replicas report.
        times: of stages.
        now: the present by Redis TIME.
    """
    found, monotonic = [], time.monotonic()
    for deployment in deployments:
        ready = [r for r in deployment.replicas if r.phase in (Phase.READY, Phase.MOVING)]
        reports = await store.reports(deployment.name, [replica.id for replica in ready])
        for replica in ready:
            report = reports.get(replica.id)
            stages = [
                deployer_pb2.StageLive(
                    device_id=stage.device_id,
                    predicted_seconds=stage.predicted,
                    measured_seconds=stage.took,
                    ratio=times.ratio(stage, monotonic),
                    seen_at=timestamp(now - (monotonic - times.seen_at(replica.id))),
                )
                for stage in times.latest(replica.id)
            ]
            found.append(
                deployer_pb2.ReplicaLive(
                    replica=replica.id,
                    stages=stages,
                    running=report.running if report is not None else 0,
                    waiting=report.waiting if report is not None else 0,
                    slots=report.slots if report is not None else 0,
                )
            )
    return found
