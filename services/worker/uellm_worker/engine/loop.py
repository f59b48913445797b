"""The engine loop of a replica: before every step, the policy decides who computes what.

Sequences wait for a slot, prefill their tokens in chunks under the step's budget, then decode one
token a step together with everyone else of their group. As many steps are under way at once as the
replica has stages, so that none of these idles; a sequence is in the next step as soon as it has a
token to compute. The loop does no I/O: the child process hands it commands and sends the reports
it returns.
"""

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable

from uellm.policy.views import EngineView, StepDecision, StepPolicy
from uellm.v1.common_pb2 import (
    FINISH_REASON_FAILED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
)
from uellm.v1.engine_pb2 import AddSequence, DropSequence, SequenceOutput, StepReport
from uellm.v1.inference_pb2 import Failure, TokenLogprobs
from uellm.v1.queue_pb2 import ReplicaReport
from uellm_worker.engine.capacity import Capacity, Vocabulary
from uellm_worker.engine.errors import LeaveRequestedError, PeerLostError
from uellm_worker.engine.flights import Flight, Share, make_plan
from uellm_worker.engine.kv import KvManager
from uellm_worker.engine.memory import RowLimit
from uellm_worker.engine.plan import Admission, StepResult
from uellm_worker.engine.reports import StepMeter
from uellm_worker.engine.runner import Runner
from uellm_worker.engine.sequences import Sequence, SequenceError, sequence_from_command

