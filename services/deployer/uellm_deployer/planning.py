"""From a request and the workers that are there to a plan, and from a plan to assignments."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from uellm.convert_topology import planned_from_proto, planned_to_proto
from uellm.core.model import ModelProfile
from uellm.placement.costs import costs_of
from uellm.placement.discovery import Knowledge
from uellm.placement.layer_pins import on
from uellm.placement.placers import EVEN, improvement, placer_of
from uellm.placement.prediction import StageParts, layout_of, parts
from uellm.placement.stock import NOTHING_LACKING, Fetching, fetching, in_words
from uellm.placement.told import ToldPlacer
from uellm.placement.topology import Device, Topology
from uellm.placement.views import (
    EVERYWHERE,
    LayerPin,
    Pin,
    Placer,
    Plan,
    PlannedReplica,
    PlanRequest,
    Stock,
    Workload,
)
from uellm.v1 import deployer_pb2, topology_pb2
from uellm_deployer.catalog import ResolvedModel
from uellm_deployer.replica import Replica

NOTHING = Knowledge()
"""Where nothing was measured."""
MOVE_SECONDS_PER_BYTE = 1e-11
"""Price of loading: a gigabyte takes about a second, and what was loaded serves many batches."""
_ENDS: Mapping[int, Literal["any", "first", "last"]] = {
    deployer_pb2.PIN_END_FIRST: "first",
    deployer_pb2.PIN_END_LAST: "last",
}


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what it was made with.

    Attributes:
        plan: where the layers go.
        dtype: compute dtype.
        profile: the model's needs in it.
        devices: those that it was made from, by id.
        fetching: what of the model's files has to be fetched for it.
    """

    plan: Plan
    dtype: str
    profile: ModelProfile
    devices: dict[str, Device]
    fetching: Fetching = NOTHING_LACKING


def plan(
    model: ResolvedModel,
    request: deployer_pb2.PlanRequest,
    devices: Sequence[Device],
    replicas: int,
    previous: Plan | None = None,
    knowledge: Knowledge = NOTHING,
    stock: Stock = EVERYWHERE,
) -> Planned:
    """Place a model as its objective says; of plans that are alike, where its files are.

    Accelerators alone are tried before CPUs are taken too: a CPU among them would set the pace.
    Without a dtype in the request it is float32 where a CPU computes, else bfloat16.

    Raises:
        ModelFilesError: if the model's files do not say what it needs.
        InvalidArgumentError: if it names a layout that cannot be of the model.
    """
    placer = _placer(request)
    named = pinned(request, devices) | {stage.device_id for stage in request.layout}
    accelerators = [d for d in devices if d.kind != "cpu" or d.id in named]
    groups = [devices] if len(accelerators) in (0, len(devices)) else [accelerators, devices]
    if named - {device.id for device in devices}:
        groups = [devices]  # What is not there is said beside all that is.
    made = []
    for group in groups:
        dtype = request.dtype or dtype_for(group)
        wanted = request_for(model, request, group, dtype, replicas, previous, knowledge, stock)
        found = placer.place(wanted)
        # Files come from whoever has them, be it to be placed on or not.
        there = knowledge.topology(devices, model.ref.digest, dtype)
        made.append(_with_fetching(found, dtype, wanted, there))
    feasible = [one for one in made if not one.plan.infeasible_reason]
    if request.stages:
        # As near to what is wanted as devices and layers let it come.
        feasible.sort(key=lambda one: -len(one.plan.replicas[0].stages))
    return (feasible or made[-1:])[0]


def pinned(request: deployer_pb2.PlanRequest, devices: Iterable[Device]) -> set[str]:
    """Ids of the devices that a request pins, by their own name, their worker's or their host's."""
    names = {pin.name for pin in request.layer_pins}
    return {pin.device_id for pin in request.pins} | {
        device.id for device in devices if any(on(device, name) for name in names)
    }


def _placer(request: deployer_pb2.PlanRequest) -> Placer:
    if request.layout:
        return ToldPlacer(_told(request).stages)
    return placer_of(request.objective or EVEN)


def _told(request: deployer_pb2.PlanRequest) -> PlannedReplica:
    return planned_from_proto(topology_pb2.PlannedReplica(stages=request.layout))


