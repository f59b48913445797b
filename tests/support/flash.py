"""FlashAttention as torch documents it, for machines that it does not run on."""

from itertools import pairwise
from typing import Any

import torch


def documented(
    query: Any,
    key: Any,
    value: Any,
    cu_seq_q: Any,
    cu_seq_k: Any,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Any,
    block_table: Any,
) -> Any:
    """``varlen_attn`` as torch describes it: pages, used lengths, causal to the bottom right."""
    assert cu_seq_k is None
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert key.shape[1] == max_k
    assert key.is_contiguous(), "pages are [page, token, head, number]"
    output = torch.empty_like(query)
    left, right = window_size
    for index, (first, end) in enumerate(pairwise(cu_seq_q.tolist())):
        assert end - first <= max_q
        used = int(seqused_k[index])
        keys = torch.cat([key[page] for page in block_table[index]])[:used]
        values = torch.cat([value[page] for page in block_table[index]])[:used]
        groups = query.shape[1] // key.shape[2]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        for row in range(first, end):
            place = used - (end - row)
            seen = slice(0 if left < 0 else max(place - left, 0), place + right + 1)
            scores = torch.einsum("hd,khd->hk", query[row], keys[seen])
            weights = torch.softmax(scores * (scale or query.shape[-1] ** -0.5), -1)
            output[row] = torch.einsum("hk,khd->hd", weights, values[seen])
    return output
