"""Steps under way: what each computes of whom, until its result comes."""

from dataclasses import dataclass

from uellm_worker.engine.plan import Admission, Chunk, Move, StepPlan
from uellm_worker.engine.sequences import Sequence


@dataclass(frozen=True, slots=True)
class Share:
    """What a step computes of one sequence.

    Attributes:
        sequence: whose tokens.
        turn: which of its turns in a slot it is in.
        chunk: which tokens.
        decode: the only one is the newest of an answer.
    """

    sequence: Sequence
    turn: int
    chunk: Chunk
    decode: bool

    @classmethod
    def next_of(cls, sequence: Sequence, most: int) -> "Share":
        """The next tokens of a sequence that has a slot, at most so many."""
        start = sequence.computed_tokens
        count = min(most, len(sequence.tokens) - start)
        chunk = Chunk(sequence.slot, start, count, sample=start + count == len(sequence.tokens))
        return cls(sequence, sequence.preemptions, chunk, decode=sequence.decoding)

    @property
    def token_ids(self) -> list[int]:
        """The tokens."""
        chunk = self.chunk
        return self.sequence.tokens[chunk.start : chunk.start + chunk.count]

    @property
    def wanted(self) -> bool:
        """The sequence is still in its turn; else the step's result is of no use to it."""
        return self.sequence.slot >= 0 and self.sequence.preemptions == self.turn


@dataclass(frozen=True, slots=True)
class Flight:
    """A step under way.

    Attributes:
        plan: what is computed.
        group: of which slots.
        shares: of whom, in the plan's order.
        submitted_at: when, in seconds of a monotonic clock.
        alone: no other step was under way then.
    """

    plan: StepPlan
    group: int
    shares: tuple[Share, ...]
    submitted_at: float
    alone: bool

    @property
    def decodes(self) -> list[Share]:
        """The shares that decode."""
        return [share for share in self.shares if share.decode]


def make_plan(
    step: int,
    shares: tuple[Share, ...],
    admissions: tuple[Admission, ...],
    moves: tuple[Move, ...],
) -> StepPlan:
    """The plan of a step."""
    return StepPlan(
        step=step,
        chunks=tuple(share.chunk for share in shares),
        admissions=admissions,
        token_ids=tuple(token for share in shares for token in share.token_ids),
        moves=moves,
    )
