"""How much of a device's memory a plan may fill, and which devices a plan takes."""

from dataclasses import replace
from pathlib import Path

import pytest
from uellm_deployer.adoption import planned_of
from uellm_deployer.assigning import assignments
from uellm_deployer.budgets import devices_for
from uellm_deployer.catalog import checked, parse_model, resolve
from uellm_deployer.planning import NOTHING, better, plan
from uellm_deployer.replica import Phase, Replica
from uellm_deployer.settings import DeployerSettings
from uellm_deployer.workers import Worker

from tests.support.checkpoints import write_checkpoint
from uellm.core.errors import FailedPreconditionError, InvalidArgumentError
from uellm.placement.topology import Device
from uellm.placement.views import PlannedReplica, PlannedStage
from uellm.v1 import common_pb2, deployer_pb2, topology_pb2


def worker(kind: "topology_pb2.DeviceKind.ValueType", *stages: deployer_pb2.StageStatus) -> Worker:
    device = topology_pb2.Device(
        id="w/d:0", kind=kind, memory_total_bytes=1000, memory_free_bytes=600, healthy=True
    )
    return Worker("w", "w:1", 1, [device], 0.0, stages={stage.replica: stage for stage in stages})


def replica(name: str, phase: Phase, memory_bytes: int) -> Replica:
    stage = PlannedStage("w/d:0", 0, 1, True, True, memory_bytes, 0)
    return Replica(name, 0, phase, planned=PlannedReplica((stage,)))


def held(name: str, resident_bytes: int, device_bytes: int = 0) -> deployer_pb2.StageStatus:
    use = topology_pb2.DeviceUse(device_id="w/d:0", held_bytes=device_bytes)
    return deployer_pb2.StageStatus(
        replica=name, pid=1, resident_bytes=resident_bytes, devices=[use]
    )


CPU, CUDA = topology_pb2.DEVICE_KIND_CPU, topology_pb2.DEVICE_KIND_CUDA
SIMULATED = topology_pb2.DEVICE_KIND_SIMULATED


@pytest.mark.parametrize(
    ("kind", "stages", "others", "expected"),
    [
        (CPU, [], [], 600),
        # What others will still take is not free; what they have taken is gone already.
        (CPU, [], [replica("o", Phase.FORMING, 150)], 450),
        (CPU, [held("o", 100)], [replica("o", Phase.READY, 150)], 550),
        (CUDA, [held("o", 9)], [replica("o", Phase.READY, 150)], 600),
        (CPU, [], [replica("o", Phase.IDLE, 150)], 600),
        # Of a simulated device its worker counts what the children say.
        (SIMULATED, [held("o", 900, 100)], [replica("o", Phase.READY, 150)], 550),
        (SIMULATED, [held("o", 900)], [replica("o", Phase.FORMING, 150)], 450),
        (SIMULATED, [held("me", 900, 250)], [], 850),
        # What the planned replica holds itself is free for it, up to all there is.
        (CPU, [held("me", 250)], [], 850),
        (CUDA, [held("me", 9)], [], 900),
        # What its child takes beside what was planned, whatever takes its place takes too.
        (CPU, [held("me", 380)], [], 980),
        (CPU, [held("me", 700)], [], 1000),
        # But not what others have, though an overfull device does not say how full it is.
        (CPU, [held("me", 700), held("o", 300)], [replica("o", Phase.READY, 150)], 700),
        (CPU, [held("me", 700), held("o", 100)], [replica("o", Phase.READY, 150)], 850),
    ],
)
def test_pending_loads_are_reserved_and_ones_own_are_free(
    kind: "topology_pb2.DeviceKind.ValueType",
    stages: list[deployer_pb2.StageStatus],
    others: list[Replica],
    expected: int,
) -> None:
    me = replica("me", Phase.IDLE, 300)
    (device,) = devices_for([me], [me, *others], [worker(kind, *stages)])
    assert device.memory_bytes == expected
    assert device.num_stages == sum(other.phase is not Phase.IDLE for other in others)


