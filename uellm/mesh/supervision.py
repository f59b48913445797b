"""One service process: started, watched, started again when it dies."""

import asyncio
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uellm import logs
from uellm.core.errors import ConfigurationError, UnavailableError
from uellm.mesh.tether import tethered

CONFIGURATION_EXIT = 2
_log = logs.logger("mesh")


class Backoff:
    """Pauses before restarts: each twice the last, and none remembered after a good run.

    Args:
        first_seconds: the first pause.
        longest_seconds: no pause is longer.
        good_seconds: a run of this length counts as good.
        attempts: quick deaths in a row after which it is given up.
    """

    def __init__(
        self,
        first_seconds: float = 0.2,
        longest_seconds: float = 5.0,
        good_seconds: float = 10.0,
        attempts: int = 8,
    ) -> None:
        self._first = first_seconds
        self._longest = longest_seconds
        self._good = good_seconds
        self._attempts = attempts
        self._quick = 0

    def after(self, ran_seconds: float) -> float | None:
        """The pause after a run that ended; None: give up."""
        self._quick = 0 if ran_seconds >= self._good else self._quick
        self._quick += 1
        if self._quick >= self._attempts:
            return None
        return min(self._first * 2.0 ** (self._quick - 1), self._longest)


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """How to start a service.

    Attributes:
        service_id: its name, kept over restarts.
        role: what it does.
        command: what to run.
        log: file that its output is appended to.
        environment: all of its environment.
    """

    service_id: str
    role: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(repr=False)


class Supervised:
    """A service that is kept running.

    Args:
        spec: how to start it.
        changed: called after every start, with its new process id known.

    Attributes:
        restarts: how often it ended, and was started again.
        ended: that in words; "": never.
    """

    def __init__(
        self,
        spec: ServiceSpec,
        changed: Callable[[], None] = lambda: None,
        backoff: Backoff | None = None,
    ) -> None:
        self.spec = spec
        self.restarts = 0
        self.ended = ""
        self._changed = changed
        self._backoff = backoff or Backoff()
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Its process id, while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def run(self) -> None:
        """Keep it running until ``stop``.

        Raises:
            ConfigurationError: if it says that it cannot start as it was told to.
            UnavailableError: if it died too often, with the end of its log.
        """
        clock = asyncio.get_running_loop().time
        while not self._stopping:
            started = clock()
            process = await self._start()
            code = await process.wait()
            if self._stopping:
                return
            if code == CONFIGURATION_EXIT:
                raise ConfigurationError(self._complaint())
            pause = self._backoff.after(clock() - started)
            _log.warning("a service ended", service_id=self.spec.service_id, exit=_meaning(code))
            if pause is None:
                raise UnavailableError(
                    f"{self.spec.service_id} dies again and again ({_meaning(code)}); the end of "
                    f"{self.spec.log}:\n{self._last_words(8)}"
                )
            self.restarts += 1
            times = f"{self.restarts} times, last " if self.restarts > 1 else ""
            self.ended = f"{self.spec.service_id} ended {times}({_meaning(code)})"
            await asyncio.sleep(pause)

    async def _start(self) -> asyncio.subprocess.Process:
        self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        with self.spec.log.open("ab") as out:
            # A session of its own: the terminal's Ctrl-C is for the supervisor alone.
            self._process = await asyncio.create_subprocess_exec(
                *tethered(self.spec.command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=dict(self.spec.environment),
                start_new_session=True,
            )
        if self._stopping:
            self._signal(signal.SIGTERM)
        self._changed()
        return self._process

    def _signal(self, number: signal.Signals) -> None:
        if (pid := self.pid) is not None:
            os.kill(pid, number)

    async def stop(self, seconds: float) -> None:
        """End it: ask, wait, and after ``seconds`` insist."""
        self._stopping = True
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            _log.warning("did not end in time; killed", service_id=self.spec.service_id)
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """End it at once, with all that it started."""
        self._stopping = True
        if (pid := self.pid) is not None:
            os.killpg(pid, signal.SIGKILL)

    def _complaint(self) -> str:
        """What a service that refused to start said, in one line."""
        said = self._last_words(1).removeprefix("uellm ")
        return said or f"{self.spec.service_id} refused to start and did not say why"

    def _last_words(self, lines: int) -> str:
        """The end of its log."""
        try:
            content = self.spec.log.read_bytes()[-8192:].decode(errors="replace")
        except OSError:
            return ""
        return "\n".join([line for line in content.splitlines() if line.strip()][-lines:])


def _meaning(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"
