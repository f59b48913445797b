"""The queues of all models as this gateway uses them, and its readers of their frames."""

import asyncio
import contextlib

from uellm.service import Context
from uellm.streams.connection import UNREACHABLE
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.keys import model_of
from uellm.streams.messages import RETENTION_SECONDS
from uellm_gateway.batching import CONCURRENT_READS, BatchedScripts, SharedQueue
from uellm_gateway.frames import CHECK_SECONDS, ModelFrames
from uellm_gateway.models import ModelView
from uellm_gateway.watching import AnswerSource


class ModelQueues:
    """Queues and frames by model, opened when a request of the model is seen.

    Args:
        context: the service's.
        models: what is served.
        retention_seconds: how long results are kept of those that end here.
    """

    def __init__(
        self, context: Context, models: ModelView, retention_seconds: int = RETENTION_SECONDS
    ) -> None:
        self._retention_seconds = retention_seconds
        self._context = context
        self._models = models
        self._scripts = BatchedScripts(context.redis)
        self._reads = asyncio.Semaphore(CONCURRENT_READS)
        self._frames: dict[str, ModelFrames] = {}

    def queue_of(self, request_id: str) -> GatewayQueue:
        """The queues of the model that a request id names.

        Raises:
            InvalidArgumentError: if it is no request id.
        """
        return self.queue(model_of(request_id))

    def queue(self, model: str) -> GatewayQueue:
        """A model's queues."""
        known = self._frames.get(model)
        if known is not None:
            return known.source.queue
        return SharedQueue(
            self._context.redis, model, self._scripts, self._reads, self._retention_seconds
        )

    async def frames(self, model: str) -> ModelFrames:
        """A model's frames, coming from now on."""
        known = self._frames.get(model)
        if known is None:
            source = AnswerSource(
                self.queue(model), self._context.identity, lambda: self._models.tokenizer(model)
            )
            known = self._frames[model] = ModelFrames(self._context, source, self._context.identity)
        await known.open()
        return known

    async def check(self) -> None:
        """One round of looking after all of them."""
        await asyncio.sleep(CHECK_SECONDS)
        for model, frames in list(self._frames.items()):
            if frames.in_use:
                await frames.check()
            else:
                del self._frames[model]
                await frames.close()

    async def close(self) -> None:
        """Drop the frame streams, which would go by themselves a little later."""
        for frames in self._frames.values():
            with contextlib.suppress(*UNREACHABLE):
                await frames.close()
