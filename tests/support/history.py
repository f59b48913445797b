"""What happened, and whether it was allowed to: a history checker in the manner of Jepsen.

Actors write down what they were told; what Redis holds in the end is read from it. Tokens are a
function of the request's seed and the position, so that every one of them can be checked.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from uellm_worker.engine.randomness import instant_token

from tests.support.queues import unrest
from uellm.streams.gateway_queue import GatewayQueue
from uellm.streams.messages import TERMINAL, Record
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import common_pb2, queue_pb2

VOCAB_SIZE = 1000


def oracle(seed: int, offset: int, count: int) -> list[int]:
    """The tokens of an answer from ``offset`` on."""
    return [instant_token(seed, offset + i, VOCAB_SIZE) for i in range(count)]


# ---- what actors write down ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accepted:
    """A gateway was told that a request is durable; ``key`` may be empty."""

    request_id: str
    tenant: str
    key: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """A scheduler read that a request waits, under this generation, with this many tokens."""

    request_id: str
    generation: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Logged:
    """A leader was told that its tokens are logged."""

    request_id: str
    generation: int
    offset: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """Somebody was told that a request ended so by their own hand."""

    request_id: str
    state: str


@dataclass(frozen=True, slots=True)
class Delivered:
    """A client got a whole answer and its end."""

    request_id: str
    ids: tuple[int, ...]
    state: str


Event = Accepted | Waiting | Logged | Ended | Delivered


# ---- what Redis holds in the end -----------------------------------------------------------------


@dataclass(slots=True)
class Remains:
    """One model's state, once everything should have ended."""

    records: dict[str, Record] = field(default_factory=dict)
    logs: dict[str, list[queue_pb2.LogChunk]] = field(default_factory=dict)
    frames: dict[str, list[queue_pb2.FrameEntry]] = field(default_factory=dict)
    completions: list[queue_pb2.CompletionEvent] = field(default_factory=list)
    unrest: list[str] = field(default_factory=list)


async def collect(redis: Any, model: str) -> Remains:
    """Read everything that is left of a model."""
    queue = GatewayQueue(redis, model)
    prefix = queue.keys.prefix
    remains = Remains(unrest=await unrest(redis, model))
    async for raw in redis.scan_iter(match=f"{prefix}*", count=1000):
        kind, _, name = raw.decode().removeprefix(prefix).partition(":")
        if kind == "request":
            remains.records[name] = await queue.record(name)
        elif kind == "log":
            remains.logs[name] = await queue.read_log(name, 0)
        elif kind == "frames":
            _, frames = await queue.read_frames(name, "0", 1)
            remains.frames[name] = [entry for frame in frames for entry in frame.entries]
    _, remains.completions = await SchedulerQueue(redis, model).read_completions("0", 20_000, None)
    return remains


# ---- whether it was allowed ----------------------------------------------------------------------


def violations(history: Sequence[Event], remains: Remains) -> list[str]:
    """Everything about a history that must not be; empty if it is a good one."""
    return [
        *(f"not at rest: {what}" for what in remains.unrest),
        *_ends(history, remains),
        *_keys(history, remains),
        *_contents(remains),
        *_generations(history, remains),
        *_after_the_end(remains),
        *_acknowledged(history, remains),
    ]


def _of(history: Iterable[Event], kind: type) -> Iterator[Any]:
    return (event for event in history if isinstance(event, kind))


def _ends(history: Sequence[Event], remains: Remains) -> Iterator[str]:
    """Every accepted request has exactly one end, and everybody is told the same one."""
    for event in _of(history, Accepted):
        if event.request_id not in remains.records:
            yield f"{event.request_id}: accepted, but there is no record"
    told = Counter(completion.request_id for completion in remains.completions)
    for request_id, record in remains.records.items():
        if record.state not in TERMINAL:
            yield f"{request_id}: {record.state}, not ended"
        if told[request_id] != int(record.ended and not _refused(record)):
            yield f"{request_id}: {told[request_id]} completion events"
    for completion in remains.completions:
        record_of = remains.records.get(completion.request_id)
        if record_of is not None and completion.output_tokens != record_of.tokens:
            yield f"{completion.request_id}: completed with {completion.output_tokens} tokens"
    for event in (*_of(history, Ended), *_of(history, Delivered)):
        record_of = remains.records.get(event.request_id)
        state = record_of.state if record_of is not None else "nothing"
        if state != event.state:
            yield f"{event.request_id}: told {event.state}, but it is {state}"


