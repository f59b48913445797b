"""What the deployer decides: when to wait, to form, to suspend, to let go."""

from collections.abc import Sequence

import pytest
from uellm_deployer.reconcile import (
    Abort,
    End,
    Form,
    Grow,
    Orphan,
    Situation,
    Suspend,
    Wait,
    Wanted,
    decide,
    orphans,
)
from uellm_deployer.replica import Phase, Replica, backoff
from uellm_deployer.workers import Worker

from uellm.v1 import deployer_pb2, topology_pb2

SERVING = deployer_pb2.STAGE_STATE_SERVING
NOW = 100.0


def worker(
    name: str,
    *held: tuple[str, int, "deployer_pb2.StageState.ValueType"],
    seen_at: float = NOW,
    heard_at: float | None = NOW,
    going: bool = False,
    lost: bool = False,
    incarnation: int = 1,
    unreachable: bool = False,
) -> Worker:
    return Worker(
        worker=name,
        address=f"{name}:1",
        incarnation=incarnation,
        devices=[topology_pb2.Device(id=f"{name}/cpu:0", healthy=not lost, lost=lost)],
        going=going,
        seen_at=seen_at,
        heard_at=heard_at,
        stages={
            replica: deployer_pb2.StageStatus(
                replica=replica, generation=generation, state=state, reason="a reason"
            )
            for replica, generation, state in held
        },
        reachable=not unreachable,
    )


def replica(phase: Phase, *workers: str, index: int = 0, epoch: int = 5, **facts: float) -> Replica:
    peers = [topology_pb2.Peer(stage=i, worker=name) for i, name in enumerate(workers)]
    return Replica(
        id=f"m-{index}",
        index=index,
        phase=phase,
        epoch=epoch,
        assigned=phase is Phase.FORMING,
        assignments=tuple(
            topology_pb2.ShardAssignment(
                replica=f"m-{index}",
                generation=epoch,
                stage_index=i,
                peers=peers,
                device_ids=[f"{name}/cpu:0"],
            )
            for i, name in enumerate(workers)
        ),
        incarnations=dict.fromkeys(workers, 1),
        trusted_at=facts.pop("trusted_at", 50.0),
        **facts,
    )


def situation(*workers: Worker, idle: bool = False) -> Situation:
    return Situation({each.worker: each for each in workers}, NOW, 3.0, idle)


def one(
    wanted: Wanted, replicas: Sequence[Replica], *workers: Worker, idle: bool = False
) -> object:
    actions = decide(wanted, replicas, situation(*workers, idle=idle))
    assert len(actions) <= 1
    return actions[0] if actions else None


HELD = ("m-0", 5, SERVING)


def test_a_replica_whose_stages_all_serve_is_left_alone() -> None:
    ready = replica(Phase.READY, "a", "b")
    assert one(Wanted(1, 2), [ready], worker("a", HELD), worker("b", HELD)) is None


@pytest.mark.parametrize(
    ("other", "agent_lost", "word"),
    [
        (worker("b", HELD, seen_at=96.9), True, "not been heard of for 3 s"),
        (worker("b", HELD, unreachable=True), True, "cannot be reached"),
        (worker("b", HELD, going=True), True, "is going"),
        (worker("b", HELD, lost=True), False, "the driver has lost b/cpu:0"),
        (worker("b", heard_at=None), True, "does not say"),
        (worker("c"), True, "worker b is not there"),
        (worker("b", HELD, incarnation=2), False, "started again"),
        (worker("b"), False, "does not serve generation 5 any more"),
        (worker("b", ("m-0", 4, SERVING)), False, "does not serve generation 5"),
        (
            worker("b", ("m-0", 5, deployer_pb2.STAGE_STATE_FAILED)),
            False,
            "stage 1 on worker b failed: a reason",
        ),
    ],
)
def test_a_lost_stage_suspends_the_replica(other: Worker, agent_lost: bool, word: str) -> None:
    ready = replica(Phase.READY, "a", "b")
    action = one(Wanted(1, 2), [ready], worker("a", HELD), other)
    assert isinstance(action, Suspend)
    assert word in action.reason
    assert action.agent_lost == agent_lost


