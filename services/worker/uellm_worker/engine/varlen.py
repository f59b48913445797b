"""FlashAttention over the slots of a cache: one call a layer for all rows of a step.

torch offers it for half precision on CUDA devices. The cache is to it a pool of pages, one a slot;
so the lengths of sequences stay on the device, and a step of decodes is the same program whatever
they are. Before it is used, a small step is computed by it and by the plain path: where it is
missing, refuses or differs, the plain path stays.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from uellm_worker.engine.plan import Chunk

PAGE_TOKENS = 256
"""What the kernels want pages to be multiples of."""
_DTYPES = (torch.bfloat16, torch.float16)
_MOST_HEAD_DIM = 256

Kernel = Callable[..., torch.Tensor]
"""``torch.nn.attention.varlen.varlen_attn``."""


class Spans:
    """Where the queries of a step begin, and how much of each slot they see.

    Args:
        chunks: in row order.
        device: of the cache.

    Attributes:
        starts: ``[n + 1]``, rows at which chunks begin, and the end.
        seen: ``[n]``, tokens in the slot after the step.
        pages: ``[n, 1]``, the slots.
        longest: rows of the longest chunk.
    """

    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        starts = [0]
        for chunk in chunks:
            starts.append(starts[-1] + chunk.count)
        ends = [chunk.start + chunk.count for chunk in chunks]
        slots = [chunk.slot for chunk in chunks]
        # One transfer instead of three.
        packed = torch.tensor([*starts, *ends, *slots], dtype=torch.int32).to(
            device, non_blocking=True
        )
        count = len(chunks)
        self.starts = packed[: count + 1]
        self.seen = packed[count + 1 : 2 * count + 1]
        self.pages = packed[2 * count + 1 :].view(count, 1)
        self.longest = max((chunk.count for chunk in chunks), default=1)


def kernel() -> Kernel | None:
    """The attention of this build of torch; None if it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 (torch 2.10 and later)
    except ImportError:
        return None
    return varlen_attn


def attend_spans(
    flash: Kernel,
    spans: Spans,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attend a step to a layer's cache; see ``uellm_worker.engine.attention.attend``.

    Args:
        flash: the kernel.
        spans: of the step.
        query: ``[T, heads, head_dim]``.
        keys: ``[slots, kv_heads, max_tokens, head_dim]``, tokens lying outside of heads.
        values: as ``keys``.
        scaling: of the scores; None for the inverse root of ``head_dim``.
        window: tokens seen, the present one included; None for all.

    Returns:
        ``[T, heads, head_dim]``.
    """
    return flash(
        query,
        keys.transpose(1, 2),
        values.transpose(1, 2),
        spans.starts,
        None,
        spans.longest,
        keys.shape[2],
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != keys.shape[1],
        seqused_k=spans.seen,
        block_table=spans.pages,
    )


@cache
def usable(place: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether such a cache on that device is to be attended to in this way."""
    flash = kernel()
    if place.type != "cuda" or dtype not in _DTYPES or head_dim > _MOST_HEAD_DIM or flash is None:
        return False
    try:
        return agrees(flash, place, dtype, head_dim)
    except (RuntimeError, TypeError, ValueError):  # Whatever a build without the kernels raises.
        return False


def agrees(flash: Kernel, place: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel gives what attention is defined to be, on a step of all kinds of chunk."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(place, dtype)

    heads, kv_heads, window = 4, 2, 7
    keys = random(4, PAGE_TOKENS, kv_heads, head_dim).transpose(1, 2)
    values = random(4, PAGE_TOKENS, kv_heads, head_dim).transpose(1, 2)
    chunks = (
        Chunk(1, 20, 1, True),
        Chunk(3, 3, 1, True),
        Chunk(0, 0, 9, True),
        Chunk(2, 5, 6, True),
    )
    spans = Spans(chunks, place)
    query = random(sum(chunk.count for chunk in chunks), heads, head_dim)
    for seen in (None, window):
        given = attend_spans(flash, spans, query, keys, values, None, seen)
        row = 0
        for chunk in chunks:
            rows = query[row : row + chunk.count].float()
            wanted = _defined(rows, keys[chunk.slot], values[chunk.slot], chunk.start, seen)
            if not torch.allclose(given[row : row + chunk.count].float(), wanted, atol=2e-2):
                return False
            row += chunk.count
    return True


def _defined(query: Any, keys: Any, values: Any, start: int, window: int | None) -> torch.Tensor:
    """Attention of one chunk, ``[count, heads, head_dim]``, in float32."""
    count, heads, head_dim = query.shape
    end = start + count
    groups = heads // keys.shape[0]
    keys = keys[:, :end].float().repeat_interleave(groups, 0)
    values = values[:, :end].float().repeat_interleave(groups, 0)
    scores = query.transpose(0, 1) @ keys.transpose(1, 2) * head_dim**-0.5
    behind = torch.arange(end, device=query.device)
    here = torch.arange(start, end, device=query.device)[:, None]
    unseen = behind > here
    if window is not None:
        unseen |= behind <= here - window
    scores = scores.masked_fill(unseen, float("-inf"))
    return (torch.softmax(scores, dim=-1) @ values).transpose(0, 1)
