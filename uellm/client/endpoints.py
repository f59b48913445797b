"""Several gateways, one of them in use: the next one when it fails."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from uellm.core.errors import ConfigurationError, UellmError, UnavailableError
from uellm.rpc import CHANNEL_OPTIONS, error_from
from uellm.v1.inference_pb2_grpc import InferenceServiceStub

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0
_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

# What a broken connection, a killed server or a drained one looks like to a client.
_BROKEN = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)


def is_broken(error: grpc.aio.AioRpcError) -> bool:
    """Whether the call failed on its way, so that another try may succeed."""
    if error.code() in _BROKEN:
        return True
    # A connection reset in the middle of a stream has no status of its own.
    return error.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN} and (
        "RST_STREAM" in (error.details() or "") or "Stream removed" in (error.details() or "")
    )


class Patience:
    """How long to go on trying; progress renews it.

    Args:
        seconds: most time without progress.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._failures = 0
        self._since: float | None = None

    def renew(self, seconds: float | None = None) -> None:
        """Something worked; from now on ``seconds``, if given."""
        self._failures = 0
        self._since = None
        self._seconds = seconds if seconds is not None else self._seconds

    async def wait(self, error: UellmError) -> None:
        """Wait before the next try.

        Raises:
            UellmError: ``error``, if it is time to give up.
        """
        now = time.monotonic()
        self._since = self._since if self._since is not None else now
        pause = min(FIRST_PAUSE_SECONDS * 2**self._failures, LONGEST_PAUSE_SECONDS)
        pause *= random.uniform(0.75, 1.25)  # noqa: S311 - spreads clients, guards nothing
        if error.retry_after_seconds is not None:
            pause = max(pause, error.retry_after_seconds)
        self._failures += 1
        if now + pause - self._since > self._seconds:
            raise error
        await asyncio.sleep(pause)


class Endpoints:
    """The gateways of a mesh.

    Args:
        addresses: ``host:port`` of each.

    Raises:
        ConfigurationError: if there is none.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        if not addresses:
            raise ConfigurationError("no gateway address given", field="server")
        self.addresses = tuple(addresses)
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._current = 0

    @property
    def address(self) -> str:
        """The gateway in use."""
        return self.addresses[self._current]

    def stub(self) -> Any:
        """The gateway in use, to call."""
        if self.address not in self._channels:
            self._channels[self.address] = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        return InferenceServiceStub(self._channels[self.address])

    def leave(self, address: str) -> None:
        """A gateway failed: turn to the next one, unless another call has done so already."""
        if address == self.address:
            self._current = (self._current + 1) % len(self.addresses)

    def unreachable(self, error: grpc.aio.AioRpcError) -> UellmError:
        """What a broken call comes to when nothing more is tried."""
        known = error_from(error)
        if error.code() is grpc.StatusCode.CANCELLED:
            # gRPC's server drops some of those that it has not read once there are a thousand.
            return UnavailableError(
                f"calls of {', '.join(self.addresses)} are dropped unread: more come at once than "
                "are read, or the gateway ends; try again, ask less at once, or run more gateways"
            )
        if known.reason != UnavailableError.default_reason:
            return known
        return UnavailableError(
            f"no gateway answers at {', '.join(self.addresses)} ({error.details()}); start a mesh "
            "with `uellm up`, or name another with --server or UELLM_SERVER",
            retry_after_seconds=known.retry_after_seconds,
        )

    async def call(
        self, choose: Callable[[Any], Any], request: Any, *, timeout: float, patience_seconds: float
    ) -> Any:
        """Call a method that may be repeated, at one gateway after the other.

        Args:
            choose: picks the method off a stub.
            request: its argument.
            timeout: seconds for one try.
            patience_seconds: most time spent on trying.

        Raises:
            UellmError: what the gateway said, or that none answered.
        """
        patience = Patience(patience_seconds)
        while True:
            address = self.address
            try:
                return await choose(self.stub())(request, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                if not is_broken(error):
                    raise error_from(error) from None
                failure = self.unreachable(error)
            self.leave(address)
            await patience.wait(failure)

    async def close(self) -> None:
        """Close all connections."""
        for opened in self._channels.values():
            await opened.close()
        self._channels.clear()
