"""Stop strings: the answer ends before the first of them, and none of it is ever sent."""

from collections.abc import Sequence


def _failures(pattern: str) -> list[int]:
    """Per length of a match, the longest shorter one that it ends with (Knuth, Morris, Pratt)."""
    table = [0] * (len(pattern) + 1)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length]
        if pattern[i] == pattern[length]:
            length += 1
        table[i + 1] = length
    return table


class StopChecker:
    """Finds the stop string that is complete first; of several at one place, the longest.

    The outcome does not depend on how the text is cut into pushes.

    Args:
        stops: the stop strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._patterns = [(stop, _failures(stop)) for stop in sorted(set(stops), key=len)]
        self._matched = [0] * len(self._patterns)
        self._held = ""
        self._stopped: str | None = None

    @property
    def pending(self) -> bool:
        """Whether text is held back."""
        return bool(self._held)

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that may be sent, and the stop string once one is complete.

        What may still become a stop string is held back. After a stop nothing more comes.
        """
        if not self._patterns:
            return text, None
        if self._stopped is not None:
            return "", self._stopped
        buffer = self._held + text
        start = len(self._held)
        for i in range(start, len(buffer)):
            found = self._step(buffer[i])
            if found is not None:
                self._held = ""
                self._stopped = found
                return buffer[: i + 1 - len(found)], found
        keep = len(buffer) - max(self._matched)
        self._held = buffer[keep:]
        return buffer[:keep], None

    def flush(self) -> str:
        """What was held back, at the end of an answer that met no stop string."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        """Advance every pattern by one character; the longest one that is now complete."""
        found = None
        for i, (pattern, failures) in enumerate(self._patterns):
            length = self._matched[i]
            while length and pattern[length] != character:
                length = failures[length]
            if pattern[length] == character:
                length += 1
            if length == len(pattern):
                found = pattern
                length = failures[length]
            self._matched[i] = length
        return found
