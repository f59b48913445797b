"""A layer range of a causal language model, with only its own weights in memory.

The model is built whole without storage; what other stages hold is replaced by modules that pass
their input on. Masks, rotary embeddings, multipliers and soft caps stay in the model's own code.
"""

import gc
import pkgutil
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from uellm.core.errors import ModelFilesError
from uellm.models.families import Family
from uellm_worker.engine.attention import ATTENTION
from uellm_worker.engine.checkpoint import read_eos_ids, read_model
from uellm_worker.engine.device import on_host
from uellm_worker.engine.fused import FusedDecoder, Fusion, join_layers
from uellm_worker.engine.half import HalfEmbedding, HalfRows, widens
from uellm_worker.engine.hollow import NoPositions, PassThrough, PassThroughLayer
from uellm_worker.engine.lora import ShardAdapters, StepAdapters
from uellm_worker.engine.packing import Laid, PackedLinear, held_bytes, lay_out, packable
from uellm_worker.engine.quantized_checkpoint import quantize_layers
from uellm_worker.engine.quantized_panels import QuantizedPanels, code_panels
from uellm_worker.engine.recipes import Join
from uellm_worker.engine.runner import Progress
from uellm_worker.engine.weights import Held, PanelsOf, ShardSpec, read_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Compute dtypes by name."""


@dataclass(slots=True)
class Shard:
    """A loaded layer range.

    Attributes:
        spec: which.
        family: where the model keeps its parts.
        model: the hollowed ``…ForCausalLM``.
        tensors: its weights.
        fused_rows: of its projection to queries, keys and values; 0 if it is not of one piece.
        eos_ids: of the model.
        kept_bytes: weights taken over from an earlier shard.
        total_bytes: weights in all.
        fused: computes the layers instead of the model; None if not all are known.
        adapters: which rows of a step belong to which; None without adapters.
    """

    spec: ShardSpec
    family: Family
    model: Any
    tensors: dict[Held, Laid]
    fused_rows: int
    eos_ids: frozenset[int]
    kept_bytes: int
    total_bytes: int
    fused: FusedDecoder | None = None
    adapters: StepAdapters | None = None

    @property
    def held_bytes(self) -> int:
        """What the model's weights take; less than ``total_bytes`` where half precision does."""
        return sum(held_bytes(tensor) for tensor in self.tensors.values())

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def decoder(self) -> Any:
        """The model without its head."""
        return self.model.get_submodule(self.family.inner)

    @property
    def layers(self) -> list[Any]:
        """The decoder layers held here."""
        layers = self.decoder.get_submodule(self.family.layers)
        return list(layers[self.spec.first_layer : self.spec.last_layer + 1])

    @property
    def attentions(self) -> list[Any]:
        """The attention modules of those that have one."""
        return [
            layer.get_submodule(self.family.attention)
            for layer in self.layers
            if not _recurs(layer, self.family)
        ]

    @property
    def mixers(self) -> list[Any]:
        """The ``Mixer`` of those that carry a state instead."""
        recurrence = self.family.recurrence
        if recurrence is None:
            return []
        layers = (layer for layer in self.layers if _recurs(layer, self.family))
        return [layer.get_submodule(recurrence.mixer) for layer in layers]

    @property
    def head_dim(self) -> int:
        """Size of an attention head, here or in the layers of other stages."""
        if self.attentions:
            return int(getattr(self.attentions[0], self.family.head_dim))
        config = self.config
        size = getattr(config, "head_dim", None)
        return int(size or config.hidden_size // config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        """Key heads per layer."""
        heads = int(self.config.num_attention_heads)
        if self.family.fused:
            return self.family.kv_heads(heads, self.head_dim, self.fused_rows)
        return int(getattr(self.config, "num_key_value_heads", None) or heads)

    @property
    def states(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what a mixer keeps for one sequence."""
        if self.family.recurrence is None:
            return []

        def number(*names: str) -> int:
            values = (getattr(self.config, name, None) for name in names)
            return next(int(value) for value in values if value is not None)

        return [
            (state.shape(number), torch.float32 if state.float32 else self.spec.dtype)
            for state in self.family.recurrence.states
        ]


def _recurs(layer: Any, family: Family) -> bool:
    """The layer carries a state instead of keys and values."""
    if family.recurrence is None:
        return False
    try:
        layer.get_submodule(family.recurrence.marker)
    except AttributeError:
        return False
    return True


def _hollow_model(spec: ShardSpec, family: Family, config: Any) -> Any:
    """The model without storage, and without what other stages hold.

    Raises:
        ModelFilesError: if the range does not fit the model.
    """
    if not 0 <= spec.first_layer <= spec.last_layer < config.num_hidden_layers:
        raise ModelFilesError(
            f"layers {spec.first_layer} to {spec.last_layer} of {spec.model_dir}, "
            f"which has {config.num_hidden_layers}: plan the model again"
        )
    config.use_cache = False
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=spec.dtype,
            attn_implementation="eager" if family.adapter else ATTENTION,
            trust_remote_code=False,
        )
    model.config._attn_implementation = ATTENTION  # For which no masks are made.
    inner = model.get_submodule(family.inner)
    layers = inner.get_submodule(family.layers)
    for index in range(config.num_hidden_layers):
        if not spec.first_layer <= index <= spec.last_layer:
            layers[index] = PassThroughLayer() if family.layers_give_pairs else PassThrough()
        else:
            _adapt(layers[index], family)
    if not spec.has_embed:
        for path in (family.embedding, *family.after_embedding):
            setattr(inner, path, PassThrough())
        if family.positions:
            setattr(inner, family.positions, NoPositions())
        for name in family.multipliers:
            # The model applies it to whatever comes in; stage 0 has done so.
            value = getattr(inner, name)
            setattr(inner, name, torch.ones_like(value) if torch.is_tensor(value) else 1.0)
    if not spec.has_head:
        for path in family.tail:
            setattr(inner, path, PassThrough())
        setattr(model, family.head, PassThrough())
    return model.eval().requires_grad_(False)


def _adapt(layer: Any, family: Family) -> None:
    """Put what knows packed steps in the place of a layer's modules that do not."""
    path, adapter = family.attention, family.adapter
    if family.recurrence is not None and _recurs(layer, family):
        path, adapter = family.recurrence.mixer, family.recurrence.adapter
    if adapter:
        layer.set_submodule(path, pkgutil.resolve_name(adapter)(layer.get_submodule(path)))


def _join(model: Any, spec: ShardSpec, family: Family) -> Fusion | None:
    """Join linear layers of the hollowed model, if its layers are to be fused."""
    if not on_host(spec.device) or spec.dtype != torch.float32:
        return None
    path = f"{family.inner}.{family.layers}"
    indices = range(spec.first_layer, spec.last_layer + 1)
    layers = {f"{path}.{index}": model.get_submodule(f"{path}.{index}") for index in indices}
    return join_layers(model.get_submodule(family.inner), layers)


def _fuse(shard: Shard, fusion: Fusion) -> FusedDecoder:
    spec, family, decoder = shard.spec, shard.family, shard.decoder
    return FusedDecoder(
        shard.model,
        decoder,
        shard.layers,
        fusion,
        embedding=getattr(decoder, family.embedding) if spec.has_embed else None,
        head=getattr(shard.model, family.head) if spec.has_head else None,
    )


def _weights(
    model: Any, spec: ShardSpec, family: Family, joins: dict[str, Join]
) -> dict[str, Held]:
    """How the weight behind each name of the hollowed model is to be held.

    Names are those of parameters, and of buffers that checkpoints store.
    """
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    packs = packable(spec.device, spec.dtype)
    shared = tied and spec.has_embed and spec.has_head
    weights = {}
    for name in model.state_dict(keep_vars=True):
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        head = name == family.head_weight
        if name == family.embedding_weight or (head and shared):
            embedding = model.get_submodule(f"{family.inner}.{family.embedding}")
            looked_up = packs and widens(embedding)
            key = family.embedding_weight
            weights[name] = Held(key, packed=looked_up and shared, looked_up=looked_up)
            continue
        key = family.embedding_weight if tied and head else name
        linear = type(owner) in {nn.Linear, Conv1D} and leaf == "weight"
        transposed = packs and linear and type(owner) is Conv1D
        held = Held(key, packed=packs and linear, transposed=transposed)
        if isinstance(owner, QuantizedPanels) and leaf != "bias":
            pairs = leaf == "codes" and owner.quantization.bits == 4
            of: PanelsOf = "pairs" if pairs else "numbers"
            held = replace(held, panels=of, inputs=owner.in_features)
        join = joins.get(path)
        if join is not None:
            prefix = path.removesuffix(join.path)
            key, *below = (f"{prefix}{source}.{leaf}" for source in join.sources)
            rows = tuple(zip(below, join.rows[1:], strict=True))
            held = replace(held, key=key, below=rows, pairs=join.pairs)
        weights[name] = held
    return weights


def load_shard(spec: ShardSpec, earlier: Shard | None, progress: Progress) -> Shard:
    """Load a layer range, taking over what ``earlier`` has in common with it.

    Args:
        spec: which part.
        earlier: the shard held until now. It is taken apart before anything is read, so that
            both never are in memory together.
        progress: told the bytes.

    Raises:
        ModelFilesError: if the checkpoint or one of its adapters cannot be served.
    """
    tensors: dict[Held, Laid] = {}
    if earlier is not None:
        if earlier.spec.same_weights(spec):
            tensors = earlier.tensors
        earlier.model, earlier.tensors, earlier.fused = None, {}, None
        gc.collect()  # Modules refer to each other in circles.
    family, config, quantization = read_model(spec.model_dir)
    model = _hollow_model(spec, family, config)
    adapters = ShardAdapters(spec, model)
    sources = quantize_layers(model, spec, family, quantization)
    fusion = _join(model, spec, family)
    weights = _weights(model, spec, family, fusion.joins if fusion else {})
    hollow = {weights[name]: tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    shapes = {held: tensor.shape for held, tensor in hollow.items()}
    tensors = {held: tensor for held, tensor in tensors.items() if held in shapes}
    sizes = {
        held: tensor.numel() * (tensor if held.key in sources else spec).dtype.itemsize
        for held, tensor in hollow.items()
    }
    kept, total = sum(sizes[held] for held in tensors), sum(sizes.values()) + adapters.total_bytes
    progress(kept, total)
    loaded = reported = kept
    lacking = {held: shape for held, shape in shapes.items() if held not in tensors}
    for held, tensor in read_weights(spec, family, lacking, sources):
        if held.panels is None:
            tensors[held] = lay_out(held, tensor)
        else:
            tensors[held] = code_panels(tensor, held.panels, held.inputs)
        loaded += sizes[held]
        if loaded - reported >= total // 100:
            progress(loaded, total)
            reported = loaded
    _fill(model, weights, tensors)
    step_adapters = adapters.wrap(model, fusion.joins if fusion else {})
    if step_adapters is not None:
        progress(total, total)
    model.to(spec.device)  # Buffers: rotary frequencies, embedding scales.
    eos_ids = read_eos_ids(spec.model_dir, model.config)
    fused_rows = _fused_rows(family, shapes)
    shard = Shard(
        spec,
        family,
        model,
        tensors,
        fused_rows,
        eos_ids,
        kept,
        total,
        adapters=step_adapters,
    )
    if fusion is not None:
        shard.fused = _fuse(shard, fusion)
    return shard


def _fused_rows(family: Family, shapes: dict[Held, torch.Size]) -> int:
    """See ``Shard``."""
    path = f".{family.attention}.{family.fused}"
    endings = (f"{path}.weight", f"{path}.codes")  # As it is, or quantised.
    rows = (shape[0] for held, shape in shapes.items() if held.key.endswith(endings))
    return next(rows, 0)


def _fill(model: Any, weights: dict[str, Held], tensors: dict[Held, Laid]) -> None:
    """Put the weights into the model; modules whose weights are laid out are replaced."""
    plain = {
        name
        for name, held in weights.items()
        if isinstance(tensors[held], torch.Tensor) and (held.looked_up or not held.packed)
    }
    for name in plain:
        path, _, leaf = name.rpartition(".")
        owner, tensor = model.get_submodule(path), tensors[weights[name]]
        if leaf in owner._parameters:
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(owner, leaf, tensor)
    for name in weights.keys() - plain:
        path = name.rpartition(".")[0]
        model.set_submodule(path, _replacement(model.get_submodule(path), tensors[weights[name]]))


def _replacement(module: Any, laid: Laid) -> nn.Module:
    """What computes with a weight that is laid out, in the place of a module that has its bias."""
    if not isinstance(laid, HalfRows):
        return PackedLinear(laid, module.bias)
    if laid.head is None or isinstance(module, nn.Embedding):
        return HalfEmbedding(laid, module)
    return PackedLinear(laid.head, None)


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
