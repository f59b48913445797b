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

_FIELDS = DecisionSegment.DESCRIPTOR.fields_by_name
_DISPATCH = codec(DispatchRecord, _FIELDS["dispatches"].message_type)
_STEP = codec(StepRecord, _FIELDS["steps"].message_type)
_ENTRIES = {
    kind: codec(kind, _FIELDS[table].message_type)
    for kind, table in TABLES.items()
    if kind is not str
}


class SegmentWriter:
    """Records that become one segment, with what several of them saw written once."""

    def __init__(self) -> None:
        self._segment = DecisionSegment(version=VERSION, release=__version__)
        self._texts: dict[str, int] = {}
        self._places: dict[int, int] = {}
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
                place = self._texts[value] = len(self._texts)
                self._segment.texts.append(value)
            return place
        place = self._places.get(id(value))
        if place is None:
            table = getattr(self._segment, TABLES[kind])
            message = _ENTRIES[kind].encode(value, self)
            place = self._places[id(value)] = len(table)
            table.append(message)
            self._kept.append(value)
        return place

    def places(self, kind: type, values: Iterable[Any]) -> list[int]:
        """See ``uellm.decisions.codec.Interning``. Most values have a place already."""
        try:
            if kind is str:
                return [self._texts[value] for value in values]
            return [self._places[id(value)] for value in values]
        except KeyError:
            return [self.place(kind, value) for value in values]

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._segment.ByteSize()

    def message(self, dropped: int = 0) -> DecisionSegment:
        """The segment.

        Args:
            dropped: decisions that could not be kept since the segment before.
        """
        self._segment.dropped = dropped
        return self._segment


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
        self._segment = segment
        self._read: dict[tuple[type, int], Any] = {}

    def at(self, kind: type, place: int) -> Any:
        if kind is str:
            return self._segment.texts[place]
        value = self._read.get((kind, place))
        if value is None:
            message = getattr(self._segment, TABLES[kind])[place]
            value = self._read[kind, place] = _ENTRIES[kind].decode(message, self)
        return value


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
