"""`uellm plan`, behind its options."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from uellm import clusters
from uellm.cli import exits
from uellm.cli.plan_shown import show, show_candidates, show_others
from uellm.core.errors import InvalidArgumentError
from uellm.core.model import ModelProfile
from uellm.models import files
from uellm.models.profile import read_profile
from uellm.models.shapes import SHAPES, profile_of_shape, read_shape
from uellm.placement.costs import costs_of
from uellm.placement.goodput import fluid_bound
from uellm.placement.placers import GOODPUT, placer_of
from uellm.placement.solver import solve
from uellm.placement.stock import Fetching, fetching
from uellm.placement.topology import Topology
from uellm.placement.views import (
    EVERYWHERE,
    OBJECTIVES,
    ROUTINGS,
    Plan,
    PlannedStage,
    PlanRequest,
    Stock,
    Workload,
)
from uellm.placement.what_if import (
    Figures,
    changed,
    enough,
    figures,
    parse_change,
    times_of_added,
)
from uellm.simulator.traces import read_trace
from uellm.topology_file import load_topology

DISCOVERED = "discovered"
SERVED_SHARE = 0.99
WINDOW_SECONDS = 60.0
"""The load of a trace is that of its busiest windows of this length."""
_QUICK_SECONDS = 0.5
_LONGEST_TRACE_SECONDS = 366 * 86400.0


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked on the command line."""

    request: PlanRequest
    explain: bool
    as_json: bool
    plot: Path | None
    what_if: Sequence[str]
    mean_output_tokens: float = 0.0
    """Of a trace that is to be planned for; 0: there is none."""
    as_deployed: bool = False
    """Place as a mesh's deployer would: evenly where that is as good, and where the files are."""


def find_topology(name: str) -> Topology:
    """A cluster by file or name.

    Raises:
        InvalidArgumentError: if there is none, or its file cannot be read.
    """
    path = Path(name)
    return load_topology(path) if path.is_file() else clusters.cluster(name)


