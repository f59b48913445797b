"""What a hop between two stages takes; see ``benchmarks.pipeline``."""
# ruff: noqa: PLC0415 - model libraries are loaded where they are needed.

import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

from uellm_worker.engine.capacity import Capacity, Prepared, Vocabulary
from uellm_worker.engine.group import Rendezvous, join
from uellm_worker.engine.inbox import Inbox, StepAnnounced
from uellm_worker.engine.plan import (
    Chunk,
    StepPlan,
    StepResult,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
)

from uellm.v1.topology_pb2 import ShardAssignment

HOST = "127.0.0.1"
HIDDEN = 4096
ROWS = (16, 256)
_WARM, _HOPS = 100, 1000


def measure_hops() -> dict[str, Any]:
    """Milliseconds there and back by rows, of two processes."""
    import torch
    from uellm_worker.engine.transport import ProcessGroupTransport, open_store

    inbox = Inbox()
    inbox.generation = 1
    ours, theirs = multiprocessing.Pipe()
    rendezvous = Rendezvous(HOST, HOST)
    context = multiprocessing.get_context("spawn")
    peer = context.Process(target=_answer, args=(rendezvous.address, theirs), daemon=True)
    peer.start()
    ours.recv()
    torch.set_num_threads(1)
    store = open_store(HOST)
    group = rendezvous.form(_assignment(0), _prepared(), str(store.port), inbox)
    transport = ProcessGroupTransport(
        group, inbox, HOST, store, torch.device("cpu"), HIDDEN, torch.float16
    )
    found = {}
    for rows in ROWS:
        activation = torch.randn(rows, HIDDEN).half()
        plan = StepPlan(1, tuple(Chunk(slot, 100, 1, sample=True) for slot in range(rows)))
        taken = []
        for _ in range(_WARM + _HOPS):
            started = time.perf_counter()
            transport.send_step(encode_plan(plan), activation)
            result = transport.wait_result(patient=True)
            assert result is not None  # noqa: S101 (it is patient)
            decode_result(result)
            taken.append(1e3 * (time.perf_counter() - started))
        taken = taken[_WARM:]
        found[f"{rows} rows"] = {
            "median_ms": round(statistics.median(taken), 3),
            "least_ms": round(min(taken), 3),
            "p90_ms": round(statistics.quantiles(taken, n=10)[-1], 3),
        }
    transport.close()
    group.close()
    rendezvous.close()
    peer.join()
    return {"hidden": HIDDEN, "dtype": "float16", **found}


def _answer(rendezvous: str, ready: Connection) -> None:
    """The other stage: as many results as steps."""
    import torch
    from uellm_worker.engine.transport import ProcessGroupTransport

    torch.set_num_threads(1)
    inbox = Inbox()
    inbox.generation = 1
    ready.send(None)
    group = join(rendezvous, _assignment(1), _prepared(), HOST, HOST, inbox)
    transport = ProcessGroupTransport(
        group, inbox, HOST, None, torch.device("cpu"), HIDDEN, torch.float16
    )
    while isinstance(item := inbox.take(None), StepAnnounced):
        plan, inline = decode_plan(item.meta)
        transport.receive_activation(plan.rows, inline)
        transport.send_result(
            encode_result(StepResult(tuple(range(plan.rows)), seconds=(0.1, 0.1)))
        )
    transport.close()
    group.close()


def _assignment(stage: int) -> ShardAssignment:
    return ShardAssignment(stage_index=stage, stage_count=2, generation=1)


def _prepared() -> Prepared:
    return Prepared(Capacity(256, 4096, 256 * 4096), Vocabulary(10))
