"""InferenceService: between its messages and admission, answers and records."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from opentelemetry import trace

from uellm import convert
from uellm.core.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError
from uellm.service import Context
from uellm.streams.decisions import DecisionLog
from uellm.streams.messages import AcceptResult, not_found
from uellm.telemetry import span
from uellm.v1 import common_pb2, inference_pb2, inference_pb2_grpc, scheduler_pb2
from uellm_gateway.admission import Admission, PreparedRequest
from uellm_gateway.answer import Answer
from uellm_gateway.auth import Caller, current_caller
from uellm_gateway.calls import Call, Calls
from uellm_gateway.cancelling import cancel_request, state_to_proto
from uellm_gateway.estimates import Estimates
from uellm_gateway.explaining import explain_refused, explain_request
from uellm_gateway.frames import ModelFrames
from uellm_gateway.listing import list_models
from uellm_gateway.models import ModelView
from uellm_gateway.queues import ModelQueues
from uellm_gateway.watching import Watcher

ServicerContext = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """See protos/uellm/v1/inference.proto.

    Args:
        context: the service's.
        models: what is served.
        admission: makes requests durable.
        queues: of the models, and where their answers come from.
        calls: the streams in progress.
        estimates: asks the schedulers.
        buffered_entries: most events held for a slow client.
    """

    def __init__(
        self,
        context: Context,
        models: ModelView,
        admission: Admission,
        queues: ModelQueues,
        calls: Calls,
        estimates: Estimates,
        buffered_entries: int,
    ) -> None:
        self._context = context
        self._models = models
        self._admission = admission
        self._queues = queues
        self._calls = calls
        self._estimates = estimates
        self._buffered_entries = buffered_entries
        # It reads much and computes long: the streams come first.
        self._explaining = asyncio.Semaphore(1)

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Submit, then stream the answers."""
        cancels = request.on_disconnect != inference_pb2.ON_DISCONNECT_CONTINUE
        call = self._calls.begin(context, "gateway.generate", cancels=cancels)
        with trace.use_span(call.span):
            call.span.set_attribute("gen_ai.request.model", request.model)
            prepared, accepted = await self._open(request, call, current_caller())
        for event in accepted:
            yield inference_pb2.GenerateResponse(event=event)
        async for event in call.stream():
            yield inference_pb2.GenerateResponse(event=event)
        for answer in call.answers:
            if answer.finished is not None:
                self._admission.learn(request, prepared, answer.finished)
        if len(call.answers) == 1:
            _raise_if_refused(call.answers[0])

    async def _open(
        self, request: inference_pb2.GenerateRequest, call: Call, caller: Caller
    ) -> tuple[PreparedRequest, list[inference_pb2.GenerationEvent]]:
        """Have every choice accepted and watched, or none."""
        queue = self._queues.queue(request.model)
        async with self._admission.doors.passing(queue, request, caller.tenant):
            return await self._accept_all(request, call, caller)

    async def _accept_all(
        self, request: inference_pb2.GenerateRequest, call: Call, caller: Caller
    ) -> tuple[PreparedRequest, list[inference_pb2.GenerationEvent]]:
        prepared = await self._admission.prepare(request)
        frames = await self._queues.frames(prepared.model.name)
        choices = max(request.sampling.n, 1)
        if choices == 1:
            return prepared, [await self._accept(request, prepared, call, frames, caller, 0)]
        results = await asyncio.gather(
            *(self._accept(request, prepared, call, frames, caller, i) for i in range(choices)),
            return_exceptions=True,
        )
        events = [result for result in results if not isinstance(result, BaseException)]
        for result in results:
            if isinstance(result, BaseException):
                for event in events:
                    call.forget(event.request_id)
                    if not request.idempotency_key:
                        self._admission.withdraw(
                            frames.source.queue, event.request_id, caller.tenant
                        )
                raise result
        return prepared, events

    async def _accept(
        self,
        request: inference_pb2.GenerateRequest,
        prepared: PreparedRequest,
        call: Call,
        frames: ModelFrames,
        caller: Caller,
        choice: int,
    ) -> inference_pb2.GenerationEvent:
        queue = frames.source.queue
        new = self._admission.new_request(request, prepared, caller, choice, self._context.identity)
        # Before it is accepted: its first frame may be here before accept's own reply.
        self._watch(call, frames, caller, Answer(new.request_id, choice))
        try:
            result = await self._admission.accept(queue, new)
        except asyncio.CancelledError:
            call.forget(new.request_id)
            if not request.idempotency_key:
                self._admission.withdraw(queue, new.request_id, new.tenant)
            raise
        except BaseException:
            call.forget(new.request_id)
            raise
        profile = prepared.profile
        if result.request_id != new.request_id:
            call.forget(new.request_id)
            answer = Answer(result.request_id, choice)
            self._watch(call, frames, caller, answer, behind=True)
            await frames.source.subscribe(result.request_id, caller.tenant)
            profile = (await queue.record(result.request_id)).entry.profile
        return _accepted(result, choice, profile, prepared.model.waits_for)

    def _watch(
        self,
        call: Call,
        frames: ModelFrames,
        caller: Caller,
        answer: Answer,
        *,
        behind: bool = False,
    ) -> None:
        watcher = Watcher(
            answer, caller.tenant, frames.source, call.bell, self._buffered_entries, behind=behind
        )
        call.watch(frames, watcher)

    async def Submit(
        self, request: inference_pb2.SubmitRequest, context: ServicerContext
    ) -> inference_pb2.SubmitResponse:
        """Make a request durable."""
        del context
        self._calls.check_open()
        caller = current_caller()
        with span("gateway.submit", **{"gen_ai.request.model": request.request.model}):
            queue = self._queues.queue(request.request.model)
            async with self._admission.doors.passing(queue, request.request, caller.tenant):
                prepared = await self._admission.prepare(request.request)
                results = await self._admission.submit(queue, request.request, prepared, caller)
        return inference_pb2.SubmitResponse(
            request_ids=[result.request_id for result in results],
            accepted_at=convert.timestamp(results[0].accepted_at),
            profile=prepared.profile,
            waits_for=prepared.model.waits_for,
        )

    async def Watch(
        self, request: inference_pb2.WatchRequest, context: ServicerContext
    ) -> AsyncIterator[inference_pb2.WatchResponse]:
        """Stream an answer from an offset on."""
        call = self._calls.begin(context, "gateway.watch")
        tenant = current_caller().tenant
        request_id = request.request_id
        queue = self._queues.queue_of(request_id)
        # Asked first: nothing is opened for a model that nobody heard of.
        (standing,) = await queue.standings([request_id])
        if standing is None:
            raise not_found(request_id)
        frames = await self._queues.frames(queue.model)
        self._watch(
            call, frames, current_caller(), Answer(request_id, 0, request.next_offset), behind=True
        )
        await frames.source.subscribe(request_id, tenant)
        if request.next_offset > standing.tokens:
            raise InvalidArgumentError(
                f"next_offset: {request.next_offset}; {request_id} has {standing.tokens} tokens so "
                "far: give the number of tokens that you hold",
                field="next_offset",
                reason="OFFSET_OUT_OF_RANGE",
            )
        async for event in call.stream():
            yield inference_pb2.WatchResponse(event=event)

    async def Get(
        self, request: inference_pb2.GetRequest, context: ServicerContext
    ) -> inference_pb2.GetResponse:
        """Say where a request stands."""
        del context
        queue = self._queues.queue_of(request.request_id)
        record = await queue.record(request.request_id)
        if record.tenant != current_caller().tenant:
            raise not_found(request.request_id)
        answer = Answer(request.request_id)
        for chunk in await queue.read_log(request.request_id, 0):
            answer.add_tokens(chunk.generation, chunk.tokens)
        events = answer.take()
        return inference_pb2.GetResponse(
            request_id=request.request_id,
            model=queue.model,
            state=state_to_proto(record.state),
            accepted_at=convert.timestamp(record.accepted_at),
            promise=record.promise,
            profile=record.entry.profile,
            tokens=events[0].tokens if events else inference_pb2.Tokens(),
            finished=record.finished,
        )

    async def Cancel(
        self, request: inference_pb2.CancelRequest, context: ServicerContext
    ) -> inference_pb2.CancelResponse:
        """End a request."""
        del context
        state = await cancel_request(
            self._queues.queue_of(request.request_id),
            request.request_id,
            current_caller().tenant,
            now=self._context.clock.now(),
        )
        return inference_pb2.CancelResponse(state=state)

    async def Explain(
        self, request: inference_pb2.ExplainRequest, context: ServicerContext
    ) -> inference_pb2.ExplainResponse:
        """Say why a request was answered when it was, or was not."""
        del context
        request_id, tenant = request.request_id, current_caller().tenant
        queue = self._queues.queue_of(request_id)
        log = DecisionLog(self._context.redis, queue.model)
        now = self._context.clock.now()
        async with self._explaining:
            try:
                record = await queue.record(request_id)
            except NotFoundError:
                # Of a refusal there is soon nothing else.
                found = await explain_refused(queue.model, request_id, tenant, log, now)
                if found is None:
                    raise
                return found
            if record.tenant != tenant:
                raise not_found(request_id)
            return await explain_request(queue.model, record, log, now)

    async def Estimate(
        self, request: inference_pb2.EstimateRequest, context: ServicerContext
    ) -> inference_pb2.EstimateResponse:
        """Say what would be promised now."""
        prepared = await self._admission.prepare(request.request, answered=False)
        expected = await self._estimates.estimate(
            scheduler_pb2.SchedulerServiceEstimateRequest(
                model=prepared.model.name,
                slo=prepared.slo,
                profile=prepared.profile,
                on_infeasible=request.request.on_infeasible,
                tenant=current_caller().tenant,
                max_tokens=prepared.sampling.max_tokens,
            ),
            context.time_remaining(),
        )
        refused = expected.HasField("refusal")
        return inference_pb2.EstimateResponse(
            profile=prepared.profile,
            promise=expected.promise,
            refusal=expected.refusal if refused else None,
        )

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        """List what is served."""
        del request, context
        return inference_pb2.ListModelsResponse(models=await list_models(self._models))


