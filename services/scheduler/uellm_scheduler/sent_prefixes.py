"""What of prompts replicas may hold in their KV caches, from what they were sent."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from uellm.prefixes import PIECE_TOKENS


@dataclass(slots=True)
class _Sent:
    """Marks of prompts that a replica was sent under an epoch, the latest last."""

    epoch: int
    marks: OrderedDict[int, None] = field(default_factory=OrderedDict)


class SentPrefixes:
    """Marks of the prompts that each replica was sent, as many as its KV cache has room for.

    A guess, as good as a replica's cache forgets what was used longest ago; nothing rests on it but
    the choice of a replica.
    """

    def __init__(self) -> None:
        self._sent: dict[str, _Sent] = {}

    def keep(self, room: Mapping[str, tuple[int, int]]) -> None:
        """Forget what is not, or not any more, in the caches of these replicas: all there are.

        Those that take no requests at present are among them.

        Args:
            room: epoch and tokens of KV room, by replica.
        """
        for replica, known in list(self._sent.items()):
            epoch, kv_tokens = room.get(replica, (None, 0))
            if known.epoch != epoch:
                del self._sent[replica]
                continue
            while len(known.marks) > kv_tokens // PIECE_TOKENS:
                known.marks.popitem(last=False)

    def sent(self, replica: str, epoch: int, marks: Sequence[int]) -> None:
        """A prompt with these marks left for a replica under an epoch."""
        known = self._sent.get(replica)
        if known is None or known.epoch < epoch:
            known = self._sent[replica] = _Sent(epoch)
        if known.epoch > epoch:
            return
        # Its end first, to be forgotten before its beginning.
        for mark in reversed(marks):
            known.marks[mark] = None
            known.marks.move_to_end(mark)

    def tokens(self, replica: str, marks: Sequence[int]) -> int:
        """How many of a prompt's first tokens a replica may hold."""
        known = self._sent.get(replica)
        if known is None:
            return 0
        beginning = takewhile(known.marks.__contains__, marks)
        return sum(1 for _ in beginning) * PIECE_TOKENS
