"""Between protobuf messages and the plain data that decisions are made on, both ways.

Devices, models and plans: ``uellm.convert_topology``.
"""

import dataclasses
from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from uellm.core.cost import StepCost
from uellm.core.load import OfferedLoad
from uellm.core.request import Priority, Promise, QuantileFunction, ResourceProfile, Slo
from uellm.v1 import common_pb2, queue_pb2, topology_pb2


def timestamp(seconds: float) -> Timestamp:
    """Seconds since the epoch as a Timestamp."""
    message = Timestamp()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def seconds(message: Timestamp) -> float:
    """A Timestamp as seconds since the epoch."""
    return message.ToNanoseconds() / 1e9


def duration(value: float) -> Duration:
    """Seconds as a Duration."""
    message = Duration()
    message.FromNanoseconds(round(value * 1e9))
    return message


def duration_seconds(message: Duration) -> float:
    """A Duration as seconds."""
    return message.ToNanoseconds() / 1e9


def device_shards(
    assignment: topology_pb2.ShardAssignment,
) -> Sequence[topology_pb2.DeviceShard]:
    """What each device of a stage holds, in layer order: at least one."""
    if assignment.shards:
        return assignment.shards
    return [
        topology_pb2.DeviceShard(
            device_id=next(iter(assignment.device_ids), ""),
            first_layer=assignment.first_layer,
            last_layer=assignment.last_layer,
            kv_bytes=assignment.kv_bytes,
        )
    ]


def slo_from_proto(message: common_pb2.Slo, accepted_at: float) -> Slo:
    """An SLO made absolute by the time its request was accepted."""
    deadline = duration_seconds(message.deadline) if message.HasField("deadline") else None
    ttft = duration_seconds(message.ttft) if message.HasField("ttft") else None
    return Slo(
        accepted_at=accepted_at,
        deadline_at=None if deadline is None else accepted_at + deadline,
        ttft_at=None if ttft is None else accepted_at + ttft,
        tpot_seconds=duration_seconds(message.tpot) if message.HasField("tpot") else None,
        priority=Priority(message.priority or common_pb2.PRIORITY_NORMAL),
    )


def profile_from_proto(message: common_pb2.ResourceProfile) -> ResourceProfile:
    """A profile; its quantiles are valid by construction at the gateway."""
    quantiles = message.output_tokens
    return ResourceProfile(
        prompt_tokens=message.prompt_tokens,
        output_tokens=QuantileFunction(quantiles.levels, quantiles.values),
        kv_bytes=message.kv_bytes,
        flops=message.flops,
        predictor=message.predictor,
        predictor_version=message.predictor_version,
        fallback=message.fallback,
        image_tokens=message.image_tokens,
        bucket=message.bucket,
    )


def quantiles_to_proto(quantiles: QuantileFunction) -> common_pb2.QuantileFunction:
    """A quantile function for the wire."""
    return common_pb2.QuantileFunction(levels=quantiles.levels, values=quantiles.values)


def profile_to_proto(profile: ResourceProfile) -> common_pb2.ResourceProfile:
    """A profile for the wire."""
    return common_pb2.ResourceProfile(
        prompt_tokens=profile.prompt_tokens,
        output_tokens=quantiles_to_proto(profile.output_tokens),
        mean_output_tokens=profile.output_tokens.mean,
        kv_bytes=profile.kv_bytes,
        flops=profile.flops,
        predictor=profile.predictor,
        predictor_version=profile.predictor_version,
        fallback=profile.fallback,
        image_tokens=profile.image_tokens,
        bucket=profile.bucket,
    )


def promise_to_proto(promise: Promise, revision: int) -> common_pb2.Promise:
    """A promise for the wire."""
    message = common_pb2.Promise(
        revision=revision,
        start_p50=timestamp(promise.start_p50),
        start_p90=timestamp(promise.start_p90),
        finish_p50=timestamp(promise.finish_p50),
        finish_p90=timestamp(promise.finish_p90),
        p_meet=promise.p_meet,
        queue_position=promise.queue_position,
        policy=promise.policy,
        reason=promise.reason,
        plan_epoch=promise.plan_epoch,
        output_tokens_p50=promise.output_tokens_p50,
        output_tokens_p90=promise.output_tokens_p90,
        best_effort=promise.best_effort,
    )
    if promise.earliest_feasible_finish is not None:
        message.earliest_feasible_finish.CopyFrom(timestamp(promise.earliest_feasible_finish))
    return message


def promise_from_proto(message: common_pb2.Promise) -> Promise:
    """A promise from the wire; its revision is the message's own."""
    earliest = message.HasField("earliest_feasible_finish")
    return Promise(
        start_p50=seconds(message.start_p50),
        start_p90=seconds(message.start_p90),
        finish_p50=seconds(message.finish_p50),
        finish_p90=seconds(message.finish_p90),
        p_meet=message.p_meet if message.HasField("p_meet") else None,
        queue_position=message.queue_position,
        policy=message.policy,
        reason=message.reason,
        output_tokens_p50=message.output_tokens_p50,
        output_tokens_p90=message.output_tokens_p90,
        plan_epoch=message.plan_epoch,
        earliest_feasible_finish=seconds(message.earliest_feasible_finish) if earliest else None,
        best_effort=message.best_effort,
    )


def cost_from_proto(message: common_pb2.StepCost) -> StepCost:
    """What a step takes."""
    return StepCost(
        overhead=message.overhead_seconds,
        weights=message.weights_seconds,
        per_token=message.token_seconds,
        per_context=message.context_seconds,
        per_pair=message.pair_seconds,
    )


def cost_to_proto(
    cost: StepCost, observations: int = 0, mean_error: float = 0.0
) -> common_pb2.StepCost:
    """What a step takes, fitted to so many observations."""
    return common_pb2.StepCost(
        overhead_seconds=cost.overhead,
        weights_seconds=cost.weights,
        token_seconds=cost.per_token,
        context_seconds=cost.per_context,
        pair_seconds=cost.per_pair,
        observations=observations,
        mean_error=mean_error,
    )


def verdict(
    slo: Slo, first_token_at: float | None, finished_at: float, output_tokens: int
) -> common_pb2.SloVerdict:
    """What became of each part of an SLO, for an answer that was completed.

    The time per output token is the mean from the first token to the last.
    """
    start = finished_at if first_token_at is None else first_token_at
    deadline_met = None if slo.deadline_at is None else finished_at <= slo.deadline_at
    ttft_met = None if slo.ttft_at is None else start <= slo.ttft_at
    tpot_met = None
    if slo.tpot_seconds is not None:
        tpot_met = (finished_at - start) / max(output_tokens - 1, 1) <= slo.tpot_seconds
    return common_pb2.SloVerdict(
        met=False not in (deadline_met, ttft_met, tpot_met),
        deadline_met=deadline_met,
        ttft_met=ttft_met,
        tpot_met=tpot_met,
    )


_OF_LOAD = tuple(
    field.name for field in dataclasses.fields(OfferedLoad) if field.name != "measured_at"
)


def load_to_proto(load: OfferedLoad) -> queue_pb2.OfferedLoad:
    """A load as its scheduler keeps it."""
    facts = {name: getattr(load, name) for name in _OF_LOAD}
    return queue_pb2.OfferedLoad(measured_at=timestamp(load.measured_at), **facts)


def load_from_proto(message: queue_pb2.OfferedLoad) -> OfferedLoad:
    """A load as a scheduler kept it."""
    facts = {name: getattr(message, name) for name in _OF_LOAD}
    return OfferedLoad(measured_at=seconds(message.measured_at), **facts)
