"""Layers that are pinned to devices, workers or hosts."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest

from tests.support.clusters import MIB, random_request, small_model
from uellm.core.errors import InvalidArgumentError
from uellm.placement.budget import Budget
from uellm.placement.costs import Costs, costs_of
from uellm.placement.layer_pins import allowed
from uellm.placement.placers import improvement, placer_of
from uellm.placement.prediction import Layout, layout_of, predict, shortages
from uellm.placement.solver import solve
from uellm.placement.span_search import search
from uellm.placement.spans import best_of_sets, spans_of
from uellm.placement.topology import Device, Topology
from uellm.placement.views import LayerPin, Objective, Pin, Plan, PlanRequest, Workload

MODEL = small_model(layers=8)


def device(worker: str, index: int = 0, speed: float = 1.0, memory: int = 6000 * MIB) -> Device:
    return Device(
        *(f"{worker}/cuda:{index}", worker, f"host-{worker}", "cuda", memory),
        flops_per_second=1e13 * speed,
        memory_bytes_per_second=1e12 * speed,
    )


CLUSTER = Topology((device("a"), device("b", speed=4.0), device("c"), device("c", 1)))


def asked(*pins: LayerPin, **facts: object) -> PlanRequest:
    request = PlanRequest(CLUSTER, MODEL, Workload(slots=4, max_tokens=512), "lr", layer_pins=pins)
    return replace(request, **facts)  # type: ignore[arg-type]


def stages(plan: Plan) -> list[tuple[str, int, int]]:
    return [(s.device_id, s.first_layer, s.last_layer) for s in plan.replicas[0].stages]


def test_pinned_layers_are_where_they_are_to_be_and_the_rest_where_it_is_best() -> None:
    plan = solve(asked(LayerPin("host-a", 0, 3)))
    assert stages(plan) == [("a/cuda:0", 0, 3), ("b/cuda:0", 4, 7)]
    found = plan.replicas[0]
    assert (found.stages[0].has_embed, found.stages[1].has_head) == (True, True)
    assert found.prediction is not None
    assert (plan.slots, plan.solver) == (4, "held-karp by layers")


def test_ranges_in_the_middle_and_several_of_them() -> None:
    plan = solve(asked(LayerPin("c/cuda:1", 2, 3), LayerPin("b", 6, 7)))
    # What is not pinned goes to neighbours where that is faster: no stage begins at a pin's end.
    assert stages(plan) == [("c/cuda:1", 0, 3), ("b/cuda:0", 4, 7)]


def test_layers_pinned_to_a_host_are_shared_by_its_devices_which_take_others_too() -> None:
    small = replace(
        CLUSTER, devices=(device("c", memory=2600 * MIB), device("c", 1, memory=4200 * MIB))
    )
    plan = solve(asked(LayerPin("c/cuda:0", 0, 3), topology=small))
    assert stages(plan) == [("c/cuda:0", 0, 3), ("c/cuda:1", 4, 7)]
    plan = solve(asked(LayerPin("c", 0, 5), topology=small))
    assert {name for name, *_ in stages(plan)} == {"c/cuda:0", "c/cuda:1"}
    # One worker's devices side by side: pins to two of them are no contradiction.
    plan = solve(asked(LayerPin("c/cuda:0", 0, 1), LayerPin("c/cuda:1", 5, 6)))
    assert [name for name, *_ in stages(plan)] == ["c/cuda:0", "c/cuda:1"]


def test_pins_that_contradict_each_other_are_named() -> None:
    pins = (LayerPin("a", 0, 1), LayerPin("c", 3, 3), LayerPin("b", 4, 5), LayerPin("a", 6, 6))
    plan = solve(asked(*pins))
    assert not plan.replicas
    assert plan.infeasible_reason == (
        "layers 0 to 1 on a and layers 4 to 5 on b and layers 6 to 6 on a: there is no order of "
        "devices that holds all layers and has each worker's side by side; it fits without any one "
        "of them"
    )


def test_slots_are_as_many_as_fit_beside_the_pins() -> None:
    tight = replace(CLUSTER, devices=(device("a", memory=1400 * MIB), *CLUSTER.devices[1:]))
    plan = solve(asked(LayerPin("a", 0, 1), topology=tight))
    assert plan.replicas
    assert plan.slots == 2
    none = solve(asked(LayerPin("a", 0, 5), topology=tight))
    assert not none.replicas
    assert none.infeasible_reason.startswith("layers 0 to 5 on a: ")
    assert "are missing" in none.infeasible_reason
    nearest = none.infeasible_reason.rpartition("it fits with ")[2]
    assert nearest == "0-1=a"
    assert not solve(asked(LayerPin("a", 0, 2), topology=tight)).replicas


def test_an_slo_is_kept_or_the_least_that_can_be_is_named() -> None:
    pin = LayerPin("a", 0, 1)
    fast = solve(asked(pin)).replicas[0].prediction
    cheap = solve(asked(pin, objective="he", excluded=frozenset({"b"}))).replicas[0].prediction
    assert fast is not None
    assert cheap is not None
    load = Workload(slots=4, max_tokens=512, slo_seconds=1.01 * fast.total_seconds)
    assert solve(asked(pin, workload=load, objective="helr")).replicas
    less = replace(load, slo_seconds=0.9 * fast.total_seconds)
    missing = solve(asked(pin, workload=less, objective="helr"))
    assert "no plan with these pins keeps the SLO" in missing.infeasible_reason
    kept = float(missing.infeasible_reason.rpartition("slo_seconds ")[2])
    load = replace(load, slo_seconds=kept)
    assert solve(asked(pin, workload=load, objective="helr")).replicas


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ((LayerPin("a", 0, 8),), "0-8=a: the model has layers 0 to 7"),
        ((LayerPin("a", 3, 2),), "the model has layers"),
        ((LayerPin("a", 0, 3), LayerPin("b", 3, 5)), "have layers in common"),
        (
            (LayerPin("x", 0, 3),),
            "0-3=x: x has no device that may be used, .*another of a/cuda:0, ",
        ),
    ],
)
def test_pins_that_cannot_be_are_refused(pins: tuple[LayerPin, ...], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        solve(asked(*pins))


def test_pins_place_one_copy() -> None:
    with pytest.raises(InvalidArgumentError, match="they place one copy"):
        solve(asked(LayerPin("a", 0, 3), workload=Workload(replicas=2)))
    with pytest.raises(InvalidArgumentError, match="they place one copy"):
        solve(asked(LayerPin("a", 0, 3), pins=(Pin("b/cuda:0"),)))


def test_what_serves_otherwise_is_placed_anew() -> None:
    pin = LayerPin("host-a", 0, 3)
    before = solve(asked())
    plan, gained = improvement(asked(pin), before)
    assert stages(plan)[0] == ("a/cuda:0", 0, 3)
    assert gained == 1.0
    assert improvement(asked(pin), plan)[1] < 0.05
    assert stages(placer_of("lr").place(asked(pin))) == stages(plan)


def drawn(seed: int, objective: Objective) -> PlanRequest:
    """Some devices, layers that may differ, pins to devices, workers or hosts, and exclusions."""
    rng = random.Random(seed)  # noqa: S311 - repeatable
    request = random_request(seed, rng.randrange(2, 6), objective, tree=rng.random() < 0.3)
    there = request.topology
    devices = tuple(
        replace(
            d, memory_bytes=rng.randrange(1, 3) * d.memory_bytes, host=rng.choice([d.host, "h"])
        )
        for d in there.devices
    )
    model = request.model
    if rng.random() < 0.4:
        model = replace(
            model,
            layers=tuple(
                replace(layer, weight_bytes=layer.weight_bytes // rng.randrange(1, 5))
                for layer in model.layers
            ),
        )
    excluded = {rng.choice(devices).id} if len(devices) > 2 and rng.random() < 0.3 else set()
    usable = [d for d in devices if d.id not in excluded]
    pins: list[LayerPin] = []
    begin = 0
    while begin < len(model.layers) and len(pins) < 3:
        first = rng.randrange(begin, len(model.layers))
        last = rng.randrange(first, len(model.layers))
        target = rng.choice(usable)
        pins.append(LayerPin(rng.choice([target.id, target.worker, target.host]), first, last))
        begin = last + 1 + rng.randrange(3)
    return replace(
        request,
        model=model,
        topology=replace(there, devices=devices),
        layer_pins=tuple(rng.sample(pins, len(pins))),
        excluded=frozenset(excluded),
    )


def layouts(request: PlanRequest, costs: Costs) -> Iterator[Layout]:
    """All plans that there are, by full enumeration."""
    num_layers = costs.num_layers
    for count in range(1, min(len(costs.devices), num_layers) + 1):
        for order in permutations(range(len(costs.devices)), count):
            workers = [costs.devices[d].worker for d in order]
            if 1 + sum(a != b for a, b in pairwise(workers)) > len(set(workers)):
                continue
            for cuts in combinations(range(1, num_layers), count - 1):
                ends = (0, *cuts, num_layers)
                layout = Layout(order, tuple(b - a for a, b in pairwise(ends)))
                if keeps_pins(request, costs, layout) and not shortages(costs, layout):
                    yield layout


def keeps_pins(request: PlanRequest, costs: Costs, layout: Layout) -> bool:
    on = [
        costs.devices[device]
        for device, count in zip(layout.order, layout.layers, strict=True)
        for _ in range(count)
    ]
    return all(
        pin.name in (on[layer].id, on[layer].worker, on[layer].host)
        for pin in request.layer_pins
        for layer in range(pin.first_layer, pin.last_layer + 1)
    )


@pytest.mark.parametrize("objective", ["lr", "he", "helr", "throughput"])
@pytest.mark.parametrize("seeds", [range(60), range(60, 120)])
def test_no_plan_that_keeps_the_pins_is_better(objective: Objective, seeds: range) -> None:
    placed = 0
    for seed in seeds:
        request = drawn(seed, objective)
        costs = costs_of(replace(request, layer_pins=()))
        every = list(layouts(request, costs))
        plan = solve(request)
        assert bool(plan.replicas) == bool(every), (seed, plan.infeasible_reason)
        assert bool(plan.infeasible_reason) == (not every)
        if not every:
            continue
        placed += 1
        layout = layout_of(costs, plan.replicas[0])
        assert layout in every, seed
        proof = plan.certificate
        assert proof is not None
        totals = np.array([predict(costs, each).total_seconds for each in every])
        prices = np.array([costs.price[list(each.order)].sum() for each in every])
        mine = predict(costs, layout)
        assert mine == plan.replicas[0].prediction
        if objective == "lr":
            assert mine.total_seconds == pytest.approx(totals.min(), rel=1e-9)
            assert proof.ratio == pytest.approx(1)
        elif objective in ("he", "helr"):
            limit = np.inf if objective == "he" else 1.1 * totals.min()
            within = totals <= limit * (1 + 1e-9)
            least = prices[within].min()
            assert (proof.value, proof.bound) == pytest.approx((least, least)), seed
            fast = totals[within & (prices <= least + 1e-9)].min()
            assert mine.total_seconds == pytest.approx(fast, rel=1e-9), seed
        else:
            rates = [predict(costs, each).tokens_per_second for each in every]
            assert proof.bound >= max(rates) * (1 - 1e-9), seed
            load = request.workload
            if load.in_flight * load.batch >= load.output_tokens:
                # All rounds have a prompt: what is searched by is what is predicted.
                assert mine.tokens_per_second == pytest.approx(max(rates), rel=1e-6), seed
            assert mine.tokens_per_second >= 0.95 * max(rates), (
                seed,
                mine.tokens_per_second,
                max(rates),
            )
    assert placed > 20


@pytest.mark.parametrize("seed", range(40))
def test_a_search_finds_what_all_sets_have(seed: int) -> None:
    request = drawn(seed, "lr")
    costs = costs_of(replace(request, layer_pins=()))
    spans = spans_of(costs, allowed(costs.devices, request.layer_pins, costs.num_layers))
    best, found = float(best_of_sets(spans).min()), search(spans, Budget(1.0))
    assert (found is None) == np.isinf(best)
    if found is not None:
        assert best <= spans.seconds(found) * (1 + 1e-9) <= 1.02 * best


@pytest.mark.parametrize("objective", ["lr", "he", "helr", "throughput"])
def test_many_devices_keep_pins_and_their_bound_is_that_of_free_plans(objective: Objective) -> None:
    request = random_request(3, 16, objective)
    request = replace(request, model=small_model(layers=12), budget_seconds=0.5)
    first, last = request.topology.devices[5], request.topology.devices[11]
    pins = (LayerPin(first.worker, 2, 3), LayerPin(last.worker, 8, 8))
    plan, free = solve(replace(request, layer_pins=pins)), solve(request)
    assert plan == solve(replace(request, layer_pins=pins))
    costs = costs_of(request)
    layout = layout_of(costs, plan.replicas[0])
    assert layout is not None
    assert keeps_pins(replace(request, layer_pins=pins), costs, layout)
    assert not shortages(costs, layout)
    proof, unbound = plan.certificate, free.certificate
    assert proof is not None
    assert unbound is not None
    assert proof.proof.startswith("plans without the pins: ")
    assert 1 <= proof.ratio <= 3
    hurried = solve(replace(request, layer_pins=pins, budget_seconds=0.001))
    assert hurried.replicas
    assert hurried.budget_exhausted
    assert "the search ended with its budget of 0.001 s" in hurried.explanation
    if objective == "throughput":
        assert proof.bound >= unbound.value
    else:
        assert proof.bound <= max(unbound.value, proof.value)
