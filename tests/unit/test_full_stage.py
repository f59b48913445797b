"""Stages of several devices: flows against enumeration, and links between regions counted."""

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from tests.support.clusters import random_request
from uellm.core.errors import InvalidArgumentError
from uellm.placement.costs import costs_of
from uellm.placement.flow import max_flow
from uellm.placement.full_stage import Server, Stage, plan_full_stage, rating, servers_of
from uellm.placement.solver import solve
from uellm.placement.views import Pin


def test_a_flow_is_the_smallest_cut() -> None:
    rng = random.Random(3)  # noqa: S311 - repeatable
    for _ in range(60):
        n = rng.randrange(3, 7)
        edges = {
            (a, b): float(rng.randrange(1, 9))
            for a in range(n)
            for b in range(n)
            if a != b and rng.random() < 0.5
        }
        cut = min(
            sum(c for (a, b), c in edges.items() if sides[a] and not sides[b])
            for sides in product((True, False), repeat=n)
            if sides[0] and not sides[n - 1]
        )
        assert max_flow(edges, 0, n - 1) == pytest.approx(cut)


def servers(*kinds: tuple[str, int, tuple[float, ...]]) -> list[Server]:
    return [Server(f"{k}{i}", k, rates) for k, number, rates in kinds for i in range(number)]


def best_of_all(every: list[Server], num_layers: int) -> float:
    """Every way to give each device a stage, and each stage layers, links aside."""
    n, best = len(every), 0.0
    for count in range(1, n + 1):
        for stage_of in product(range(-1, count), repeat=n):
            groups = [[every[i] for i in range(n) if stage_of[i] == s] for s in range(count)]
            if not all(groups):
                continue
            for layers in product(range(1, num_layers + 1), repeat=count):
                if sum(layers) != num_layers:
                    continue
                if any(len(s.rates) < k for g, k in zip(groups, layers, strict=True) for s in g):
                    continue
                rate = min(
                    sum(s.rates[k - 1] for s in g) for g, k in zip(groups, layers, strict=True)
                )
                best = max(best, rate)
    return best


def test_stages_are_the_best_of_all_where_links_do_not_bind() -> None:
    rng = random.Random(8)  # noqa: S311 - repeatable
    for _ in range(12):
        kinds = []
        for name in "ab":
            top, most = rng.uniform(5, 20), rng.randrange(1, 4)
            kinds.append((name, rng.randrange(1, 3), tuple(top / (k + 1) for k in range(most))))
        every = servers(*kinds)
        capacity = np.full((len(every), len(every)), 1e9)
        best = best_of_all(every, 4)
        plan = plan_full_stage(every, 4, capacity)
        assert (plan is None) == (best == 0)
        if plan is not None:
            assert sum(stage.num_layers for stage in plan.stages) == 4
            used = [i for stage in plan.stages for i in stage.servers]
            assert len(set(used)) == len(used)
            assert plan.tokens_per_second == pytest.approx(best, rel=2e-4)
            assert plan.tokens_per_second == pytest.approx(rating(every, plan.stages, capacity))
            assert plan.chain_tokens_per_second <= best * (1 + 1e-9)


def test_enough_devices_stand_abreast_where_a_link_is_slow() -> None:
    every = servers(("a", 3, (90.0, 45.0)), ("b", 3, (90.0, 45.0)))
    capacity = np.full((6, 6), 1e9)
    capacity[:3, 3:] = capacity[3:, :3] = 12.0
    plan = plan_full_stage(every, 8, capacity)
    assert plan is not None
    # One way carries 12; two devices on either side carry four times that.
    assert plan.tokens_per_second == pytest.approx(45)
    assert plan.chain_tokens_per_second == pytest.approx(12)
    alone = (Stage((0,), 2), Stage((3,), 2))
    assert rating(every, alone, capacity) == pytest.approx(12)


def test_chains_beside_each_other_count_together() -> None:
    every = servers(("a", 5, (10.0, 5.0)))
    plan = plan_full_stage(every, 2, np.full((5, 5), 1e9))
    assert plan is not None
    # One chain of two does 10; two of them, and nobody's fifth device, 20; or each alone 5.
    assert plan.chain_tokens_per_second == pytest.approx(25)
    apart = np.full((5, 5), 1e9)
    apart[:2, 2:] = apart[2:, :2] = 1e-3
    across = plan_full_stage(every[:4], 4, apart[:4, :4])
    assert across is not None
    # Neither side has room for two chains, and each has room for one.
    assert across.chain_tokens_per_second == pytest.approx(10)


def test_what_does_not_fit_has_no_plan() -> None:
    assert plan_full_stage(servers(("a", 2, (9.0,))), 3, np.full((2, 2), 1e9)) is None


def test_many_kinds_are_pooled_and_reach_what_a_chain_does() -> None:
    rng = random.Random(2)  # noqa: S311 - repeatable
    kinds = []
    for name in "abcdefgh":
        top = rng.uniform(50, 500)
        kinds.append((name, rng.randrange(3, 9), tuple(top / (k + 1) for k in range(6))))
    every = servers(*kinds)
    plan = plan_full_stage(every, 60, np.full((len(every), len(every)), 1e9))
    assert plan is not None
    assert sum(stage.num_layers for stage in plan.stages) == 60
    used = [i for stage in plan.stages for i in stage.servers]
    assert len(set(used)) == len(used)
    assert plan.tokens_per_second >= plan.chain_tokens_per_second * (1 - 1e-3)
    # What all devices do together, each always busy, is the most there is.
    assert plan.tokens_per_second <= sum(server.rates[0] for server in every) / 60


def test_a_request_can_be_planned_in_full_stages() -> None:
    costs = costs_of(random_request(4, 6))
    every, capacity = servers_of(costs)
    plan = plan_full_stage(every, costs.num_layers, capacity)
    assert plan is not None
    assert plan.tokens_per_second >= plan.chain_tokens_per_second * (1 - 1e-3) > 0


def test_a_plan_has_full_stages_beside_its_chains_where_they_are_asked_for() -> None:
    request = random_request(4, 6)
    chains = solve(request)
    assert chains.full_stage is None
    both = solve(replace(request, routing="full_stage"))
    assert replace(both, full_stage=None) == chains
    found = both.full_stage
    assert found is not None
    ends = [-1, *(stage.last_layer for stage in found.stages)]
    assert [stage.first_layer for stage in found.stages] == [end + 1 for end in ends[:-1]]
    assert ends[-1] == len(request.model.layers) - 1
    used = [name for stage in found.stages for name in stage.device_ids]
    assert len(set(used)) == len(used)
    assert set(used) <= {device.id for device in request.topology.devices}
    pinned = replace(request, pins=(Pin(used[0]),), routing="full_stage")
    with pytest.raises(InvalidArgumentError, match="leave out pins and stages"):
        solve(pinned)
