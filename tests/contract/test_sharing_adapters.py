"""Adapters that workers fetch from each other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from uellm_worker.files.cache import file_to_proto

from tests.support.checkpoints import write_adapter
from tests.support.sharing import (
    Host,
    Peer,
    adapter_ref,
    corrupt,
    host_at,
    model_ref,
    peer_with,
    random_checkpoint,
    serving,
    stage,
)
from uellm.core.errors import ModelFilesError
from uellm.models import adapters, blocks
from uellm.models.manifest import Manifest, read_manifest
from uellm.v1 import files_pb2


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return host_at(tmp_path / "cache")


async def test_adapters_are_fetched_whole_and_checked(tmp_path: Path, host: Host) -> None:
    model, lora = random_checkpoint(tmp_path / "model"), write_adapter(tmp_path / "lora")
    ref, adapter = model_ref(model), adapter_ref(lora)
    here = adapter_ref(lora, str(lora))
    peer = peer_with(model, "p", ref, here)
    wrong = peer_with(model, "w", ref, here, spoil=_wrong_but_digested)
    async with serving(peer, wrong):
        assignment = stage(ref, (0, 3), adapter)
        with pytest.raises(ModelFilesError, match="not the adapter that was deployed"):
            await host.fetch(assignment, peer.holder(ref), wrong.holder(adapter))
        found = await host.fetch(assignment, peer.holder(ref, adapter))
    assert adapters.digest(found.adapters[0]) == adapter.digest
    assert (await host.fetch(assignment)).adapters == found.adapters


class Mistaken(Peer):
    """Tells of another adapter's files than it has."""

    other: Path

    async def ListFiles(self, request: Any, context: Any) -> Any:
        for file in read_manifest(self.other, adapter=True).files:
            yield file_to_proto(file)


@pytest.mark.parametrize("wrong", ["told", "sent"])
async def test_an_adapter_that_one_gets_wrong_comes_from_another(
    tmp_path: Path, host: Host, wrong: str
) -> None:
    model, lora = random_checkpoint(tmp_path / "model"), write_adapter(tmp_path / "lora")
    ref, adapter = model_ref(model), adapter_ref(lora)
    here = adapter_ref(lora, str(lora))
    good = peer_with(model, "good", ref, here)
    if wrong == "told":
        bad = Mistaken(good.host, "bad")
        bad.other = write_adapter(tmp_path / "other", alpha_pattern={})
    else:
        bad = peer_with(model, "bad", ref, here, spoil=_wrong_but_digested)
    async with serving(good, bad):
        found = await host.fetch(
            stage(ref, (0, 3), adapter), bad.holder(adapter), good.holder(ref, adapter)
        )
    assert adapters.digest(found.adapters[0]) == adapter.digest
    assert bad.calls["FetchTensors"] == 1


async def test_an_adapter_that_was_told_wrongly_of_is_fetched_the_next_time(
    tmp_path: Path, host: Host
) -> None:
    model, lora = random_checkpoint(tmp_path / "model"), write_adapter(tmp_path / "lora")
    ref, adapter = model_ref(model), adapter_ref(lora)
    here = adapter_ref(lora, str(lora))
    peer = peer_with(model, "p", ref, here)
    mistaken = Mistaken(peer.host, "m")
    mistaken.other = write_adapter(tmp_path / "other", alpha_pattern={})
    async with serving(peer, mistaken):
        assignment = stage(ref, (0, 3), adapter)
        with pytest.raises(ModelFilesError, match="not the adapter that was deployed"):
            await host.fetch(assignment, peer.holder(ref), mistaken.holder(adapter))
        found = await host.fetch(assignment, peer.holder(ref, adapter))
    assert adapters.digest(found.adapters[0]) == adapter.digest


def _wrong_but_digested(
    message: files_pb2.FetchTensorsResponse,
) -> files_pb2.FetchTensorsResponse:
    corrupt(message)
    message.sha256 = blocks.block_digest(message.data)
    return message


def test_an_adapter_has_one_file_with_tensors(tmp_path: Path) -> None:
    config, weights = read_manifest(write_adapter(tmp_path / "lora"), adapter=True).files
    for contents in ((config,), (config, weights, replace(weights, name="more.safetensors"))):
        with pytest.raises(ModelFilesError, match="one file with tensors"):
            Manifest(contents)
