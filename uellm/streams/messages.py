"""What travels through a model's queues, as the scripts take and give it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from uellm.core.errors import NotFoundError
from uellm.v1 import common_pb2, inference_pb2, queue_pb2

RETENTION_SECONDS = 3600
REFUSED_RETENTION_SECONDS = 15
"""Who is refused is told at once; under overload that is nearly everybody."""
TERMINAL = frozenset({"DONE", "FAILED", "CANCELLED", "EXPIRED", "DEAD"})


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may wait before new requests are refused."""

    waiting_requests: int = 10_000
    waiting_tokens: int = 20_000_000
    tenant_requests: int = 10_000


@dataclass(frozen=True, slots=True)
class NewRequest:
    """A request to accept; ``content_hash`` tells apart two uses of one idempotency key."""

    request_id: str
    tenant: str
    scope: str
    payload: queue_pb2.RequestPayload
    entry: queue_pb2.RequestEntry
    idempotency_key: str = ""
    content_hash: str = ""
    gateway: str = ""
    cost_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Door:
    """Which share is looked at of those that would rather be refused than late.

    Attributes:
        share: that.
        retry_seconds: the others may try again after so long.
        feasible_seconds: within so long most of those that were looked at, and refused, could have
            been answered; None: not known.
    """

    share: float = 1.0
    retry_seconds: float = 1.0
    feasible_seconds: float | None = None


OPEN = Door()


@dataclass(frozen=True, slots=True)
class AcceptResult:
    """What came of it: ``status`` is ok, existing, mismatch, depth, tokens or tenant."""

    status: str
    request_id: str
    accepted_at: float
    door: Door = OPEN


@dataclass(frozen=True, slots=True)
class QueuedEntry:
    """A request as read from ``requests``; ``fruitless`` starts in a row brought no new token."""

    entry: queue_pb2.RequestEntry
    generation: int
    offset: int
    accepted_at: float
    attempts: int
    strikes: int
    fruitless: int = 0


@dataclass(frozen=True, slots=True)
class BatchMessage:
    """An entry of ``batches:<replica>``: a request to run, or one to drop (``entry`` is None)."""

    entry_id: str
    epoch: int
    request_id: str
    entry: queue_pb2.BatchEntry | None
    cancelled_generation: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """The engine admitted a request."""

    request_id: str
    generation: int


@dataclass(frozen=True, slots=True)
class Append:
    """The engine generated tokens: at least one, since the log is addressed by offset.

    Text that was held back goes with the last token.
    """

    request_id: str
    generation: int
    tokens: inference_pb2.Tokens


@dataclass(frozen=True, slots=True)
class Finish:
    """A request ended. The script adds the exact token count to both messages.

    Of one that no replica held, there may be the promise that it was refused with, or the reason
    why it was given up. Of one that was refused there is no completion: it teaches nothing, and
    under overload there are so many that nothing else would be left in the stream.
    """

    request_id: str
    generation: int
    state: str
    finished: inference_pb2.Finished
    completion: queue_pb2.CompletionEvent | None
    promise: common_pb2.Promise | None = None
    dead_reason: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """A request's record."""

    request_id: str
    state: str
    generation: int
    tokens: int
    tenant: str
    adapter: str
    accepted_at: float
    dispatched_at: float | None
    first_token_at: float | None
    attempts: int
    replica: str
    batch: str
    entry: queue_pb2.RequestEntry
    payload: queue_pb2.RequestPayload
    promise: common_pb2.Promise | None
    finished: inference_pb2.Finished | None
    strikes: int = 0
    epoch: int = 0

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self.state in TERMINAL


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a request is: its state and how many of its tokens are logged."""

    state: str
    tokens: int

    @property
    def ended(self) -> bool:
        """Whether the state is final."""
        return self.state in TERMINAL


@dataclass(frozen=True, slots=True)
class ReplicaRoute:
    """Where a replica's route points, and its latest report."""

    replica: str
    epoch: int
    state: str
    report: queue_pb2.ReplicaReport
    reported_at: float


@dataclass(frozen=True, slots=True)
class Reaped:
    """What a reap did: ``grace`` means that it only renewed leases, after a silence."""

    requeued: tuple[str, ...] = ()
    given_up: tuple[tuple[str, int], ...] = ()
    grace: bool = False


