"""The models that are wanted: their files, digests and needs."""

import asyncio
import re
from dataclasses import dataclass, field
from pathlib import Path

from uellm.core.errors import InvalidArgumentError, ModelFilesError
from uellm.core.model import ModelProfile
from uellm.models import files
from uellm.models.profile import DTYPE_BYTES, read_profile
from uellm.streams.keys import MODEL_NAME
from uellm.v1 import common_pb2, deployer_pb2

MOST_REPLICAS = 64
MOST_SLOTS = 4096
_NAME_IN_SOURCE = re.compile(r"(?P<name>[^=/]+(?:/[^=/]+)*)=(?P<source>.+)")


@dataclass(slots=True)
class ResolvedModel:
    """A model whose files are on this host.

    Attributes:
        ref: with digest, as it is pushed to workers.
        directory: where its files are.
    """

    ref: common_pb2.ModelRef
    directory: Path
    _profiles: dict[str, ModelProfile] = field(default_factory=dict)

    def profile(self, dtype: str) -> ModelProfile:
        """Its needs in a compute dtype.

        Raises:
            ModelFilesError: if its files do not say.
        """
        if dtype not in self._profiles:
            self._profiles[dtype] = read_profile(self.directory, dtype)
        return self._profiles[dtype]


async def resolve(ref: common_pb2.ModelRef, *, allow_download: bool = False) -> ResolvedModel:
    """Find a model's files and read what they say. Blocks a thread, not the loop.

    Raises:
        ModelFilesError: naming path and remedy.
    """

    def work() -> ResolvedModel:
        directory = files.resolve(ref.source, ref.revision, allow_download=allow_download)
        local = Path(ref.source).expanduser().is_dir()
        found = common_pb2.ModelRef(
            name=ref.name,
            source=str(directory) if local else ref.source,
            revision=ref.revision,
            digest=files.digest(directory),
        )
        if ref.digest and ref.digest != found.digest:
            raise ModelFilesError(
                f"{directory} is another model than was asked for: its digest is {found.digest}",
                field="model.digest",
            )
        model = ResolvedModel(found, directory)
        model.profile("float32")
        return model

    return await asyncio.to_thread(work)


def parse_model(text: str) -> common_pb2.ModelRef:
    """A model as settings name it: NAME=SOURCE, or a source whose last part is the name."""
    match = _NAME_IN_SOURCE.fullmatch(text)
    if match is not None and not Path(text).exists():
        return common_pb2.ModelRef(name=match["name"], source=match["source"])
    return common_pb2.ModelRef(source=text)


def checked(request: deployer_pb2.PlanRequest, default_slots: int) -> deployer_pb2.PlanRequest:
    """A request with its name and defaults filled in.

    Raises:
        InvalidArgumentError: naming the field, the limit and the remedy.
    """
    wanted = deployer_pb2.PlanRequest()
    wanted.CopyFrom(request)
    model = wanted.model
    if not model.source:
        raise InvalidArgumentError(
            "model.source is empty; name a directory or a hub id", field="model.source"
        )
    model.name = model.name or Path(model.source).name
    if not MODEL_NAME.fullmatch(model.name):
        raise InvalidArgumentError(
            f"model.name {model.name!r} is no name: it starts with a letter or digit and has at "
            "most 128 of A-Z a-z 0-9 . _ / -",
            field="model.name",
        )
    if wanted.dtype and wanted.dtype not in DTYPE_BYTES:
        raise InvalidArgumentError(
            f"dtype {wanted.dtype!r} is not offered; use one of {', '.join(DTYPE_BYTES)}",
            field="dtype",
        )
    for name, value, most in (
        ("replicas", wanted.replicas, MOST_REPLICAS),
        ("stages", wanted.stages, MOST_SLOTS),
        ("slots", wanted.slots, MOST_SLOTS),
    ):
        if value > most:
            raise InvalidArgumentError(f"{name}: {value}; the limit is {most}", field=name)
    wanted.replicas = wanted.replicas or 1
    wanted.slots = wanted.slots or default_slots
    return wanted
