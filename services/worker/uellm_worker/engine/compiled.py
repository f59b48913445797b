"""The layers of a shard as one program of kernels: a step is one call, whoever is in it.

Threads meet between operations and not in torch: see ``team.py``. Everything is laid out once, for
so many rows; a step says how many there are and where what it brings along is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from uellm_worker.engine.attention import SlotCache
from uellm_worker.engine.layers import LayerParts, Norm
from uellm_worker.engine.lora import LoraLinear
from uellm_worker.engine.native import Kernels
from uellm_worker.engine.packed import PackedStep
from uellm_worker.engine.packing import PackedLinear
from uellm_worker.engine.panels import PanelWeight
from uellm_worker.engine.quantized_panels import QuantizedPanels
from uellm_worker.engine.team import Operation, Program, StepNumbers
from uellm_worker.engine.tiles import HEAD_NUMBERS, PANEL_ROWS, SPAN_ROWS

_LEAST_ROWS = 32
"""That a program is laid out for."""
_ALONE = 1 << 22
"""Products that one thread has done before others have woken up."""


@dataclass(frozen=True, slots=True)
class Head:
    """What gives logits.

    Attributes:
        norm: of the layers' rows.
        linear: the model's head.
    """

    norm: Norm
    linear: Any


def compilable(layers: Sequence[LayerParts]) -> bool:
    """Whether kernels know all that these layers do."""
    return all(
        each.activation_kind
        and each.head_dim % HEAD_NUMBERS == 0
        and all(
            in_panels(_base(linear)) for linear in (each.qkv, each.output, each.gate_up, each.down)
        )
        for each in layers
    )


def in_panels(linear: Any) -> bool:
    """A linear layer is a product that kernels know."""
    if type(linear) is PackedLinear:
        return isinstance(linear.weight, PanelWeight)
    return type(linear) is QuantizedPanels


def _base(linear: Any) -> Any:
    """The linear layer without its adapters."""
    return linear.base if isinstance(linear, LoraLinear) else linear


class CompiledLayers:
    """Layers, and the head behind them, as a program.

    Args:
        kernels: that it is made of.
        layers: compilable.
        head: in panels; None where another stage, or torch, computes it.
        hidden_size: of their rows.
        ropes: types of rotation, in the order in which steps bring what positions are turned by.
    """

    def __init__(
        self,
        kernels: Kernels,
        layers: Sequence[LayerParts],
        head: Head | None,
        hidden_size: int,
        ropes: Sequence[str],
    ) -> None:
        self._kernels = kernels
        self._layers = layers
        self._head = head
        self._hidden_size = hidden_size
        self._ropes = list(ropes)
        linears = [
            linear for each in layers for linear in (each.qkv, each.output, each.gate_up, each.down)
        ]
        self._products = sum(_base(linear).numbers for linear in linears)
        adapted = (linear.step for linear in linears if isinstance(linear, LoraLinear))
        self._adapters = next(adapted, None)
        self._laid_out: _Layout | None = None

    def __call__(
        self,
        step: PackedStep,
        cache: SlotCache,
        hidden: torch.Tensor,
        turns: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Compute a step.

        Args:
            step: which rows.
            cache: of these layers; the same in every step.
            hidden: ``[T, hidden]``; stays as it is.
            turns: by type of rotation, ``[positions, rotated / 2]`` complex.

        Returns:
            ``[T, hidden]``, or where the head is ``[n, vocabulary]`` of the rows that sample.
        """
        rows, members = len(hidden), torch.get_num_threads()
        layout = self._laid_out
        if layout is None or layout.rows < rows or layout.members < members:
            most = max(rows, _LEAST_ROWS) if layout is None else max(2 * layout.rows, rows)
            layout = self._laid_out = self._lay_out(cache, most, members)
        layout.first[:rows].copy_(hidden)
        output = None
        if self._head is not None:
            output = hidden.new_empty(len(step.samples), self._head.linear.width)
        numbers = StepNumbers(
            rows,
            step.slots,
            step.positions,
            step.table,
            None if self._head is None else step.samples,
            output,
            None if self._adapters is None else self._adapters.by_row,
            turns,
        )
        alone = self._products * rows < _ALONE
        self._kernels.team.run(layout.program, numbers, 1 if alone else members)
        if self._head is None or output is None:
            return layout.last[:rows].clone()
        return output[:, : self._head.linear.out_features]

    def _lay_out(self, cache: SlotCache, rows: int, members: int) -> "_Layout":
        """The program for so many rows."""
        writer = _Writer(self._kernels, cache, rows, members, self._hidden_size)
        for index, layer in enumerate(self._layers):
            writer.layer(index, layer, self._ropes.index(layer.rope) if layer.rotated else 0)
        if self._head is not None:
            writer.head(self._head)
        program = Program(writer.operations)
        return _Layout(program, writer.first, writer.hidden, rows, members)


@dataclass(frozen=True, slots=True)
class _Layout:
    """A program, and what it was laid out for.

    Attributes:
        program: it.
        first: ``[rows, hidden]``, where rows come in.
        last: where they come out.
        rows: the most.
        members: the most.
    """

    program: Program
    first: torch.Tensor
    last: torch.Tensor
    rows: int
    members: int


