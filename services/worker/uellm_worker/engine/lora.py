"""Linear layers that add LoRA adapters to some rows of a step.

The rows of a step are grouped by adapter once; every layer then does two small products for each
adapter that is present, whatever the number of requests. Rows without an adapter, and steps without
any, are left to the layer alone. The idea of grouping instead of merging: S-LoRA, arXiv 2311.03285.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional

from uellm.core.errors import ModelFilesError
from uellm.models.lora import WEIGHTS, Factors, read_factors
from uellm_worker.engine.plan import Chunk, StepPlan
from uellm_worker.engine.recipes import Join
from uellm_worker.engine.weights import ShardSpec

Rows: TypeAlias = slice | torch.Tensor
"""Rows of a step: neighbours, or their indices."""


class StepAdapters:
    """Which rows of the present step belong to which adapter. Shared by all layers of a part.

    Args:
        device: of the layers.

    Attributes:
        groups: adapters that are present, by index, and their rows.
        by_row: ``[T]``, index of each row's adapter, -1 for none; None where no row has one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._by_slot: dict[int, int] = {}
        self.groups: tuple[tuple[int, Rows], ...] = ()
        self.by_row: torch.Tensor | None = None

    def begin(self, plan: StepPlan) -> None:
        """Turn to a step; remembers the adapters of its newly admitted sequences."""
        for admission in plan.admissions:
            self._by_slot[admission.slot] = admission.adapter
        self.groups = tuple(
            (adapter, self._rows(runs))
            for adapter, runs in rows_by_adapter(plan.chunks, self._by_slot).items()
        )
        self.by_row = None
        if self.groups:
            self.by_row = torch.full((plan.rows,), -1, device=self._device)
            for adapter, rows in self.groups:
                self.by_row[rows] = adapter

    def _rows(self, runs: Sequence[range]) -> Rows:
        if len(runs) == 1:
            return slice(runs[0].start, runs[0].stop)
        return torch.tensor([row for run in runs for row in run], device=self._device)


def rows_by_adapter(chunks: Sequence[Chunk], adapters: Mapping[int, int]) -> dict[int, list[range]]:
    """The rows of each adapter that is present, as runs of neighbours in order.

    Args:
        chunks: of a step.
        adapters: index by slot; -1 for none.
    """
    found: dict[int, list[range]] = {}
    row = 0
    for chunk in chunks:
        adapter, end = adapters.get(chunk.slot, -1), row + chunk.count
        if adapter >= 0:
            runs = found.setdefault(adapter, [])
            if runs and runs[-1].stop == row:
                runs[-1] = range(runs[-1].start, end)
            else:
                runs.append(range(row, end))
        row = end
    return found


@dataclass(frozen=True, slots=True)
class _Part:
    """What an adapter adds to some of a linear layer's outputs.

    Attributes:
        ranks: which of the inner numbers it takes.
        columns: which outputs it adds to.
        b: ``[ranks, columns]``, the scale in it.
    """

    ranks: slice
    columns: slice
    b: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Matrices:
    """An adapter's part of a linear layer: ``a`` is ``[ranks, in]``; several parts if joined."""

    a: torch.Tensor
    parts: tuple[_Part, ...]

    def numbers(self) -> list[int]:
        """See ``LoraLinear.table``."""
        found = [self.a.data_ptr(), len(self.a), len(self.parts)]
        for part in self.parts:
            ranks, columns = part.ranks, part.columns
            sizes = (ranks.start, len(part.b), columns.start, columns.stop - columns.start)
            found += (*sizes, part.b.data_ptr())
        return found

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor, rows: Rows) -> None:
        """Add to some rows of ``[T, out]`` what comes of the same rows of ``[T, in]``."""
        inner = functional.linear(inputs[rows], self.a)
        for part in self.parts:
            columns, ranks = outputs[:, part.columns], inner[:, part.ranks]
            if isinstance(rows, slice):
                columns[rows].addmm_(ranks, part.b)
            else:
                columns.index_add_(0, rows, ranks @ part.b)