@pytest.mark.parametrize(
    "other",
    [
        # Not registered with this deployer yet; no heartbeat yet; one that crossed the commit.
        worker("c"),
        worker("b", heard_at=None),
        worker("b", ("m-0", 5, deployer_pb2.STAGE_STATE_PREPARED)),
        worker("b"),
    ],
)
def test_what_is_not_known_yet_is_no_loss(other: Worker) -> None:
    ready = replica(Phase.READY, "a", "b", trusted_at=99.0)
    assert one(Wanted(1, 2), [ready], worker("a", HELD), other) is None


def test_a_failed_stage_is_a_loss_at_once() -> None:
    ready = replica(Phase.READY, "a", trusted_at=NOW)
    failed = worker("a", ("m-0", 5, deployer_pb2.STAGE_STATE_FAILED))
    assert isinstance(one(Wanted(1, 1), [ready], failed), Suspend)


def test_forming_waits_for_devices_then_takes_what_is_there() -> None:
    new = replica(Phase.IDLE, epoch=0, since=95.0, patience_seconds=10.0)
    assert one(Wanted(1, 0), [new]) == Wait(
        "m-0", "waits for a worker: none is there (`uellm serve worker`)"
    )
    assert one(Wanted(1, 0), [new], worker("a")) == Form("m-0")
    assert one(Wanted(1, 2), [new], worker("a")) == Wait(
        "m-0", "waits for devices: 1 of 2 are there"
    )
    assert one(Wanted(1, 2), [new], worker("a"), worker("b")) == Form("m-0")
    new.patience_seconds = 5.0
    assert one(Wanted(1, 2), [new], worker("a")) == Form("m-0")
    new.retry_at = NOW + 1
    assert one(Wanted(1, 2), [new], worker("a")) == Wait("m-0", "")


def test_new_replicas_wait_for_devices_for_all_of_them() -> None:
    new = [replica(Phase.IDLE, index=i, epoch=0, since=NOW, patience_seconds=1.0) for i in range(2)]
    assert not any(isinstance(a, Form) for a in decide(Wanted(2, 1), new, situation(worker("a"))))
    both = decide(Wanted(2, 1), new, situation(worker("a"), worker("b")))
    assert both == [Form("m-0"), Form("m-1")]


def test_a_lost_replica_waits_while_only_others_devices_are_there() -> None:
    ready = replica(Phase.READY, "a", index=1)
    lost = replica(Phase.IDLE, "b", since=99.0, patience_seconds=1.5)
    held = worker("a", ("m-1", 5, SERVING))
    assert one(Wanted(2, 1), [lost, ready], held) == Wait(
        "m-0", "waits for devices: 0 of 1 are there"
    )
    assert one(Wanted(2, 1), [lost, ready], held, worker("c")) == Form("m-0")
    lost.since = 98.0
    assert one(Wanted(2, 1), [lost, ready], held) == Form("m-0")


def test_forming_is_given_up_when_a_worker_is_lost() -> None:
    forming = replica(Phase.FORMING, "a", "b")
    assert one(Wanted(1, 2), [forming], worker("a"), worker("b")) is None
    others = worker("c"), worker("b", unreachable=True), worker("b", incarnation=2)
    for other in others:
        assert isinstance(one(Wanted(1, 2), [forming], worker("a"), other), Abort)
    # While its place is looked for, those of the place before are nothing to it.
    forming.assigned = False
    for other in others:
        assert one(Wanted(1, 2), [forming], worker("a"), other) is None


def test_a_small_replica_grows_only_when_nothing_runs_and_devices_are_there() -> None:
    small = replica(Phase.READY, "a", grow_at=99.0)
    there = worker("a", HELD), worker("b")
    assert one(Wanted(1, 2), [small], *there, idle=True) == Grow("m-0")
    assert one(Wanted(1, 2), [small], *there) is None
    assert one(Wanted(1, 2), [small], worker("a", HELD), idle=True) is None
    assert one(Wanted(1, 0), [small], *there, idle=True) is None
    small.grow_at = NOW + 1
    assert one(Wanted(1, 2), [small], *there, idle=True) is None


