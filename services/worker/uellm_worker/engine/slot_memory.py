"""Keys and values by slot; on CPUs in virtual memory that is real only where it is used.

The slots of a cache have room for the longest context each. On Linux, a tensor on the CPU lies in
anonymous memory, whose pages the system commits when they are first written and takes back when
told so (Prabhu et al., "vAttention", arXiv 2405.04437, do the same on GPUs by their driver). So
what a cache takes is what the sequences in it hold, in whole pages. Elsewhere, and where the memory
granted is less than a page per slot and head, all of it is allocated from the start, and giving
back does nothing. On accelerators the heads of a token lie together, as their kernels want it.
"""

import math
import mmap
import platform
import sys
from collections.abc import Sequence

import torch

from uellm_worker.engine.device import on_host
from uellm_worker.engine.plan import Copy, Move
from uellm_worker.engine.varlen import PAGE_TOKENS

LEAST_BLOCK_TOKENS = 16
"""Least tokens of a block: smaller ones would be more system calls than they save."""
_NORESERVE = 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0
"""Linux's MAP_NORESERVE, which Python does not name: what is only virtual needs no swap."""


def page_tokens(head_dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens whose keys of one head fill whole pages: the block that memory is committed in.

    Returns:
        The least such number from 16 on; 1 where pages are not given back.
    """
    if sys.platform != "linux" or not on_host(device):
        return 1
    step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, head_dim * dtype.itemsize)
    return step * -(-LEAST_BLOCK_TOKENS // step)


class SlotMemory:
    """Keys and values of the layers of one device.

    What lies behind the end of a sequence is finite, since masked numbers are still multiplied:
    zeros, or what another sequence has left there.

    Args:
        layers: how many.
        slots: sequences.
        kv_heads: per layer.
        max_tokens: per sequence; rounded up to whole pages, of the system or of a kernel.
        head_dim: per head.
        dtype: of keys and values.
        device: where.
        block_tokens: of releases. Where that is not a multiple of ``page_tokens``, or pages are
            not given back, everything is allocated now.

    Attributes:
        keys: per layer, ``[slots, kv_heads, max_tokens, head_dim]``.
        values: as ``keys``.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        kv_heads: int,
        max_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        block_tokens: int = 1,
    ) -> None:
        page = page_tokens(head_dim, dtype, device)
        paged = page > 1 and block_tokens % page == 0
        length = -(-max_tokens // page) * page if paged else max_tokens
        accelerated = not on_host(device)
        if accelerated:
            length = -(-max_tokens // PAGE_TOKENS) * PAGE_TOKENS
        shape = (slots, kv_heads, length, head_dim)
        self._regions: list[mmap.mmap] = []
        self._slot_bytes = kv_heads * length * head_dim * dtype.itemsize
        self._head_bytes = length * head_dim * dtype.itemsize
        self._token_bytes = head_dim * dtype.itemsize

        def tensors() -> list[torch.Tensor]:
            if accelerated:
                outside = (slots, length, kv_heads, head_dim)
                made = [torch.zeros(outside, dtype=dtype, device=device) for _ in range(layers)]
                return [tensor.transpose(1, 2) for tensor in made]
            if not paged:
                return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
            regions = [_reserve(slots * self._slot_bytes) for _ in range(layers)]
            self._regions += regions
            return [torch.frombuffer(region, dtype=dtype).view(shape) for region in regions]

        self.keys = tensors()
        self.values = tensors()

    def carry_out(self, moves: Sequence[Move]) -> None:
        """Do what a plan asks for, in its order."""
        for move in moves:
            if isinstance(move, Copy):
                for tensor in (*self.keys, *self.values):
                    tensor[move.slot, :, : move.tokens] = tensor[move.source, :, : move.tokens]
            else:
                self._release(move.slot, move.from_token)

    def _release(self, slot: int, from_token: int) -> None:
        """Give back the memory of a slot from a token on, which begins a block."""
        if not self._regions:
            if from_token == 0:
                for tensor in (*self.keys, *self.values):
                    tensor[slot].zero_()
            return
        first = slot * self._slot_bytes
        if from_token == 0:
            spans = [(first, self._slot_bytes)]
        else:
            skipped = from_token * self._token_bytes
            spans = [
                (start + skipped, self._head_bytes - skipped)
                for start in range(first, first + self._slot_bytes, self._head_bytes)
                if skipped < self._head_bytes
            ]
        for region in self._regions:
            for start, length in spans:
                region.madvise(mmap.MADV_DONTNEED, start, length)


def _reserve(size: int) -> mmap.mmap:
    """Virtual memory of zeros, in small pages: huge ones would commit what nobody has asked for."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    region = mmap.mmap(-1, size, flags=flags)
    region.madvise(mmap.MADV_NOHUGEPAGE)
    return region
