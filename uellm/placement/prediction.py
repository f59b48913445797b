"""What a replica that is placed so will be like: its stages, their memory and its speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from uellm.placement.costs import Costs
from uellm.placement.quota import step_seconds, sustained_seconds
from uellm.placement.rounds import Stations, steady_seconds
from uellm.placement.views import IN_FLIGHT, PlannedReplica, PlannedStage, Prediction

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
    return _Replica(costs, layout).prediction


@dataclass(frozen=True, slots=True)
class _Seconds:
    """What a stage takes for a batch's prompts, for a step that decodes, and between two steps.

    ``others`` is what it loses of every step to other work on its processors: nobody waits for
    that, but steps follow each other the later.
    """

    prefill: float
    decode: float
    led: float
    others: float = 0.0

    @property
    def besides(self) -> float:
        """Of a step, what takes of the same processors."""
        return self.led + self.others


@dataclass(frozen=True, slots=True)
class StageParts:
    """What a stage takes of a step that decodes, or of prompts, by what takes it.

    Attributes:
        layers: seconds of its layers if the device always computes.
        besides: seconds of the rest, likewise.
        took: seconds as its quota lets it.
        led: seconds of what a leader does between two steps, likewise.
        quota: share of the time that it may compute, the quota's period, and what of it the stage
            and other work use; see ``uellm.placement.quota``.
    """

    layers: float
    besides: float
    took: float
    led: float
    quota: tuple[float, float, float, float]

    def sustained(self, took: float) -> float:
        """What it would take if the device always computed, where it took so long."""
        alone = self.layers + self.besides
        with_led = (alone + self.led) / alone if alone > 0 else 1.0
        return sustained_seconds(took * with_led, *self.quota) / with_led


class _Replica:
    """A layout's stages, as they are if they always compute, and as their quotas have them.

    Attributes:
        stages: what each takes, on the average.
        prediction: of the whole.
    """

    def __init__(self, costs: Costs, layout: Layout) -> None:
        self._costs, self._layout = costs, layout
        self._always = [self._seconds(index) for index in range(len(layout.order))]
        self._work = [
            each.prefill + costs.steps * each.decode + costs.output_tokens * each.besides
            for each in self._always
        ]
        self.stages = self._always
        self.prediction = self._predicted()
        if any(costs.share[d] < 1 for d in layout.order):
            for _ in range(_ROUNDS):
                uses = [self._use(index) for index in range(len(layout.order))]
                self.stages = [self._held_back(index, *use) for index, use in enumerate(uses)]
                self.prediction = self._predicted()

    def parts(self, *, prompts: bool) -> list[StageParts]:
        """See ``parts``."""
        costs = self._costs
        found = []
        of_layers = costs.prefill if prompts else costs.decode
        for index, device in enumerate(self._layout.order):
            first, last = self._layout.ranges[index]
            always, held = self._always[index], self.stages[index]
            layers = float(of_layers[device, first : last + 1].sum())
            found.append(
                StageParts(
                    layers=layers,
                    besides=(always.prefill if prompts else always.decode) - layers,
                    took=held.prefill if prompts else held.decode,
                    led=always.led,
                    quota=(
                        float(costs.share[device]),
                        float(costs.period[device]),
                        *self._use(index),
                    ),
                )
            )
        return found

    def _seconds(self, index: int) -> _Seconds:
        costs, device = self._costs, self._layout.order[index]
        first, last = self._layout.ranges[index]
        besides = float(costs.stage[device])
        if index == len(self._layout.order) - 1:
            besides += float(costs.head[device])
        return _Seconds(
            float(costs.prefill[device, first : last + 1].sum()) + besides,
            float(costs.decode[device, first : last + 1].sum()) + besides,
            float(costs.leader[device]) if index == 0 else 0.0,
            self._others(index),
        )

    def _others(self, index: int) -> float:
        costs, order = self._costs, self._layout.order
        several = len({costs.devices[device].worker for device in order}) > 1
        passing = float(costs.passing[order[index]]) if several else 0.0
        return passing + (float(costs.agent[order[index]]) if index == 0 else 0.0)

    def _held_back(self, index: int, own: float, others: float) -> _Seconds:
        """A stage that needs so much of its quota, of which other work takes as well."""
        device, stage = self._layout.order[index], self._always[index]
        share, period = float(self._costs.share[device]), float(self._costs.period[device])
        quota = share, period, own, others
        decode = stage.decode + stage.led
        slowed = step_seconds(decode, *quota) / decode if decode > 0 else 1.0
        prefill = step_seconds(stage.prefill + stage.led, *quota)
        return _Seconds(
            max(prefill - slowed * stage.led, 0.0),
            slowed * stage.decode,
            slowed * stage.led,
            stage.others,
        )

    def _use(self, index: int) -> tuple[float, float]:
        """Shares of its quota that a stage uses, and that other work uses for it."""
        pace = self.prediction.bottleneck_seconds
        others = self._costs.output_tokens * self._always[index].others
        work = self._work[index]
        return ((work - others) / pace, others / pace) if pace > 0 else (0.0, 0.0)

    def _predicted(self) -> Prediction:
        costs, order = self._costs, self._layout.order
        ways = list(pairwise(order))
        back = float(costs.back[order[-1], order[0]])
        prefill = back + sum(stage.prefill + stage.led for stage in self.stages)
        decode = back + sum(stage.decode + stage.led for stage in self.stages)
        prefill += sum(float(costs.link_prefill[way]) for way in ways)
        decode += sum(float(costs.link_decode[way]) for way in ways)
        # However short its steps are, a stage needs its quota for all of them.
        total = max(prefill + costs.steps * decode, *self._work)
        names = [costs.devices[d].id for d in order]
        limits = list(zip(self._work, names, strict=True))
        limits += [
            (float(costs.busy[a, b]), f"{costs.devices[a].id} -> {costs.devices[b].id}")
            for a, b in ways
        ]
        limits.append((total / costs.in_flight, IN_FLIGHT))
        pace, bottleneck = max(limits, key=lambda limit: limit[0])
        stations = Stations(
            prefill=[each.prefill + each.besides for each in self._always],
            decode=[each.decode + each.besides for each in self._always],
            first=prefill,
            next=decode,
        )
        steady = max(
            pace, steady_seconds(stations, costs.batch, costs.in_flight, costs.output_tokens)
        )
        return Prediction(
            prefill_seconds=prefill,
            decode_seconds=decode,
            total_seconds=total,
            bottleneck_seconds=pace,
            bottleneck=bottleneck,
            tokens_per_second=costs.batch * costs.output_tokens / steady if pace > 0 else np.inf,
        )


def parts(costs: Costs, layout: Layout, *, prompts: bool = False) -> list[StageParts]:
    """What each stage takes of a step that decodes, or of a batch's prompts."""
    return _Replica(costs, layout).parts(prompts=prompts)


def planned(costs: Costs, layout: Layout) -> PlannedReplica:
    """A layout as a plan shows it."""
    stages = []
    replica = _Replica(costs, layout)
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
                prefill_seconds=replica.stages[index].prefill,
                decode_seconds=replica.stages[index].decode,
                send_seconds=float(way[device, after]),
            )
        )
    return PlannedReplica(tuple(stages), replica.prediction)


def layout_of(costs: Costs, replica: PlannedReplica) -> Layout | None:
    """A planned replica by number; None if one of its devices is not there."""
    index = {device.id: i for i, device in enumerate(costs.devices)}
    if any(stage.device_id not in index for stage in replica.stages):
        return None
    order: Sequence[int] = [index[stage.device_id] for stage in replica.stages]
    layers = [stage.last_layer - stage.first_layer + 1 for stage in replica.stages]
    return Layout(tuple(order), tuple(layers))
