"""Quantised linear layers whose codes lie in panels, for the kernel of ``kernels/codes.py``.

Codes are widened in registers, so that a product reads what the checkpoint takes and no more.
"""

from functools import cached_property

import torch
from torch.nn.functional import pad

from uellm.models.quantization import Quantization
from uellm_worker.engine import panels
from uellm_worker.engine.device import on_host
from uellm_worker.engine.native import load
from uellm_worker.engine.operations import Codes, Operations
from uellm_worker.engine.quantized import QuantizedLinear
from uellm_worker.engine.team import Operation
from uellm_worker.engine.tiles import PANEL_ROWS
from uellm_worker.engine.weights import PanelsOf, ShardSpec


class QuantizedPanels(QuantizedLinear):
    """A quantised linear layer in float32 on the CPU.

    Once loaded, ``codes``, ``scales`` and ``zeros`` are as ``Codes`` has them.
    """

    @cached_property
    def _weight(self) -> Codes:
        return Codes(
            self.codes.data,
            self.scales.data,
            None if self.zeros is None else self.zeros.data,
            self.quantization.bits,
            self.in_features,
            self.group_size,
        )

    @cached_property
    def _addend(self) -> torch.Tensor:
        if self.bias is None:
            return torch.zeros(self.width)
        return pad(self.bias.detach(), (0, self.width - self.out_features))

    @property
    def width(self) -> int:
        """Outputs, filled up to whole panels."""
        return -(-self.out_features // PANEL_ROWS) * PANEL_ROWS

    @property
    def numbers(self) -> int:
        """Of the matrix, filled up likewise."""
        return self.width * self.in_features

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
        """See ``uellm_worker.engine.packing.PackedLinear``."""
        addend = self._addend if factor == 1.0 else self._addend * factor
        return make.multiply_codes(
            rows, self._weight, addend, output, added, factor=factor, sampling=sampling
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        found = load()
        if found is None:
            raise RuntimeError("panels without the kernel that multiplies them")
        flat = rows.reshape(-1, self.in_features)
        output = flat.new_empty(len(flat), self.width)
        if len(flat):
            found.multiply_codes(flat, self._weight, self._addend, output)
        return output[:, : self.out_features].reshape(*rows.shape[:-1], self.out_features)


def suits(spec: ShardSpec, quantization: Quantization, inputs: int) -> bool:
    """Whether the kernel multiplies a layer with so many inputs."""
    if not on_host(spec.device) or spec.dtype != torch.float32 or not panels.usable():
        return False
    # Two codes of a byte belong to one group.
    return quantization.bits == 8 or not (inputs % 2 or quantization.group_size % 2)


def code_panels(tensor: torch.Tensor, of: PanelsOf, inputs: int) -> torch.Tensor:
    """Lay out a parameter of ``QuantizedLinear``, ``[out, n]``, as ``Codes`` has it.

    Args:
        tensor: it.
        of: what it is.
        inputs: of the layer.
    """
    if of == "pairs":
        codes = torch.cat((tensor & 15, tensor >> 4), 1)[:, :inputs]
        tensor = (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)
    return panels.in_panels(tensor, tensor.dtype).panels
