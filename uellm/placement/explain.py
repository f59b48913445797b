"""Plans in plain words: why they look as they do."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from uellm.placement.memory import Need
from uellm.placement.views import IN_FLIGHT, Certificate, PlannedReplica, PlanRequest, Workload


def size(num_bytes: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError("unreachable: GiB returns")


def bound_by(bottleneck: str) -> str:
    """What sets the pace, for people; see ``Prediction``."""
    return (
        "bound by how few batches are in flight"
        if bottleneck == IN_FLIGHT
        else (f"bound by {bottleneck}")
    )


def explain(
    planned: Sequence[PlannedReplica], need: Need, wanted: Workload, num_devices: int
) -> str:
    """Where the layers went, and where that is less than was wanted, why."""
    sentences = []
    for index, replica in enumerate(planned):
        parts = [
            f"layers {stage.first_layer} to {stage.last_layer} on {stage.device_id} "
            f"({size(stage.memory_bytes)})"
            for stage in replica.stages
        ]
        name = f"replica {index}: " if len(planned) > 1 else ""
        sentences.append(f"{name}{', '.join(parts)}")
    if not planned:
        return ""
    stages = len(planned[0].stages)
    if wanted.stages and stages != wanted.stages:
        num_layers = len(need.model.layers)
        most = f"{num_layers} layers" if num_layers < wanted.stages else f"{num_devices} device(s)"
        sentences.append(f"{stages} stage(s) instead of {wanted.stages}: there are {most}")
    granted = f"{need.slots} slot(s) of {need.max_tokens} tokens"
    if wanted.max_tokens > need.model.max_tokens:
        granted += f" instead of {wanted.max_tokens}: the model takes no more"
    if need.cached_tokens < need.slots * need.max_tokens:
        granted += f", {need.cached_tokens} together"
    if need.slots < wanted.slots:
        granted += f" instead of {wanted.slots}: more do not fit beside the weights"
    sentences.append(granted)
    return "; ".join(sentences)


def explain_plan(
    planned: Sequence[PlannedReplica],
    need: Need,
    request: PlanRequest,
    certificate: Certificate | None,
    *,
    exhausted: bool = False,
) -> str:
    """Where the layers went, how fast that will be, and how good it is at least."""
    if not planned:
        return ""
    devices = [device for device in request.topology.devices if device.healthy]
    # With a load described, slots are not what was asked for.
    wanted = request.workload
    if wanted.batch:
        wanted = replace(wanted, slots=need.slots)
    sentences = [explain(planned, need, wanted, len(devices))]
    for index, replica in enumerate(planned):
        found = replica.prediction
        if found is not None:
            name = f"replica {index}: " if len(planned) > 1 else ""
            sentences.append(
                f"{name}{found.total_seconds:.3g} s a batch, {found.tokens_per_second:.4g} "
                f"tokens/s, {bound_by(found.bottleneck)}"
            )
    if certificate is not None:
        how = (
            "proven to be the best"
            if certificate.ratio <= 1 + 1e-9
            else f"at most {certificate.ratio:.4g} times from the best"
        )
        sentences.append(f"{request.objective}: {how} ({certificate.proof})")
    if slo_missed(planned, request):
        sentences.append(
            f"this misses the SLO of {wanted.slo_seconds:.3g} s, which {request.objective} does "
            "not look at: ask for helr"
        )
    if exhausted:
        sentences.append(f"the search ended with its budget of {request.budget_seconds:g} s")
    return "; ".join(sentences)


def slo_missed(planned: Sequence[PlannedReplica], request: PlanRequest) -> bool:
    """Whether a copy takes longer than the SLO that was asked for."""
    # As much longer as the two ways to add up its seconds differ by is none.
    limit = request.workload.slo_seconds * (1 + 1e-6)
    return limit > 0 and any(
        replica.prediction is not None and replica.prediction.total_seconds > limit
        for replica in planned
    )


def last_that(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The last number before ``high`` for which it holds; it does for ``low``."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
