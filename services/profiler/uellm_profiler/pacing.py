"""Who is read with care, who is answered from words, and who no more, so that answers are in time.

Whoever reads with care takes milliseconds for each prompt: more come than can be read before they
have to be answered. Those with the earliest deadline are read, as many as there is time for; all
others are answered from their words at once, and those for whom that comes too late are told so at
once. Whoever has no deadline comes after those that have one, but for a second only: then one in
each turn comes first. Pure decisions; ``uellm_profiler.serving`` carries them out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_AT_ONCE = 256
"""Requests that are predicted together."""
CHUNK_SECONDS = 0.04
"""How long those that are read together should take: newcomers wait so long."""
MARGIN_SECONDS = 0.01
"""What an answer is ready before its deadline: it has to get there."""
PATIENCE_SECONDS = 1.0
"""Who has no deadline lets all go first that have one, for so long."""
_PROMPT_EFFORT = 8.0
_BYTES_PER_EFFORT = 4.0
_MOST_EFFORT = 256.0
_TURN_EFFORT = 64.0
_RISE, _FALL = 0.3, 0.1
_MOST_RISE = 4.0
_RETRY = 0.9


def effort_of(text: str) -> float:
    """What reading a prompt takes, about in tokens; long ones are read in part, blank ones not."""
    if not text or text.isspace():
        return 0.0
    size = len(text.encode("utf-8", "surrogatepass")) / _BYTES_PER_EFFORT
    return _PROMPT_EFFORT + min(size, _MOST_EFFORT)


@dataclass(frozen=True, slots=True)
class Asked:
    """One that waits.

    Attributes:
        deadline: when it has to be answered; infinite: whenever.
        effort: of reading it with care; 0: it was read before.
        came: when it was asked; only of those without a deadline does it matter.
    """

    deadline: float
    effort: float
    came: float = math.inf


@dataclass(slots=True)
class Pace:
    """How long predictions take, by experience.

    Attributes:
        care: seconds a unit of effort.
        words: seconds a request that is answered from its words.
    """

    care: float = 1e-4
    words: float = 2e-4

    def reading(self, effort: float) -> float:
        """Seconds that prompts of such effort take that are read together."""
        return self.care * (_TURN_EFFORT + effort)

    def answering(self, count: int) -> float:
        """Seconds that so many take together from their words."""
        return self.words * (1 + count) if count else 0.0

    def was_reading(self, effort: float, seconds: float) -> None:
        """Take how long some took."""
        self.care = _followed(self.care, seconds / (_TURN_EFFORT + effort))

    def was_answering(self, count: int, seconds: float) -> None:
        """Take how long some took."""
        self.words = _followed(self.words, seconds / (1 + count))

    def doubted(self) -> None:
        """Nobody could ever be read: that may be too cautious, which only reading can tell."""
        self.care *= _RETRY


def _followed(expected: float, seen: float) -> float:
    # It is believed sooner that things take longer: who is late helps nobody.
    seen = min(seen, _MOST_RISE * expected)
    return expected + (_RISE if seen > expected else _FALL) * (seen - expected)


@dataclass(frozen=True, slots=True)
class Turn:
    """Places of those that are dealt with next, each at most once; the others wait.

    Attributes:
        refused: cannot be answered in time.
        hurried: are answered from words, or from what was read of them before.
        read: are read with care, after those.
        hopeless: there is time, and yet none of those that were not read before could be read in
            time if it were alone.
    """

    refused: Sequence[int]
    hurried: Sequence[int]
    read: Sequence[int]
    hopeless: bool


def next_turn(asked: Sequence[Asked], pace: Pace, now: float) -> Turn:
    """What to do for those that wait, given in the order in which they came."""
    order = sorted(range(len(asked)), key=lambda i: asked[i].deadline)
    elder = next((i for i, each in enumerate(asked) if _overdue(each, now)), None)
    if elder is not None:
        # One in a turn, so that a great many of them make nobody late who has a deadline.
        order.remove(elder)
        order.insert(0, elder)
    hurried = [i for i in order if not asked[i].effort]
    readable = [i for i in order if asked[i].effort]
    left_out: set[int] = {*hurried}
    while True:
        # Those in a hurry are answered first, so that each of them delays those that are read.
        begin = now + pace.answering(len(hurried))
        read, late = _read(asked, readable, pace, begin)
        if not late:
            break
        readable = [i for i in readable if i not in late]
        left_out |= late
        hurried = [i for i in order if i in left_out]
    answered: list[int] = []
    refused: list[int] = []
    deferred = 0
    for i in hurried:
        ready = now + pace.answering(len(answered) + deferred + 1)
        if ready > _latest(asked[i]):
            refused.append(i)
        elif deferred or len(answered) == MOST_AT_ONCE:
            deferred += 1
        elif ready > min((_latest(asked[j]) for j in answered[:2]), default=math.inf):
            # All that are answered together are ready when the last is.
            deferred += 1
        else:
            answered.append(i)
    # Who comes too late for any pace says nothing of it.
    unread = [each for each in asked if each.effort and _latest(each) > now]
    hopeless = bool(unread) and all(now + pace.reading(e.effort) > _latest(e) for e in unread)
    if deferred:
        read = [i for i in read if i == elder]
    return Turn(refused, answered, read, hopeless)


def _overdue(asked: Asked, now: float) -> bool:
    return asked.deadline == math.inf and now - asked.came > PATIENCE_SECONDS


def _read(
    asked: Sequence[Asked], readable: Sequence[int], pace: Pace, begin: float
) -> tuple[list[int], set[int]]:
    """Those that are read together first, and those for whom reading comes too late.

    Args:
        asked: all that wait.
        readable: places of those that are to be read, the earliest deadline first; before them may
            be one without.
        pace: how long that takes.
        begin: when it can begin.
    """
    chunks: list[list[int]] = [[]]
    late: set[int] = set()
    effort = 0.0
    for i in readable:
        chunk, more = chunks[-1], effort + asked[i].effort
        seconds = pace.reading(more)
        # All of a chunk are ready when the last is.
        if chunk and (
            seconds > CHUNK_SECONDS
            or len(chunk) == MOST_AT_ONCE
            or begin + seconds > min(_latest(asked[j]) for j in chunk[:2])
        ):
            begin += pace.reading(effort)
            chunk, effort, more = [], 0.0, asked[i].effort
            chunks.append(chunk)
        if begin + pace.reading(more) > _latest(asked[i]):
            late.add(i)
        else:
            chunk.append(i)
            effort = more
    return chunks[0], late


def _latest(asked: Asked) -> float:
    return asked.deadline - MARGIN_SECONDS