def test_a_stage_on_several_devices_counts_as_so_many() -> None:
    small = replica(Phase.READY, "a", grow_at=99.0)
    (assignment,) = small.assignments
    assignment.shards.add(device_id="a/sim:0", last_layer=1)
    there = worker("a", HELD), worker("b")
    assert one(Wanted(1, 2), [small], *there, idle=True) == Grow("m-0")
    assignment.shards.add(device_id="a/sim:1", first_layer=2, last_layer=3)
    assert one(Wanted(1, 2), [small], *there, idle=True) is None


def test_replicas_beyond_those_wanted_end_once() -> None:
    kept, extra = replica(Phase.READY, "b"), replica(Phase.READY, "a", index=1)
    there = worker("a", ("m-1", 5, SERVING)), worker("b", HELD)
    assert one(Wanted(1, 1), [kept, extra], *there) == End("m-1")
    extra.phase = Phase.ENDING
    assert one(Wanted(1, 1), [kept, extra], *there) is None


def test_of_too_many_those_that_serve_are_kept() -> None:
    lost, serves = replica(Phase.IDLE), replica(Phase.READY, "a", index=1)
    assert one(Wanted(1, 1), [lost, serves], worker("a", ("m-1", 5, SERVING))) == End("m-0")


def test_a_replica_that_takes_over_counts_once_it_serves() -> None:
    old, new = replica(Phase.READY, "a"), replica(Phase.FORMING, "b", index=1)
    new.replaces = old.id
    there = worker("a", HELD), worker("b", ("m-1", 5, SERVING))
    assert one(Wanted(1, 1), [old, new], *there) is None
    assert one(Wanted(1, 1), [old, new], worker("a", HELD)) == Abort("m-1", "worker b is not there")
    new.phase, new.replaces, old.dismissed = Phase.READY, "", True
    assert one(Wanted(1, 1), [old, new], *there) == End("m-0")


def test_what_was_to_take_over_and_cannot_ends_and_the_old_one_stays() -> None:
    old, new = replica(Phase.READY, "a"), replica(Phase.IDLE, index=1)
    new.replaces = old.id
    assert one(Wanted(1, 1), [old, new], worker("a", HELD)) == End("m-1")


def test_a_replica_that_is_to_move_is_watched_all_the_same() -> None:
    moving = replica(Phase.MOVING, "a")
    assert one(Wanted(1, 1), [moving], worker("a", HELD)) is None
    assert isinstance(one(Wanted(1, 1), [moving]), Suspend)


def test_orphans_are_older_unknown_or_elsewhere() -> None:
    ready = {"m-0": replica(Phase.READY, "a")}
    view = situation(
        worker("a", HELD, ("x-0", 1, SERVING)),
        worker("b", ("m-0", 4, SERVING)),
        worker("c", ("m-0", 5, SERVING)),
        worker("d", ("x-0", 1, SERVING), unreachable=True),
    )
    assert orphans(ready, view) == [
        Orphan("a", "x-0", 1),
        Orphan("b", "m-0", 4),
        Orphan("c", "m-0", 5),
    ]


@pytest.mark.parametrize("phase", [Phase.IDLE, Phase.ENDING])
def test_the_stages_of_a_replica_in_transition_are_no_orphans(phase: Phase) -> None:
    moving = {"m-0": replica(phase, "a")}
    assert orphans(moving, situation(worker("b", ("m-0", 4, SERVING)))) == []


def test_a_newer_stage_is_never_an_orphan() -> None:
    forming = {"m-0": replica(Phase.FORMING, "a")}
    view = situation(worker("a", ("m-0", 4, SERVING)), worker("b", ("m-0", 6, SERVING)))
    assert orphans(forming, view) == []


def test_backoff_rises_to_its_limit() -> None:
    delays = [backoff(failures) for failures in range(-1, 12)]
    assert delays[:3] == [0.0, 0.0, 0.5]
    assert delays == sorted(delays)
    assert delays[-1] == 10.0
