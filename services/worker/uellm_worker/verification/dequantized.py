"""A quantised checkpoint's weights in floating point, the plain way.

Shares no code with ``uellm_worker.engine.quantized``, which it is to judge: words are taken apart
number by number, and every input looks up its own group.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from uellm.models.files import tensor_files
from uellm.models.quantization import AWQ, GPTQ, PACK, Quantization

Tensors = dict[str, torch.Tensor]

_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of each of a word's eight numbers, from the lowest bits up."""


def dequantized_tensors(directory: Path, quantization: Quantization, dtype: torch.dtype) -> Tensors:
    """All tensors of a checkpoint, every quantised weight as ``(codes - zeros) * scales``."""
    stored: Tensors = {}
    for path in tensor_files(directory):
        stored |= load_file(path)
    layout = quantization.layout
    bases = [
        name.removesuffix(layout.scales)
        for name in stored
        if name.endswith(f".{layout.scales}")
        and stored.get(name.removesuffix(layout.scales) + layout.codes) is not None
    ]
    whole = {}
    for base in bases:
        ends = (layout.codes, layout.scales, layout.zeros, layout.groups, *layout.beside)
        parts = {end: stored.pop(base + end) for end in ends if base + end in stored}
        whole[f"{base}weight"] = _weight(parts, quantization, dtype)
    return stored | whole


def _weight(parts: Tensors, quantization: Quantization, dtype: torch.dtype) -> torch.Tensor:
    """``[out, in]`` of one layer."""
    layout, bits = quantization.layout, quantization.bits
    codes, scales = parts[layout.codes], parts[layout.scales]
    zeros = parts.get(layout.zeros)
    groups = parts.get(layout.groups)
    middle = 1 << (bits - 1)
    if layout in (GPTQ, AWQ):
        scales = scales.T
        if layout is GPTQ:
            codes, zeros = _numbers(codes.T, bits), _numbers(parts[layout.zeros], bits).T
            zeros = (zeros + quantization.zero_offset) % (1 << bits)
        else:
            codes, zeros = _awq_numbers(codes).T, _awq_numbers(parts[layout.zeros]).T
    else:
        if layout is PACK:
            outputs, inputs = parts["weight_shape"].tolist()
            codes = _numbers(codes, bits)[:, :inputs] - middle
        outputs = len(codes)
        if quantization.symmetric or zeros is None:
            zeros = torch.zeros_like(scales, dtype=torch.long)
        elif zeros.dtype == torch.int32:
            zeros = _numbers(zeros.T, bits)[:, :outputs].T - middle
    inputs = codes.shape[1]
    if groups is None:
        groups = torch.arange(inputs) // (quantization.group_size or inputs)
    groups = groups.long()
    numbers = codes.long() - zeros.long()[:, groups]
    return numbers.to(dtype) * scales[:, groups].to(dtype)


def _numbers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """``[n, w]`` words of 32 bits to ``[n, 32 w / bits]`` numbers."""
    count = 32 // bits
    numbers = torch.empty(len(words), words.shape[1] * count, dtype=torch.long)
    for place in range(count):
        numbers[:, place::count] = words.long() >> (bits * place) & ((1 << bits) - 1)
    return numbers


def _awq_numbers(words: torch.Tensor) -> torch.Tensor:
    """The same for AWQ's order."""
    numbers = torch.empty(len(words), words.shape[1] * 8, dtype=torch.long)
    for place, column in enumerate(_AWQ_COLUMNS):
        numbers[:, column::8] = words.long() >> (4 * place) & 15
    return numbers
