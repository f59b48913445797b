"""Quantised checkpoints of any model, written as the tools write them: numpy, no torch."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

Array = NDArray[Any]


@dataclass(frozen=True)
class Recipe:
    """How to quantise.

    Attributes:
        kind: pack, int, gptq, gptq_v2 or awq.
        bits: of a code.
        group_size: inputs that share a scale; 0: all.
        symmetric: zero points are the middle.
        ignore: ends of the names of modules that are left alone.
        scale_dtype: of the scales.
    """

    kind: str = "pack"
    bits: int = 4
    group_size: int = 0
    symmetric: bool = True
    ignore: Sequence[str] = ("lm_head",)
    scale_dtype: str = "float16"

    def config(self) -> dict[str, Any]:
        """The quantization_config."""
        size = self.group_size
        if self.kind in ("gptq", "gptq_v2"):
            return {
                "quant_method": "gptq",
                "bits": self.bits,
                "group_size": size or -1,
                "sym": self.symmetric,
                "desc_act": False,
                "checkpoint_format": self.kind,
            }
        if self.kind == "awq":
            settings = {"bits": 4, "group_size": size or -1, "zero_point": True}
            return {"quant_method": "awq", "version": "gemm", **settings}
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if size else "channel",
            "group_size": size or None,
            "actorder": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized" if self.kind == "pack" else "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}
            },
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
        }


def quantize_checkpoint(source: Path, directory: Path, recipe: Recipe) -> Path:
    """Write a quantised copy of a checkpoint of one file."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = recipe.config()
    (directory / "config.json").write_text(json.dumps(config))
    tensors: dict[str, Array] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        base = name.removesuffix("weight")
        linear = re.search(r"(_proj|lm_head|query_key_value|dense\w*)\.weight$", name)
        if linear and not base.removesuffix(".").endswith(tuple(recipe.ignore)):
            parts = quantize(weight.astype(np.float32), recipe)
            tensors |= {base + leaf: part for leaf, part in parts.items()}
        else:
            tensors[name] = weight
    save_file(
        {name: np.ascontiguousarray(part) for name, part in tensors.items()},
        directory / "model.safetensors",
    )
    return directory


def quantize(weight: Array, recipe: Recipe) -> dict[str, Array]:
    """The tensors that stand for ``[out, in]``, by the last part of their names."""
    _, inputs = weight.shape
    top, middle = (1 << recipe.bits) - 1, 1 << (recipe.bits - 1)
    owner = np.arange(inputs) // (recipe.group_size or inputs)
    groups = [weight[:, owner == group] for group in range(owner[-1] + 1)]
    low = np.stack([group.min(1) for group in groups], 1)
    high = np.stack([group.max(1) for group in groups], 1)
    if recipe.symmetric:
        scales = 2 * np.maximum(abs(low), abs(high)) / top
        zeros = np.full(scales.shape, middle)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scales = np.maximum((high - low) / top, 1e-6)
        zeros = np.clip(np.round(-low / scales), 0, top).astype(int)
    # Weights of zeros have a scale as well.
    scales = np.where(scales > 0, scales, 1).astype(recipe.scale_dtype)
    codes = np.round(weight / scales.astype(np.float32)[:, owner]) + zeros[:, owner]
    return _WRITERS[recipe.kind](np.clip(codes, 0, top).astype(int), scales, zeros, recipe)


def _words(numbers: Array, bits: int, order: Sequence[int] = ()) -> Array:
    """``[n, m]`` numbers to ``[n, ceil(m bits / 32)]`` words; ``order``: whose turn it is."""
    count = 32 // bits
    padded = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % count)))
    words = np.zeros((len(padded), padded.shape[1] // count), np.uint32)
    for place, column in enumerate(order or range(count)):
        words |= padded[:, column::count].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def _pack(codes: Array, scales: Array, zeros: Array, recipe: Recipe) -> dict[str, Array]:
    parts = {
        "weight_packed": _words(codes, recipe.bits),
        "weight_scale": scales,
        "weight_shape": np.array(codes.shape),
    }
    if not recipe.symmetric:
        parts["weight_zero_point"] = _words(zeros.T, recipe.bits).T
    return parts


def _int(codes: Array, scales: Array, zeros: Array, recipe: Recipe) -> dict[str, Array]:
    parts = {"weight": (codes - 128).astype(np.int8), "weight_scale": scales}
    if not recipe.symmetric:
        parts["weight_zero_point"] = (zeros - 128).astype(np.int8)
    return parts


def _gptq(codes: Array, scales: Array, zeros: Array, recipe: Recipe) -> dict[str, Array]:
    stored = (zeros - (recipe.kind == "gptq")) % (1 << recipe.bits)
    inputs = codes.shape[1]
    return {
        "qweight": _words(codes, recipe.bits).T,
        "qzeros": _words(stored.T, recipe.bits),
        "scales": scales.T,
        "g_idx": (np.arange(inputs) // (recipe.group_size or inputs)).astype(np.int32),
    }


def _awq(codes: Array, scales: Array, zeros: Array, _: Recipe) -> dict[str, Array]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": _words(codes.T, 4, order),
        "qzeros": _words(zeros.T, 4, order),
        "scales": scales.T,
    }


_WRITERS: dict[str, Callable[[Array, Array, Array, Recipe], dict[str, Array]]] = {
    "pack": _pack,
    "int": _int,
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "awq": _awq,
}