class _Writer:
    """Writes the program of some layers.

    Args:
        kernels: that it is made of.
        cache: of the layers.
        rows: the most of a step.
        members: the most threads.
        hidden_size: of the rows.

    Attributes:
        operations: written so far.
        first: ``[rows, hidden]``, what the first of them reads.
        hidden: what the last of them has written.
    """

    def __init__(
        self, kernels: Kernels, cache: SlotCache, rows: int, members: int, hidden_size: int
    ) -> None:
        self.operations: list[Operation] = []
        self._make = kernels.operations
        self._cache = cache
        self._rows = rows
        self._members = members
        self._room: dict[str, torch.Tensor] = {}
        width = -(-hidden_size // PANEL_ROWS) * PANEL_ROWS
        self._spare = self._empty("spare", width)
        self._size = hidden_size
        self.first = self.hidden = self._empty("hidden", width)[:, :hidden_size]

    def _empty(self, name: str, width: int) -> torch.Tensor:
        """Room for rows, shared by all layers."""
        if name not in self._room or self._room[name].shape[1] < width:
            self._room[name] = torch.empty(self._rows, width)
        return self._room[name]

    def layer(self, index: int, layer: LayerParts, kind: int) -> None:
        """Write a decoder layer; ``kind`` is its rotation's."""
        before_attention, after_attention, before_mlp, after_mlp = layer.norms
        rows = self._normed(before_attention, self.hidden)
        self._add(self._attend(index, layer, kind, rows), layer.output, after_attention, layer)
        if not layer.parallel:
            rows = self._normed(before_mlp, self.hidden)
        self._add(self._activate(layer, rows), layer.down, after_mlp, layer)

    def head(self, head: Head) -> None:
        """Write the head, of the rows that sample."""
        rows = self._empty("normed", self._size)
        self._norm(head.norm, self.hidden, rows, sampling=True)
        self._multiply(head.linear, rows, None, sampling=True)

    def _normed(self, norm: Norm | None, rows: torch.Tensor) -> torch.Tensor:
        if norm is None:
            return rows
        output = self._empty("normed", self._size)
        self._norm(norm, rows, output)
        return output

    def _attend(self, index: int, layer: LayerParts, kind: int, rows: torch.Tensor) -> torch.Tensor:
        """Attention of the rows, before its last product."""
        heads = self._product(layer.qkv, rows, "heads")
        begin = 0
        for norm in layer.qk_norms:
            part = heads[:, begin : begin + norm.weight.numel()]
            self._norm(norm, part, part)
            begin += norm.weight.numel()
        keys, values = self._cache.keys[index], self._cache.values[index]
        pairs = layer.rotated // 2
        self.operations.append(
            self._make.place(heads, keys, values, layer.heads, kind=kind, pairs=pairs)
        )
        width, group = layer.heads * layer.head_dim, layer.heads // layer.kv_heads
        output = self._empty("attended", width)[:, :width]
        longest = keys.shape[2]
        scratch = self._scratch("scores", SPAN_ROWS * group * longest)
        self.operations.append(
            self._make.attend(
                heads,
                keys,
                values,
                output,
                scratch,
                scaling=layer.scaling,
                window=layer.window,
                softcap=layer.softcap,
            )
        )
        return output

    def _scratch(self, name: str, width: int) -> torch.Tensor:
        """Room of each thread for what it is at; takes memory as far as it is used."""
        if name not in self._room or self._room[name].shape[1] < width:
            self._room[name] = torch.empty(self._members, width)
        return self._room[name]

    def _activate(self, layer: LayerParts, rows: torch.Tensor) -> torch.Tensor:
        """The MLP of the rows, before its last product."""
        both = self._product(layer.gate_up, rows, "both")
        size = layer.gate_up.out_features // (2 if layer.gated else 1)
        output = self._empty("activated", size)
        gelu = layer.activation_kind == "gelu"
        self.operations.append(
            self._make.activate(both, output, size, gelu=gelu, gated=layer.gated)
        )
        return output

    def _add(self, rows: torch.Tensor, linear: Any, norm: Norm | None, layer: LayerParts) -> None:
        """Add the product of rows to the hidden ones, normed or not."""
        before, output = self.hidden, self._spare
        if norm is None:
            self._multiply(linear, rows, output, before, factor=layer.multiplier)
        else:
            product = self._product(linear, rows, "product")
            self._norm(norm, product, output, before, factor=layer.multiplier)
        self.hidden, self._spare = output[:, : self._size], before

    def _product(self, linear: Any, rows: torch.Tensor, name: str) -> torch.Tensor:
        output = self._empty(name, _base(linear).width)
        self._multiply(linear, rows, output)
        return output

    def _multiply(
        self,
        linear: Any,
        rows: torch.Tensor,
        output: torch.Tensor | None,
        added: torch.Tensor | None = None,
        *,
        factor: float = 1.0,
        sampling: bool = False,
    ) -> None:
        operation = _base(linear).operation(
            self._make, rows, output, added, factor=factor, sampling=sampling
        )
        self.operations.append(operation)
        if isinstance(linear, LoraLinear) and output is not None:
            scratch = self._scratch("inner", linear.ranks)
            self.operations.append(
                self._make.adapt(
                    rows, output, linear.table, scratch, linear.base.in_features, factor
                )
            )

    def _norm(
        self,
        norm: Norm,
        rows: torch.Tensor,
        output: torch.Tensor,
        added: torch.Tensor | None = None,
        *,
        factor: float = 1.0,
        sampling: bool = False,
    ) -> None:
        self.operations.append(
            self._make.norm(
                rows,
                norm.weight,
                norm.bias,
                output,
                added,
                eps=norm.eps,
                centred=norm.centred,
                factor=factor,
                sampling=sampling,
            )
        )
