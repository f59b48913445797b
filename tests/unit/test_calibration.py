"""Quantiles that cover what they promise: at rest, after changes, with answers that were cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uellm.core.request import LEVELS
from uellm.prediction.calibration import WINDOW, Calibration, pack, representative, unpack
from uellm.prediction.survival import Flags, Floats

NINETY = LEVELS.index(0.9)
ERRORS = st.lists(st.tuples(st.floats(-50, 50), st.booleans()), max_size=40)


def hits(calibration: Calibration, errors: Floats, censored: Flags | None = None) -> Floats:
    """Whether each error is covered by the 90 % quantile before it is observed."""
    cut = np.zeros(len(errors), dtype=np.bool_) if censored is None else censored
    covered = []
    for error, flag in zip(errors, cut, strict=True):
        covered.append(error <= calibration.quantiles()[NINETY])
        calibration.observe(float(error), bool(flag))
    return np.array(covered, dtype=np.float64)


@settings(max_examples=50)
@given(ERRORS, st.floats(0.1, 5))
def test_quantiles_ascend_whatever_was_observed(
    errors: list[tuple[float, bool]], spread: float
) -> None:
    calibration = Calibration(spread)
    for error, censored in errors:
        calibration.observe(error, censored)
        quantiles = calibration.quantiles()
        assert np.isfinite(quantiles).all()
        assert (np.diff(quantiles) >= 0).all()


@settings(max_examples=30)
@given(st.lists(ERRORS, max_size=3), st.floats(-3, 3))
def test_those_that_were_packed_go_on_alike(
    histories: list[list[tuple[float, bool]]], following: float
) -> None:
    originals = []
    for history in histories:
        originals.append(Calibration(2.0))
        for error, censored in history:
            originals[-1].observe(error, censored)
    packed = pack(originals)
    copies = unpack(packed["calibration"], packed["calibration_sizes"])
    for original, copy in zip(originals, copies, strict=True):
        for each in (original, copy):
            each.observe(following, False)
        np.testing.assert_array_equal(original.quantiles(), copy.quantiles())


def test_coverage_returns_after_an_abrupt_change() -> None:
    rng = np.random.default_rng(0)
    means, windows = [], []
    for _ in range(20):
        before = rng.standard_normal(400)
        shift, scale = rng.choice([-2.0, -1.0, 1.0, 2.0]), rng.choice([0.5, 1.0, 2.0])
        after = shift + scale * rng.gumbel(size=1000)
        late = hits(Calibration(), np.concatenate((before, after)))[700:]
        means.append(late.mean())
        windows.append(np.convolve(late, np.full(200, 1 / 200), "valid"))
    assert 0.88 <= np.mean(means) <= 0.92
    sound = [window.min() >= 0.8 and window.max() <= 0.97 for window in windows]
    assert np.mean(sound) >= 0.95


def test_cut_answers_bias_nothing() -> None:
    rng = np.random.default_rng(1)
    true = rng.standard_normal(3000)
    caps = rng.uniform(-1, 4, 3000)
    calibration = Calibration()
    hits(calibration, np.minimum(true, caps), true > caps)
    fresh = rng.standard_normal(20_000)
    for level, quantile in zip(LEVELS, calibration.quantiles(), strict=True):
        assert np.mean(fresh <= quantile) == pytest.approx(level, abs=0.09)


def test_a_long_past_is_represented_unless_it_has_changed() -> None:
    rng = np.random.default_rng(2)
    uncut = np.zeros(4000, dtype=np.bool_)
    same = rng.standard_normal(4000)
    kept, _ = representative(same, uncut)
    assert len(kept) == WINDOW
    np.testing.assert_allclose(np.quantile(kept, LEVELS), np.quantile(same, LEVELS), atol=0.05)
    changed = np.concatenate((same[:-500], same[-500:] + 3))
    kept, _ = representative(changed, uncut)
    assert np.median(kept) > 2.5