def freely(request: deployer_pb2.PlanRequest) -> deployer_pb2.PlanRequest:
    """A request without its layout, for when that cannot be."""
    free = deployer_pb2.PlanRequest()
    free.CopyFrom(request)
    free.ClearField("layout")
    return free


def request_for(
    model: ResolvedModel,
    request: deployer_pb2.PlanRequest,
    devices: Sequence[Device],
    dtype: str,
    replicas: int,
    previous: Plan | None,
    knowledge: Knowledge,
    stock: Stock = EVERYWHERE,
) -> PlanRequest:
    """What a placer is asked.

    Raises:
        ModelFilesError: if the model's files do not say what it needs.
    """
    workload = workload_of(request, replicas)
    return PlanRequest(
        knowledge.topology(devices, model.ref.digest, dtype),
        model.profile(dtype),
        workload,
        objective=request.objective,  # type: ignore[arg-type]  # placer_of checks it
        previous=previous,
        move_seconds_per_byte=MOVE_SECONDS_PER_BYTE if previous else 0.0,
        pins=tuple(Pin(p.device_id, _ENDS.get(p.end, "any")) for p in request.pins),
        layer_pins=tuple(
            LayerPin(pin.name, pin.first_layer, pin.last_layer) for pin in request.layer_pins
        ),
        # Who is away needs no keeping away.
        excluded=frozenset(request.excluded)
        & {name for d in devices for name in (d.id, d.worker, d.host)},
        costs={d.id: request.costs[d.id] for d in devices if d.id in request.costs},
        layer_times=knowledge.layer_times(devices, model.ref.digest, dtype, workload),
        stock=stock,
        routing="full_stage" if request.routing == deployer_pb2.ROUTING_FULL_STAGE else "chain",
        clock=time.monotonic,
    )


def better(
    model: ResolvedModel,
    request: deployer_pb2.PlanRequest,
    devices: Sequence[Device],
    present: topology_pb2.Deployment,
    replica: PlannedReplica,
    knowledge: Knowledge,
    stock: Stock = EVERYWHERE,
) -> tuple[Planned, float]:
    """Where a replica that serves would rather be, and the gain, as a share; 0 or less: nowhere.

    Args:
        model: of the deployment.
        request: what is wanted of it.
        devices: as a plan may fill them.
        present: the deployment as it serves.
        replica: where it is.
        knowledge: of devices and ways as they are now.
        stock: which hosts have the model's files.

    Raises:
        ModelFilesError: if the model's files do not say what it needs.
    """
    before = Plan((replica,), present.slots, present.max_tokens, request.objective, "")
    if request.layout:
        told = plan(model, request, devices, 1, before, knowledge, stock)
        # What is there stays, however full its devices have become.
        as_told = _alike(_told(request), replica)
        if as_told or told.plan.replicas or request.objective == EVEN:
            return told, float(bool(told.plan.replicas) and not as_told)
    wanted = request_for(model, request, devices, present.dtype, 1, before, knowledge, stock)
    found, gained = improvement(wanted, before)
    return _with_fetching(found, present.dtype, wanted, wanted.topology), gained


def _with_fetching(found: Plan, dtype: str, wanted: PlanRequest, there: Topology) -> Planned:
    needed = fetching(found.replicas, there, wanted.stock)
    if needed.total_bytes:
        found = replace(found, explanation=f"{found.explanation}; {in_words(needed)}")
    return Planned(found, dtype, wanted.model, _by_id(wanted), needed)


def _alike(one: PlannedReplica, other: PlannedReplica) -> bool:
    """Whether the same devices hold the same layers."""
    return [(s.device_id, s.first_layer, s.last_layer) for s in one.stages] == [
        (s.device_id, s.first_layer, s.last_layer) for s in other.stages
    ]