def find_model(name: str, dtype: str) -> ModelProfile:
    """A model by directory, config.json, or a well-known name; no weights are read.

    Raises:
        ModelFilesError: if its files do not say what it needs.
        InvalidArgumentError: if there is none of the name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        has_weights = any(path.glob("*.safetensors*"))
        return read_profile(path, dtype) if has_weights else read_shape(path / files.CONFIG, dtype)
    if path.is_file():
        return read_shape(path, dtype)
    shape = SHAPES.get(name.lower())
    if shape is None:
        raise InvalidArgumentError(
            f"model: {name!r} is no directory, no config.json, and none of {', '.join(SHAPES)}",
            field="model",
        )
    return profile_of_shape(shape, dtype, name)


def lengths(
    model: ModelProfile, max_model_len: int, prompt_tokens: int, output_tokens: int
) -> tuple[int, int]:
    """Tokens of a request and of its answer; 0: as many as are usual, in the room there is."""
    context = max_model_len or model.max_tokens
    prompt = prompt_tokens or max(min(512, context * 4 // 5 - output_tokens), 1)
    return prompt, output_tokens or max(min(128, context - prompt), 1)


def check_routing(routing: str, objective: str) -> None:
    """Refuse a routing that there is not, or that an objective has no plan for.

    Raises:
        InvalidArgumentError: naming those that there are.
    """
    if routing not in ROUTINGS:
        raise InvalidArgumentError(
            f"routing: {routing!r} is none of {', '.join(ROUTINGS)}", field="routing"
        )
    if routing != "chain" and objective not in OBJECTIVES:
        raise InvalidArgumentError(
            f"routing: {routing} is planned beside {', '.join(OBJECTIVES)}, not {objective}",
            field="routing",
        )


def check(request: PlanRequest, *, of_trace: bool = False) -> None:
    """Refuse what a mesh would make the best of: a plan for something else than was asked for.

    Args:
        request: what was asked for.
        of_trace: its lengths are those of a trace.

    Raises:
        InvalidArgumentError: naming the option, the limit and the remedy.
    """
    workload, model = request.workload, request.model
    if workload.max_tokens > model.max_tokens:
        raise InvalidArgumentError(
            f"max-model-len: {workload.max_tokens}; at most {model.max_tokens}, the model's own "
            "length",
            field="max-model-len",
        )
    context = workload.max_tokens or model.max_tokens
    asked = workload.prompt_tokens + workload.output_tokens
    if asked > context and of_trace:
        raise InvalidArgumentError(
            f"trace: 90 % of its prompts have up to {workload.prompt_tokens} tokens, and of its "
            f"answers {workload.output_tokens}: together more than a context of {context}; give a "
            "model with a longer one, or shorter requests",
            field="trace",
        )
    if asked > context:
        raise InvalidArgumentError(
            f"prompt-tokens: {workload.prompt_tokens} and {workload.output_tokens} of the answer "
            f"do not fit into a context of {context}; give fewer, or another model",
            field="prompt-tokens",
        )
    before = request.previous.replicas if request.previous else ()
    reach = max((stage.last_layer for replica in before for stage in replica.stages), default=-1)
    if before and reach != len(model.layers) - 1:
        raise InvalidArgumentError(
            f"previous: it ends with layer {reach}, and the model with {len(model.layers) - 1}: "
            "give a plan of this model, or leave it out",
            field="previous",
        )
    left = [
        device
        for device in request.topology.devices
        if not {device.id, device.worker, device.host} & request.excluded
    ]
    most = min(len(left), len(model.layers))
    if workload.stages > most:
        raise InvalidArgumentError(
            f"stages: {workload.stages}; at most {most}, with {len(left)} devices for "
            f"{len(model.layers)} layers",
            field="stages",
        )


def of_trace(path: Path, workload: Workload) -> tuple[Workload, float]:
    """The load of a trace: lengths that 90 % stay below, and the rate of its busiest minute.

    Returns:
        The load, and the mean length of an answer: how many tokens that rate comes to.

    Raises:
        InvalidArgumentError: if it cannot be read, or is longer than a year.
    """
    try:
        requests = read_trace(path)
    except InvalidArgumentError as error:
        # It names the option by which simulations take a trace.
        told = error.message.removeprefix("workload: ")
        raise InvalidArgumentError(f"trace: {told}", field="trace") from None
    prompts = [request.prompt_tokens for request in requests]
    outputs = [request.output_tokens for request in requests]
    at = np.array([request.arrival for request in requests])
    seconds = float(at[-1])
    if seconds > _LONGEST_TRACE_SECONDS:
        raise InvalidArgumentError(
            f"trace: {path}: arrival_s: {seconds:.3g} s from first to last; at most a year, and in "
            "seconds",
            field="trace",
        )
    windows = np.bincount((at // WINDOW_SECONDS).astype(np.int64))
    # What arrives in a moment is a load for a second at least.
    length = min(WINDOW_SECONDS, max(seconds, 1.0))
    load = replace(
        workload,
        prompt_tokens=max(round(float(np.quantile(prompts, 0.9))), 1),
        output_tokens=max(round(float(np.quantile(outputs, 0.9))), 1),
        requests_per_second=float(np.quantile(windows, SERVED_SHARE, method="higher")) / length,
        batch=workload.batch or 8,
    )
    return load, max(float(np.mean(outputs)), 1.0)


def run(asked: Asked) -> int:
    """Plan, and say what came of it."""
    check(asked.request, of_trace=asked.mean_output_tokens > 0)
    plan, seconds = _solved(asked, asked.request)
    plan = replace(plan, solve_seconds=seconds)
    tokens = asked.request.workload.output_tokens
    before = figures(plan, tokens)
    others = []
    for text in asked.what_if:
        change = parse_change(text)
        topology = changed(asked.request.topology, change, clusters.kinds())
        times = times_of_added(asked.request.layer_times, topology, change)
        request = replace(
            asked.request, topology=topology, layer_times=times, previous=plan, routing="chain"
        )
        other, _ = _solved(asked, request)
        others.append((str(change), other, figures(other, tokens)))
    advice = _advice(asked) if asked.mean_output_tokens else []
    if asked.plot is not None:
        from uellm.cli.plan_drawing import draw

        draw(asked.plot, asked.request.topology, plan)
    if asked.as_json:
        facts = {
            "plan": _finite(asdict(plan)),
            "figures": _finite(asdict(before)),
            "fetching": _finite(asdict(_fetched(asked.request, plan))),
            "what_if": [
                {"change": name, "figures": _finite(asdict(found)), "plan": _finite(asdict(other))}
                for name, other, found in others
            ],
            "enough": advice,
        }
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    else:
        show(asked.request, plan, before, _fetched(asked.request, plan))
        if asked.explain:
            show_candidates(plan)
        show_others(before, [(name, found) for name, _, found in others])
        for line in advice:
            Console().print(line, soft_wrap=True)
    return exits.OK if plan.replicas and not plan.infeasible_reason else exits.FAILED


def _solved(asked: Asked, request: PlanRequest) -> tuple[Plan, float]:
    began = time.perf_counter()
    own = request.objective in OBJECTIVES and (
        # The number of a deployment's copies follows its load; here it is sought.
        not asked.as_deployed or request.objective == GOODPUT
    )
    plan = solve(request) if own else placer_of(request.objective).place(request)
    return plan, time.perf_counter() - began


def _advice(asked: Asked) -> list[str]:
    """What a trace needs that is not there, in the user's terms."""
    workload, mean = asked.request.workload, asked.mean_output_tokens
    needed = workload.requests_per_second * mean
    # Room and time are for lengths that most requests stay below; the tokens are those of all.
    load = replace(workload, requests_per_second=needed / workload.output_tokens)
    request = replace(asked.request, objective="goodput", workload=load, routing="chain")
    share = f"{SERVED_SHARE:.0%} of this trace's minutes"
    has = figures(solve(request), workload.output_tokens)
    rate = (
        f"{workload.requests_per_second:.3g} requests/s of up to {workload.prompt_tokens} + "
        f"{workload.output_tokens} tokens, {mean:.0f} of the answer on average"
    )
    if has.tokens_per_second >= needed:
        return [
            f"{share} ({rate}) are served: {has.tokens_per_second:.4g} tokens/s, {needed:.4g} "
            "needed"
        ]
    kinds = clusters.kinds()
    here = {device.name for device in request.topology.devices}
    tried = [name for name, device in kinds.items() if device.name in here] or list(kinds)

    def does(kind: str, count: int) -> Figures | None:
        change = parse_change(",".join(f"add={kind}@new-{i}" for i in range(count)))
        topology = changed(request.topology, change, kinds)
        # Many are tried, and what is wanted is whether, not how well.
        quick = replace(request, topology=topology, budget_seconds=_QUICK_SECONDS)
        if fluid_bound(costs_of(quick)) < needed:
            return None
        found = figures(solve(quick), workload.output_tokens)
        return found if found.tokens_per_second >= needed else None

    lines = [
        f"{share} ({rate}) need {needed:.4g} tokens/s, and here are {has.tokens_per_second:.4g}"
    ]
    for each in enough(tried, does):
        lines.append(
            f"{each.count} more {each.kind} would do: {each.figures.tokens_per_second:.4g} tokens/s"
        )
    if len(lines) == 1:
        lines.append(f"no 16 more of {', '.join(tried)} would do")
    return lines


def _fetched(request: PlanRequest, plan: Plan) -> Fetching:
    """What has to be fetched; where nobody was asked, hosts have files of what they held."""
    stock = request.stock
    if stock is EVERYWHERE and request.previous is not None:
        stock = _held_before(request, request.previous)
    return fetching(plan.replicas, request.topology, stock)


def _held_before(request: PlanRequest, previous: Plan) -> Stock:
    """The files of the layers that devices held, on their hosts, and no others."""
    workers = {device.id: device.worker for device in request.topology.devices}
    held: dict[str, set[str]] = {worker: set() for worker in workers.values()}
    for stage in (stage for replica in previous.replicas for stage in replica.stages):
        layers = map(str, range(stage.first_layer, stage.last_layer + 1))
        held.setdefault(workers.get(stage.device_id, ""), set()).update(layers)

    def needs(stage: PlannedStage) -> dict[str, int]:
        numbers = range(stage.first_layer, stage.last_layer + 1)
        return {str(n): request.model.layers[n].weight_bytes for n in numbers}

    return Stock(needs, {worker: frozenset(layers) for worker, layers in held.items()})


def _finite(value: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value
