"""The engine loop of a replica: before every step, the policy decides who computes what.

The roster keeps who runs and who waits, the execution composes the steps, the runner computes them.
The loop does no I/O: the child process hands it commands and sends the reports it returns.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from uellm.core.cost import DEFAULT_COST, StepCost
from uellm.policy.views import StepPolicy
from uellm.v1.common_pb2 import FINISH_REASON_FAILED, FINISH_REASON_LENGTH
from uellm.v1.engine_pb2 import AddSequence, DropSequence, SequenceOutput, StepReport
from uellm.v1.inference_pb2 import Failure, TokenLogprobs
from uellm.v1.queue_pb2 import ReplicaReport
from uellm_worker.engine.asking import Occasion
from uellm_worker.engine.capacity import Capacity, Vocabulary
from uellm_worker.engine.errors import LeaveRequestedError, PeerLostError
from uellm_worker.engine.execution import execution_of
from uellm_worker.engine.flights import Flight, Padding, Share, make_plan
from uellm_worker.engine.memory import RowLimit
from uellm_worker.engine.outbox import Outbox
from uellm_worker.engine.plan import Admission, StepResult
from uellm_worker.engine.recorder import StepRecorder
from uellm_worker.engine.reports import CostMeter, StepMeter
from uellm_worker.engine.roster import Roster
from uellm_worker.engine.runner import Runner
from uellm_worker.engine.sequences import SequenceError, sequence_from_command

MAX_CHUNK_TOKENS = 512
"""Most tokens that the steps under way compute together: keeps them short enough for those that
decode. A long prompt goes through a pipeline in as many chunks at once as there are stages."""
LEAST_PATIENCE_SECONDS = 0.001
"""A policy that waits on purpose is not asked more often than this."""
_DECISIONS = 3
"""A decision that only takes slots away leaves nothing to compute, and the policy is asked again:
so often before the loop waits for news."""


class EngineLoop:
    """The sequences of one generation of a replica.

    Args:
        runner: computes the steps.
        policy: decides before each of them.
        capacity: what all stages can hold.
        vocabulary: the model's.
        epoch: the generation, for the reports.
        now: seconds since the epoch, by the clock that deadlines are given in.
        announce: told whose first step is about to be computed.
        adapters: names of the LoRA adapters that are loaded, by index.
        execution: how steps are composed; see ``uellm_worker.engine.execution``.
        cost: what steps are expected to take, until enough have been measured.
        timer: seconds of a monotonic clock, to time steps with.
        recorder: keeps some of the decisions; None: none are kept.
    """

    def __init__(
        self,
        runner: Runner,
        policy: StepPolicy,
        capacity: Capacity,
        vocabulary: Vocabulary,
        epoch: int = 0,
        now: Callable[[], float] = time.time,
        announce: Callable[[StepReport], None] | None = None,
        adapters: Iterable[str] = (),
        execution: str = "continuous",
        cost: StepCost = DEFAULT_COST,
        timer: Callable[[], float] = time.perf_counter,
        recorder: StepRecorder | None = None,
    ) -> None:
        self._runner = runner
        self._policy = policy
        self._capacity = capacity
        self._vocabulary = vocabulary
        self._epoch = epoch
        self._now = now
        self._announce = announce
        self._adapters = {name: index for index, name in enumerate(adapters)}
        self._recorder = recorder or StepRecorder("", every_steps=0)
        self._execution = execution_of(execution, capacity, runner.depth)
        self._next_execution: str | None = None
        self._roster = Roster(self._execution.account())
        self._limit = self._new_limit()
        self._flights: deque[Flight] = deque()
        self._outbox = Outbox()
        self._occasion = Occasion()
        self._timer = timer
        self._meter = StepMeter(cost=CostMeter(cost))
        self._idle_from: float | None = None
        self._reconsider_at: float | None = None

    # ---- commands ------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """A step may have something to do."""
        return bool(len(self._roster) or self._outbox or self._flights)

    @property
    def under_way(self) -> bool:
        """A result is to come."""
        return bool(self._flights)

    @property
    def patience(self) -> float | None:
        """Seconds until the policy wants to be asked again, though there is nothing to compute.

        None: at the next command.
        """
        if self._reconsider_at is None:
            return None
        return max(self._reconsider_at - self._now(), LEAST_PATIENCE_SECONDS)

    @property
    def flights(self) -> tuple[Flight, ...]:
        """The steps under way, oldest first."""
        return tuple(self._flights)

    @property
    def suspects(self) -> tuple[str, ...]:
        """Requests in the steps under way.

        After an error of this stage's own, those in the step that raised it.
        """
        shares = (share for flight in self._flights for share in flight.shares)
        return tuple(share.sequence.request_id for share in shares if share.wanted)

    def add(self, command: AddSequence) -> None:
        """Take in a sequence; one of the same request is replaced."""
        before = self._roster.find(command.request_id)
        if before is not None:
            self._roster.remove(before)
        try:
            sequence = sequence_from_command(
                command, self._capacity, self._vocabulary, self._now(), self._adapters
            )
        except SequenceError as error:
            self._outbox.add(
                SequenceOutput(
                    request_id=command.request_id,
                    generation=command.generation,
                    finish=FINISH_REASON_FAILED,
                    failure=Failure(reason=error.reason, message=str(error)),
                )
            )
            return
        if sequence.full:
            self._outbox.add(sequence.output(finish=FINISH_REASON_LENGTH))
            return
        if not len(self._roster):
            self._idle_from = None
        self._roster.add(sequence)

    def drop(self, command: DropSequence) -> None:
        """Forget a sequence; its slot is free at once. Others than the one named stay."""
        sequence = self._roster.find(command.request_id)
        if sequence is not None and sequence.generation == command.generation:
            self._roster.remove(sequence)
        self._outbox.drop(command)

    def decide_by(
        self, policy: StepPolicy, execution: str, options: Mapping[str, str] | None = None
    ) -> None:
        """Be decided for by another policy, made with these options; execute in another way.

        Raises:
            ValueError: if there is no execution of that name; nothing changes then.
        """
        name = execution_of(execution, self._capacity, self._runner.depth).name
        self._policy = policy
        self._recorder.options = dict(options or {})
        self._occasion.note()
        self._next_execution = None if name == self._execution.name else name
        self._execute_next()

    def _execute_next(self) -> None:
        """Execute in another way, if that is wanted and no step is under way.

        The caches are divided otherwise then: all begin again.
        """
        if self._next_execution is None or self._flights:
            return
        self._execution = execution_of(self._next_execution, self._capacity, self._runner.depth)
        self._next_execution = None
        self._roster = self._roster.moved_to(self._execution.account())
        self._occasion = Occasion()
        self._limit = self._new_limit()

    def _new_limit(self) -> RowLimit:
        most = max(map(len, self._roster.kv.groups))
        return RowLimit(max(MAX_CHUNK_TOKENS // self._execution.depth, 2 * most))

    # ---- steps ---------------------------------------------------------------------------------

    def step(self) -> StepReport | None:
        """Have as many steps under way as there are stages, take in one result, report.

        Returns:
            None when there is nothing to say: nothing to do, or a command came before the result.

        Raises:
            MemoryError: if there is too little memory for a single token.
            PeerLostError: a stage is gone.
            LeaveRequestedError: the agent asked to leave meanwhile.
        """
        self._execute_next()
        while self._room and self._launch():
            pass
        landed = False
        if self._flights:
            full = not self._room
            with self._blaming(self._flights[0]):
                result = self._runner.collect(patient=full)
            if result is not None:
                self._land(result)
                landed = True
        if not (landed or self._outbox):
            return None
        decisions = self._recorder.take(last=not len(self._roster))
        return self._outbox.report(self.report(), decisions)

    @property
    def _room(self) -> bool:
        """One more step may be under way. None may while all are awaited."""
        return self._next_execution is None and len(self._flights) < self._execution.depth

    def _launch(self) -> bool:
        """Ask the policy and submit a step; False if there is nothing to compute."""
        began_at = self._timer() if self._idle_from is None else self._idle_from
        self._idle_from = self._reconsider_at = None
        now = self._now()
        self._outbox.hand_back(self._roster.expire(now))
        for _ in range(_DECISIONS):
            if not self._roster.active:
                return False
            changed = self._due(now) and self._decide(now)
            shares, padding = self._execution.next_step(
                self._roster, self._occasion.decision, self._limit.rows, self._under_way_of
            )
            if shares or padding:
                self._submit(shares, padding, began_at)
                return True
            self._occasion.note()
            if not changed:
                self._reconsider_at = self._occasion.decision.reconsider_at
                return False
        return False

    def _due(self, now: float) -> bool:
        return self._occasion.due(self._roster, now, admits=self._execution.admits)

    def _decide(self, now: float) -> bool:
        """Ask the policy, and do what it says; True if that changed who runs."""
        view = self._roster.view(self._limit.rows, self._execution.depth, self._meter.cost.cost)
        decision = self._policy.step(view, now)
        admits = self._execution.admits
        self._recorder.note(
            self._policy.name, self._meter.submitted, view, decision, now, admits=admits
        )
        self._occasion.take(decision, self._roster)
        handed_back = self._roster.carry_out(
            decision,
            admits=admits,
            most=self._limit.rows,
            burden=self._under_way_of,
        )
        self._outbox.hand_back(handed_back or ())
        return handed_back is not None

    def _under_way_of(self, group: int) -> int:
        return sum(flight.group == group for flight in self._flights)

    def _submit(self, shares: list[Share], padding: list[Padding], began_at: float) -> None:
        """Begin a step, whose time counts from ``began_at``."""
        plan = make_plan(
            self._meter.submitted,
            shares,
            tuple(
                Admission(s.slot, s.prompt_tokens, s.sampling, self._adapters.get(s.adapter, -1))
                for s in self._roster.admitted
            ),
            self._roster.kv.flush(),
            padding,
        )
        self._roster.admitted.clear()
        group = self._roster.kv.group(shares[0].chunk.slot) if shares else 0
        alone = not self._flights
        ended = self._meter.cost.ended
        flight = Flight(plan, group, tuple(shares), self._timer(), alone, began_at, ended)
        self._tell_of_first_steps(shares)
        self._meter.submitted += 1
        for share in shares:
            share.sequence.computed_tokens += share.chunk.count
        self._flights.append(flight)
        with self._blaming(flight):
            self._runner.submit(plan)

    @contextmanager
    def _blaming(self, flight: Flight) -> Iterator[None]:
        """An error of this stage's own within it leaves that step alone under way."""
        try:
            yield
        except (PeerLostError, LeaveRequestedError):
            raise
        except Exception:
            self._flights = deque([flight])
            raise

    def _tell_of_first_steps(self, shares: list[Share]) -> None:
        """Before they are computed: should one take the process down, it is known whose it was."""
        first = [share.sequence for share in shares if not share.sequence.announced]
        for sequence in first:
            sequence.announced = True
        if first and self._announce is not None:
            self._announce(StepReport(admitted=[sequence.request_id for sequence in first]))

    def _land(self, result: StepResult) -> None:
        """Take in what came of the oldest step under way."""
        if result.out_of_memory:
            self._shrink(self._flights[0])
            return
        flight = self._flights.popleft()
        self._limit.fitted()
        alone = flight.alone and not self._flights
        self._idle_from = self._timer()
        self._meter.add(flight, result, self._idle_from, alone=alone)
        tokens = iter(result.token_ids)
        logprobs = iter(result.logprobs)
        for share in flight.shares:
            if share.chunk.sample:
                if not share.decode:
                    self._occasion.note()
                self._take_token(share, next(tokens), next(logprobs, None))

    def _shrink(self, flight: Flight) -> None:
        """A step did not fit into memory: begin everything again, by smaller steps.

        What was submitted since rests on what that step did not compute.
        """
        with self._blaming(flight):
            self._limit.exceeded(flight.plan.rows)
        for _ in range(len(self._flights) - 1):
            self._runner.collect()
        self._flights.clear()
        self._roster.start_again()
        self._execution.start_again()

    def _take_token(self, share: Share, token: int, logprobs: TokenLogprobs | None) -> None:
        """Give a sequence its token, and end it if it is done."""
        sequence = share.sequence
        if not share.wanted:
            if token < 0:
                self._roster.taint(share.chunk.slot)
            return
        output = sequence.take(token, logprobs, self._vocabulary.eos_ids, self._now())
        self._outbox.add(output)
        if output.finish:
            self._roster.remove(sequence)

    def report(self) -> ReplicaReport:
        """How the replica is doing."""
        return self._meter.report(
            epoch=self._epoch,
            kv=self._roster.kv.usage,
            running=len(self._roster),
            waiting=len(self._roster.waiting),
            slots=self._roster.slots,
            policy=self._policy.name,
            execution=self._execution.name,
        )
