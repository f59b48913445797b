"""What decoder layers of transformers compute, for those that a few building blocks compute too.

A layer is described only if it was read and tested; any other is left to transformers, as is one
in which something was put in place of a linear layer, or not all of those that would be joined are
quantised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from uellm_worker.engine.quantized import QuantizedLinear
from uellm_worker.engine.weights import Pairs

QKV, GATE_UP = "uellm_qkv", "uellm_gate_up"
"""Names of the joined layers, in attention and in the MLP."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How layers of one class compute.

    Attributes:
        norms: before attention, after it, before the MLP, after it; "" where there is none.
        offset: added to the weights of RMS norms.
        qkv: linear layers in attention that give queries, keys and values, in this order.
        output: the one behind attention.
        qk_norm: whether queries and keys are normed, head by head or all heads as one.
        window: where the sliding window is kept.
        softcap: attribute of attention, a cap on scores.
        typed_rope: the rotary embedding depends on the type of layer.
        gate_up: linear layers in the MLP that give gate and values; one that gives neither gate
            is followed by the activation alone.
        gated: see there.
        down: the MLP's last.
        activation: attribute of the MLP.
    """

    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    offset: float = 0.0
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    qk_norm: Literal["", "head", "whole"] = ""
    window: Literal["", "attention", "config"] = ""
    softcap: str = ""
    typed_rope: bool = False
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    gated: bool = True
    down: str = "down_proj"
    activation: str = "act_fn"


_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_RECIPES = {
    "gemma.GemmaDecoderLayer": Recipe(offset=1.0),
    "gemma2.Gemma2DecoderLayer": Recipe(
        norms=_SANDWICH, offset=1.0, window="attention", softcap="attn_logit_softcapping"
    ),
    "gemma3.Gemma3DecoderLayer": Recipe(
        norms=_SANDWICH, offset=1.0, qk_norm="head", window="attention", typed_rope=True
    ),
    "granite.GraniteDecoderLayer": Recipe(),
    "llama.LlamaDecoderLayer": Recipe(),
    "mistral.MistralDecoderLayer": Recipe(window="config"),
    "mixtral.MixtralDecoderLayer": Recipe(window="config"),
    "olmo2.Olmo2DecoderLayer": Recipe(
        norms=("", "post_attention_layernorm", "", "post_feedforward_layernorm"), qk_norm="whole"
    ),
    "phi3.Phi3DecoderLayer": Recipe(
        qkv=("qkv_proj",),
        gate_up=("gate_up_proj",),
        activation="activation_fn",
        window="config",
    ),
    "qwen2.Qwen2DecoderLayer": Recipe(window="attention"),
    "qwen3.Qwen3DecoderLayer": Recipe(qk_norm="head", window="attention"),
    "qwen3_moe.Qwen3MoeDecoderLayer": Recipe(qk_norm="head", window="attention"),
    "smollm3.SmolLM3DecoderLayer": Recipe(window="attention"),
    "stablelm.StableLmDecoderLayer": Recipe(),
    "starcoder2.Starcoder2DecoderLayer": Recipe(
        gate_up=("c_fc",), gated=False, down="c_proj", activation="act", window="config"
    ),
}
"""By module and name of the class."""


@dataclass(frozen=True, slots=True)
class Join:
    """Linear layers that become one, their rows below each other.

    Attributes:
        path: of the joined one in the decoder layer.
        sources: their paths there.
        rows: of each.
        pairs: rows that change places for the rotation; None to keep the order.
    """

    path: str
    sources: tuple[str, ...]
    rows: tuple[int, ...]
    pairs: Pairs | None = None


def recipe_of(layer: Any) -> Recipe | None:
    """How a layer computes; None if that is not known."""
    package, _, module = type(layer).__module__.rpartition(".")
    if not package.startswith("transformers.models.") or not module.startswith("modeling_"):
        return None
    recipe = _RECIPES.get(f"{module.removeprefix('modeling_')}.{type(layer).__name__}")
    return recipe if recipe is not None and _as_described(layer, recipe) else None


def join_linears(layer: Any, recipe: Recipe, rotated: int) -> list[Join]:
    """Join linear layers of a hollow layer.

    Args:
        layer: changed: the joined layers take the place of their sources.
        recipe: its own.
        rotated: numbers of each head that the rotary embedding turns.

    Returns:
        What the joined layers were made of.
    """
    head_dim = int(layer.self_attn.head_dim)
    pairs = Pairs(sum(heads_of(layer)) * head_dim, head_dim, rotated) if rotated else None
    joins = [_join(layer, "self_attn", recipe.qkv, QKV, pairs)]
    if joins_mlp(layer, recipe):
        joins.append(_join(layer, "mlp", recipe.gate_up, GATE_UP, None))
    return joins


def heads_of(layer: Any) -> tuple[int, int]:
    """Heads of a layer's queries and of its keys."""
    config = layer.self_attn.config
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def joins_mlp(layer: Any, recipe: Recipe) -> bool:
    """The MLP is the plain one, and not experts or something wrapped."""
    leaves = [getattr(layer.mlp, name, None) for name in recipe.gate_up]
    return _joinable(leaves) and hasattr(layer.mlp, recipe.down)


def _joinable(layers: Sequence[Any]) -> bool:
    """They are linear layers that are held alike."""
    if all(type(layer) is nn.Linear for layer in layers):
        return True
    if not all(isinstance(layer, QuantizedLinear) for layer in layers):
        return False
    return len({(type(layer), layer.scales.dtype, layer.bias is None) for layer in layers}) == 1


def _as_described(layer: Any, recipe: Recipe) -> bool:
    """Nothing is in the layer that the recipe does not name, and what it joins is plain."""
    children = dict(layer.named_children())
    extra = [children[name] for name in {*children} - {"self_attn", "mlp", *recipe.norms}]
    attention = dict(layer.self_attn.named_children())
    named = {*recipe.qkv, recipe.output, *(("q_norm", "k_norm") if recipe.qk_norm else ())}
    return (
        all(isinstance(module, nn.Dropout) for module in extra)
        and {*attention} == named
        and _joinable([attention[name] for name in recipe.qkv])
    )


def _join(layer: Any, part: str, names: tuple[str, ...], joined: str, pairs: Pairs | None) -> Join:
    owner = getattr(layer, part)
    sources = [getattr(owner, name) for name in names]
    rows = tuple(int(source.out_features) for source in sources)
    linear: nn.Module
    if isinstance(sources[0], QuantizedLinear):
        linear = sources[0].joined(sources)
    else:
        linear = nn.Linear(
            sources[0].in_features,
            sum(rows),
            bias=sources[0].bias is not None,
            device="meta",
            dtype=sources[0].weight.dtype,
        )
    for name in names:
        delattr(owner, name)
    setattr(owner, joined, linear.requires_grad_(False))
    return Join(f"{part}.{joined}", tuple(f"{part}.{name}" for name in names), rows, pairs)
