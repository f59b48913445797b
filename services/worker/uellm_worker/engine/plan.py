"""One step as it travels between stages: which slots, which positions, and what came of it.

A plan names no token: ids are needed on stage 0 alone, and the sampling parameters of a sequence
travel once, when it is given a slot.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from uellm.v1.common_pb2 import Sampling
from uellm.v1.inference_pb2 import TokenLogprobs

_PLAN = struct.Struct("!QIIII?")
_CHUNK = struct.Struct("!III?")
_ADMISSION = struct.Struct("!IIIi")
_MOVE = struct.Struct("!III")
_RESULT = struct.Struct("!II??")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence that a step computes.

    Attributes:
        slot: where its KV cache lies.
        start: position of the first token; those before it are in the cache.
        count: how many tokens.
        sample: a token follows the last of them.
    """

    slot: int
    start: int
    count: int
    sample: bool


@dataclass(frozen=True, slots=True)
class Release:
    """A slot's memory from a token on is given back; it reads as zeros, or as what it was.

    Attributes:
        slot: whose.
        from_token: the first token that is not needed; if it is 0, nothing of the content stays,
            which may not be finite.
    """

    slot: int
    from_token: int


@dataclass(frozen=True, slots=True)
class Copy:
    """The first tokens of a slot's cache are copied to another slot.

    Attributes:
        source: from where.
        slot: to where.
        tokens: how many.
    """

    source: int
    slot: int
    tokens: int


Move = Release | Copy
"""What happens to the cache before a step is computed."""


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence that was given a slot in this step.

    Attributes:
        slot: the slot; whoever had it before is gone.
        prompt_tokens: where its answer starts; position 0 of the answer is behind it.
        sampling: how its tokens are chosen.
        adapter: index of its LoRA adapter; -1: none.
    """

    slot: int
    prompt_tokens: int
    sampling: Sampling
    adapter: int = -1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes.

    Attributes:
        step: counts the steps of a generation.
        chunks: in row order: decodes by slot, then prefill chunks.
        admissions: new owners of slots.
        token_ids: inputs of all chunks, one after another; stage 0 only.
        seconds: what the stages before this one took to compute it.
        moves: of the cache, to be carried out in this order before anything is computed.
        abandoned: an earlier stage had too little memory for it; nothing is to be computed.
    """

    step: int
    chunks: tuple[Chunk, ...]
    admissions: tuple[Admission, ...] = ()
    token_ids: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    moves: tuple[Move, ...] = ()
    abandoned: bool = False

    @property
    def rows(self) -> int:
        """Tokens in all."""
        return sum(chunk.count for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a step.

    Attributes:
        token_ids: one per chunk that samples, in plan order; -1 where the logits are not finite.
        logprobs: one per token, or empty when no sequence asked for any.
        seconds: what each stage took, in stage order.
        out_of_memory: a stage had too little memory for it, and there are no tokens.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs | None] = ()
    seconds: Sequence[float] = field(default_factory=tuple)
    out_of_memory: bool = False


def encode_plan(plan: StepPlan) -> bytes:
    """A plan without its token ids."""
    lists = (plan.chunks, plan.admissions, plan.seconds, plan.moves)
    parts = [_PLAN.pack(plan.step, *map(len, lists), plan.abandoned)]
    parts += [_CHUNK.pack(c.slot, c.start, c.count, c.sample) for c in plan.chunks]
    parts.append(struct.pack(f"!{len(plan.seconds)}d", *plan.seconds))
    for admission in plan.admissions:
        sampling = admission.sampling.SerializeToString()
        head = (admission.slot, admission.prompt_tokens, len(sampling))
        parts += [_ADMISSION.pack(*head, admission.adapter), sampling]
    parts += [_encode_move(move) for move in plan.moves]
    return b"".join(parts)


def decode_plan(data: bytes) -> tuple[StepPlan, bytes]:
    """The inverse of ``encode_plan``, and what stands behind the plan."""
    step, num_chunks, num_admissions, num_seconds, num_moves, abandoned = _PLAN.unpack_from(data)
    offset = _PLAN.size
    chunks = tuple(
        Chunk(*_CHUNK.unpack_from(data, offset + i * _CHUNK.size)) for i in range(num_chunks)
    )
    offset += num_chunks * _CHUNK.size
    seconds = struct.unpack_from(f"!{num_seconds}d", data, offset)
    offset += num_seconds * 8
    admissions = []
    for _ in range(num_admissions):
        slot, prompt_tokens, length, adapter = _ADMISSION.unpack_from(data, offset)
        offset += _ADMISSION.size
        sampling = Sampling.FromString(data[offset : offset + length])
        admissions.append(Admission(slot, prompt_tokens, sampling, adapter))
        offset += length
    moves = tuple(_decode_move(data, offset + i * _MOVE.size) for i in range(num_moves))
    offset += num_moves * _MOVE.size
    plan = StepPlan(
        step, chunks, tuple(admissions), seconds=seconds, moves=moves, abandoned=abandoned
    )
    return plan, data[offset:]


def _encode_move(move: Move) -> bytes:
    """A release goes as a copy of a slot to itself."""
    if isinstance(move, Release):
        return _MOVE.pack(move.slot, move.slot, move.from_token)
    return _MOVE.pack(move.source, move.slot, move.tokens)


def _decode_move(data: bytes, offset: int) -> Move:
    """The inverse of ``_encode_move``."""
    source, slot, tokens = _MOVE.unpack_from(data, offset)
    return Release(slot, tokens) if source == slot else Copy(source, slot, tokens)


def encode_result(result: StepResult) -> bytes:
    """A result as the last stage sends it to the first."""
    count = len(result.token_ids)
    parts = [
        _RESULT.pack(count, len(result.seconds), bool(result.logprobs), result.out_of_memory),
        struct.pack(f"!{count}q{len(result.seconds)}d", *result.token_ids, *result.seconds),
    ]
    for logprobs in result.logprobs:
        # One byte more than the length, so that "none" and "empty" stay apart.
        body = b"" if logprobs is None else b"+" + logprobs.SerializeToString()
        parts += [struct.pack("!I", len(body)), body]
    return b"".join(parts)


def decode_result(data: bytes) -> StepResult:
    """The inverse of ``encode_result``."""
    count, num_seconds, has_logprobs, out_of_memory = _RESULT.unpack_from(data)
    values = struct.unpack_from(f"!{count}q{num_seconds}d", data, _RESULT.size)
    offset = _RESULT.size + 8 * (count + num_seconds)
    logprobs: list[TokenLogprobs | None] = []
    for _ in range(count if has_logprobs else 0):
        (length,) = struct.unpack_from("!I", data, offset)
        body = data[offset + 4 : offset + 4 + length]
        logprobs.append(TokenLogprobs.FromString(body[1:]) if body else None)
        offset += 4 + length
    return StepResult(values[:count], logprobs, values[count:], out_of_memory)
