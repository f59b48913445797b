"""Between protobuf messages and the plain data that decisions are made on. One place, both ways."""

import dataclasses
from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from uellm.core.cost import StepCost
from uellm.core.load import OfferedLoad
from uellm.core.model import LayerProfile, ModelProfile
from uellm.core.request import Priority, Promise, QuantileFunction, ResourceProfile, Slo
from uellm.placement.learning import Correction
from uellm.placement.measuring import BlockCost, BlockSample, left_over
from uellm.placement.topology import Device, Link, LinkSpeed, Topology
from uellm.placement.views import PlannedReplica, PlannedStage, Prediction
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


def model_from_proto(message: topology_pb2.ModelProfile) -> ModelProfile:
    """A model's needs."""
    return ModelProfile(
        layers=tuple(
            LayerProfile(
                weight_bytes=layer.weight_bytes,
                kv_bytes_per_token=layer.kv_bytes_per_token,
                flops_per_token=layer.flops_per_token,
                state_bytes=layer.state_bytes,
            )
            for layer in message.layers
        ),
        embed_bytes=message.embed_bytes,
        head_bytes=message.head_bytes,
        tied=message.tied,
        activation_bytes_per_token=message.activation_bytes_per_token,
        max_tokens=message.max_tokens,
        vocab_size=message.vocab_size,
        hidden_size=message.hidden_size,
        architecture=message.architecture,
        stored_dtype=message.stored_dtype,
    )


def model_to_proto(model: ModelProfile) -> topology_pb2.ModelProfile:
    """A model's needs for the wire."""
    return topology_pb2.ModelProfile(
        layers=[
            topology_pb2.LayerProfile(
                weight_bytes=layer.weight_bytes,
                kv_bytes_per_token=layer.kv_bytes_per_token,
                flops_per_token=layer.flops_per_token,
                state_bytes=layer.state_bytes,
            )
            for layer in model.layers
        ],
        embed_bytes=model.embed_bytes,
        head_bytes=model.head_bytes,
        tied=model.tied,
        activation_bytes_per_token=model.activation_bytes_per_token,
        max_tokens=model.max_tokens,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        architecture=model.architecture,
        stored_dtype=model.stored_dtype,
    )


_KINDS = {
    topology_pb2.DEVICE_KIND_CPU: "cpu",
    topology_pb2.DEVICE_KIND_CUDA: "cuda",
    topology_pb2.DEVICE_KIND_SIMULATED: "simulated",
}


def device_from_proto(
    message: topology_pb2.Device, memory_bytes: int | None = None, num_stages: int = 0
) -> Device:
    """A device as a plan may fill it.

    Args:
        message: the device.
        memory_bytes: what a plan may fill of it; None: what is free.
        num_stages: stages of other replicas that it holds.
    """
    return Device(
        id=message.id,
        worker=message.worker or message.id.rpartition("/")[0],
        host=message.host,
        kind=_KINDS.get(message.kind, "other"),
        memory_bytes=message.memory_free_bytes if memory_bytes is None else memory_bytes,
        num_stages=num_stages,
        flops_per_second=message.flops_per_second,
        memory_bytes_per_second=message.memory_bytes_per_second,
        name=message.name,
        path=tuple(message.path),
        launch_seconds=message.launch_seconds,
        slowdown=message.slowdown or 1.0,
        step_seconds=message.step_seconds,
        prefill_ratio=message.prefill_ratio or 1.0,
        healthy=message.healthy,
        cost=message.cost if message.HasField("cost") else 1.0,
    )


def link_from_proto(message: topology_pb2.Link) -> Link:
    """A way between two devices."""
    return Link(
        src=message.src,
        dst=message.dst,
        latency_seconds=message.latency_seconds,
        bytes_per_second=message.bytes_per_second,
        source=message.source,
        measured_at=seconds(message.measured_at) if message.HasField("measured_at") else None,
        kind=message.kind,
        passing_seconds=message.passing_seconds,
    )


def link_to_proto(link: Link) -> topology_pb2.Link:
    """A way between two devices for the wire."""
    return topology_pb2.Link(
        src=link.src,
        dst=link.dst,
        kind=link.kind,
        latency_seconds=link.latency_seconds,
        bytes_per_second=link.bytes_per_second,
        measured_at=None if link.measured_at is None else timestamp(link.measured_at),
        source=link.source,
        passing_seconds=link.passing_seconds,
    )


def topology_from_proto(message: topology_pb2.Topology) -> Topology:
    """What there is to place on.

    Raises:
        InvalidArgumentError: naming the device, link or level that cannot be.
    """
    return Topology(
        devices=tuple(device_from_proto(device) for device in message.devices),
        links=tuple(link_from_proto(link) for link in message.links),
        default_link_by_level={
            link.level: LinkSpeed(link.latency_seconds, link.bytes_per_second)
            for link in message.default_links
        },
    )


def sample_from_proto(point: topology_pb2.BlockPoint) -> BlockSample:
    """A step that was timed."""
    facts = (point.tokens, point.context_tokens, point.pairs)
    return BlockSample(*facts, point.layer_seconds, point.step_seconds, point.ends_seconds)


def block_from_proto(message: topology_pb2.BlockCost) -> BlockCost:
    """What a layer takes on a device."""
    layer = cost_from_proto(message.layer)
    return BlockCost(
        layer=layer,
        step_seconds=message.step_seconds,
        error=message.error,
        weight_bytes=message.weight_bytes,
        flops_per_token=message.flops_per_token,
        measured_at=seconds(message.measured_at),
        live=Correction(
            message.live_ratio or 1.0,
            message.live_step_seconds,
            message.live_prefill_ratio or 1.0,
        ),
        ends=cost_from_proto(message.ends) if message.HasField("ends") else None,
        leader_seconds=message.leader_seconds,
        agent_seconds=message.agent_seconds,
        share=message.share or 1.0,
        period_seconds=message.period_seconds,
        left_over=left_over([sample_from_proto(point) for point in message.points], layer),
    )


_STAGE = (
    *("device_id", "first_layer", "last_layer", "has_embed", "has_head", "memory_bytes"),
    *("kv_bytes", "prefill_seconds", "decode_seconds", "send_seconds"),
)
_PREDICTION = (
    *("prefill_seconds", "decode_seconds", "total_seconds", "bottleneck_seconds", "bottleneck"),
    "tokens_per_second",
)


def planned_to_proto(replica: PlannedReplica) -> topology_pb2.PlannedReplica:
    """A planned replica for the wire."""
    message = topology_pb2.PlannedReplica(
        stages=[
            topology_pb2.PlannedStage(**{name: getattr(stage, name) for name in _STAGE})
            for stage in replica.stages
        ]
    )
    if (found := replica.prediction) is not None:
        for name in _PREDICTION:
            setattr(message.prediction, name, getattr(found, name))
    return message


def planned_from_proto(message: topology_pb2.PlannedReplica) -> PlannedReplica:
    """A planned replica from the wire."""
    stages = tuple(
        PlannedStage(**{name: getattr(stage, name) for name in _STAGE}) for stage in message.stages
    )
    prediction = None
    if message.HasField("prediction"):
        prediction = Prediction(**{n: getattr(message.prediction, n) for n in _PREDICTION})
    return PlannedReplica(stages, prediction)
