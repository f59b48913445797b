"""Which checkpoints are served, what refusing says, and what a digest tells apart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import write_checkpoint
from tests.support.hub import COMMIT, hub_with
from uellm.core.errors import ModelFilesError
from uellm.models import files
from uellm.v1.common_pb2 import ModelRef


def _refusal(source: Path | str) -> str:
    with pytest.raises(ModelFilesError) as refused:
        files.resolve(str(source))
    return refused.value.message


@pytest.mark.parametrize("shards", [1, 3])
def test_a_complete_directory_resolves(tmp_path: Path, shards: int) -> None:
    directory = write_checkpoint(tmp_path / "model", shards=shards)
    assert files.resolve(str(directory)) == directory
    assert len(files.tensor_files(directory)) == shards


def test_absent_files_are_named_with_a_remedy(tmp_path: Path) -> None:
    assert "no directory" in _refusal(tmp_path / "nowhere")
    assert "name the directory" in _refusal(write_checkpoint(tmp_path / "m") / "config.json")
    for name, remedy in {
        "config.json": "has no config.json",
        "tokenizer.json": "AutoTokenizer",
        "model.safetensors": "download the model's safetensors",
    }.items():
        directory = write_checkpoint(tmp_path / name)
        (directory / name).unlink()
        message = _refusal(directory)
        assert str(directory) in message
        assert remedy in message


def test_pickled_weights_are_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "convert to safetensors with" in _refusal(directory)


def test_an_index_that_names_an_absent_or_odd_shard_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, shards=2)
    shard = directory / "model-00002-of-00002.safetensors"
    shard.unlink()
    assert shard.name in _refusal(directory)
    (directory / files.INDEX).write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    assert "no plain" in _refusal(directory)
    (directory / files.INDEX).write_text("{}")
    assert "no weight_map" in _refusal(directory)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quant_method = '(none)'"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "nearest that are served"),
        ({"architectures": []}, "(none)"),
        ({"model_type": "mistral"}, "mistral"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    tmp_path: Path, config: dict[str, object], word: str
) -> None:
    assert word in _refusal(write_checkpoint(tmp_path, **config))


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_truncated_weights_are_refused(tmp_path: Path, kept: int) -> None:
    weights = write_checkpoint(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    message = _refusal(tmp_path)
    assert "truncated" in message
    assert str(weights) in message


@pytest.mark.parametrize(
    "content", [b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7]
)
def test_weights_of_another_format_are_refused(tmp_path: Path, content: bytes) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in _refusal(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    (write_checkpoint(tmp_path) / "config.json").write_text(content)
    assert "config.json" in _refusal(tmp_path)


def test_a_digest_is_the_same_for_copies_and_another_for_any_change(tmp_path: Path) -> None:
    first = files.digest(write_checkpoint(tmp_path / "a"))
    assert files.digest(write_checkpoint(tmp_path / "b")) == first
    assert files.digest(write_checkpoint(tmp_path / "c", hidden=32)) != first
    directory = tmp_path / "b"
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        before = files.digest(directory)
        (directory / name).write_text((directory / name).read_text() + " ")
        assert files.digest(directory) != before


def test_a_reference_with_another_digest_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    good = ModelRef(name="m", source=str(directory), digest=files.digest(directory))
    assert files.resolve_ref(good) == directory
    with pytest.raises(ModelFilesError, match="is not the model that was deployed"):
        files.resolve_ref(ModelRef(name="m", source=str(directory), digest="0" * 64))


def _resolve_hub_id(hub_id: str, endpoint: str, home: Path, *, allow_download: bool) -> str:
    """What ``resolve`` gives or says, in a process that was started with this hub and cache."""
    code = (
        "import sys\n"
        "from uellm.models import files\n"
        "try: print(files.resolve(sys.argv[1], allow_download=sys.argv[2] == 'True'))\n"
        "except files.ModelFilesError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, hub_id, str(allow_download)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)},
    )
    return done.stdout.strip()


def test_a_hub_id_is_downloaded_only_on_demand_and_then_served_from_the_cache(
    tmp_path: Path,
) -> None:
    directory = write_checkpoint(tmp_path / "model", shards=2)
    (directory / "modeling_evil.py").write_text("raise SystemExit")
    home = tmp_path / "home"
    with hub_with("org/name", directory) as (endpoint, asked):
        refusal = _resolve_hub_id("org/name", endpoint, home, allow_download=False)
        assert "hf download org/name" in refusal
        assert not asked
        found = Path(_resolve_hub_id("org/name", endpoint, home, allow_download=True))
        assert found.name == COMMIT
        assert files.digest(found) == files.digest(directory)
        assert not (found / "modeling_evil.py").exists()
        refusal = _resolve_hub_id("org/other", endpoint, home, allow_download=True)
        assert "org/other could not be downloaded" in refusal
    assert _resolve_hub_id("org/name", endpoint, home, allow_download=True) == str(found)


def test_a_download_that_was_cut_short_is_completed(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model")
    home = tmp_path / "home"
    with hub_with("org/name", directory) as (endpoint, _):
        found = Path(_resolve_hub_id("org/name", endpoint, home, allow_download=True))
        (found / "model.safetensors").unlink()
        refusal = _resolve_hub_id("org/name", endpoint, home, allow_download=False)
        # Which of the two depends on whether the hub client keeps a list of what belongs there.
        assert "has no model.safetensors" in refusal or "not in the hub cache" in refusal
        assert _resolve_hub_id("org/name", endpoint, home, allow_download=True) == str(found)


def test_a_directory_needs_neither_hub_client_nor_torch(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from uellm.models import files, profile\n"
        "directory = files.resolve(sys.argv[1])\n"
        "profile.read_profile(directory, 'float32'); files.digest(directory)\n"
        "assert 'torch' not in sys.modules and 'safetensors' not in sys.modules\n"
        "try: files.resolve('org/name')\n"
        "except files.ModelFilesError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert "huggingface-hub is not installed" in done.stdout
