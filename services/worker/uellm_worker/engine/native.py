"""Kernels of ``kernels.py`` for tensors on the CPU, where Numba is installed and torch runs OpenMP.

A kernel runs on the very threads that torch's own operations run on: its code is handed to the
OpenMP runtime that torch has loaded. A pool of its own would take turns with torch's, each pool
spinning while the other works. Where any of this is missing, torch computes the same.
"""

import ctypes
import importlib
import logging
import os
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from uellm_worker.engine.device import on_host
from uellm_worker.engine.tiles import PANEL_ROWS

try:
    import numba
    from llvmlite import binding as llvm
except ImportError:
    numba = None

_SERIAL_NUMBERS = 16_384
"""So few numbers are done with before other threads have woken up."""

_PRODUCTS_A_NUMBER = 32
"""Multiplications in the time that other kernels take for a number."""

_log = logging.getLogger(__name__)


class Kernel:
    """A compiled kernel, and how to call it.

    Args:
        address: of its code.
        layout: of its block, as ``struct`` has it: all of 8 bytes, addresses and numbers. Before
            them comes a count of the pieces of work that threads have taken.
        team: runs code on a team of threads, as ``GOMP_parallel`` does.
    """

    def __init__(self, address: int, layout: str, team: Callable[..., None]) -> None:
        self._address = address
        self._layout = struct.Struct(f"@q{layout}")
        self._team = team

    def __call__(self, numbers: int, *block: float) -> None:
        """Run it on torch's threads.

        Args:
            numbers: read or written, to tell whether more than one thread is worth waking.
            block: what it is told.
        """
        threads = 1 if numbers < _SERIAL_NUMBERS else torch.get_num_threads()
        memory = ctypes.create_string_buffer(self._layout.size)
        self._layout.pack_into(memory, 0, 0, *block)
        self._team(self._address, memory, threads, 0)


