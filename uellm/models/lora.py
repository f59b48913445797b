"""LoRA adapters in peft's format: what they ask for, without reading a tensor.

An adapter adds ``scale * B A x`` to what linear layers make of ``x``, with matrices of a low rank
(Hu et al., LoRA, arXiv 2106.09685). What changes more of a model than its linear layers is refused:
requests of several adapters share one model.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uellm.core.errors import ModelFilesError
from uellm.models.files import read_json
from uellm.models.profile import layer_of
from uellm.models.safetensors import TensorInfo, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# What says how an adapter was trained, and not what it is; or is read below.
_HARMLESS = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
        *("ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out"),
        *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
        *("loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core"),
        *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
        *("runtime_config", "target_modules", "task_type", "use_rslora"),
    )
)
# These start from a factorisation of the model's weights, and leave it other weights.
_CHANGING_STARTS = ("pissa", "corda", "olora", "loftq", "lora_ga", "mica")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What an adapter's config says.

    Attributes:
        rank: of its matrices.
        alpha: numerator of the scale.
        rank_stabilised: the scale is ``alpha / sqrt(rank)`` (Kalajdzievski, arXiv 2312.03732), and
            not ``alpha / rank``.
        ranks: other ranks, by pattern of modules' names.
        alphas: other numerators, likewise.
    """

    rank: int
    alpha: float
    rank_stabilised: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """The rank at a module, named from the model on."""
        return next((rank for key, rank in self.ranks.items() if _ends(key, module)), self.rank)

    def scale_of(self, module: str) -> float:
        """What its product is multiplied with at a module."""
        alphas = self.alphas.items()
        alpha = next((alpha for key, alpha in alphas if _ends(key, module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


@dataclass(frozen=True, slots=True)
class Factors:
    """The two matrices for one linear layer.

    Attributes:
        module: the layer, named from the model on.
        a: ``[rank, in]``.
        b: ``[out, rank]``.
        scale: of their product.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    scale: float

    @property
    def layer(self) -> int:
        """The layer that it is part of."""
        return layer_of(self.module + ".") or 0

    @property
    def rank(self) -> int:
        """Of their product."""
        return self.a.shape[0]

    @property
    def elements(self) -> int:
        """Numbers in both."""
        return self.a.elements + self.b.elements

    def key(self, factor: str) -> str:
        """The name of matrix "A" or "B" in the file."""
        return f"base_model.model.{self.module}.lora_{factor}.weight"


def _ends(pattern: str, module: str) -> bool:
    """Whether a pattern is the end of a module's name, as peft understands it."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def read_config(directory: Path) -> LoraConfig:
    """What an adapter asks for.

    Raises:
        ModelFilesError: naming what is missing or not served, and the remedy.
    """
    path = directory / CONFIG
    raw = read_json(path, "name a directory that holds an adapter in peft's format")
    _refuse_unservable(path, raw)
    ranks = _pattern(path, raw, "rank_pattern")
    if any(rank != int(rank) for rank in ranks.values()):
        raise ModelFilesError(f"{path}: rank_pattern: ranks are whole numbers")
    rank = _number(path, "r", raw.get("r", 8))
    if rank != int(rank):
        raise ModelFilesError(f"{path}: r = {rank} is no whole number")
    return LoraConfig(
        rank=int(rank),
        alpha=_number(path, "lora_alpha", raw.get("lora_alpha", 8)),
        rank_stabilised=bool(raw.get("use_rslora")),
        ranks={key: int(value) for key, value in ranks.items()},
        alphas=_pattern(path, raw, "alpha_pattern"),
    )


def _refuse_unservable(path: Path, raw: Mapping[str, Any]) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise ModelFilesError(
            f"{path}: peft_type is {kind!r}, and only LORA is served; train it as LoRA, or "
            "merge it into the model (peft: merge_and_unload) and serve that"
        )
    bias = raw.get("bias") or "none"
    if bias != "none":
        raise ModelFilesError(
            f"{path}: bias is {bias!r}, which changes the model's own biases; train with "
            'bias="none", or serve the merged model'
        )
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGING_STARTS):
        raise ModelFilesError(
            f"{path}: init_lora_weights is {start!r}, which changes the model's own weights; save "
            "it with peft's path_initial_model_for_weight_conversion, or serve the merged model"
        )
    for key, value in raw.items():
        if value and key not in _HARMLESS:
            raise ModelFilesError(
                f"{path}: {key} is set, which is not served: an adapter may add to linear layers "
                "of the model, and no more; serve the merged model (peft's merge_and_unload)"
            )


def _number(path: Path, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ModelFilesError(f"{path}: {key} = {value!r} is no positive number")
    return float(value)


def _pattern(path: Path, raw: Mapping[str, Any], key: str) -> dict[str, float]:
    patterns = raw.get(key) or {}
    if not isinstance(patterns, dict):
        raise ModelFilesError(f"{path}: {key} is no JSON object")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ModelFilesError(f"{path}: {key}: {pattern!r} is no pattern: {error}") from None
    return {pattern: _number(path, key, value) for pattern, value in patterns.items()}


def read_factors(directory: Path) -> list[Factors]:
    """Which linear layers an adapter adds to, by its config and its tensors' headers.

    Raises:
        ModelFilesError: naming file and tensor that are missing, damaged or not served.
    """
    config = read_config(directory)
    path = directory / WEIGHTS
    if not path.is_file():
        raise _no_weights(directory)
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in read_header(path).items():
        match = _TENSOR.fullmatch(name)
        if match is None or layer_of(match["module"] + ".") is None:
            raise ModelFilesError(
                f"{path}, tensor {name!r}: an adapter may add to linear layers within the model's "
                "layers, and no more; train without it, or serve the merged model"
            )
        found.setdefault(match["module"], {})[match["factor"]] = tensor
    if not found:
        raise ModelFilesError(f"{path} holds no tensor; train or download the adapter again")
    return [_factors(path, config, module, found[module]) for module in sorted(found)]


def _factors(
    path: Path, config: LoraConfig, module: str, found: Mapping[str, TensorInfo]
) -> Factors:
    if len(found) < 2:
        (there,) = found
        raise ModelFilesError(
            f"{path} has lora_{there} of {module} and not the other factor: it is damaged; "
            "download or copy it again"
        )
    a, b = found["A"], found["B"]
    rank = config.rank_of(module)
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise ModelFilesError(
            f"{path}: lora_A and lora_B of {module} have shapes {a.shape} and {b.shape}, and "
            f"{CONFIG} asks for rank {rank}: [rank, in] and [out, rank]; they do not belong "
            "together"
        )
    return Factors(module, a, b, config.scale_of(module))


def _no_weights(directory: Path) -> ModelFilesError:
    if (directory / "adapter_model.bin").is_file():
        return ModelFilesError(
            f"{directory} has no {WEIGHTS}, only adapter_model.bin, and pickled weights are never "
            "read; load it with peft and save it with safe_serialization=True"
        )
    return ModelFilesError(f"{directory} has no {WEIGHTS}; download or copy the adapter again")
