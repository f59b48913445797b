"""The placement that somebody names: checked and predicted like any other, and nothing sought."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from uellm.core.errors import InvalidArgumentError
from uellm.placement.costs import Costs, costs_of
from uellm.placement.explain import explain_plan, last_that, size
from uellm.placement.prediction import Layout, layout_of, planned, shortages
from uellm.placement.replan import moves
from uellm.placement.views import Plan, PlannedReplica, PlannedStage, PlanRequest


@dataclass(frozen=True, slots=True)
class ToldPlacer:
    """Places one copy where it is told to.

    Attributes:
        stages: in order; of each, device and layers count.
    """

    stages: tuple[PlannedStage, ...]
    name: str = "told"

    def place(self, request: PlanRequest) -> Plan:
        """Plan; see ``uellm.placement.views.Placer``.

        Raises:
            InvalidArgumentError: if these are not all layers of the model, each once, in order.
        """
        _check(self.stages, len(request.model.layers))
        costs = costs_of(request, 1)
        layout = layout_of(costs, PlannedReplica(self.stages))
        if layout is None:
            return self._without(request, costs, self._missing(costs))
        _check_neighbours(costs, layout)
        if lacking := shortages(costs, layout):
            what = ", ".join(f"{size(gap)} on {name}" for name, gap in sorted(lacking.items()))
            reason = f"the layout with one slot of {costs.need.max_tokens} tokens lacks {what}"
            return self._without(request, costs, reason)
        costs = costs_of(request, _most_slots(request, layout))
        copies = (planned(costs, layout),)
        return Plan(
            replicas=copies,
            slots=costs.need.slots,
            max_tokens=costs.need.max_tokens,
            objective=request.objective,
            explanation=explain_plan(copies, costs.need, request, None),
            kv_tokens=costs.need.cached_tokens,
            solver=self.name,
            moves=moves(request.model, copies, request.previous),
        )

    def _missing(self, costs: Costs) -> str:
        there = {device.id for device in costs.devices}
        away = [stage.device_id for stage in self.stages if stage.device_id not in there]
        return (
            f"the layout names {', '.join(away)}, not usable now; usable: "
            f"{', '.join(sorted(there)) or 'none'}"
        )

    def _without(self, request: PlanRequest, costs: Costs, reason: str) -> Plan:
        most, sought = costs.need.max_tokens, request.objective
        return Plan((), 0, most, sought, "", infeasible_reason=reason, solver=self.name)


def _check(stages: Sequence[PlannedStage], num_layers: int) -> None:
    devices = [stage.device_id for stage in stages]
    twice = sorted({device for device in devices if devices.count(device) > 1})
    if twice:
        _refuse(f"{twice[0]} is named twice; a device holds one range of layers")
    for stage in stages:
        if stage.last_layer < stage.first_layer:
            _refuse(f"{stage.device_id} has layers {stage.first_layer} to {stage.last_layer}")
    ends = [-1, *(stage.last_layer for stage in stages)]
    for stage, (before, _) in zip(stages, pairwise(ends), strict=True):
        if stage.first_layer != before + 1:
            _refuse(
                f"{stage.device_id} begins with layer {stage.first_layer}, and is to begin with "
                f"{before + 1}: stages follow each other from layer 0"
            )
    if ends[-1] != num_layers - 1:
        _refuse(f"it ends with layer {ends[-1]}, and the model with {num_layers - 1}")


def _check_neighbours(costs: Costs, layout: Layout) -> None:
    workers = [costs.devices[device].worker for device in layout.order]
    runs = [worker for worker, _ in groupby(workers)]
    for worker in runs:
        if runs.count(worker) > 1:
            _refuse(f"it comes back to worker {worker}, which holds consecutive layers")


def _refuse(problem: str) -> None:
    raise InvalidArgumentError(f"layout: {problem}", field="layout")


def _most_slots(request: PlanRequest, layout: Layout) -> int:
    """The most slots that fit, up to those wanted; one does."""

    def fits(slots: int) -> bool:
        return not shortages(costs_of(request, slots), layout)

    wanted = max(request.workload.slots, 1)
    return wanted if request.workload.batch or fits(wanted) else last_that(1, wanted, fits)
