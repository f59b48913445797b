"""Operations on tensors, as kernels are told of them: float32 on the CPU.

Sizes are those that whoever asks for them has checked. Rows are ``[rows, size]`` with any distance
between them; how many of them count is said by the step.
"""

from dataclasses import dataclass
from typing import Any

import torch

from uellm_worker.engine.team import Operation
from uellm_worker.engine.tiles import (
    ADAPTED,
    ONCE,
    PANEL_ROWS,
    ROW_PIECES,
    ROWS,
    SAMPLE_PIECES,
    SAMPLE_TABLE,
    SAMPLES,
    SAMPLING,
    SPANS,
)

_SCALES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""As kernels know them."""


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix ``[out, in]`` that is ``(codes - zeros) * scales``, in panels of outputs.

    Attributes:
        codes: ``[panels, in, PANEL_ROWS]`` in int8, or in 4 bits ``[panels, in / 2, PANEL_ROWS]``:
            of two inputs that follow each other, the first in the lower half.
        scales: ``[panels, groups, PANEL_ROWS]`` in floating point.
        zeros: as ``scales`` in int8; None: they are 0.
        bits: of a code.
        in_features: inputs.
        group_size: inputs that share a scale; even where codes have 4 bits.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    in_features: int
    group_size: int


class Operations:
    """Makes them.

    Args:
        attention: ``kernels/attention.py``.
        rows: ``kernels/rows.py``.
        panels: ``kernels/panels.py``; None where its kernels gain nothing.
        codes: ``kernels/codes.py``; None likewise.
        adapters: ``kernels/adapters.py``.
    """

    def __init__(self, attention: Any, rows: Any, panels: Any, codes: Any, adapters: Any) -> None:
        self._attend = int(attention.attend.address)
        self._place = int(attention.place.address)
        self._norm = int(rows.norm.address)
        self._activate = int(rows.activate.address)
        self._multiply = 0 if panels is None else int(panels.multiply.address)
        self._adapt = int(adapters.adapt.address)
        self._multiply_codes = 0 if codes is None else int(codes.multiply.address)

    @property
    def multiplies(self) -> bool:
        """``multiply`` is there."""
        return self._multiply != 0

    def multiply(
        self,
        rows: torch.Tensor,
        panels: torch.Tensor,
        addend: torch.Tensor,
        output: torch.Tensor | None,
        added: torch.Tensor | None = None,
        *,
        factor: float = 1.0,
        sampling: bool = False,
    ) -> Operation:
        """Rows times a weight.

        Args:
            rows: ``[n, in]``.
            panels: the weight, as ``PanelWeight`` has it.
            addend: a bias as ``PanelWeight.addend`` has it, added to the product.
            output: gets ``[n, out]``, filled up to whole panels; None: the step's own.
            added: ``[n, out]``, added to the product; other memory than the output's.
            factor: of the product.
            sampling: the rows are those that sample, and not all.
        """
        if not self._multiply:
            raise RuntimeError("no kernel multiplies on this machine")
        count, depth = panels.shape[:2]
        block = (
            *_rows(rows),
            panels.data_ptr(),
            panels.dtype == torch.float16,
            addend.data_ptr(),
            0 if output is None else output.data_ptr(),
            4 * PANEL_ROWS * count if output is None else _rows(output)[1],
            depth,
            SAMPLES if sampling else ROWS,
            float(factor),
            *_rows(added),
        )
        per = SAMPLING if sampling else ONCE
        tensors = (rows, panels, addend, output, added)
        return Operation(self._multiply, count, per, block, "products", tensors)

    def multiply_codes(
        self,
        rows: torch.Tensor,
        weight: Codes,
        addend: torch.Tensor,
        output: torch.Tensor | None,
        added: torch.Tensor | None = None,
        *,
        factor: float = 1.0,
        sampling: bool = False,
    ) -> Operation:
        """Rows times a quantised weight; as ``multiply``.

        Args:
            rows: ``[n, in]``.
            weight: see there.
            addend: see ``multiply``.
            output: likewise.
            added: likewise.
            factor: likewise.
            sampling: likewise.
        """
        if not self._multiply_codes:
            raise RuntimeError("no kernel multiplies on this machine")
        count, groups = weight.scales.shape[:2]
        block = (
            *_rows(rows),
            weight.codes.data_ptr(),
            weight.bits,
            weight.in_features,
            weight.scales.data_ptr(),
            _SCALES[weight.scales.dtype],
            0 if weight.zeros is None else weight.zeros.data_ptr(),
            weight.group_size,
            groups,
            addend.data_ptr(),
            0 if output is None else output.data_ptr(),
            4 * PANEL_ROWS * count if output is None else _rows(output)[1],
            SAMPLES if sampling else ROWS,
            float(factor),
            *_rows(added),
        )
        per = SAMPLING if sampling else ONCE
        tensors = (rows, weight.codes, weight.scales, weight.zeros, addend, output, added)
        return Operation(self._multiply_codes, count, per, block, "products", tensors)

    def adapt(
        self,
        rows: torch.Tensor,
        output: torch.Tensor,
        adapters: torch.Tensor,
        scratch: torch.Tensor,
        inputs: int,
        factor: float,
    ) -> Operation:
        """Add what LoRA adapters make of rows.

        Args:
            rows: ``[n, inputs]``.
            output: ``[n, out]``, added to.
            adapters: ``[adapters]``, addresses of what each is, as ``LoraLinear.table`` has it.
            scratch: ``[members, ranks]``.
            inputs: of a row.
            factor: of what is added.
        """
        addresses = (adapters.data_ptr(), inputs, *_rows(scratch))
        block = (*_rows(rows), *_rows(output), *addresses, float(factor), len(adapters))
        tensors = (rows, output, adapters, scratch)
        return Operation(self._adapt, 1, ADAPTED, block, "products", tensors)

    def norm(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        output: torch.Tensor,
        added: torch.Tensor | None = None,
        *,
        eps: float,
        centred: bool = False,
        factor: float = 1.0,
        sampling: bool = False,
    ) -> Operation:
        """Norms of rows, or of segments of rows.

        Args:
            rows: ``[n, segments * size]``.
            weight: ``[segments, size]`` or ``[size]``.
            bias: as ``weight``, or None.
            output: gets as much; may be the same.
            added: rows that are added to the norms times ``factor``; other memory.
            eps: added to the mean squares.
            centred: the mean is taken away first.
            factor: see ``added``.
            sampling: of those rows that sample, into as many rows.
        """
        size = weight.shape[-1]
        block = (
            *_rows(rows),
            *_rows(output),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            size,
            weight.numel() // size,
            centred,
            float(eps),
            *_rows(added),
            float(factor),
            SAMPLES if sampling else ROWS,
            SAMPLE_TABLE if sampling else 0,
        )
        per = SAMPLE_PIECES if sampling else ROW_PIECES
        tensors = (rows, weight, bias, output, added)
        return Operation(self._norm, 1, per, block, "norms", tensors)

    def activate(
        self, rows: torch.Tensor, output: torch.Tensor, size: int, *, gelu: bool, gated: bool
    ) -> Operation:
        """SiLU, or GELU by hyperbolic tangents, of the first ``size`` numbers of rows.

        Args:
            rows: ``[n, size]``, or twice as many if ``gated``.
            output: gets ``[n, size]``.
            size: see above.
            gelu: which.
            gated: times as many numbers behind them.
        """
        block = (*_rows(rows), *_rows(output), size, gelu, gated)
        return Operation(self._activate, 1, ROWS, block, "gates", (rows, output))

    def place(
        self,
        heads: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        query_heads: int,
        *,
        kind: int = 0,
        pairs: int = 0,
    ) -> Operation:
        """Rotate queries and keys in place; write keys and values into the cache.

        Args:
            heads: ``[n, (query_heads + 2 * kv_heads) * head_dim]``: queries, keys, values.
            keys: ``[slots, kv_heads, max_tokens, head_dim]``.
            values: as ``keys``.
            query_heads: of each row.
            kind: index of the rotation among those of the step.
            pairs: the first so many pairs of each head turn.
        """
        kv_heads, head_dim = keys.shape[1], keys.shape[3]
        strides = (4 * keys.stride(0), 4 * keys.stride(1))
        cache = (keys.data_ptr(), values.data_ptr(), *strides)
        block = (*_rows(heads), kind, pairs, *cache, query_heads + kv_heads, kv_heads, head_dim)
        return Operation(self._place, 1, ROW_PIECES, block, "places", (heads, keys, values))

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        scratch: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Operation:
        """Attend rows to their slots.

        Args:
            query: ``[n, heads * head_dim]``, or with more behind; ``head_dim`` a multiple of
                ``HEAD_NUMBERS``.
            keys: ``[slots, kv_heads, max_tokens, head_dim]``.
            values: as ``keys``.
            output: gets ``[n, heads * head_dim]``.
            scratch: ``[members, SPAN_ROWS * heads / kv_heads * longest]``.
            scaling: of the scores.
            window: tokens seen, the present one included; None for all.
            softcap: of the scores; None for none.
        """
        kv_heads, head_dim = keys.shape[1], keys.shape[3]
        block = (
            *_rows(query),
            *_rows(output),
            *_rows(scratch),
            keys.data_ptr(),
            values.data_ptr(),
            4 * keys.stride(0),
            4 * keys.stride(1),
            kv_heads,
            output.shape[1] // (kv_heads * head_dim),
            head_dim,
            window or 0,
            float(scaling),
            float(softcap or 0.0),
        )
        tensors = (query, keys, values, output, scratch)
        return Operation(self._attend, kv_heads, SPANS, block, "attention", tensors)


def _rows(rows: torch.Tensor | None) -> tuple[int, int]:
    """Where they begin, and bytes from one to the next."""
    return (0, 0) if rows is None else (rows.data_ptr(), 4 * rows.stride(0))
