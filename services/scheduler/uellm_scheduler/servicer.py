"""SchedulerService: queue state, estimates and policy, at the model's owner."""

import asyncio
import time
from typing import Any

import grpc

from uellm.convert import promise_to_proto, timestamp
from uellm.core.errors import InvalidArgumentError
from uellm.policy.choice import LEVELS, policies, settings_of
from uellm.service import Context
from uellm.v1 import common_pb2, scheduler_pb2, scheduler_pb2_grpc
from uellm_scheduler.forwarding import Forwarding
from uellm_scheduler.model_scheduler import ModelScheduler
from uellm_scheduler.outcome import failure_of
from uellm_scheduler.ownership import Ownership

Call = grpc.aio.ServicerContext[Any, Any]


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServiceServicer):
    """See protos/uellm/v1/scheduler.proto."""

    def __init__(self, context: Context, ownership: Ownership, forwarding: Forwarding) -> None:
        self._context = context
        self._ownership = ownership
        self._forwarding = forwarding
        # Of a long queue an estimate takes milliseconds: however many ask, decisions go on.
        self._estimating = asyncio.Lock()

    def _owned(self, model: str) -> ModelScheduler | None:
        return self._ownership.owned.get(model)

    async def Estimate(
        self, request: scheduler_pb2.SchedulerServiceEstimateRequest, context: Call
    ) -> scheduler_pb2.SchedulerServiceEstimateResponse:
        """Say what would be promised to a request that came now."""
        if not request.profile.output_tokens.levels:
            raise InvalidArgumentError(
                "profile.output_tokens: empty; levels and as many values are needed",
                field="profile.output_tokens",
            )
        async with self._estimating:
            owner = self._owned(request.model)
            if owner is not None:
                return await self._estimated(owner, request)
        answer: scheduler_pb2.SchedulerServiceEstimateResponse = await self._forwarding.to_owner(
            "Estimate", request, context
        )
        return answer

    async def _estimated(
        self, owner: ModelScheduler, request: scheduler_pb2.SchedulerServiceEstimateRequest
    ) -> scheduler_pb2.SchedulerServiceEstimateResponse:
        """An estimate; then as much time as it took is left to everything else."""
        began = time.monotonic()
        try:
            promise, refusal = owner.estimate(request)
        except ValueError as error:
            raise InvalidArgumentError(
                f"profile.output_tokens: {error}", field="profile.output_tokens"
            ) from None
        finally:
            await asyncio.sleep(time.monotonic() - began)
        return scheduler_pb2.SchedulerServiceEstimateResponse(
            promise=promise_to_proto(promise, 0),
            refusal=failure_of(refusal) if refusal is not None else None,
        )

    async def GetQueue(
        self, request: scheduler_pb2.GetQueueRequest, context: Call
    ) -> scheduler_pb2.GetQueueResponse:
        """Describe a model's queue as it stands."""
        owner = self._owned(request.model)
        if owner is None:
            answer: scheduler_pb2.GetQueueResponse = await self._forwarding.to_owner(
                "GetQueue", request, context
            )
            return answer
        ordered = [owner.book.waiting[i] for i in owner.order if i in owner.book.waiting]
        seen = set(owner.order)
        ordered += [ticket for i, ticket in owner.book.waiting.items() if i not in seen]
        return scheduler_pb2.GetQueueResponse(
            queued=[
                scheduler_pb2.QueuedRequest(
                    request_id=ticket.request_id,
                    promise=ticket.promise,
                    accepted_at=timestamp(ticket.view.slo.accepted_at),
                )
                for ticket in ordered
            ],
            replicas=[
                scheduler_pb2.ReplicaLoad(
                    replica=view.replica,
                    in_flight=len(view.in_flight),
                    slots=view.slots,
                    kv_tokens_free=owner.routes[view.replica].report.kv_tokens_free,
                )
                for view in owner.book.replica_views(owner.routes)
            ],
            owner=self._context.identity,
        )

    async def GetPolicy(
        self, request: scheduler_pb2.GetPolicyRequest, context: Call
    ) -> scheduler_pb2.GetPolicyResponse:
        """Describe the policy in force."""
        owner = self._owned(request.model)
        if owner is None:
            answer: scheduler_pb2.GetPolicyResponse = await self._forwarding.to_owner(
                "GetPolicy", request, context
            )
            return answer
        in_force = owner.in_force
        return scheduler_pb2.GetPolicyResponse(
            policy=in_force.policy.name,
            available=policies(),
            chosen=in_force.record,
            settings=[
                scheduler_pb2.PolicySetting(
                    name=name, level=level, value=value, default_value=default, description=what
                )
                for level in LEVELS
                for name, (value, default, what) in settings_of(in_force.choice, level).items()
            ],
            replicas=[
                scheduler_pb2.ReplicaPolicy(
                    replica=name, policy=route.report.policy, execution=route.report.execution
                )
                for name, route in sorted(owner.routes.items())
                if route.state == "READY"
            ],
        )

    async def SetPolicy(
        self, request: scheduler_pb2.SetPolicyRequest, context: Call
    ) -> scheduler_pb2.SetPolicyResponse:
        """Change the policy."""
        owner = self._owned(request.model)
        if owner is None:
            answer: scheduler_pb2.SetPolicyResponse = await self._forwarding.to_owner(
                "SetPolicy", request, context
            )
            return answer
        record = None
        if request.policy:
            record = common_pb2.ModelPolicy(
                policy=request.policy,
                settings=request.settings,
                execution=request.execution,
                class_defaults=request.class_defaults,
            )
        elif request.settings or request.execution or request.class_defaults:
            raise InvalidArgumentError(
                "policy: empty, and there is more; name the policy that the rest is for",
                field="policy",
            )
        return scheduler_pb2.SetPolicyResponse(previous=await owner.set_policy(record))
