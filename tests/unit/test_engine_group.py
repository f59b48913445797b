"""Control links between stages: forming, news, and peers that go away in every manner."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from uellm_worker.engine import group as group_module
from uellm_worker.engine.capacity import Capacity, Prepared, Vocabulary
from uellm_worker.engine.errors import LeaveRequestedError, PeerLostError
from uellm_worker.engine.group import Group, Rendezvous, join
from uellm_worker.engine.inbox import Inbox, PeerLost, ResultArrived, StepAnnounced
from uellm_worker.engine.links import Kind, Link

from tests.support.waiting import HANG_SECONDS
from uellm.v1.engine_pb2 import DropSequence, EngineCommand, LeaveGroup
from uellm.v1.topology_pb2 import ShardAssignment

HOST = "127.0.0.1"
GENERATION = 5


def prepared(slots: int = 4) -> Prepared:
    """One of two slots holds a recurrent state, and shares no prefixes."""
    return Prepared(Capacity(slots, 100, slots * 100, sharing=slots != 2), Vocabulary(10))


def assignment(stage: int, count: int) -> ShardAssignment:
    return ShardAssignment(stage_index=stage, stage_count=count, generation=GENERATION)


class Stages:
    """A formed replica; its stages' inboxes and groups by number."""

    def __init__(self, count: int) -> None:
        self.inboxes = [Inbox() for _ in range(count)]
        for inbox in self.inboxes:
            inbox.generation = GENERATION
        rendezvous = Rendezvous(HOST, HOST)
        with ThreadPoolExecutor(count) as pool:
            first = pool.submit(
                rendezvous.form, assignment(0, count), prepared(), "offer", self.inboxes[0]
            )
            others = [
                pool.submit(
                    join,
                    rendezvous.address,
                    assignment(stage, count),
                    prepared(4 - stage),
                    HOST,
                    HOST,
                    self.inboxes[stage],
                )
                for stage in range(1, count)
            ]
            self.groups: list[Group] = [first.result(), *(other.result() for other in others)]
        rendezvous.close()

    def close(self) -> None:
        for group in self.groups:
            group.close()


@pytest.fixture
def form() -> Iterator[Callable[[int], Stages]]:
    made: list[Stages] = []

    def make(count: int) -> Stages:
        made.append(Stages(count))
        return made[-1]

    yield make
    for stages in made:
        stages.close()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_all_stages_agree_on_what_all_can_hold(count: int, form: Callable[[int], Stages]) -> None:
    stages = form(count)
    slots = 4 - (count - 1)
    for group in stages.groups:
        assert group.capacity == Capacity(slots, 100, slots * 100, sharing=slots > 2)
        assert group.offer == "offer"
        assert group.devices == ["cpu"] * count


def test_steps_go_to_the_next_stage_and_results_to_the_first(
    form: Callable[[int], Stages],
) -> None:
    stages = form(3)
    stages.groups[0].send_step(b"one")
    assert stages.inboxes[1].take(None) == StepAnnounced(GENERATION, b"one")
    stages.groups[1].send_step(b"two" * 100_000)
    assert stages.inboxes[2].take(None) == StepAnnounced(GENERATION, b"two" * 100_000)
    stages.groups[2].send_result(b"three")
    assert stages.inboxes[0].wait_result() == b"three"


def test_one_stage_that_leaves_is_missed_by_all(form: Callable[[int], Stages]) -> None:
    stages = form(4)
    stages.groups[3].close()
    for inbox in stages.inboxes[:3]:
        assert isinstance(inbox.take(None), PeerLost)
    assert stages.inboxes[3].take(0.0) is None


def test_a_silent_peer_is_missed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is stopped keeps its connection open and says nothing."""
    monkeypatch.setattr(group_module, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(group_module, "BEAT_SECONDS", 0.05)
    inbox = Inbox()
    inbox.generation = GENERATION

    ours, theirs = _tcp_pair()
    started = time.monotonic()
    group = Group(
        assignment(0, 2), {1: Link(ours, 1)}, prepared().capacity, ["cpu"] * 2, "", HOST, inbox
    )
    lost = inbox.take(None)
    assert isinstance(lost, PeerLost)
    assert "not heard of" in lost.message
    assert 0.25 < time.monotonic() - started < HANG_SECONDS / 2
    assert theirs.recv(5) == bytes([0, 0, 0, 0, Kind.HEARTBEAT])
    group.close()
    theirs.close()


def test_a_stage_that_joined_long_before_the_others_is_not_taken_as_lost() -> None:
    ours, theirs = (Link(sock, 1) for sock in _tcp_pair())
    ours.heard_at = theirs.heard_at = 0.0
    inboxes = (Inbox(), Inbox())
    groups = []
    for index, link in enumerate((ours, theirs)):
        inboxes[index].generation = GENERATION
        groups.append(
            Group(
                assignment(index, 2),
                {1 - index: link},
                prepared().capacity,
                ["cpu"] * 2,
                "",
                HOST,
                inboxes[index],
            )
        )
    groups[0].send_step(b"hello")
    assert inboxes[1].take(None) == StepAnnounced(GENERATION, b"hello")
    assert inboxes[0].take(0.0) is None
    for group in groups:
        group.close()


def test_idle_stages_stay_together(
    form: Callable[[int], Stages], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many times the silence that would part them passes without a step."""
    monkeypatch.setattr(group_module, "SILENCE_SECONDS", 0.6)
    monkeypatch.setattr(group_module, "BEAT_SECONDS", 0.05)
    stages = form(3)
    beats = stages.groups[0]._links[1]
    for _ in range(60):
        heard = beats.heard_at
        deadline = time.monotonic() + HANG_SECONDS
        while beats.heard_at == heard:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert all(inbox.take(0.0) is None for inbox in stages.inboxes)


