"""The stages of one generation of a replica, held together by control links.

Stage 0 listens at the rendezvous. Each other stage connects to it, says which stage it is and how
much it can hold, and learns what all can hold and where the stage behind it listens. So there are
links between stage 0 and every other stage, and between neighbours. Over them travel the
announcements of steps, the results, and heartbeats: a thread of its own sends and expects those,
so that a peer which is stopped is missed soon, and one which computes for minutes is not.

Activations travel elsewhere (``uellm_worker.engine.transport``).
"""

import json
import selectors
import socket
import threading
import time
from dataclasses import asdict
from typing import Any

from uellm.addresses import bare, host_of, is_anywhere, joined, listening
from uellm.v1.engine_pb2 import PrepareShard
from uellm.v1.topology_pb2 import ShardAssignment
from uellm_worker.engine.capacity import Capacity, Prepared
from uellm_worker.engine.errors import PeerLostError
from uellm_worker.engine.inbox import Inbox, PeerLost, ResultArrived, StepAnnounced
from uellm_worker.engine.links import Kind, Link, connect, wait_readable

JOIN_SECONDS = 30.0
"""How long a stage waits for the others."""
BEAT_SECONDS = 0.25
"""Between two heartbeats."""
SILENCE_SECONDS = 1.5
"""A peer that was not heard of for so long is taken as lost."""


