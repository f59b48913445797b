"""On the simulator, promises of the policies that serve are kept about as often as they say."""

import numpy as np
import pytest

from uellm.simulator.experiments import Cell, Setup, serve
from uellm.simulator.mesh import Outcome
from uellm.simulator.platforms import PLATFORMS


@pytest.mark.parametrize("policy", ["fcfs", "edf", "cslo-odbs"])
def test_nine_in_ten_finish_by_their_ninety_per_cent(policy: str) -> None:
    setup = Setup(PLATFORMS["a100"], "tier", "prior", requests=900)
    records = serve(setup, Cell(policy, 0.7, 1)).records
    told = [(r, r.promise) for r in records if r.promise is not None]
    assert len(told) == len(records)
    assert all(r.outcome is Outcome.FINISHED for r, _ in told)
    for field, level in (("finish_p50", 0.5), ("finish_p90", 0.9)):
        kept = np.mean([r.finished_at <= getattr(p, field) for r, p in told])
        assert kept == pytest.approx(level, abs=0.05)
    started = np.mean([(r.first_token_at or 0) <= p.start_p90 for r, p in told])
    assert started == pytest.approx(0.9, abs=0.05)
    odds = [(p.p_meet, r.punctual) for r, p in told if p.p_meet is not None]
    said, true = np.mean(np.array(odds, dtype=float), axis=0)
    assert said == pytest.approx(true, abs=0.05)
