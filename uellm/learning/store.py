"""A predictor in a directory: what it is in ``predictor.json``, what it has learnt as npz.

The first names the second, and is written last: whatever happens meanwhile, the directory holds one
whole predictor, the old or the new.
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np

from uellm.core.errors import ConfigurationError
from uellm.prediction.interface import Predictor
from uellm.prediction.registry import predictor

MANIFEST = "predictor.json"
_KEPT_BEFORE = "state-*.npz"


@dataclass(frozen=True)
class Manifest:
    """What a directory holds.

    Attributes:
        predictor: name.
        version: of the predictor.
        settings: what it was made with.
        state: name of the file with what it has learnt.
        number: rises with every saving.
        training: how far a training came: what of, how many examples, whether it is done.
    """

    predictor: str
    version: str
    settings: Mapping[str, object] = field(default_factory=dict)
    state: str = ""
    number: int = 0
    training: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """That of a directory; None if it holds no predictor.

        Raises:
            ConfigurationError: if it is damaged.
        """
        path = directory / MANIFEST
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ConfigurationError(
                f"profiler: {path} is not readable ({error}); train it again", field="profiler"
            ) from error


def save_predictor(
    directory: Path,
    learnt: Predictor,
    settings: Mapping[str, object] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Keep a predictor.

    Raises:
        ConfigurationError: if the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        before = Manifest.read(directory)
        number = before.number + 1 if before else 1
        name = f"state-{number}.npz"
        with (directory / name).open("wb") as file:
            np.savez_compressed(file, **learnt.state())  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        manifest = Manifest(
            learnt.name, learnt.version, dict(settings or {}), name, number, dict(training or {})
        )
        new = directory / f"{MANIFEST}.new"
        new.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        new.replace(directory / MANIFEST)
        for old in directory.glob(_KEPT_BEFORE):
            if old.name != name:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"profiler: {directory}: {error}", field="profiler") from error


def load_predictor(directory: Path) -> Predictor:
    """The predictor of a directory.

    Raises:
        ConfigurationError: if it holds none, or one that is damaged or of another version.
        InvalidArgumentError: if there is no predictor of its name.
    """
    manifest = Manifest.read(directory)
    if manifest is None:
        raise ConfigurationError(
            f"profiler: {directory} holds no {MANIFEST}; `uellm profiler train` makes one",
            field="profiler",
        )
    made = predictor(manifest.predictor, manifest.settings)
    if manifest.version != made.version:
        raise ConfigurationError(
            f"profiler: {directory} holds {made.name!r} of version {manifest.version}, this is "
            f"version {made.version}; train it again",
            field="profiler",
        )
    try:
        with (directory / manifest.state).open("rb") as file:
            made.load(dict(np.load(file, allow_pickle=False)))
    except (OSError, ValueError, BadZipFile, EOFError, zlib.error) as error:
        raise ConfigurationError(
            f"profiler: {directory / manifest.state} is damaged ({error}); train it again",
            field="profiler",
        ) from error
    return made
