"""Weights held in half precision where that loses nothing, multiplied in float32.

A checkpoint stored in float16, or in bfloat16 after multiplication with a power of two, has weights
that are float16 numbers. FBGEMM widens them as it multiplies and sums in float32, so that only the
order of the sum differs from the plain product, and half the bytes are read. Every weight is
compared with what would be held of it; one that differs keeps the matrix in float32.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from uellm_worker.engine import panels
from uellm_worker.engine.panels import PanelWeight

_ROWS = 64
"""Rows compared at a time: where weights do not fit, the first ones say so."""
_LARGEST_EXPONENT = 15


@dataclass(frozen=True, slots=True)
class HalfWeight:
    """A matrix in half precision, laid out for products.

    Attributes:
        packed: FBGEMM's own, times a power of two.
        factor: what undoes that.
        out_features: its rows.
        nbytes: what it takes.
    """

    packed: Any
    factor: float
    out_features: int
    nbytes: int

    def product(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, in float32."""
        result: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(rows, self.packed)
        if self.factor != 1.0:
            result.mul_(self.factor)
        return result if bias is None else result.add_(bias)


@dataclass(frozen=True, slots=True)
class HalfRows:
    """The rows of an embedding in half precision, and of the head that shares them.

    Attributes:
        rows: ``[vocabulary, size]`` in float16, times a power of two.
        factor: what undoes that.
        head: the same laid out for products; None where nothing shares them.
    """

    rows: torch.Tensor
    factor: float
    head: HalfWeight | PanelWeight | None


class HalfEmbedding(nn.Module):
    """An embedding that widens what it looks up.

    Args:
        held: its rows.
        plain: the embedding that it replaces; some multiply what they look up.
    """

    def __init__(self, held: HalfRows, plain: nn.Embedding) -> None:
        super().__init__()
        self._held = held
        self._scale = getattr(plain, "embed_scale", None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``[...]`` ids to ``[..., size]`` in float32."""
        found = functional.embedding(ids, self._held.rows).float().mul_(self._held.factor)
        return found if self._scale is None else found.mul_(self._scale)


def half_weight(weight: torch.Tensor) -> HalfWeight | PanelWeight | None:
    """A matrix ``[out, in]`` in float32, held in half precision; None if that would change it."""
    scaled = _scaled(weight)
    if scaled is None:
        return None
    scale, matrix = scaled
    if panels.usable():
        return panels.in_panels(matrix, torch.float16, 1 / scale)
    packed = torch.ops.quantized.linear_prepack_fp16(matrix, None)
    return HalfWeight(packed, 1 / scale, int(weight.shape[0]), 2 * weight.numel())


def half_rows(weight: torch.Tensor, shared: bool) -> HalfRows | None:
    """An embedding ``[vocabulary, size]`` in float32, as ``half_weight``.

    Args:
        weight: see above.
        shared: it is the head's weight as well.
    """
    scaled = _scaled(weight)
    if scaled is None:
        return None
    scale, matrix = scaled
    head = half_weight(weight) if shared else None
    return HalfRows(matrix.half(), 1 / scale, head)


def widens(embedding: Any) -> bool:
    """Whether ``HalfEmbedding`` computes the same as this module does."""
    scaled = type(embedding).__name__.endswith("ScaledWordEmbedding")
    return type(embedding) is nn.Embedding or (scaled and hasattr(embedding, "embed_scale"))


def _scaled(weight: torch.Tensor) -> tuple[float, torch.Tensor] | None:
    """A power of two, and the weight times it, all of whose numbers are float16 numbers."""
    if not (panels.usable() or _supported()) or not weight.numel():
        return None
    largest = float(weight.abs().max())
    if not math.isfinite(largest):
        return None
    exponent = math.frexp(largest)[1] - 1 if largest else _LARGEST_EXPONENT
    # Not beyond what float32 can undo: then nothing would be gained.
    scale = 2.0 ** max(min(_LARGEST_EXPONENT - exponent, 100), 0)
    matrix = torch.empty_like(weight)
    for rows, part in zip(matrix.split(_ROWS), weight.split(_ROWS), strict=True):
        torch.mul(part, scale, out=rows)
        if not torch.equal(rows.half().float(), rows):
            return None
    return scale, matrix


@cache
def _supported() -> bool:
    """This build of torch multiplies half-held weights without rounding what they multiply."""
    numbers = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 512, generator=numbers).half().float()
    rows = torch.randn(3, 512, generator=numbers)
    try:
        packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        got = torch.ops.quantized.linear_dynamic_fp16(rows, packed)
    except (AttributeError, RuntimeError):
        return False
    wanted = rows.double() @ weight.double().T
    return float((got - wanted).abs().max()) < 1e-4
