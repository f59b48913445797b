"""What a model or a LoRA adapter consists of, tensor by tensor, and which of it a stage needs.

A host that lacks a model's files gets those tensors that its stages hold from hosts that have them.
It keeps them by parts: a layer, the embedding, the head, the rest. A part is a safetensors file of
its own, so that a checkpoint with some of the parts is read as any other with an index.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from uellm.core.errors import ModelFilesError
from uellm.models import adapters, files, lora
from uellm.models.profile import part_of
from uellm.models.safetensors import (
    TensorInfo,
    data_start,
    framed,
    parse_header,
    read_header_bytes,
)

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_TEXTS = {*files.TEXTS, lora.CONFIG}
_ALIGNMENTS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
WHOLE = "whole"
"""The only part of an adapter."""


@dataclass(frozen=True, slots=True)
class Span:
    """What a stage holds of a model.

    Attributes:
        first_layer: inclusive.
        last_layer: inclusive.
        has_embed: the embedding.
        has_head: final norm and head.
    """

    first_layer: int
    last_layer: int
    has_embed: bool
    has_head: bool


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a model.

    Attributes:
        name: without a directory.
        size: its bytes.
        content: all of it; of a file with tensors its header.
        has_tensors: whether it has some.
    """

    name: str
    size: int
    content: bytes
    has_tensors: bool


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a model.

    Attributes:
        name: of the tensor.
        file: that it is stored in.
        start: where in the file, in bytes.
        info: shape and dtype.
    """

    name: str
    file: str
    start: int
    info: TensorInfo

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.info.size


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors that are kept in one file.

    Attributes:
        file: its name.
        header: of that file, in front of the tensors.
        tensors: in the order in which they are stored there.
    """

    file: str
    header: bytes
    tensors: tuple[StoredTensor, ...]

    @property
    def tensor_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def file_bytes(self) -> int:
        """Of the file."""
        return data_start(self.header) + self.tensor_bytes

    @property
    def head(self) -> bytes:
        """What the file begins with."""
        return framed(self.header)


@dataclass(frozen=True)
class Manifest:
    """What a model or an adapter consists of.

    Attributes:
        files: the small ones whole, then those with tensors.

    Raises:
        ModelFilesError: if a file has a name, a header or a size that cannot be.
    """

    files: tuple[StoredFile, ...]

    def __post_init__(self) -> None:
        for file in self.files:
            plain = _PLAIN_NAME.fullmatch(file.name) if file.has_tensors else file.name in _TEXTS
            if not plain:
                raise ModelFilesError(f"{file.name!r} is no file of a checkpoint that is served")
        names = [file.name for file in self.files]
        if lora.CONFIG in names and sum(file.has_tensors for file in self.files) != 1:
            raise ModelFilesError("an adapter has one file with tensors, and no more")
        sizes = {file.name: file.size for file in self.files}
        for tensor in self.tensors.values():
            end, size = tensor.start + tensor.size, sizes[tensor.file]
            if end > size:
                raise ModelFilesError(
                    f"tensor {tensor.name!r} would end at byte {end} of {tensor.file}, which has "
                    f"{size}"
                )

    @cached_property
    def digest(self) -> str:
        """A model's, as ``uellm.models.files.digest``; an adapter's takes its tensors' bytes."""
        return files.digest_of((file.name, file.size, file.content) for file in self.files)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """By name."""
        return {
            name: StoredTensor(name, file.name, data_start(file.content) + info.start, info)
            for file in self.files
            if file.has_tensors
            for name, info in parse_header(file.content, file.name).items()
        }

    @cached_property
    def parts(self) -> Mapping[str, Part]:
        """By name: "0" and so on for layers, "embedding", "beside", "head", "rest"; or "whole"."""
        if any(file.name == lora.CONFIG for file in self.files):
            (weights,) = (file for file in self.files if file.has_tensors)
            stored = sorted(self.tensors.values(), key=lambda tensor: tensor.start)
            return {WHOLE: Part(weights.name, weights.content, tuple(stored))}
        members: dict[str, list[StoredTensor]] = {}
        for tensor in self.tensors.values():
            members.setdefault(part_of(tensor.name), []).append(tensor)
        return {name: _part(name, members[name]) for name in sorted(members)}

    def sizes(self, span: Span) -> dict[str, int]:
        """Bytes of the tensors of each part that a stage needs, by name."""
        return {name: self.parts[name].tensor_bytes for name in self.needed(span)}

    def needed(self, span: Span | None) -> list[str]:
        """The parts that a stage needs, by name; of an adapter all.

        Where the config leaves open whether head and embedding are one, both are.
        """
        if span is None or WHOLE in self.parts:
            return list(self.parts)
        # The rest is small, and of any stage some may be: norms, a projection of the output.
        wanted = {str(layer) for layer in range(span.first_layer, span.last_layer + 1)} | {"rest"}
        separate = "head" in self.parts and self._config.get("tie_word_embeddings") is False
        if span.has_head:
            wanted |= {"head"} if separate else {"head", "embedding"}
        if span.has_embed:
            wanted |= {"embedding", "beside"}
        if wanted & {"embedding"} and "embedding" not in self.parts:
            wanted |= {"head"}  # Stored under this name.
        return [name for name in self.parts if name in wanted]

    @property
    def _config(self) -> Mapping[str, object]:
        content = next(file.content for file in self.files if file.name == files.CONFIG)
        parsed: Mapping[str, object] = json.loads(content)
        return parsed


def read_manifest(directory: Path, *, adapter: bool = False) -> Manifest:
    """What the checkpoint or adapter in a directory consists of; reads no tensor data.

    Raises:
        ModelFilesError: if a file is missing, or not what it should be.
    """
    if adapter:
        texts, weights = [directory / lora.CONFIG], [directory / lora.WEIGHTS]
        adapters.check(directory)
    else:
        texts = [directory / name for name in files.TEXTS if (directory / name).is_file()]
        weights = files.tensor_files(directory)
    return Manifest(
        (
            *(_stored(path, path.read_bytes(), has_tensors=False) for path in texts),
            *(_stored(path, read_header_bytes(path), has_tensors=True) for path in weights),
        )
    )


def _stored(path: Path, content: bytes, *, has_tensors: bool) -> StoredFile:
    return StoredFile(path.name, path.stat().st_size, content, has_tensors)


def _part(name: str, tensors: Sequence[StoredTensor]) -> Part:
    """A part's file: what has the widest numbers comes first, as in the format's own writer."""
    stored = sorted(tensors, key=lambda t: (-_ALIGNMENTS.get(t.info.dtype, 1), t.name))
    entries, start = {}, 0
    for tensor in stored:
        entries[tensor.name] = {
            "dtype": tensor.info.dtype,
            "shape": tensor.info.shape,
            "data_offsets": (start, start + tensor.size),
        }
        start += tensor.size
    header = json.dumps(entries, separators=(",", ":")).encode()
    # Tensors begin at a multiple of 8.
    header += b" " * (-data_start(header) % 8)
    file = f"layer-{int(name):05d}" if name.isdigit() else name
    return Part(f"{file}.safetensors", header, tuple(stored))
