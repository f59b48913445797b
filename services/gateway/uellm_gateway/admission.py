"""From a request to durable records: checked, tokenised, profiled, accepted."""

import asyncio
import hashlib
import random
import secrets
from dataclasses import dataclass

from uellm.class_defaults import with_defaults
from uellm.core.errors import (
    AlreadyExistsError,
    NotFoundError,
    ResourceExhaustedError,
    UellmError,
    UnavailableError,
)
from uellm.prefixes import prefix_marks
from uellm.service import Context
from uellm.streams.connection import UNREACHABLE
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.keys import new_request_id
from uellm.streams.messages import AcceptResult, Limits, NewRequest
from uellm.telemetry import span, traceparent
from uellm.v1 import common_pb2, inference_pb2, queue_pb2
from uellm_gateway.auth import Caller
from uellm_gateway.cancelling import cancel_request
from uellm_gateway.doors import Doors
from uellm_gateway.models import ModelView, ServedModel
from uellm_gateway.profiling import Profiling
from uellm_gateway.prompts import image_field, prompt_text, read_prompt
from uellm_gateway.settings import GatewaySettings
from uellm_gateway.turned_away import TurnedAway
from uellm_gateway.validation import (
    check_images,
    check_request,
    check_token_ids,
    resolve_sampling,
    unknown_adapter,
)

