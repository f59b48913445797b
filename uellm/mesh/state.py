"""Where the meshes of this user are: each keeps a file beside its logs while it runs."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

STATE_FILE = "mesh.json"


def home() -> Path:
    """Where uellm keeps logs and state: UELLM_HOME, else the user's state directory."""
    if named := os.environ.get("UELLM_HOME"):
        return Path(named).expanduser()
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "uellm"


def runs(directory: Path) -> Path:
    """Where every mesh has a directory of its own.

    Args:
        directory: as ``home`` gives it.
    """
    return directory / "logs"


@dataclass(frozen=True, slots=True)
class MeshState:
    """A mesh that runs on this host.

    Attributes:
        pid: the process that supervises it.
        gateways: their addresses.
        redis_url: its Redis.
        pids: process ids, by service id.
        started: when ``pid`` was started, to tell it from a later process of the same number.
    """

    pid: int
    gateways: tuple[str, ...]
    redis_url: str
    pids: Mapping[str, int] = field(default_factory=dict)
    started: float = 0.0

    @classmethod
    def of_this_process(
        cls, gateways: tuple[str, ...], redis_url: str, pids: Mapping[str, int]
    ) -> Self:
        """The state of a mesh that this process supervises."""
        process = psutil.Process()
        return cls(process.pid, gateways, redis_url, pids, process.create_time())

    @property
    def alive(self) -> bool:
        """Whether its supervisor still runs."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1.0
        except psutil.Error:
            return False

    def write(self, directory: Path) -> None:
        """Write the file, at once and whole."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / STATE_FILE
        draft = path.with_suffix(f".{self.pid}")
        # The address of its Redis may carry a password.
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(asdict(self), indent=1) + "\n")
        draft.replace(path)

    @staticmethod
    def remove(directory: Path) -> None:
        """Remove the file."""
        (directory / STATE_FILE).unlink(missing_ok=True)


def find_mesh(directory: Path) -> MeshState | None:
    """The mesh that was started last, or None if none was left running.

    One that runs comes before one whose supervisor is dead: see ``alive``.

    Args:
        directory: as ``home`` gives it.
    """
    paths = runs(directory).glob("*/")
    found = [state for path in paths if (state := read_state(path)) is not None]
    return max(found, key=lambda state: (state.alive, state.started), default=None)


def read_state(directory: Path) -> MeshState | None:
    """The mesh whose directory this is; None if it has ended. It may be dead: see ``alive``."""
    try:
        raw: dict[str, Any] = json.loads((directory / STATE_FILE).read_text())
        return MeshState(
            pid=int(raw["pid"]),
            gateways=tuple(raw["gateways"]),
            redis_url=str(raw["redis_url"]),
            pids={str(name): int(pid) for name, pid in raw["pids"].items()},
            started=float(raw["started"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
