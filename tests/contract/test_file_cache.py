"""The files that a host keeps of what it fetched: how many, and in which form."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from uellm_worker.files.cache import FileCache
from uellm_worker.files.part_file import PartFile

from tests.support.sharing import (
    Host,
    host_at,
    model_ref,
    peer_with,
    random_checkpoint,
    same,
    serving,
    stage,
)
from uellm.core.errors import ModelFilesError
from uellm.models import files, manifest
from uellm.models.manifest import Manifest, read_manifest


async def test_the_cache_keeps_within_its_bounds(tmp_path: Path) -> None:
    models = [random_checkpoint(tmp_path / f"m{n}", seed=n, vocab=33 + n) for n in range(3)]
    refs = [model_ref(model) for model in models]
    probe = host_at(tmp_path / "probe")
    peers = [peer_with(m, f"p{n}", r) for n, (m, r) in enumerate(zip(models, refs, strict=True))]

    async def fetch(host: Host, number: int) -> None:
        ref = refs[number]
        await host.fetch(stage(ref, (0, 3), embed=True, head=True), peers[number].holder(ref))

    def held(host: Host) -> set[int]:
        return {n for n, ref in enumerate(refs) if host.cache.peek(ref.digest).manifest()}

    async with serving(*peers):
        await fetch(probe, 0)
        one = probe.cache.peek(refs[0].digest).bytes
        host = host_at(tmp_path / "cache", most_bytes=round(2.5 * one))
        await fetch(host, 0)
        await fetch(host, 1)
        for number, used_at in ((0, 2000), (1, 1000)):
            manifest_path = host.cache.peek(refs[number].digest).directory / "manifest"
            os.utime(manifest_path, (used_at, used_at))
        await fetch(host, 2)
        assert held(host) == {0, 2}  # The other was not used for the longest time.
        with pytest.raises(ModelFilesError, match="granted"):
            await fetch(host_at(tmp_path / "tiny", most_bytes=one // 2), 0)
        # What is in use stays, and what was used just now.
        os.utime(host.cache.peek(refs[0].digest).directory / "manifest", (1000, 1000))
        async with FileCache(host.cache.directory).entry(refs[0].digest):
            with pytest.raises(ModelFilesError, match="granted"):
                await fetch(host, 1)
        assert held(host) == {0, 2}


def test_what_goes_while_it_is_counted_does_not_count(tmp_path: Path) -> None:
    entry = FileCache(tmp_path).peek("0" * 64)
    entry.directory.mkdir()
    (entry.directory / "here").write_bytes(b"123")
    (entry.directory / "gone").symlink_to(tmp_path / "nowhere")
    assert entry.bytes == 3


def test_parts_are_laid_out_as_the_format_asks(tmp_path: Path) -> None:
    directory = random_checkpoint(tmp_path / "m")
    mixed = {
        "model.layers.0.a": np.ones(3, np.float16),
        "model.layers.0.b": np.ones(3, np.float64),
        "model.layers.0.c": np.ones(3, np.int8),
        "model.layers.0.d": np.ones(3, np.float32),
        "model.layers.0.e": np.ones((0, 4), np.float32),
    }
    save_file(mixed, directory / files.WEIGHTS)
    (part,) = read_manifest(directory).parts.values()
    file = PartFile(tmp_path, part)
    content = (directory / files.WEIGHTS).read_bytes()
    with file.path.open("wb") as out:
        out.write(part.head)
        for tensor in part.tensors:
            out.write(content[tensor.start : tensor.start + tensor.size])
    assert file.path.stat().st_size == part.file_bytes
    assert len(part.head) % 8 == 0
    found = load_file(file.path)
    assert found.keys() == mixed.keys()
    assert same(found, mixed)


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    found = read_manifest(random_checkpoint(tmp_path / "m"))
    *texts, weights = found.files
    short = manifest.StoredFile(weights.name, weights.size - 1, weights.content, has_tensors=True)
    with pytest.raises(ModelFilesError, match="would end at byte"):
        Manifest((*texts, short))
