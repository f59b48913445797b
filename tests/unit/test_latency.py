"""What a step takes: the arithmetic of a cost, and what is learnt of it from steps."""

import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uellm.core.cost import DEFAULT_COST, StepCost, chunk_pairs
from uellm.policy.latency import LatencyModel

A100 = StepCost(0.0015, 0.010, 0.000093, 0.082e-6, 3e-9)
RTX3090 = StepCost(0.002, 0.018, 0.0004, 0.7e-6, 15e-9)
CPU = StepCost(0.002, 0.040, 0.005, 0.5e-6, 0.4e-6)
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
    for tokens, context, pairs in steps(rng, count):
        seconds = truth.seconds(tokens, context, pairs) * rng.lognormvariate(0, spread)
        if rng.random() < 0.02:
            seconds *= 8  # someone else had the machine
        model.observe(tokens, context, pairs, seconds)


def error(model: LatencyModel, truth: StepCost, seed: int = 99) -> float:
    rng = random.Random(seed)  # noqa: S311
    errors = [abs(model.cost.seconds(*step) / truth.seconds(*step) - 1) for step in steps(rng, 300)]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("truth", [A100, RTX3090, CPU])
def test_steps_are_learnt_in_spite_of_noise_and_outliers(truth: StepCost) -> None:
    model = LatencyModel()
    assert error(model, truth) > 0.3
    taught(model, truth, 400, seed=1)
    assert error(model, truth) < 0.03
    assert model.observations == 400
    assert model.mean_error is not None
    median, high = model.error_quantile(0.5), model.error_quantile(0.99)
    assert median is not None
    assert high is not None
    assert median < 0.05
    assert high > 0.5


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
    assert (model.mean_error, model.error_quantile(0.9)) == (None, None)
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
def test_whatever_is_observed_costs_stay_finite_and_not_negative(
    observed: list[tuple[int, int, float, float]],
) -> None:
    model = LatencyModel()
    for tokens, context, pairs, seconds in observed:
        model.observe(tokens, context, pairs, seconds)
    cost = model.cost
    values = (cost.overhead, cost.weights, cost.per_token, cost.per_context, cost.per_pair)
    assert all(0 <= value < float("inf") for value in values)
    assert cost.knee >= 1


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
