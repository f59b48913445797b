"""Features of prompts that are being answered, kept until the answers have ended.

A prompt's text is there when its length is predicted and not when it is known; this joins the two.
"""

from collections import OrderedDict

MOST_PENDING = 65_536
"""Records kept: with the longest of them 64 MiB, as a rule a quarter of that."""


class PendingFeatures:
    """Features by request, the oldest forgotten when there are too many.

    Args:
        most: records kept.
    """

    def __init__(self, most: int = MOST_PENDING) -> None:
        self._most = most
        self._features: OrderedDict[str, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def put(self, request_id: str, features: bytes) -> None:
        """Keep what was seen of a request's prompt."""
        if not features:
            return
        self._features[request_id] = features
        self._features.move_to_end(request_id)
        if len(self._features) > self._most:
            self._features.popitem(last=False)

    def take(self, request_id: str) -> bytes:
        """What was seen of it, once; empty if that is not known."""
        return self._features.pop(request_id, b"")
