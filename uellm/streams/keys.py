"""Names of everything in Redis.

Every key that one script touches carries the tag ``{model}``: all of a model lives in one slot.
A request's id carries the model too, so that it alone is enough to find the request anywhere.
"""

import re
import secrets
import time
from dataclasses import dataclass

from uellm.core.errors import InvalidArgumentError

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_REQUEST_ID = re.compile(
    r"(?P<model>[A-Za-z0-9][A-Za-z0-9._/-]{0,127}):[0-7][0-9a-hjkmnp-tv-z]{25}"
)
_BASE32 = "0123456789abcdefghjkmnpqrstvwxyz"

SERVICES = "uellm:services"
DEPLOYMENTS = "uellm:deployments"
SECRET_KEY = "uellm:secret"  # noqa: S105 - where it is


def new_request_id(model: str) -> str:
    """A fresh id: the model, then a ULID in lower case (48 bits of time, 80 random)."""
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return f"{model}:{''.join(_BASE32[value >> shift & 31] for shift in range(125, -1, -5))}"


def made_at(request_id: str) -> float:
    """When an id was made: seconds since the epoch, by the clock of its gateway's host."""
    value = 0
    for character in request_id.rpartition(":")[2]:
        value = value << 5 | _BASE32.index(character)
    return (value >> 80) / 1000


def model_of(request_id: str) -> str:
    """The model that a request id names.

    Raises:
        InvalidArgumentError: if it is not an id that ``new_request_id`` could have made.
    """
    match = _REQUEST_ID.fullmatch(request_id)
    if match is None:
        raise InvalidArgumentError(
            f"request_id: {request_id[:80]!r} is none that a mesh gives out "
            "(<model>:<26 characters>)",
            field="request_id",
        )
    return match["model"]


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one model; see docs/queues.md for what each holds."""

    model: str

    @property
    def prefix(self) -> str:
        """What every key of the model starts with."""
        return f"uellm:{{{self.model}}}:"

    @property
    def requests(self) -> str:
        """Stream of requests that wait for the scheduler; group ``scheduler``."""
        return f"{self.prefix}requests"

    @property
    def completions(self) -> str:
        """Stream of CompletionEvents, trimmed; readers keep their own place."""
        return f"{self.prefix}completions"

    @property
    def dead(self) -> str:
        """Stream of requests given up."""
        return f"{self.prefix}dead"

    @property
    def leases(self) -> str:
        """Sorted set: when the holder of each dispatched request must have renewed, in ms."""
        return f"{self.prefix}leases"

    @property
    def owner(self) -> str:
        """Hash: which scheduler owns the model, its token, until when."""
        return f"{self.prefix}owner"

    @property
    def policy(self) -> str:
        """String: the ModelPolicy that was chosen while running."""
        return f"{self.prefix}policy"

    @property
    def track_record(self) -> str:
        """String: how the model's promises were kept, npz; nothing is lost with it but skill."""
        return f"{self.prefix}track_record"

    @property
    def offered(self) -> str:
        """String: the OfferedLoad that the owner last saw; gone soon after its owner is."""
        return f"{self.prefix}offered"

    @property
    def door(self) -> str:
        """String: which share of those is looked at that would rather be refused than late.

        And in how many seconds the others may try again. Only there while it is not all.
        """
        return f"{self.prefix}door"

    @property
    def turned_away(self) -> str:
        """Stream, trimmed, expires: how many requests gateways refused before accepting them."""
        return f"{self.prefix}turned_away"

    @property
    def decisions(self) -> str:
        """Stream of DecisionSegments, trimmed; nothing depends on it."""
        return f"{self.prefix}decisions"

    def request(self, request_id: str) -> str:
        """Hash: the record of a request."""
        return f"{self.prefix}request:{request_id}"

    def log(self, request_id: str) -> str:
        """Stream of LogChunks; an entry's id is the offset behind its tokens."""
        return f"{self.prefix}log:{request_id}"

    def batches(self, replica: str) -> str:
        """Stream of BatchEntries for a replica; group ``leader``."""
        return f"{self.prefix}batches:{replica}"

    def replica(self, replica: str) -> str:
        """Hash: a replica's route and its latest report."""
        return f"{self.prefix}replica:{replica}"

    def frames(self, gateway: str) -> str:
        """Stream of Frames that wake a gateway; trimmed, gone with the gateway."""
        return f"{self.prefix}frames:{gateway}"
