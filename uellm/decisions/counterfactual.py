"""What a decision would have been without some of the requests that it saw.

The recorded policy decides again, of a record that lacks them: order, admission and estimates are
its own. What follows from a decision is not simulated.
"""

from collections.abc import Collection
from dataclasses import replace

from uellm.core.request import Promise
from uellm.decisions.records import DispatchRecord, StepRecord
from uellm.policy.views import DispatchPolicy, StepPolicy


def promise_without(
    record: DispatchRecord,
    request_id: str,
    without: Collection[str],
    policy: DispatchPolicy | None = None,
) -> Promise | None:
    """What a waiting request would have been promised; None without a replica or the policy.

    Args:
        record: a decision that saw it, recorded whole.
        request_id: whose.
        without: the requests that are not to be there, waiting or dispatched.
        policy: the record's, if it is made already.
    """
    policy = policy or record.policy.made()
    if policy is None:
        return None
    queue = replace(
        record.queue,
        waiting=[view for view in record.queue.waiting if view.request_id not in without],
        unpromised=frozenset({request_id}),
        promised={},
        horizon=None,
    )
    replicas = [
        replace(view, in_flight=tuple(f for f in view.in_flight if f.request_id not in without))
        for view in record.replicas
    ]
    decision = policy.dispatch(queue, replicas, record.now)
    if request_id in decision.promises:
        return decision.promises[request_id]
    refusals = (each for each in decision.refusals if each.request_id == request_id)
    return next((refusal.promise for refusal in refusals), None)


def admitted_without(
    record: StepRecord,
    request_id: str,
    without: Collection[str],
    policy: StepPolicy | None = None,
) -> bool:
    """Whether a sequence would have had a slot after a step; False without the policy.

    Args:
        record: a decision that saw it, recorded whole.
        request_id: whose.
        without: the sequences that are not to be there; what is reserved for them is free.
        policy: the record's, if it is made already.
    """
    engine = record.engine
    policy = policy or record.policy.made()
    if policy is None:
        return False
    freed = sum(s.reserve_tokens for s in engine.running if s.request_id in without)
    engine = replace(
        engine,
        running=[s for s in engine.running if s.request_id not in without],
        waiting=[s for s in engine.waiting if s.request_id not in without],
        kv_tokens_free=min(engine.kv_tokens_free + freed, engine.kv_tokens_total),
    )
    decision = policy.step(engine, record.now)
    running = any(s.request_id == request_id for s in engine.running)
    return request_id in decision.admit or (running and request_id not in decision.preempt)
