"""A stage on several simulated devices: exact, within their memory, and as slow as they are."""

import warnings
from collections import deque
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers")
    from uellm_worker.engine.device import Device, Stopwatch, accelerators, move
    from uellm_worker.engine.member import ShardMember
    from uellm_worker.engine.shard_engine import ShardEngine
    from uellm_worker.verification.pipeline import generate
    from uellm_worker.verification.reference import Reference

from uellm_worker.engine.capacity import Prepared  # noqa: E402
from uellm_worker.engine.inbox import Inbox  # noqa: E402
from uellm_worker.engine.loop import EngineLoop  # noqa: E402
from uellm_worker.engine.plan import StepPlan, StepResult  # noqa: E402

from tests.support.checkpoints import write_checkpoint  # noqa: E402
from uellm.core.errors import ConfigurationError, ModelFilesError  # noqa: E402
from uellm.models.profile import read_profile  # noqa: E402
from uellm.policy.fcfs import FcfsStep  # noqa: E402
from uellm.v1.common_pb2 import ModelRef, Sampling  # noqa: E402
from uellm.v1.engine_pb2 import PrepareShard, SimulatedDevice  # noqa: E402
from uellm.v1.topology_pb2 import DeviceShard, ShardAssignment  # noqa: E402

LAYERS, SLOTS, CONTEXT = 5, 3, 48
PROMPTS = [[1, 5, 9, 3], [7] * 11, [2, 4, 8, 16, 3, 6, 12], [30]]
AMPLE = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), layers=LAYERS)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference.load(model, torch.float32)


def prepare(
    engine: ShardEngine,
    directory: Path,
    parts: dict[str, int],
    *,
    rooms: dict[str, int] | None = None,
    kv_bytes: dict[str, int] | None = None,
    **speed: float,
) -> Prepared:
    """Load the whole model, so many layers on each simulated device."""
    shards, first = [], 0
    for name, layers in parts.items():
        shards.append(
            DeviceShard(
                device_id=name,
                first_layer=first,
                last_layer=first + layers - 1,
                kv_bytes=(kv_bytes or {}).get(name, 0),
            )
        )
        first += layers
    assignment = ShardAssignment(
        model=ModelRef(digest="d"),
        stage_count=1,
        first_layer=0,
        last_layer=LAYERS - 1,
        has_embed=True,
        has_head=True,
        slots=SLOTS,
        max_tokens=CONTEXT,
        device_ids=list(parts),
        shards=shards,
    )
    command = PrepareShard(
        assignment=assignment,
        model_dir=str(directory),
        simulated=[
            SimulatedDevice(device_id=name, memory_bytes=(rooms or {}).get(name, AMPLE), **speed)
            for name in parts
        ],
    )
    return engine.prepare(command, lambda *_: None)


class Timed:
    """Runs steps, and keeps what their parts took."""

    def __init__(self, member: ShardMember) -> None:
        self._member = member
        self._plans: deque[StepPlan] = deque()
        self.steps: list[tuple[StepPlan, StepResult]] = []

    @property
    def depth(self) -> int:
        return self._member.depth

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)
        self._member.submit(plan)

    def collect(self, *, patient: bool = True) -> StepResult | None:
        result = self._member.collect(patient=patient)
        if result is not None:
            self.steps.append((self._plans.popleft(), result))
        return result


def answers(
    engine: ShardEngine, prepared: Prepared, count: int = 12
) -> tuple[Timed, list[list[int]]]:
    runner = Timed(engine.join(None, Inbox()))
    loop = EngineLoop(runner, FcfsStep(), prepared.capacity, prepared.vocabulary)
    return runner, generate(loop, PROMPTS, lambda _: Sampling(max_tokens=count))


def assert_exact(reference: Reference, found: list[list[int]], count: int = 12) -> None:
    for prompt, answer in zip(PROMPTS, found, strict=True):
        assert reference.compare(prompt, answer, count).difference is None


@pytest.mark.parametrize("layers", [(5,), (2, 3), (1, 3, 1)])
def test_parts_answer_as_the_whole_model(
    model: Path, reference: Reference, layers: tuple[int, ...]
) -> None:
    engine = ShardEngine()
    prepared = prepare(engine, model, {f"w/sim:{i}": n for i, n in enumerate(layers)})
    runner, found = answers(engine, prepared)
    assert_exact(reference, found)
    assert all(len(result.seconds) == len(layers) for _, result in runner.steps)
    assert all(seconds > 0 for _, result in runner.steps for seconds in result.seconds)
    assert [name for name, _ in prepared.held] == [f"w/sim:{i}" for i in range(len(layers))]


