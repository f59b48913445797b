"""Static batches: the published equations by hand, and small instances by brute force."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.policies import COST, NOW, engine, sequence
from uellm.policy.batching import (
    Batch,
    Candidate,
    OdbsSettings,
    Room,
    coded_slo_odbs,
    fifo,
    odbs_cost,
    overdue_first,
    s3,
    slo_odbs,
)
from uellm.policy.registry import step_policy
from uellm.policy.stress import MorphlingSettings, batch_seconds, best_batch

WIDE = Room(slots=100)
BATCHERS = ["fifo", "morphling", "odbs", "s3", "slo-dbs", "slo-odbs", "slo-odbs-coded"]


def candidate(name: str, slo: float = 10, length: float = 10, **facts: float) -> Candidate:
    defaults = {"arrived_at": 0.0, "kv_tokens": length}
    return Candidate(name, slo_seconds=slo, output_tokens=length, **{**defaults, **facts})  # type: ignore[arg-type]


def names(batches: Sequence[Batch]) -> list[str]:
    return ["".join(c.request_id for c in batch) for batch in batches]


def test_costs_follow_the_published_equations() -> None:
    options = OdbsSettings(slo_weight=2, length_weight=0.5, slo_overhead=3, length_overhead=4)
    # Alone: T_l = (10 + 0) * 1 * 3, T_o = (100 + 0) * 1 * 4.
    assert odbs_cost([candidate("a", 10, 100)], options) == 2 * 30 + 0.5 * 400
    # Joining: L_CM = 10, O_CM = 100; T_l = ((10 + 10) + (20 + 10)) * 2 * 3 = 300,
    # T_o = ((100 + 100) + (40 + 100)) * 2 * 4 = 2720.
    pair = [candidate("a", 10, 100), candidate("b", 20, 40)]
    assert odbs_cost(pair, options) == 2 * 300 + 0.5 * 2720


def test_a_batch_grows_up_to_the_threshold_and_no_further() -> None:
    options = OdbsSettings(slo_weight=1, length_weight=0, slo_overhead=1, threshold=120)
    # Two of 10 s cost (20 + 20) * 2 = 80, three (20 + 20 + 20) * 3 = 180.
    three = [candidate(name) for name in "abc"]
    assert names(slo_odbs(three, WIDE, options)) == ["ab", "c"]
    assert names(slo_odbs(three, WIDE, replace(options, threshold=180))) == ["abc"]
    assert names(slo_odbs(three, WIDE, replace(options, threshold=79))) == ["a", "b", "c"]
    assert names(slo_odbs(three, WIDE, replace(options, threshold=999, most_requests=2))) == [
        "ab",
        "c",
    ]


def test_the_weights_choose_what_is_sorted_by() -> None:
    mixed = [candidate("a", 1, 90), candidate("b", 50, 10), candidate("c", 20, 20)]
    options = OdbsSettings(threshold=0)  # each a batch of its own, in order
    assert names(slo_odbs(mixed, WIDE, replace(options, length_weight=0))) == ["a", "c", "b"]
    assert names(slo_odbs(mixed, WIDE, replace(options, slo_weight=0))) == ["b", "c", "a"]
    # 1 * SLO + 0.5 * length: 46, 55, 30.
    assert names(slo_odbs(mixed, WIDE, options)) == ["c", "a", "b"]


def test_the_authors_code_counts_by_how_much_a_batch_gets_longer() -> None:
    # Keys 1 * 0 + 0.5 * length; (5000 - 10) * 2 * 1.2 = 11976 and (7000 - 10) * 2 * 1.2 = 16776.
    short = candidate("a", 0, 10)
    assert names(coded_slo_odbs([short, candidate("b", 0, 5000)], WIDE, OdbsSettings())) == ["ab"]
    assert names(coded_slo_odbs([short, candidate("b", 0, 7000)], WIDE, OdbsSettings())) == [
        "a",
        "b",
    ]
    alike = [candidate(f"{i}", 0, 10) for i in range(10)] + [candidate("x", 0, 10)]
    assert [len(b) for b in coded_slo_odbs(alike, WIDE, OdbsSettings())] == [10, 1]


def test_s3_packs_bins_under_the_kv_limit_longest_first() -> None:
    some = [
        candidate("a", length=60, prompt_tokens=0, arrived_at=1),
        candidate("b", length=65, prompt_tokens=0, arrived_at=2),
        candidate("c", length=10, prompt_tokens=0, arrived_at=3),
        candidate("d", length=100, prompt_tokens=0, arrived_at=4),
    ]
    # Bins 64, 128, 64, 128 under 256: the long two fill one batch; the oldest request's runs first.
    assert names(s3(some, Room(10, 256), 64)) == ["ac", "bd"]
    # What proved too short is reserved twice as much.
    again = [replace(some[0], retries=1), *some[1:]]
    assert names(s3(again, Room(10, 256), 64)) == ["ab", "dc"]


def test_fifo_and_waiting_too_long() -> None:
    some = [candidate(name, arrived_at=i) for i, name in enumerate("cab")]
    assert names(fifo(some, WIDE, 2)) == ["ca", "b"]
    parted = [[some[2]], [some[0], some[1]]]
    assert names(overdue_first(parted, 5, 10)) == ["b", "ca"]
    assert names(overdue_first(parted, 11, 10)) == ["ca", "b"]


def test_the_stress_test_finds_the_best_throughput_by_trying_all() -> None:
    options = MorphlingSettings(prompt_tokens=100, output_tokens=100)
    for room in (Room(30), Room(64, 2000), Room(300, 100_000)):
        fits = [
            n for n in range(1, room.slots + 1) if not room.kv_tokens or n * 200 <= room.kv_tokens
        ]
        best = best_batch(room, COST, options)
        tried = max(n / batch_seconds(n, COST, options) for n in fits if n <= 256)
        assert best / batch_seconds(best, COST, options) == tried
        assert best in fits


def contiguous(order: Batch) -> Iterator[list[Batch]]:
    """All ways to part an order into neighbours."""
    if not order:
        yield []
    for size in range(1, len(order) + 1):
        for rest in contiguous(order[size:]):
            yield [order[:size], *rest]


def partitions(items: Batch) -> Iterator[list[Batch]]:
    """All ways to part a set."""
    if not items:
        yield []
        return
    first, *rest = items
    for parted in partitions(rest):
        yield [[first], *parted]
        for i, part in enumerate(parted):
            yield [*parted[:i], [first, *part], *parted[i + 1 :]]


CANDIDATES = st.lists(
    st.builds(
        candidate,
        st.just("unnamed"),
        st.floats(1, 100),
        st.integers(1, 300).map(float),
        arrived_at=st.floats(0, 100),
        prompt_tokens=st.integers(0, 50),
    ),
    min_size=1,
    max_size=8,
).map(lambda found: [replace(c, request_id=str(i)) for i, c in enumerate(found)])


@settings(max_examples=60, deadline=None)
@given(CANDIDATES, st.floats(0, 20_000), st.integers(1, 5))
def test_no_other_parting_of_the_order_within_the_threshold_has_fewer_batches(
    some: list[Candidate], threshold: float, most: int
) -> None:
    options = OdbsSettings(threshold=threshold, most_requests=most)
    found = slo_odbs(some, WIDE, options)
    order = [c for batch in found for c in batch]
    scores = [c.slo_seconds + 0.5 * c.output_tokens for c in order]
    assert scores == sorted(scores)

    def allowed(batch: Batch) -> bool:
        return len(batch) == 1 or (len(batch) <= most and odbs_cost(batch, options) <= threshold)

    assert all(map(allowed, found))
    fewest = min(len(parted) for parted in contiguous(order) if all(map(allowed, parted)))
    assert len(found) == fewest


@settings(max_examples=40, deadline=None)
@given(CANDIDATES, st.integers(1, 4))
def test_full_batches_of_odbs_take_the_least_time_of_all_batches(
    some: list[Candidate], size: int
) -> None:
    """By brute force over all partitions: sorted by length, the longest answers add up to least."""
    some = some[: len(some) // size * size]
    if not some:
        return
    options = OdbsSettings(slo_weight=0, threshold=1e12, most_requests=size)

    def steps(batches: Sequence[Batch]) -> float:
        return sum(max(c.output_tokens for c in batch) for batch in batches)

    possible = (p for p in partitions(some) if all(len(batch) <= size for batch in p))
    assert steps(slo_odbs(some, WIDE, options)) == min(map(steps, possible))


@settings(max_examples=40, deadline=None)
@given(CANDIDATES, st.integers(350, 800))
def test_s3_needs_hardly_more_batches_than_the_best_packing(
    some: list[Candidate], room: int
) -> None:
    def size(batch: Batch) -> float:
        bins = (next(64 << i for i in range(9) if 64 << i >= c.output_tokens) for c in batch)
        return sum(c.prompt_tokens for c in batch) + sum(bins)

    best = min(len(p) for p in partitions(some) if all(len(b) == 1 or size(b) <= room for b in p))
    found = s3(some, Room(100, room), 64)
    assert all(len(batch) == 1 or size(batch) <= room for batch in found)
    # First fit decreasing (Dósa, 2007) sorts by size; prompts may change it by one more batch.
    assert len(found) <= 11 / 9 * best + 6 / 9 + 1


@pytest.mark.parametrize("name", BATCHERS)
@settings(max_examples=30, deadline=None)
@given(CANDIDATES, st.integers(1, 5), st.sampled_from([0, 200, 900]), st.randoms())
def test_whatever_the_batcher_nobody_is_lost_and_batches_fit(
    name: str, some: list[Candidate], slots: int, kv_tokens: int, random: object
) -> None:
    batching = step_policy(name)._batching  # type: ignore[attr-defined]
    room = Room(slots, kv_tokens)
    found = batching.batches(some, room, COST, 1000.0)
    assert sorted(c.request_id for batch in found for c in batch) == [c.request_id for c in some]
    for batch in found:
        assert 1 <= len(batch) <= slots
        if name != "s3" and kv_tokens and len(batch) > 1:
            assert sum(c.kv_tokens for c in batch) <= kv_tokens
    shuffled = list(some)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert batching.batches(shuffled, room, COST, 1000.0) == found
    # All have waited longer than anyone may; where there is such a limit, the oldest is in front.
    if batching.max_wait_seconds < 900:
        oldest = min(some, key=lambda c: (c.arrived_at, c.request_id))
        assert oldest in found[0]


@pytest.mark.parametrize("name", BATCHERS)
def test_a_batch_is_admitted_only_when_nothing_runs(name: str) -> None:
    policy = step_policy(name)
    waiting = [sequence(f"w{i}", deadline_at=NOW + 5 + i) for i in range(6)]
    assert policy.step(engine([sequence("r")], waiting), NOW).admit == ()
    decision = policy.step(engine([], waiting), NOW)
    assert 0 < len(decision.admit) <= 4
    assert decision.preempt == ()
    assert policy.step(engine([], []), NOW).admit == ()


def test_answers_that_outgrow_a_static_batch_send_the_last_back() -> None:
    running = [sequence(f"r{i}", prompt=10, computed_tokens=40, output_tokens=31) for i in range(3)]
    decision = step_policy("s3").step(engine(running, [], kv_tokens_total=100), NOW)
    assert decision.preempt == ("r2",)


def test_batches_are_in_order_of_their_scores() -> None:
    some = [candidate(str(i), slo=100 - i, length=7 * i % 50) for i in range(30)]
    found = slo_odbs(some, WIDE, OdbsSettings())
    assert all(
        max(c.slo_seconds + 0.5 * c.output_tokens for c in one)
        <= min(c.slo_seconds + 0.5 * c.output_tokens for c in other)
        for one, other in pairwise(found)
    )
