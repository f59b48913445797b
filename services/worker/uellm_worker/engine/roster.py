"""Who runs and who waits in an engine, and the KV room of those that run."""

from bisect import insort
from collections.abc import Callable
from math import inf

from uellm.core.cost import StepCost
from uellm.policy.views import EngineView, StepDecision
from uellm_worker.engine.kv import KvManager
from uellm_worker.engine.sequences import Sequence


class Roster:
    """The sequences of an engine.

    Args:
        kv: the account of the replica's KV cache.

    Attributes:
        kv: see there.
        running: those with a slot, in order of admission.
        waiting: those without one, oldest first.
        admitted: those that got a slot since the last step.
        arrivals: times that somebody began to wait.
        departures: times that somebody left for good.
    """

    def __init__(self, kv: KvManager) -> None:
        self.kv = kv
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.arrivals = self.departures = 0
        self._by_id: dict[str, Sequence] = {}
        # Not later than when the first of those that wait expires.
        self._expires_at = inf

    def __len__(self) -> int:
        return len(self._by_id)

    def find(self, request_id: str) -> Sequence | None:
        """The sequence of a request."""
        return self._by_id.get(request_id)

    @property
    def slots(self) -> int:
        """Most sequences that run at once."""
        return sum(map(len, self.kv.groups))

    def view(self, rows: int, depth: int, cost: StepCost) -> EngineView:
        """What a step policy sees; to it, a step is one of every group.

        Args:
            rows: most tokens of a group's step.
            depth: such steps that are under way at once.
            cost: of a step.
        """
        return EngineView(
            running=[sequence.view() for sequence in self.running],
            waiting=[sequence.view() for sequence in self.waiting],
            slots=min(self.slots, len(self.kv.groups) * rows),
            kv_tokens_free=self.kv.free_tokens,
            kv_tokens_total=self.kv.total_tokens,
            max_chunk_tokens=rows * depth,
            block_tokens=self.kv.block_tokens,
            cost=cost,
        )

    @property
    def active(self) -> bool:
        """Somebody waits, or has a token to compute."""
        return bool(self.waiting) or any(sequence.ready for sequence in self.running)

    def add(self, sequence: Sequence) -> None:
        """Take in a sequence, which waits."""
        self._by_id[sequence.request_id] = sequence
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        del self._by_id[sequence.request_id]
        self.departures += 1
        if sequence.slot >= 0:
            self._stand_up(sequence)
            sequence.slot = -1
        else:
            self.waiting.remove(sequence)

    def expire(self, now: float) -> list[str]:
        """Forget those that wait and are not wanted any more; returns who they were."""
        if now < self._expires_at:
            return []
        expired = [s for s in self.waiting if s.expires_at <= now]
        for sequence in expired:
            self.remove(sequence)
        self._expires_at = min((s.expires_at for s in self.waiting), default=inf)
        return [sequence.request_id for sequence in expired]

    def admit(
        self, sequence: Sequence, reserve_tokens: int, most: int, burden: Callable[[int], int]
    ) -> None:
        """Give a sequence a slot, if there is one and its reservation fits.

        It joins the group with the fewest sequences; of these, the one with the least burden.

        Args:
            sequence: one that waits.
            reserve_tokens: KV room that is kept for it.
            most: of a group.
            burden: of a group.
        """
        counts = [0] * len(self.kv.groups)
        for other in self.running:
            counts[self.kv.group(other.slot)] += 1
        room = [min(len(slots), most) for slots in self.kv.groups]
        groups = [group for group, count in enumerate(counts) if count < room[group]]
        if not groups:
            return
        seat = self.kv.seat(
            sequence.tokens,
            reserve_tokens=reserve_tokens,
            group=min(groups, key=lambda g: (counts[g], burden(g), g)),
            scope=sequence.adapter,
        )
        if seat is not None:
            self.waiting.remove(sequence)
            sequence.seat(seat.slot, seat.cached_tokens)
            self.running.append(sequence)
            self.admitted.append(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a slot; what was computed in it will be computed again."""
        self._stand_up(sequence)
        sequence.unseat()
        self._wait(sequence)

    def make_room(self, sequence: Sequence) -> bool:
        """Make room for the next token of a sequence that decodes; False if it lost its slot.

        Whoever got a slot last loses it. One sequence alone always fits: its limit is within the
        KV room.
        """
        while sequence.slot >= 0:
            newest = sequence.computed_tokens
            if self.kv.grow(sequence.slot, sequence.tokens[newest : newest + 1]):
                return True
            self.preempt(self.running[-1])
        return False

    def carry_out(
        self, decision: StepDecision, *, admits: bool, most: int, burden: Callable[[int], int]
    ) -> list[str] | None:
        """Carry out a decision. What does not fit, or is not there, is left out.

        Args:
            decision: of a step policy.
            admits: slots may be given at all.
            most: see ``admit``.
            burden: see ``admit``.

        Returns:
            Whom it handed back; None if nothing changed.
        """
        before = len(self.waiting), len(self.admitted)
        handed_back = []
        for request_id in decision.preempt:
            sequence = self.find(request_id)
            if sequence is not None and sequence.slot >= 0:
                self.preempt(sequence)
        for request_id in decision.hand_back:
            sequence = self.find(request_id)
            if sequence is not None and sequence.slot < 0:
                self.remove(sequence)
                handed_back.append(request_id)
        for request_id in decision.admit if admits else ():
            sequence = self.find(request_id)
            if sequence is not None and sequence.slot < 0:
                reserve = decision.reserve.get(request_id, sequence.reserve_tokens)
                self.admit(sequence, reserve, most, burden)
        return None if (len(self.waiting), len(self.admitted)) == before else handed_back

    def moved_to(self, kv: KvManager) -> "Roster":
        """All sequences in another account of the same slots, waiting."""
        self.start_again()
        kv.reset(self.kv.num_slots)
        moved = Roster(kv)
        for sequence in self._by_id.values():
            moved.add(sequence)
        return moved

    def taint(self, slot: int) -> None:
        """What a sequence left in its slot is not finite, and would spoil whoever has it now."""
        heir = next((sequence for sequence in self.running if sequence.slot == slot), None)
        if heir is None:
            self.kv.discard(slot)
        else:
            heir.proven = False
            self.preempt(heir)

    def start_again(self) -> None:
        """Nothing of what was computed is left: all wait for a slot, and all slots are wiped."""
        self.admitted.clear()
        while self.running:
            sequence = self.running.pop()
            sequence.unseat()
            self._wait(sequence)
        self.kv.reset()

    def _wait(self, sequence: Sequence) -> None:
        self._expires_at = min(self._expires_at, sequence.expires_at)
        self.arrivals += 1
        insort(self.waiting, sequence, key=lambda s: s.arrived_at)

    def _stand_up(self, sequence: Sequence) -> None:
        """Take a slot. Content that no token was chosen from may not be finite."""
        self.running.remove(sequence)
        if sequence in self.admitted:
            self.admitted.remove(sequence)
        self.kv.leave(sequence.slot, keep=sequence.proven)
