"""An engine that counts seconds: the rules of the worker's loop, many steps at a time.

Between two events nothing changes but lengths, so that the steps in between are one *stretch*: all
decodes advance by one token a step, and the seconds of the stretch are a sum in closed form. The
step policy is asked only where its answer can differ: when a sequence comes, has its first token or
ends, when room runs out, and at the time that it named.

Of the KV cache only room is modelled, in whole blocks: no prefixes are used again. One stage: one
step is under way at a time.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from dataclasses import dataclass
from math import inf

from uellm.core.cost import chunk_pairs
from uellm.policy.views import Answered, EngineView, StepDecision, StepPolicy
from uellm.simulator.meter import Meter
from uellm.simulator.platforms import Platform
from uellm.simulator.sequences import Sequence

_DECISIONS = 3
"""A decision that only takes slots away leaves nothing to compute, and the policy is asked again:
so often before the engine waits for news; as in the worker."""


@dataclass(slots=True)
class Counts:
    """What an engine has done.

    Attributes:
        asked: times that its policy was asked.
        steps: computed.
        computed: tokens computed for sequences.
        padding: rows computed for nobody: padding of static batches.
        wasted: computed tokens that were lost to preemption.
        preemptions: of sequences.
        busy: seconds in which a step was under way.
        peak: most KV room taken at a time, in tokens.
    """

    asked: int = 0
    steps: int = 0
    computed: int = 0
    padding: int = 0
    wasted: int = 0
    preemptions: int = 0
    busy: float = 0.0
    peak: int = 0


class Engine(ABC):
    """What both ways of execution share: who waits, who runs, whom the policy chose.

    An engine is driven from event to event: ``begin`` starts a stretch and says when it ends,
    ``end`` takes it in, ``interrupt`` shortens it because somebody came.

    Args:
        platform: what it can hold and how fast it is.
        policy: decides.

    Attributes:
        running: sequences with a slot, in order of admission.
        waiting: sequences without one, oldest first.
        counts: what it has done.
        meter: what it reports of its pace.
        handed_back: sequences that the policy returned; to be taken by the caller.
        wake_at: when to call ``begin`` again if that found nothing to do, or None.
    """

    def __init__(self, platform: Platform, policy: StepPolicy) -> None:
        self.platform = platform
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.counts = Counts()
        self.meter = Meter()
        self.handed_back: list[Sequence] = []
        self.wake_at: float | None = None
        self._policy = policy
        self._by_id: dict[str, Sequence] = {}

    @property
    def kv_free(self) -> int:
        """KV room that nobody holds or has reserved, in tokens."""
        block = self.platform.block_tokens
        taken = [
            s.reserved if s.reserved >= s.computed else -(-s.computed // block) * block
            for s in self.running
        ]
        return self.platform.kv_tokens - sum(taken)

    def answered(self, now: float) -> dict[str, Answered]:
        """How far those have come, of all that are here, that have begun."""
        came = self._came(now)
        return {
            name: Answered(
                sequence.tokens - sequence.prompt_tokens + came.get(name, 0),
                sequence.first_token_at,
            )
            for name, sequence in self._by_id.items()
            if sequence.first_token_at is not None
        }

    def _came(self, now: float) -> dict[str, int]:
        """Tokens, by request id, of steps that are over and have not been taken in."""
        del now
        return {}

    def add(self, sequence: Sequence) -> None:
        """Take in a sequence."""
        self._by_id[sequence.request_id] = sequence
        self._wait(sequence)

    @abstractmethod
    def begin(self, now: float) -> float | None:
        """Decide, and start a stretch; returns when it ends, or None if there is nothing to do."""

    @abstractmethod
    def interrupt(self, now: float) -> float:
        """Somebody came: end the stretch with the step under way; returns when that ends."""

    @abstractmethod
    def end(self, now: float) -> list[Sequence]:
        """Take in the stretch that ended; returns the sequences that have all their tokens."""

    def _ask(self, now: float) -> StepDecision:
        self.counts.asked += 1
        view = EngineView(
            running=[sequence.view() for sequence in self.running],
            waiting=[sequence.view() for sequence in self.waiting],
            slots=self.platform.slots,
            kv_tokens_free=self.kv_free,
            kv_tokens_total=self.platform.kv_tokens,
            max_chunk_tokens=self.platform.chunk_tokens,
            block_tokens=self.platform.block_tokens,
            cost=self.platform.cost,
        )
        return self._policy.step(view, now)

    def _take_away(self, decision: StepDecision) -> bool:
        """Preempt and hand back as decided; True if somebody was."""
        taken = False
        for request_id in decision.preempt:
            sequence = self._by_id.get(request_id)
            if sequence is not None and sequence.seated:
                self._preempt(sequence)
                taken = True
        for request_id in decision.hand_back:
            sequence = self._by_id.get(request_id)
            if sequence is not None and not sequence.seated:
                self.waiting.remove(sequence)
                del self._by_id[request_id]
                self.handed_back.append(sequence)
                taken = True
        return taken

    def _seat(self, sequence: Sequence, reserved: int) -> None:
        self.waiting.remove(sequence)
        sequence.seat(reserved)
        self.running.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a slot; what was computed in it will be computed again."""
        self.running.remove(sequence)
        self.counts.wasted += sequence.unseat()
        self.counts.preemptions += 1
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda s: s.arrived_at)

    def _finish(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        del self._by_id[sequence.request_id]


@dataclass(slots=True)
class Stretch:
    """Steps that are computed one after the other with nobody coming or going.

    Attributes:
        began: when.
        first: seconds of the first step.
        growth: by which each step takes longer than the one before.
        steps: how many.
        decodes: who decodes in them.
        chunks: whose prompts are computed, and how many tokens; then there is one step.
    """

    began: float
    first: float
    growth: float
    steps: int
    decodes: list[Sequence]
    chunks: list[tuple[Sequence, int]]

    def after(self, steps: int) -> float:
        """When so many steps have ended."""
        return self.began + steps * self.first + self.growth * (steps * (steps - 1) / 2)

    def steps_until(self, time: float) -> int:
        """The steps that have begun before a time, at least one."""
        return 1 + bisect_left(range(1, self.steps), time, key=self.after)


class ContinuousEngine(Engine):
    """Sequences come and go between steps; prompts are prefilled in chunks beside decodes."""

    def __init__(self, platform: Platform, policy: StepPolicy) -> None:
        super().__init__(platform, policy)
        self._stretch: Stretch | None = None
        self._decision = StepDecision()
        # Why the policy is to be asked: anew, or because something ended.
        self._news = False
        self._ended = False

    def add(self, sequence: Sequence) -> None:
        """See ``Engine``."""
        super().add(sequence)
        self._news = True

    def begin(self, now: float) -> float | None:
        """See ``Engine``."""
        self.wake_at = None
        for _ in range(_DECISIONS):
            if not self._by_id:
                return None
            changed = self._decide(now) if self._due(now) else False
            if (stretch := self._plan(now)) is not None:
                self._stretch = stretch
                return stretch.after(stretch.steps)
            self._news = True
            if not changed:
                break
        if self._decision.reconsider_at is not None and self._decision.reconsider_at > now:
            self.wake_at = self._decision.reconsider_at
        return None

    def interrupt(self, now: float) -> float:
        """See ``Engine``."""
        stretch = self._stretch
        assert stretch is not None  # noqa: S101 - a stretch is under way
        stretch.steps = stretch.steps_until(now)
        return stretch.after(stretch.steps)

    def end(self, now: float) -> list[Sequence]:
        """See ``Engine``."""
        stretch, self._stretch = self._stretch, None
        assert stretch is not None  # noqa: S101 - a stretch was under way
        steps = stretch.steps
        rows = sum(count for _, count in stretch.chunks)
        self.counts.steps += steps
        self.counts.computed += steps * len(stretch.decodes) + rows
        self.counts.busy += now - stretch.began
        last = stretch.first + stretch.growth * (steps - 1)
        self.meter.add(last, steps, rows, len(stretch.decodes))
        finished = []
        for sequence in stretch.decodes:
            sequence.computed += steps
            sequence.tokens += steps
            if sequence.tokens >= sequence.end_tokens:
                finished.append(sequence)
        for sequence, count in stretch.chunks:
            sequence.computed += count
            if sequence.computed == sequence.tokens:
                sequence.token(now)
                self._news = True
                if sequence.left <= 0:
                    finished.append(sequence)
        # Whoever ends takes room to the end of its last step.
        self.counts.peak = max(self.counts.peak, self.platform.kv_tokens - self.kv_free)
        for sequence in finished:
            self._finish(sequence)
            self._ended = True
        return finished

    def _came(self, now: float) -> dict[str, int]:
        """See ``Engine``."""
        if self._stretch is None:
            return {}
        steps = self._stretch.steps_until(now) - 1
        return {sequence.request_id: steps for sequence in self._stretch.decodes}

    # ---- deciding ------------------------------------------------------------------------------

    def _due(self, now: float) -> bool:
        """Whether the policy can answer otherwise than before."""
        decision = self._decision
        if decision.reconsider_at is not None and decision.reconsider_at <= now:
            return True
        if not self.waiting and all(s.decoding for s in self.running):
            return self._short()
        if self._news or self._short():
            return True
        return self._ended and (
            decision.reconsider_when is None or self.kv_free >= decision.reconsider_when
        )

    def _short(self) -> bool:
        """There is no room for what the decodes of the next step compute."""
        block = self.platform.block_tokens
        growing = [
            s.computed >= s.reserved and s.computed >= s.prefill and s.computed % block == 0
            for s in self.running
        ]
        needed = sum(growing) * block
        return len(self.running) > 1 and self.kv_free < needed

    def _decide(self, now: float) -> bool:
        """Ask the policy and carry out what fits; True if it changed who runs."""
        self._news = self._ended = False
        decision = self._decision = self._ask(now)
        changed = self._take_away(decision)
        free = self.kv_free
        for request_id in decision.admit:
            sequence = self._by_id.get(request_id)
            if sequence is None or sequence.seated or len(self.running) == self.platform.slots:
                continue
            wanted = decision.reserve.get(request_id, sequence.reserve_tokens)
            reserved = max(min(wanted, sequence.limit_tokens), sequence.tokens)
            reserved = self.platform.whole_blocks(reserved)
            if reserved <= free:
                free -= reserved
                self._seat(sequence, reserved)
                changed = True
        return changed

    # ---- computing -----------------------------------------------------------------------------

    def _plan(self, now: float) -> Stretch | None:
        """What is computed next; None if nothing can be."""
        while self._short():
            # As in the worker: whoever got a slot last loses it.
            self._preempt(self.running[-1])
            self._news = True
        decodes = [s for s in self.running if s.decoding]
        budget = min(self._decision.chunk_tokens, self.platform.chunk_tokens - len(decodes))
        chunks: list[tuple[Sequence, int]] = []
        if len(decodes) < len(self.running):
            prompts = [s for s in self.running if not s.decoding]
            for sequence in self._decision.prefill_order(prompts):
                if budget > 0:
                    count = min(budget, sequence.prefill - sequence.computed)
                    chunks.append((sequence, count))
                    budget -= count
        if not (decodes or chunks):
            return None
        cost = self.platform.cost
        context = sum(s.computed for s in decodes) + len(decodes)
        rows = len(decodes) + sum(count for _, count in chunks)
        pairs = sum(chunk_pairs(sequence.computed, count) for sequence, count in chunks)
        stretch = Stretch(
            began=now,
            first=cost.seconds(rows, context, pairs),
            growth=cost.per_context * len(decodes),
            steps=1 if chunks else self._steps(decodes),
            decodes=decodes,
            chunks=chunks,
        )
        again = self._decision.reconsider_at
        if again is not None and again > now:
            stretch.steps = stretch.steps_until(again)
        return stretch

    def _steps(self, decodes: list[Sequence]) -> int:
        """Steps until somebody ends, takes room beyond what it has, or finds none."""
        steps = min(s.end_tokens - s.tokens for s in decodes)
        growing, crossing, block = 0, inf, self.platform.block_tokens
        for sequence in decodes:
            spare = max(sequence.reserved - sequence.computed, -sequence.computed % block)
            if spare <= 0:
                growing += 1
            elif spare < crossing:
                crossing = spare
        steps = int(min(steps, crossing))
        if growing:
            steps = min(steps, max(self.kv_free // (growing * block), 1) * block)
        return steps
