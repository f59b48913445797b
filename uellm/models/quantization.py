"""Weight-only quantised checkpoints: what config.json says of them, and what their tensors weigh.

Served is what stands for ``(codes - zeros) * scales`` with whole codes of 4 or 8 bits: activations
stay in the compute dtype. Which linear layers are quantised is read off the stored tensors, not off
the config's patterns: a layer is whatever the checkpoint holds of it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uellm.core.errors import ModelFilesError
from uellm.models.safetensors import TensorInfo

_SERVED = (
    "served are compressed-tensors (pack-quantized, int-quantized), gptq (gptq, gptq_v2) and awq "
    "(gemm), weights only, in 4 or 8 bits"
)
_SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I8": 1, "U8": 1}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a format lays out a quantised layer's tensors.

    Attributes:
        name: of the format.
        codes: last part of the name of the tensor that holds the codes.
        scales: of the scales'.
        zeros: of the zero points'.
        groups: of each input's group, where it may be stored.
        beside: of what is not needed.
    """

    name: str
    codes: str
    scales: str
    zeros: str
    groups: str
    beside: tuple[str, ...] = ()


PACK = Layout(
    "pack-quantized",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    ("weight_shape",),
)
INT = Layout("int-quantized", "weight", "weight_scale", "weight_zero_point", "weight_g_idx")
GPTQ = Layout("gptq", "qweight", "scales", "qzeros", "g_idx")
AWQ = Layout("awq", "qweight", "scales", "qzeros", "g_idx")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the quantised layers of a checkpoint are to be read.

    Attributes:
        layout: of their tensors.
        bits: of a code: 4 or 8.
        group_size: inputs that share a scale; 0: all of an output's.
        symmetric: every zero point is the middle of the codes, and none is held.
        zero_offset: what is missing from stored zero points (the first GPTQ format: 1).
    """

    layout: Layout
    bits: int
    group_size: int
    symmetric: bool
    zero_offset: int = 0

    def __str__(self) -> str:
        """For people, such as "int4 (group 128)"."""
        groups = f"group {self.group_size}" if self.group_size else "per channel"
        return f"int{self.bits} ({groups})"

    def groups(self, inputs: int) -> int:
        """Scales of one output of a layer with so many inputs; the last may serve fewer."""
        return -(-inputs // self.group_size) if self.group_size else 1

    def code_bytes(self, inputs: int) -> int:
        """Bytes of one output's codes: whole words of 32 bits where codes are of 4."""
        return inputs if self.bits == 8 else -(-inputs // 8) * 4

    def is_codes(self, name: str, tensor: TensorInfo) -> bool:
        """Whether a stored tensor holds a quantised layer's codes."""
        leaf = name.rpartition(".")[2]
        return leaf == self.layout.codes and tensor.dtype in ("I32", "I8")

    def outputs(self, codes: TensorInfo) -> int:
        """Outputs of the layer that a tensor of codes belongs to."""
        if self.layout is AWQ:
            return codes.shape[1] * 8
        return codes.shape[1 if self.layout is GPTQ else 0]

    def weigh(self, name: str, tensor: TensorInfo) -> tuple[int, int] | None:
        """What a stored tensor of a quantised layer comes to once it is loaded.

        Returns:
            Weights that it stands for, and bytes that are held; None for a tensor that is not
            quantised, nor belongs to one that is.
        """
        leaf = name.rpartition(".")[2]
        if self.is_codes(name, tensor):
            held = tensor.elements * _SIZES[tensor.dtype]
            return held * 8 // self.bits, held
        if leaf == self.layout.scales:
            # One zero point of a byte goes with each scale.
            size = _SIZES.get(tensor.dtype, 4) + (not self.symmetric)
            return 0, tensor.elements * size
        if leaf in (self.layout.zeros, self.layout.groups, *self.layout.beside):
            return 0, 0
        return None


def read_quantization(path: Path, config: dict[str, Any]) -> Quantization | None:
    """How a checkpoint is quantised; None if it is not.

    Args:
        path: where the config was read, for messages.
        config: what config.json holds.

    Raises:
        ModelFilesError: naming the method or the setting that is not served, and what is.
    """
    described = config.get("quantization_config")
    if not described:
        return None
    if not isinstance(described, dict):
        raise ModelFilesError(f"{path}: quantization_config is not a JSON object")
    settings = _Settings(path, described)
    method = str(described.get("quant_method", "(none)"))
    if method == "compressed-tensors":
        return _compressed(settings)
    if method == "gptq":
        return _gptq(settings)
    if method == "awq":
        return _awq(settings)
    raise settings.refusal("quant_method", method)


def unservable_layer(directory: Path, name: str) -> ModelFilesError:
    """What says that a stored tensor belongs to a layer that is served unquantised only."""
    return ModelFilesError(
        f"{directory}, tensor {name!r}: only plain linear layers are served quantised, not "
        "embeddings, nor stacks of experts; use a checkpoint that leaves them as they are"
    )


@dataclass(frozen=True, slots=True)
class _Settings:
    """Part of a quantization_config, and where it is.

    Attributes:
        path: of the file.
        content: the settings.
        at: their place in the file.
    """

    path: Path
    content: dict[str, Any]
    at: str = "quantization_config"

    def refusal(self, name: str, value: object) -> ModelFilesError:
        """What says that a setting is not served."""
        return ModelFilesError(
            f"{self.path}: {self.at}.{name} = {value!r} is not served; {_SERVED}; use such a "
            "checkpoint, or the model's unquantised weights"
        )

    def one_of(self, name: str, *served: object, default: object = None) -> Any:
        """A setting that is one of ``served``."""
        value = self.content.get(name)
        value = default if value is None else value
        if not any(value == one and type(value) is type(one) for one in served):
            raise self.refusal(name, value)
        return value

    def none_of(self, *names: str) -> None:
        """Refuse settings that are set."""
        for name in names:
            if self.content.get(name):
                raise self.refusal(name, self.content[name])

    def group_size(self) -> int:
        """Inputs to a group; 0 for all of them."""
        value = self.content.get("group_size")
        if value in (None, -1):
            return 0
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refusal("group_size", value)
        return value


def _compressed(settings: _Settings) -> Quantization:
    settings.none_of("kv_cache_scheme", "transform_config")
    settings.one_of("quantization_status", "compressed", default="compressed")
    sparsity = settings.content.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise settings.refusal("sparsity_config.format", sparsity["format"])
    groups = settings.content.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(v, dict) for v in groups.values()):
        raise settings.refusal("config_groups", groups)
    formats = settings.content.get("format")
    found = {
        _scheme(_Settings(settings.path, group, f"{settings.at}.config_groups.{name}"), formats)
        for name, group in groups.items()
    }
    if len(found) != 1:
        kinds = ", ".join(sorted(map(str, found))) or "none"
        raise settings.refusal("config_groups of several kinds", kinds)
    return found.pop()


