"""What a model needs, read from its config and its tensor headers: no weights, no torch.

Bytes are those that are held: of weights in the compute dtype, whatever dtype is stored; of
quantised ones as they are.
"""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from uellm.core.errors import InvalidArgumentError, ModelFilesError
from uellm.core.model import LayerProfile, ModelProfile
from uellm.models.attention import read_attention
from uellm.models.families import Family, family
from uellm.models.files import CONFIG, read_json, tensor_files
from uellm.models.quantization import Quantization, read_quantization, unservable_layer
from uellm.models.safetensors import TensorInfo, read_header

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Compute dtypes and the size of one number."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configs call the number of experts that a router chooses from."""

_STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings)\.weight$")
# What the stage that embeds holds besides: learned positions, a projection to the hidden size.
_BESIDE = re.compile(r"(?:^|\.)(?:wpe|embed_positions|project_in)\.weight$")
_EXPERT = re.compile(r"\.experts\.")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.")
# Tables of vectors, which are looked up and not multiplied with.
_NO_LINEAR = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|wpe|embed_in|embed_positions|word_embeddings)\.\w+$"
)
# Masks and frequencies that old checkpoints carry; they are computed, not loaded.
_BUFFER = re.compile(r"\.(?:attn|attention)\.(?:masked_)?bias$|rotary_emb\.inv_freq$")


