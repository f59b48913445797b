"""Weights in panels, in float32 or float16, for the kernel of ``kernels/panels.py``."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from uellm_worker.engine.native import load
from uellm_worker.engine.tiles import PANEL_ROWS


@dataclass(frozen=True, slots=True)
class PanelWeight:
    """A matrix ``[out, in]``, laid out for products.

    Attributes:
        panels: ``[out / 32, in, 32]``, filled up with zeros.
        factor: of the products.
        out_features: rows of the matrix.
    """

    panels: torch.Tensor
    factor: float
    out_features: int

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.panels.nbytes

    def addend(self, bias: torch.Tensor | None) -> torch.Tensor:
        """``[out]`` as ``product`` takes it, filled up to whole panels."""
        width = PANEL_ROWS * len(self.panels)
        if bias is None:
            return torch.zeros(width)
        return functional.pad(bias.detach(), (0, width - len(bias)))

    def product(self, rows: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``, in float32; ``bias`` comes from ``addend``."""
        found = load()
        if found is None:
            raise RuntimeError("panels without the kernel that multiplies them")
        given = rows.reshape(-1, self.panels.shape[1])
        output = given.new_empty(len(given), PANEL_ROWS * len(self.panels))
        if len(given):
            found.multiply(given, self.panels, self.factor, bias, output)
        return output[:, : self.out_features].reshape(*rows.shape[:-1], self.out_features)


def usable() -> bool:
    """This machine multiplies by panels."""
    found = load()
    return found is not None and found.operations.multiplies


def in_panels(weight: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> PanelWeight:
    """Lay out a matrix ``[out, in]``, to be held in float32 or float16."""
    rows, depth = weight.shape
    panels = torch.zeros(-(-rows // PANEL_ROWS), depth, PANEL_ROWS, dtype=dtype)
    whole = rows // PANEL_ROWS
    inside = weight[: whole * PANEL_ROWS].view(whole, PANEL_ROWS, depth)
    panels[:whole].copy_(inside.transpose(1, 2))
    if rows % PANEL_ROWS:
        panels[-1, :, : rows % PANEL_ROWS].copy_(weight[whole * PANEL_ROWS :].T)
    return PanelWeight(panels, factor, rows)
