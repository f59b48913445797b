"""Weights laid out for float32 products on CPUs: in half precision, or as oneDNN wants them.

Laid out once instead of in every call, a product of few rows takes a third to a half of the time;
in half precision, where that loses nothing, two thirds of that. Only the rounding differs from the
plain product.
"""

from functools import cache, partial
from typing import TypeAlias

import torch
from torch import nn

from uellm_worker.engine import panels
from uellm_worker.engine.device import on_host
from uellm_worker.engine.half import HalfRows, HalfWeight, half_rows, half_weight
from uellm_worker.engine.operations import Operations
from uellm_worker.engine.panels import PanelWeight
from uellm_worker.engine.team import Operation
from uellm_worker.engine.tiles import PANEL_ROWS
from uellm_worker.engine.weights import Held

Packed: TypeAlias = torch.Tensor | HalfWeight | PanelWeight
"""A weight for ``PackedLinear``; oneDNN's is an opaque tensor."""
Laid: TypeAlias = Packed | HalfRows
"""A weight as it is held."""

_ROWS = 16
"""Rows of a typical decode step, that the layout is chosen for."""


class PackedLinear(nn.Module):
    """A linear layer with a packed weight.

    Args:
        weight: as ``pack`` returns it.
        bias: ``[out]``, or None.

    Attributes:
        weight: as it was given.
        bias: likewise; filled up to whole panels where the weight is in panels.
        out_features: numbers in a row that comes out.
    """

    def __init__(self, weight: Packed, bias: torch.Tensor | None) -> None:
        super().__init__()
        # Neither parameter nor buffer: an opaque tensor cannot be moved or converted.
        if isinstance(weight, PanelWeight):
            bias = weight.addend(bias)
        if isinstance(weight, HalfWeight | PanelWeight):
            self.out_features, self._product = weight.out_features, weight.product
        else:
            self.out_features = int(weight.shape[0])
            self._product = partial(product, weight=weight)
        self.weight, self.bias = weight, bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return self._product(rows, bias=self.bias)

    @property
    def width(self) -> int:
        """Outputs of a weight in panels, filled up to whole ones."""
        return PANEL_ROWS * len(self._panels.panels)

    @property
    def in_features(self) -> int:
        """Inputs of a weight in panels."""
        return int(self._panels.panels.shape[1])

    @property
    def numbers(self) -> int:
        """Of a weight in panels, filled up likewise."""
        return self._panels.panels.numel()

    def operation(
        self,
        make: Operations,
        rows: torch.Tensor,
        output: torch.Tensor | None,
        added: torch.Tensor | None,
        *,
        factor: float,
        sampling: bool,
    ) -> Operation:
        """The product with a weight in panels, as kernels are told of it.

        Args:
            make: makes it.
            rows: ``[n, in]``.
            output: gets ``[n, width]``; None: the step's own.
            added: ``[n, out]``, added to the product; other memory than the output's.
            factor: of the product.
            sampling: the rows are those that sample, and not all.
        """
        weight, bias = self._panels, self.bias
        if bias is None:
            raise RuntimeError("panels without what is added to their product")
        if factor != 1.0:
            bias = bias * factor
        return make.multiply(
            rows,
            weight.panels,
            bias,
            output,
            added,
            factor=weight.factor * factor,
            sampling=sampling,
        )

    @property
    def _panels(self) -> PanelWeight:
        if not isinstance(self.weight, PanelWeight):
            raise TypeError("the weight is not in panels")
        return self.weight


def pack(weight: torch.Tensor) -> Packed:
    """``[out, in]`` in float32, laid out for products."""
    half = half_weight(weight)
    if half is not None:
        return half
    if panels.usable():
        return panels.in_panels(weight, torch.float32)
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


def lay_out(held: Held, weight: torch.Tensor) -> Laid:
    """A weight of a checkpoint as it is to be held."""
    if held.looked_up:
        rows = half_rows(weight, shared=held.packed)
        return weight if rows is None else rows
    return pack(weight.T.contiguous() if held.transposed else weight) if held.packed else weight


def held_bytes(weight: Laid) -> int:
    """What a weight takes."""
    if isinstance(weight, HalfWeight | PanelWeight):
        return weight.nbytes
    if isinstance(weight, HalfRows):
        return weight.rows.nbytes + (weight.head.nbytes if weight.head is not None else 0)
    return weight.numel() * weight.element_size()


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product by oneDNN of rows with a weight, packed or not, where it is ``packable``."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@cache
def _supported() -> bool:
    """This build of torch packs, and what it packs gives the plain product."""
    weight, rows = torch.arange(12.0).view(3, 4), torch.arange(8.0).view(1, 2, 4)
    try:
        return torch.allclose(
            product(rows, torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS), None),
            rows @ weight.T,
        )
    except (AttributeError, RuntimeError):
        return False


def packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of this kind are to be packed."""
    return on_host(device) and dtype == torch.float32 and (panels.usable() or _supported())