class Group:
    """The links of one stage, and the thread that listens to them.

    Args:
        assignment: of this stage.
        links: to the peers, by stage.
        capacity: what all stages can hold.
        devices: of all stages, in order.
        offer: what stage 0 offers for joining the data plane.
        leader_host: where stage 0 is.
        inbox: where news go.
    """

    def __init__(
        self,
        assignment: ShardAssignment,
        links: dict[int, Link],
        capacity: Capacity,
        devices: list[str],
        offer: str,
        leader_host: str,
        inbox: Inbox,
    ) -> None:
        self.assignment = assignment
        self.capacity = capacity
        self.devices = devices
        self.offer = offer
        self.leader_host = leader_host
        self._links = links
        self._inbox = inbox
        self._closed = False
        for link in links.values():
            # Whoever joined first has waited for the others in silence.
            link.heard_at = time.monotonic()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._listen, name="links", daemon=True)
        self._thread.start()

    def send_step(self, meta: bytes, inline: bytes | memoryview = b"") -> None:
        """Announce a step to the next stage; ``inline`` goes behind the announcement."""
        self._links[self.assignment.stage_index + 1].send(Kind.STEP, meta, inline)

    def send_result(self, data: bytes) -> None:
        """Send what was sampled to stage 0."""
        self._links[0].send(Kind.RESULT, data)

    def close(self) -> None:
        """Leave: the peers will notice. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        self._wake.send(b"x")
        self._thread.join()
        self._wake.close()
        self._woken.close()

    # ---- the thread ----------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                for link in self._links.values():
                    selector.register(link.socket, selectors.EVENT_READ, link)
                selector.register(self._woken, selectors.EVENT_READ, None)
                self._serve(selector)
        except Exception as error:  # Nobody else watches the peers: whatever it is, say so.
            self._inbox.put(PeerLost(self.assignment.generation, str(error)))
        finally:
            # Closed links tell the other stages at once, however they are chained.
            for link in self._links.values():
                link.close()

    def _serve(self, selector: selectors.BaseSelector) -> None:
        for link in self._links.values():
            self._deliver(link)
        beat_at = time.monotonic()
        while not self._closed:
            for key, _ in selector.select(max(beat_at - time.monotonic(), 0)):
                if key.data is not None:
                    key.data.read()
                    self._deliver(key.data)
            now = time.monotonic()
            if now < beat_at:
                continue
            late = now - beat_at
            for link in self._links.values():
                link.beat()
                if late > BEAT_SECONDS:
                    # This process was held up itself: that says nothing of the peer.
                    link.heard_at += late
                if now - link.heard_at > SILENCE_SECONDS:
                    raise PeerLostError(
                        f"stage {link.stage} was not heard of for {SILENCE_SECONDS} s"
                    )
            beat_at = now + BEAT_SECONDS

    def _deliver(self, link: Link) -> None:
        generation = self.assignment.generation
        for kind, payload in link.frames():
            if kind == Kind.STEP:
                self._inbox.put(StepAnnounced(generation, payload))
            elif kind == Kind.RESULT:
                self._inbox.put(ResultArrived(generation, payload))


class Rendezvous:
    """Where stage 0 waits for the others.

    Args:
        bind_host: address to listen on.
        advertised_host: address that the others reach it by.
    """

    def __init__(self, bind_host: str, advertised_host: str) -> None:
        self._listener = listening(bind_host)
        self._host = advertised_host
        self.address = host_port(advertised_host, self._listener)

    def form(
        self, assignment: ShardAssignment, prepared: Prepared, offer: str, inbox: Inbox
    ) -> Group:
        """Wait for all other stages, and tell them about each other.

        Raises:
            PeerLostError: if one does not come.
            LeaveRequestedError: if the agent wants this stage to leave before.
        """
        deadline = time.monotonic() + JOIN_SECONDS
        links: dict[int, Link] = {}
        addresses: dict[int, str] = {}
        capacity = prepared.capacity
        devices = [prepared.device] * assignment.stage_count
        try:
            while len(links) < assignment.stage_count - 1:
                link, hello = _accept(self._listener, assignment.generation, deadline, inbox)
                if not 0 < link.stage < assignment.stage_count or link.stage in links:
                    link.close()
                    continue
                links[link.stage] = link
                addresses[link.stage] = hello["address"]
                devices[link.stage] = hello["device"]
                capacity = capacity.at_most(Capacity(**hello["capacity"]))
            welcome = {
                "addresses": addresses,
                "capacity": asdict(capacity),
                "devices": devices,
                "offer": offer,
            }
            for link in links.values():
                link.send(Kind.WELCOME, json.dumps(welcome).encode())
        except BaseException:
            _close(links)
            raise
        return Group(assignment, links, capacity, devices, offer, self._host, inbox)

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()


def join(
    rendezvous: str,
    assignment: ShardAssignment,
    prepared: Prepared,
    bind_host: str,
    advertised_host: str,
    inbox: Inbox,
) -> Group:
    """Join stage 0 and the neighbours, as any other stage.

    Raises:
        PeerLostError: if one of them does not come.
        LeaveRequestedError: if the agent wants this stage to leave before.
    """
    deadline = time.monotonic() + JOIN_SECONDS
    stage, generation = assignment.stage_index, assignment.generation
    links: dict[int, Link] = {}
    with listening(bind_host) as listener:
        try:
            links[0] = Link(connect(rendezvous, deadline, inbox), 0)
            hello = {
                "stage": stage,
                "generation": generation,
                "address": host_port(advertised_host, listener),
                "capacity": asdict(prepared.capacity),
                "device": prepared.device,
            }
            links[0].send(Kind.HELLO, json.dumps(hello).encode())
            welcome = json.loads(links[0].expect(Kind.WELCOME, deadline, inbox))
            if stage + 1 < assignment.stage_count:
                address = welcome["addresses"][str(stage + 1)]
                links[stage + 1] = Link(connect(address, deadline, inbox), stage + 1)
                links[stage + 1].send(Kind.HELLO, json.dumps(hello).encode())
            while stage > 1 and stage - 1 not in links:
                link, _ = _accept(listener, generation, deadline, inbox)
                if link.stage == stage - 1:
                    links[stage - 1] = link
                else:
                    link.close()
        except BaseException:
            _close(links)
            raise
    host = host_of(rendezvous)
    agreed = Capacity(**welcome["capacity"])
    return Group(assignment, links, agreed, welcome["devices"], welcome["offer"], host, inbox)


def advertised_host(command: PrepareShard) -> str:
    """The address that the other stages reach this one by."""
    if not is_anywhere(command.bind_host):
        return bare(command.bind_host)
    for peer in command.assignment.peers:
        if peer.stage == command.assignment.stage_index and peer.host:
            return peer.host
    return socket.gethostname()


def host_port(host: str, listener: socket.socket) -> str:
    """``host:port`` of a listening socket, reached by ``host``."""
    return joined(host, listener.getsockname()[1])


def _accept(
    listener: socket.socket, generation: int, deadline: float, inbox: Inbox
) -> tuple[Link, dict[str, Any]]:
    """The next peer of this generation; whoever else connects is turned away."""
    while True:
        wait_readable(listener, deadline, inbox)
        link = Link(listener.accept()[0])
        try:
            patience = min(deadline, time.monotonic() + SILENCE_SECONDS)
            hello = json.loads(link.expect(Kind.HELLO, patience, inbox))
            if hello["generation"] == generation:
                link.stage = int(hello["stage"])
                return link, hello
        except (PeerLostError, ValueError, KeyError, TypeError):
            pass
        except BaseException:
            link.close()
            raise
        link.close()


def _close(links: dict[int, Link]) -> None:
    for link in links.values():
        link.close()
