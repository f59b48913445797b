"""What a step takes: the arithmetic of a cost, and what is learnt of it from steps."""

import random
from collections.abc import Callable, Iterator
from dataclasses import astuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uellm.core.cost import DEFAULT_COST, StepCost, chunk_pairs
from uellm.policy.latency import LatencyModel

A100 = StepCost(0.0015, 0.010, 0.000093, 0.082e-6, 3e-9)
RTX3090 = StepCost(0.002, 0.018, 0.0004, 0.7e-6, 15e-9)
CPU = StepCost(0.002, 0.040, 0.005, 0.5e-6, 0.4e-6)
SMALL = StepCost(0.0015, 0.0002, 0.0002, 1e-6, 1e-8)
Step = tuple[int, int, float]


def test_the_knee_is_where_arithmetic_takes_as_long_as_the_weights() -> None:
    assert [cost.knee for cost in (A100, RTX3090, CPU)] == [108, 45, 8]
    assert StepCost(0.0, 0.0, 1.0).knee == 1
    assert StepCost(0.0, 1.0, 0.0).knee > 10**6
    for cost in (A100, RTX3090, CPU):
        assert cost.seconds(cost.knee - 1) == cost.unloaded < cost.seconds(cost.knee + 1)


def test_where_overhead_is_more_than_the_weights_larger_batches_pay() -> None:
    assert [cost.worthwhile for cost in (A100, RTX3090, CPU)] == [108, 45, 8]
    small = StepCost(0.002, 0.0005, 0.0001)
    assert (small.knee, small.worthwhile) == (5, 20)
    # Twice as long for everybody, at most; and half as much again a second, at least.
    assert small.seconds(20) < 2 * small.unloaded
    assert 20 / small.seconds(20) > 1.5 * small.knee / small.seconds(small.knee)


@given(st.integers(0, 400), st.integers(1, 300), st.integers(1, 200))
def test_pairs_add_up_over_chunks(start: int, count: int, split: int) -> None:
    split = min(split, count)
    whole = chunk_pairs(start, count)
    assert whole == chunk_pairs(start, split) + chunk_pairs(start + split, count - split)
    assert whole == sum(start + i + 1 for i in range(count))


@given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 128))
def test_an_isolated_request_takes_the_sum_of_its_steps(
    prompt: int, output: int, chunk: int
) -> None:
    seconds, done = 0.0, 0
    while done < prompt:
        count = min(chunk, prompt - done)
        seconds += CPU.seconds(count, 0, chunk_pairs(done, count))
        done += count
    seconds += sum(CPU.seconds(1, prompt + i + 1) for i in range(output - 1))
    assert CPU.isolated(prompt, output, chunk) == pytest.approx(seconds)


def steps(rng: random.Random, count: int, slots: int = 64, chunk: int = 512) -> Iterator[Step]:
    """Steps as an engine computes them: decodes, and now and then a chunk beside them."""
    for _ in range(count):
        decodes = rng.randint(1, slots)
        prefill = rng.randint(1, chunk) if rng.random() < 0.3 else 0
        pairs = chunk_pairs(rng.randint(0, 500), prefill) if prefill else 0.0
        yield decodes + prefill, decodes * rng.randint(20, 800), pairs


def taught(
    model: LatencyModel, truth: StepCost, count: int, seed: int, spread: float = 0.03
) -> None:
    rng = random.Random(seed)  # noqa: S311
    for step in steps(rng, count):
        model.observe(*step, truth.seconds(*step) * rng.lognormvariate(0, spread))


def error(model: LatencyModel, truth: StepCost, seed: int = 99) -> float:
    rng = random.Random(seed)  # noqa: S311
    errors = [abs(model.cost.seconds(*step) / truth.seconds(*step) - 1) for step in steps(rng, 300)]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("truth", [A100, RTX3090, CPU])
def test_steps_are_learnt_in_spite_of_noise(truth: StepCost) -> None:
    model = LatencyModel()
    assert error(model, truth) > 0.3
    taught(model, truth, 400, seed=1)
    assert error(model, truth) < 0.03
    assert model.observations == 400
    assert model.mean_error is not None
    assert 0.01 < model.mean_error < 0.05, "what the noise leaves"


TAILS = {
    # A scheduler that lets others run now and then, and collections of garbage.
    "some_take_eight_times": lambda rng: 8.0 if rng.random() < 0.02 else 1.0,
    "log_normal": lambda rng: rng.lognormvariate(0, 0.8),
    "pareto": lambda rng: rng.paretovariate(2.5),
}


def heavy_tailed(
    truth: StepCost, tail: Callable[[random.Random], float], count: int, seed: int
) -> Iterator[tuple[Step, float]]:
    """Steps and their seconds."""
    rng = random.Random(seed)  # noqa: S311
    for step in steps(rng, count):
        yield step, truth.seconds(*step) * tail(rng)


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("truth", [A100, CPU, SMALL], ids=["a100", "cpu", "small"])
def test_what_many_steps_take_is_predicted_in_sum(
    truth: StepCost, tail: Callable[[random.Random], float]
) -> None:
    """Where some steps take far longer than most, the typical step is not what counts."""
    model = LatencyModel()
    for step, seconds in heavy_tailed(truth, tail, 6000, seed=11):
        model.observe(*step, seconds)
    later = list(heavy_tailed(truth, tail, 6000, seed=12))
    actual = sum(seconds for _, seconds in later)
    assert sum(model.cost.seconds(*step) for step, _ in later) == pytest.approx(actual, rel=0.06)
    large = [(step, seconds) for step, seconds in later if step[0] > 40]
    actual = sum(seconds for _, seconds in large)
    assert sum(model.cost.seconds(*step) for step, _ in large) == pytest.approx(actual, rel=0.08)