@dataclass(frozen=True, slots=True)
class StepsSeen:
    """Steps that only decoded, or only computed prompts.

    Attributes:
        sequences: in each, on the average.
        tokens: of context of a sequence that decodes; of a prompt.
        in_flight: of them at once.
        prompts: they computed prompts.
    """

    sequences: float
    tokens: float
    in_flight: float = 1.0
    prompts: bool = False

    def workload(self, model: ModelProfile, stages: int) -> Workload:
        """Batches whose steps are like these."""
        return Workload(
            batch=max(round(self.sequences), 1),
            prompt_tokens=max(min(round(self.tokens), model.max_tokens - 2), 1),
            output_tokens=1 if self.prompts else 2,
            in_flight=max(min(round(self.in_flight), stages), 1),
        )


def expected(
    replica: Replica,
    model: ModelProfile,
    devices: Sequence[Device],
    steps: StepsSeen,
    knowledge: Knowledge,
) -> list[StageParts]:
    """What a step should take on each part of a replica, by what was measured before it ran.

    Args:
        replica: with its plan.
        model: its needs in the dtype that it runs in.
        devices: those of its parts.
        steps: what they computed.
        knowledge: of devices and ways.
    """
    assignment = replica.assignments[0]
    described = knowledge.topology(devices, assignment.model.digest, assignment.dtype)
    nominal = tuple(
        replace(device, slowdown=1.0, step_seconds=0.0, prefill_ratio=1.0)
        for device in described.devices
    )
    workload = steps.workload(model, assignment.stage_count)
    costs = costs_of(
        PlanRequest(
            replace(described, devices=nominal),
            model,
            workload,
            layer_times=knowledge.layer_times(
                devices, assignment.model.digest, assignment.dtype, workload
            ),
        ),
        workload.batch,
    )
    layout = layout_of(costs, replica.planned) if replica.planned is not None else None
    if layout is None:
        raise AssertionError("unreachable: a replica that serves was planned, on these devices")
    return parts(costs, layout, prompts=steps.prompts)


def _by_id(request: PlanRequest) -> dict[str, Device]:
    return {device.id: device for device in request.topology.devices}


def workload_of(request: deployer_pb2.PlanRequest, replicas: int) -> Workload:
    """What is wanted of a model, and the load that is expected."""
    expected = {
        name: value
        for name in ("prompt_tokens", "output_tokens")
        if (value := getattr(request, name))
    }
    return Workload(
        replicas,
        request.stages,
        request.slots,
        request.max_tokens,
        request.kv_tokens,
        slo_seconds=request.slo_seconds,
        **expected,
    )


def dtype_for(devices: Sequence[Device]) -> str:
    """The compute dtype where none is asked for."""
    cpu = any(device.kind in ("cpu", "simulated") for device in devices)
    return "float32" if cpu or not devices else "bfloat16"


def as_previous(replica: PlannedReplica | None) -> Plan | None:
    """Where a replica was, for a placer to move as little of as it can."""
    return Plan((replica,), 0, 0, "", "") if replica is not None else None


def plan_to_proto(name: str, planned: Planned) -> topology_pb2.Plan:
    """A plan for the wire."""
    proof, shared = planned.plan.certificate, planned.plan.full_stage
    return topology_pb2.Plan(
        deployment=name,
        replicas=[planned_to_proto(replica) for replica in planned.plan.replicas],
        objective=planned.plan.objective,
        explanation=planned.plan.explanation,
        infeasible_reason=planned.plan.infeasible_reason,
        dtype=planned.dtype,
        slots=planned.plan.slots,
        max_tokens=planned.plan.max_tokens,
        solver=planned.plan.solver,
        certificate=topology_pb2.PlanCertificate(
            quantity=proof.quantity, value=proof.value, bound=proof.bound, proof=proof.proof
        )
        if proof is not None
        else None,
        fetch_bytes=planned.fetching.total_bytes,
        fetch_seconds=planned.fetching.seconds,
        full_stage=topology_pb2.FullStage(
            stages=[
                topology_pb2.SharedStage(
                    device_ids=stage.device_ids,
                    first_layer=stage.first_layer,
                    last_layer=stage.last_layer,
                )
                for stage in shared.stages
            ],
            tokens_per_second=shared.tokens_per_second,
            chain_tokens_per_second=shared.chain_tokens_per_second,
        )
        if shared is not None
        else None,
        budget_exhausted=planned.plan.budget_exhausted,
        slo_missed=planned.plan.slo_missed,
    )