MAX_CHUNK_TOKENS = 512
"""Most tokens that the steps under way compute together: keeps them short enough for those that
decode. A long prompt goes through a pipeline in as many chunks at once as there are stages."""
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
        now: seconds since the epoch.
        announce: told whose first step is about to be computed.
        adapters: names of the LoRA adapters that are loaded, by index.
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
    ) -> None:
        self._runner = runner
        self._policy = policy
        self._capacity = capacity
        self._vocabulary = vocabulary
        self._epoch = epoch
        self._now = now
        self._announce = announce
        self._adapters = {name: index for index, name in enumerate(adapters)}
        self._kv = KvManager(
            capacity.slots,
            capacity.max_tokens,
            capacity.kv_tokens,
            capacity.block_tokens,
            spare_slots=capacity.spare_slots,
            groups=min(runner.depth, capacity.slots),
            sharing=capacity.sharing,
        )
        most = max(map(len, self._kv.groups))
        self._limit = RowLimit(max(MAX_CHUNK_TOKENS // runner.depth, 2 * most))
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self._admitted: list[Sequence] = []
        self._flights: deque[Flight] = deque()
        self._last_step = [-1] * len(self._kv.groups)
        self._outputs: list[SequenceOutput] = []
        self._handed_back: list[str] = []
        self._meter = StepMeter()

    # ---- commands ------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """A step may have something to do."""
        return bool(self._by_id or self._outputs or self._flights)

    @property
    def under_way(self) -> bool:
        """A result is to come."""
        return bool(self._flights)

    @property
    def suspects(self) -> tuple[str, ...]:
        """Requests in the steps under way.

        After an error of this stage's own, those in the step that raised it.
        """
        shares = (share for flight in self._flights for share in flight.shares)
        return tuple(share.sequence.request_id for share in shares if share.wanted)

    def add(self, command: AddSequence) -> None:
        """Take in a sequence; one of the same request is replaced."""
        self._remove(self._by_id.get(command.request_id))
        try:
            sequence = sequence_from_command(
                command, self._capacity, self._vocabulary, self._now(), self._adapters
            )
        except SequenceError as error:
            self._outputs.append(
                SequenceOutput(
                    request_id=command.request_id,
                    generation=command.generation,
                    finish=FINISH_REASON_FAILED,
                    failure=Failure(reason=error.reason, message=str(error)),
                )
            )
            return
        if sequence.full:
            self._outputs.append(sequence.output(finish=FINISH_REASON_LENGTH))
            return
        self._by_id[sequence.request_id] = sequence
        self._wait(sequence)

    def drop(self, command: DropSequence) -> None:
        """Forget a sequence; its slot is free at once. Others than the one named stay."""
        sequence = self._by_id.get(command.request_id)
        if sequence is not None and sequence.generation == command.generation:
            self._remove(sequence)
        self._outputs = [output for output in self._outputs if not _same(output, command)]

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
        while len(self._flights) < self._runner.depth and self._launch():
            pass
        landed = False
        if self._flights:
            full = len(self._flights) == self._runner.depth
            result = self._runner.collect(patient=full)
            if result is not None:
                self._land(result)
                landed = True
        if not (landed or self._outputs or self._handed_back):
            return None
        report = StepReport(
            outputs=self._outputs, handed_back=self._handed_back, report=self._report()
        )
        self._outputs, self._handed_back = [], []
        return report

    def _launch(self) -> bool:
        """Ask the policy and submit a step; False if there is nothing to compute."""
        for _ in range(_DECISIONS):
            if not (self._waiting or any(sequence.ready for sequence in self._running)):
                return False
            decision = self._policy.step(self._view(), self._now())
            changed = self._apply(decision)
            if shares := self._shares(decision.chunk_tokens):
                self._submit(shares)
                return True
            if not changed:
                return False
        return False

    def _view(self) -> EngineView:
        return EngineView(
            running=[sequence.view() for sequence in self._running],
            waiting=[sequence.view() for sequence in self._waiting],
            slots=min(self._capacity.slots, len(self._kv.groups) * self._limit.rows),
            kv_tokens_free=self._kv.usage.free_tokens,
            kv_tokens_total=self._kv.usage.total_tokens,
            max_chunk_tokens=self._limit.rows,
        )

    def _apply(self, decision: StepDecision) -> bool:
        """Carry out a decision; True if it changed who runs. What does not fit is left out.

        The policy is asked before every step, so its ``reconsider_when`` is always kept.
        """
        before = len(self._waiting), len(self._admitted)
        for request_id in decision.preempt:
            sequence = self._by_id.get(request_id)
            if sequence is not None and sequence.slot >= 0:
                self._preempt(sequence)
        for request_id in decision.hand_back:
            sequence = self._by_id.get(request_id)
            if sequence is not None and sequence.slot < 0:
                self._remove(sequence)
                self._handed_back.append(request_id)
        for request_id in decision.admit:
            sequence = self._by_id.get(request_id)
            if sequence is not None and sequence.slot < 0:
                self._admit(sequence, decision.reserve.get(request_id, sequence.reserve_tokens))
        return (len(self._waiting), len(self._admitted)) != before

    def _admit(self, sequence: Sequence, reserve_tokens: int) -> None:
        """Give a sequence a slot, if there is one and its reservation fits.

        It joins the group with the fewest sequences; of these, the one with the fewest steps.
        """
        counts = [0] * len(self._kv.groups)
        for other in self._running:
            counts[self._kv.group(other.slot)] += 1
        most = [min(len(slots), self._limit.rows) for slots in self._kv.groups]
        groups = [group for group, count in enumerate(counts) if count < most[group]]
        if not groups:
            return
        seat = self._kv.seat(
            sequence.tokens,
            reserve_tokens=reserve_tokens,
            group=min(groups, key=lambda g: (counts[g], self._under_way_of(g), g)),
            scope=sequence.adapter,
        )
        if seat is not None:
            self._waiting.remove(sequence)
            sequence.seat(seat.slot, seat.cached_tokens)
            self._running.append(sequence)
            self._admitted.append(sequence)

    def _under_way_of(self, group: int) -> int:
        return sum(flight.group == group for flight in self._flights)

    def _shares(self, chunk_tokens: int) -> tuple[Share, ...]:
        """What the next step computes.

        It is the turn of the group with the fewest steps under way; of these, the one that waits
        longest.
        """
        groups = {self._kv.group(s.slot) for s in self._running if s.ready}
        for group in sorted(groups, key=lambda g: (self._under_way_of(g), self._last_step[g])):
            if shares := self._shares_of(group, chunk_tokens):
                return tuple(shares)
        return ()

    def _shares_of(self, group: int, chunk_tokens: int) -> list[Share]:
        """What a step of a group computes: decodes in slot order, then prefill by admission.

        Where a decode finds no room, whoever got a slot last loses it. One sequence alone always
        fits: its limit is within the KV room.
        """

        def ready(*, decoding: bool) -> list[Sequence]:
            return [
                s
                for s in self._running
                if s.ready and s.decoding == decoding and self._kv.group(s.slot) == group
            ]

        for sequence in sorted(ready(decoding=True), key=lambda s: s.slot):
            while sequence.slot >= 0 and not self._grow(Share.next_of(sequence, 1)):
                self._preempt(self._running[-1])
        decodes = sorted(ready(decoding=True), key=lambda s: s.slot)
        shares = [Share.next_of(sequence, 1) for sequence in decodes]
        budget = min(chunk_tokens, self._limit.rows - len(shares))
        for sequence in ready(decoding=False):
            if budget > 0 and self._grow(share := Share.next_of(sequence, budget)):
                shares.append(share)
                budget -= share.chunk.count
        return shares

    def _grow(self, share: Share) -> bool:
        """Make room for what a step is going to compute; False if there is none."""
        return self._kv.grow(share.chunk.slot, share.token_ids)

    def _submit(self, shares: tuple[Share, ...]) -> None:
        """Begin a step."""
        plan = make_plan(
            self._meter.submitted,
            shares,
            tuple(
                Admission(s.slot, s.prompt_tokens, s.sampling, self._adapters.get(s.adapter, -1))
                for s in self._admitted
            ),
            self._kv.flush(),
        )
        self._admitted.clear()
        group = self._kv.group(shares[0].chunk.slot)
        flight = Flight(plan, group, shares, time.perf_counter(), alone=not self._flights)
        self._tell_of_first_steps(shares)
        self._meter.submitted += 1
        self._last_step[group] = plan.step
        for share in shares:
            share.sequence.computed_tokens += share.chunk.count
        self._flights.append(flight)
        try:
            self._runner.submit(plan)
        except (PeerLostError, LeaveRequestedError):
            raise
        except Exception:
            self._flights = deque([flight])
            raise

    def _tell_of_first_steps(self, shares: tuple[Share, ...]) -> None:
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
        self._meter.add(flight, result, time.perf_counter(), alone=alone)
        tokens = iter(result.token_ids)
        logprobs = iter(result.logprobs)
        for share in flight.shares:
            if share.chunk.sample:
                self._take_token(share, next(tokens), next(logprobs, None))

    def _shrink(self, flight: Flight) -> None:
        """A step did not fit into memory: begin everything again, by smaller steps.

        What was submitted since rests on what that step did not compute.
        """
        self._limit.exceeded(flight.plan.rows)
        for _ in range(len(self._flights) - 1):
            self._runner.collect()
        self._flights.clear()
        self._admitted.clear()
        while self._running:
            sequence = self._running.pop()
            sequence.unseat()
            self._wait(sequence)
        self._kv.reset()

    def _take_token(self, share: Share, token: int, logprobs: TokenLogprobs | None) -> None:
        """Give a sequence its token, and end it if it is done."""
        sequence = share.sequence
        if not share.wanted:
            if token < 0:
                self._taint(share.chunk.slot)
            return
        sequence.proven = token >= 0
        if token < 0:
            failure = Failure(
                reason="LOGITS_NOT_FINITE",
                message="the model's logits are not finite; a wider dtype may help",
            )
            self._finish(sequence, sequence.output(finish=FINISH_REASON_FAILED, failure=failure))
            return
        if token in self._vocabulary.eos_ids:
            self._finish(sequence, sequence.output(finish=FINISH_REASON_STOP))
            return
        sequence.tokens.append(token)
        output = sequence.output((token,))
        if logprobs is not None:
            output.logprobs.append(logprobs)
        if sequence.full:
            output.finish = FINISH_REASON_LENGTH
            self._finish(sequence, output)
        else:
            self._outputs.append(output)

    # ---- bookkeeping ---------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, output: SequenceOutput) -> None:
        self._outputs.append(output)
        self._remove(sequence)

    def _taint(self, slot: int) -> None:
        """What a sequence left in its slot is not finite, and would spoil whoever has it now."""
        heir = next((sequence for sequence in self._running if sequence.slot == slot), None)
        if heir is None:
            self._kv.discard(slot)
        else:
            heir.proven = False
            self._preempt(heir)

    def _wait(self, sequence: Sequence) -> None:
        """Put a sequence among the waiting, oldest first."""
        insort(self._waiting, sequence, key=lambda s: s.arrived_at)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a slot; what was computed in it will be computed again."""
        self._stand_up(sequence)
        sequence.unseat()
        self._wait(sequence)

    def _remove(self, sequence: Sequence | None) -> None:
        """Forget a sequence, wherever it is."""
        if sequence is None:
            return
        del self._by_id[sequence.request_id]
        if sequence.slot >= 0:
            self._stand_up(sequence)
            sequence.slot = -1
        else:
            self._waiting.remove(sequence)

    def _stand_up(self, sequence: Sequence) -> None:
        """Take a slot. Content that no token was chosen from may not be finite."""
        self._running.remove(sequence)
        if sequence in self._admitted:
            self._admitted.remove(sequence)
        self._kv.leave(sequence.slot, keep=sequence.proven)

    def _report(self) -> ReplicaReport:
        return self._meter.report(
            epoch=self._epoch,
            kv=self._kv.usage,
            running=len(self._by_id),
            waiting=len(self._waiting),
            slots=self._capacity.slots,
        )


def _same(output: SequenceOutput, command: DropSequence) -> bool:
    """Both are of one holder of one request."""
    return (output.request_id, output.generation) == (command.request_id, command.generation)
