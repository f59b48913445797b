"""A plan in a terminal: where layers go, how fast, how good at least, and what if."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import inf, isfinite

from rich.console import Console
from rich.table import Table

from uellm.cli.options import in_flags, slo_missed
from uellm.cli.placements import short
from uellm.placement.explain import bound_by, size
from uellm.placement.stock import Fetching, in_words
from uellm.placement.views import EVERYWHERE, FullStage, Plan, PlannedReplica, PlanRequest
from uellm.placement.what_if import Figures

_MOST_SHOWN = 8
_LEAST_NAME = 8
"""Fewer characters of a device's name say nothing."""


def show(request: PlanRequest, plan: Plan, found: Figures, needed: Fetching) -> None:
    """A plan's stages, what is predicted of it, how good it is, and what has to be fetched."""
    console = Console()
    names = {device.id: device.name for device in request.topology.devices}
    if plan.infeasible_reason:
        reason = in_flags(plan.infeasible_reason)
        console.print(f"cannot be placed: {reason}", soft_wrap=True, markup=False)
    for index, replica in enumerate(plan.replicas):
        _show_replica(console, index, replica, names)
    if plan.replicas:
        console.print(
            f"{found.devices} of {len(names)} devices, {plan.slots} sequences of up to "
            f"{plan.max_tokens} tokens; links take {found.link_share:.0%} of a batch's time"
            f"{_dearest_link(plan, request.workload.output_tokens)}",
            soft_wrap=True,
        )
    if plan.slo_missed:
        console.print(slo_missed(plan.objective), soft_wrap=True)
    if plan.certificate is not None:
        proof = plan.certificate
        exact = proof.ratio <= 1 + 1e-9
        how = "the best there is" if exact else f"at most {proof.ratio:.4g}x from the best"
        console.print(
            f"{plan.objective}: {how}, by {plan.solver} in {plan.solve_seconds:.2f} s "
            f"({proof.proof})",
            soft_wrap=True,
        )
    if plan.budget_exhausted:
        console.print(
            f"the search ended with its budget of {request.budget_seconds:g} s; more may find "
            "better (--budget)",
            soft_wrap=True,
        )
    if plan.moves:
        moved = sum(move.weight_bytes for move in plan.moves)
        layers = sum(move.last_layer - move.first_layer + 1 for move in plan.moves)
        took = f"; {needed.seconds:.2g} s where files come from those that held them"
        ours = request.stock is EVERYWHERE and 0 < needed.seconds < inf
        console.print(f"moves {layers} layers, {size(moved)}{took if ours else ''}")
    if request.routing == "full_stage":
        _show_full_stage(console, plan.full_stage)
    if request.stock is not EVERYWHERE and needed.total_bytes:
        console.print(in_words(needed), soft_wrap=True)


def _show_replica(
    console: Console, index: int, replica: PlannedReplica, names: Mapping[str, str]
) -> None:
    bare = _stages(index, replica, {})
    # What a device is called gives way where a terminal is narrow.
    room = console.width - console.measure(bare).maximum - 2
    named = _stages(index, replica, names, room)
    console.print(named if room >= _LEAST_NAME else bare)
    if (predicted := replica.prediction) is not None:
        console.print(
            f"first token after {short(predicted.prefill_seconds)}, then "
            f"{short(predicted.decode_seconds)} a token, "
            f"{predicted.total_seconds:.3g} s in all; "
            f"{predicted.tokens_per_second:.4g} tokens/s, "
            f"{bound_by(predicted.bottleneck)}",
            soft_wrap=True,
        )


def _show_full_stage(console: Console, found: FullStage | None) -> None:
    """Stages of several devices, and what chains of the same devices come to."""
    if found is None:
        console.print("full-stage routing: no room, with both ends of the model on any device")
        return
    console.print("full-stage routing, for planning alone:")
    table = Table(box=None)
    table.add_column("layers", no_wrap=True)
    table.add_column("devices")
    for stage in found.stages:
        table.add_row(f"{stage.first_layer}-{stage.last_layer}", " ".join(stage.device_ids))
    console.print(table)
    console.print(
        f"{found.tokens_per_second:.4g} tokens/s with every device always busy; disjoint chains "
        f"{found.chain_tokens_per_second:.4g} tokens/s",
        soft_wrap=True,
    )


def _stages(index: int, replica: PlannedReplica, names: Mapping[str, str], most: int = 0) -> Table:
    """A row for each stage; with devices' names, if there are any, in so many characters."""
    table = Table(box=None, title=f"replica {index}", title_justify="left")
    columns = ("layers", "device", *([""] if names else []), "memory", "prefill", "step", "send")
    for column in columns:
        most_wide = max(most, 1) if not column else None
        table.add_column(column, no_wrap=bool(column), overflow="fold", max_width=most_wide)
    for stage in replica.stages:
        ends = f"{' +embed' if stage.has_embed else ''}{' +head' if stage.has_head else ''}"
        table.add_row(
            f"{stage.first_layer}-{stage.last_layer}{ends}",
            stage.device_id,
            *([names.get(stage.device_id, "")] if names else []),
            size(stage.memory_bytes),
            short(stage.prefill_seconds),
            short(stage.decode_seconds),
            short(stage.send_seconds) if not stage.has_head else "",
        )
    return table


def _dearest_link(plan: Plan, output_tokens: int) -> str:
    """Which way takes the largest share of its replica's time, where there are several."""
    ways = [
        (after_share, f"{stage.device_id} -> {after.device_id}")
        for replica in plan.replicas
        if replica.prediction is not None and len(replica.stages) > 2
        for stage, after in pairwise(replica.stages)
        for after_share in [
            stage.send_seconds * max(output_tokens - 1, 1) / replica.prediction.total_seconds
        ]
    ]
    if not ways:
        return ""
    share, name = max(ways)
    return f", {name} alone {share:.0%}"


def show_candidates(plan: Plan) -> None:
    """What else was looked at, and what speaks against it."""
    table = Table("instead", "devices", "a batch", "tokens/s", "why not", box=None)
    for each in plan.candidates[:_MOST_SHOWN]:
        split = " ".join(
            f"{device}:{count}"
            for device, count in zip(each.device_ids, each.num_layers, strict=False)
        )
        table.add_row(
            each.name,
            split if len(split) <= 60 else f"{len(each.device_ids)} devices",
            f"{each.total_seconds:.3g} s" if isfinite(each.total_seconds) else "-",
            f"{each.tokens_per_second:.4g}" if each.tokens_per_second else "-",
            each.ruled_out,
        )
    Console().print(table if plan.candidates else "no other plan was looked at")


def show_others(before: Figures, others: Sequence[tuple[str, Figures]]) -> None:
    """Other clusters, against the one there is."""
    if not others:
        return
    table = Table(
        "what if", "replicas", "sequences", "a batch", "tokens/s", "against now", box=None
    )
    for name, found in others:
        ratio = (
            f"{found.tokens_per_second / before.tokens_per_second - 1:+.0%} tokens/s, "
            f"{found.total_seconds / before.total_seconds - 1:+.0%} time"
            if before.tokens_per_second and found.tokens_per_second
            else "it cannot be placed then"
            if not found.replicas
            else "it can be placed then"
        )
        table.add_row(
            name,
            str(found.replicas),
            str(found.sequences),
            f"{found.total_seconds:.3g} s" if isfinite(found.total_seconds) else "-",
            f"{found.tokens_per_second:.4g}",
            ratio,
        )
    Console().print(table)
