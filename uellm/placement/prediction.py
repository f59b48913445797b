"""What a replica that is placed so will be like: its stages, their memory and its speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from uellm.placement.costs import Costs
from uellm.placement.views import PlannedReplica, PlannedStage, Prediction


@dataclass(frozen=True, slots=True)
class Layout:
    """Devices in stage order by number, and how many layers each takes."""

    order: tuple[int, ...]
    layers: tuple[int, ...]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First and last layer of each stage, both inclusive."""
        ends = list(accumulate(self.layers))
        return [(end - count, end - 1) for end, count in zip(ends, self.layers, strict=True)]


def shortages(costs: Costs, layout: Layout) -> dict[str, int]:
    """Bytes that a layout lacks, by device."""
    missing = {}
    for device, (first, last) in zip(layout.order, layout.ranges, strict=True):
        gap = costs.need.stage(first, last) - int(costs.room[device])
        if gap > 0:
            missing[costs.devices[device].id] = gap
    return missing


def latency(costs: Costs, layout: Layout) -> float:
    """Seconds of a batch from prompt to last token."""
    return predict(costs, layout).total_seconds


def predict(costs: Costs, layout: Layout) -> Prediction:
    """How fast a layout is."""
    stages = list(zip(layout.order, layout.ranges, strict=True))
    last = layout.order[-1]
    ways = list(pairwise(layout.order))
    prefill = sum(float(costs.prefill[d, a : b + 1].sum()) for d, (a, b) in stages)
    decode = sum(float(costs.decode[d, a : b + 1].sum()) for d, (a, b) in stages)
    besides = float(costs.head[last]) + sum(float(costs.stage[d]) for d, _ in stages)
    prefill += besides + sum(float(costs.link_prefill[way]) for way in ways)
    decode += besides + sum(float(costs.link_decode[way]) for way in ways)
    total = prefill + costs.steps * decode
    work = [float(costs.layer[d, a : b + 1].sum() + costs.stage_total[d]) for d, (a, b) in stages]
    work[-1] += float(costs.head_total[last])
    limits = [(seconds, costs.devices[d].id) for seconds, d in zip(work, layout.order, strict=True)]
    limits += [
        (float(costs.busy[a, b]), f"{costs.devices[a].id} -> {costs.devices[b].id}")
        for a, b in ways
    ]
    limits.append((total / costs.in_flight, "in_flight"))
    pace, bottleneck = max(limits, key=lambda limit: limit[0])
    return Prediction(
        prefill_seconds=prefill,
        decode_seconds=decode,
        total_seconds=total,
        bottleneck_seconds=pace,
        bottleneck=bottleneck,
        tokens_per_second=costs.batch * costs.output_tokens / pace if pace > 0 else np.inf,
    )


def planned(costs: Costs, layout: Layout) -> PlannedReplica:
    """A layout as a plan shows it."""
    stages = []
    num_layers = costs.num_layers
    for index, (device, (first, last)) in enumerate(zip(layout.order, layout.ranges, strict=True)):
        has_head = last == num_layers - 1
        besides = float(costs.stage[device]) + (float(costs.head[device]) if has_head else 0.0)
        after = layout.order[index + 1] if index + 1 < len(layout.order) else device
        stages.append(
            PlannedStage(
                device_id=costs.devices[device].id,
                first_layer=first,
                last_layer=last,
                has_embed=first == 0,
                has_head=has_head,
                memory_bytes=costs.need.stage(first, last),
                kv_bytes=costs.need.kv(first, last),
                prefill_seconds=float(costs.prefill[device, first : last + 1].sum()) + besides,
                decode_seconds=float(costs.decode[device, first : last + 1].sum()) + besides,
                send_seconds=float(costs.link_decode[device, after]),
            )
        )
    return PlannedReplica(tuple(stages), predict(costs, layout))


def layout_of(costs: Costs, replica: PlannedReplica) -> Layout | None:
    """A planned replica by number; None if one of its devices is not there."""
    index = {device.id: i for i, device in enumerate(costs.devices)}
    if any(stage.device_id not in index for stage in replica.stages):
        return None
    order: Sequence[int] = [index[stage.device_id] for stage in replica.stages]
    layers = [stage.last_layer - stage.first_layer + 1 for stage in replica.stages]
    return Layout(tuple(order), tuple(layers))
