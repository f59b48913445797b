"""The quantised layers of a checkpoint: which they are, and what is held of what it stores."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from uellm.core.errors import ModelFilesError
from uellm.models.families import Family
from uellm.models.files import tensor_files
from uellm.models.quantization import AWQ, INT, PACK, Quantization, unservable_layer
from uellm.models.safetensors import TensorInfo, read_header
from uellm_worker.engine.checkpoint import TensorFiles
from uellm_worker.engine.quantized import QuantizedLinear
from uellm_worker.engine.quantized_panels import QuantizedPanels, suits
from uellm_worker.engine.weights import ShardSpec, Source

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of a word's codes each of eight columns is."""


def quantize_layers(
    model: Any, spec: ShardSpec, family: Family, quantization: Quantization | None
) -> dict[str, Source]:
    """Replace the linear layers of a hollow model that the checkpoint holds quantised.

    Returns:
        Where each of their parameters comes from, by its name.

    Raises:
        ModelFilesError: if one cannot be served.
    """
    if quantization is None:
        return {}
    stored = _Stored(spec, family, quantization)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    sources: dict[str, Source] = {}
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        base = stored.base(name)
        if not base or (tied and name == family.head_weight):
            continue
        plain = model.get_submodule(path)
        if leaf != "weight" or not isinstance(plain, nn.Linear):
            raise unservable_layer(spec.model_dir, base + quantization.layout.codes)
        owner, _, child = path.rpartition(".")
        kind = QuantizedPanels if suits(spec, quantization, plain.in_features) else QuantizedLinear
        layer = kind(plain, quantization, stored.scales_dtype(base))
        setattr(model.get_submodule(owner), child, layer)
        sources |= {f"{path}.{part}": found for part, found in stored.sources(base, plain).items()}
    return sources


class _Stored:
    """The quantised layers of a checkpoint.

    Args:
        spec: the shard that they are for.
        family: how the checkpoint names them.
        quantization: how it lays them out.
    """

    def __init__(self, spec: ShardSpec, family: Family, quantization: Quantization) -> None:
        self._dir = spec.model_dir
        self._family = family
        self._quantization = quantization
        self._tensors: dict[str, TensorInfo] = {}
        for path in tensor_files(spec.model_dir):
            self._tensors |= read_header(path)

    def base(self, weight: str) -> str:
        """What names of a layer's tensors start with, by its weight's; "" if it is not quantised.

        Raises:
            ModelFilesError: if it is one of a stack of experts.
        """
        quantization, tensors = self._quantization, self._tensors
        ending = quantization.layout.codes

        def held(name: str) -> bool:
            name = name.removesuffix("weight") + ending
            return name in tensors and quantization.is_codes(name, tensors[name])

        (piece, *_) = self._family.pieces(weight, 1, held)
        if not held(piece.key):
            return ""
        if piece.expert is not None:
            raise unservable_layer(self._dir, piece.key.removesuffix("weight") + ending)
        return piece.key.removesuffix("weight")

    def scales_dtype(self, base: str) -> torch.dtype:
        """The dtype that a layer's scales are stored in.

        Raises:
            ModelFilesError: if it has none.
        """
        name = base + self._quantization.layout.scales
        info = self._tensors.get(name)
        if info is None or info.dtype not in _DTYPES:
            raise ModelFilesError(
                f"{self._dir} has no tensor {name!r} of floating point: it is incomplete, or not "
                "laid out as its quantization_config says"
            )
        return _DTYPES[info.dtype]

    def sources(self, base: str, plain: nn.Linear) -> dict[str, Source]:
        """Where the parameters of a layer come from.

        Raises:
            ModelFilesError: if its groups are not consecutive, or its zero points not the middle
                although the config says so.
        """
        quantization = self._quantization
        layout, inputs, outputs = quantization.layout, plain.in_features, plain.out_features
        read = partial(_unpacked, quantization, inputs, outputs)
        if base + layout.groups in self._tensors:
            self._check(base + layout.groups, partial(_consecutive, quantization, inputs), "order")
        scales = base + layout.scales
        parts = {
            "codes": Source(base + layout.codes, read("codes")),
            "scales": Source(scales, read("scales")),
        }
        zeros = base + layout.zeros
        if not quantization.symmetric:
            parts["zeros"] = Source(zeros, read("zeros"))
        elif zeros in self._tensors:
            middle = read("zeros")
            self._check(zeros, lambda tensor: not middle(tensor).any(), "symmetry")
        return parts

    def _check(self, name: str, holds: Callable[[torch.Tensor], Any], what: str) -> None:
        """Refuse a checkpoint whose config and tensors contradict each other."""
        for key, tensor in TensorFiles(self._dir).read([name]):
            if not holds(tensor):
                raise ModelFilesError(
                    f"{self._dir}, tensor {key!r} does not have the {what} that the config claims: "
                    "activation order (desc_act, actorder), other groups than group_size and "
                    "other zero points than the middle of a symmetric checkpoint are not served; "
                    "correct the config, or quantise it again without"
                )


