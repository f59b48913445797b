"""Requests from a CSV file of what arrived somewhere.

Columns ``arrival_s,prompt_tokens,output_tokens`` and, where they are known,
``deadline_s,ttft_s,tpot_s,class,tenant``; times in seconds, empty for none, arrivals from any zero,
in any order. Other columns are passed over, unless they look like a misspelt one of these.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from math import isfinite
from pathlib import Path

from uellm.core.errors import InvalidArgumentError
from uellm.simulator.requests import Request

_REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
_SECONDS = ("deadline_s", "ttft_s", "tpot_s")
_NAMES = ("class", "tenant")
_MOST_TOKENS = 10_000_000
_MOST_SECONDS = 1e10
"""Of what is farther off, a step would be lost by rounding; times since the epoch are not."""


def read_trace(path: Path, *, load: float = 1.0, most: int | None = None) -> list[Request]:
    """The requests of a trace, in order of arrival.

    Args:
        path: of the file.
        load: arrivals come so many times as fast.
        most: only so many first are read.

    Raises:
        InvalidArgumentError: if it cannot be read; it names the line and the column.
    """
    try:
        # Spreadsheets begin a file with a byte order mark.
        with path.open(newline="", encoding="utf-8-sig") as file:
            found = sorted(_requests(path, file), key=lambda request: request.arrival)[:most]
    except OSError as error:
        raise _unread(path, str(error.strerror)) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise _unread(path, f"no CSV file ({error})") from error
    if not found:
        raise InvalidArgumentError(f"workload: {path} has no requests", field="workload")
    longest = max(request.output_tokens for request in found)
    return [
        replace(
            request,
            request_id=f"r{i:07d}",
            arrival=(request.arrival - found[0].arrival) / load,
            max_tokens=longest,
        )
        for i, request in enumerate(found)
    ]


def _unread(path: Path, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"workload: {path}: {why}", field="workload")


def _requests(path: Path, file: Iterable[str]) -> Iterator[Request]:
    reader = csv.DictReader(file)
    _check_columns(path, reader.fieldnames or ())
    for row in reader:
        where = f"{path}:{reader.line_num}"
        deadline, ttft, tpot = (_seconds(row, name, where) for name in _SECONDS)
        yield Request(
            request_id="",
            arrival=_time(row, "arrival_s", where),
            prompt_tokens=_count(row, "prompt_tokens", where),
            output_tokens=_count(row, "output_tokens", where),
            kind=(row.get("class") or "").strip() or "all",
            max_tokens=0,
            deadline=deadline,
            ttft=ttft,
            tpot=tpot,
            tenant=(row.get("tenant") or "").strip() or "local",
        )


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    """Check that all are there, and none that looks like one which is read is passed over."""
    known = (*_REQUIRED, *_SECONDS, *_NAMES)
    needed = f"needed: {', '.join(_REQUIRED)}; further: {', '.join((*_SECONDS, *_NAMES))}"
    for name in _REQUIRED:
        if name not in columns:
            raise _unread(path, f"column {name} is missing; {needed}")
    absent = [name for name in known if name not in columns]
    for name in columns:
        if columns.count(name) > 1:
            raise _unread(path, f"column {name} is there {columns.count(name)} times")
        meant = get_close_matches(name.strip().lower(), absent, n=1, cutoff=0.7)
        if name not in known and meant:
            raise _unread(
                path, f"column {name!r}: is {meant[0]} meant? rename or drop it; {needed}"
            )


def _seconds(row: Mapping[str, str | None], name: str, where: str) -> float | None:
    if not (row.get(name) or "").strip():
        return None
    value = _time(row, name, where)
    if value <= 0:
        raise _wrong(row, name, where, "seconds above 0, or empty")
    return value


def _count(row: Mapping[str, str | None], name: str, where: str) -> int:
    value = _number(row, name, where)
    if not (value.is_integer() and 1 <= value <= _MOST_TOKENS):
        raise _wrong(row, name, where, f"a whole number from 1 to {_MOST_TOKENS}")
    return int(value)


def _number(row: Mapping[str, str | None], name: str, where: str) -> float:
    try:
        value = float(row.get(name) or "")
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise _wrong(row, name, where, "a number")
    return value


def _time(row: Mapping[str, str | None], name: str, where: str) -> float:
    value = _number(row, name, where)
    if abs(value) > _MOST_SECONDS:
        raise _wrong(row, name, where, f"seconds, {_MOST_SECONDS:g} at most")
    return value


def _wrong(
    row: Mapping[str, str | None], name: str, where: str, wanted: str
) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"workload: {where}: {name}: {row.get(name) or ''!r} is not {wanted}", field="workload"
    )
