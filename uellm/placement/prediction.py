"""What a replica that is placed so will be like: its stages, their memory and its speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from uellm.placement.costs import Costs
from uellm.placement.quota import step_seconds
from uellm.placement.views import PlannedReplica, PlannedStage, Prediction

_ROUNDS = 3
"""Of how fast a replica is, and how much of quotas that needs."""


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
    return _predicted(costs, layout, _stage_seconds(costs, layout))


@dataclass(frozen=True, slots=True)
class _Seconds:
    """What a stage takes for a batch's prompts, and for a step that decodes."""

    prefill: float
    decode: float


def _stage_seconds(costs: Costs, layout: Layout) -> list[_Seconds]:
    """Of each stage. One with a quota is held back the more the more of its time is needed."""
    sustained = [
        _Seconds(float(costs.prefill[d, a : b + 1].sum()), float(costs.decode[d, a : b + 1].sum()))
        for d, (a, b) in zip(layout.order, layout.ranges, strict=True)
    ]
    last = len(sustained) - 1
    besides = [
        float(costs.stage[d]) + (float(costs.head[d]) if index == last else 0.0)
        for index, d in enumerate(layout.order)
    ]
    sustained = [
        _Seconds(each.prefill + more, each.decode + more)
        for each, more in zip(sustained, besides, strict=True)
    ]
    found = sustained
    if all(costs.share[d] >= 1 for d in layout.order):
        return found
    for _ in range(_ROUNDS):
        pace = _predicted(costs, layout, found).bottleneck_seconds
        found = [
            _held_back(costs, device, each, work / pace if pace > 0 else 0.0)
            for device, each, work in zip(
                layout.order, sustained, _work(costs, layout, sustained), strict=True
            )
        ]
    return found


def _held_back(costs: Costs, device: int, stage: _Seconds, busy: float) -> _Seconds:
    share, period = float(costs.share[device]), float(costs.period[device])
    return _Seconds(
        step_seconds(stage.prefill, share, period, busy),
        step_seconds(stage.decode, share, period, busy),
    )


def _work(costs: Costs, layout: Layout, stages: Sequence[_Seconds]) -> list[float]:
    """Seconds of a batch from prompt to last token, by stage."""
    work = [stage.prefill + costs.steps * stage.decode for stage in stages]
    work[0] += float(costs.leader_total[layout.order[0]])
    return work


def _predicted(costs: Costs, layout: Layout, stages: Sequence[_Seconds]) -> Prediction:
    first, last = layout.order[0], layout.order[-1]
    ways = list(pairwise(layout.order))
    besides = float(costs.leader[first]) + float(costs.back[last, first])
    prefill = besides + sum(stage.prefill for stage in stages)
    decode = besides + sum(stage.decode for stage in stages)
    prefill += sum(float(costs.link_prefill[way]) for way in ways)
    decode += sum(float(costs.link_decode[way]) for way in ways)
    total = prefill + costs.steps * decode
    work = _work(costs, layout, stages)
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
    seconds = _stage_seconds(costs, layout)
    for index, (device, (first, last)) in enumerate(zip(layout.order, layout.ranges, strict=True)):
        after = layout.order[index + 1] if index + 1 < len(layout.order) else layout.order[0]
        way = costs.link_decode if index + 1 < len(layout.order) else costs.back
        stages.append(
            PlannedStage(
                device_id=costs.devices[device].id,
                first_layer=first,
                last_layer=last,
                has_embed=first == 0,
                has_head=last == costs.num_layers - 1,
                memory_bytes=costs.need.stage(first, last),
                kv_bytes=costs.need.kv(first, last),
                prefill_seconds=seconds[index].prefill,
                decode_seconds=seconds[index].decode,
                send_seconds=float(way[device, after]),
            )
        )
    return PlannedReplica(tuple(stages), _predicted(costs, layout, seconds))


def layout_of(costs: Costs, replica: PlannedReplica) -> Layout | None:
    """A planned replica by number; None if one of its devices is not there."""
    index = {device.id: i for i, device in enumerate(costs.devices)}
    if any(stage.device_id not in index for stage in replica.stages):
        return None
    order: Sequence[int] = [index[stage.device_id] for stage in replica.stages]
    layers = [stage.last_layer - stage.first_layer + 1 for stage in replica.stages]
    return Layout(tuple(order), tuple(layers))
