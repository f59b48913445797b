"""How first promises are kept by a live mesh: real engine, real model, bursts of requests.

    python -m benchmarks.live_promises [--loads 0.5,0.7,0.9] [--requests 400] [--json]

The mesh of ``benchmarks.scheduling``, with the default policy and predictor. From its first request
on, all are counted: those that measure its step and its saturated rate (a load of 1) are shown
apart. The interval of the coverage is a bootstrap's over blocks of requests that follow each
other, for they share their queue and their fate. Sharpness is as in ``benchmarks.promises``.

UELLM_PROFILER_PREDICTOR=prior shows what promises are worth without a learning predictor.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.arguments import count, parser_of, positive, several
from benchmarks.promises import bins_of, pinball
from benchmarks.scheduling import Live, live_mesh
from benchmarks.scheduling_results import Settings
from benchmarks.tiers import TIERS, Answered, draw
from uellm.simulator.mesh import Outcome

LEVEL = 0.9
BLOCK = 20
"""Requests that are drawn together."""
BOOTSTRAPS = 5000
WARM_UP, SATURATED = 60, 200
POLICY = "cslo-odbs"


@dataclass(frozen=True, slots=True)
class Kept:
    """How promises were kept.

    Attributes:
        requests: answered.
        p50: share that finished by the promised median.
        p90: likewise by the 90 % quantile.
        interval: 95 % of the bootstraps of ``p90`` are in there.
        sharpness: pinball loss of the 90 % quantile, over that of the class's own with hindsight.
        width: mean seconds from median to quantile, over the mean time taken.
        said: mean probability of being in time.
        came_true: share that was.
    """

    requests: int
    p50: float
    p90: float
    interval: tuple[float, float]
    sharpness: float
    width: float
    said: float
    came_true: float


def kept(done: Sequence[Answered]) -> Kept:
    """How the promises of answered requests were kept, in order of arrival."""
    rows = [
        (
            record.finished_at - record.promised_at,
            record.promise.finish_p50 - record.promised_at,
            record.promise.finish_p90 - record.promised_at,
            np.nan if record.promise.p_meet is None else record.promise.p_meet,
            record.punctual,
        )
        for record in (one.record for one in done)
        if record.promise is not None and record.outcome is Outcome.FINISHED
    ]
    took, median, high, said, punctual = np.array(rows, dtype=np.float64).T
    hits = (took <= high).astype(np.float64)
    starts = np.arange(max(len(hits) - BLOCK + 1, 1))
    rng = np.random.default_rng(0)
    picks = rng.choice(starts, (BOOTSTRAPS, -(-len(hits) // BLOCK)))
    sums = np.concatenate([[0.0], hits.cumsum()])
    ends = np.minimum(picks + BLOCK, len(hits))
    drawn = (sums[ends] - sums[picks]).sum(axis=1) / (ends - picks).sum(axis=1)
    low, most = np.quantile(drawn, (0.025, 0.975))
    told = ~np.isnan(said)
    own = float(np.quantile(took, LEVEL))
    return Kept(
        len(hits),
        float(np.mean(took <= median)),
        float(hits.mean()),
        (float(low), float(most)),
        pinball(took - high) / max(pinball(took - own), 1e-12),
        float(np.mean(high - median) / np.mean(took)),
        float(said[told].mean()),
        float(punctual[told].mean()),
    )


async def measure(loads: Sequence[float], requests: int, cv: float) -> dict[str, Any]:
    """Serve each load once, in one mesh."""
    settings = Settings((POLICY,), tuple(loads), 1, requests, cv, slots=16, kv_tokens=2048)
    found: dict[str, Kept] = {}
    async with live_mesh(settings) as live:
        step_seconds, first = await _step_seconds(live)
        found["the first requests of the mesh"] = kept(first)
        jobs = draw(1e6, 1.0, SATURATED, step_seconds, seed=3)
        saturated = await live.drive(jobs)
        found["all at once"] = kept(saturated)
        ends = sorted(one.record.finished_at for one in saturated)
        low, high = len(ends) // 10, len(ends) * 8 // 10
        rate = (high - low) / (ends[high] - ends[low])
        everybody: list[Answered] = []
        for number, load in enumerate(loads):
            done = await live.drive(draw(load * rate, cv, requests, step_seconds, 100 + number))
            found[f"load {load:g}"] = kept(done)
            everybody += done
        for tier in TIERS:
            mine = [one for one in everybody if one.record.request.kind == tier.name]
            found[f"all loads, {tier.name}"] = kept(mine)
        found["all loads"] = kept(everybody)
    return {
        "step_seconds": step_seconds,
        "saturated_requests_per_second": rate,
        "predictor": everybody[-1].profile.predictor,
        "bins": [
            asdict(each)
            for each in bins_of([[one.record for one in everybody]], least=40, block=BLOCK)
        ],
        "kept": {name: asdict(each) for name, each in found.items()},
    }


async def _step_seconds(live: Live) -> tuple[float, list[Answered]]:
    """What a token takes beside others, from the first requests of the mesh; and these."""
    done = await live.drive(draw(4.0, 1.0, WARM_UP, 0.01, seed=1))
    paces = [
        (one.record.finished_at - one.record.first_token_at) / (tokens - 1)
        for one in done
        if one.record.first_token_at is not None
        and (tokens := one.record.request.output_tokens) >= 20
    ]
    return float(np.median(paces)), done


def main() -> None:
    """Measure, and print a table."""
    parser = parser_of("live_promises", __doc__)
    parser.add_argument("--loads", type=several(positive), default="0.5,0.7,0.9")
    parser.add_argument("--requests", type=count, default=400, help="at each load")
    parser.add_argument("--cv", type=positive, default=2.0, help="variation of gaps")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = asyncio.run(measure(options.loads, options.requests, options.cv))
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"a step takes {result['step_seconds'] * 1e3:.1f} ms, load 1 is "
        f"{result['saturated_requests_per_second']:.1f} requests/s; predictor "
        f"{result['predictor']}"
    )
    for name, each in result["kept"].items():
        low, high = each["interval"]
        print(
            f"{name:32} {each['requests']:5} requests  p50 {each['p50']:.2f}  p90 "
            f"{each['p90']:.3f} ({low:.3f} to {high:.3f})  width {each['width']:.2f}  sharpness "
            f"{each['sharpness']:.2f}  odds {each['said']:.2f}>{each['came_true']:.2f}"
        )
    bins = (f"{b['said']:.2f}>{b['came_true']:.2f} ({b['requests']})" for b in result["bins"])
    print("odds at all loads:", *bins)


if __name__ == "__main__":
    main()
