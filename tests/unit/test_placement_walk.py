"""The bound by walks against every chain there is, and on clusters that no tree describes."""

import random
from itertools import permutations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.clusters import (
    odd_request,
    random_request,
    random_topology,
    small_model,
)
from uellm.placement.budget import Budget
from uellm.placement.chain import Chain, Route, chain_of, route
from uellm.placement.costs import costs_of
from uellm.placement.solver import solve
from uellm.placement.views import Pin, PlanRequest, Workload
from uellm.placement.walk import lift_walks

CLOSE = 1e-9
WORK, TIME = 1e6, 1e6


def best_of(chain: Chain) -> Route | None:
    """The best of all chains."""
    orders = (
        order
        for count in range(1, chain.size + 1)
        for order in permutations(range(chain.size), count)
    )
    found = (route(chain, order) for order in orders)
    return min((each for each in found if each), key=lambda each: each.seconds, default=None)


def check(chain: Chain, target: float | None = None, work: float = WORK) -> float:
    """The bound is below the best of all chains; what it is of it (1 where there is none)."""
    best = best_of(chain)
    if best is None:
        assert not lift_walks(chain, 1.0, WORK, Budget(TIME)).routes
        return 1.0
    found = lift_walks(chain, best.seconds if target is None else target, work, Budget(TIME))
    assert found.bound <= best.seconds + CLOSE * abs(best.seconds)
    for met in found.routes:
        assert met == route(chain, met.order)
        assert met.seconds >= best.seconds - CLOSE * abs(best.seconds)
    return found.bound / best.seconds if best.seconds else 1.0


def tempting(seed: int, count: int) -> Chain:
    """Devices that hold little, with some short ways: walks would go round in circles."""
    rng = np.random.default_rng(seed)
    cap = rng.integers(1, 4, (4, count))
    return Chain(
        num_layers=int(rng.integers(1, max(2, cap[0].sum() + 1))),
        layer=rng.uniform(0, 1, count),
        fixed=rng.uniform(-0.5, 0.5, count),
        first=rng.uniform(0, 1, count),
        last=rng.uniform(0, 1, count),
        link=np.where(rng.random((count, count)) < 0.1, np.inf, rng.random((count, count)) ** 3),
        back=rng.uniform(0, 1, (count, count)),
        middle_cap=cap[0],
        first_cap=cap[1] - 1,
        last_cap=cap[2] - 1,
        only_cap=cap[3] - 1,
        group=rng.integers(0, count, count) if rng.random() < 0.3 else np.arange(count),
        required=rng.random(count) < 0.2,
    )


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 5), share=st.sampled_from([0.3, 1, 1, 3]))
def test_walks_in_circles_do_not_lift_the_bound_too_far(
    seed: int, count: int, share: float
) -> None:
    chain = tempting(seed, count)
    best = best_of(chain)
    check(chain, share * best.seconds if best else 1.0)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_walks_of_six_devices_do_not_either(seed: int) -> None:
    check(tempting(seed, 6))


def test_prices_keep_walks_from_going_in_circles() -> None:
    """Of bounds that are exact with prices; and after one round, which has none."""
    priced = [check(tempting(seed, 5)) for seed in range(100)]
    bare = [check(tempting(seed, 5), work=2_000) for seed in range(100)]
    exact, without = (np.mean(np.array(shares) >= 1 - 1e-6) for shares in (priced, bare))
    assert exact >= 0.8
    assert without < 0.7


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 5), pinned=st.booleans())
def test_no_chain_is_below_the_bound(seed: int, count: int, pinned: bool) -> None:
    request = random_request(seed, count)
    costs = costs_of(request)
    pins = (Pin(costs.devices[seed % count].id),) if pinned else ()
    check(chain_of(costs, pins))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_no_chain_of_up_to_six_devices_is_below_the_bound(seed: int) -> None:
    check(chain_of(costs_of(random_request(seed, 6))))


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    price=st.lists(st.floats(-2, 2), min_size=5, max_size=5),
    share=st.floats(0.1, 10),
)
@example(seed=0, price=[-2.0] * 5, share=0.1)
def test_devices_may_be_worth_more_than_they_take(
    seed: int, price: list[float], share: float
) -> None:
    """Prices on devices are negative where many are wanted; targets may be far from the truth."""
    chain = chain_of(costs_of(random_request(seed, 5)))
    scale = float(chain.layer.mean())
    best = best_of(chain)
    target = share * best.seconds if best else 1.0
    check(chain.priced(scale * np.array(price)), target)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_clusters_that_nobody_would_expect_are_bounded(seed: int) -> None:
    costs = costs_of(odd_request(seed, "lr"))
    if costs.devices and costs.uniform:
        check(chain_of(costs))


def test_bounds_of_small_clusters_are_nearly_the_best() -> None:
    shares = [check(chain_of(costs_of(random_request(seed, 5)))) for seed in range(60)]
    assert np.mean(np.array(shares) >= 1 - 1e-6) >= 0.9
    assert min(shares) >= 0.9


def test_without_work_there_is_no_bound() -> None:
    chain = chain_of(costs_of(random_request(1, 4)))
    found = lift_walks(chain, 1.0, 0, Budget(TIME))
    assert found.bound == -np.inf
    assert not found.routes


@pytest.mark.parametrize("seed", range(3))
def test_ways_that_have_nothing_to_do_with_each_other_are_placed_near_the_bound(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 - repeatable
    request = PlanRequest(random_topology(rng, 40), small_model(layers=40), Workload(batch=4), "lr")
    plan = solve(request)
    assert plan.certificate is not None
    assert plan.certificate.proof == "walks with prices on visits"
    assert plan.certificate.ratio <= 1.09
    assert plan == solve(request)
