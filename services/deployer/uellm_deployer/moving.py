"""Carrying out a better placement: beside what serves where both fit, else in its place."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

from uellm.convert import timestamp
from uellm.core.errors import FailedPreconditionError, UellmError
from uellm.logs import logger
from uellm.streams.connection import UNREACHABLE
from uellm.v1 import topology_pb2
from uellm_deployer.formation import Formed, form
from uellm_deployer.planning import Planned
from uellm_deployer.replica import Phase, Replica

_log = logger("moving")
POLL_SECONDS = 0.1


class Changing(Formed, Protocol):
    """What changing a replica needs of its deployment besides; see ``Deployment``."""

    changes: dict[str, topology_pb2.PlacementChange]
    approved: bool
    approved_copies: bool
    changed_at: float
    copies: int

    def add_replica(self, now: float) -> Replica:
        """One copy more."""
        ...

    def start(self, key: str, work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        """Run ``work`` unless there is work under way for the same replica."""
        ...


def announced(replicas: Iterable[Replica]) -> dict[str, topology_pb2.PlacementChange]:
    """That other places are looked for, by replica that serves: who asked for them waits for it."""
    return {
        replica.id: topology_pb2.PlacementChange(
            replica=replica.id,
            state=topology_pb2.CHANGE_STATE_UNDER_WAY,
            reason="its place is looked for",
        )
        for replica in replicas
        if replica.phase is Phase.READY
    }


async def approve(deployment: Changing) -> None:
    """Have what is proposed carried out.

    Raises:
        FailedPreconditionError: if nothing is.
    """
    proposed = [
        change
        for change in deployment.changes.values()
        if change.state == topology_pb2.CHANGE_STATE_PROPOSED
    ]
    if not proposed:
        raise FailedPreconditionError(
            f"no change of {deployment.name} is proposed; `uellm status` shows changes"
        )
    for change in proposed:
        change.state = topology_pb2.CHANGE_STATE_UNDER_WAY
    kinds = {change.kind for change in proposed}
    deployment.approved = topology_pb2.CHANGE_KIND_UNSPECIFIED in kinds
    deployment.approved_copies = bool(kinds - {topology_pb2.CHANGE_KIND_UNSPECIFIED})
    await deployment.publish()


async def take_over(
    deployment: Changing, old: Replica, new: Replica, planned: Planned, now: Callable[[], float]
) -> None:
    """Form ``new`` while ``old`` serves; then the old one finishes what it has, and ends."""
    change = deployment.changes[old.id]
    try:
        await form(deployment, new, planned=planned)
        if new.phase is Phase.READY:
            new.replaces, old.dismissed = "", True
            change.replica = new.id
            deployment.changes[new.id] = deployment.changes.pop(old.id)
    finally:
        _end(deployment, change, now, done=new.phase is Phase.READY)
        deployment.tools.wake()


async def move(
    deployment: Changing, replica: Replica, planned: Planned, now: Callable[[], float]
) -> None:
    """Let a replica finish what it runs, then form it where it is better.

    What has not ended in time is handed back, and goes on from its log where the replica is then.
    """
    change = deployment.changes[replica.id]
    try:
        if await _drain(deployment, replica):
            replica.phase = Phase.FORMING
            await form(deployment, replica, planned=planned)
    finally:
        _end(deployment, change, now, done=replica.phase is Phase.READY)
        deployment.tools.wake()


def add_copy(
    deployment: Changing,
    planned: Planned,
    change: topology_pb2.PlacementChange,
    now: Callable[[], float],
) -> None:
    """Begin to form one more copy; one that cannot be formed is not wanted any more."""
    new = deployment.add_replica(time.monotonic())
    new.phase, new.planned = Phase.FORMING, planned.plan.replicas[0]
    deployment.copies += 1
    deployment.changed_at = time.monotonic()
    change.replica = new.id
    deployment.changes[new.id] = change

    async def bring_up() -> None:
        try:
            await form(deployment, new, planned=planned)
        finally:
            done = new.phase is Phase.READY
            if not done:
                # More may be wanted by now than when it was begun.
                deployment.copies = max(deployment.copies - 1, deployment.request.replicas)
                new.dismissed = True
                change.reason += f"; not done: {new.message}"
            _end(deployment, change, now, done=done)
            deployment.tools.wake()

    deployment.start(new.id, bring_up)


def give_back(deployment: Changing, replica: Replica, change: topology_pb2.PlacementChange) -> None:
    """Have one copy less: it finishes what it runs, and then its devices are free."""
    deployment.copies -= 1
    deployment.changed_at = time.monotonic()
    deployment.changes[replica.id] = change
    replica.dismissed = True
    deployment.tools.wake()


async def _drain(deployment: Changing, replica: Replica) -> bool:
    """Whether a replica has nothing to do any more, or had long enough to finish it."""
    tools = deployment.tools
    try:
        tools.check()
        await tools.store.route(deployment.name, replica.id, replica.epoch, "DRAINING")
        replica.message = "finishes what it runs, to be placed anew; requests wait meanwhile"
        await deployment.publish()
        deadline = time.monotonic() + tools.settings.undeploy_seconds
        while replica.phase is Phase.MOVING and time.monotonic() < deadline:
            reports = await tools.store.reports(deployment.name, [replica.id])
            report = reports.get(replica.id)
            quiet = report is None or not report.running
            if quiet and not await tools.store.num_running(deployment.name):
                break
            await asyncio.sleep(POLL_SECONDS)
        if replica.phase is Phase.MOVING:
            tools.check()
            await tools.store.route(deployment.name, replica.id, replica.epoch, "FORMING")
            return True
    except (*UNREACHABLE, UellmError) as error:
        _log.warning("a replica stays where it is", replica=replica.id, error=str(error))
        if replica.phase is Phase.MOVING:
            # Its route is asserted again with the next round.
            replica.phase, replica.message = Phase.READY, ""
            change = deployment.changes[replica.id]
            change.reason += f"; not done: {error}"
    return False


def _end(
    deployment: Changing,
    change: topology_pb2.PlacementChange,
    now: Callable[[], float],
    *,
    done: bool,
) -> None:
    deployment.changed_at = time.monotonic()
    done = done and "not done" not in change.reason
    change.state = topology_pb2.CHANGE_STATE_DONE if done else topology_pb2.CHANGE_STATE_FAILED
    change.changed_at.CopyFrom(timestamp(now()))
