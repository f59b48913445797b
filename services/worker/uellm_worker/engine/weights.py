"""The weights of a layer range, put together from the tensors of a checkpoint."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from uellm.core.errors import ModelFilesError
from uellm.models.families import Family, Piece
from uellm_worker.engine.checkpoint import TensorFiles


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
        adapters: directories of LoRA adapters, by index.
    """

    model_dir: Path
    digest: str
    dtype: torch.dtype
    device: torch.device
    first_layer: int
    last_layer: int
    has_embed: bool
    has_head: bool
    adapters: tuple[Path, ...] = ()

    def same_weights(self, other: "ShardSpec") -> bool:
        """Tensors loaded for one serve the other."""
        return (self.digest or str(self.model_dir), self.dtype, self.device) == (
            other.digest or str(other.model_dir),
            other.dtype,
            other.device,
        )


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows of a weight that change places, so that what is rotated together lies together.

    A rotary embedding of transformers turns number ``i`` of a head with number ``i + rotated / 2``.

    Attributes:
        rows: the first so many; heads below each other.
        head_dim: rows of a head.
        rotated: the first so many of each head.
    """

    rows: int
    head_dim: int
    rotated: int

    def laid_out(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight ``[rows or more, ...]`` with its rows in their new places."""
        order = torch.arange(self.head_dim)
        order[: self.rotated] = order[: self.rotated].view(2, -1).T.reshape(-1)
        heads = torch.arange(0, self.rows, self.head_dim)
        rest = torch.arange(self.rows, weight.shape[0])
        places = torch.cat(((heads[:, None] + order).view(-1), rest))
        return weight.index_select(0, places.to(weight.device))


PanelsOf: TypeAlias = Literal["numbers", "pairs"]
"""What is laid out in panels: numbers, or bytes that hold two numbers each."""


@dataclass(frozen=True, slots=True)
class Held:
    """A weight as it is held.

    Attributes:
        key: the parameter's name, or that of the one it is tied to.
        packed: laid out for a linear layer.
        looked_up: rows are looked up; if ``packed``, a linear layer shares them.
        transposed: ``[in, out]`` in the checkpoint.
        below: further parameters, whose rows follow; their names and numbers of rows.
        pairs: rows that change places.
        panels: of a quantised layer that a kernel multiplies; None: as it comes.
        inputs: of that layer.
    """

    key: str
    packed: bool
    looked_up: bool = False
    transposed: bool = False
    below: tuple[tuple[str, int], ...] = ()
    pairs: Pairs | None = None
    panels: PanelsOf | None = None
    inputs: int = 0

    def rows(self, total: int) -> dict[str, slice]:
        """Where each parameter lies among ``total`` rows."""
        sizes = {self.key: total - sum(rows for _, rows in self.below), **dict(self.below)}
        ends = accumulate(sizes.values())
        return {key: slice(end - sizes[key], end) for key, end in zip(sizes, ends, strict=True)}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a weight comes from that is not held as it is stored.

    Attributes:
        key: in the checkpoint.
        convert: makes what is held of what is stored.
    """

    key: str
    convert: Callable[[torch.Tensor], torch.Tensor]


def read_weights(
    spec: ShardSpec,
    family: Family,
    shapes: dict[Held, torch.Size],
    sources: Mapping[str, Source],
) -> Iterator[tuple[Held, torch.Tensor]]:
    """Weights in the dtype and on the device that were asked for, as each is complete.

    Args:
        spec: where and as what.
        family: how the checkpoint names them.
        shapes: those to read, and what the config makes them.
        sources: of weights that are converted, by their keys.

    Raises:
        ModelFilesError: if one is missing, or its shape is not that of the config.
    """
    files = TensorFiles(spec.model_dir)
    places: dict[str, _Place] = {}
    outstanding: dict[Held, int] = dict.fromkeys(shapes, 0)
    for held, shape in shapes.items():
        total = shape[0] if shape else 0
        for parameter, rows in held.rows(total).items():
            source = sources.get(parameter)
            pieces = (
                [Piece(source.key)]
                if source
                else family.pieces(parameter, total, files.__contains__)
            )
            outstanding[held] += len(pieces)
            places |= {piece.key: _Place(held, piece, rows, source) for piece in pieces}
    weights: dict[Held, torch.Tensor] = {}
    for key, stored in files.read(places):
        place = places[key]
        held = place.held
        tensor = place.source.convert(stored) if place.source else stored
        wanted = place.within(torch.empty(shapes[held], device="meta")).shape
        if tensor.shape != wanted:
            raise _unfit(spec, key, stored, wanted)
        # A copy, so that no page of the file is needed, or trusted, later on.
        if held not in weights:
            dtype = tensor.dtype if place.source else spec.dtype
            weights[held] = torch.empty(shapes[held], dtype=dtype, device=spec.device)
        place.within(weights[held]).copy_(tensor)
        outstanding[held] -= 1
        if not outstanding[held]:
            weight = weights.pop(held)
            yield held, held.pairs.laid_out(weight) if held.pairs else weight


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of a checkpoint goes: all of a weight, some of its rows, part of an expert."""

    held: Held
    piece: Piece
    rows: slice
    source: Source | None = None

    def within(self, weight: torch.Tensor) -> torch.Tensor:
        """That part of the weight."""
        if self.piece.expert is not None:
            return weight[self.piece.expert].chunk(self.piece.parts)[self.piece.part]
        return weight[self.rows] if self.held.below else weight


def _unfit(spec: ShardSpec, key: str, stored: torch.Tensor, wanted: torch.Size) -> ModelFilesError:
    return ModelFilesError(
        f"{spec.model_dir}, tensor {key!r}: shape {tuple(stored.shape)}, and the config "
        f"asks for {tuple(wanted)}; config and weights do not belong together"
    )
