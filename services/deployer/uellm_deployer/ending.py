"""Taking replicas, or a whole model, out of service: what runs is finished first."""

import asyncio
import time
from typing import Protocol

from uellm.core.errors import UellmError
from uellm.logs import logger
from uellm.streams.connection import UNREACHABLE
from uellm.v1 import topology_pb2
from uellm_deployer.formation import Formed
from uellm_deployer.replica import Phase, Replica, backoff

_log = logger("ending")
POLL_SECONDS = 0.1


class Ending(Formed, Protocol):
    """What ending needs of a deployment besides; see ``Deployment``."""

    replicas: list[Replica]
    changes: dict[str, topology_pb2.PlacementChange]
    ended: bool

    async def cancel(self, key: str) -> None:
        """Stop the work under way for a replica, and wait for its end."""
        ...


async def retire(deployment: Ending, replica: Replica) -> None:
    """Let one replica go while others go on."""
    tools = deployment.tools
    try:
        if replica.epoch:
            await tools.store.route(deployment.name, replica.id, replica.epoch, "DRAINING")
        await deployment.publish()
        seconds = tools.settings.undeploy_seconds
        await tools.stage_calls.release(replica.assignments, seconds=seconds)
    except (*UNREACHABLE, UellmError) as error:
        _log.warning("a replica is not gone yet", replica=replica.id, error=str(error))
        replica.phase = Phase.IDLE
        return
    deployment.replicas.remove(replica)
    change = deployment.changes.get(replica.id)
    if change is not None and change.kind == topology_pb2.CHANGE_KIND_REMOVE:
        change.state = topology_pb2.CHANGE_STATE_DONE
    elif change is not None and change.state != topology_pb2.CHANGE_STATE_FAILED:
        del deployment.changes[replica.id]
    tools.wake()


async def end(deployment: Ending) -> None:
    """Take a model out of service: finish what runs, let go, withdraw."""
    tools, name = deployment.tools, deployment.name
    try:
        for replica in deployment.replicas:
            await deployment.cancel(replica.id)
            replica.phase = Phase.ENDING
            if replica.epoch:
                await tools.store.route(name, replica.id, replica.epoch, "DRAINING")
        await deployment.publish()
        await _finish(deployment)
        for replica in deployment.replicas:
            await tools.stage_calls.release(replica.assignments)
        tools.check()
        await tools.store.withdraw(name)
    except (*UNREACHABLE, UellmError) as error:
        _log.warning("a deployment is not gone yet", model=name, error=str(error))
        await asyncio.sleep(backoff(1))
        return
    deployment.ended = True
    tools.changed()
    tools.wake()


async def _finish(deployment: Ending) -> None:
    """Wait until no answer is running, or for as long as they are given."""
    tools = deployment.tools
    deadline = time.monotonic() + tools.settings.undeploy_seconds
    while await tools.store.num_running(deployment.name):
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(POLL_SECONDS)
