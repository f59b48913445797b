"""Replicas on real workers, as a deployer forms them."""

from tests.support.worker import (
    Mesh,
    RunningWorker,
)
from uellm.v1 import deployer_pb2

SERVING = deployer_pb2.STAGE_STATE_SERVING
FAILED = deployer_pb2.STAGE_STATE_FAILED


async def serving(worker: RunningWorker, mesh: Mesh, generation: int = 1, slots: int = 4) -> None:
    """Bring a replica of one stage up on a worker, and route to it."""
    await worker.bring_up(mesh.assignment(generation, slots=slots))
    await mesh.route(generation)
