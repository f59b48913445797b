"""`uellm decisions` and `uellm replay`, behind their options."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from google.protobuf import json_format

from uellm import __version__
from uellm.cli import exits
from uellm.cli.promises import clock
from uellm.core.errors import InvalidArgumentError, NotFoundError
from uellm.decisions.records import Record
from uellm.decisions.replay import Instead, Replay
from uellm.decisions.replay import replay as decide_again
from uellm.decisions.segments import read_segment
from uellm.streams.connection import check, connect
from uellm.streams.decisions import DecisionLog
from uellm.v1.decisions_pb2 import DecisionSegment

STANDARD = Path("-")


async def export(redis_url: str, model: str, out: Path, since_seconds: float | None) -> int:
    """Write the recorded decisions of a model, one segment a line.

    Raises:
        NotFoundError: if there are none.
    """
    redis = connect(redis_url)
    segments = records = 0
    try:
        await check(redis, redis_url)
        since = 0
        if since_seconds is not None:
            seconds, microseconds = await redis.time()
            since = int((seconds - since_seconds) * 1000 + microseconds / 1000)
        with ExitStack() as opened:
            async for segment in DecisionLog(redis, model).all(max(since, 0)):
                if not segments:
                    # Not before there is something to write: what the file holds may be needed.
                    lines = opened.enter_context(_opened(out, "w"))
                fields = json_format.MessageToDict(segment, preserving_proto_field_name=True)
                lines.write(json.dumps(fields, separators=(",", ":")) + "\n")
                segments += 1
                records += len(segment.dispatches) + len(segment.steps)
    finally:
        await redis.aclose()
    if not segments:
        raise NotFoundError(
            f"no recorded decisions of {model!r}{' in that time' if since else ''}; names are "
            "those of `uellm models`, and UELLM_DECISIONS_KEPT is not to be 0",
            field="model",
        )
    sys.stderr.write(f"{records} decisions in {segments} segments\n")
    return exits.OK


def replay(file: Path, policy: str, settings: Sequence[str], *, as_json: bool) -> int:
    """Decide again what a file holds.

    Raises:
        InvalidArgumentError: if the file is none of `uellm decisions`, or there is no such policy
            or setting.
    """
    instead = Instead(policy, _settings(settings))
    as_recorded = instead == Instead()
    releases: set[str] = set()
    result = decide_again(_records(file, releases), instead)
    if not releases:
        raise InvalidArgumentError(
            f"{file}: holds no decisions; `uellm decisions MODEL --out FILE` writes some",
            field="FILE",
        )
    if as_json:
        sys.stdout.write(json.dumps(_fields(result, as_recorded=as_recorded), indent=1) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(result, as_recorded=as_recorded)) + "\n")
    if not (as_recorded and result.different):
        return exits.OK
    if others := releases - {__version__}:
        sys.stderr.write(
            f"recorded by uellm {', '.join(sorted(others))}, decided again by {__version__}: "
            "another release may estimate otherwise\n"
        )
    return exits.FAILED


def _settings(given: Iterable[str]) -> dict[str, str]:
    settings = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not (name and equals):
            raise InvalidArgumentError(f"--set {each}: KEY=VALUE is needed", field="--set")
        settings[name] = value
    return settings


def _records(file: Path, releases: set[str]) -> Iterator[Record]:
    with _opened(file, "r") as lines:
        for number, line in enumerate(lines, 1):
            try:
                segment = json_format.Parse(line, DecisionSegment())
            except (json_format.ParseError, UnicodeError) as error:
                raise InvalidArgumentError(
                    f"{file}, line {number}: not written by `uellm decisions` ({error})",
                    field="FILE",
                ) from None
            read = read_segment(segment)
            releases.add(read.release)
            yield from read.records


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[TextIO]:
    """A file, or a standard stream.

    Raises:
        InvalidArgumentError: if it cannot be opened.
    """
    if path == STANDARD:
        yield sys.stdin if mode == "r" else sys.stdout
        return
    try:
        # What is no text is no JSON either, and is told by its line.
        file = path.open(mode, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InvalidArgumentError(f"{path}: {error.strerror}", field="FILE") from None
    with file:
        yield file  # type: ignore[misc]


def _fields(result: Replay, *, as_recorded: bool) -> dict[str, Any]:
    return {
        "as_recorded": as_recorded,
        "dispatch_decisions": result.dispatches,
        "step_decisions": result.steps,
        "truncated": result.truncated,
        "different": result.different,
        "differences": dict(result.counts),
        "examples": [asdict(example) for example in result.examples],
    }


def _lines(result: Replay, *, as_recorded: bool) -> Iterator[str]:
    again = f"{result.dispatches} dispatch and {result.steps} step decisions made again"
    if result.truncated:
        again += f"; {result.truncated} not, of queues too long to be recorded whole"
    yield again
    if not result.different:
        yield "all came out as recorded"
        return
    yield f"{result.different} came out otherwise: " + ", ".join(
        f"{what} in {count}" for what, count in result.counts.most_common()
    )
    shown = result.examples if not as_recorded else [result.first]
    for example in shown:
        if example is not None:
            yield f"{clock(example.now)} {example.what}"
            yield f"  recorded  {example.recorded}"
            yield f"  now       {example.replayed}"
