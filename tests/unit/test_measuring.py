"""Fits of layers and links: known costs are found again through noise."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uellm.core.cost import StepCost, chunk_pairs
from uellm.placement.learning import Correction
from uellm.placement.measuring import BlockSample, fit_block, fit_link
from uellm.placement.topology import Device
from uellm.placement.views import Workload

CPU = StepCost(150e-6, 1.2e-3, 110e-6, 6e-8, 2e-8)
GPU = StepCost(20e-6, 140e-6, 0.5e-6, 1e-10, 1e-11)


def samples(cost: StepCost, noise: float, seed: int) -> list[BlockSample]:
    """Those that a probe takes, with noise that is never below nothing."""
    rng = np.random.default_rng(seed)
    steps = [(tokens, 0.0, chunk_pairs(0, tokens)) for tokens in (16, 64, 256, 1024)]
    steps += [(n, n * c, 0.0) for n, c in ((1, 64), (1, 1024), (4, 256), (16, 512), (32, 128))]
    return [
        BlockSample(*step, cost.seconds(*step) * float(rng.lognormal(0, noise)), 1e-4)
        for step in steps
    ]


@pytest.mark.parametrize("cost", [CPU, GPU], ids=["cpu", "gpu"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_layer_is_predicted_within_its_noise(cost: StepCost, seed: int) -> None:
    found = fit_block(samples(cost, 0.03, seed), 45e6, 22e6, 100.0)
    for step in ((1, 512, 0), (8, 8 * 300, 0), (24, 24 * 200, 0), (512, 0, chunk_pairs(0, 512))):
        assert found.layer.seconds(*step) == pytest.approx(cost.seconds(*step), rel=0.15)
    assert found.error < 0.1


def test_without_noise_a_layer_is_found_exactly() -> None:
    found = fit_block(samples(CPU, 0.0, 0), 45e6, 22e6, 100.0)
    assert found.error < 5e-3
    assert found.layer.seconds(4, 400) == pytest.approx(CPU.seconds(4, 400), rel=1e-2)
    assert found.step_seconds == pytest.approx(1e-4)
    device = found.describe(Device("w/cpu:0", "w", "h", "cpu", 1))
    assert device.flops_per_second == pytest.approx(22e6 / 110e-6, rel=0.05)
    assert device.memory_bytes_per_second == pytest.approx(45e6 / 1.2e-3, rel=0.2)
    assert device.launch_seconds > 0


def test_one_sample_is_better_than_none() -> None:
    (sample,) = samples(CPU, 0.0, 0)[:1]
    found = fit_block([sample], 45e6, 22e6, 0.0)
    assert found.layer.seconds(16, 0, 136) == pytest.approx(sample.layer_seconds, rel=0.1)


def test_tables_follow_the_cost() -> None:
    found = fit_block(samples(CPU, 0.0, 0), 45e6, 22e6, 0.0)
    times = found.times(Workload(prompt_tokens=100, output_tokens=50))
    decode = dict(times.decode)
    assert decode[8.0] == pytest.approx(CPU.seconds(8, 8 * 125), rel=0.02)
    prefill = dict(times.prefill)
    pairs = 2 * chunk_pairs(0, 100) + chunk_pairs(0, 56)
    assert prefill[256.0] == pytest.approx(CPU.seconds(256, pairs=pairs), rel=0.02)
    for points in (times.prefill, times.decode):
        assert list(points) == sorted(points)


def test_a_batch_between_those_that_were_measured_is_between_them() -> None:
    """A step's time has no knee where the fit has one."""
    smooth = {1: 1.0, 4: 1.25, 8: 1.6, 16: 2.4, 32: 4.0}
    measured = [BlockSample(n, 64.0 * n, 0.0, 1e-3 * took, 0.0) for n, took in smooth.items()]
    cost = fit_block(measured, 45e6, 22e6, 0.0)
    decode = dict(cost.times(Workload(prompt_tokens=48, output_tokens=32)).decode)
    for tokens in (1, 4, 6, 8, 12, 16, 24, 32):
        expected = 1e-3 * float(np.interp(tokens, list(smooth), list(smooth.values())))
        assert decode[float(tokens)] == pytest.approx(expected, rel=0.1)


def test_the_ends_of_a_replica_are_found_by_its_sequences() -> None:
    measured = [
        BlockSample(n, 64.0 * n, 0.0, 1e-3, 0.0, ends_seconds=2e-4 + 5e-5 * n)
        for n in (1, 4, 16, 32)
    ]
    cost = fit_block(measured, 45e6, 22e6, 0.0, leader_seconds=3e-4, share=0.5, period_seconds=0.1)
    times = cost.times(Workload())
    assert dict(times.ends)[8.0] == pytest.approx(6e-4, rel=0.1)
    assert (times.leader, times.share, times.period) == (3e-4, 0.5, 0.1)


def test_what_was_learnt_of_live_steps_is_said_of_the_device() -> None:
    found = Correction(2.0, 3e-4, 1.5)
    cost = replace(fit_block(samples(CPU, 0.0, 0), 45e6, 22e6, 0.0), live=found)
    described = cost.describe(Device("d", "w", "h", "cpu", 1))
    assert (described.slowdown, described.step_seconds, described.prefill_ratio) == (2.0, 3e-4, 1.5)
    throttled = Device("d", "w", "h", "cpu", 1, slowdown=3.0)
    assert cost.describe(throttled).slowdown == 3.0


@settings(max_examples=50, deadline=None)
@given(
    latency=st.floats(1e-6, 0.1),
    bandwidth=st.floats(1e6, 1e11),
    seed=st.integers(0, 1000),
)
def test_a_link_is_found_through_noise(latency: float, bandwidth: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = (4 << 10, 64 << 10, 1 << 20, 64 << 20)
    measured = [(s, (latency + s / bandwidth) * float(rng.lognormal(0, 0.03))) for s in sizes]
    found = fit_link(measured)
    for size in sizes:
        true = latency + size / bandwidth
        assert found.latency_seconds + size / found.bytes_per_second == pytest.approx(true, rel=0.2)


@pytest.mark.parametrize(
    "measured",
    [
        [(4096.0, 1e-4)],
        [(4096.0, 1e-4), (4096.0, 2e-4)],
        [(4096.0, 5e-4), (65536.0, 1e-4)],
        [(1.0, 1e-9), (1e6, 1.0), (2e6, 4.0)],
        [(2e3, 4e-4), (32e3, -1e-4), (128e3, 1e-3)],
    ],
)
def test_a_link_is_never_negative(measured: list[tuple[float, float]]) -> None:
    for least in (0.0, 2e-4):
        found = fit_link(measured, least)
        assert found.latency_seconds >= least
        assert found.bytes_per_second > 0


def test_a_message_takes_no_less_than_the_bare_network() -> None:
    # Small ones were disturbed, so that larger ones seem to take no longer.
    measured = [(2e3, 9e-4), (32e3, 1.9e-3), (128e3, 1.6e-3), (512e3, 5e-3)]
    assert fit_link(measured).latency_seconds > 3e-4
    found = fit_link(measured, 1.5e-3)
    assert found.latency_seconds == 1.5e-3
    assert 5e7 < found.bytes_per_second < 1e9
    assert fit_link(measured, 1e-4) == fit_link(measured)
    assert fit_link([(4096.0, 1e-4)], 2e-4).latency_seconds == 2e-4
