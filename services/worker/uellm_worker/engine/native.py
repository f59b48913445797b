"""The kernels of this process: where Numba is installed, and the system and processor suit.

Several operations in a row are better run as one program (``compiled.py``); here are those that
torch's own operations come between. Where kernels are missing, torch computes the same.
"""

import hashlib
import importlib
import logging
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from uellm_worker.engine.device import on_host
from uellm_worker.engine.operations import Codes, Operations
from uellm_worker.engine.team import Operation, Program, StepNumbers, Team
from uellm_worker.engine.tiles import SPAN_ROWS

try:
    import numba
except ImportError:
    numba = None

_SERIAL_NUMBERS = 16_384
"""So few numbers are done with before other threads have woken up."""
_PRODUCTS_A_NUMBER = 32
"""Multiplications in the time that other kernels take for a number."""

_log = logging.getLogger(__name__)


class Kernels:
    """All kernels. Tensors are float32 on the CPU, sizes within them those that torch checks.

    Args:
        operations: makes what they are told.
        team: the threads that run them.
    """

    def __init__(self, operations: Operations, team: Team) -> None:
        self.operations = operations
        self.team = team

    def _run(self, operation: Operation, step: StepNumbers, work: int) -> None:
        """Run one operation, on threads if there are enough numbers to read or write."""
        members = 1 if work < _SERIAL_NUMBERS else torch.get_num_threads()
        self.team.run(Program((operation,)), step, members)

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
            output: gets ``[n, panels * PANEL_ROWS]``.
        """
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        operation = self.operations.multiply(rows, panels, bias, output, factor=factor)
        work = len(rows) * panels.numel() // _PRODUCTS_A_NUMBER
        self._run(operation, StepNumbers(len(rows)), work)

    def multiply_codes(
        self, rows: torch.Tensor, weight: Codes, bias: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Multiply rows ``[n, in]`` with a quantised weight; see ``multiply``."""
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        operation = self.operations.multiply_codes(rows, weight, bias, output)
        numbers = weight.in_features * output.shape[1]
        work = len(rows) * numbers // _PRODUCTS_A_NUMBER
        self._run(operation, StepNumbers(len(rows)), work)

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        spans: torch.Tensor,
        longest: int,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attend rows to their sequences, whose keys and values are in the cache.

        Args:
            query: ``[n, heads, head_dim]``; the latter a multiple of ``HEAD_NUMBERS``.
            keys: ``[slots, kv_heads, max_tokens, head_dim]``.
            values: as ``keys``.
            spans: see ``StepNumbers``.
            longest: tokens of the longest sequence, the present one included.
            scaling: of the scores.
            window: tokens seen, the present one included; None for all.
            softcap: of the scores; None for none.

        Returns:
            ``[n, heads, head_dim]``.
        """
        rows, heads, head_dim = query.shape
        if query.stride()[1:] != (head_dim, 1):
            query = query.contiguous()
        kv_heads = keys.shape[1]
        room = SPAN_ROWS * heads // kv_heads * longest
        output = query.new_empty(rows, heads, head_dim)
        operation = self.operations.attend(
            query.as_strided((rows, heads * head_dim), (query.stride(0), 1)),
            keys,
            values,
            output.view(rows, heads * head_dim),
            torch.empty(torch.get_num_threads(), room),
            scaling=scaling,
            window=window,
            softcap=softcap,
        )
        step = StepNumbers(rows, spans=spans)
        self._run(operation, step, rows * longest * kv_heads * head_dim)
        return output

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
            turns: ``[positions, pairs]`` complex; the first ``pairs`` pairs of each head turn.
            keys: ``[slots, kv_heads, max_tokens, head_dim]``.
            values: as ``keys``.
            slots: ``[T]``.
            positions: ``[T]``.
        """
        operation = self.operations.place(
            heads.view(len(heads), heads.shape[1] * heads.shape[2]),
            keys,
            values,
            heads.shape[1] - 2 * keys.shape[1],
            pairs=0 if turns is None else turns.shape[-1],
        )
        kinds = () if turns is None else (turns,)
        step = StepNumbers(len(heads), slots, positions, turns=kinds)
        self._run(operation, step, heads.numel())

    def norm(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """The norm of rows, or of segments of rows, ``[n, segments * size]``.

        Root-mean-square where there is no bias, else that of the distance from the mean.

        Args:
            rows: see above.
            weight: ``[segments, size]`` or ``[size]``, multiplies the normed.
            bias: as ``weight``, added.
            eps: added to the mean square.
        """
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        output = rows.new_empty(rows.shape)
        operation = self.operations.norm(
            rows, weight, bias, output, eps=eps, centred=bias is not None
        )
        self._run(operation, StepNumbers(len(rows)), rows.numel())
        return output

    def gate(self, both: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
        """SiLU of the gates, times the values: ``[n, 2 * size]``, gates first, to ``[n, size]``."""
        count, width = both.shape
        output = both.new_empty(count, width // 2)
        operation = self.operations.activate(both, output, width // 2, gelu=gelu, gated=True)
        self._run(operation, StepNumbers(count), both.numel())
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
        _keep_compiled()
        vectors = _compiled("vectors")
        if not vectors.FUSES:
            raise RuntimeError("the processor has no fused multiplication and addition")
        names = ("attention", "rows", "adapters", "team")
        attention, rows, adapters, team = map(_compiled, names)
        panels: Any = None
        codes: Any = None
        if vectors.VECTORS:
            panels, codes = _compiled("panels"), _compiled("codes")
        return Kernels(Operations(attention, rows, panels, codes, adapters), Team(team))
    except Exception as error:  # Numba fails in ways of its own; all mean the same here.
        _log.warning("no compiled kernels, decode steps on CPUs will be slower: %s", error)
        return None


def _compiled(name: str) -> Any:
    return importlib.import_module(f"uellm_worker.engine.kernels.{name}")


def _keep_compiled() -> None:
    """Have Numba keep what it compiles where this user alone can write.

    What lies there is run: hence nothing that others might write to. Numba keeps it apart by
    processor and by a kernel's own source; by all that it takes numbers from, the directory does.
    """
    name = _digest()
    given = Path(numba.config.CACHE_DIR) if numba.config.CACHE_DIR else None
    if given is not None and given.name == name:
        return
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        directory = (given or home / "uellm" / "kernels") / name
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, RuntimeError):
        directory = Path(tempfile.mkdtemp(prefix="uellm-kernels-")) / name
    numba.config.CACHE_DIR = str(directory)


def _digest() -> str:
    """Of the sources of all kernels."""
    here = Path(__file__).parent
    sha = hashlib.sha256()
    for path in (here / "tiles.py", *sorted((here / "kernels").glob("*.py"))):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]
