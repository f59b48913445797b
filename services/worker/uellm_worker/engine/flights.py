"""Steps under way: what each computes of whom, until its result comes."""

from collections.abc import Iterable
from dataclasses import dataclass

from uellm.core.cost import chunk_pairs
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
class Padding:
    """Tokens that are computed for the sake of a batch's shape.

    Attributes:
        chunk: where; nothing is sampled.
        token_ids: any.
    """

    chunk: Chunk
    token_ids: tuple[int, ...]


Work = tuple[int, int, float]
"""What steps compute: tokens, context that decodes attend to, pairs of tokens within prompts."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A step under way.

    Attributes:
        plan: what is computed.
        group: of which slots.
        shares: of whom, in the plan's order.
        submitted_at: when, in seconds of a monotonic clock.
        alone: no other step was under way then.
        began_at: from when on its time counts: the end of the step before it, or when there was
            something to do.
        ended_before: the work of all steps that had ended by then.
    """

    plan: StepPlan
    group: int
    shares: tuple[Share, ...]
    submitted_at: float
    alone: bool
    began_at: float
    ended_before: Work

    @property
    def decodes(self) -> list[Share]:
        """The shares that decode."""
        return [share for share in self.shares if share.decode]

    @property
    def pairs(self) -> float:
        """Pairs of tokens that attention forms in the shares of prompts."""
        chunks = [share.chunk for share in self.shares if not share.decode]
        return sum(chunk_pairs(chunk.start, chunk.count) for chunk in chunks)


def make_plan(
    step: int,
    shares: Iterable[Share],
    admissions: tuple[Admission, ...],
    moves: tuple[Move, ...],
    padding: Iterable[Padding] = (),
) -> StepPlan:
    """The plan of a step; decodes of both kinds come in the order of slots, then prompts."""
    pieces = [(share.chunk, share.decode, tuple(share.token_ids)) for share in shares]
    pieces += [(each.chunk, each.chunk.start > 0, each.token_ids) for each in padding]
    decodes = sorted((p for p in pieces if p[1]), key=lambda piece: piece[0].slot)
    ordered = decodes + [piece for piece in pieces if not piece[1]]
    return StepPlan(
        step=step,
        chunks=tuple(chunk for chunk, _, _ in ordered),
        admissions=admissions,
        token_ids=tuple(token for _, _, token_ids in ordered for token in token_ids),
        moves=moves,
    )
