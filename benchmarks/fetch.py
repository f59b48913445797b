"""How fast a worker gets a model's files from another one, on this machine.

One process gives files out as a worker does, another fetches them all as one does, into an empty
cache. Beside that: digests alone, and checking what was fetched, as after another start. TMPDIR
says where files are; on a disk its speed counts.

    python -m benchmarks.fetch [--megabytes 1024] [--layers 8] [--sources 1] [--json]
"""

import asyncio
import json
import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from safetensors.numpy import save_file
from uellm_worker.files.cache import FileCache
from uellm_worker.files.drawing import Wanted
from uellm_worker.files.fetching import Fetcher
from uellm_worker.files.host import HostFiles
from uellm_worker.files.sending import Sender
from uellm_worker.files.servicer import FilesServicer

from benchmarks.arguments import count, parser_of
from uellm.core.errors import ModelFilesError
from uellm.models import files
from uellm.models.blocks import BLOCK_BYTES, block_digest
from uellm.rpc import SERVER_OPTIONS, ClosingInterceptor, ErrorInterceptor
from uellm.v1 import common_pb2, files_pb2_grpc, worker_pb2

_CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_REPEATS = 5
_GIGA = 1e9


async def _secret() -> str:
    return "of the benchmark"


def write_model(directory: Path, megabytes: int, layers: int) -> common_pb2.ModelRef:
    """A model of so many megabytes, in two tensors a layer; a small one in each besides."""
    rng = np.random.default_rng(0)
    rows = megabytes * 1_000_000 // (2 * layers * 8192)
    tensors = {}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name in ("up", "down"):
            tensors[f"{at}.{name}.weight"] = rng.integers(0, 255, (rows, 8192), np.uint8)
        tensors[f"{at}.norm.weight"] = rng.integers(0, 255, 8192, np.uint8)
    directory.mkdir()
    save_file(tensors, directory / files.WEIGHTS)
    (directory / files.CONFIG).write_text(json.dumps(_CONFIG))
    (directory / files.TOKENIZER).write_text("{}")
    return common_pb2.ModelRef(name="m", source=str(directory), digest=files.digest(directory))


def serve(ref: bytes, connection: Connection) -> None:
    """Give a model out until told to end; answers each question with the CPU seconds so far."""
    asyncio.run(_serve(common_pb2.ModelRef.FromString(ref), connection))


async def _serve(ref: common_pb2.ModelRef, connection: Connection) -> None:
    host = HostFiles(FileCache(Path(ref.source).parent / "none"))
    if host.look(ref) is None:
        raise AssertionError("unreachable: it was written just now")
    server = grpc.aio.server(
        interceptors=[ClosingInterceptor(), ErrorInterceptor()], options=SERVER_OPTIONS
    )
    servicer = FilesServicer(host, Sender(host, 2, lambda: False), _secret)
    files_pb2_grpc.add_FilesServiceServicer_to_server(servicer, server)
    connection.send(server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    while await asyncio.to_thread(connection.recv):
        connection.send(_cpu_seconds())
    await server.stop(0)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def fetch(
    ref: common_pb2.ModelRef, ports: list[int], directory: Path
) -> tuple[float, float, int]:
    """Fetch all of a model into an empty cache; seconds, CPU seconds here, bytes."""
    lacking = ModelFilesError("not here")
    holders = [
        worker_pb2.FilesHolder(worker=str(port), address=f"127.0.0.1:{port}", digests=[ref.digest])
        for port in ports
    ]
    told = [(0, 0)]
    cpu, began = _cpu_seconds(), time.perf_counter()
    fetcher = Fetcher(FileCache(directory), _secret)
    async with fetcher.at_hand(
        Wanted(ref, None, lacking), holders, lambda done, total: told.append((done, total))
    ):
        pass
    return time.perf_counter() - began, _cpu_seconds() - cpu, told[-1][1]


def _checked(ref: common_pb2.ModelRef, directory: Path) -> float:
    """Seconds of checking what was fetched, as a worker does that was started again."""

    async def check() -> float:
        seconds, _, _ = await fetch(ref, [], directory)
        return seconds

    return asyncio.run(check())


def _rate(work: Callable[[bytes], object]) -> float:
    """Bytes per second of something done to blocks."""
    block = np.random.default_rng(0).bytes(BLOCK_BYTES)
    taken = []
    for _ in range(20):
        began = time.perf_counter()
        work(block)
        taken.append(time.perf_counter() - began)
    return BLOCK_BYTES / statistics.median(taken)


def measure(megabytes: int, layers: int, sources: int) -> dict[str, Any]:
    """Rates in megabytes per second, costs in CPU seconds per gigabyte; medians."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        ref = write_model(Path(scratch) / "model", megabytes, layers)
        pipes: list[tuple[Any, Any]] = []
        ports, runs = [], []
        try:
            for _ in range(sources):
                ours, theirs = context.Pipe()
                process = context.Process(target=serve, args=(ref.SerializeToString(), theirs))
                process.start()
                pipes.append((ours, process))
                theirs.close()  # Or its end would not be heard.
                ports.append(int(ours.recv()))
            for number in range(_REPEATS):
                cache = Path(scratch) / f"cache{number}"
                before = _asked(pipes)
                seconds, cpu, size = asyncio.run(fetch(ref, ports, cache))
                spent = _asked(pipes) - before
                runs.append((size / seconds, cpu, spent, size, _checked(ref, cache)))
                shutil.rmtree(cache)
        finally:
            # Or this process would wait for them at its own end, and they for a question.
            for ours, process in pipes:
                ours.send(False)
                process.join()
    size = runs[0][3]
    return {
        "bytes": size,
        "sources": sources,
        "fetch_mb_per_second": round(statistics.median(run[0] for run in runs) / 1e6),
        "fetch_mb_per_second_all": [round(run[0] / 1e6) for run in runs],
        "receiver_cpu_seconds_per_gb": round(
            statistics.median(run[1] for run in runs) / size * _GIGA, 2
        ),
        "sender_cpu_seconds_per_gb": round(
            statistics.median(run[2] for run in runs) / size * _GIGA, 2
        ),
        "check_mb_per_second": round(size / statistics.median(run[4] for run in runs) / 1e6),
        "sha256_mb_per_second": round(_rate(block_digest) / 1e6),
    }


def _asked(pipes: list[tuple[Any, Any]]) -> float:
    """CPU seconds of all sources so far."""
    for ours, _ in pipes:
        ours.send(True)
    return sum(float(ours.recv()) for ours, _ in pipes)


def main() -> None:
    """Measure and print."""
    parser = parser_of("fetch", __doc__)
    parser.add_argument("--megabytes", type=count, default=1024, help="of the model")
    parser.add_argument("--layers", type=count, default=8, help="parts that it comes in")
    parser.add_argument("--sources", type=count, default=1, help="workers that have it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    found = measure(options.megabytes, options.layers, options.sources)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    for name, value in found.items():
        sys.stdout.write(f"{name:30} {value}\n")


if __name__ == "__main__":
    main()