def _refused(record: Record) -> bool:
    """Its end teaches nothing: its scheduler tells nobody."""
    finished = record.finished
    return finished is not None and finished.reason == common_pb2.FINISH_REASON_REFUSED


def _keys(history: Sequence[Event], remains: Remains) -> Iterator[str]:
    """One idempotency key, one request."""
    ids = defaultdict(set)
    for event in _of(history, Accepted):
        if event.key:
            ids[event.tenant, event.key].add(event.request_id)
        record = remains.records.get(event.request_id)
        if record is not None and record.tenant != event.tenant:
            yield f"{event.request_id}: shown to {event.tenant}, which it is not of"
    for key, named in ids.items():
        if len(named) > 1:
            yield f"key {key} names {sorted(named)}"


def _contents(remains: Remains) -> Iterator[str]:
    """Offsets are contiguous, tokens those of the oracle, counts exact."""
    for request_id, record in remains.records.items():
        seed, place = _seed(record), 0
        for chunk in remains.logs.get(request_id, []):
            ids = list(chunk.tokens.ids)
            if chunk.tokens.offset != place:
                yield f"{request_id}: offset {chunk.tokens.offset} where {place} was due"
            if ids != oracle(seed, chunk.tokens.offset, len(ids)):
                yield f"{request_id}: wrong tokens at {chunk.tokens.offset}"
            place = chunk.tokens.offset + len(ids)
        if place != record.tokens:
            yield f"{request_id}: {record.tokens} tokens, {place} logged"
        if record.state == "DONE" and place != record.entry.max_tokens:
            yield f"{request_id}: done after {place} of {record.entry.max_tokens} tokens"
        if record.finished is not None and record.finished.usage.output_tokens != place:
            yield f"{request_id}: finished with {record.finished.usage.output_tokens} tokens"


def _seed(record: Record) -> int:
    # The payload is gone when a request has ended; the tests keep the seed in the entry too.
    return int(record.entry.traceparent)


def _generations(history: Sequence[Event], remains: Remains) -> Iterator[str]:
    """No holder wrote anything after it had been fenced, and each generation had one holder."""
    waiting = defaultdict(set)
    for event in _of(history, Waiting):
        waiting[event.request_id].add((event.generation, event.tokens))
    for request_id, chunks in remains.logs.items():
        writers = defaultdict(set)
        for chunk in chunks:
            start, end = chunk.tokens.offset, chunk.tokens.offset + len(chunk.tokens.ids)
            writers[chunk.generation].add(chunk.tokens.text)
            for generation, tokens in waiting[request_id]:
                if chunk.generation < generation and end > tokens:
                    yield (
                        f"{request_id}: generation {chunk.generation} wrote up to {end}; it had "
                        f"been fenced by {generation} at {tokens}"
                    )
                if chunk.generation > generation and start < tokens:
                    yield f"{request_id}: generation {chunk.generation} wrote at {start} < {tokens}"
        for generation, names in writers.items():
            if len(names) > 1:
                yield f"{request_id}: generation {generation} written by {sorted(names)}"


def _after_the_end(remains: Remains) -> Iterator[str]:
    """A gateway is told an end once, and nothing of the request after it."""
    for gateway, entries in remains.frames.items():
        ended = set()
        for entry in entries:
            if entry.request_id in ended:
                yield f"{entry.request_id}: {entry.WhichOneof('event')} to {gateway} after its end"
            if entry.HasField("finished"):
                ended.add(entry.request_id)


def _acknowledged(history: Sequence[Event], remains: Remains) -> Iterator[str]:
    """What somebody was told is logged is there; what a client got is the log."""
    logged = defaultdict(set)
    for request_id, chunks in remains.logs.items():
        for chunk in chunks:
            logged[request_id].add((chunk.generation, chunk.tokens.offset, tuple(chunk.tokens.ids)))
    for event in _of(history, Logged):
        if (event.generation, event.offset, event.ids) not in logged[event.request_id]:
            yield f"{event.request_id}: acknowledged tokens at {event.offset} are not in the log"
    for event in _of(history, Delivered):
        whole = [i for chunk in remains.logs.get(event.request_id, []) for i in chunk.tokens.ids]
        if list(event.ids) != whole:
            yield f"{event.request_id}: a client got {event.ids} of {whole}"


def state_of(reason: int) -> str:
    """The state behind the reason that a client is told."""
    name = common_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_")
    return {"STOP": "DONE", "LENGTH": "DONE"}.get(name, name)
