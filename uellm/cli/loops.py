"""Running a command's coroutine: signals in, exit status out."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from typing import Any

from uellm.cli.exits import INTERRUPTED


def run(work: Coroutine[Any, Any, int], force: Callable[[], None] = lambda: None) -> int:
    """Run ``work``; on Ctrl-C or SIGTERM cancel it, and on a second one ``force`` the end.

    Returns:
        What ``work`` returns, or INTERRUPTED.
    """
    return asyncio.run(_run(work, force))


async def _run(work: Coroutine[Any, Any, int], force: Callable[[], None]) -> int:
    task = asyncio.create_task(work)
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        if interrupted:
            force()
            os._exit(INTERRUPTED)
        interrupted = True
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        return INTERRUPTED
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
