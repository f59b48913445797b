"""LoRA adapters of served models: where their files are, and what room they need."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from uellm.core.errors import InvalidArgumentError, ModelFilesError
from uellm.core.model import ModelProfile
from uellm.models.files import Contents, resolve
from uellm.models.lora import CONFIG, WEIGHTS, read_factors
from uellm.models.profile import dtype_bytes
from uellm.v1 import common_pb2

MOST_ADAPTERS = 256
"""Of one deployment."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DECLARED = re.compile(r"(?:(?P<model>[^=:]+):)?(?P<name>[^=:]*)=(?P<source>.+)")
_digests: dict[Path, tuple[tuple[tuple[int, int], ...], str]] = {}


def check(directory: Path) -> None:
    """Fail unless a directory holds an adapter that can be served. Reads no tensor data.

    Raises:
        ModelFilesError: naming what is missing or refused, where, and the remedy.
    """
    read_factors(directory)


ADAPTER = Contents(
    field="adapters.source",
    files=f"{CONFIG} and {WEIGHTS}",
    wanted=(CONFIG, WEIGHTS, "LICENSE*"),
    check=check,
)
"""An adapter in peft's format."""


def digest(directory: Path) -> str:
    """SHA-256 of an adapter's files, in hex.

    All of their bytes, unlike a model's: adapters are small, and all those that were trained alike
    have the same headers. Files whose sizes and times did not change are not read again.

    Raises:
        ModelFilesError: if a file is missing.
    """
    paths = [directory / CONFIG, directory / WEIGHTS]
    sha = hashlib.sha256()
    try:
        stamp = tuple((s.st_size, s.st_mtime_ns) for s in (path.stat() for path in paths))
        known = _digests.get(directory)
        if known is not None and known[0] == stamp:
            return known[1]
        for path in paths:
            sha.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    sha.update(block)
    except OSError as error:
        raise ModelFilesError(f"{error.filename} cannot be read: {error.strerror}") from None
    _digests[directory] = (stamp, sha.hexdigest())
    return sha.hexdigest()


def resolve_adapter(ref: common_pb2.ModelRef, *, allow_download: bool = False) -> Path:
    """The directory of an adapter, checked to be whole, and the one that was deployed.

    Raises:
        ModelFilesError: naming what is missing or refused, where, and the remedy.
    """
    try:
        directory = resolve(
            ref.source, ref.revision, allow_download=allow_download, contents=ADAPTER
        )
    except ModelFilesError as error:
        raise ModelFilesError(f"adapter {ref.name!r}: {error.message}", field=error.field) from None
    if ref.digest and (found := digest(directory)) != ref.digest:
        raise ModelFilesError(
            f"{directory} is not the adapter that was deployed as {ref.name!r}: its digest is "
            f"{found[:12]}…, the deployment's {ref.digest[:12]}…; copy the same files to every "
            "host, or deploy again if they were changed on purpose",
            field="adapters.digest",
        )
    return directory


def with_adapters(model: ModelProfile, directories: Iterable[Path], dtype: str) -> ModelProfile:
    """What a model needs together with adapters: their matrices count with its layers' weights.

    Raises:
        ModelFilesError: if one is of a model with more layers.
    """
    extra = [0] * len(model.layers)
    for directory in directories:
        for factors in read_factors(directory):
            if factors.layer >= len(extra):
                raise ModelFilesError(
                    f"{directory / WEIGHTS} adds to {factors.module}, and the model has "
                    f"{len(extra)} layers; it belongs to another model"
                )
            extra[factors.layer] += factors.elements * dtype_bytes(dtype)
    layers = (
        replace(layer, weight_bytes=layer.weight_bytes + more)
        for layer, more in zip(model.layers, extra, strict=True)
    )
    return replace(model, layers=tuple(layers))


def parse_adapter(text: str) -> tuple[str, common_pb2.ModelRef]:
    """An adapter as settings name it, ``[MODEL:]NAME=SOURCE``, behind its model, or "".

    Raises:
        InvalidArgumentError: if it is something else.
    """
    match = _DECLARED.fullmatch(text.strip())
    if match is None:
        raise InvalidArgumentError(
            f"adapter {text!r}: write NAME=SOURCE, or MODEL:NAME=SOURCE where several models are "
            "served; the source is a directory or a hub id",
            field="adapter",
        )
    directory = Path(match["source"]).expanduser()
    source = str(directory.resolve()) if directory.is_dir() else match["source"]
    ref = common_pb2.ModelRef(name=match["name"], source=source)
    return match["model"] or "", check_names([ref])[0]


def check_names(adapters: Iterable[common_pb2.ModelRef]) -> list[common_pb2.ModelRef]:
    """Adapters of one model, by name.

    Raises:
        InvalidArgumentError: if a name or a source cannot be, or a name stands twice.
    """
    by_name: dict[str, common_pb2.ModelRef] = {}
    for ref in adapters:
        if not NAME.fullmatch(ref.name):
            raise InvalidArgumentError(
                f"adapters.name {ref.name!r} is no name: it starts with a letter or digit and has "
                "at most 128 of A-Z a-z 0-9 . _ -",
                field="adapters.name",
            )
        if not ref.source:
            raise InvalidArgumentError(
                f"adapters.source of {ref.name!r} is empty; name a directory or a hub id",
                field="adapters.source",
            )
        if ref.name in by_name:
            raise InvalidArgumentError(
                f"adapters.name {ref.name!r} stands twice; give each its own",
                field="adapters.name",
            )
        by_name[ref.name] = ref
    if len(by_name) > MOST_ADAPTERS:
        raise InvalidArgumentError(
            f"adapters: {len(by_name)}; at most {MOST_ADAPTERS} with one model", field="adapters"
        )
    return [by_name[name] for name in sorted(by_name)]
