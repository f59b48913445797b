"""Where a model's files are, and whether they are all there.

A source is a directory or a hub id. Every service resolves it for itself, locally; only a caller
that says so downloads. A checkpoint that is served has config.json, tokenizer.json and its weights
in safetensors: nothing that would have to run code to be read.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uellm.core.errors import ModelFilesError
from uellm.models.architectures import check_architecture
from uellm.models.quantization import read_quantization
from uellm.models.safetensors import read_header, read_header_bytes
from uellm.v1 import common_pb2

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TEXTS = (CONFIG, TOKENIZER, GENERATION_CONFIG)
"""What a model's digest covers whole."""
UNWANTED = ("*/*",)

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_digests: dict[Path, tuple[tuple[tuple[str, int, int], ...], str]] = {}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a source is to hold.

    Attributes:
        field: what errors call the source.
        files: the least that is there, for people.
        wanted: what a download fetches: these, and never the code or pickles that lie beside them.
        check: fails unless a directory holds it all.
    """

    field: str
    files: str
    wanted: tuple[str, ...]
    check: Callable[[Path], None]


def resolve(
    source: str,
    revision: str = "",
    *,
    allow_download: bool = False,
    cache_dir: Path | None = None,
    contents: Contents | None = None,
) -> Path:
    """The directory that holds a model's files, checked to be complete.

    Args:
        source: a directory, or a hub id such as ``org/name``.
        revision: a branch, tag or commit of the hub; "": its default branch.
        allow_download: fetch a hub id that the local cache lacks.
        cache_dir: the hub cache; None: huggingface_hub's own (HF_HOME, HF_HUB_CACHE).
        contents: what it is to hold; None: a model.

    Raises:
        ModelFilesError: naming what is missing or refused, where, and the remedy.
    """
    contents = contents or MODEL
    directory = Path(source).expanduser()
    if directory.is_dir():
        contents.check(directory)
        return directory.resolve()
    if directory.is_file():
        raise ModelFilesError(
            f"{source} is a file; name the directory that holds {contents.files}",
            field=contents.field,
        )
    if not _HUB_ID.fullmatch(source):
        raise ModelFilesError(
            f"no directory {source!r}, and it is not a hub id (org/name) either; name a directory "
            f"on this host with {contents.files}",
            field=contents.field,
        )
    return _resolve_hub(source, revision, contents, download=allow_download, cache_dir=cache_dir)


def resolve_ref(
    ref: common_pb2.ModelRef, *, cache_dir: Path | None = None, contents: Contents | None = None
) -> Path:
    """The directory of a model that was deployed elsewhere, checked to be the same model.

    Args:
        ref: as it was deployed.
        cache_dir: see ``resolve``.
        contents: see ``resolve``.

    Raises:
        ModelFilesError: as ``resolve``, and if the digest is another.
    """
    directory = resolve(ref.source, ref.revision, cache_dir=cache_dir, contents=contents)
    if ref.digest and (found := digest(directory)) != ref.digest:
        raise ModelFilesError(
            f"{directory} is not the model that was deployed as {ref.name!r}: its digest is "
            f"{found[:12]}…, the deployment's {ref.digest[:12]}…; copy the same files to every "
            "host, or deploy again if they were changed on purpose",
            field="model.digest",
        )
    return directory


def check(directory: Path) -> None:
    """Fail unless a directory holds a checkpoint that can be served.

    Reads config.json, the index and the tensor headers; no tensor data.

    Raises:
        ModelFilesError: naming what is missing or refused, where, and the remedy.
    """
    config = read_json(directory / CONFIG, "name a directory that holds a model")
    _refuse_unservable(directory / CONFIG, config)
    for path in tensor_files(directory):
        read_header(path)
    _check_tokenizer(directory)


def check_text(directory: Path) -> None:
    """Fail unless a directory says how a model reads text, whether or not it can be served.

    Raises:
        ModelFilesError: naming what is missing.
    """
    read_json(directory / CONFIG, "name a directory that holds a model")
    _check_tokenizer(directory)


def _check_tokenizer(directory: Path) -> None:
    if not (directory / TOKENIZER).is_file():
        raise ModelFilesError(
            f"{directory} has no {TOKENIZER}; write one with transformers: "
            f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained("
            f"{str(directory)!r})"
        )


MODEL = Contents(
    field="model.source",
    files=f"{CONFIG}, {TOKENIZER} and {WEIGHTS}",
    wanted=("*.json", "model*.safetensors", "*.jinja", "LICENSE*"),
    check=check,
)
"""A checkpoint."""

TEXT = Contents(
    field="model.source",
    files=f"{CONFIG} and {TOKENIZER}",
    wanted=("*.json", "*.jinja"),
    check=check_text,
)
"""What says how a model reads text and counts images."""


def tensor_files(directory: Path) -> list[Path]:
    """The files that hold the weights, in order: one, or those that the index names.

    Raises:
        ModelFilesError: if there are none, or the index names one that is absent.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        raise _no_weights(directory)
    weight_map = read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFilesError(f"{index} has no weight_map; download it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not _SHARD_NAME.fullmatch(name):
            raise ModelFilesError(f"{index} names {name!r}, which is no plain *.safetensors name")
        if not (directory / name).is_file():
            raise ModelFilesError(
                f"{index} names {name}, which is not there; download or copy it to {directory}"
            )
    return [directory / name for name in names]


def digest(directory: Path) -> str:
    """SHA-256 of what makes a model that model, in hex.

    It covers the content of config.json, tokenizer.json and generation_config.json, and of every
    weight file its name, size and header: names, shapes, dtypes and places of all tensors. The
    tensors' own bytes are left out: reading hundreds of gigabytes on every host at every start
    would cost minutes, and what the digest guards against is two hosts that hold different models
    or versions of one, not damage within a file. Files whose sizes and times did not change since
    the last call are not read again.

    Raises:
        ModelFilesError: if a file is missing or is not what it should be.
    """
    directory = directory.resolve()
    weights = tensor_files(directory)
    texts = [directory / name for name in TEXTS if (directory / name).is_file()]
    stamp = tuple(
        (path.name, stat.st_size, stat.st_mtime_ns)
        for path in (*texts, *weights)
        for stat in (path.stat(),)
    )
    known = _digests.get(directory)
    if known is not None and known[0] == stamp:
        return known[1]
    found = digest_of(
        (path.name, path.stat().st_size, path.read_bytes() if whole else read_header_bytes(path))
        for paths, whole in ((texts, True), (weights, False))
        for path in paths
    )
    _digests[directory] = (stamp, found)
    return found


def digest_of(files: Iterable[tuple[str, int, bytes]]) -> str:
    """The digest of a model by its files' names and sizes, and what of each counts; see ``digest``.

    Args:
        files: the texts in the order of ``TEXTS``, then those with weights in that of their names.
    """
    sha = hashlib.sha256()
    for name, size, content in files:
        sha.update(f"{name}\0{size}\0{len(content)}\0".encode())
        sha.update(content)
    return sha.hexdigest()


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelFilesError: if the file is missing or holds something else; names ``remedy``.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        ending = f"; {remedy}" if remedy else ""
        raise ModelFilesError(f"{path.parent} has no {path.name}{ending}") from None
    except OSError as error:
        raise ModelFilesError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelFilesError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ModelFilesError(f"{path} is not a JSON object; download it again")
    return content


def _refuse_unservable(path: Path, config: dict[str, Any]) -> None:
    if "auto_map" in config:
        raise ModelFilesError(
            f"{path} asks for code of its own (auto_map), which is never run; use a checkpoint of "
            "an architecture that transformers itself has, without auto_map"
        )
    read_quantization(path, config)
    check_architecture(path, config)


def _no_weights(directory: Path) -> ModelFilesError:
    others = sorted(
        path.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.safetensors")
        for path in directory.glob(pattern)
    )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in others):
        where = repr(str(directory))
        return ModelFilesError(
            f"{directory} has no {WEIGHTS}, only {others[0]}, and pickled weights are never read; "
            f"convert to safetensors with transformers: "
            f"AutoModelForCausalLM.from_pretrained({where}).save_pretrained({where})"
        )
    found = f", only {others[0]}" if others else ""
    return ModelFilesError(
        f"{directory} has no {WEIGHTS} and no {INDEX}{found}; download the model's safetensors "
        "files into it"
    )


