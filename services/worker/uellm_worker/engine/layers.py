"""What a decoder layer that ``recipes.py`` describes is made of, for those who compute it."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import GELUTanh, SiLUActivation

from uellm_worker.engine.native import kernels
from uellm_worker.engine.recipes import GATE_UP, QKV, Recipe, heads_of
from uellm_worker.engine.weights import Pairs


@dataclass(frozen=True, slots=True)
class Norm:
    """The norm of rows, or of segments of rows each.

    Root-mean-square where there is no bias, else that of the distance from the mean.

    Attributes:
        weight: ``[size]``, or ``[segments, size]``.
        bias: likewise, or None.
        eps: added to the mean square.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float

    @property
    def centred(self) -> bool:
        """The mean is taken away first."""
        return self.bias is not None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """The normed rows, ``[n, segments * size]``."""
        found = kernels(self.weight.device, self.weight.dtype)
        if found is not None:
            return found.norm(rows, self.weight, self.bias, self.eps)
        size = self.weight.shape[-1]
        segments = rows.reshape(len(rows), rows.shape[-1] // size, size)
        if self.bias is not None:
            normed = functional.layer_norm(segments, (size,), eps=self.eps)
            return normed.mul_(self.weight).add_(self.bias).view(rows.shape)
        scale = (segments * segments).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return (segments * scale).mul_(self.weight).view(rows.shape)


@dataclass(frozen=True, slots=True)
class LayerParts:
    """A decoder layer. Modules are linear layers, joined where that is possible.

    Attributes:
        heads: of queries.
        kv_heads: of keys, and of values.
        head_dim: numbers of each.
        qkv: gives queries, keys and values.
        output: behind attention.
        gate_up: gives gates and values, or what is activated; None if the MLP is not a plain one.
        down: the MLP's last; None likewise.
        mlp: all of it, as transformers has it.
        activation: in it.
        gated: see ``gate_up``.
        norms: before attention, behind it, before the MLP, behind it.
        qk_norms: of queries and keys: none, one of all heads each for itself, or one of all queries
            and one of all keys.
        rope: type of the rotation.
        rotated: numbers of each head that it turns.
        scaling: of scores.
        window: tokens seen; None for all.
        softcap: of scores; None for none.
        multiplier: of what is added to the rows that came in.
        parallel: the MLP gets what attention gets.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv: Any
    output: Any
    gate_up: Any
    down: Any
    mlp: Any
    activation: Any
    gated: bool
    norms: tuple[Norm | None, ...]
    qk_norms: tuple[Norm, ...]
    rope: str
    rotated: int
    scaling: float
    window: int | None
    softcap: float | None
    multiplier: float
    parallel: bool

    @property
    def activation_kind(self) -> Literal["silu", "gelu", ""]:
        """What kernels know it as; GELU is the one by hyperbolic tangents; "": they do not."""
        if isinstance(self.activation, nn.SiLU | SiLUActivation):
            return "silu"
        return "gelu" if isinstance(self.activation, GELUTanh) else ""


def norm_of(module: Any, offset: float) -> Norm | None:
    """A norm of transformers.

    Args:
        module: it; None for none.
        offset: added to the weight of a root-mean-square norm.
    """
    if module is None:
        return None
    weight, eps = module.weight, _eps(module)
    if not isinstance(module, nn.LayerNorm):
        return Norm(weight + offset if offset else weight.detach(), None, eps)
    bias = torch.zeros_like(weight) if module.bias is None else module.bias
    return Norm(weight.detach(), bias.detach(), eps)


def parts_of(layer: Any, recipe: Recipe, rotated: int) -> LayerParts:
    """What a layer is made of.

    Args:
        layer: of transformers, with its linear layers joined and its weights in it.
        recipe: how it computes.
        rotated: numbers of each head that the rotary embedding turns.
    """
    attention, mlp = layer.self_attn, layer.mlp
    heads, kv_heads = heads_of(layer)
    window = {"": None, "config": attention.config, "attention": attention}[recipe.window]
    gate_up = getattr(mlp, GATE_UP, None)
    return LayerParts(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(attention.head_dim),
        qkv=getattr(attention, QKV),
        output=getattr(attention, recipe.output),
        gate_up=gate_up,
        down=None if gate_up is None else getattr(mlp, recipe.down),
        mlp=mlp,
        activation=None if gate_up is None else getattr(mlp, recipe.activation),
        gated=recipe.gated,
        norms=tuple(norm_of(getattr(layer, name, None), recipe.offset) for name in recipe.norms),
        qk_norms=_qk_norms(attention, recipe, heads, kv_heads, rotated),
        rope=attention.layer_type if recipe.typed_rope else "",
        rotated=rotated,
        scaling=float(attention.scaling),
        window=getattr(window, "sliding_window", None),
        softcap=getattr(attention, recipe.softcap) if recipe.softcap else None,
        multiplier=float(getattr(layer, "residual_multiplier", 1.0)),
        parallel=bool(getattr(layer, "use_parallel_residual", False)),
    )


def _qk_norms(
    attention: Any, recipe: Recipe, heads: int, kv_heads: int, rotated: int
) -> tuple[Norm, ...]:
    """See ``LayerParts``; weights in the order of the numbers that they multiply."""
    if not recipe.qk_norm:
        return ()
    by_head, head_dim = recipe.qk_norm == "head", int(attention.head_dim)
    weights = []
    for module, count in ((attention.q_norm, heads), (attention.k_norm, kv_heads)):
        weight = (module.weight + recipe.offset).repeat(count if by_head else 1)
        weights.append(Pairs(len(weight), head_dim, rotated).laid_out(weight))
    eps = _eps(attention.q_norm)
    if by_head:
        return (Norm(torch.cat(weights).view(-1, head_dim), None, eps),)
    return tuple(Norm(weight, None, eps) for weight in weights)


def _eps(norm: Any) -> float:
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
