"""Placements in tables and words: plans, and what runs beside what was planned."""

from collections.abc import Mapping
from math import isfinite

from rich.console import Console
from rich.table import Table

from uellm.cli.durations import ago
from uellm.cli.options import in_flags
from uellm.convert import seconds
from uellm.placement.explain import bound_by, size
from uellm.v1 import deployer_pb2, topology_pb2

_TELLING = 0.05
"""What copies do is said to differ from what was predicted when it differs by more."""
_CHANGES = {
    topology_pb2.CHANGE_STATE_PROPOSED: "proposed",
    topology_pb2.CHANGE_STATE_UNDER_WAY: "under way",
    topology_pb2.CHANGE_STATE_DONE: "done",
    topology_pb2.CHANGE_STATE_FAILED: "given up",
}


def plan_table(replica: topology_pb2.PlannedReplica, title: str) -> Table:
    """Where a replica's layers would go."""
    table = Table(box=None, title=title, title_justify="left")
    for column in ("layers", "device", "memory", "prefill", "step", "send"):
        table.add_column(column, no_wrap=True, overflow="fold")
    for stage in replica.stages:
        table.add_row(
            f"{stage.first_layer}-{stage.last_layer}",
            stage.device_id,
            size(stage.memory_bytes),
            short(stage.prefill_seconds),
            short(stage.decode_seconds),
            "" if stage.has_head else short(stage.send_seconds),
        )
    return table


def predicted(found: topology_pb2.PlacementPrediction) -> str:
    """How fast a replica will be, with full batches."""
    return (
        f"full batches: first token after {short(found.prefill_seconds)}, then "
        f"{short(found.decode_seconds)} a token, {found.tokens_per_second:.4g} tokens/s, "
        f"{bound_by(found.bottleneck)}"
    )


def changed(change: topology_pb2.PlacementChange, now: float | None = None) -> str:
    """A change of a placement in a line; with ``now``, since when it is as it is."""
    state = _CHANGES.get(change.state, "not known")
    if now is not None and change.HasField("changed_at"):
        state += f" {ago(now - seconds(change.changed_at))}"
    where = ", ".join(
        f"{stage.first_layer}-{stage.last_layer} on {stage.device_id}"
        for stage in change.planned.stages
    )
    loads = f"{change.moved_layers} layers, {size(change.moved_bytes)}"
    if change.fetch_bytes:
        loads += f", {fetched(change.fetch_bytes, change.fetch_seconds)}"
    if change.kind == topology_pb2.CHANGE_KIND_ADD:
        return (
            f"{change.replica}: one more copy, {state}: {where}: {change.gain:.0%} more of the "
            f"load is served; {change.reason}; loads {loads}"
        )
    if change.kind == topology_pb2.CHANGE_KIND_REMOVE:
        saved = f": {change.gain:.0%} less cost" if change.gain else ""
        return f"{change.replica}: given back, {state}: {where}{saved}; {change.reason}"
    # What was not wanted any more is not compared with.
    better = f"{change.gain:.0%} better as " if change.gain < 1 else ""
    how = "" if change.make_before_break else ", requests wait meanwhile"
    return f"{change.replica}: {state}: {where}: {better}{change.reason}; moves {loads}{how}"


def fetched(fetch_bytes: int, seconds: float) -> str:
    """What workers have to fetch of a model's files from others."""
    if not isfinite(seconds):
        return f"{size(fetch_bytes)} to be fetched, which nobody has"
    return f"{size(fetch_bytes)} to be fetched, in about {seconds:.2g} s"


def loaded(load: deployer_pb2.DeploymentLoad) -> str:
    """What is asked of a deployment, in a line."""
    offered = load.offered
    lengths = (
        f" of {offered.prompt_tokens:.0f} + {offered.output_tokens:.0f} tokens, as predicted"
        if offered.output_tokens
        else ""
    )
    away = ""
    if offered.turned_away_per_second:
        away = f", {offered.turned_away_per_second:.3g} of them turned away by gateways"
    does = ""
    if load.capacity_requests_per_second:
        does = f"; replicas do {load.capacity_requests_per_second:.3g}"
        if abs(load.efficiency - 1) > _TELLING:
            does += f" ({load.efficiency:.0%} of what was predicted)"
    kept = (
        f"; {offered.kept} of {offered.judged} that asked for a time were in time"
        if offered.judged
        else ""
    )
    return (
        f"load: {offered.requests_per_second:.3g} requests/s{lengths}{away}{does}; "
        f"{offered.waiting} wait{kept}"
    )


def deployment_table(
    console: Console,
    deployment: topology_pb2.Deployment,
    live: Mapping[str, deployer_pb2.ReplicaLive],
    load: deployer_pb2.DeploymentLoad | None,
    now: float,
) -> None:
    """A deployment with its replicas, and what their stages take beside what they should.

    Args:
        console: to print on.
        deployment: which.
        live: how replicas do, by id.
        load: what is asked of it; None: not known.
        now: the present, in seconds since the epoch.
    """
    ready = sum(r.state == topology_pb2.REPLICA_STATE_READY for r in deployment.replicas)
    console.print(
        f"{deployment.name}: {ready}/{deployment.wanted_replicas} replicas ready, "
        f"{deployment.objective or 'even'}, {deployment.slots} sequences of up to "
        f"{deployment.max_tokens} tokens, {deployment.dtype}",
        soft_wrap=True,
        markup=False,
    )
    if load is not None:
        console.print(loaded(load), soft_wrap=True, markup=False)
    for replica in deployment.replicas:
        console.print(_replica_table(replica, live.get(replica.id), now))
        if replica.planned.HasField("prediction"):
            console.print(predicted(replica.planned.prediction), soft_wrap=True)
    if deployment.status:
        console.print(in_flags(deployment.status), soft_wrap=True, markup=False)
    for change in deployment.changes:
        console.print(changed(change, now), soft_wrap=True, markup=False)
        if change.state == topology_pb2.CHANGE_STATE_PROPOSED:
            console.print(f"`uellm deploy --approve {deployment.name}` carries it out")


def _replica_table(
    replica: topology_pb2.Replica, live: deployer_pb2.ReplicaLive | None, now: float
) -> Table:
    state = topology_pb2.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_")
    load = ""
    if live is not None:
        # Who waits for a slot is counted with those in the engine.
        load = f", {live.running - live.waiting} running and {live.waiting} waiting"
    table = Table(
        box=None,
        title=f"{replica.id}: {state}, generation {replica.epoch}{load}",
        title_justify="left",
    )
    # The latest step, what was predicted of it, their smoothed ratio, and when that was.
    for column in ("layers", "device", "memory", "step", "predicted", "ratio", "seen"):
        table.add_column(column, no_wrap=True, overflow="fold")
    seen = {stage.device_id: stage for stage in live.stages} if live is not None else {}
    for stage in replica.planned.stages:
        found = seen.get(stage.device_id)
        timed = found is not None and found.measured_seconds > 0
        table.add_row(
            f"{stage.first_layer}-{stage.last_layer}",
            stage.device_id,
            size(stage.memory_bytes),
            short(found.measured_seconds) if found is not None and timed else "-",
            short(found.predicted_seconds) if found is not None and timed else "-",
            f"{found.ratio:.2f}x" if found is not None and timed and found.ratio else "-",
            ago(now - seconds(found.seen_at)) if found is not None and timed else "-",
        )
    return table


def short(seconds: float) -> str:
    """Seconds for people, as milliseconds where they are few."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