def _consecutive(quantization: Quantization, inputs: int, groups: torch.Tensor) -> bool:
    """Each input belongs to the group of its place."""
    size = quantization.group_size or inputs
    return torch.equal(groups.long(), torch.arange(inputs) // size)


def _unpacked(
    quantization: Quantization, inputs: int, outputs: int, part: str
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What turns a stored tensor into the parameter that ``part`` names.

    The result has another shape than the parameter where the stored tensor does not fit the layer.
    """
    layout, bits = quantization.layout, quantization.bits
    # GPTQ and AWQ store inputs in rows, the others outputs.
    by_input = layout not in (PACK, INT)

    def codes(stored: torch.Tensor) -> torch.Tensor:
        if layout is INT:
            return stored
        if layout is AWQ:
            numbers = _awq_columns(_fields(stored, bits, outputs)).T
        else:
            numbers = _fields(stored.T if by_input else stored, bits, inputs)
        if bits == 8:
            return (numbers ^ 0x80).view(torch.int8)
        return _halves(numbers ^ 8).view(torch.int8)

    def scales(stored: torch.Tensor) -> torch.Tensor:
        return stored.T if by_input else stored.reshape(len(stored), -1)

    def zeros(stored: torch.Tensor) -> torch.Tensor:
        if stored.dtype != torch.int32:  # Not packed.
            return stored.reshape(len(stored), -1).to(torch.int8)
        numbers = _fields(stored if by_input else stored.T, bits, outputs)
        numbers = _awq_columns(numbers) if layout is AWQ else numbers
        # The first GPTQ format wraps around: its zero is stored as the largest code.
        wrapped = (numbers.T.short() + quantization.zero_offset) % (1 << bits)
        return (wrapped - (1 << (bits - 1))).to(torch.int8)

    return {"codes": codes, "scales": scales, "zeros": zeros}[part]


def _fields(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """``[n, w]`` words of 32 bits to ``[n, count]`` numbers, from the lowest bits up.

    More are left of words that are not as many as ``count`` numbers take.
    """
    octets = words.contiguous().view(torch.uint8)
    numbers = octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(1)
    surplus = numbers.shape[1] - count
    return numbers[:, :count] if 0 <= surplus < 32 // bits else numbers


def _awq_columns(numbers: torch.Tensor) -> torch.Tensor:
    """Columns in their own order, which AWQ interleaves within a word."""
    return numbers.unflatten(1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(1)


def _halves(numbers: torch.Tensor) -> torch.Tensor:
    """``[out, in]`` numbers of 4 bits as ``[out, w]`` bytes; see ``QuantizedLinear``."""
    padded = nn.functional.pad(numbers, (0, -numbers.shape[1] % 8))
    lower, upper = padded.chunk(2, 1)
    return lower | (upper << 4)
