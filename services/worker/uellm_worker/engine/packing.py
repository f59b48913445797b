"""Linear layers whose weights lie as oneDNN wants them; float32 on CPUs.

Laid out once instead of in every call, a product of few rows takes a third to a half of the time.
Only the rounding differs from the plain product.
"""

from functools import cache

import torch
from torch import nn

from uellm_worker.engine.device import on_host

_ROWS = 16
"""Rows of a typical decode step, that the layout is chosen for."""


class PackedLinear(nn.Module):
    """A linear layer with a packed weight.

    Args:
        weight: as ``pack`` returns it.
        bias: ``[out]``, or None.

    Attributes:
        out_features: numbers in a row that comes out.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features = int(weight.shape[0])
        # Neither parameter nor buffer: an opaque tensor cannot be moved or converted.
        self._weight = weight
        self._bias = bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return product(rows, self._weight, self._bias)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """``[out, in]`` in float32 as an opaque tensor of about the same size."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product by oneDNN of rows with a weight, packed or not, where it is ``packable``."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@cache
def _supported() -> bool:
    """This build of torch packs, and what it packs gives the plain product."""
    weight, rows = torch.arange(12.0).view(3, 4), torch.arange(8.0).view(1, 2, 4)
    try:
        return torch.allclose(product(rows, pack(weight), None), rows @ weight.T)
    except (AttributeError, RuntimeError):
        return False


def packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of this kind are to be packed."""
    return on_host(device) and dtype == torch.float32 and _supported()