class LoraLinear(nn.Module):
    """A linear layer, and what adapters add to it.

    Args:
        base: ``[..., in]`` to a fresh ``[..., out]``.
        matrices: by adapter.
        step: says which rows are whose.

    Attributes:
        out_features: numbers in a row that comes out, where ``base`` says so.
        base: as it was given.
        step: likewise.
    """

    def __init__(self, base: nn.Module, matrices: dict[int, _Matrices], step: StepAdapters) -> None:
        super().__init__()
        if hasattr(base, "out_features"):
            self.out_features = int(base.out_features)
        self.base = base
        self._matrices = matrices
        self.step = step

    @property
    def ranks(self) -> int:
        """Most inner numbers of an adapter."""
        return max(len(matrices.a) for matrices in self._matrices.values())

    @cached_property
    def table(self) -> torch.Tensor:
        """Addresses by adapter, ``[adapters]``, as the kernel finds them; 0: adds nothing.

        There it finds the address of ``a``, how many ranks, how many parts, and of each part
        the first rank, how many, the first column, how many, and the address of ``b``.
        """
        self._blocks = {
            index: torch.tensor(matrices.numbers()) for index, matrices in self._matrices.items()
        }
        addresses = torch.zeros(max(self._matrices) + 1, dtype=torch.long)
        for index, block in self._blocks.items():
            addresses[index] = block.data_ptr()
        return addresses

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``; together the leading dimensions are the step's rows."""
        outputs: torch.Tensor = self.base(inputs)
        for adapter, rows in self.step.groups:
            matrices = self._matrices.get(adapter)
            if matrices is not None:
                flat = inputs.reshape(-1, inputs.shape[-1])
                matrices.add(flat, outputs.view(-1, outputs.shape[-1]), rows)
        return outputs


