"""What came of a run, in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uellm.simulator.calibration import Calibration, calibration
from uellm.simulator.mesh import Outcome, Record, Run
from uellm.simulator.platforms import Platform


@dataclass(frozen=True, slots=True)
class KindMetrics:
    """What came of one class of requests; seconds are of those that finished, None without any.

    Attributes:
        requests: how many.
        attainment: share that was answered in time.
        latency_p50: from arrival to the last token.
        latency_p99: likewise.
        ttft_p50: from arrival to the first token.
        ttft_p99: likewise.
    """

    requests: int
    attainment: float
    latency_p50: float | None
    latency_p99: float | None
    ttft_p50: float | None
    ttft_p99: float | None


@dataclass(frozen=True, slots=True)
class Metrics:
    """What came of a run.

    Attributes:
        requests: how many.
        attainment: share that was answered in time; refused, expired and late ones are misses.
        kinds: per class.
        refused: shares that were refused, or expired while they waited.
        latency_mean: seconds from arrival to the last token, of those that finished.
        max_wait: longest time until a first token, or a refusal.
        preemptions: per request.
        wasted: share of the computed tokens that preemption lost.
        padding: share of the computed rows that were nobody's.
        busy: share of the time that a replica was computing.
        met_per_second: requests answered in time, per second.
        met_tokens_per_second: output tokens of those.
        tokens_per_second: output tokens of finished requests.
        requests_per_second: finished.
        seconds: until the last request ended.
        steps: that engines computed.
        asked: times that policies were asked: of dispatch, of steps.
        calibration: how the first promises were kept.
    """

    requests: int
    attainment: float
    kinds: dict[str, KindMetrics]
    refused: float
    latency_mean: float | None
    max_wait: float
    preemptions: float
    wasted: float
    padding: float
    busy: float
    met_per_second: float
    met_tokens_per_second: float
    tokens_per_second: float
    requests_per_second: float
    seconds: float
    steps: int
    asked: tuple[int, int]
    calibration: Calibration


def measure(run: Run) -> Metrics:
    """The numbers of a run."""
    records, engines = run.records, run.engines
    finished = [record for record in records if record.outcome is Outcome.FINISHED]
    seconds = max(run.ended_at - min(r.request.arrival for r in records), 1e-12)
    computed = sum(engine.computed for engine in engines)
    padding = sum(engine.padding for engine in engines)
    met = sum(record.met for record in records)
    latencies = [r.finished_at - r.request.arrival for r in finished]
    return Metrics(
        requests=len(records),
        attainment=met / len(records),
        kinds=by_kind(records),
        refused=1 - len(finished) / len(records),
        latency_mean=float(np.mean(latencies)) if latencies else None,
        max_wait=max(
            (r.finished_at if r.first_token_at is None else r.first_token_at) - r.request.arrival
            for r in records
        ),
        preemptions=sum(record.preemptions for record in records) / len(records),
        wasted=sum(engine.wasted for engine in engines) / max(computed, 1),
        padding=padding / max(computed + padding, 1),
        busy=sum(engine.busy for engine in engines) / (seconds * len(engines)),
        met_per_second=met / seconds,
        met_tokens_per_second=sum(r.request.output_tokens for r in records if r.met) / seconds,
        tokens_per_second=sum(r.request.output_tokens for r in finished) / seconds,
        requests_per_second=len(finished) / seconds,
        seconds=seconds,
        steps=sum(engine.steps for engine in engines),
        asked=(run.dispatch_asked, sum(engine.asked for engine in engines)),
        calibration=calibration(records),
    )


def by_kind(records: Sequence[Record]) -> dict[str, KindMetrics]:
    """The numbers of each class."""
    kinds = sorted({record.request.kind for record in records})
    return {kind: _kind([r for r in records if r.request.kind == kind]) for kind in kinds}


def _kind(records: Sequence[Record]) -> KindMetrics:
    finished = [record for record in records if record.outcome is Outcome.FINISHED]
    latency = [r.finished_at - r.request.arrival for r in finished]
    first = [r.first_token_at - r.request.arrival for r in finished if r.first_token_at is not None]
    return KindMetrics(
        requests=len(records),
        attainment=sum(record.met for record in records) / len(records),
        latency_p50=_quantile(latency, 0.5),
        latency_p99=_quantile(latency, 0.99),
        ttft_p50=_quantile(first, 0.5),
        ttft_p99=_quantile(first, 0.99),
    )


def _quantile(values: Sequence[float], level: float) -> float | None:
    return float(np.quantile(values, level)) if values else None


def highest_rate(records: Sequence[Record], platform: Platform, share: float = 1.0) -> float:
    """No policy can serve requests at a higher rate, per replica, and be in time for ``share``.

    Whoever keeps that share computes at least its cheapest requests. Their steps are as many as
    slots or KV room force them to be, each takes the overhead, and all together at least the
    weights' time and the tokens' time, and what attention reads. Every mixture of two bounds is a
    bound, and has a cheapest share of its own; the best of a grid of them counts.

    Returns:
        Requests per second.
    """
    cost = platform.cost
    prompt = np.array([record.request.prompt_tokens for record in records], dtype=np.float64)
    output = np.array([record.request.output_tokens for record in records], dtype=np.float64)
    kept = max(int(np.ceil(share * len(records) - 1e-9)), 1)
    decodes = output - 1
    context = decodes * (prompt + output / 2)
    read = cost.per_context * context + cost.per_pair * prompt * (prompt + 1) / 2
    least = 0.0
    for crowd in np.linspace(0, 1, 11):
        steps = (1 - crowd) * output / platform.slots + crowd * context / platform.kv_tokens
        for arithmetic in np.linspace(0, 1, 11):
            seconds = steps * (cost.overhead + (1 - arithmetic) * cost.weights)
            seconds = seconds + arithmetic * cost.per_token * (prompt + decodes) + read
            cheapest = np.partition(seconds, kept - 1)[:kept]
            least = max(least, float(cheapest.sum()))
    return len(records) / least
