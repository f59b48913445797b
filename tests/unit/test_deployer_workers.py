"""Whom the deployer has not heard of: workers that are silent, not those it could not hear."""

from itertools import count

from uellm_deployer.workers import LISTEN_SECONDS, Workers

from uellm.v1 import deployer_pb2

SILENCE = 3.0


def registered(now: float) -> Workers:
    workers = Workers()
    workers.listen(now)
    workers.register(deployer_pb2.RegisterWorkerRequest(worker="a", incarnation=1), now)
    return workers


def test_a_silent_worker_is_lost_by_a_deployer_that_listens() -> None:
    workers, heard = registered(100.0), deployer_pb2.HeartbeatRequest(worker="a", incarnation=1)
    workers.hear(heard, 100.0)

    def silent(now: float) -> bool:
        workers.listen(now)
        return not workers.live(now, SILENCE)

    # Even if it is a little late each time.
    times = (100.0 + 1.9 * LISTEN_SECONDS * turn for turn in count(1))
    lost_at = next(now for now in times if silent(now))
    assert SILENCE < lost_at - 100.0 <= SILENCE + 2 * LISTEN_SECONDS


def test_a_deployer_that_was_held_up_takes_nobody_for_silent() -> None:
    workers = registered(100.0)
    for turn in range(1, 9):
        workers.listen(100.0 + LISTEN_SECONDS * turn)
    workers.listen(700.0)
    assert [worker.worker for worker in workers.live(700.0, SILENCE)] == ["a"]
    # What the worker was silent for before counts, and what it is from now on.
    assert workers.live(700.0 + SILENCE - 9 * LISTEN_SECONDS, SILENCE)
    assert not workers.live(700.0 + SILENCE - 7 * LISTEN_SECONDS, SILENCE)


def test_who_was_heard_while_the_deployer_was_held_up_has_no_more_time_than_others() -> None:
    workers, heard = registered(100.0), deployer_pb2.HeartbeatRequest(worker="a", incarnation=1)
    # Its message is read before the deployer finds out that it was held up.
    workers.hear(heard, 700.0)
    workers.listen(700.0)
    assert workers.live(700.0 + SILENCE, SILENCE)
    assert not workers.live(700.1 + SILENCE, SILENCE)