def _scheme(group: _Settings, overall: object) -> Quantization:
    """One of compressed-tensors' groups of layers."""
    group.none_of("input_activations", "output_activations")
    weights = group.content.get("weights")
    if not isinstance(weights, dict):
        raise group.refusal("weights", weights)
    stored = group.one_of("format", PACK.name, INT.name, "naive-quantized", default=overall)
    settings = _Settings(group.path, weights, f"{group.at}.weights")
    settings.one_of("type", "int", default="int")
    # Group order needs a permutation of the inputs; an order that was only used to calibrate not.
    settings.one_of("actorder", "weight", "static", False, "none", default="none")
    size = settings.group_size()
    implied = "group" if size else "channel" if "group_size" in weights else "tensor"
    strategy = settings.one_of("strategy", "group", "channel", default=implied)
    if strategy == "group" and not size:
        raise settings.refusal("group_size", size)
    layout = PACK if stored == PACK.name else INT
    return Quantization(
        layout=layout,
        bits=settings.one_of("num_bits", *((4, 8) if layout is PACK else (8,)), default=8),
        group_size=size if strategy == "group" else 0,
        symmetric=settings.one_of("symmetric", True, False, default=True),
    )


def _gptq(settings: _Settings) -> Quantization:
    # Settings of single layers, and formats of other kernels.
    settings.none_of("dynamic", "is_marlin_format")
    settings.one_of("desc_act", False, default=False)
    settings.one_of("pack_dtype", "int32", default="int32")
    name = "checkpoint_format" if "checkpoint_format" in settings.content else "format"
    version = settings.one_of(name, "gptq", "gptq_v2", default="gptq")
    return Quantization(
        layout=GPTQ,
        bits=settings.one_of("bits", 4, 8),
        group_size=settings.group_size(),
        symmetric=settings.one_of("sym", True, False, default=True),
        zero_offset=1 if version == "gptq" else 0,
    )


def _awq(settings: _Settings) -> Quantization:
    name = "format" if "format" in settings.content else "version"
    settings.one_of(name, "gemm", "GEMM", default="gemm")
    settings.one_of("zero_point", True, default=True)
    return Quantization(
        layout=AWQ,
        bits=settings.one_of("bits", 4),
        group_size=settings.group_size(),
        symmetric=False,
    )