async def test_accelerators_are_taken_before_cpus(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m")
    model = await resolve(
        deployer_pb2.PlanRequest(model=common_pb2.ModelRef(name="m", source=str(source)))
    )
    gpu = Device("g/cuda:0", "g", "g", "cuda", 1 << 30)
    cpu = Device("c/cpu:0", "c", "c", "cpu", 8 << 30)
    small = Device("s/cuda:0", "s", "s", "cuda", 1 << 10)

    def where(devices: list[Device], **wanted: object) -> tuple[list[str], str]:
        request = deployer_pb2.PlanRequest(slots=1, **wanted)
        made = plan(model, request, devices, 1)
        return [stage.device_id for stage in made.plan.replicas[0].stages], made.dtype

    assert where([gpu, cpu]) == (["g/cuda:0"], "bfloat16")
    assert where([small, cpu]) == (["c/cpu:0"], "float32")
    assert where([gpu, cpu], stages=2) == (["c/cpu:0", "g/cuda:0"], "float32")
    assert where([gpu, cpu], dtype="float16") == (["g/cuda:0"], "float16")
    assert where([gpu, cpu], stages=1)[0] == ["g/cuda:0"]


async def test_simulated_devices_compute_in_single_precision(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m")
    model = await resolve(
        deployer_pb2.PlanRequest(model=common_pb2.ModelRef(name="m", source=str(source)))
    )
    device = Device("s/sim:0", "s", "s", "simulated", 1 << 30)
    assert plan(model, deployer_pb2.PlanRequest(), [device], 1).dtype == "float32"


async def test_neighbours_on_a_worker_become_one_stage_and_no_worker_has_two(
    tmp_path: Path,
) -> None:
    source = write_checkpoint(tmp_path / "m", layers=4)
    model = await resolve(
        deployer_pb2.PlanRequest(model=common_pb2.ModelRef(name="m", source=str(source)))
    )
    names = ("a/sim:0", "a/sim:1", "b/sim:0")
    devices = [Device(name, name[0], name[0], "simulated", 1 << 30) for name in names]
    request = deployer_pb2.PlanRequest(stages=3, slots=1)
    planned = plan(model, request, devices, 1)
    workers = {name: Worker(name, f"{name}:1", 1, [], 0.0) for name in "ab"}
    (copy,) = planned.plan.replicas
    first, last = assignments(planned, copy, model, "m-0", 7, workers)
    assert [(s.device_id, s.first_layer, s.last_layer) for s in first.shards] == [
        ("a/sim:0", 0, 1),
        ("a/sim:1", 2, 2),
    ]
    assert (first.first_layer, first.last_layer, list(first.device_ids)) == (0, 2, [*names[:2]])
    assert first.kv_bytes == sum(shard.kv_bytes for shard in first.shards)
    assert [(p.stage, p.worker) for p in first.peers] == [(0, "a"), (1, "b")]
    assert (first.has_embed, first.has_head, last.has_embed, last.has_head) == (1, 0, 0, 1)
    # What was published leads back to the plan, but for what was predicted of it.
    assert planned_of((first, last), planned.profile) == PlannedReplica(
        tuple(
            replace(stage, prefill_seconds=0.0, decode_seconds=0.0, send_seconds=0.0)
            for stage in copy.stages
        )
    )
    a, b, c = copy.stages
    with pytest.raises(FailedPreconditionError, match="comes back to worker a"):
        assignments(planned, PlannedReplica((a, c, b)), model, "m-0", 7, workers)


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        ("/models/tiny", "", "/models/tiny"),
        ("org/tiny", "", "org/tiny"),
        ("mine=org/tiny", "mine", "org/tiny"),
        ("org/mine=/models/tiny", "org/mine", "/models/tiny"),
    ],
)
def test_models_are_named_in_settings(text: str, name: str, source: str) -> None:
    ref = parse_model(text)
    assert (ref.name, ref.source) == (name, source)


def test_a_model_is_named_after_its_source(tmp_path: Path) -> None:
    request = deployer_pb2.PlanRequest(model=common_pb2.ModelRef(source="org/tiny/"))
    wanted = checked(request, 6)
    assert (wanted.model.name, wanted.replicas, wanted.slots) == ("tiny", 1, 6)
    with pytest.raises(InvalidArgumentError, match="is no name"):
        checked(deployer_pb2.PlanRequest(model=common_pb2.ModelRef(source="/a/b c")), 6)


def test_models_are_a_list_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UELLM_DEPLOYER_MODELS", "a=/x, org/b")
    assert DeployerSettings.load().models == ("a=/x", "org/b")
    monkeypatch.setenv("UELLM_DEPLOYER_MODELS", '["a=/x"]')
    assert DeployerSettings.load().models == ("a=/x",)


@pytest.mark.parametrize("free", [1 << 30, 1 << 20])
async def test_what_is_where_it_was_told_to_be_stays_however_full_it_is(
    tmp_path: Path, free: int
) -> None:
    source = write_checkpoint(tmp_path / "m", layers=4)
    model = await resolve(
        deployer_pb2.PlanRequest(model=common_pb2.ModelRef(name="m", source=str(source)))
    )
    room = [Device(f"{w}/cpu:0", w, w, "cpu", 1 << 30) for w in "ab"]
    request = deployer_pb2.PlanRequest(slots=2, objective="lr")
    request.layout.add(device_id="a/cpu:0", first_layer=0, last_layer=3)
    (there,) = plan(model, request, room, 1).plan.replicas
    present = topology_pb2.Deployment(slots=2, max_tokens=64, dtype="float32")
    now = [Device("a/cpu:0", "a", "a", "cpu", free), room[1]]
    assert better(model, request, now, present, there, NOTHING)[1] == 0
    request.layout[0].device_id = "b/cpu:0"
    found, gained = better(model, request, now, present, there, NOTHING)
    assert gained == 1
    assert [stage.device_id for stage in found.plan.replicas[0].stages] == ["b/cpu:0"]


async def test_the_solver_places_where_the_even_split_does(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m", layers=4)
    model = await resolve(
        deployer_pb2.PlanRequest(model=common_pb2.ModelRef(name="m", source=str(source)))
    )
    devices = [Device(f"{w}/sim:{i}", w, w, "simulated", 1 << 30) for w in "ab" for i in (0, 1)]
    request = deployer_pb2.PlanRequest(stages=3, slots=2, objective="lr")
    planned = plan(model, request, devices, 1)
    (copy,) = planned.plan.replicas
    assert copy.prediction is not None
    assert planned.plan.certificate is not None
    assert planned.plan.certificate.ratio == pytest.approx(1)
    workers = {name: Worker(name, f"{name}:1", 1, [], 0.0) for name in "ab"}
    stages = assignments(planned, copy, model, "m-0", 7, workers)
    assert [stage.stage_count for stage in stages] == [2, 2]
    held = planned_of(stages, planned.profile)
    assert [(s.device_id, s.memory_bytes) for s in held.stages] == [
        (s.device_id, s.memory_bytes) for s in copy.stages
    ]
