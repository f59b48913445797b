"""`uellm why`, behind its options."""

import sys
from collections.abc import Iterator, Sequence

from google.protobuf.json_format import MessageToJson

from uellm import convert
from uellm.cli import exits
from uellm.client import Client
from uellm.core.durations import show_duration
from uellm.v1.inference_pb2 import ExplainedCause, ExplainedPhase, ExplainResponse

PHASES = {
    "queue": "in the queue",
    "engine": "waiting in the engine",
    "prefill": "to the first token",
    "decode": "decoding",
    "restart": "until it was sent to a replica again",
}
NAMED = 3
"""So many of the requests that went ahead are named."""


async def why(servers: Sequence[str], request_id: str, *, as_json: bool) -> int:
    """Explain a request."""
    async with Client(servers) as client:
        explained = await client.explain(request_id)
    if as_json:
        sys.stdout.write(MessageToJson(explained, preserving_proto_field_name=True) + "\n")
    else:
        sys.stdout.write("\n".join(describe(explained)) + "\n")
    return exits.OK


def describe(explained: ExplainResponse) -> Iterator[str]:
    """An explanation in lines."""
    accepted = convert.seconds(explained.accepted_at)
    yield explained.summary
    yield from _section("Where the time went", [_phase(phase) for phase in explained.phases])
    yield from _section(
        "What happened",
        [
            f"{convert.seconds(event.at) - accepted:+.3f} s  {event.text}"
            for event in explained.events
        ],
    )
    yield from _section("What held it up", [_cause(cause) for cause in explained.causes])
    yield from _section("What would have helped", [f.text for f in explained.counterfactuals])
    yield from _section("What is missing here", list(explained.notes))


def _section(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield ""
        yield title
        yield from (f"  {line}" for line in lines)


def _phase(phase: ExplainedPhase) -> str:
    words = f"{show_duration(phase.seconds)} {PHASES.get(phase.name, phase.name)}"
    if phase.HasField("expected_seconds"):
        words += f" (promised: {show_duration(phase.expected_seconds)})"
    return words


def _cause(cause: ExplainedCause) -> str:
    words = cause.text
    if cause.HasField("seconds"):
        sign = "-" if cause.seconds < 0 else ""
        words = f"{sign}{show_duration(abs(cause.seconds))}: {words}"
    if cause.requests:
        named, more = cause.requests[:NAMED], len(cause.requests) - NAMED
        words += f" ({', '.join(named)}{f' and {more} more' if more > 0 else ''})"
    return words
