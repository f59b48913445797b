"""Telling a replica's engine of the policy that is chosen for its model while it runs."""

import asyncio
from collections.abc import Awaitable, Callable

from uellm.core.errors import InvalidArgumentError
from uellm.logs import logger
from uellm.policy.choice import STEP, PolicyChoice, levels_of
from uellm.streams.queue import ModelQueue
from uellm.v1 import common_pb2, engine_pb2
from uellm_worker.journal import passing

_log = logger("policy")
LOOK_SECONDS = 1.0

Tell = Callable[[engine_pb2.EngineCommand], Awaitable[None]]


class PolicyWatch:
    """Follows what is chosen for one model.

    Args:
        queue: the model's.
        default: what its engine decides by unless something was chosen.
        tell: gives a command to the engine.
    """

    def __init__(self, queue: ModelQueue, default: engine_pb2.EnginePolicy, tell: Tell) -> None:
        self._queue = queue
        self._default = default
        self._tell = tell
        self._told = default
        self._refused: common_pb2.ModelPolicy | None = None

    async def run(self) -> None:
        """Look every second, for ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Tell the engine if something else is chosen than it knows. Without Redis nothing is."""
        try:
            wanted = self._wanted(await self._queue.policy())
        except Exception as error:
            if not passing(error):
                raise
            return
        if wanted != self._told:
            self._told = wanted
            await self._tell(engine_pb2.EngineCommand(policy=wanted))

    def _wanted(self, record: common_pb2.ModelPolicy | None) -> engine_pb2.EnginePolicy:
        """The engine's part of what is chosen; the default where there is none."""
        if record is None:
            return self._default
        execution = record.execution or self._default.execution
        choice = PolicyChoice(record.policy, dict(record.settings), execution)
        try:
            choice.check()
        except InvalidArgumentError as error:
            if record != self._refused:
                self._refused = record
                _log.warning("the step policy stays as it is", error=error.message)
            return self._told
        if STEP not in levels_of(choice.name):
            return engine_pb2.EnginePolicy(policy=self._default.policy, execution=execution)
        return engine_pb2.EnginePolicy(
            policy=choice.name, settings=choice.at(STEP), execution=execution
        )
