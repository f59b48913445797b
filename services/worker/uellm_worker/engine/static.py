"""Static execution: a padded batch that lasts as long as its longest answer.

This is how the paper's engines run a batch, and what continuous execution is measured against. All
prompts are padded to the longest one, and who is done is computed on until all are. What comes of
the padding is thrown away: the answers are those of continuous execution.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq

from uellm.policy.views import StepDecision
from uellm_worker.engine.capacity import Capacity
from uellm_worker.engine.flights import Padding, Share
from uellm_worker.engine.kv import KvManager
from uellm_worker.engine.plan import Chunk
from uellm_worker.engine.roster import Roster
from uellm_worker.engine.sequences import Sequence


class StaticBatch:
    """Sequences that begin together; whoever leaves goes on being computed.

    Args:
        sequences: all of them, seated, nothing of them computed.
        scratch: a slot that nobody has, for padded prompts.
    """

    def __init__(self, sequences: Seq[Sequence], scratch: int) -> None:
        self._members = sorted(sequences, key=lambda s: s.slot)
        self._slots = [sequence.slot for sequence in self._members]
        self._turns = [sequence.preemptions for sequence in self._members]
        self._lengths = [len(sequence.tokens) for sequence in self._members]
        self._width = max(self._lengths)
        self._ends = [length - 1 for length in self._lengths]
        self._scratch = scratch
        self._computed = 0

    @property
    def over(self) -> bool:
        """Nobody is left."""
        return not any(map(self._present, range(len(self._members))))

    @property
    def decoding(self) -> bool:
        """All prompts are computed."""
        return self._computed == self._width

    def next_step(self, rows: int) -> tuple[list[Share], list[Padding]]:
        """What the next step computes of whom, and what for nobody.

        Args:
            rows: most tokens of a step; a prompt takes several steps where it is too little.

        Returns:
            Decodes of both kinds, in the order of slots; or chunks of prompts.
        """
        return self._decode() if self.decoding else self._prefill(rows)

    def _present(self, index: int) -> bool:
        sequence = self._members[index]
        return sequence.slot == self._slots[index] and sequence.preemptions == self._turns[index]

    def _prefill(self, rows: int) -> tuple[list[Share], list[Padding]]:
        """The next columns of the rectangle of prompts."""
        first = self._computed
        end = min(first + max(rows // len(self._members), 1), self._width)
        shares = [
            Share.next_of(sequence, min(end, self._lengths[index]) - first)
            for index, sequence in enumerate(self._members)
            if first < self._lengths[index] and self._present(index)
        ]
        self._computed = end
        left = len(self._members) * (end - first) - sum(share.chunk.count for share in shares)
        padding = []
        while left > 0:
            count = min(left, self._width)
            padding.append(Padding(Chunk(self._scratch, 0, count, sample=False), (0,) * count))
            left -= count
        return shares, padding

    def _decode(self) -> tuple[list[Share], list[Padding]]:
        """A token of everybody; of those that left the same one again."""
        shares, padding = [], []
        for index, sequence in enumerate(self._members):
            if self._present(index):
                shares.append(Share.next_of(sequence, 1))
                self._ends[index] = shares[-1].chunk.start
            else:
                end = max(self._ends[index], 1)
                padding.append(Padding(Chunk(self._slots[index], end, 1, sample=False), (0,)))
        return shares, padding


class Static:
    """See ``uellm_worker.engine.execution.Execution``. One batch is under way at a time.

    A slot is left to the padding of prompts: a spare one if there is any, else the last; a batch of
    one needs none.

    Args:
        capacity: of the replica.
    """

    def __init__(self, capacity: Capacity) -> None:
        self.name = "static"
        self.depth = 1
        self._capacity = capacity
        self._scratch = capacity.slots if capacity.spare_slots else max(capacity.slots - 1, 1)
        self._batch: StaticBatch | None = None

    @property
    def admits(self) -> bool:
        """Between two batches."""
        return self._batch is None or self._batch.over

    def account(self) -> KvManager:
        """See ``Execution``. Room is left for padding, as far as the longest sequence fits besides.

        It takes the room of one sequence at most, and a block of each that has left the batch.
        """
        capacity = self._capacity
        block = capacity.block_tokens
        longest = -(-capacity.max_tokens // block) * block
        padding = min(longest + self._scratch * block, capacity.kv_tokens - longest)
        return KvManager(
            self._scratch,
            capacity.max_tokens,
            capacity.kv_tokens - max(padding, 0),
            capacity.block_tokens,
            sharing=False,
        )

    def next_step(
        self, roster: Roster, decision: StepDecision, rows: int, burden: Callable[[int], int]
    ) -> tuple[list[Share], list[Padding]]:
        """See ``Execution``. Prompts go by what memory allows alone."""
        del decision, burden
        if self._batch is None or self._batch.over:
            if not roster.running:
                return [], []
            self._batch = StaticBatch(roster.running, self._scratch)
        if self._batch.decoding:
            for sequence in list(roster.running):
                roster.make_room(sequence)
            return self._batch.next_step(rows)
        shares, padding = self._batch.next_step(rows)
        for share in shares:
            # A prompt lies within what was reserved for its sequence.
            roster.kv.grow(share.chunk.slot, share.token_ids)
        return shares, padding

    def start_again(self) -> None:
        """See ``Execution``."""
        self._batch = None
