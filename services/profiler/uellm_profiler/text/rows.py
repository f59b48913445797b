"""Completions that are kept to learn from again, shared fairly among what is served."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from uellm.prediction.interface import State

Key = tuple[str, str, str]
"""Model, adapter, sampling regime: what has lengths of its own."""


@dataclass(frozen=True, slots=True)
class Row:
    """A completion.

    Attributes:
        number: it is the so manieth that was taught.
        length: tokens.
        censored: it was cut; the true length is at least ``length``.
        record: what was seen of the prompt.
    """

    number: int
    length: int
    censored: bool
    record: bytes


SILENT = 4
"""A key of which nothing came while so many times the most rows were taught is given up."""


class Rows:
    """The latest completions of each key; where there are too many, the fullest loses its oldest.

    One that has fallen silent, as models do that are withdrawn, loses its own before.

    Args:
        most: rows kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._rows: dict[Key, deque[Row]] = {}
        self._kept = 0
        self.taught = 0

    def __len__(self) -> int:
        return self._kept

    def add(self, key: Key, length: int, censored: bool, record: bytes) -> None:
        """Keep one more."""
        # Taken out and put back, so that the dictionary's order is that of last use.
        rows = self._rows[key] = self._rows.pop(key, deque())
        rows.append(Row(self.taught, length, censored, record))
        self.taught += 1
        self._kept += 1
        if self._kept > self._most:
            loser = self._loser()
            self._rows[loser].popleft()
            self._kept -= 1
            if not self._rows[loser]:
                del self._rows[loser]

    def _loser(self) -> Key:
        """Whose oldest gives way."""
        oldest = next(iter(self._rows))
        if self.taught - self._rows[oldest][-1].number > SILENT * self._most:
            return oldest
        return max(self._rows, key=lambda each: len(self._rows[each]))

    def __iter__(self) -> Iterator[tuple[Key, Row]]:
        """All of them, as they were taught."""
        every = [(key, row) for key, rows in self._rows.items() for row in rows]
        return iter(sorted(every, key=lambda each: each[1].number))

    def since(self, number: int) -> list[tuple[Key, Row]]:
        """Those that were taught from a number on."""
        late = []
        for key, rows in self._rows.items():
            for row in reversed(rows):
                if row.number < number:
                    break
                late.append((key, row))
        return sorted(late, key=lambda each: each[1].number)

    def state(self) -> State:
        """Arrays that ``load`` takes."""
        keys = {key: i for i, key in enumerate(self._rows)}
        rows = list(self)
        return {
            "rows_taught": np.array(self.taught),
            "rows_keys": np.array(list(keys), dtype=np.str_).reshape(len(keys), 3),
            "rows_key": np.array([keys[key] for key, _ in rows], dtype=np.int32),
            "rows_number": np.array([row.number for _, row in rows], dtype=np.int64),
            "rows_length": np.array([row.length for _, row in rows], dtype=np.int64),
            "rows_censored": np.array([row.censored for _, row in rows], dtype=np.bool_),
            "rows_size": np.array([len(row.record) for _, row in rows], dtype=np.int64),
            "rows_records": np.frombuffer(b"".join(r.record for _, r in rows), dtype=np.uint8),
        }

    def load(self, state: State) -> None:
        """Take the place of those that made this state.

        Raises:
            KeyError, ValueError, IndexError: if it is none.
        """
        keys = [(str(m), str(a), str(r)) for m, a, r in state["rows_keys"]]
        records = state["rows_records"].tobytes()
        ends = np.cumsum(state["rows_size"]).tolist()
        loaded: dict[Key, deque[Row]] = {key: deque() for key in keys}
        columns = (
            state[f"rows_{name}"].tolist() for name in ("key", "number", "length", "censored")
        )
        start = 0
        for end, key, number, length, censored in zip(ends, *columns, strict=True):
            loaded[keys[key]].append(Row(number, length, censored, records[start:end]))
            start = end
        self.taught = int(state["rows_taught"])
        self._rows = {key: rows for key, rows in loaded.items() if rows}
        self._kept = len(ends)
