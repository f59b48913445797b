"""Decoder layers in few operations, for the layers that ``recipes.py`` describes; float32 on CPUs.

One product gives queries, keys and values, one gate and values of the MLP. What a step's layers
share, the rotation above all, is computed once a step. Numbers that are rotated together lie next
to each other, as those of a complex number: the order within a head does not matter to scores.
Results differ from transformers' by rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import SiLUActivation

from uellm_worker.engine.attention import PackedStep, SlotCache, attend
from uellm_worker.engine.native import kernels
from uellm_worker.engine.recipes import (
    GATE_UP,
    QKV,
    Join,
    Recipe,
    heads_of,
    join_linears,
    recipe_of,
)
from uellm_worker.engine.weights import Pairs

Rows = Callable[[torch.Tensor], torch.Tensor]
"""Rows to as many rows."""


class RmsNorm:
    """Root-mean-square norm over the last dimension.

    Args:
        weight: ``[..., size]``.
        eps: added to the mean square.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        size = weight.shape[-1]
        self._weight = weight
        self._eps = torch.full((1, 1), eps)
        self._mean = torch.full((size, 1), 1 / size)
        self._size = size

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """The normed rows; the sum is a product with a vector of ones."""
        squares = (rows * rows).view(-1, self._size)
        scale = torch.addmm(self._eps, squares, self._mean).rsqrt_()
        return (rows * scale.view(*rows.shape[:-1], 1)).mul_(self._weight)


def _rms_norm(weight: torch.Tensor, eps: float) -> Rows:
    """The norm of rows with a weight ``[size]``, by a kernel where there is one."""
    found = kernels(weight.device, weight.dtype)
    return RmsNorm(weight, eps) if found is None else partial(found.norm, weight=weight, eps=eps)


def _norm(module: Any, offset: float) -> Rows | None:
    """What computes the same as a norm of transformers."""
    if module is None:
        return None
    if isinstance(module, nn.LayerNorm):
        return module.forward
    return _rms_norm(module.weight + offset if offset else module.weight, _eps(module))


def _eps(norm: Any) -> float:
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