class ShardAdapters:
    """The adapters of a layer range: checked against the model at once, read later.

    Args:
        spec: which layers, which adapters.
        model: hollowed, before or after its weights are filled in.

    Attributes:
        total_bytes: in the dtype to compute in.

    Raises:
        ModelFilesError: if one is damaged, or does not belong to the model.
    """

    def __init__(self, spec: ShardSpec, model: Any) -> None:
        self._spec = spec
        self._factors = [_held(directory, spec, model) for directory in spec.adapters]
        elements = sum(factors.elements for held in self._factors for factors in held)
        self.total_bytes = elements * spec.dtype.itemsize

    def wrap(self, model: Any, joins: Mapping[str, Join]) -> StepAdapters | None:
        """Read the matrices and put them around the model's layers; None without adapters.

        Args:
            model: with its weights.
            joins: by path, linear layers that took the place of others.

        Raises:
            ModelFilesError: if a file is damaged.
        """
        if not self._spec.adapters:
            return None
        step = StepAdapters(self._spec.device)
        places = _places(joins)
        by_module: dict[str, dict[int, _Matrices]] = {}
        for index, directory in enumerate(self._spec.adapters):
            for module, matrices in self._read(directory, self._factors[index], places).items():
                by_module.setdefault(module, {})[index] = matrices
        for module, by_adapter in by_module.items():
            owner, _, leaf = module.rpartition(".")
            linear = LoraLinear(model.get_submodule(module), by_adapter, step)
            setattr(model.get_submodule(owner), leaf, linear)
        return step

    def _read(
        self, directory: Path, held: Sequence[Factors], places: Mapping[str, "_Place"]
    ) -> dict[str, _Matrices]:
        """An adapter's matrices by linear layer, those of joined layers together."""
        path = directory / WEIGHTS
        read: dict[str, list[tuple[_Place, torch.Tensor, torch.Tensor]]] = {}
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                for factors in held:
                    place = places.get(factors.module, _Place(factors.module))
                    # Copies, so that no page of the file is needed later on. Scaled as stored,
                    # which costs no rounding in a narrower dtype.
                    a = file.get_tensor(factors.key("A")).to(**self._kind, copy=True)
                    b = file.get_tensor(factors.key("B")).float() * factors.scale
                    piece = (place, a, place.laid_out(b).to(**self._kind))
                    read.setdefault(place.module, []).append(piece)
        except (OSError, SafetensorError) as error:
            raise ModelFilesError(
                f"{path} is not a whole safetensors file: {error}; download or copy it again"
            ) from error
        return {module: _together(pieces) for module, pieces in read.items()}

    @property
    def _kind(self) -> dict[str, Any]:
        return {"device": self._spec.device, "dtype": self._spec.dtype}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a linear layer's outputs are.

    Attributes:
        module: the layer that computes them.
        start: the first of them there.
        join: what it was joined in; None if it stands alone.
    """

    module: str
    start: int = 0
    join: Join | None = None

    def laid_out(self, b: torch.Tensor) -> torch.Tensor:
        """A matrix ``[out, rank]`` with its rows where the outputs are."""
        if self.join is None or self.join.pairs is None:
            return b
        whole = b.new_zeros(sum(self.join.rows), b.shape[1])
        rows = slice(self.start, self.start + b.shape[0])
        whole[rows] = b
        # Rows change places within a head, so those of a source stay together.
        return self.join.pairs.laid_out(whole)[rows].clone()


def _places(joins: Mapping[str, Join]) -> dict[str, _Place]:
    """Where the outputs of joined linear layers are, by their former paths."""
    places = {}
    for path, join in joins.items():
        prefix = path.removesuffix(join.path)
        for source, start in zip(join.sources, accumulate(join.rows, initial=0), strict=False):
            places[prefix + source] = _Place(path, start, join)
    return places


def _together(pieces: Sequence[tuple[_Place, torch.Tensor, torch.Tensor]]) -> _Matrices:
    """One adapter's matrices for one linear layer, from ``a`` and ``b`` of what it computes."""
    parts = []
    rank = 0
    for place, a, b in pieces:
        columns = slice(place.start, place.start + b.shape[0])
        parts.append(_Part(slice(rank, rank + a.shape[0]), columns, b.T.contiguous()))
        rank += a.shape[0]
    first = pieces[0][1]
    whole = torch.cat([a for _, a, _ in pieces]) if len(pieces) > 1 else first.contiguous()
    return _Matrices(whole, tuple(parts))


def _held(directory: Path, spec: ShardSpec, model: Any) -> list[Factors]:
    """An adapter's factors for the layers held here, each found to fit its linear layer."""
    path = directory / WEIGHTS
    held = []
    for factors in read_factors(directory):
        if factors.layer >= model.config.num_hidden_layers:
            raise ModelFilesError(
                f"{path} adds to {factors.module}, and the model has "
                f"{model.config.num_hidden_layers} layers; it belongs to another model"
            )
        if spec.first_layer <= factors.layer <= spec.last_layer:
            _check_fits(path, factors, model)
            held.append(factors)
    return held


def _check_fits(path: Path, factors: Factors, model: Any) -> None:
    try:
        shape = _shape(model.get_submodule(factors.module))
    except AttributeError:
        shape = None
    if shape is None or ".experts." in factors.module:
        raise ModelFilesError(
            f"{path} adds to {factors.module}, and {type(model).__name__} has no such linear "
            "layer that all tokens pass; it belongs to another model, or is not served"
        )
    out, width = shape
    for factor, tensor, wanted in (
        ("A", factors.a, (factors.rank, width)),
        ("B", factors.b, (out, factors.rank)),
    ):
        if tensor.shape != wanted:
            raise ModelFilesError(
                f"{path}, tensor {factors.key(factor)!r}: shape {tensor.shape}, and the model's "
                f"layer of {width} to {out} asks for {wanted}; it was trained on another model"
            )


def _shape(module: Any) -> tuple[int, int] | None:
    """Outputs and inputs of a linear layer; None if it is something else."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(module.nf), int(module.weight.shape[0])
    return None
