"""The weights of a layer range, put together from the tensors of a checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True, slots=True)
class Held:
    """A weight as it is held.

    Attributes:
        key: the parameter's name, or that of the one it is tied to.
        packed: laid out for a linear layer.
    """

    key: str
    packed: bool


def read_weights(
    spec: ShardSpec, family: Family, shapes: dict[Held, torch.Size]
) -> Iterator[tuple[Held, torch.Tensor]]:
    """Weights in the dtype and on the device that were asked for, as each is complete.

    Args:
        spec: where and as what.
        family: how the checkpoint names them.
        shapes: those to read, and what the config makes them.

    Raises:
        ModelFilesError: if one is missing, or its shape is not that of the config.
    """
    files = TensorFiles(spec.model_dir)
    places: dict[str, tuple[Held, Piece]] = {}
    outstanding: dict[Held, int] = {}
    for held, shape in shapes.items():
        pieces = family.pieces(held.key, shape[0] if shape else 0, files.__contains__)
        outstanding[held] = len(pieces)
        places |= {piece.key: (held, piece) for piece in pieces}
    stacks: dict[Held, torch.Tensor] = {}
    for key, stored in files.read(places):
        held, piece = places[key]
        wanted = shapes[held]
        if piece.expert is not None:
            wanted = torch.Size((wanted[1] // piece.parts, *wanted[2:]))
        if stored.shape != wanted:
            raise ModelFilesError(
                f"{spec.model_dir}, tensor {key!r}: shape {tuple(stored.shape)}, and the config "
                f"asks for {tuple(wanted)}; config and weights do not belong together"
            )
        if piece.expert is None:
            # A copy, so that no page of the file is needed, or trusted, later on.
            yield held, stored.to(device=spec.device, dtype=spec.dtype, copy=True)
            continue
        if held not in stacks:
            stacks[held] = torch.empty(shapes[held], dtype=spec.dtype, device=spec.device)
        stacks[held][piece.expert].chunk(piece.parts)[piece.part].copy_(stored)
        outstanding[held] -= 1
        if not outstanding[held]:
            yield held, stacks.pop(held)