class Kernels:
    """All kernels. Tensors are float32 on the CPU, sizes within them those that torch checks.

    Args:
        module: ``kernels.py``.
        panels: ``panel_kernels.py``; None where its kernels gain nothing.
        team: see ``Kernel``.
    """

    def __init__(self, module: Any, panels: Any, team: Callable[..., None]) -> None:
        self._attend = Kernel(module.attend.address, "16q2d", team)
        self._place = Kernel(module.place.address, "13q", team)
        self._norm = Kernel(module.norm.address, "5qd", team)
        self._gate = Kernel(module.gate.address, "4q", team)
        self._multiply = None if panels is None else Kernel(panels.multiply.address, "10qd", team)

    @property
    def multiplies(self) -> bool:
        """``multiply`` is there."""
        return self._multiply is not None

    def multiply(
        self,
        rows: torch.Tensor,
        panels: torch.Tensor,
        factor: float,
        bias: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Multiply rows with a weight in panels.

        Args:
            rows: ``[n, in]``.
            panels: ``[panels, in, PANEL_ROWS]`` in float32 or float16.
            factor: of the product.
            bias: ``[panels * PANEL_ROWS]``, added.
            output: gets ``[n, out]``; ``out`` ends in the last panel.
        """
        if self._multiply is None:
            raise RuntimeError("no kernel multiplies on this machine")
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        count, width = output.shape
        # What the last panel gives, if not all of it is wanted.
        edge = torch.empty(count, PANEL_ROWS) if width % PANEL_ROWS else output
        self._multiply(
            count * panels.numel() // _PRODUCTS_A_NUMBER,
            rows.data_ptr(),
            4 * rows.stride(0),
            panels.data_ptr(),
            panels.dtype == torch.float16,
            bias.data_ptr(),
            output.data_ptr(),
            edge.data_ptr(),
            count,
            width,
            rows.shape[1],
            factor,
        )

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        longest: int,
        output: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        """Attend one token of each of some sequences, whose keys and values are in the cache.

        Args:
            query: ``[n, heads, head_dim]``; the latter a multiple of ``HEAD_NUMBERS``.
            keys: ``[slots, kv_heads, max_tokens, head_dim]``.
            values: as ``keys``.
            slots: ``[n]``, of the rows.
            positions: ``[n]``, of the rows in their sequences.
            longest: tokens of the longest sequence, the present one included.
            output: gets ``[n, heads, head_dim]``.
            scaling: of the scores.
            window: tokens seen, the present one included; None for all.
            softcap: of the scores; None for none.
        """
        rows, heads, head_dim = query.shape
        if query.stride()[1:] != (head_dim, 1):
            query = query.contiguous()
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        room = group * longest
        scratch = torch.empty(torch.get_num_threads(), room)
        self._attend(
            rows * longest * kv_heads * head_dim,
            query.data_ptr(),
            4 * query.stride(0),
            output.data_ptr(),
            scratch.data_ptr(),
            4 * room,
            slots.data_ptr(),
            positions.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            4 * keys.stride(0),
            4 * keys.stride(1),
            rows,
            kv_heads,
            group,
            head_dim,
            window or 0,
            scaling,
            softcap or 0.0,
        )

    def place(
        self,
        heads: torch.Tensor,
        turns: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        """Rotate queries and keys in place; write keys and values into the cache.

        Args:
            heads: ``[T, heads, head_dim]``: queries, then keys, then values.
            turns: ``[T, 1, pairs]`` complex; the first ``pairs`` pairs of each head turn.
            keys: ``[slots, kv_heads, max_tokens, head_dim]``.
            values: as ``keys``.
            slots: ``[T]``.
            positions: ``[T]``.
        """
        self._place(
            heads.numel(),
            heads.data_ptr(),
            turns.data_ptr() if turns is not None else 0,
            turns.shape[-1] if turns is not None else 0,
            slots.data_ptr(),
            positions.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            4 * keys.stride(0),
            4 * keys.stride(1),
            heads.shape[0],
            heads.shape[1],
            keys.shape[1],
            heads.shape[2],
        )

    def norm(self, rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """The root-mean-square norm of rows ``[n, size]``.

        Args:
            rows: see above.
            weight: ``[size]``, multiplies the normed.
            eps: added to the mean square.
        """
        rows = rows.contiguous()
        output = torch.empty_like(rows)
        self._norm(
            rows.numel(),
            rows.data_ptr(),
            weight.data_ptr(),
            output.data_ptr(),
            *rows.shape,
            eps,
        )
        return output

    def gate(self, both: torch.Tensor) -> torch.Tensor:
        """SiLU of the gates, times the values: ``[n, 2 * size]``, gates first, to ``[n, size]``."""
        both = both.contiguous()
        count, width = both.shape
        output = both.new_empty(count, width // 2)
        self._gate(both.numel(), both.data_ptr(), output.data_ptr(), count, width // 2)
        return output


def kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The kernels for tensors of this kind; None where there are none.

    The first call of all compiles them, in some seconds, if no process before has: made while a
    model is loaded.
    """
    return load() if on_host(device) and dtype == torch.float32 else None


@cache
def load() -> Kernels | None:
    """The kernels of this process; None, and a word in the log, where there are none."""
    if numba is None:
        _log.warning("numba is not installed: decode steps on CPUs will be slower")
        return None
    try:
        team = ctypes.CDLL(None).GOMP_parallel
        _keep_compiled()
        module = importlib.import_module("uellm_worker.engine.kernels")  # Which compiles.
        panels: Any = None
        if llvm.get_host_cpu_features().get("avx512f"):  # Others have too few registers.
            panels = importlib.import_module("uellm_worker.engine.panel_kernels")
    except Exception as error:  # Numba fails in ways of its own; all mean the same here.
        _log.warning("no compiled kernels, decode steps on CPUs will be slower: %s", error)
        return None
    team.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint)
    team.restype = None
    return Kernels(module, panels, team)


def _keep_compiled() -> None:
    """Have Numba keep what it compiles where this user alone can write.

    What lies there is run: hence nothing that others might write to. Numba keeps it apart by
    processor and by the source's time.
    """
    if numba.config.CACHE_DIR:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    directory = home / "uellm" / "kernels"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, RuntimeError):
        directory = Path(tempfile.mkdtemp(prefix="uellm-kernels-"))
    numba.config.CACHE_DIR = str(directory)
