"""The main program of a child process: one stage of one replica.

A thread reads the agent's commands into the inbox, and ends the process when the agent is gone,
whatever the engine computes at that moment. The main thread is the engine.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

from uellm.convert import cost_from_proto
from uellm.core.cost import DEFAULT_COST
from uellm.core.errors import ConfigurationError, InvalidArgumentError, ModelFilesError
from uellm.policy.registry import DEFAULT_POLICY, step_policy
from uellm.v1.engine_pb2 import (
    Alive,
    CommitShard,
    EngineCommand,
    EngineEvent,
    EnginePolicy,
    LinkListening,
    LoadProgress,
    PrepareShard,
    ShardFailed,
    ShardLeft,
    ShardPrepared,
    ShardServing,
    StepReport,
)
from uellm.v1.topology_pb2 import DeviceUse
from uellm_worker.engine.capacity import Prepared
from uellm_worker.engine.errors import LeaveRequestedError, PeerLostError, out_of_memory
from uellm_worker.engine.group import Group, Rendezvous, advertised_host, join
from uellm_worker.engine.inbox import Inbox, Item, PeerLost, StepAnnounced
from uellm_worker.engine.instant import InstantEngine
from uellm_worker.engine.link_probe import probe_link
from uellm_worker.engine.loop import EngineLoop
from uellm_worker.engine.recorder import StepRecorder
from uellm_worker.engine.runner import Engine, Member
from uellm_worker.engine.wire import ChildChannel

_log = logging.getLogger(__name__)


class Child:
    """The state machine of a child: empty, prepared, serving; after a failure, prepared again.

    Args:
        channel: to the agent.
        inbox: what the agent and the peers say.
        engine: computes.
    """

    def __init__(self, channel: ChildChannel, inbox: Inbox, engine: Engine) -> None:
        self._channel = channel
        self._inbox = inbox
        self._engine = engine
        self._command: PrepareShard | None = None
        self._prepared: Prepared | None = None
        self._rendezvous: Rendezvous | None = None
        self._group: Group | None = None
        self._member: Member | None = None
        self._loop: EngineLoop | None = None
        self._recorder = StepRecorder("", every_steps=0)

    def run(self) -> None:
        """Serve until the process ends."""
        stalled = False
        while True:
            item = self._inbox.take(self._patience(stalled=stalled))
            if item is not None:
                stalled = False
                self._guard(item)
            else:
                stalled = not self._guard(None)

    def _patience(self, *, stalled: bool) -> float | None:
        """How long to wait for the next item, in seconds; None: for ever."""
        loop = self._loop
        if loop is None or not loop.busy:
            return None
        return loop.patience if stalled else 0.0

    def _guard(self, item: Item | None) -> bool:
        """Handle an item, or step; turn whatever is raised into an event.

        Returns:
            False if a step found nothing to do.
        """
        try:
            return self._step() if item is None else self._handle(item)
        except LeaveRequestedError:
            self._leave()
        except PeerLostError as error:
            self._fail("PEER_LOST", str(error))
        except (ModelFilesError, ConfigurationError) as error:
            self._fail("LOAD_FAILED", error.message)
        except BrokenPipeError:
            raise  # The agent is gone, and nobody is there to be told.
        except Exception as error:
            _log.exception("the stage failed")
            reason = "OUT_OF_MEMORY" if out_of_memory(error) else "INTERNAL"
            self._fail(reason, f"{type(error).__name__}: {error}")
        return True

    # ---- commands and news ---------------------------------------------------------------------

    def _handle(self, item: Item) -> bool:
        match item:
            case StepAnnounced():
                if self._member is not None:
                    self._member.follow(item.meta)
            case PeerLost():
                raise PeerLostError(item.message)
            case _:
                self._obey(item)
        return True

    def _obey(self, command: EngineCommand) -> None:
        match command.WhichOneof("command"):
            case "prepare":
                self._prepare(command.prepare)
            case "commit":
                self._commit(command.commit)
            case "add" | "drop" | "policy":
                self._lead(command)
            case "probe_block":
                found = self._engine.probe_block(command.probe_block, self._say_step)
                self._channel.send(EngineEvent(block_probed=found))
            case "probe_copies":
                copies = self._engine.probe_copies(command.probe_copies)
                self._channel.send(EngineEvent(copies_probed=copies))
            case "probe_link":
                way = probe_link(command.probe_link, self._engine, self._inbox, self._listening)
                self._channel.send(EngineEvent(link_probed=way))
            case "leave":
                self._leave()
                self._channel.send(EngineEvent(left=ShardLeft()))
            case other:
                _log.warning("an unknown command: %s", other)

    def _say_step(self, report: StepReport) -> None:
        self._channel.send(EngineEvent(step=report))

    def _lead(self, command: EngineCommand) -> None:
        """Obey a leader."""
        match command.WhichOneof("command"):
            case _ if self._loop is None:
                _log.info("a leader's command crossed the end of its generation")
            case "add":
                self._loop.add(command.add)
            case "drop":
                self._loop.drop(command.drop)
            case "policy":
                self._decide_by(self._loop, command.policy)

    def _prepare(self, command: PrepareShard) -> None:
        self._leave()
        self._prepared = None
        self._command = command
        self._inbox.generation = command.assignment.generation
        prepared = self._engine.prepare(command, self._progress)
        event = ShardPrepared(
            kept_bytes=prepared.kept_bytes,
            total_bytes=prepared.total_bytes,
            devices=[DeviceUse(device_id=name, held_bytes=held) for name, held in prepared.held],
        )
        assignment = command.assignment
        if assignment.stage_index == 0 and assignment.stage_count > 1:
            self._rendezvous = Rendezvous(command.bind_host, advertised_host(command))
            event.rendezvous = self._rendezvous.address
        self._prepared = prepared
        self._channel.send(EngineEvent(prepared=event))

    def _commit(self, commit: CommitShard) -> None:
        if self._prepared is None or self._command is None:
            raise RuntimeError("a commit without a prepared stage; send prepare first")
        assignment = self._command.assignment
        if commit.generation != self._inbox.generation:
            raise RuntimeError(
                f"a commit for generation {commit.generation}, "
                f"while generation {self._inbox.generation} is prepared"
            )
        capacity = self._prepared.capacity
        if assignment.stage_count > 1:
            self._group = self._form_group(self._command, self._prepared, commit.rendezvous)
            capacity = self._group.capacity
        self._member = self._engine.join(self._group, self._inbox)
        if assignment.stage_index == 0:
            self._recorder = StepRecorder(assignment.replica, commit.record_every_steps)
            self._loop = EngineLoop(
                self._member,
                step_policy(commit.policy or DEFAULT_POLICY),
                capacity,
                self._prepared.vocabulary,
                epoch=assignment.generation,
                announce=self._report,
                adapters=[adapter.name for adapter in assignment.adapters],
                execution=commit.execution,
                now=_clock(commit.clock_seconds),
                cost=cost_from_proto(commit.cost) if commit.HasField("cost") else DEFAULT_COST,
                recorder=self._recorder,
            )
        self._channel.send(EngineEvent(serving=ShardServing(generation=commit.generation)))

    def _decide_by(self, loop: EngineLoop, command: EnginePolicy) -> None:
        """Change the policy; one that cannot be had leaves the present one in force."""
        try:
            policy = step_policy(command.policy, command.settings)
            loop.decide_by(policy, command.execution, command.settings)
            self._recorder.options = dict(command.settings)
        except (InvalidArgumentError, ValueError) as error:
            _log.warning("the step policy stays as it is: %s", error)
        self._report(StepReport(report=loop.report()))

    def _form_group(self, command: PrepareShard, prepared: Prepared, rendezvous: str) -> Group:
        if self._rendezvous is not None:
            offer = self._engine.offer(command.bind_host)
            return self._rendezvous.form(command.assignment, prepared, offer, self._inbox)
        return join(
            rendezvous,
            command.assignment,
            prepared,
            command.bind_host,
            advertised_host(command),
            self._inbox,
        )

    def _listening(self, rendezvous: str) -> None:
        self._channel.send(EngineEvent(link_listening=LinkListening(rendezvous=rendezvous)))

    def _progress(self, loaded_bytes: int, total_bytes: int) -> None:
        progress = LoadProgress(loaded_bytes=loaded_bytes, total_bytes=total_bytes)
        self._channel.send(EngineEvent(progress=progress))

    def _step(self) -> bool:
        if self._loop is None:
            return False
        report = self._loop.step()
        if report is not None:
            self._report(report)
        return report is not None or self._loop.under_way

    def _report(self, report: StepReport) -> None:
        self._channel.send(EngineEvent(step=report))

    # ---- ends ----------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Drop peers and sequences; keep the weights."""
        self._loop = None
        self._inbox.generation = 0
        for part in (self._rendezvous, self._group, self._member):
            if part is not None:
                part.close()
        self._rendezvous = self._group = self._member = None

    def _fail(self, reason: str, message: str) -> None:
        suspects = self._loop.suspects if self._loop is not None else ()
        self._leave()
        failed = ShardFailed(reason=reason, message=message, suspects=suspects)
        self._channel.send(EngineEvent(failed=failed))


def _clock(now: float) -> Callable[[], float]:
    """A clock that shows ``now`` at this moment; the host's own if that is 0."""
    ahead = now - time.time() if now else 0.0
    return lambda: time.time() + ahead


def new_engine(name: str, step_seconds: float) -> Engine:
    """The engine of that name; torch is imported for "shard" only."""
    if name == "instant":
        return InstantEngine(step_seconds)
    from uellm_worker.engine.shard_engine import ShardEngine  # noqa: PLC0415

    return ShardEngine()


def serve(sock: socket.socket, engine: Engine) -> None:
    """Serve an agent over a connected socket; does not return."""
    channel, inbox = ChildChannel(sock), Inbox()

    def read_commands() -> None:
        while (command := channel.receive()) is not None:
            if command.HasField("ping"):
                channel.send(EngineEvent(alive=Alive()))
            else:
                inbox.put(command)
        # No agent, no purpose; the engine may be deep in a step, so it is not asked.
        os._exit(0)

    threading.Thread(target=read_commands, name="commands", daemon=True).start()
    Child(channel, inbox, engine).run()
