"""How long policies take to decide: of an engine's step, and of a scheduler's queue.

    python -m benchmarks.policies [--policy cslo-odbs] [--decisions 300] [--json]

Level two: 1,000 waiting, 256 running; between two decisions a step passes, and now and then
somebody finishes and somebody else comes. Decisions are not carried out: the same urgent ones
have to be made room for each time, a dozen at once under cslo-odbs. Level one: 100,000 waiting,
four replicas with 256 slots, promises to 256; between two decisions a few finish and a few come.
"""

import gc
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks.arguments import count, one_of, parser_of
from uellm.core.cost import StepCost
from uellm.core.request import LEVELS, Priority, QuantileFunction, ResourceProfile, Slo
from uellm.heap import keep_freed_memory
from uellm.policy.registry import dispatch_policies, dispatch_policy, step_policies, step_policy
from uellm.policy.views import (
    EngineView,
    InFlightView,
    QueuedView,
    QueueView,
    ReplicaView,
    SequenceView,
)
from uellm.policy.waiting import Waiting

COST = StepCost(0.002, 0.018, 0.00007, 1e-7)
"""Its knee is 258: all slots are worth using."""
_NOW = 1e6


def main() -> None:
    """Measure what is asked for, and print a table."""
    parser = parser_of("policies", __doc__)
    parser.add_argument(
        "--policy",
        type=one_of(dispatch_policies()),
        action="append",
        help="may be given several times; all",
    )
    parser.add_argument("--decisions", type=count, default=300, help="measured; of each policy")
    parser.add_argument("--waiting", type=count, default=100_000, help="at level one")
    parser.add_argument("--tenants", type=count, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    keep_freed_memory()  # As a scheduler does.
    found: dict[str, dict[str, dict[str, float]]] = {"level two": {}, "level one": {}}
    for name in options.policy or step_policies():
        found["level two"][name] = _summary(_steps(name, options.decisions, options.tenants))
    for name in options.policy or dispatch_policies():
        seconds = _dispatches(name, options.decisions, options.waiting, options.tenants)
        found["level one"][name] = _summary(seconds)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for level, policies in found.items():
        print(f"{level:16} {'median ms':>10} {'p99 ms':>8}")
        for name, each in policies.items():
            print(f"{name:16} {each['median_ms']:10.3f} {each['p99_ms']:8.3f}")


def _summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(1e3 * each for each in seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"median_ms": ordered[len(ordered) // 2], "p99_ms": p99}


def _timed(decide: Callable[[], object]) -> float:
    began = time.perf_counter()
    decide()
    return time.perf_counter() - began


def _profile(rng: random.Random, tokens: float) -> ResourceProfile:
    median = min(max(rng.lognormvariate(5.3, 0.9), 4.0), 2000.0)
    return ResourceProfile(
        int(tokens), QuantileFunction(LEVELS, [median * (0.4 + 1.2 * level) for level in LEVELS])
    )


def _slo(rng: random.Random, now: float) -> Slo:
    kind = rng.random()
    if kind < 0.5:
        return Slo(now, ttft_at=now + 2 + 60 * rng.random(), tpot_seconds=0.08)
    if kind < 0.8:
        return Slo(now, deadline_at=now + 30 + 60 * rng.random())
    return Slo(now, deadline_at=now + 300 + rng.random(), priority=Priority.BATCH)


# ---- level two ---------------------------------------------------------------------------------


def _steps(name: str, decisions: int, tenants: int) -> list[float]:
    rng = random.Random(1)
    numbers = iter(range(10**9))

    def sequence(now: float, output: int) -> SequenceView:
        profile = _profile(rng, min(max(rng.lognormvariate(5, 1), 4), 2000))
        prompt = profile.prompt_tokens
        return SequenceView(
            request_id=f"request-{next(numbers)}",
            slo=_slo(rng, now),
            profile=profile,
            prompt_tokens=prompt,
            computed_tokens=prompt + output - 1 if output else 0,
            output_tokens=output,
            max_output_tokens=2048,
            reserve_tokens=prompt + 300,
            rank=0,
            arrived_at=now,
            first_token_at=now if output else None,
            tenant=f"tenant-{rng.randrange(tenants)}",
        )

    policy = step_policy(name)
    now = _NOW
    running = [sequence(now, rng.randint(1, 200)) for _ in range(256)]
    waiting = [sequence(now - 5 * rng.random(), 0) for _ in range(1000)]
    found = []
    gc.collect()
    for turn in range(decisions):
        now += 0.03
        running = [
            replace(s, computed_tokens=s.computed_tokens + 1, output_tokens=s.output_tokens + 1)
            for s in running
        ]
        if turn % 3 == 0:
            del running[rng.randrange(256)], waiting[rng.randrange(1000)]
            running.append(sequence(now, 1))
            waiting.append(sequence(now, 0))
        used = sum(s.computed_tokens for s in running)
        # Every other time a slot is free.
        engine = EngineView(
            running[: 256 - turn % 2], waiting, 256, max(250_000 - used, 0), 250_000, 2048, 16, COST
        )
        found.append(_timed(lambda engine=engine, now=now: policy.step(engine, now)))  # type: ignore[misc]
    return found


# ---- level one ---------------------------------------------------------------------------------


def _dispatches(name: str, decisions: int, waiting: int, tenants: int) -> list[float]:
    rng = random.Random(2)
    numbers = iter(range(10**9))

    def request(now: float) -> QueuedView:
        return QueuedView(
            request_id=f"request-{next(numbers)}",
            slo=_slo(rng, now),
            profile=_profile(rng, min(max(rng.lognormvariate(5, 1), 4), 2000)),
            tenant=f"tenant-{rng.randrange(tenants)}",
            refusable=rng.random() < 0.3,
        )

    def in_flight(now: float) -> InFlightView:
        length = rng.uniform(50, 500)
        sent = request(now - 1.0)
        return InFlightView(sent.request_id, now, 150, length, 1.5 * length, request=sent)

    policy = dispatch_policy(name)
    now = _NOW
    queue = Waiting()
    for _ in range(waiting):
        queue.add(request(now - 30 * rng.random()))
    sent = [[in_flight(now - 5 * rng.random()) for _ in range(256)] for _ in range(4)]
    found: list[float] = []
    views = list(_replicas(sent))
    policy.dispatch(QueueView(queue.line(), horizon=256), views, now)
    gc.collect()
    for turn in range(decisions):
        now += 0.01
        replica = sent[turn % 4]
        del replica[rng.randrange(len(replica))]
        fresh = [request(now) for _ in range(2)]
        for one in fresh:
            queue.add(one)
        unpromised = frozenset(one.request_id for one in fresh)
        views = list(_replicas(sent))
        began = time.perf_counter()
        view = QueueView(queue.line(), unpromised=unpromised, horizon=256)
        decision = policy.dispatch(view, views, now)
        found.append(time.perf_counter() - began)
        for batch in decision.dispatches:
            for request_id in batch.request_ids:
                queue.remove(request_id)
                sent[int(batch.replica)].append(in_flight(now))
        for refusal in decision.refusals:
            queue.remove(refusal.request_id)
    return found


def _replicas(sent: list[list[InFlightView]]) -> Iterator[ReplicaView]:
    for number, in_flight in enumerate(sent):
        yield ReplicaView(
            str(number), 1, 256, tuple(in_flight), 250_000, 1e-4, 0.04, cost=replace(COST)
        )


if __name__ == "__main__":
    main()
