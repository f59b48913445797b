"""Records in segments: what an entry of the stream of decisions holds."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from uellm import __version__
from uellm.core.errors import InvalidArgumentError
from uellm.decisions.codec import TABLES, codec
from uellm.decisions.records import DispatchRecord, Record, StepRecord
from uellm.v1.decisions_pb2 import DecisionSegment

VERSION = 1
"""Rises when an older reader would misread what is written."""
MOST_ENTRIES = 4096
"""So many entries of tables are remembered in bytes."""

_FIELDS = DecisionSegment.DESCRIPTOR.fields_by_name
_DISPATCH = codec(DispatchRecord, _FIELDS["dispatches"].message_type)
_STEP = codec(StepRecord, _FIELDS["steps"].message_type)
_ENTRIES = {
    kind: codec(kind, _FIELDS[table].message_type)
    for kind, table in TABLES.items()
    if kind is not str
}


class Entries:
    """Entries of tables in bytes, for the segments that they stand in one after the other."""

    def __init__(self) -> None:
        # With the value, so that no other one can have its id.
        self._known: dict[int, tuple[Any, bytes]] = {}

    def bytes_of(self, kind: type, value: Any) -> bytes:
        """A segment with nothing but this entry."""
        known = self._known.get(id(value))
        if known is None:
            segment = DecisionSegment()
            getattr(segment, TABLES[kind]).append(_ENTRIES[kind].encode(value, _NOTHING))
            if len(self._known) >= MOST_ENTRIES:
                self._known.clear()
            known = self._known[id(value)] = (value, segment.SerializeToString())
        return known[1]


class _Nothing:
    """Tables for what refers to none."""

    def place(self, kind: type, value: Any) -> int:
        raise TypeError(f"an entry of a table refers to {kind.__name__} {value!r}")

    def places(self, kind: type, values: Iterable[Any]) -> list[int]:
        return [self.place(kind, value) for value in values]


_NOTHING = _Nothing()


class SegmentWriter:
    """Records that become one segment, with what several of them saw written once.

    Args:
        entries: of the segments before, most of which stand in this one too.
    """

    def __init__(self, entries: Entries | None = None) -> None:
        self._segment = DecisionSegment(version=VERSION, release=__version__)
        self._entries = entries or Entries()
        self._written: list[bytes] = []
        self._texts: dict[str, int] = {}
        self._places: dict[int, int] = {}
        self._counts = dict.fromkeys(_ENTRIES, 0)
        self._kept: list[Any] = []
        self.records = 0

    def add(self, record: Record) -> None:
        """Write a record behind the others."""
        if isinstance(record, DispatchRecord):
            self._segment.dispatches.append(_DISPATCH.encode(record, self))
        else:
            self._segment.steps.append(_STEP.encode(record, self))
        self.records += 1

    def place(self, kind: type, value: Any) -> int:
        """See ``uellm.decisions.codec.Interning``. Views are told apart as objects."""
        if kind is str:
            place = self._texts.get(value)
            if place is None:
                if not isinstance(value, str):
                    raise TypeError(f"{value!r} is no text")
                place = self._texts[value] = len(self._texts)
            return place
        place = self._places.get(id(value))
        if place is None:
            self._written.append(self._entries.bytes_of(kind, value))
            place = self._places[id(value)] = self._counts[kind]
            self._counts[kind] += 1
            self._kept.append(value)
        return place

    def places(self, kind: type, values: Iterable[Any]) -> list[int]:
        """See ``uellm.decisions.codec.Interning``. Most values have a place already."""
        values = list(values)
        found: Iterable[int | None] = (
            map(self._texts.get, values) if kind is str else map(self._places.get, map(id, values))
        )
        return [
            self.place(kind, value) if place is None else place
            for value, place in zip(values, found, strict=True)
        ]

    @property
    def size(self) -> int:
        """Bytes so far, about."""
        return self._segment.ByteSize() + sum(map(len, self._written))

    def message(self, dropped: int = 0) -> DecisionSegment:
        """The segment. Nothing can be added behind it.

        Args:
            dropped: decisions that could not be kept since the segment before.
        """
        segment = self._segment
        segment.dropped = dropped
        segment.texts.extend(self._texts)
        segment.MergeFromString(b"".join(self._written))
        return segment


@dataclass(frozen=True, slots=True)
class Segment:
    """What a segment says.

    Attributes:
        records: of both levels, oldest first.
        release: the uellm that decided.
        dropped: decisions that could not be kept since the segment before.
    """

    records: tuple[Record, ...]
    release: str
    dropped: int


class _Tables:
    """The tables of a segment; what stands in several records is one object, as it was."""

    def __init__(self, segment: DecisionSegment) -> None:
        self._tables: dict[type, Any] = {k: getattr(segment, name) for k, name in TABLES.items()}
        self._read: dict[type, list[Any]] = {
            kind: list(table) if kind is str else [None] * len(table)
            for kind, table in self._tables.items()
        }

    def at(self, kind: type, place: int) -> Any:
        read = self._read[kind]
        value = read[place]
        if value is None:
            value = read[place] = _ENTRIES[kind].decode(self._tables[kind][place], self)
        return value

    def several(self, kind: type, places: Iterable[int]) -> list[Any]:
        read = self._read[kind]
        values = [read[place] for place in places]
        if None in values:
            return [self.at(kind, place) for place in places]
        return values


def read_segment(message: DecisionSegment) -> Segment:
    """The records of a segment.

    Raises:
        InvalidArgumentError: if it is of a newer format, or no segment at all.
    """
    if not 1 <= message.version <= VERSION:
        raise InvalidArgumentError(
            f"version: {message.version}; this uellm reads recorded decisions of versions 1 to "
            f"{VERSION}: use the one that recorded them ({message.release or 'unknown'})",
            field="version",
        )
    tables = _Tables(message)
    try:
        records = [
            *(_DISPATCH.decode(record, tables) for record in message.dispatches),
            *(_STEP.decode(record, tables) for record in message.steps),
        ]
    except (IndexError, ValueError) as error:
        raise InvalidArgumentError(
            f"dispatches, steps: a record refers to what the segment does not hold ({error}); "
            "export the decisions again"
        ) from None
    records.sort(key=lambda record: record.now)
    return Segment(tuple(records), message.release, message.dropped)
