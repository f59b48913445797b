"""Runs of a simulated engine."""

import numpy as np

from uellm.core.cost import StepCost
from uellm.policy.fcfs import FcfsDispatch, FcfsStep
from uellm.policy.views import (
    DispatchSettings,
)
from uellm.simulator.mesh import Mesh, MeshSettings, Run
from uellm.simulator.platforms import Platform
from uellm.simulator.predictors import profiler
from uellm.simulator.requests import Request

TINY = Platform("tiny", StepCost(0.001, 0.004, 0.001, 1e-5, 1e-6), 120, 6, 16)


AT_ONCE = MeshSettings(dispatch_seconds=0.0, completion_seconds=0.0)
UNBOUND = DispatchSettings(lookahead_requests=100, kv_headroom=100.0)


def simulate(
    requests: list[Request],
    platform: Platform = TINY,
    mesh: MeshSettings = AT_ONCE,
    *,
    predictor: str = "b80",
    step: object = None,
    dispatch: object = None,
) -> Run:
    known = profiler(predictor, requests, np.random.default_rng(7))
    policy = dispatch or FcfsDispatch(UNBOUND)
    return Mesh(platform, policy, lambda: step or FcfsStep(), mesh).run(requests, known)  # type: ignore[arg-type, return-value]