FIRST_PAUSE_SECONDS = 0.05
RETRY_AFTER_SECONDS = 1.0
_WITHDRAWALS = 15
_WITHDRAWAL_PAUSE_SECONDS = 1.0
_FULL = {
    "depth": ("QUEUE_FULL", "{model}: as many requests wait as may ({limits.waiting_requests})"),
    "tokens": ("QUEUE_TOKENS", "{model}: as many tokens wait as may ({limits.waiting_tokens})"),
    "tenant": (
        "TENANT_QUOTA",
        "{model}: you have as many unfinished requests as you may ({limits.tenant_requests})",
    ),
}


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that nothing is wrong with.

    Attributes:
        model: what will answer it.
        prompt_ids: the prompt by the model's tokenizer.
        sampling: with every default filled in.
        profile: what it is expected to need.
        slo: when it is needed; by the defaults of its class, if it does not say.
        features: what the profiler saw of the prompt, for it to learn from the answer's length.
    """

    model: ServedModel
    prompt_ids: list[int]
    sampling: common_pb2.Sampling
    profile: common_pb2.ResourceProfile
    slo: common_pb2.Slo
    features: bytes = b""


class Admission:
    """Makes requests durable.

    Args:
        context: the service's.
        settings: its limits.
        models: what is served.
        profiling: predicts what requests need.
        turned_away: told of those that are refused before they are accepted.

    Attributes:
        doors: who is refused before all that.
    """

    def __init__(
        self,
        context: Context,
        settings: GatewaySettings,
        models: ModelView,
        profiling: Profiling,
        turned_away: TurnedAway,
    ) -> None:
        self._context = context
        self._models = models
        self._profiling = profiling
        self._most_bytes = settings.max_request_bytes
        self._accept_seconds = settings.accept_seconds
        self.doors = Doors(settings.opening_requests, turned_away, context.clock.now)
        self._limits = Limits(
            settings.waiting_requests, settings.waiting_tokens, settings.tenant_requests
        )

    async def prepare(
        self, request: inference_pb2.GenerateRequest, *, answered: bool = True
    ) -> PreparedRequest:
        """Check, tokenise and profile a request.

        Args:
            request: as it came.
            answered: an answer is wanted, and not only an estimate.

        Raises:
            InvalidArgumentError: naming field, limit and remedy.
            NotFoundError: if model or adapter is not served.
            ModelFilesError: if the model's tokenizer is not on this host.
        """
        check_request(request, self._most_bytes)
        model = await self._models.get(request.model)
        if request.adapter and request.adapter not in model.adapters:
            raise unknown_adapter(request.adapter, model.name, model.adapters)
        text = await self._models.text(model)
        vocab_size = model.profile.vocab_size or text.tokenizer.vocab_size
        if request.HasField("token_ids"):
            check_token_ids(request.token_ids.ids, vocab_size)
        check_images(
            image_field(request),
            model.name,
            takes_images=text.images is not None,
            answered=answered,
        )
        prompt = await read_prompt(request, text.tokenizer, text.images)
        sampling = resolve_sampling(
            request.sampling,
            prompt_tokens=len(prompt.ids),
            context_tokens=model.context_tokens,
            vocab_size=vocab_size,
            defaults=text.defaults,
            seed=secrets.randbits(63),
        )
        with span("gateway.profile") as current:
            profiled = await self._profiling.profile(
                model, request.adapter, sampling, prompt, prompt_text(request), traceparent()
            )
            current.set_attribute("uellm.profile.fallback", profiled.profile.fallback)
        slo = with_defaults(request.slo, model.class_defaults)
        return PreparedRequest(
            model, prompt.ids, sampling, profiled.profile, slo, profiled.features
        )

    def learn(
        self,
        request: inference_pb2.GenerateRequest,
        prepared: PreparedRequest,
        finished: inference_pb2.Finished,
    ) -> None:
        """Take how long an answer became."""
        self._profiling.learn(prepared.model.name, request.adapter, prepared.sampling, finished)

    def new_request(
        self,
        request: inference_pb2.GenerateRequest,
        prepared: PreparedRequest,
        caller: Caller,
        choice: int,
        gateway: str = "",
    ) -> NewRequest:
        """One choice of a request, to accept; its frames go to ``gateway``, if one is named."""
        sampling = prepared.sampling
        if choice:
            # Independent answers need generators of their own.
            sampling = common_pb2.Sampling()
            sampling.CopyFrom(prepared.sampling)
            sampling.seed = (sampling.seed + choice) % 2**64
        request_id = new_request_id(prepared.model.name)
        key = request.idempotency_key
        return NewRequest(
            request_id=request_id,
            tenant=caller.tenant,
            scope=caller.scope,
            payload=queue_pb2.RequestPayload(
                prompt_ids=prepared.prompt_ids,
                sampling=sampling,
                adapter=request.adapter,
                features=prepared.features,
            ),
            entry=queue_pb2.RequestEntry(
                request_id=request_id,
                tenant=caller.tenant,
                scope=caller.scope,
                slo=prepared.slo,
                on_infeasible=request.on_infeasible or common_pb2.ON_INFEASIBLE_BEST_EFFORT,
                profile=prepared.profile,
                max_tokens=sampling.max_tokens,
                traceparent=traceparent(),
                adapter=request.adapter,
                greedy=sampling.temperature == 0,
                prefix_marks=prefix_marks(prepared.prompt_ids, request.adapter),
            ),
            # No key that a caller may choose holds a slash: choices cannot collide with them.
            idempotency_key=f"{key}/{choice}" if key else "",
            content_hash=_content_hash(request) if key else "",
            gateway=gateway,
            cost_tokens=len(prepared.prompt_ids) + round(prepared.profile.mean_output_tokens),
        )

    async def accept(self, queue: GatewayQueue, new: NewRequest) -> AcceptResult:
        """Make one choice durable; the result's id is another's if its key was used before.

        Raises:
            AlreadyExistsError: if the key was used for other content.
            ResourceExhaustedError: if queue or quota are full, with a time to try again.
            UnavailableError: if Redis did not say in time that it is durable.
        """
        with span("gateway.accept"):
            result = await self._accept_patiently(queue, new)
        self.doors.heard(queue.model, result.door)
        if result.status == "mismatch":
            raise AlreadyExistsError(
                "idempotency_key: it was used for another request; use a new key for new content",
                field="idempotency_key",
            )
        if result.status in _FULL:
            reason, message = _FULL[result.status]
            raise ResourceExhaustedError(
                message.format(model=queue.model, limits=self._limits) + "; try again later",
                reason=reason,
                # Spread, so that those who are refused together do not return together.
                retry_after_seconds=RETRY_AFTER_SECONDS * random.uniform(1, 2),  # noqa: S311
            )
        return result

    async def submit(
        self,
        queue: GatewayQueue,
        request: inference_pb2.GenerateRequest,
        prepared: PreparedRequest,
        caller: Caller,
    ) -> list[AcceptResult]:
        """Make all choices of a request durable, to be watched later; or none of them.

        Raises:
            UellmError: as ``accept``.
        """
        news = [
            self.new_request(request, prepared, caller, choice)
            for choice in range(max(request.sampling.n, 1))
        ]
        results = await asyncio.gather(
            *(self.accept(queue, new) for new in news), return_exceptions=True
        )
        accepted = [result for result in results if isinstance(result, AcceptResult)]
        for problem in results:
            if isinstance(problem, BaseException):
                for result in accepted if not request.idempotency_key else ():
                    self.withdraw(queue, result.request_id, caller.tenant)
                raise problem
        return accepted

    async def _accept_patiently(self, queue: GatewayQueue, new: NewRequest) -> AcceptResult:
        """Repeat until the outcome is known: with the same id, accepting twice is once."""
        pause = FIRST_PAUSE_SECONDS
        try:
            async with asyncio.timeout(self._accept_seconds):
                while True:
                    try:
                        return await queue.accept(new, self._limits)
                    except UNREACHABLE:
                        await asyncio.sleep(pause)
                        pause *= 2
        except TimeoutError:
            if not new.idempotency_key:
                self.withdraw(queue, new.request_id, new.tenant)
            raise UnavailableError(
                "Redis does not answer, so the request is not accepted; try again, best with an "
                "idempotency_key",
                reason="NOT_ACCEPTED",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            ) from None

    def withdraw(self, queue: GatewayQueue, request_id: str, tenant: str) -> None:
        """Have a request that its caller does not know of run for nobody.

        Not for one with an idempotency key: its caller finds it with that.
        """
        self._context.aside(self._withdraw(queue, request_id, tenant), "withdraw")

    async def _withdraw(self, queue: GatewayQueue, request_id: str, tenant: str) -> None:
        for _ in range(_WITHDRAWALS):
            try:
                await cancel_request(queue, request_id, tenant, now=self._context.clock.now())
            except NotFoundError:
                pass  # not accepted, or not yet: the script may still be on its way
            except (UellmError, *UNREACHABLE):
                pass
            else:
                return
            await asyncio.sleep(_WITHDRAWAL_PAUSE_SECONDS)


def _content_hash(request: inference_pb2.GenerateRequest) -> str:
    """What makes two uses of a key the same: all but the key, the try and what the stream does."""
    content = inference_pb2.GenerateRequest()
    content.CopyFrom(request)
    content.ClearField("idempotency_key")
    content.ClearField("first_try")
    content.ClearField("on_disconnect")
    return hashlib.sha256(content.SerializeToString(deterministic=True)).hexdigest()