@pytest.mark.parametrize("at", [0, 700])
def test_a_machine_that_was_suspended_is_not_taken_for_a_slow_one(at: int) -> None:
    model = LatencyModel()
    rng = random.Random(13)  # noqa: S311
    for number, step in enumerate(steps(rng, 1400)):
        model.observe(*step, 60.0 if number == at else CPU.seconds(*step))
    assert error(model, CPU) < 0.03


@pytest.mark.parametrize("factor", [0.4, 2.0])
@pytest.mark.parametrize("truth", [A100, SMALL], ids=["a100", "small"])
def test_a_machine_that_became_slower_or_faster_is_believed_within_hundreds_of_steps(
    truth: StepCost, factor: float
) -> None:
    """However long it went at another pace before, and though single steps say little."""
    model = LatencyModel()
    tail = TAILS["some_take_eight_times"]
    for step, seconds in heavy_tailed(truth, tail, 8000, seed=14):
        model.observe(*step, seconds)
    changed = StepCost(*(factor * value for value in astuple(truth)))
    for step, seconds in heavy_tailed(changed, tail, 640, seed=15):
        model.observe(*step, seconds)
    later = list(heavy_tailed(changed, tail, 6000, seed=16))
    actual = sum(seconds for _, seconds in later)
    assert sum(model.cost.seconds(*step) for step, _ in later) == pytest.approx(actual, rel=0.2)


def test_the_first_steps_already_help() -> None:
    model = LatencyModel()
    before = error(model, RTX3090)
    taught(model, RTX3090, 8, seed=3)
    assert error(model, RTX3090) < before / 2


def test_a_prior_that_is_far_off_does_not_stand_against_what_is_seen() -> None:
    """Few kinds of steps, all of them on one side of the knee, and a prior that is not."""
    truth = StepCost(0.001, 0.008, 0.0005)
    for prior in (StepCost(0.0, 0.1, 0.01), StepCost(0.0, 0.01, 0.01), StepCost(0.0, 9.0, 1e-9)):
        model = LatencyModel(prior)
        for i in range(200):
            tokens = 1 if i % 4 else 10
            model.observe(tokens, 0, 0.0, truth.seconds(tokens))
            if i > 8:
                assert model.cost.seconds(1) == pytest.approx(0.009, rel=0.5)
        assert model.cost.seconds(1) == pytest.approx(0.009, rel=0.05)
        assert model.cost.seconds(10) == pytest.approx(0.009, rel=0.05)


def test_a_changed_machine_is_learnt_anew() -> None:
    model = LatencyModel(A100)
    taught(model, A100, 500, seed=5)
    slower = StepCost(0.003, 0.020, 0.000186, 0.164e-6, 6e-9)
    taught(model, slower, 2000, seed=6)
    assert error(model, slower) < 0.05


def test_many_decodes_do_not_wash_out_what_prefill_takes() -> None:
    model = LatencyModel()
    taught(model, RTX3090, 300, seed=7)
    for i in range(20_000):
        model.observe(20, 4000 + i % 3000, 0.0, RTX3090.seconds(20, 4000 + i % 3000))
    assert error(model, RTX3090) < 0.05


def test_before_the_first_step_the_prior_stands_and_errors_are_unknown() -> None:
    model = LatencyModel(CPU)
    assert model.cost == CPU
    assert model.mean_error is None
    model.observe(0, 0, 0.0, 1.0)
    model.observe(1, 0, 0.0, 0.0)
    model.observe(1, 0, 0.0, float("inf"))
    assert model.observations == 0
    assert LatencyModel().cost == DEFAULT_COST


OBSERVED = st.tuples(
    st.integers(1, 4000), st.integers(0, 10**6), st.floats(0, 1e7), st.floats(1e-5, 100)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(OBSERVED, max_size=40))
def test_whatever_is_observed_costs_are_finite_and_more_work_never_takes_less(
    observed: list[tuple[int, int, float, float]],
) -> None:
    model = LatencyModel()
    for step in observed:
        model.observe(*step)
    cost = model.cost
    assert all(0 <= value < float("inf") for value in astuple(cost))
    assert cost.knee >= 1
    for tokens, context, pairs, _ in observed:
        taken = cost.seconds(tokens, context, pairs)
        assert 0 <= taken < float("inf")
        assert cost.seconds(tokens + 1, context, pairs) >= taken
        assert cost.seconds(tokens, context + 1, pairs) >= taken
        assert cost.seconds(tokens, context, pairs + 1) >= taken


@pytest.mark.parametrize("prior", [RTX3090, StepCost(0.0, 0.010, 0.0001)])
def test_a_short_prompt_that_was_slow_says_nothing_of_long_ones(prior: StepCost) -> None:
    model = LatencyModel(prior)
    usual = prior.seconds(1, 10)
    model.observe(3, 0, chunk_pairs(0, 3), 1.5 * usual)
    for done in range(40):
        model.observe(1, 4 + done, 0, usual)
    long = model.cost.seconds(400, 0, chunk_pairs(0, 400))
    assert long == pytest.approx(prior.seconds(400, 0, chunk_pairs(0, 400)), rel=0.5)
    # But several do.
    for _ in range(100):
        model.observe(400, 0, chunk_pairs(0, 400), 3 * long)
    assert model.cost.seconds(400, 0, chunk_pairs(0, 400)) == pytest.approx(3 * long, rel=0.1)