def _resolve_hub(
    hub_id: str, revision: str, contents: Contents, *, download: bool, cache_dir: Path | None
) -> Path:
    try:
        # Slow to import beside everything else here, and not needed for a directory.
        from huggingface_hub import snapshot_download  # noqa: PLC0415
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415
    except ImportError:
        raise ModelFilesError(
            f"{hub_id} is a hub id, and huggingface-hub is not installed; install it, or name a "
            "directory",
            field=contents.field,
        ) from None

    def fetch(*, local: bool) -> Path:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision or None,
                cache_dir=cache_dir,
                allow_patterns=list(contents.wanted),
                ignore_patterns=list(UNWANTED),
                local_files_only=local,
                endpoint=os.environ.get("HF_ENDPOINT") or None,
                etag_timeout=5,
            )
        )

    at = f"{hub_id}@{revision}" if revision else hub_id
    try:
        directory = fetch(local=True)
        contents.check(directory)
        return directory
    except LocalEntryNotFoundError:
        if not download:
            raise ModelFilesError(
                f"{at} is not in the hub cache of this host ({_cache(cache_dir)}); fetch it with "
                f"`hf download {hub_id}{f' --revision {revision}' if revision else ''}`, or name "
                "a directory",
                field=contents.field,
            ) from None
    except ModelFilesError:
        # A download that was cut short leaves a snapshot without some of its files.
        if not download:
            raise
    try:
        directory = fetch(local=False)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        # Its first two lines say what; the others are advice for its website.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = " ".join(lines[:2]) or type(error).__name__
        raise ModelFilesError(
            f"{at} could not be downloaded: {what}; check the name, HF_TOKEN for a gated model and "
            "HF_ENDPOINT, or name a directory",
            field=contents.field,
        ) from None
    contents.check(directory)
    return directory


def _cache(cache_dir: Path | None) -> Path:
    from huggingface_hub import constants  # noqa: PLC0415 - only after the import above succeeded

    return cache_dir or Path(constants.HF_HUB_CACHE)