def _accepted(
    result: AcceptResult, choice: int, profile: common_pb2.ResourceProfile, waits_for: str
) -> inference_pb2.GenerationEvent:
    return inference_pb2.GenerationEvent(
        request_id=result.request_id,
        choice=choice,
        accepted=inference_pb2.Accepted(
            accepted_at=convert.timestamp(result.accepted_at),
            profile=profile,
            existing=result.status == "existing",
            waits_for=waits_for,
        ),
    )


def _raise_if_refused(answer: Answer) -> None:
    """End a refused call with a status too, so that callers that only look there see it.

    Raises:
        ResourceExhaustedError: with the earliest feasible finish and when to try again.
    """
    finished = answer.finished
    if finished is None or finished.reason != common_pb2.FINISH_REASON_REFUSED:
        return
    metadata = {"request_id": answer.request_id}
    if answer.promise is not None and answer.promise.HasField("earliest_feasible_finish"):
        metadata["earliest_feasible_finish"] = (
            answer.promise.earliest_feasible_finish.ToJsonString()
        )
    retry_after = None
    if finished.failure.HasField("retry_after"):
        retry_after = convert.duration_seconds(finished.failure.retry_after)
    raise ResourceExhaustedError(
        finished.failure.message or "slo.deadline: it cannot be met",
        reason="DEADLINE_INFEASIBLE",
        field="slo.deadline",
        retry_after_seconds=retry_after,
        metadata=metadata,
    )