def test_a_part_holds_what_the_profile_says_and_not_a_byte_more(model: Path) -> None:
    profile = read_profile(model, "float32")
    kv = SLOTS * CONTEXT * profile.layers[0].kv_bytes_per_token
    layer = profile.layers[0].weight_bytes + kv
    parts = {"w/sim:0": 2, "w/sim:1": 3}
    need = {
        "w/sim:0": profile.embed_bytes + 2 * layer,
        "w/sim:1": profile.head_bytes + 3 * layer,
    }
    granted = {name: layers * kv for name, layers in parts.items()}
    prepared = prepare(ShardEngine(), model, parts, rooms=need, kv_bytes=granted)
    assert dict(prepared.held) == need
    for short, size in need.items():
        rooms = {**need, short: size - 1}
        with pytest.raises(MemoryError, match=f"{short}: weights and KV cache"):
            prepare(ShardEngine(), model, parts, rooms=rooms, kv_bytes=granted)


def test_weights_that_do_not_fit_are_not_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("read in vain")

    monkeypatch.setattr("uellm_worker.engine.checkpoint.TensorFiles.read", read)
    with pytest.raises(MemoryError, match="weights take"):
        prepare(ShardEngine(), model, {"w/sim:0": 5}, rooms={"w/sim:0": 1000})


def test_the_part_with_the_least_room_sets_the_capacity(model: Path, reference: Reference) -> None:
    per_token = read_profile(model, "float32").layers[0].kv_bytes_per_token
    kv_bytes = {"w/sim:0": 2 * 3 * CONTEXT * per_token, "w/sim:1": 3 * 2 * CONTEXT * per_token}
    engine = ShardEngine()
    prepared = prepare(engine, model, {"w/sim:0": 2, "w/sim:1": 3}, kv_bytes=kv_bytes)
    assert (prepared.capacity.slots, prepared.capacity.kv_tokens) == (2, 2 * CONTEXT)
    assert_exact(reference, answers(engine, prepared)[1])
    with pytest.raises(ModelFilesError, match="hold no token"):
        prepare(engine, model, {"w/sim:0": 2, "w/sim:1": 3}, kv_bytes={"w/sim:1": 1})


def test_each_device_keeps_the_layers_that_it_goes_on_holding(
    model: Path, reference: Reference
) -> None:
    profile = read_profile(model, "float32")
    layer = profile.layers[0].weight_bytes
    engine = ShardEngine()
    first = prepare(engine, model, {"w/sim:0": 2, "w/sim:1": 2, "w/sim:2": 1})
    assert first.kept_bytes == 0
    # Layer 2 moves from device 1 to device 0, layer 4 and the head from device 2, which goes.
    second = prepare(engine, model, {"w/sim:0": 3, "w/sim:1": 2})
    assert second.kept_bytes == profile.embed_bytes + 2 * layer + layer
    assert second.total_bytes == first.total_bytes
    assert_exact(reference, answers(engine, second)[1])
    again = prepare(engine, model, {"w/sim:0": 3, "w/sim:1": 2})
    assert again.kept_bytes == again.total_bytes


def test_a_paced_device_takes_what_its_roofline_says(model: Path) -> None:
    profile = read_profile(model, "float32")
    read = sum(layer.weight_bytes for layer in profile.layers) + profile.head_bytes
    bandwidth = read / 0.02
    engine = ShardEngine()
    prepared = prepare(
        engine, model, {"w/sim:0": 5}, memory_bytes_per_second=bandwidth, flops_per_second=1e15
    )
    runner, _ = answers(engine, prepared, count=2)
    kv = profile.layers[0].kv_bytes_per_token * LAYERS
    for plan, result in runner.steps:
        context = sum(chunk.start + chunk.count for chunk in plan.chunks)
        assert result.seconds[0] >= (read + context * kv) / bandwidth
    row = sum(layer.flops_per_token for layer in profile.layers)
    slow = prepare(engine, model, {"w/sim:0": 2, "w/sim:1": 3}, flops_per_second=row / 0.02)
    runner, _ = answers(engine, slow, count=1)
    assert any(plan.rows > 1 for plan, _ in runner.steps)
    for plan, result in runner.steps:
        assert result.seconds[0] >= 0.02 * 2 / 5 * plan.rows
        assert result.seconds[1] >= 0.02 * 3 / 5 * plan.rows


def test_a_device_that_is_not_there_is_named() -> None:
    assert Device.named("").place == Device.named("w/cpu:0").place == torch.device("cpu")
    absent = f"w/xpu:{len(accelerators())}"
    with pytest.raises(ConfigurationError, match="UELLM_WORKER_DEVICES") as caught:
        Device.named(absent)
    assert absent in caught.value.message
    with pytest.raises(ConfigurationError, match="sim:0 is not there"):
        Device.named("w/sim:0")


def test_the_cpu_is_told_apart_from_nothing() -> None:
    device = Device.named("w/cpu:0")
    assert device.unique_name == "cpu"
    device.check_room(1 << 60, "weights")
    assert device.least_seconds(1e18, 1e18) == 0
    tensor = torch.arange(3)
    assert move(tensor, device.place) is tensor
    watch = Stopwatch(device)
    assert watch.seconds == 0
    watch.start()
    watch.stop()
    first = watch.seconds
    watch.stop()
    assert watch.seconds >= first >= 0
