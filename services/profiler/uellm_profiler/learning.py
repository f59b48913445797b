"""What a profiler knows: the deployments, and what their completions taught.

Completions are read by plain XREAD from the start of the trimmed stream, without a group: every
profiler, whenever it starts, reads the same entries in the same order and so learns the same.
"""

import asyncio
from functools import partial

from uellm import logs
from uellm.convert import model_from_proto
from uellm.core.errors import NotFoundError
from uellm.core.model import ModelProfile
from uellm.prediction.interface import GREEDY, CompletionFacts
from uellm.prediction.prior import Prior
from uellm.service import Context
from uellm.streams.connection import BLOCK_MS
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import common_pb2, queue_pb2

READ_COUNT = 500
_TEACHES = {
    common_pb2.FINISH_REASON_STOP,
    common_pb2.FINISH_REASON_LENGTH,
    common_pb2.FINISH_REASON_CANCELLED,
}

_log = logs.logger("learning")


def facts_of(event: queue_pb2.CompletionEvent) -> CompletionFacts | None:
    """What a completion teaches about lengths; None: nothing (refused, expired, failed)."""
    if event.finish_reason not in _TEACHES:
        return None
    cancelled = event.finish_reason == common_pb2.FINISH_REASON_CANCELLED
    return CompletionFacts(
        model=event.model,
        adapter=event.adapter,
        regime=event.sampling_regime or GREEDY,
        prompt_tokens=event.prompt_tokens,
        output_tokens=event.output_tokens,
        censored=event.censored or cancelled,
        features=event.features,
    )


class Learning:
    """Follows the deployments and their completions.

    Attributes:
        predictor: what has been learnt.
    """

    def __init__(self, context: Context, poll_seconds: float) -> None:
        self.predictor = Prior()
        self._context = context
        self._poll_seconds = poll_seconds
        self._models: dict[str, ModelProfile] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._places: dict[str, str] = {}

    async def start(self) -> None:
        """Follow what is deployed, from now on."""
        self._context.spawn(self._context.repeat(self._poll, "deployments"), "deployments")

    async def model(self, name: str) -> ModelProfile:
        """What a deployed model needs.

        Raises:
            NotFoundError: if it is not deployed.
        """
        if name not in self._models:
            await self._follow()
        try:
            return self._models[name]
        except KeyError:
            served = ", ".join(sorted(self._models)) or "none"
            raise NotFoundError(
                f"model: {name!r} is not deployed; deployed: {served}",
                field="model",
                reason="MODEL_NOT_FOUND",
            ) from None

    async def _poll(self) -> None:
        await self._follow()
        await asyncio.sleep(self._poll_seconds)

    async def _follow(self) -> None:
        deployments = await self._context.registry.deployments()
        self._models = {name: model_from_proto(d.profile) for name, d in deployments.items()}
        for name in self._readers.keys() - self._models.keys():
            self._readers.pop(name).cancel()
        for name in self._models.keys() - self._readers.keys():
            read = partial(self._read, SchedulerQueue(self._context.redis, name))
            self._readers[name] = self._context.spawn(
                self._context.repeat(read, f"completions of {name}"), f"completions of {name}"
            )

    async def _read(self, queue: SchedulerQueue) -> None:
        after = self._places.get(queue.model, "0")
        place, events = await queue.read_completions(after, READ_COUNT, BLOCK_MS)
        for event in events:
            facts = facts_of(event)
            if facts is not None:
                self.predictor.observe(facts)
        self._places[queue.model] = place
        if events and len(events) < READ_COUNT and after == "0":
            _log.info("learnt from what finished before", model=queue.model, count=len(events))
