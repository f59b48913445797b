"""Batches that go round through stages, against stages that are played."""

import heapq
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uellm.placement.rounds import Stations, steady_seconds


@dataclass(frozen=True)
class Pipeline:
    """Stages, ways between them and back, and what goes through them."""

    prefill: list[float]
    decode: list[float]
    ways: list[float]
    sequences: int
    in_flight: int
    tokens: int

    @property
    def stations(self) -> Stations:
        ways = sum(self.ways)
        first, following = sum(self.prefill) + ways, sum(self.decode) + ways
        return Stations(self.prefill, self.decode, first, following)

    @property
    def busiest(self) -> float:
        """Seconds of a batch on the busiest stage, and of one alone by those in flight."""
        found = self.stations
        work = [p + (self.tokens - 1) * d for p, d in zip(self.prefill, self.decode, strict=True)]
        return max(*work, (found.first + (self.tokens - 1) * found.next) / self.in_flight)


def played(line: Pipeline, lives: int = 3) -> float:
    """Seconds between the ends of two batches: every stage takes steps as they come."""
    rng = random.Random(0)  # noqa: S311 - repeatable
    count = line.sequences * line.in_flight
    begun = [n * line.tokens // count for n in range(count)]
    rng.shuffle(begun)
    # Tokens of each sequence; the first comes of its prompt.
    at = [begun[n :: line.in_flight] for n in range(line.in_flight)]
    free = [0.0] * len(line.decode)
    ready = [(0.0, batch, batch, 0) for batch in range(line.in_flight)]
    number, ended, marks = line.in_flight, 0, []
    share = [0.0] * line.in_flight
    while len(marks) <= lives:
        now, _, batch, stage = heapq.heappop(ready)
        if stage == 0:
            share[batch] = sum(n == 0 for n in at[batch]) / line.sequences
        more = share[batch] * (line.prefill[stage] - line.decode[stage])
        free[stage] = max(now, free[stage]) + line.decode[stage] + more
        number += 1
        following = (stage + 1) % len(free)
        heapq.heappush(ready, (free[stage] + line.ways[stage], number, batch, following))
        if following == 0:
            at[batch] = [(n + 1) % line.tokens for n in at[batch]]
            ended += 1
            if ended % (line.in_flight * line.tokens) == 0:
                marks.append(free[stage])
    return (marks[-1] - marks[0]) / (lives * line.in_flight)


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    stages = draw(st.integers(1, 5))
    some = st.lists(st.floats(1.0, 8.0), min_size=stages, max_size=stages)
    decode, sequences = draw(some), draw(st.sampled_from([1, 2, 4, 6]))
    longer = draw(st.floats(1.0, 6.0)) * sequences
    ways = [draw(st.sampled_from([0.3, 1.0, 10.0])) if stages > 1 else 0.0 for _ in range(stages)]
    in_flight = draw(st.sampled_from([1, stages, 2 * stages]))
    tokens = draw(st.sampled_from([16, 32, 100]))
    return Pipeline([longer * d for d in decode], decode, ways, sequences, in_flight, tokens)


@settings(max_examples=60, deadline=None)
@given(line=pipelines())
def test_it_is_about_as_fast_as_stages_that_are_played(line: Pipeline) -> None:
    found = steady_seconds(line.stations, line.sequences, line.in_flight, line.tokens)
    assert found == pytest.approx(played(line), rel=0.3)
    assert found >= line.busiest * (1 - 1e-9)


def test_it_is_nearer_than_the_busiest_stage() -> None:
    rng = random.Random(1)  # noqa: S311 - repeatable
    mine, busiest = [], []
    for _ in range(60):
        stages = rng.randint(2, 4)
        decode = [rng.uniform(1, 8) for _ in range(stages)]
        sequences = rng.choice([1, 2, 6])
        prefill = [d * sequences * rng.uniform(1, 6) for d in decode]
        ways = [rng.choice([0.3, 1.0]) for _ in range(stages)]
        line = Pipeline(prefill, decode, ways, sequences, stages, rng.choice([32, 64]))
        truth = played(line)
        found = steady_seconds(line.stations, sequences, stages, line.tokens)
        mine.append(abs(found / truth - 1))
        busiest.append(abs(line.busiest / truth - 1))
    assert sum(mine) / len(mine) < 0.05
    assert sum(busiest) / len(busiest) > 0.1


def test_one_batch_alone_takes_its_prompts_and_its_steps() -> None:
    line = Pipeline([9.0, 12.0], [1.0, 2.0], [0.5, 0.5], 3, 1, 20)
    alone = (9 + 12 + 1) + 19 * (1 + 2 + 1)
    assert steady_seconds(line.stations, 3, 1, 20) == pytest.approx(alone)
    assert played(line) == pytest.approx(alone)


def test_without_long_prompts_the_busiest_stage_or_the_way_round_decides() -> None:
    line = Pipeline([4.0, 6.0], [4.0, 6.0], [1.0, 1.0], 2, 2, 50)
    assert steady_seconds(line.stations, 2, 2, 50) == pytest.approx(50 * 6.0)
    far = Pipeline([4.0, 6.0], [4.0, 6.0], [1.0, 9.0], 2, 2, 50)
    assert steady_seconds(far.stations, 2, 2, 50) == pytest.approx(50 * 20.0 / 2)
