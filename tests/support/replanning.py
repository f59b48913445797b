"""A deployer that places anew, and what its workers report of their steps."""

from collections.abc import Callable
from typing import Any

from tests.support.deployer import COST, Mesh
from uellm.v1 import queue_pb2, topology_pb2

DONE, PROPOSED = topology_pb2.CHANGE_STATE_DONE, topology_pb2.CHANGE_STATE_PROPOSED


AT_ONCE = {"probe_seconds": 5.0, "replan_seconds": 0.1, "replan_cooldown_seconds": 0.0}


async def change(mesh: Mesh, state: int) -> topology_pb2.PlacementChange | None:
    deployment = await mesh.published()
    for found in deployment.changes if deployment else ():
        if found.state == state:
            return found
    return None


def steps(
    mesh: Mesh, replica: topology_pb2.Replica, ratios: list[float], **sequences: int
) -> Callable[[], Any]:
    """Reports of a replica whose stages take so many times what their layers should."""
    step = 0

    async def report() -> None:
        nonlocal step
        step += 1
        counts = [stage.last_layer - stage.first_layer + 1 for stage in replica.stages]
        seconds = [
            queue_pb2.StageSeconds(decode_seconds=ratio * count * COST.seconds(2, 100))
            for ratio, count in zip(ratios, counts, strict=True)
        ]
        message = queue_pb2.ReplicaReport(
            epoch=replica.epoch,
            step=step,
            decode_step_sequences=2,
            decode_step_context_tokens=100,
            stages=seconds,
            **sequences,
        )
        await mesh.queue.route(replica.id, replica.epoch, "READY", message)

    return report
