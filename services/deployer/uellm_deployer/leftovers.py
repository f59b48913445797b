"""Stages that workers hold and nobody wants: they are let go, now and then again."""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from uellm.logs import logger
from uellm_deployer import reconcile
from uellm_deployer.replica import Replica
from uellm_deployer.stage_calls import StageCalls

_log = logger("leftovers")
AGAIN_SECONDS = 5.0


class Leftovers:
    """Lets go what is left over, and remembers what it has asked for.

    Args:
        stages: calls workers for them.
        aside: runs work beside the server.
    """

    def __init__(
        self, stages: StageCalls, aside: Callable[[Coroutine[Any, Any, None], str], object]
    ) -> None:
        self._stages = stages
        self._aside = aside
        self._released: dict[reconcile.Orphan, float] = {}

    def release(self, replicas: Mapping[str, Replica], situation: reconcile.Situation) -> None:
        """Let go what belongs to none of these replicas."""
        now = situation.now
        for orphan in reconcile.orphans(replicas, situation):
            if now - self._released.get(orphan, float("-inf")) < AGAIN_SECONDS:
                continue
            self._released[orphan] = now
            _log.info("a stage is left over", worker=orphan.worker, replica=orphan.replica)
            release = self._stages.release_stage(orphan.worker, orphan.replica, orphan.generation)
            self._aside(release, f"release {orphan.replica}")
        self._released = {
            orphan: at for orphan, at in self._released.items() if now - at < AGAIN_SECONDS
        }
