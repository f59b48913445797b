"""What could not be measured and why, as long as that says something."""

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Any

from uellm.placement.discovery import LinkKey

KEPT_SECONDS = 600.0
"""What was not tried again for so long is nobody's concern any more."""


@dataclass(frozen=True, slots=True)
class _Note:
    text: str
    at: float
    workers: frozenset[str]


class Notes:
    """By what they are about; a newer one takes the place of an older one.

    Args:
        now: the present, in seconds of any clock.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._notes: dict[Hashable, _Note] = {}

    def add(self, key: Hashable, text: str, workers: Collection[str] = ()) -> None:
        """Note why something was not measured; ``workers``: it is theirs."""
        self._notes[key] = _Note(text, self._now(), frozenset(workers))

    def drop(self, key: Hashable) -> None:
        """It was measured."""
        self._notes.pop(key, None)

    def clear(self) -> None:
        """All of it is measured anew."""
        self._notes.clear()

    def shown(self, workers: Collection[str]) -> list[str]:
        """What there is to say, with its age, while the workers that it is about are there."""
        since = self._now() - KEPT_SECONDS
        there = frozenset(workers)
        self._notes = {
            key: note
            for key, note in self._notes.items()
            if note.at >= since and note.workers <= there
        }
        return [self._aged(self._notes[key]) for key in sorted(self._notes, key=str)]

    def _aged(self, note: _Note) -> str:
        minutes = int((self._now() - note.at) / 60)
        return f"{note.text} ({minutes} min ago)" if minutes else note.text


def name_of(key: Any) -> str:
    """What a measurement is of: a way, or a kind of measurement and a device or worker."""
    match key:
        case LinkKey():
            return f"{key.src[1]} -> {key.dst[1]}"
        case _:
            return " of ".join(map(str, key))


def workers_of(key: Any) -> tuple[str, ...]:
    """Whose it is."""
    match key:
        case LinkKey():
            return key.src[1], key.dst[1]
        case (_, name):
            # A device's id begins with its worker's.
            return (name.rpartition("/")[0] or name,)
        case _:
            return ()
