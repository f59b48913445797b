"""The Lua scripts, loaded once and called by name.

Each script runs behind ``_prelude.lua``. ``allow-oom`` lets what frees or finishes work run when
Redis is full; ``accept``, which takes new work, is refused then, and ``keep``, which can wait.
"""

from functools import cache
from importlib.resources import files
from typing import Any

from redis.commands.core import AsyncScript

from uellm.streams.connection import RedisClient

NAMES = (
    "accept",
    "append",
    "cancel",
    "claim",
    "dispatch",
    "finish",
    "hand_back",
    "keep",
    "known",
    "learnt",
    "open_frames",
    "own",
    "progress",
    "promise",
    "publish",
    "reap",
    "register",
    "route",
    "watch",
)
_MAY_BE_REFUSED_WHEN_FULL = {"accept", "keep"}


@cache
def source(name: str) -> str:
    """The full text of a script."""
    directory = files("uellm.streams") / "lua"
    flags = "" if name in _MAY_BE_REFUSED_WHEN_FULL else " flags=allow-oom"
    prelude = (directory / "_prelude.lua").read_text()
    return f"#!lua{flags}\n{prelude}\n{(directory / f'{name}.lua').read_text()}"


class Scripts:
    """All scripts on one client; a server that lost them is given them again."""

    def __init__(self, redis: RedisClient) -> None:
        self._scripts: dict[str, AsyncScript] = {
            name: redis.register_script(source(name)) for name in NAMES
        }

    async def __call__(self, name: str, prefix: str, *arguments: Any) -> list[Any]:
        """Run script ``name`` on the keys behind ``prefix``."""
        result = await self._scripts[name](keys=[prefix], args=arguments)
        return result if isinstance(result, list) else [result]
