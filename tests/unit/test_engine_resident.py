"""What a stage takes of the machine's memory, beside what it was granted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("psutil")

from tests.support.checkpoints import write_checkpoint  # noqa: E402

MIB = 1 << 20
CONSTANT_BYTES = 16 * MIB
"""What libraries allocate on the first step, and activations leave behind in the allocator."""
PROGRAM = """
import gc, json, sys
import psutil, torch
torch.set_num_threads(1)
from uellm.v1.engine_pb2 import PrepareShard
from uellm.v1.topology_pb2 import ShardAssignment
from uellm_worker.engine.kv import KvManager
from uellm_worker.engine.plan import Chunk, StepPlan
from uellm_worker.engine.shard_engine import ShardEngine

def prepare(directory, layers, kv_bytes):
    engine = ShardEngine()
    assignment = ShardAssignment(
        stage_count=1, last_layer=layers - 1, has_embed=True, has_head=True, slots=64,
        max_tokens=4096, kv_bytes=kv_bytes,
    )
    prepared = engine.prepare(
        PrepareShard(assignment=assignment, model_dir=directory, threads=1), lambda *_: None
    )
    return engine, prepared

def compute(stage, kv, step, chunks):
    plan = StepPlan(
        step, tuple(chunks), token_ids=(1,) * sum(chunk.count for chunk in chunks), moves=kv.flush()
    )
    stage.compute(plan, None)

def resident():
    gc.collect()
    return psutil.Process().memory_info().rss

small, large, kv_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
engine, prepared = prepare(small, 1, 0)
engine._stage.compute(StepPlan(0, (Chunk(0, 0, 128, False),), token_ids=(1,) * 128), None)
del engine
figures = {"before": resident()}
engine, prepared = prepare(large, 4, kv_bytes)
stage, capacity = engine._stage, prepared.capacity
figures |= {
    "weights": sum(part.shard.held_bytes for part in stage.parts),
    "kv_tokens": capacity.kv_tokens, "loaded": resident(),
    "virtual": sum(t.nbytes for t in (*stage.parts[0].cache.keys, *stage.parts[0].cache.values)),
}
kv = KvManager(
    capacity.cache_slots, capacity.max_tokens, capacity.kv_tokens, capacity.block_tokens
)
step, slots = 0, []
while kv.usage.free_tokens:
    length = min(512, kv.usage.free_tokens)
    # Each begins otherwise, so that nothing is shared.
    slot = kv.seat([len(slots)] * length, reserve_tokens=length).slot
    slots.append(slot)
    for start in range(0, length, 128):
        assert kv.grow(slot, [len(slots) - 1] * 128)
        compute(stage, kv, step, [Chunk(slot, start, 128, False)])
        step += 1
figures |= {"used": kv.usage.used_tokens, "full": resident()}
for slot in slots:
    kv.leave(slot)
kv.clear()
last = kv.seat([1], reserve_tokens=1).slot
kv.grow(last, [1])
compute(stage, kv, step, [Chunk(last, 0, 1, False)])
figures["empty"] = resident()
print(json.dumps(figures))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_a_stage_takes_its_weights_and_what_its_sequences_hold(tmp_path: Path) -> None:
    facts = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    small = write_checkpoint(tmp_path / "small", layers=1, hidden=256, vocab=100, **facts)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8}
    large = write_checkpoint(tmp_path / "large", layers=4, hidden=1024, vocab=100, **facts, **heads)
    per_token = 2 * 4 * 8 * 64 * 4
    granted = 4096 * per_token
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(small), str(large), str(granted)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.returncode == 0, output.stderr
    figures = json.loads(output.stdout)
    assert figures["used"] == figures["kv_tokens"] == 4096
    assert figures["virtual"] > 10 * granted
    weights = figures["weights"]
    for moment, expected in (
        ("loaded", weights),
        ("full", weights + granted),
        ("empty", weights),
    ):
        taken = figures[moment] - figures["before"]
        assert 0.9 * expected < taken < 1.1 * expected + CONSTANT_BYTES, (moment, figures)
