"""A layer range of a causal language model, with only its own weights in memory.

The model is built whole without storage; what other stages hold is replaced by modules that pass
their input on. Masks, rotary embeddings, multipliers and soft caps stay in the model's own code.
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from uellm.core.errors import ModelFilesError
from uellm_worker.engine.attention import ATTENTION
from uellm_worker.engine.checkpoint import TensorFiles, read_config, read_eos_ids
from uellm_worker.engine.packing import PackedLinear, pack, packable
from uellm_worker.engine.runner import Progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Compute dtypes by name."""
_TIED_FROM, _TIED_TO = "model.embed_tokens.weight", "lm_head.weight"


class PassThrough(nn.Module):
    """Stands for a layer that another stage holds."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The input, whatever else the layer would be given."""
        del args, kwargs
        return hidden_states


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """Which part of which model.

    Attributes:
        model_dir: the checkpoint.
        digest: identifies its content; weights are kept only between equal ones.
        dtype: to compute in.
        device: to compute on.
        first_layer: inclusive.
        last_layer: inclusive.
        has_embed: holds the embedding.
        has_head: holds final norm and head.
    """

    model_dir: Path
    digest: str
    dtype: torch.dtype
    device: torch.device
    first_layer: int
    last_layer: int
    has_embed: bool
    has_head: bool

    def same_weights(self, other: "ShardSpec") -> bool:
        """Tensors loaded for one serve the other."""
        return (self.digest or str(self.model_dir), self.dtype, self.device) == (
            other.digest or str(other.model_dir),
            other.dtype,
            other.device,
        )


@dataclass(slots=True)
class Shard:
    """A loaded layer range.

    Attributes:
        spec: which.
        model: the hollowed ``…ForCausalLM``.
        tensors: its weights.
        eos_ids: of the model.
        kept_bytes: weights taken over from an earlier shard.
        total_bytes: weights in all.
    """

    spec: ShardSpec
    model: Any
    tensors: dict["Held", torch.Tensor]
    eos_ids: frozenset[int]
    kept_bytes: int
    total_bytes: int

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def layers(self) -> list[Any]:
        """The decoder layers held here."""
        return list(self.model.model.layers[self.spec.first_layer : self.spec.last_layer + 1])


def _hollow_model(spec: ShardSpec) -> Any:
    """The model without storage, and without what other stages hold.

    Raises:
        ModelFilesError: if the range does not fit the model.
    """
    config = read_config(spec.model_dir)
    if not 0 <= spec.first_layer <= spec.last_layer < config.num_hidden_layers:
        raise ModelFilesError(
            f"layers {spec.first_layer} to {spec.last_layer} of {spec.model_dir}, "
            f"which has {config.num_hidden_layers}: plan the model again"
        )
    config.use_cache = False
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=spec.dtype, attn_implementation=ATTENTION, trust_remote_code=False
        )
    inner = model.model
    for index in range(config.num_hidden_layers):
        if not spec.first_layer <= index <= spec.last_layer:
            inner.layers[index] = PassThrough()
    if not spec.has_embed:
        inner.embed_tokens = PassThrough()
        if hasattr(inner, "embedding_multiplier"):
            # The model applies it to whatever comes in; stage 0 has done so.
            inner.embedding_multiplier = 1.0
    if not spec.has_head:
        inner.norm = PassThrough()
        model.lm_head = PassThrough()
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Held:
    """A weight as it is held.

    Attributes:
        key: in the checkpoint.
        packed: laid out for a linear layer.
    """

    key: str
    packed: bool


def _weights(model: Any, spec: ShardSpec) -> dict[str, Held]:
    """How the weight behind each parameter of the hollowed model is to be held."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    packs = packable(spec.device, spec.dtype)
    weights = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        key = _TIED_FROM if tied and name == _TIED_TO else name
        owner, _, leaf = name.rpartition(".")
        linear = type(model.get_submodule(owner)) is nn.Linear and leaf == "weight"
        # A head that shares the embedding's weight must take it as that does: by rows.
        shared = tied and spec.has_embed and key == _TIED_FROM
        weights[name] = Held(key, packed=packs and linear and not shared)
    return weights


def load_shard(spec: ShardSpec, earlier: Shard | None, progress: Progress) -> Shard:
    """Load a layer range, taking over what ``earlier`` has in common with it.

    Args:
        spec: which part.
        earlier: the shard held until now. It is taken apart before anything is read, so that
            both never are in memory together.
        progress: told the bytes.

    Raises:
        ModelFilesError: if the checkpoint cannot be served.
    """
    tensors: dict[Held, torch.Tensor] = {}
    if earlier is not None:
        if earlier.spec.same_weights(spec):
            tensors = earlier.tensors
        earlier.model, earlier.tensors = None, {}
        gc.collect()  # Modules refer to each other in circles.
    model = _hollow_model(spec)
    weights = _weights(model, spec)
    shapes = {weights[name]: parameter.shape for name, parameter in model.named_parameters()}
    tensors = {held: tensor for held, tensor in tensors.items() if held in shapes}
    sizes = {held: shape.numel() * spec.dtype.itemsize for held, shape in shapes.items()}
    kept, total = sum(sizes[held] for held in tensors), sum(sizes.values())
    progress(kept, total)
    loaded = reported = kept
    lacking = {held.key: held for held in shapes if held not in tensors}
    for key, stored in TensorFiles(spec.model_dir).read(lacking):
        held = lacking[key]
        if stored.shape != shapes[held]:
            raise ModelFilesError(
                f"{spec.model_dir}, tensor {key!r}: shape {tuple(stored.shape)}, and the config "
                f"asks for {tuple(shapes[held])}; config and weights do not belong together"
            )
        # A copy, so that no page of the file is needed, or trusted, later on.
        tensor = stored.to(device=spec.device, dtype=spec.dtype, copy=True)
        tensors[held] = pack(tensor) if held.packed else tensor
        loaded += sizes[held]
        if loaded - reported >= total // 100:
            progress(loaded, total)
            reported = loaded
    _fill(model, weights, tensors)
    model.to(spec.device)  # Buffers: rotary frequencies, embedding scales.
    eos_ids = read_eos_ids(spec.model_dir, model.config)
    return Shard(spec, model, tensors, eos_ids, kept, total)


def _fill(model: Any, weights: dict[str, Held], tensors: dict[Held, torch.Tensor]) -> None:
    """Put the weights into the model; linear layers with packed ones are replaced."""
    for name, held in weights.items():
        if not held.packed:
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(tensors[held], requires_grad=False)
            model.get_submodule(owner).register_parameter(leaf, parameter)
    for name, held in weights.items():
        if held.packed:
            path = name.rpartition(".")[0]
            owner, _, leaf = path.rpartition(".")
            linear = PackedLinear(tensors[held], model.get_submodule(path).bias)
            setattr(model.get_submodule(owner), leaf, linear)


def longest_context(config: Any, granted: int) -> int:
    """The longest context that a model can be given.

    Raises:
        ModelFilesError: if its rotary embedding would change with the length of a sequence, which
            sequences of one batch cannot have each for itself.
    """
    limit = int(config.max_position_embeddings)
    longest = min(granted, limit) if granted else limit
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else (rope,)
    for parameters in kinds:
        kind = parameters.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            continue
        original = parameters.get("original_max_position_embeddings") or limit
        if longest > original:
            raise ModelFilesError(
                f"rope type {kind!r} changes beyond {original} tokens, and {longest} were "
                f"granted; deploy it with max_tokens of at most {original}"
            )
    return longest
