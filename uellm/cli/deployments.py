"""`uellm deploy`, `uellm undeploy` and `uellm status`, behind their options."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console

from uellm.cli import exits
from uellm.cli.device_options import read_cost, read_pins
from uellm.cli.options import in_flags, slo_missed
from uellm.cli.placements import changed, deployment_table, fetched, plan_table, predicted
from uellm.cli.plan_files import read_plan
from uellm.cli.service_calls import deployer
from uellm.convert import seconds
from uellm.convert_topology import planned_to_proto
from uellm.core.errors import (
    ConfigurationError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from uellm.mesh.options import ModelSource
from uellm.models.adapters import check_names, parse_adapter
from uellm.rpc import CALL_SECONDS
from uellm.v1 import common_pb2, deployer_pb2, topology_pb2

LARGEST = 2**31 - 1
APPLY_SECONDS = 4 * CALL_SECONDS
WATCH_AGAIN_SECONDS = 0.5
AWAY_SECONDS = 60.0
"""How long whoever waits for a deployment waits for a deployer that went away, or the next one."""
READY = topology_pb2.REPLICA_STATE_READY
_ENDS = {"first": deployer_pb2.PIN_END_FIRST, "last": deployer_pb2.PIN_END_LAST}


def plan_request(
    model: str,
    name: str,
    *,
    adapters: Sequence[str],
    pins: Sequence[str],
    excluded: Sequence[str],
    costs: Sequence[str] = (),
) -> deployer_pb2.PlanRequest:
    """What is asked of a deployer, the plain numbers aside.

    Raises:
        UellmError: naming the option that cannot be.
    """
    source = ModelSource.parse(model)
    refs = []
    for text in adapters:
        _, ref = parse_adapter(text)
        refs.append(ref)
    found, layer_pins = read_pins(pins)
    return deployer_pb2.PlanRequest(
        model=common_pb2.ModelRef(name=name or source.name, source=source.source),
        adapters=check_names(refs),
        pins=[
            deployer_pb2.DevicePin(
                device_id=pin.device_id, end=_ENDS.get(pin.end, deployer_pb2.PIN_END_UNSPECIFIED)
            )
            for pin in found
        ],
        layer_pins=[
            deployer_pb2.LayerPin(
                name=pin.name, first_layer=pin.first_layer, last_layer=pin.last_layer
            )
            for pin in layer_pins
        ],
        excluded=excluded,
        costs=dict(map(read_cost, costs)),
    )


def say(request: deployer_pb2.PlanRequest, field: str, value: float | str) -> None:
    """Set a plain field of a request.

    Raises:
        InvalidArgumentError: if the field cannot hold it.
    """
    try:
        setattr(request, field, value)
    except ValueError:
        raise InvalidArgumentError(
            f"{field}: {value} is more than can be asked for; at most {LARGEST}", field=field
        ) from None


def as_told(request: deployer_pb2.PlanRequest, path: Path) -> None:
    """Have a model placed as a file says; slots and context as there, unless they are asked for.

    Raises:
        InvalidArgumentError: if it is no plan of one copy.
    """
    plan = read_plan(path, "plan")
    if len(plan.replicas) != 1:
        raise InvalidArgumentError(
            f"plan: {path} has {len(plan.replicas)} copies; one is placed as it is told to, others "
            "as their deployment's objective has it",
            field="plan",
        )
    if plan.full_stage is not None:
        # Its chain would run; whoever asked for more hears that it does not.
        request.routing = deployer_pb2.ROUTING_FULL_STAGE
    request.layout.extend(planned_to_proto(plan.replicas[0]).stages)
    request.slots = request.slots or plan.slots
    request.max_tokens = request.max_tokens or plan.max_tokens


async def deploy(
    redis_url: str, request: deployer_pb2.PlanRequest, *, wait: bool, grow: bool = False
) -> int:
    """Show the plan, make it so, and show how far it is.

    Args:
        redis_url: the mesh's Redis.
        request: what is wanted.
        wait: until it takes requests.
        grow: begin with fewer stages than are wanted where devices lack.

    Raises:
        UellmError: why it cannot be.
    """
    console = Console()
    name = request.model.name
    async with deployer(redis_url) as stub:
        try:
            plan = (await stub.Plan(request, timeout=APPLY_SECONDS)).plan
        except FailedPreconditionError:
            plan = None  # Its files are not here yet: what is applied says so, or fetches them.
        if plan is not None:
            if plan.infeasible_reason:
                reason = in_flags(plan.infeasible_reason)
                raise FailedPreconditionError(f"{name} cannot be placed: {reason}")
            if not grow:
                _check_stages(request, plan)
            await _note_absent(console, stub, request)
            _print_plan(console, plan)
        applied = deployer_pb2.ApplyRequest(deployment=request)
        await stub.Apply(applied, timeout=APPLY_SECONDS)
        if not wait:
            console.print(
                f"{name} is wanted from now on; `uellm status {name}` shows how far it is"
            )
            return exits.OK
    return await _follow(console, redis_url, name, plan)


async def approve(redis_url: str, name: str, *, wait: bool) -> int:
    """Carry out the proposed changes of a deployment.

    Raises:
        UellmError: if there is none.
    """
    console = Console()
    async with deployer(redis_url) as stub:
        answer = await stub.Approve(deployer_pb2.ApproveRequest(name=name), timeout=CALL_SECONDS)
        for change in answer.deployment.changes:
            console.print(changed(change), soft_wrap=True, markup=False)
    return await _follow(console, redis_url, name) if wait else exits.OK


async def undeploy(redis_url: str, name: str, *, wait: bool) -> int:
    """Stop serving a model.

    Raises:
        NotFoundError: if it is not deployed.
    """
    console = Console()
    async with deployer(redis_url) as stub:
        await stub.Undeploy(deployer_pb2.UndeployRequest(name=name), timeout=CALL_SECONDS)
    if wait:
        with console.status(f"{name}: finishes the answers that it is giving"):
            async for deployment in _watch(redis_url, name):
                if deployment is None:
                    break
        console.print(f"{name} is not served any more")
    return exits.OK


async def status(redis_url: str, name: str, *, as_json: bool) -> int:
    """What is where, and how it does.

    Raises:
        NotFoundError: if it is not deployed.
    """
    async with deployer(redis_url) as stub:
        answer = await stub.Describe(deployer_pb2.DescribeRequest(), timeout=CALL_SECONDS)
    names = [deployment.name for deployment in answer.deployments]
    if name and name not in names:
        raise NotFoundError(f"{name!r} is not deployed; deployed: {', '.join(names) or 'none'}")
    chosen = [d for d in answer.deployments if not name or d.name == name]
    live = {each.replica: each for each in answer.live}
    loads = {each.name: each for each in answer.loads}
    if as_json:
        facts = [_facts(deployment, live, loads) for deployment in chosen]
        sys.stdout.write(json.dumps({"deployments": facts}, indent=1) + "\n")
        return exits.OK
    console = Console()
    if not chosen:
        console.print("no model is deployed; `uellm deploy MODEL` does")
    for deployment in chosen:
        load = loads.get(deployment.name)
        deployment_table(console, deployment, live, load, seconds(answer.now))
    return exits.OK


def _check_stages(request: deployer_pb2.PlanRequest, plan: topology_pb2.Plan) -> None:
    """Refuse to make the best of it where fewer stages can be had than are asked for."""
    most = min(len(replica.stages) for replica in plan.replicas)
    if most < request.stages:
        raise FailedPreconditionError(
            f"stages: {request.stages}; at most {most} with the layers of {request.model.name} and "
            f"the devices that are there. Ask for {most}, add devices (`uellm join`), or have it "
            "begin with fewer and grow (--grow)"
        )


async def _note_absent(console: Console, stub: Any, request: deployer_pb2.PlanRequest) -> None:
    """Say which names mean nothing that is there: it may come later, or be a slip."""
    if not request.excluded and not request.costs:
        return
    answer = await stub.Describe(deployer_pb2.DescribeRequest(), timeout=CALL_SECONDS)
    there = {
        name
        for worker in answer.workers
        for device in worker.devices
        for name in (device.id, device.worker, device.host)
    }
    for name in request.excluded:
        if name not in there:
            console.print(
                f"exclude: {name} is no device, worker or host that is there now", markup=False
            )
    devices = {device.id for worker in answer.workers for device in worker.devices}
    for name in sorted(request.costs.keys() - devices):
        console.print(f"cost: {name} is no device that is there now", markup=False)


def _print_plan(console: Console, plan: topology_pb2.Plan) -> None:
    for index, replica in enumerate(plan.replicas):
        console.print(plan_table(replica, f"{plan.deployment}-{index}"))
        if replica.HasField("prediction"):
            console.print(predicted(replica.prediction), soft_wrap=True)
    console.print(
        f"{plan.objective}: {plan.slots} sequences of up to {plan.max_tokens} tokens, {plan.dtype}",
        soft_wrap=True,
    )
    if plan.slo_missed:
        console.print(slo_missed(plan.objective), soft_wrap=True)
    if plan.fetch_bytes:
        console.print(fetched(plan.fetch_bytes, plan.fetch_seconds), soft_wrap=True)


def _print_otherwise(
    console: Console, deployment: topology_pb2.Deployment, shown: topology_pb2.Plan
) -> None:
    """Say where a model went if not where it was to: things change, or what serves has no room."""
    if _places(replica.planned for replica in deployment.replicas) == _places(shown.replicas):
        return
    console.print("it went elsewhere than shown above, as devices were by then:")
    for replica in deployment.replicas:
        console.print(plan_table(replica.planned, replica.id))
        if replica.planned.HasField("prediction"):
            console.print(predicted(replica.planned.prediction), soft_wrap=True)


def _places(
    replicas: Iterable[topology_pb2.PlannedReplica],
) -> list[list[tuple[str, int, int]]]:
    """Which layers are where, in any order of copies."""
    return sorted(
        [(stage.device_id, stage.first_layer, stage.last_layer) for stage in replica.stages]
        for replica in replicas
    )


async def _follow(
    console: Console, redis_url: str, name: str, shown: topology_pb2.Plan | None = None
) -> int:
    """Show what a deployment waits for, until it takes requests.

    Args:
        console: to print on.
        redis_url: the mesh's Redis.
        name: of the deployment.
        shown: where it was to go.

    Raises:
        FailedPreconditionError: if it cannot be formed as things are.
        NotFoundError: if somebody undeploys it.
        UnavailableError: if no deployer is there for long.
    """
    with console.status(f"{name}: is placed") as line:
        async for deployment in _watch(redis_url, name):
            if deployment is None:
                break
            states = [replica.state for replica in deployment.replicas]
            under_way = any(
                change.state == topology_pb2.CHANGE_STATE_UNDER_WAY for change in deployment.changes
            )
            if (
                len(states) >= deployment.wanted_replicas
                and set(states) == {READY}
                and not under_way
            ):
                if deployment.status:
                    console.print(f"{name}: {deployment.status}", soft_wrap=True, markup=False)
                if shown is not None:
                    _print_otherwise(console, deployment, shown)
                console.print(f"{name} takes requests")
                return exits.OK
            if topology_pb2.REPLICA_STATE_FAILED in states:
                why = in_flags(deployment.status)
                raise FailedPreconditionError(
                    f"{name}: {why}; it goes on being tried: `uellm status {name}` shows it, "
                    f"`uellm undeploy {name}` ends it"
                )
            line.update(f"{name}: {deployment.status or 'is placed'}")
    raise NotFoundError(f"{name} was undeployed meanwhile")


async def _watch(redis_url: str, name: str) -> AsyncIterator[topology_pb2.Deployment | None]:
    """A deployment after every change, whichever deployer acts; None while there is none.

    Raises:
        UnavailableError: if no deployer is there for ``AWAY_SECONDS``.
    """
    watch, away_since = deployer_pb2.WatchDeploymentsRequest(), float("inf")
    while True:
        why = "it ended"
        try:
            async with deployer(redis_url) as stub:
                async for answer in stub.WatchDeployments(watch):
                    away_since = float("inf")
                    yield next((found for found in answer.deployments if found.name == name), None)
        except (UnavailableError, ConfigurationError) as error:
            why = error.message
        away_since = min(away_since, time.monotonic())
        if time.monotonic() - away_since > AWAY_SECONDS:
            raise UnavailableError(
                f"no deployer acts any more ({why}); what was asked for {name} is kept and done "
                f"when one does: `uellm status {name}`"
            )
        await asyncio.sleep(WATCH_AGAIN_SECONDS)


def _facts(
    deployment: topology_pb2.Deployment,
    live: Mapping[str, deployer_pb2.ReplicaLive],
    loads: Mapping[str, deployer_pb2.DeploymentLoad],
) -> dict[str, Any]:
    """For programs; the model's layers are of no use to them."""
    bare = topology_pb2.Deployment()
    bare.CopyFrom(deployment)
    bare.ClearField("profile")
    facts: dict[str, Any] = _plain(bare)
    facts["live"] = [
        _plain(live[replica.id]) for replica in deployment.replicas if replica.id in live
    ]
    load = loads.get(deployment.name)
    facts["load"] = _plain(load) if load is not None else None
    return facts


def _plain(message: Message) -> dict[str, Any]:
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
