"""Between protobuf messages and models, devices, links and plans as plain data, both ways."""

from uellm.convert import cost_from_proto, seconds, timestamp
from uellm.core.model import LayerProfile, ModelProfile
from uellm.placement.learning import Correction
from uellm.placement.measuring import BlockCost, BlockSample, left_over
from uellm.placement.topology import Device, Link, LinkSpeed, Topology
from uellm.placement.views import PlannedReplica, PlannedStage, Prediction
from uellm.v1 import topology_pb2


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