def parse_record(request_id: str, raw: Mapping[bytes, bytes]) -> Record:
    """A record from its hash."""

    def text(name: str) -> str:
        return raw.get(name.encode(), b"").decode()

    def seconds(name: str) -> float | None:
        value = text(name)
        return int(value) / 1000 if value else None

    promise, finished = raw.get(b"promise"), raw.get(b"finished")
    return Record(
        request_id=request_id,
        state=text("state"),
        generation=int(text("generation")),
        tokens=int(text("tokens")),
        tenant=text("tenant"),
        adapter=text("adapter"),
        accepted_at=int(text("accepted_ms")) / 1000,
        dispatched_at=seconds("dispatched_ms"),
        first_token_at=seconds("first_token_ms"),
        attempts=int(text("attempts")),
        replica=text("replica"),
        batch=text("batch"),
        entry=queue_pb2.RequestEntry.FromString(raw.get(b"entry", b"")),
        payload=queue_pb2.RequestPayload.FromString(raw.get(b"payload", b"")),
        promise=common_pb2.Promise.FromString(promise) if promise else None,
        finished=inference_pb2.Finished.FromString(finished) if finished else None,
        strikes=int(text("strikes") or 0),
        epoch=int(text("epoch") or 0),
    )


def parse_door(raw: bytes) -> Door:
    """How wide a model's door is; empty: open."""
    if not raw:
        return OPEN
    share, retry, *feasible = map(float, raw.split())
    return Door(share, retry, feasible[0] if feasible else None)


def parse_queued(fields: Mapping[bytes, bytes]) -> QueuedEntry:
    """A waiting request from its stream fields."""
    return QueuedEntry(
        entry=queue_pb2.RequestEntry.FromString(fields[b"payload"]),
        generation=int(fields[b"generation"]),
        offset=int(fields[b"offset"]),
        accepted_at=int(fields[b"accepted_ms"]) / 1000,
        attempts=int(fields[b"attempts"]),
        strikes=int(fields[b"strikes"]),
        fruitless=int(fields.get(b"fruitless", 0)),
    )


def parse_batch(entry_id: bytes, fields: Mapping[bytes, bytes]) -> BatchMessage:
    """A batch message from its stream fields."""
    cancelled = fields[b"type"] == b"cancel"
    return BatchMessage(
        entry_id=entry_id.decode(),
        epoch=int(fields[b"epoch"]),
        request_id=fields[b"id"].decode(),
        entry=None if cancelled else queue_pb2.BatchEntry.FromString(fields[b"payload"]),
        cancelled_generation=int(fields[b"generation"]) if cancelled else 0,
    )


def parse_policy(raw: bytes | None) -> common_pb2.ModelPolicy | None:
    """What was chosen for a model; None: nothing was."""
    if not raw:
        return None
    try:
        return common_pb2.ModelPolicy.FromString(raw)
    except DecodeError:
        # A name alone, as it was kept before policies had settings.
        return common_pb2.ModelPolicy(policy=raw.decode(errors="replace"))


def pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """The fields of a stream entry as scripts return them: names and values in turn."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def not_found(request_id: str) -> NotFoundError:
    """The error for an id that names nothing this tenant may see."""
    return NotFoundError(
        f"no request {request_id}: it never was, it ended so long ago that nothing is kept of it "
        "(UELLM_RETENTION_SECONDS), or it is another tenant's",
        field="request_id",
        reason="REQUEST_NOT_FOUND",
    )


def operation_arguments(operation: Start | Append | Finish) -> list[Any]:
    """An operation as ``append.lua`` takes it: six arguments."""
    match operation:
        case Start(request_id, generation):
            return ["start", request_id, generation, 0, b"", b""]
        case Append(request_id, generation, tokens):
            count = len(tokens.ids)
            if count == 0:
                raise ValueError(f"Append to {request_id} without tokens: at least one")
            return [
                "tokens",
                request_id,
                generation,
                tokens.offset,
                tokens.SerializeToString(),
                count,
            ]
        case Finish(request_id, generation, state, finished, completion, _, _):
            return [
                "finish",
                request_id,
                generation,
                state,
                finished.SerializeToString(),
                completion.SerializeToString() if completion is not None else b"",
            ]


Entries = list[tuple[bytes, dict[bytes, bytes]]]
"""Of a stream: ids and fields."""


def entries_by_stream(streams: Any) -> dict[bytes, Entries]:
    """The entries of each stream that has any, whichever protocol version answered."""
    if not isinstance(streams, dict):
        return {key: list(entries) for key, entries in streams or ()}
    return {
        key: list(entries[0]) if entries and isinstance(entries[0], list) else list(entries)
        for key, entries in streams.items()
    }


def stream_entries(streams: Any) -> Entries:
    """The same of the one stream asked for."""
    return next(iter(entries_by_stream(streams).values()), [])
