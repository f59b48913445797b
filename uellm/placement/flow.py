"""The most that flows from a source to a sink (Edmonds and Karp, 1972)."""

from collections import deque
from collections.abc import Mapping

_LEAST = 1e-9
Edge = tuple[int, int]


def max_flow(capacity: Mapping[Edge, float], source: int, sink: int) -> float:
    """The maximum flow.

    Args:
        capacity: of each directed edge; inf is allowed where no path is all infinite.
        source: node.
        sink: node.
    """
    left = dict(capacity)
    ways: dict[int, list[int]] = {}
    for a, b in capacity:
        ways.setdefault(a, []).append(b)
        ways.setdefault(b, []).append(a)
        left.setdefault((b, a), 0.0)
    total = 0.0
    while (path := _shortest(ways, left, source, sink)) is not None:
        amount = min(left[edge] for edge in path)
        for a, b in path:
            left[a, b] -= amount
            left[b, a] += amount
        total += amount
    return total


def _shortest(
    ways: Mapping[int, list[int]], left: Mapping[Edge, float], source: int, sink: int
) -> list[Edge] | None:
    before = {source: source}
    queue = deque([source])
    while queue and sink not in before:
        at = queue.popleft()
        for to in ways.get(at, ()):
            if to not in before and left[at, to] > _LEAST:
                before[to] = at
                queue.append(to)
    if sink not in before:
        return None
    path, at = [], sink
    while at != source:
        path.append((before[at], at))
        at = before[at]
    return path
