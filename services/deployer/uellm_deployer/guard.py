"""A deployment's faults stay its own: noted, shown in its status, and tried again."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from uellm.core.errors import AbortedError, UellmError
from uellm.faults import Faults, described, pause
from uellm.logs import logger
from uellm.streams.connection import UNREACHABLE

_log = logger("guard")
EXPECTED_SECONDS = 5.0
"""When what failed for a reason that is known is tried again."""


class Guard:
    """Keeps what nobody foresaw in one deployment from all others.

    Args:
        name: of the deployment.
        faults: of the deployer.
    """

    def __init__(self, name: str, faults: Faults) -> None:
        self._name = name
        self._faults = faults
        self._messages: dict[str, str] = {}
        self._retry_at: dict[str, float] = {}

    @property
    def messages(self) -> list[str]:
        """What fails, for people."""
        return list(self._messages.values())

    def waits(self, what: str) -> bool:
        """Whether something failed, and it is too early to try it again."""
        return time.monotonic() < self._retry_at.get(what, 0.0)

    def failed(self, what: str, error: Exception, *, paced: bool = True) -> float:
        """Something failed; seconds until it is to be tried again.

        Args:
            what: which.
            error: how.
            paced: who tries it asks ``waits`` first; else the next occasion is when it comes.
        """
        if isinstance(error, UellmError):
            _log.warning("failed", what=what, model=self._name, error=error.message)
            seconds, why = EXPECTED_SECONDS, error.message
        else:
            seconds = pause(self._faults.note(f"{what} {self._name}", error))
            why = f"a fault of uellm, {described(error)}; the deployer's log has more"
        self._retry_at[what] = time.monotonic() + seconds
        again = f"next try in {seconds:g} s" if paced else "tried again when it is due"
        self._messages[what] = f"{what} it failed: {why}; {again}"
        return seconds

    def retry(self) -> None:
        """Try everything again at once: something else is wanted now."""
        self._retry_at.clear()

    def done(self, what: str) -> None:
        """It went well."""
        if self._messages.pop(what, ""):
            self._retry_at.pop(what, None)
            self._faults.clear(f"{what} {self._name}")

    @contextmanager
    def keeping(self, what: str, *, paced: bool = False) -> Iterator[None]:
        """Keep a fault here; that Redis is away, or another deployer acts, concerns all.

        Args:
            what: is tried.
            paced: as for ``failed``.
        """
        try:
            yield
        except (*UNREACHABLE, AbortedError):
            raise
        except Exception as error:
            self.failed(what, error, paced=paced)
        else:
            self.done(what)