class FusedLayer:
    """A decoder layer.

    Args:
        layer: of transformers, with its linear layers joined and its weights in it.
        recipe: how it computes.
        index: in the cache.
        rotary: the model's rotary embedding.
    """

    def __init__(self, layer: Any, recipe: Recipe, index: int, rotary: Any) -> None:
        attention, config = layer.self_attn, layer.self_attn.config
        self._index = index
        self._head_dim = int(attention.head_dim)
        self._heads, self._kv_heads = heads_of(layer)
        self._turned_heads = self._heads + self._kv_heads
        self._qkv: Rows = getattr(attention, QKV).forward
        self._output: Rows = getattr(attention, recipe.output)
        self._rotated = rotated_size(rotary, layer, recipe)
        self.rope = attention.layer_type if recipe.typed_rope else ""
        self._scaling = float(attention.scaling)
        window = {"": None, "config": config, "attention": attention}[recipe.window]
        self._window: int | None = getattr(window, "sliding_window", None)
        self._softcap = getattr(attention, recipe.softcap) if recipe.softcap else None
        self._multiplier = float(getattr(layer, "residual_multiplier", 1.0))
        self._parallel = bool(getattr(layer, "use_parallel_residual", False))
        norms = [_norm(getattr(layer, name, None), recipe.offset) for name in recipe.norms]
        self._before_attention, self._after_attention, self._before_mlp, self._after_mlp = norms
        self._qk_norm = self._norm_of_heads(attention, recipe)
        self._mlp = _mlp(layer.mlp, recipe)

    def _norm_of_heads(self, attention: Any, recipe: Recipe) -> Callable[[torch.Tensor], None]:
        """Norms queries and keys, ``[T, heads, head_dim]``, in place."""
        if not recipe.qk_norm:
            return lambda _: None
        by_head = recipe.qk_norm == "head"
        eps = _eps(attention.q_norm)
        weights = []
        modules = (attention.q_norm, self._heads), (attention.k_norm, self._kv_heads)
        for module, heads in modules:
            weight = (module.weight + recipe.offset).repeat(heads if by_head else 1)
            pairs = Pairs(len(weight), self._head_dim, self._rotated)
            weights.append(pairs.laid_out(weight))
        if by_head:
            head_norm = RmsNorm(torch.cat(weights).view(-1, self._head_dim), eps)

            def norm_each(heads: torch.Tensor) -> None:
                heads.copy_(head_norm(heads))

            return norm_each
        query_norm, key_norm = (_rms_norm(weight, eps) for weight in weights)

        def norm_whole(heads: torch.Tensor) -> None:
            for part, norm in (
                (heads[:, : self._heads], query_norm),
                (heads[:, self._heads :], key_norm),
            ):
                part.copy_(norm(part.reshape(len(part), -1)).view(part.shape))

        return norm_whole

    def __call__(
        self,
        hidden: torch.Tensor,
        step: PackedStep,
        cache: SlotCache,
        turns: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Compute a step's rows.

        Args:
            hidden: ``[T, hidden]``; stays as it is.
            step: whose rows.
            cache: gets keys and values.
            turns: by type of rotation, ``[T, 1, rotated / 2]`` complex.

        Returns:
            ``[T, hidden]``.
        """
        rows = self._before_attention(hidden) if self._before_attention else hidden
        added = self._attend(rows, step, cache, turns)
        if self._after_attention:
            added = self._after_attention(added)
        attended = torch.add(hidden, added, alpha=self._multiplier)
        if not self._parallel:
            rows = self._before_mlp(attended) if self._before_mlp else attended
        added = self._mlp(rows)
        if self._after_mlp:
            added = self._after_mlp(added)
        return torch.add(attended, added, alpha=self._multiplier)

    def _attend(
        self,
        rows: torch.Tensor,
        step: PackedStep,
        cache: SlotCache,
        turns: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        tokens, turned, head_dim = rows.shape[0], self._turned_heads, self._head_dim
        heads = self._qkv(rows).view(tokens, -1, head_dim)
        self._qk_norm(heads[:, :turned])
        turn = turns[self.rope] if self._rotated else None
        keys, values = cache.keys[self._index], cache.values[self._index]
        if step.kernels is not None:
            step.kernels.place(heads, turn, keys, values, step.slots, step.positions)
        else:
            if turn is not None:
                pairs = torch.view_as_complex(heads.view(tokens, -1, head_dim // 2, 2))
                pairs[:, :turned, : turn.shape[-1]].mul_(turn)
            keys[step.slots, :, step.positions] = heads[:, self._heads : turned]
            values[step.slots, :, step.positions] = heads[:, turned:]
        attended = attend(
            step,
            heads[:, : self._heads],
            keys,
            values,
            self._scaling,
            self._window,
            self._softcap,
        )
        return self._output(attended.view(tokens, -1))


def _mlp(mlp: Any, recipe: Recipe) -> Rows:
    """What computes the same as an MLP of transformers, joined or not."""
    gate_up = getattr(mlp, GATE_UP, None)
    if gate_up is None:
        return lambda rows: mlp(rows[None])[0]
    down, activation = getattr(mlp, recipe.down), getattr(mlp, recipe.activation)
    if not recipe.gated:
        return lambda rows: down(activation(gate_up.forward(rows)))
    silu = isinstance(activation, nn.SiLU | SiLUActivation)
    act = functional.silu if silu else activation
    size = gate_up.out_features // 2
    found = kernels(torch.device("cpu"), torch.float32)
    if found is not None and silu:
        gate = found.gate
        return lambda rows: down(gate(gate_up.forward(rows)))

    def gated(rows: torch.Tensor) -> torch.Tensor:
        both = gate_up.forward(rows)
        values: torch.Tensor = down(act(both[:, :size]).mul_(both[:, size:]))
        return values

    return gated


@dataclass(frozen=True, slots=True)
class Fusion:
    """What was done to the layers of a model.

    Attributes:
        recipes: of each.
        joins: by path in the model, what joined linear layers were made of.
    """

    recipes: tuple[Recipe, ...]
    joins: dict[str, Join]


class FusedDecoder:
    """The layers of a shard, with embedding and head where it holds them.

    Args:
        model: ``…ForCausalLM`` of transformers, hollow but for this shard, its weights in it.
        decoder: the model without its head.
        layers: those held.
        fusion: what was done to them.
        embedding: the decoder's; None where another stage has it.
        head: the model's; None where another stage has it.
    """

    def __init__(
        self,
        model: Any,
        decoder: Any,
        layers: Sequence[Any],
        fusion: Fusion,
        embedding: Rows | None,
        head: Rows | None,
    ) -> None:
        self._layers = [
            FusedLayer(layer, recipe, index, decoder.rotary_emb)
            for index, (layer, recipe) in enumerate(zip(layers, fusion.recipes, strict=True))
        ]
        self._ropes = sorted({layer.rope for layer in self._layers})
        self._rotary = decoder.rotary_emb
        self._embedding = embedding
        self._embedding_scale = getattr(decoder, "embedding_multiplier", 1.0)
        self._head = head
        self._norm = _norm(decoder.norm, fusion.recipes[0].offset) if head else None
        self._logits_scale = getattr(model.config, "logits_scaling", 1.0)
        self._logits_cap = getattr(model.config, "final_logit_softcapping", None)

    def __call__(self, step: PackedStep, cache: SlotCache, inputs: torch.Tensor) -> torch.Tensor:
        """Compute a step.

        Args:
            step: which rows.
            cache: of these layers.
            inputs: ``[T]`` token ids where the embedding is, else ``[T, hidden]``.

        Returns:
            ``[T, hidden]``, or where the head is ``[n, vocabulary]`` of the rows that sample.
        """
        hidden = inputs
        if self._embedding is not None:
            hidden = self._embedding(inputs)
            if self._embedding_scale != 1.0:
                hidden = hidden * self._embedding_scale
        turns = {rope: self._turns(hidden, step.positions, rope) for rope in self._ropes}
        for layer in self._layers:
            hidden = layer(hidden, step, cache, turns)
        if self._head is None or self._norm is None:
            return hidden
        if len(step.samples) != hidden.shape[0]:
            hidden = hidden[step.samples]
        return self._logits(self._head(self._norm(hidden)))

    def _turns(self, hidden: torch.Tensor, positions: torch.Tensor, rope: str) -> torch.Tensor:
        cos, sin = _rotation(self._rotary, hidden, positions, rope)
        half = cos.shape[-1] // 2
        return torch.complex(cos[:, None, :half], sin[:, None, :half])

    def _logits(self, logits: torch.Tensor) -> torch.Tensor:
        if self._logits_scale != 1.0:
            logits = logits / self._logits_scale
        if self._logits_cap is not None:
            logits = torch.tanh(logits / self._logits_cap) * self._logits_cap
        return logits


def join_layers(decoder: Any, layers: dict[str, Any]) -> Fusion | None:
    """Join the linear layers of a hollow model; all of its layers can be fused, or none is.

    Args:
        decoder: the model without its head.
        layers: those held, by path in the model; changed.
    """
    recipes = [recipe for layer in layers.values() if (recipe := recipe_of(layer)) is not None]
    if len(recipes) < len(layers):
        return None
    joins: dict[str, Join] = {}
    for (path, layer), recipe in zip(layers.items(), recipes, strict=True):
        rotated = rotated_size(decoder.rotary_emb, layer, recipe)
        joins |= {f"{path}.{join.path}": join for join in join_linears(layer, recipe, rotated)}
    return Fusion(tuple(recipes), joins)


def rotated_size(rotary: Any, layer: Any, recipe: Recipe) -> int:
    """Numbers of each head that a layer's rotary embedding turns."""
    if not getattr(layer.self_attn, "use_rope", True):
        return 0
    rope = layer.self_attn.layer_type if recipe.typed_rope else ""
    return int(_rotation(rotary, torch.zeros(1, 1), torch.zeros(1), rope)[0].shape[-1])


def _rotation(
    rotary: Any, hidden: torch.Tensor, positions: torch.Tensor, rope: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[T, rotated]``; either half of a row is the same."""
    cos, sin = rotary(hidden, positions[None], *((rope,) if rope else ()))
    return cos[0], sin[0]
