"""Attention over a slot cache, for packed steps of many sequences.

A step's tokens come as one row ``[1, T]``: decodes first, then prefill chunks. The function below
is registered with transformers, so that the models' own layers call it with rotated queries and
keys. It writes keys and values into ``[slots, kv_heads, max_tokens, head_dim]`` and attends each
sequence to its own slot: decodes of neighbouring slots together, prefill chunks one by one.
"""

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from uellm_worker.engine.packed import DecodeRun, PackedStep, hidden
from uellm_worker.engine.slot_memory import SlotMemory
from uellm_worker.engine.varlen import attend_spans

ATTENTION = "uellm"
"""Name of the attention function."""


class SlotCache(SlotMemory):
    """Keys and values of the layers of one device, and the step that uses them.

    Attributes:
        step: the one that is being computed.
    """

    step: PackedStep | None = None


class LayerCache:
    """One layer's part of a cache; its attention module carries it."""

    __slots__ = ("cache", "index")

    def __init__(self, cache: SlotCache, index: int) -> None:
        self.cache = cache
        self.index = index


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend a packed step to the cache. The signature is transformers'.

    Args:
        module: the layer's attention, carrying a ``LayerCache`` as ``uellm``.
        query: ``[1, heads, T, head_dim]``.
        key: ``[1, kv_heads, T, head_dim]``.
        value: as ``key``.
        attention_mask: none is made for this function.
        scaling: of the scores.
        sliding_window: tokens seen, the present one included; None for all.
        softcap: of the scores; None for none.
        kwargs: what other attention functions use.

    Returns:
        ``[1, T, heads, head_dim]``, and no weights.
    """
    del attention_mask, kwargs
    layer: LayerCache = module.uellm
    step = layer.cache.step
    if step is None:
        raise RuntimeError("attention outside of a step")
    keys, values = layer.cache.keys[layer.index], layer.cache.values[layer.index]
    keys[step.slots, :, step.positions] = key[0].transpose(0, 1)
    values[step.slots, :, step.positions] = value[0].transpose(0, 1)
    attended = attend(
        step, query[0].transpose(0, 1), keys, values, scaling, sliding_window, softcap
    )
    return attended[None], None


def attend(
    step: PackedStep,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend a packed step to a layer's cache, in which its keys and values are.

    Args:
        step: whose rows.
        query: ``[T, heads, head_dim]``.
        keys: ``[slots, kv_heads, max_tokens, head_dim]``.
        values: as ``keys``.
        scaling: of the scores; None for the inverse root of ``head_dim``.
        window: tokens seen, the present one included; None for all.
        softcap: of the scores; None for none.

    Returns:
        ``[T, heads, head_dim]``.
    """
    if step.flash is not None and step.spans is not None and softcap is None:
        return attend_spans(step.flash, step.spans, query, keys, values, scaling, window)
    tokens, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    factor = scaling or head_dim**-0.5
    if step.kernels is not None and step.table is not None:
        return step.kernels.attend(
            query, keys, values, step.table, step.longest, factor, window, softcap
        )
    # On CPUs two plain products are faster than the kernel for long queries.
    by_products = query.device.type == "cpu" and query.dtype == torch.float32
    output = query.new_empty(tokens, heads, head_dim)
    for index, run in enumerate(step.runs):
        rows = slice(run.row, run.row + run.count)
        if by_products:
            mask = step.run_mask(index, window, query.dtype, kv_heads)
            attended = _attend_by_products(query[rows], run, keys, values, mask, factor, softcap)
        else:
            mask = step.run_mask(index, window, query.dtype)
            attended = _attend_run(query[rows], run, keys, values, mask, scaling, softcap)
        if run.count == tokens:
            return attended.reshape(tokens, heads, head_dim)
        output[rows] = attended.reshape(run.count, heads, head_dim)
    for index, (row, chunk) in enumerate(step.prefills):
        rows = slice(row, row + chunk.count)
        end = chunk.start + chunk.count
        mask = step.chunk_mask(index, window, query.dtype)
        attended = _attend(
            query[rows].transpose(0, 1)[None],
            keys[chunk.slot : chunk.slot + 1, :, :end],
            values[chunk.slot : chunk.slot + 1, :, :end],
            mask,
            scaling,
            softcap,
            causal=mask is None and chunk.count > 1,
        )
        output[rows] = attended[0].transpose(0, 1)
    return output


def _attend_run(
    query: torch.Tensor,
    run: DecodeRun,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend one token of each sequence: ``[count, heads, head_dim]``, its heads in groups.

    The queries that share a key head stand where several tokens of one head would.
    """
    slots = slice(run.slot, run.slot + run.count)
    return _attend(
        query.reshape(run.count, keys.shape[1], -1, keys.shape[3]),
        keys[slots, :, : run.longest],
        values[slots, :, : run.longest],
        None if mask is None else mask[:, None],
        scaling,
        softcap,
    )


def _attend_by_products(
    query: torch.Tensor,
    run: DecodeRun,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    factor: float,
    softcap: float | None,
) -> torch.Tensor:
    """As ``_attend_run``, with the key heads of all sequences as one batch."""
    slots, kv_heads, _, head_dim = keys.shape
    heads = slice(run.slot * kv_heads, (run.slot + run.count) * kv_heads)
    keys = keys.view(slots * kv_heads, -1, head_dim)[heads, : run.longest].transpose(1, 2)
    values = values.view(slots * kv_heads, -1, head_dim)[heads, : run.longest]
    query = query.reshape(run.count * kv_heads, -1, head_dim)
    if softcap is not None:
        scores = torch.bmm(query, keys).mul_(factor / softcap).tanh_().mul_(softcap)
        if mask is not None:
            scores += mask
    elif mask is None:
        scores = torch.bmm(query * factor, keys)
    else:
        scores = torch.baddbmm(mask, query, keys, alpha=factor)
    return torch.bmm(torch.softmax(scores, dim=-1), values)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention; query heads are a multiple of key heads."""
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    if causal:
        positions = torch.arange(query.shape[2], device=query.device)
        mask = hidden(positions[:, None], query.shape[2], None, scores.dtype)
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value


AttentionInterface.register(ATTENTION, attention)