def test_a_peer_that_speaks_another_protocol_is_turned_away() -> None:
    inbox = Inbox()
    rendezvous = Rendezvous(HOST, HOST)
    address = rendezvous._listener.getsockname()
    with ThreadPoolExecutor(2) as pool:
        forming = pool.submit(rendezvous.form, assignment(0, 2), prepared(), "", inbox)
        with socket.create_connection(address) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert stranger.recv(100) == b""
        with socket.create_connection(address) as older:
            hello = json.dumps({"generation": GENERATION - 1, "stage": 1}).encode()
            older.sendall(len(hello).to_bytes(4, "big") + bytes([Kind.HELLO]) + hello)
            assert older.recv(100) == b""
        joining = pool.submit(
            join, rendezvous.address, assignment(1, 2), prepared(), HOST, HOST, Inbox()
        )
        for future in (forming, joining):
            future.result().close()
    rendezvous.close()


def test_stages_that_do_not_come_are_not_waited_for_forever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group_module, "JOIN_SECONDS", 0.1)
    rendezvous = Rendezvous(HOST, HOST)
    with pytest.raises(PeerLostError, match="in time"):
        rendezvous.form(assignment(0, 2), prepared(), "", Inbox())
    rendezvous.close()
    with pytest.raises(PeerLostError, match="nobody answers"):
        join(rendezvous.address, assignment(1, 2), prepared(), HOST, HOST, Inbox())


def test_a_forming_stage_leaves_when_it_is_told_to() -> None:
    inbox = Inbox()
    inbox.put(EngineCommand(leave=LeaveGroup()))
    rendezvous = Rendezvous(HOST, HOST)
    with pytest.raises(LeaveRequestedError):
        rendezvous.form(assignment(0, 2), prepared(), "", inbox)
    rendezvous.close()
    with pytest.raises(LeaveRequestedError):
        join(rendezvous.address, assignment(1, 2), prepared(), HOST, HOST, inbox)


def test_the_inbox_puts_commands_off_while_a_step_is_under_way() -> None:
    inbox = Inbox()
    inbox.generation = GENERATION
    drop = EngineCommand(drop=DropSequence(request_id="a"))
    leave = EngineCommand(leave=LeaveGroup())
    for item in (drop, ResultArrived(4, b"old"), PeerLost(4, "old"), ResultArrived(5, b"new")):
        inbox.put(item)
    assert inbox.wait_result() == b"new"
    inbox.put(leave)
    with pytest.raises(LeaveRequestedError):
        inbox.wait_result()
    assert inbox.leaving
    assert [inbox.take(0.0) for _ in range(3)] == [drop, leave, None]
    assert not inbox.leaving
    inbox.put(PeerLost(5, "gone"))
    with pytest.raises(PeerLostError, match="gone"):
        inbox.wait_result()


def test_the_inbox_keeps_results_for_whoever_waits_for_them() -> None:
    inbox = Inbox()
    inbox.generation = GENERATION
    drop = EngineCommand(drop=DropSequence(request_id="a"))
    for item in (ResultArrived(4, b"old"), ResultArrived(5, b"one"), drop, ResultArrived(5, b"2")):
        inbox.put(item)
    assert inbox.take(0.0) == drop
    assert inbox.take(0.0) is None
    inbox.put(drop)
    assert [inbox.wait_result(patient=False) for _ in range(2)] == [b"one", b"2"]
    assert inbox.wait_result(patient=False) is None
    assert inbox.wait_result(patient=False) is None, "the command is still to be taken"
    inbox.put(ResultArrived(5, b"three"))
    assert inbox.take(0.0) == drop
    assert inbox.wait_result(patient=False) == b"three"


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server((HOST, 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]
