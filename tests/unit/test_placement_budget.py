"""Time to search: it is kept, and whatever ends a search leaves a plan and a bound that hold."""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.clusters import model
from tests.support.clusters import random_topology, small_model, wide_area
from uellm.cli.app import app
from uellm.placement import cpsat, held_karp, placing, solver
from uellm.placement.baselines import BASELINES
from uellm.placement.budget import Budget
from uellm.placement.chain import Chain, chain_of
from uellm.placement.costs import costs_of
from uellm.placement.exchange import Exchange
from uellm.placement.prediction import predict, shortages
from uellm.placement.views import Objective, Plan, PlanRequest, Workload

CLOSE = 1e-6
LOAD = Workload(batch=4, in_flight=32, prompt_tokens=512, output_tokens=128)


@pytest.fixture(autouse=True)
def own_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """CP-SAT has a clock of its own."""
    monkeypatch.setattr(cpsat, "available", lambda: False)


@cache
def sought(objective: Objective) -> Plan:
    """What is found where nothing ends the search."""
    return solver.solve(sites(objective))


def sites(objective: Objective, seed: int = 3, devices: int = 18) -> PlanRequest:
    """Too many sites for an exact method, and too little room for a short chain."""
    topology = wide_area(random.Random(seed), devices)  # noqa: S311 - repeatable
    load = Workload(batch=1, in_flight=6)
    held = small_model(layers=24, weight=250 << 20)
    return PlanRequest(topology, held, load, objective, budget_seconds=1.0)


def after(looks: int) -> Callable[[], float]:
    """A clock that stands still until it was looked at so often, and then is far ahead."""
    seen = count()
    return lambda: 1e9 if next(seen) >= looks else 0.0


def value(plan: Plan) -> float:
    """What the objective is about, less being better."""
    assert plan.certificate is not None
    sign = -1 if plan.certificate.quantity == "tokens per second" else 1
    return sign * plan.certificate.value


@pytest.mark.parametrize("objective", ["lr", "he", "helr", "throughput", "goodput"])
@pytest.mark.parametrize("looks", [1, 5, 20])
def test_a_search_that_a_clock_ends_leaves_a_plan_and_a_bound_that_hold(
    objective: Objective, looks: int
) -> None:
    request = sites(objective)
    whole = sought(objective)
    plan = solver.solve(replace(request, clock=after(looks)))
    assert plan.replicas
    assert plan.budget_exhausted
    assert "the search ended with its budget of 1 s" in plan.explanation
    assert plan.certificate is not None
    assert whole.certificate is not None
    best = whole.certificate.value
    if plan.certificate.quantity == "tokens per second":
        assert plan.certificate.bound >= best * (1 - CLOSE)
    elif objective != "helr":  # What is 10 % above the least latency depends on that found.
        assert plan.certificate.bound <= best * (1 + CLOSE)
    costs = costs_of(request)
    for rule in BASELINES.values():
        layout = rule(costs)
        if layout is None or shortages(costs, layout) or objective in ("helr", "goodput"):
            continue
        found = predict(costs, layout)
        other = {
            "lr": found.total_seconds,
            "he": float(costs.price[np.asarray(layout.order)].sum()),
            "throughput": -found.tokens_per_second,
        }[objective]
        assert value(plan) <= other + CLOSE * abs(other)


@pytest.mark.parametrize("objective", ["lr", "helr", "throughput"])
def test_a_clock_that_does_not_end_it_changes_nothing(objective: Objective) -> None:
    request = sites(objective)
    assert solver.solve(replace(request, clock=lambda: 0.0)) == sought(objective)


def test_whoever_has_time_says_nothing_of_it() -> None:
    plan = solver.solve(replace(sites("lr", devices=6), clock=after(1)))
    assert not plan.budget_exhausted
    assert "budget" not in plan.explanation