def read_profile(directory: Path, dtype: str) -> ModelProfile:
    """Read a model's needs.

    FLOPs count two for every weight of a layer that a token meets; of a mixture of experts, those
    that the router sends it to.

    Args:
        directory: as ``uellm.models.files.resolve`` gives it.
        dtype: compute dtype: float32, bfloat16 or float16.

    Raises:
        InvalidArgumentError: for another dtype.
        ModelFilesError: naming the file and the key or tensor that is missing.
    """
    size = dtype_bytes(dtype)
    config = _Config(directory / CONFIG)
    num_layers = config.number("num_hidden_layers", "n_layer")
    hidden = config.number("hidden_size", "n_embd")
    heads = config.number("num_attention_heads", "n_head")
    kind = family(config.architecture) or Family("")
    parts = _Parts(directory, num_layers, size, kind, config.quantization)
    head_dim = config.number("head_dim", default=hidden // heads)
    fused_heads = kind.kv_heads(heads, head_dim, parts.fused_rows) if kind.fused else 0
    kv_bytes = read_attention(config.number, fused_heads).cached * size
    tied = parts.head == 0 or config.flag("tie_word_embeddings")
    if not parts.head and not config.flag("tie_word_embeddings", default=True):
        raise ModelFilesError(
            f"{directory / CONFIG} says tie_word_embeddings = false, but the weights hold no "
            "lm_head.weight; download them again"
        )
    # The share of the experts that a token does not meet.
    used = config.number("num_experts_per_tok", default=1, least=0)
    experts = config.number(*EXPERTS, default=used, least=0)
    unused = 1 - used / max(used, experts, 1)
    states = kind.recurrence.states if kind.recurrence else ()
    state_bytes = sum(
        math.prod(state.shape(config.number)) * (4 if state.float32 else size) for state in states
    )
    return ModelProfile(
        layers=tuple(
            LayerProfile(
                weight_bytes=held,
                kv_bytes_per_token=0 if layer in parts.recurrent else kv_bytes,
                flops_per_token=2.0 * (elements - unused * experts),
                state_bytes=state_bytes if layer in parts.recurrent else 0,
            )
            for layer, (held, elements, experts) in enumerate(
                zip(parts.layers, parts.elements, parts.experts, strict=True)
            )
        ),
        embed_bytes=parts.embedding + parts.beside,
        head_bytes=(parts.head or parts.embedding) + parts.rest,
        tied=tied,
        activation_bytes_per_token=hidden * size,
        max_tokens=config.number("max_position_embeddings", "n_positions", "n_ctx"),
        vocab_size=config.number("vocab_size"),
        hidden_size=hidden,
        architecture=config.architecture,
        stored_dtype=parts.stored_dtype,
    )


def dtype_bytes(dtype: str) -> int:
    """Bytes of one number.

    Raises:
        InvalidArgumentError: unless ``dtype`` is a compute dtype.
    """
    if dtype not in DTYPE_BYTES:
        raise InvalidArgumentError(
            f"dtype {dtype!r} is not offered; use one of {', '.join(DTYPE_BYTES)}", field="dtype"
        )
    return DTYPE_BYTES[dtype]


def layer_of(name: str) -> int | None:
    """The layer that a tensor or module belongs to by its name; None for the others."""
    match = _LAYER.search(name)
    return None if match is None else int(match[1])


def part_of(name: str) -> str:
    """Which part of a model a tensor belongs to: a layer's number, or what stages hold besides.

    Returns:
        The number; "embedding", "beside" it, "head", or "rest", which goes with the head.
    """
    if (layer := layer_of(name)) is not None:
        return str(layer)
    kinds = (("embedding", _EMBEDDING), ("beside", _BESIDE), ("head", _HEAD))
    return next((kind for kind, pattern in kinds if pattern.search(name)), "rest")


class _Config:
    """config.json, whose keys have different names in different families."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: dict[str, Any] = read_json(path, "name a directory that holds a model")

    def number(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """The whole number, ``least`` or more, under the first of ``names`` that is there."""
        for name in names:
            value = self._content.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ModelFilesError(
                    f"{self._path}: {name} = {value!r} is not a "
                    + ("positive whole number" if least else "whole number from 0 on")
                )
            return value
        if default is None:
            raise ModelFilesError(
                f"{self._path} has no {names[0]}"
                + (f" (nor {', '.join(names[1:])})" if names[1:] else "")
                + "; it does not describe a decoder that can be placed"
            )
        return default

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Whether something is switched on."""
        value = self._content.get(name)
        return default if value is None else bool(value)

    @property
    def quantization(self) -> Quantization | None:
        """How its weights are quantised."""
        return read_quantization(self._path, self._content)

    @property
    def architecture(self) -> str:
        """Its first architecture, or its model type."""
        names = self._content.get("architectures") or [self._content.get("model_type", "")]
        return str(names[0])


class _Parts:
    """Bytes of a checkpoint's tensors once loaded, by the part of the model they belong to.

    Args:
        directory: the checkpoint.
        num_layers: as its config says.
        size: bytes of a number in the compute dtype.
        kind: its family.
        quantization: of some of the tensors, or None.

    Attributes:
        elements: weights of each layer.
        experts: those of them that are experts'.
        recurrent: layers that carry a state instead of keys and values.
        fused_rows: of a layer's projection to queries, keys and values, if it is of one piece.
    """

    def __init__(
        self,
        directory: Path,
        num_layers: int,
        size: int,
        kind: Family,
        quantization: Quantization | None,
    ) -> None:
        self._directory, self._size = directory, size
        self._kind, self._quantization = kind, quantization
        self.recurrent: set[int] = set()
        self.fused_rows = 0
        self.layers = [0] * num_layers
        self.elements = [0] * num_layers
        self.experts = [0] * num_layers
        self.embedding = self.beside = self.head = self.rest = 0
        dtypes: Counter[str] = Counter()
        for path in tensor_files(directory):
            for name, tensor in read_header(path).items():
                if not _BUFFER.search(name):
                    dtypes[tensor.dtype] += tensor.elements
                    self._add(name, tensor)
        empty = next((i for i, held in enumerate(self.layers) if not held), None)
        if empty is not None:
            raise ModelFilesError(
                f"{directory / CONFIG} describes {num_layers} layers, but the weights hold none "
                f"of layer {empty} (tensors named …layers.{empty}.… or …h.{empty}.…)"
            )
        # Tied weights are stored once, under either name.
        self.embedding = self.embedding or self.head
        if not self.embedding:
            raise ModelFilesError(
                f"the weights in {directory} hold no token embedding (embed_tokens.weight, "
                "wte.weight or embed_in.weight)"
            )
        most = dtypes.most_common(1)[0][0]
        self.stored_dtype = str(quantization or _STORED.get(most, most))

    def _add_to_layer(self, layer: int, name: str, tensor: TensorInfo) -> None:
        kind, quantization = self._kind, self._quantization
        elements, held = self._weigh(name, tensor)
        self.layers[layer] += held
        self.elements[layer] += elements
        if _EXPERT.search(f".{name}"):
            self.experts[layer] += elements
        if kind.recurrence is not None and name.startswith(f"{kind.recurrence.marker}."):
            self.recurrent.add(layer)
        if name.startswith(f"{kind.attention}.{kind.fused}."):
            if quantization is not None and quantization.is_codes(name, tensor):
                self.fused_rows = quantization.outputs(tensor)
            elif name.endswith(".weight"):
                self.fused_rows = tensor.shape[0]

    def _add(self, name: str, tensor: TensorInfo) -> None:
        layer = _LAYER.search(name)
        if layer is not None:
            # Layers behind the last are extras, such as those of speculative heads.
            if int(layer[1]) < len(self.layers):
                self._add_to_layer(int(layer[1]), name[layer.end() :], tensor)
            return
        _, held = self._weigh(name, tensor)
        match part_of(name):
            case "embedding":
                self.embedding += held
            case "beside":
                self.beside += held
            case "head":
                self.head += held
            case _:
                self.rest += held

    def _weigh(self, name: str, tensor: TensorInfo) -> tuple[int, int]:
        """Weights that a tensor stands for, and bytes that it comes to."""
        quantization = self._quantization
        weight = quantization.weigh(name, tensor) if quantization else None
        if weight is None:
            return tensor.elements, tensor.elements * self._size
        if _EXPERT.search(f".{name}") or _NO_LINEAR.search(name):
            raise unservable_layer(self._directory, name)
        return weight
