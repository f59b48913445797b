"""Decoder layers in few operations, for the layers that ``recipes.py`` describes; float32 on CPUs.

One product gives queries, keys and values, one gate and values of the MLP. What a step's layers
share, the rotation above all, is computed once a step. Numbers that are rotated together lie next
to each other, as those of a complex number: the order within a head does not matter to scores.
Results differ from transformers' by rounding. Where kernels know all that the layers do, a step is
one program of theirs (``compiled.py``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from uellm_worker.engine.attention import SlotCache, attend
from uellm_worker.engine.compiled import CompiledLayers, Head, compilable, in_panels
from uellm_worker.engine.layers import LayerParts, norm_of, parts_of
from uellm_worker.engine.native import kernels
from uellm_worker.engine.packed import PackedStep
from uellm_worker.engine.recipes import Join, Recipe, join_linears, recipe_of

Rows = Callable[[torch.Tensor], torch.Tensor]
"""Rows to as many rows."""
_LEAST_TURNS = 256
"""Positions whose rotations are computed at once."""


class FusedLayer:
    """A decoder layer.

    Args:
        parts: what it is made of.
        index: in the cache.
    """

    def __init__(self, parts: LayerParts, index: int) -> None:
        self._parts = parts
        self._index = index
        self._mlp = _mlp(parts)

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
            turns: by type of rotation, ``[positions, rotated / 2]`` complex.

        Returns:
            ``[T, hidden]``.
        """
        parts = self._parts
        before_attention, after_attention, before_mlp, after_mlp = parts.norms
        rows = before_attention(hidden) if before_attention else hidden
        added = self._attend(rows, step, cache, turns)
        if after_attention:
            added = after_attention(added)
        attended = torch.add(hidden, added, alpha=parts.multiplier)
        if not parts.parallel:
            rows = before_mlp(attended) if before_mlp else attended
        added = self._mlp(rows)
        if after_mlp:
            added = after_mlp(added)
        return torch.add(attended, added, alpha=parts.multiplier)

    def _attend(
        self,
        rows: torch.Tensor,
        step: PackedStep,
        cache: SlotCache,
        turns: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        parts = self._parts
        tokens, turned, head_dim = rows.shape[0], parts.heads + parts.kv_heads, parts.head_dim
        heads = parts.qkv.forward(rows).view(tokens, -1, head_dim)
        _norm_heads(parts, heads)
        turn = turns[parts.rope] if parts.rotated else None
        keys, values = cache.keys[self._index], cache.values[self._index]
        if step.kernels is not None:
            step.kernels.place(heads, turn, keys, values, step.slots, step.positions)
        else:
            if turn is not None:
                pairs = torch.view_as_complex(heads.view(tokens, -1, head_dim // 2, 2))
                pairs[:, :turned, : turn.shape[-1]].mul_(turn[step.positions][:, None])
            keys[step.slots, :, step.positions] = heads[:, parts.heads : turned]
            values[step.slots, :, step.positions] = heads[:, turned:]
        attended = attend(
            step,
            heads[:, : parts.heads],
            keys,
            values,
            parts.scaling,
            parts.window,
            parts.softcap,
        )
        return parts.output(attended.view(tokens, -1))


def _norm_heads(parts: LayerParts, heads: torch.Tensor) -> None:
    """Norm queries and keys, ``[T, heads, head_dim]`` with values behind them, in place."""
    begin = 0
    for norm in parts.qk_norms:
        count = norm.weight.numel() // parts.head_dim
        part = heads[:, begin : begin + count]
        part.copy_(norm(part.reshape(len(part), -1)).view(part.shape))
        begin += count


def _mlp(parts: LayerParts) -> Rows:
    """What computes the same as an MLP of transformers, joined or not."""
    if parts.gate_up is None:
        return lambda rows: parts.mlp(rows[None])[0]
    gate_up, down, kind = parts.gate_up.forward, parts.down, parts.activation_kind
    act = functional.silu if kind == "silu" else parts.activation
    if not parts.gated:
        return lambda rows: down(act(gate_up(rows)))
    found = kernels(torch.device("cpu"), torch.float32)
    if found is not None and kind:
        gate, gelu = found.gate, kind == "gelu"
        return lambda rows: down(gate(gate_up(rows), gelu=gelu))
    size = parts.gate_up.out_features // 2

    def gated(rows: torch.Tensor) -> torch.Tensor:
        both = gate_up(rows)
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

    Attributes:
        compiled: computes the layers where kernels know all that they do; else None.
    """

    def __init__(
        self,
        model: Any,
        decoder: Any,
        layers: Sequence[Any],
        fusion: Fusion,
        embedding: Rows | None,
        head: Any,
    ) -> None:
        parts = [
            parts_of(layer, recipe, rotated_size(decoder.rotary_emb, layer, recipe))
            for layer, recipe in zip(layers, fusion.recipes, strict=True)
        ]
        self._rotary = decoder.rotary_emb
        ropes = sorted({each.rope for each in parts if each.rotated})
        self._turns = {rope: torch.empty(0, 0) for rope in ropes}
        self._embedding = embedding
        self._embedding_scale = getattr(decoder, "embedding_multiplier", 1.0)
        norm = norm_of(decoder.norm, fusion.recipes[0].offset) if head else None
        self._head = Head(norm, head) if norm is not None else None
        self._logits_scale = getattr(model.config, "logits_scaling", 1.0)
        self._logits_cap = getattr(model.config, "final_logit_softcapping", None)
        self._layers = [FusedLayer(each, index) for index, each in enumerate(parts)]
        self.compiled: CompiledLayers | None = None
        found = kernels(torch.device("cpu"), torch.float32)
        self._head_compiled = in_panels(head)
        if found is not None and compilable(parts):
            hidden = int(model.config.hidden_size)
            compiled = self._head if self._head_compiled else None
            self.compiled = CompiledLayers(found, parts, compiled, hidden, ropes)

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
        self._make_turns(step, cache)
        if self.compiled is not None and step.kernels is not None:
            hidden = self.compiled(step, cache, hidden, list(self._turns.values()))
            if self._head_compiled:
                return self._logits(hidden)
        else:
            for layer in self._layers:
                hidden = layer(hidden, step, cache, self._turns)
        if self._head is None:
            return hidden
        if len(step.samples) != hidden.shape[0]:
            hidden = hidden[step.samples]
        return self._logits(self._head.linear(self._head.norm(hidden)))

    def _make_turns(self, step: PackedStep, cache: SlotCache) -> None:
        """See to it that what rows of a step are turned by is there, for all of their positions."""
        for rope, turns in self._turns.items():
            if len(turns) < step.longest:
                most = cache.keys[0].shape[2]
                count = min(max(2 * step.longest, _LEAST_TURNS), most)
                cos, sin = _rotation(self._rotary, torch.zeros(1, 1), torch.arange(count), rope)
                half = cos.shape[-1] // 2
                self._turns[rope] = torch.complex(cos[:, :half], sin[:, :half])

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
