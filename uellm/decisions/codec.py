"""Dataclasses to protobuf messages that mirror them, and back, by the names of their fields.

A field that the message has goes into it, under its name; there is nothing to write for it here.
Where the message has a place (uint32) for a text, a profile or a view, the thing itself goes into
the table of its kind, once, and its place there into the message.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import IntEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

from uellm.core.request import QuantileFunction, ResourceProfile
from uellm.policy.views import NOT_RECORDED, InFlightView, QueuedView

TABLES: Mapping[type, str] = {
    str: "texts",
    ResourceProfile: "profiles",
    QueuedView: "queued",
    InFlightView: "in_flight",
}
"""What is kept in tables, and the field of a segment that is its table."""


class Interning(Protocol):
    """Tables that are being written."""

    def place(self, kind: type, value: Any) -> int:
        """The place of a value in the table of its kind, where it is put if it is new."""
        ...

    def places(self, kind: type, values: Iterable[Any]) -> list[int]:
        """The places of several values of one kind."""
        ...


class Interned(Protocol):
    """Tables that are being read."""

    def at(self, kind: type, place: int) -> Any:
        """The value at a place of the table of its kind."""
        ...

    def several(self, kind: type, places: Iterable[int]) -> list[Any]:
        """The values at several places."""
        ...


_Encode = Callable[[Any, Interning], Any]
_Decode = Callable[[Any, Interned], Any]


class Codec:
    """One dataclass and the message that mirrors it.

    Args:
        kind: the dataclass.
        descriptor: of the message.
    """

    def __init__(self, kind: type, descriptor: Descriptor) -> None:
        self._kind = kind
        self._message = GetMessageClass(descriptor)
        hints = get_type_hints(kind)
        self._plain: list[str] = []
        self._encoders: list[tuple[str, _Encode]] = []
        self._decoders: list[tuple[str, bool, _Decode | None]] = []
        for each in fields(kind):
            place = descriptor.fields_by_name.get(each.name)
            if place is None:
                continue
            hint, optional = _required(hints[each.name])
            encode, decode = _conversion(hint, place)
            if encode is None:
                self._plain.append(each.name)
            else:
                self._encoders.append((each.name, encode))
            self._decoders.append((each.name, optional, decode))

    def encode(self, value: Any, tables: Interning) -> Any:
        """The message of a dataclass."""
        # Absent is what is None: protobuf takes it so.
        given: dict[str, Any] = {name: getattr(value, name) for name in self._plain}
        for name, encode in self._encoders:
            part = getattr(value, name)
            if part is not None:
                given[name] = encode(part, tables)
        return self._message(**given)

    def decode(self, message: Any, tables: Interned) -> Any:
        """The dataclass of a message."""
        given: dict[str, Any] = {}
        for name, optional, decode in self._decoders:
            if optional and not message.HasField(name):
                given[name] = None
                continue
            part = getattr(message, name)
            given[name] = part if decode is None else decode(part, tables)
        return self._kind(**given)


@cache
def codec(kind: type, descriptor: Descriptor) -> Codec:
    """The codec of a dataclass and its message."""
    return Codec(kind, descriptor)


def missing_fields(kind: type, descriptor: Descriptor) -> list[str]:
    """Fields, of a dataclass or of those within it, that the message has no place for."""
    missing = []
    hints = get_type_hints(kind)
    recorded = [each.name for each in fields(kind) if NOT_RECORDED not in each.metadata]
    for name, hint in ((name, hints[name]) for name in recorded):
        place = descriptor.fields_by_name.get(name)
        if place is None:
            missing.append(f"{kind.__name__}.{name}")
            continue
        inner = _innermost(hint)
        message = place.message_type
        if message is not None and message.GetOptions().map_entry:
            message = message.fields_by_name["value"].message_type
        if message is not None and isinstance(inner, type) and is_dataclass(inner):
            missing += missing_fields(inner, message)
    return missing


def _required(hint: Any) -> tuple[Any, bool]:
    """A type without None, and whether it had it."""
    if get_origin(hint) in (Union, UnionType):
        (kind,) = [part for part in get_args(hint) if part is not NoneType]
        return kind, True
    return hint, False


def _innermost(hint: Any) -> type:
    kind, _ = _required(hint)
    parts = [part for part in get_args(kind) if part is not Ellipsis]
    return _innermost(parts[-1]) if parts else kind


def _conversion(hint: Any, place: FieldDescriptor) -> tuple[_Encode | None, _Decode | None]:
    """How a field of that type goes into that place, and back; None: as it is."""
    origin = get_origin(hint)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(hint, place.message_type)
    if origin is not None and issubclass(origin, Sequence | frozenset):
        (kind, *_) = get_args(hint)
        return _several(kind, frozenset if issubclass(origin, frozenset) else tuple, place)
    return _single(hint, place)


def _several(
    kind: Any, container: Callable[[Iterable[Any]], Any], place: FieldDescriptor
) -> tuple[_Encode, _Decode]:
    one, back = _single(kind, place)
    if _is_place(kind, place):
        return (
            lambda values, tables: tables.places(kind, values),
            lambda parts, tables: container(tables.several(kind, parts)),
        )
    return (
        lambda values, tables: [_apply(one, value, tables) for value in values],
        lambda parts, tables: container([_apply(back, part, tables) for part in parts]),
    )


def _mapping(hint: Any, entry: Any) -> tuple[_Encode, _Decode]:
    keys, values = (
        _single(kind, entry.fields_by_name[name])
        for kind, name in zip(get_args(hint), ("key", "value"), strict=True)
    )

    def encode(mapping: Mapping[Any, Any], tables: Interning) -> dict[Any, Any]:
        return {
            _apply(keys[0], key, tables): _apply(values[0], value, tables)
            for key, value in mapping.items()
        }

    def decode(parts: Mapping[Any, Any], tables: Interned) -> dict[Any, Any]:
        return {
            _apply(keys[1], key, tables): _apply(values[1], parts[key], tables) for key in parts
        }

    return encode, decode


def _apply(convert: Callable[[Any, Any], Any] | None, value: Any, tables: Any) -> Any:
    return value if convert is None else convert(value, tables)


def _is_place(kind: Any, place: FieldDescriptor) -> bool:
    return kind in TABLES and place.type == FieldDescriptor.TYPE_UINT32


def _single(kind: Any, place: FieldDescriptor) -> tuple[_Encode | None, _Decode | None]:
    if _is_place(kind, place):
        return (
            lambda value, tables: tables.place(kind, value),
            lambda part, tables: tables.at(kind, part),
        )
    inner: Any = place.message_type
    if kind is QuantileFunction:
        message = GetMessageClass(inner)
        return (
            lambda value, _: message(levels=value.levels, values=value.values),
            lambda part, _: QuantileFunction(part.levels, part.values),
        )
    if isinstance(kind, type) and is_dataclass(kind):
        mirror = codec(kind, inner)
        return mirror.encode, mirror.decode
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        return None, lambda part, _: kind(part)
    return None, None
