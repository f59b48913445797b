"""Linear layers that hold whole codes and scales, and multiply with ``(codes - zeros) * scales``.

Weights are made for some rows at a time, in a buffer that stays in the cache, and multiplied there.
That is a quarter to an eighth of the bytes to read, and only the rounding differs from the plain
product. torch's own kernels are used where they were found faster: see docs/adr/0017.
"""

import threading
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import linear

from uellm.models.quantization import Quantization
from uellm_worker.engine.packing import packable, product

_BLOCK_NUMBERS = {"cpu": 1 << 20}
"""Numbers of a weight that are made at a time: what a core's cache holds."""
_BLOCK_NUMBERS_ELSEWHERE = 1 << 24
_FEW_ROWS = 16
"""Up to which torch's kernel for bfloat16 beats making the weights."""
_KERNEL_COLUMNS = 32
"""Inputs that this kernel takes come in multiples of this."""


class _Scratch(threading.local):
    """Memory for the weights of a block, one piece a thread, device and dtype."""

    def __init__(self) -> None:
        self._held: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def take(self, rows: int, columns: int, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
        """``[rows, columns]`` of anything; valid until it is taken again."""
        key, count = (like.device, dtype), rows * columns
        held = self._held.get(key)
        if held is None or held.numel() < count:
            with torch.inference_mode(mode=False):
                held = self._held[key] = torch.empty(count, dtype=dtype, device=like.device)
        return held[:count].view(rows, columns)


_scratch = _Scratch()


class QuantizedLinear(nn.Module):
    """A linear layer with a quantised weight.

    Codes and zeros are held less their middle. Two codes of 4 bits make a byte: that of column j
    in the lower half, that of column j + w in the upper, of w bytes a row.

    Args:
        plain: the layer that it replaces; its bias is taken over.
        quantization: of the weight.
        scales: dtype of the scales.

    Attributes:
        in_features: numbers in a row that comes in.
        out_features: numbers in a row that comes out.
        quantization: of the weight.
        group_size: inputs that share a scale.
        codes: ``[out, w]`` in int8.
        scales: ``[out, groups]``.
        zeros: ``[out, groups]`` in int8; None where they are the middle.
        bias: ``[out]``, or None.
    """

    def __init__(self, plain: nn.Linear, quantization: Quantization, scales: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.quantization = quantization
        self.group_size = quantization.group_size or plain.in_features
        groups = quantization.groups(plain.in_features)
        width = quantization.code_bytes(plain.in_features)

        def empty(columns: int, dtype: torch.dtype) -> nn.Parameter:
            tensor = torch.empty(plain.out_features, columns, dtype=dtype, device="meta")
            return nn.Parameter(tensor, requires_grad=False)

        self.codes = empty(width, torch.int8)
        self.scales = empty(groups, scales)
        self.register_parameter(
            "zeros", None if quantization.symmetric else empty(groups, torch.int8)
        )
        self.register_parameter("bias", plain.bias)

    @classmethod
    def joined(cls, layers: Sequence["QuantizedLinear"]) -> "QuantizedLinear":
        """A layer, without storage, that gives what these do, one after another."""
        first = layers[0]
        plain = nn.Linear(
            first.in_features,
            sum(layer.out_features for layer in layers),
            bias=first.bias is not None,
            device="meta",
            dtype=None if first.bias is None else first.bias.dtype,
        )
        return cls(plain.requires_grad_(False), first.quantization, first.scales.dtype)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        flat = rows.reshape(-1, self.in_features)
        plain = self.zeros is None and self.scales.shape[1] == 1
        if plain and self.quantization.bits == 8 and _has_kernel(flat):
            scales = self.scales[:, 0].to(flat.dtype)
            output = torch._weight_int8pack_mm(flat.contiguous(), self.codes, scales)
        else:
            # Half precision could not hold the products of bare codes.
            late = plain and flat.dtype == torch.float32
            output = self._in_blocks(flat, late=late)
            if late:
                output *= self.scales[:, 0]
        if self.bias is not None:
            output += self.bias
        return output.view(*rows.shape[:-1], self.out_features)

    def _in_blocks(self, rows: torch.Tensor, *, late: bool) -> torch.Tensor:
        """The product, some outputs at a time; ``late``: the scales are still to be applied."""
        most = _BLOCK_NUMBERS.get(rows.device.type, _BLOCK_NUMBERS_ELSEWHERE)
        step = max(most // self.in_features, 1)
        output = rows.new_empty(len(rows), self.out_features)
        fast = packable(rows.device, rows.dtype)
        for start in range(0, self.out_features, step):
            part = slice(start, start + step)
            weights = self._weights(part, rows.dtype, scaled=not late)
            if fast and weights.is_contiguous():
                output[:, part] = product(rows, weights, None)
            else:
                output[:, part] = linear(rows, weights)
        return output

    def _weights(self, part: slice, dtype: torch.dtype, *, scaled: bool = True) -> torch.Tensor:
        """``[outputs, in]`` of some outputs, in memory that the next call writes to again."""
        codes = self.codes[part]
        count, width = codes.shape
        bits = self.quantization.bits
        columns = width if bits == 8 else 2 * width
        weights = _scratch.take(count, columns, dtype, codes)
        if bits == 8:
            weights.copy_(codes)
        else:
            half = _scratch.take(count, width, torch.int8, codes)
            torch.bitwise_left_shift(codes, 4, out=half)
            weights[:, :width].copy_(half.bitwise_right_shift_(4))
            torch.bitwise_right_shift(codes, 4, out=half)
            weights[:, width:].copy_(half)
        weights = weights[:, : self.in_features]
        if scaled:
            for columns_of, groups in self._spans():
                grouped = weights[:, columns_of].unflatten(1, (groups.stop - groups.start, -1))
                if self.zeros is not None:
                    grouped.sub_(self.zeros[part, groups, None].to(dtype))
                grouped.mul_(self.scales[part, groups, None].to(dtype))
        return weights

    def _spans(self) -> list[tuple[slice, slice]]:
        """Columns, and their groups, that are cut evenly: the whole groups, and what is left."""
        whole = self.in_features // self.group_size
        edge, groups = whole * self.group_size, self.scales.shape[1]
        spans = [(slice(0, edge), slice(0, whole))] if whole else []
        if groups > whole:
            spans.append((slice(edge, self.in_features), slice(whole, groups)))
        return spans


def _has_kernel(rows: torch.Tensor) -> bool:
    """Whether torch has a kernel for such rows that is faster than making the weights."""
    # It reads whole vectors, also beyond a row that does not end with one.
    whole = rows.shape[1] % _KERNEL_COLUMNS == 0
    few = len(rows) <= _FEW_ROWS
    return whole and few and rows.device.type == "cpu" and rows.dtype == torch.bfloat16
