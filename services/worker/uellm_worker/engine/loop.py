"""The engine loop of a replica: between two steps, the policy decides who computes what.

Sequences wait for a slot, prefill their tokens in chunks under the step's budget, then decode one
token a step together with everyone else. The loop does no I/O: the child process hands it
commands and sends the reports it returns.
"""

import time
from bisect import insort
from collections.abc import Callable, Iterable

from uellm.policy.views import EngineView, StepDecision, StepPolicy
from uellm.v1.common_pb2 import (
    FINISH_REASON_FAILED,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    FinishReason,
)
from uellm.v1.engine_pb2 import AddSequence, DropSequence, SequenceOutput, StepReport
from uellm.v1.inference_pb2 import Failure, TokenLogprobs
from uellm.v1.queue_pb2 import ReplicaReport
from uellm_worker.engine.capacity import Capacity, Vocabulary
from uellm_worker.engine.kv import KvManager
from uellm_worker.engine.plan import Admission, Chunk, StepPlan, StepResult
from uellm_worker.engine.reports import StepMeter
from uellm_worker.engine.runner import Runner
from uellm_worker.engine.sequences import Sequence, SequenceError, sequence_from_command

MAX_CHUNK_TOKENS = 512
"""Most tokens that one step computes: keeps a step short enough for those that decode."""
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
        announce: told which requests got a slot, before the step that computes them.
        adapters: names of the LoRA adapters that are loaded, by index.

    Attributes:
        suspects: requests of the step under way, or of the one that raised.
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
        self._max_chunk_tokens = max(MAX_CHUNK_TOKENS, 2 * capacity.slots)
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self._kv = KvManager(
            capacity.slots,
            capacity.max_tokens,
            capacity.kv_tokens,
            capacity.block_tokens,
            spare_slots=capacity.spare_slots,
            sharing=capacity.sharing,
        )
        self._admitted: list[Sequence] = []
        self._outputs: list[SequenceOutput] = []
        self._handed_back: list[str] = []
        self._meter = StepMeter()
        self.suspects: tuple[str, ...] = ()

    # ---- commands ------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """A step may have something to do."""
        return bool(self._by_id or self._outputs)

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
            self._outputs.append(_output(sequence, finish=FINISH_REASON_LENGTH))
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
        """Ask the policy, compute one step, report; None when there was nothing to do."""
        computed = False
        for _ in range(_DECISIONS):
            if computed or not self._by_id:
                break
            decision = self._policy.step(self._view(), self._now())
            changed = self._apply(decision)
            computed = self._compute(decision.chunk_tokens)
            if not changed:
                break
        if not (computed or self._outputs or self._handed_back):
            return None
        report = StepReport(
            outputs=self._outputs, handed_back=self._handed_back, report=self._report()
        )
        self._outputs, self._handed_back = [], []
        return report

    def _view(self) -> EngineView:
        return EngineView(
            running=[sequence.view() for sequence in self._running],
            waiting=[sequence.view() for sequence in self._waiting],
            slots=self._capacity.slots,
            kv_tokens_free=self._kv.usage.free_tokens,
            kv_tokens_total=self._kv.usage.total_tokens,
            max_chunk_tokens=self._max_chunk_tokens,
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
                self._admit(sequence)
        return (len(self._waiting), len(self._admitted)) != before

    def _admit(self, sequence: Sequence) -> None:
        """Give a sequence a slot, if there is one and its reservation fits."""
        if len(self._running) == self._capacity.slots:
            return
        seat = self._kv.seat(
            sequence.tokens, reserve_tokens=sequence.reserve_tokens, scope=sequence.adapter
        )
        if seat is not None:
            self._waiting.remove(sequence)
            sequence.seat(seat.slot, seat.cached_tokens)
            self._running.append(sequence)
            self._admitted.append(sequence)

    def _compute(self, chunk_tokens: int) -> bool:
        """Compute one step of what runs; False if nothing can."""
        parts = self._parts(chunk_tokens)
        if not parts:
            return False
        admitted = [s for s in self._admitted if s.slot >= 0]
        plan = StepPlan(
            step=self._meter.step,
            chunks=tuple(
                Chunk(
                    slot=sequence.slot,
                    start=sequence.computed_tokens,
                    count=count,
                    sample=sequence.computed_tokens + count == len(sequence.tokens),
                )
                for sequence, count in parts
            ),
            admissions=tuple(
                Admission(
                    slot=s.slot,
                    prompt_tokens=s.prompt_tokens,
                    sampling=s.sampling,
                    adapter=self._adapters.get(s.adapter, -1),
                )
                for s in admitted
            ),
            token_ids=tuple(
                token
                for s, count in parts
                for token in s.tokens[s.computed_tokens : s.computed_tokens + count]
            ),
            moves=self._kv.flush(),
        )
        self.suspects = tuple(sequence.request_id for sequence, _ in parts)
        if admitted and self._announce is not None:
            # Before the step: should it take the process down, it is known whose it was.
            self._announce(StepReport(admitted=[sequence.request_id for sequence in admitted]))
        started = time.perf_counter()
        result = self._runner.run(plan)
        elapsed = time.perf_counter() - started
        self._admitted.clear()
        decodes = [sequence for sequence, _ in parts if sequence.decoding]
        self._meter.add(
            elapsed,
            plan.rows - len(decodes),
            len(decodes),
            sum(len(sequence.tokens) for sequence in decodes),
            result.seconds,
        )
        self._absorb(parts, result)
        self.suspects = ()
        return True

    def _parts(self, chunk_tokens: int) -> list[tuple[Sequence, int]]:
        """Who computes how many tokens: decodes in slot order, then prefill by admission.

        Where a decode finds no room, whoever got a slot last loses it. One sequence alone always
        fits: its limit is within the KV room.
        """
        for sequence in sorted((s for s in self._running if s.decoding), key=lambda s: s.slot):
            while sequence.slot >= 0 and not self._grow(sequence, 1):
                self._preempt(self._running[-1])
        decodes = sorted((s for s in self._running if s.decoding), key=lambda s: s.slot)
        parts = [(sequence, 1) for sequence in decodes]
        budget = min(chunk_tokens, self._max_chunk_tokens - len(decodes))
        for sequence in self._running:
            if sequence.decoding or budget <= 0:
                continue
            count = min(budget, len(sequence.tokens) - sequence.computed_tokens)
            if self._grow(sequence, count):
                parts.append((sequence, count))
                budget -= count
        return parts

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Have so many more tokens of a sequence computed; False if there is no room."""
        start = sequence.computed_tokens
        return self._kv.grow(sequence.slot, sequence.tokens[start : start + count])

    def _absorb(self, parts: list[tuple[Sequence, int]], result: StepResult) -> None:
        """Give each sequence its token, and end those that are done."""
        tokens = iter(result.token_ids)
        logprobs = iter(result.logprobs)
        for sequence, count in parts:
            sequence.computed_tokens += count
            if sequence.computed_tokens == len(sequence.tokens):
                self._take_token(sequence, next(tokens), next(logprobs, None))

    def _take_token(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        if token < 0:
            sequence.sound = False
            failure = Failure(
                reason="LOGITS_NOT_FINITE",
                message="the model's logits are not finite; a wider dtype may help",
            )
            self._finish(_output(sequence, finish=FINISH_REASON_FAILED, failure=failure), sequence)
            return
        if token in self._vocabulary.eos_ids:
            self._finish(_output(sequence, finish=FINISH_REASON_STOP), sequence)
            return
        sequence.tokens.append(token)
        output = _output(sequence, token_ids=(token,))
        if logprobs is not None:
            output.logprobs.append(logprobs)
        if sequence.full:
            output.finish = FINISH_REASON_LENGTH
            self._finish(output, sequence)
        else:
            self._outputs.append(output)

    # ---- bookkeeping ---------------------------------------------------------------------------

    def _finish(self, output: SequenceOutput, sequence: Sequence) -> None:
        self._outputs.append(output)
        self._remove(sequence)

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
        """Take a slot. A prefix that no token was chosen from may not be finite."""
        self._running.remove(sequence)
        self._kv.leave(sequence.slot, keep=sequence.sound and sequence.decoding)

    def _report(self) -> ReplicaReport:
        return self._meter.report(
            epoch=self._epoch,
            kv=self._kv.usage,
            running=len(self._by_id),
            waiting=len(self._waiting),
            slots=self._capacity.slots,
        )


def _output(
    sequence: Sequence,
    token_ids: tuple[int, ...] = (),
    finish: "FinishReason.ValueType" = FINISH_REASON_UNSPECIFIED,
    failure: Failure | None = None,
) -> SequenceOutput:
    """An output of a sequence."""
    return SequenceOutput(
        request_id=sequence.request_id,
        generation=sequence.generation,
        token_ids=token_ids,
        finish=finish,
        failure=failure,
    )


def _same(output: SequenceOutput, command: DropSequence) -> bool:
    """Both are of one holder of one request."""
    return (output.request_id, output.generation) == (command.request_id, command.generation)
