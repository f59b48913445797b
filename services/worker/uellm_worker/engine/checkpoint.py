"""A local checkpoint: its config, its end-of-sequence ids, its tensors.

No code of a checkpoint is ever executed: configs that name some are refused, and weights are read
from safetensors only.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from uellm.core.errors import ModelFilesError
from uellm.models.architectures import check_architecture
from uellm.models.families import Family
from uellm.models.quantization import Quantization, read_quantization

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelFilesError: if it is missing or something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFilesError(
            f"{path} is missing; download the model again, or correct its source"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path} does not hold a JSON object")
    return value


def read_model(model_dir: Path) -> tuple[Family, Any, Quantization | None]:
    """Family, transformers config and quantisation of a checkpoint that can be served.

    The config is that of the model itself: it says nothing of the quantisation.

    Raises:
        ModelFilesError: if it is missing, or not of a kind that is served.
    """
    path = model_dir / "config.json"
    raw = _read_json(path)
    if raw.get("auto_map"):
        raise ModelFilesError(
            f"{path} has an auto_map: the model brings its own code, which is never executed; "
            "use a model that transformers supports by itself"
        )
    quantization = read_quantization(path, raw)
    family = check_architecture(path, raw)
    try:
        config = AutoConfig.from_pretrained(
            str(model_dir), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # Whatever a malformed config makes the library raise.
        raise ModelFilesError(f"{path} is not a valid config: {error}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return family, config, quantization


def read_eos_ids(model_dir: Path, config: Any) -> frozenset[int]:
    """Ids that end an answer: the generation config's, or else the config's."""
    ids = None
    path = model_dir / "generation_config.json"
    if path.is_file():
        ids = _read_json(path).get("eos_token_id")
    if ids is None:
        ids = getattr(config, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset(int(i) for i in (ids if isinstance(ids, list) else [ids]))


class TensorFiles:
    """Where each tensor of a checkpoint lies.

    Args:
        model_dir: holds one safetensors file, or several with an index.

    Raises:
        ModelFilesError: if there are none.
    """

    def __init__(self, model_dir: Path) -> None:
        self._dir = model_dir
        self._files: dict[str, str]
        if (model_dir / _INDEX).is_file():
            weight_map = _read_json(model_dir / _INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelFilesError(f"{model_dir / _INDEX} has no weight_map; download it again")
            self._files = {str(name): Path(file).name for name, file in weight_map.items()}
        elif (model_dir / _SINGLE).is_file():
            with self._open(_SINGLE) as file:
                self._files = dict.fromkeys(file.keys(), _SINGLE)
        else:
            raise ModelFilesError(
                f"{model_dir} has neither {_SINGLE} nor {_INDEX}; "
                "pickled weights are never loaded: convert them to safetensors"
            )

    def _open(self, name: str) -> Any:
        path = self._dir / name
        try:
            return safe_open(str(path), framework="pt", device="cpu")
        except FileNotFoundError:
            raise ModelFilesError(f"{path} is missing; download the model again") from None
        except (OSError, SafetensorError) as error:
            raise ModelFilesError(
                f"{path} is not a whole safetensors file: {error}; download it again"
            ) from error

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._files

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors as stored, file by file.

        Raises:
            ModelFilesError: if one is missing or broken.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self._files:
                raise ModelFilesError(
                    f"{self._dir} has no tensor {name!r}: it is incomplete, or its layout is one "
                    "that only the whole model's loader converts"
                )
            by_file.setdefault(self._files[name], []).append(name)
        for file_name, wanted in by_file.items():
            with self._open(file_name) as file:
                for name in wanted:
                    try:
                        tensor = file.get_tensor(name)
                    except SafetensorError as error:
                        raise ModelFilesError(
                            f"{self._dir / file_name}, tensor {name!r}: {error}"
                        ) from error
                    yield name, tensor