@pytest.mark.parametrize("objective", ["lr", "helr", "throughput"])
def test_as_much_work_is_done_as_there_is_time_for(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: list[Budget] = []

    def noted(*args: Any) -> Budget:
        budgets.append(Budget(*args))
        return budgets[-1]

    monkeypatch.setattr(solver, "Budget", noted)
    topology = wide_area(random.Random(1), 128)  # noqa: S311 - repeatable
    request = PlanRequest(topology, model("llama-2-13b"), LOAD, objective, budget_seconds=0.4)
    plan = solver.solve(request)
    assert plan.replicas
    assert plan.budget_exhausted
    assert budgets[0].left >= -0.2 * 0.4


def test_without_a_plan_in_time_that_is_said_and_not_that_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(request: PlanRequest, costs: object, budget: Budget) -> Any:
        budget.cut()
        return solver._All((), costs_of(request), None)

    monkeypatch.setattr(solver, "_place_all", none)
    plan = solver.solve(sites("lr"))
    assert not plan.replicas
    assert "larger budget_seconds" in plan.infeasible_reason


def test_what_the_fastest_one_found_takes_is_said_besides() -> None:
    request = sites("throughput")
    load = replace(request.workload, slo_seconds=1e-3)
    plan = solver.solve(replace(request, workload=load, clock=after(1)))
    assert not plan.replicas
    assert plan.infeasible_reason.startswith("no plan that keeps the SLO of 0.001 s was found in")
    slo = float(re.findall(r"slo_seconds (\S+),", plan.infeasible_reason)[0])
    load = replace(load, slo_seconds=slo)
    assert solver.solve(replace(request, workload=load, clock=after(1))).replicas


def test_a_search_that_finds_none_within_the_slo_leaves_the_fastest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fastest = sought("lr").replicas[0].prediction
    assert fastest is not None
    request = sites("throughput")
    load = replace(request.workload, slo_seconds=1.001 * fastest.total_seconds)
    best = solver.solve(replace(request, workload=load)).certificate
    monkeypatch.setattr(placing, "quickest", lambda pipeline: None)
    plan = solver.solve(replace(request, workload=load))
    assert plan.replicas
    assert plan.certificate is not None
    assert best is not None
    assert plan.certificate.bound >= best.value


def test_a_part_spends_what_it_is_part_of() -> None:
    now = 0.0
    whole = Budget(10.0, lambda: now)
    part = whole.part(4.0)
    share = part.share(2)
    assert (part.seconds, share.seconds) == (4.0, 2.0)
    share.spend(3.0)
    assert (whole.left, part.left, share.left) == (7.0, 1.0, -1.0)
    assert share.spent
    assert not part.spent
    assert not whole.exhausted
    assert whole.part(100.0).seconds == 7.0
    assert part.part(100.0).clock_left == 10.0
    now = 10.0
    assert part.spent
    assert part.exhausted
    assert whole.exhausted
    assert Budget(1.0).clock_left == inf


def test_a_search_that_lacked_its_part_is_told_of_the_whole() -> None:
    whole = Budget(10.0)
    whole.part(1.0).part(1.0).cut()
    assert whole.exhausted


def chain(seed: int, devices: int) -> Chain:
    """Ways of which the two directions have nothing to do with each other."""
    rng = random.Random(seed)  # noqa: S311 - repeatable
    topology = random_topology(rng, devices)
    request = PlanRequest(topology, small_model(layers=12, weight=50 << 20), Workload(batch=1))
    return chain_of(costs_of(request))


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(2, 12), st.data())
def test_an_exchange_takes_what_it_is_said_to(seed: int, devices: int, data: Any) -> None:
    whole = chain(seed, devices)
    order = data.draw(st.permutations(range(devices)))[: data.draw(st.integers(2, devices))]
    layers = [1] * len(order)
    layers[data.draw(st.integers(0, len(order) - 1))] = 2
    more, changed = Exchange(whole).best(order, layers)
    held = dict(zip(order, layers, strict=True))
    if set(changed) == set(order):
        kept = [held[device] for device in changed]
    else:
        kept = layers
        caps = whole.caps(changed)
        assert all(cap >= layers[i] for i, cap in enumerate(caps) if changed[i] != order[i])
    assert len(set(changed)) == len(order)
    if np.isfinite(more):
        taken = whole.seconds(changed, kept) - whole.seconds(order, layers)
        assert more == pytest.approx(taken, rel=1e-6, abs=1e-9)


def test_no_exchange_is_better_than_the_best() -> None:
    whole = chain(5, 9)
    order, layers = list(range(6)), [2] * 6
    more, _ = Exchange(whole).best(order, layers)
    before = whole.seconds(order, layers)
    for i in range(1, 5):
        for j in range(i + 1, 5):
            turned = [*order[:i], *order[i : j + 1][::-1], *order[j + 1 :]]
            assert before + more <= whole.seconds(turned, layers) + 1e-9
        for device in range(6, 9):
            other = [*order[:i], device, *order[i + 1 :]]
            assert before + more <= whole.seconds(other, layers) + 1e-9


def test_how_long_to_search_can_be_said(tmp_path: Path) -> None:
    devices = [
        {"id": f"s{i:02}/cuda:0", "memory_total_bytes": 3 << 30, "flops_per_second": (1 + i) * 1e12}
        for i in range(held_karp.MOST_DEVICES + 6)
    ]
    links = [
        {"src": a["id"], "dst": b["id"], "latency_seconds": (7 * i * j % 31) / 1e3 + 1e-3}
        | {"bytes_per_second": 1e9}
        for i, a in enumerate(devices)
        for j, b in enumerate(devices)
        if i != j
    ]
    path = tmp_path / "sites.yaml"
    path.write_text(yaml.safe_dump({"devices": devices, "links": links}))
    told = ["plan", "--model", "llama-2-7b", "--topology", str(path), "--objective", "lr"]
    asked = CliRunner().invoke(app, [*told, "--budget", "1ms"], env={"COLUMNS": "300"})
    assert asked.exit_code == 0, asked.output
    assert "the search ended with its budget of 0.001 s" in asked.output
    refused = CliRunner().invoke(app, [*told, "--budget", "0"], env={"COLUMNS": "300"})
    assert refused.exit_code == 2
    assert "more than 0" in refused.output
