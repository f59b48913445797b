"""What a worker finds to compute on."""

import socket
from pathlib import Path

import pytest
from uellm_worker.accelerators import Accelerator
from uellm_worker.devices import Devices, machine

from tests.support.nvml import GPU_IS_LOST, FakeGpu, FakeLibrary, install
from uellm.core.errors import ConfigurationError
from uellm.v1 import topology_pb2


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    library = FakeLibrary(
        [FakeGpu(f"GPU {name}", f"GPU-{name}", total=80 << 30, free=70 << 30) for name in "ab"]
    )
    install(monkeypatch, library)
    return library


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeLibrary([]))


@pytest.mark.usefixtures("no_gpu")
def test_all_containers_of_a_machine_name_it_alike(tmp_path: Path) -> None:
    assert machine(tmp_path) == ""
    kept = tmp_path / "proc/sys/kernel/random"
    kept.mkdir(parents=True)
    (kept / "boot_id").write_text("3b1f\n")
    assert machine(tmp_path) == "3b1f"


def test_a_cpu_offers_a_share_of_what_is_available() -> None:
    (device,) = Devices("w", "auto", 0).describe()
    assert device.id == "w/cpu:0"
    assert device.worker == "w"
    assert device.host == socket.gethostname()
    assert device.kind == topology_pb2.DEVICE_KIND_CPU
    assert device.healthy
    assert 0 < device.memory_free_bytes <= device.memory_total_bytes


def test_a_cpu_offers_what_it_is_told_to_less_what_children_hold() -> None:
    (device,) = Devices("w", "cpu", 1000).describe(300)
    assert (device.memory_total_bytes, device.memory_free_bytes) == (1000, 700)
    (device,) = Devices("w", "cpu:0", 1000).describe(3000, healthy=False)
    assert device.memory_free_bytes == 0
    assert not device.healthy


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_preferred_and_can_be_chosen() -> None:
    assert [d.id for d in Devices("w", "auto", 0).describe()] == ["w/cuda:0", "w/cuda:1"]
    assert [d.id for d in Devices("w", "cuda:1", 0).describe()] == ["w/cuda:1"]
    both = Devices("w", "cuda:0, cpu", 1000).describe()
    assert [d.id for d in both] == ["w/cuda:0", "w/cpu:0"]
    assert both[0].name == "GPU a"
    assert both[0].memory_free_bytes == 70 << 30


def test_a_gpu_that_does_not_answer_is_not_healthy(two_gpus: FakeLibrary) -> None:
    devices = Devices("w", "auto", 0)
    two_gpus.gpus[1].errors = {"*": GPU_IS_LOST}
    first, second = devices.describe()
    assert (first.healthy, second.healthy) == (True, False)
    assert "memory: GPU is lost" in second.notes
    assert (first.lost, second.lost) == (False, True)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("selection", ["cuda:2", "gpu", "", "cpu,cuda:x"])
def test_a_device_that_is_not_there_is_named(selection: str) -> None:
    with pytest.raises(ConfigurationError, match="UELLM_WORKER_DEVICES"):
        Devices("w", selection, 0)


def test_workers_of_a_host_divide_what_each_of_them_measured() -> None:
    devices = Devices("w", "cpu", 0)
    (alone,) = devices.describe()
    devices.sharers = 4
    (shared,) = devices.describe()
    assert shared.memory_total_bytes == alone.memory_total_bytes // 4
    assert shared.memory_free_bytes <= shared.memory_total_bytes
    told = Devices("w", "cpu", 1000)
    told.sharers = 4
    assert told.describe()[0].memory_total_bytes == 1000


def test_simulated_devices_are_as_they_are_described() -> None:
    devices = Devices("w", "sim:0-1:memory=2GiB:flops=1e12:bandwidth=100GB:paced,cpu", 1000)
    first, second, cpu = devices.describe(300, {"w/sim:1": 1 << 30})
    assert (first.id, second.id, cpu.id) == ("w/sim:0", "w/sim:1", "w/cpu:0")
    assert first.kind == topology_pb2.DEVICE_KIND_SIMULATED
    assert (first.memory_total_bytes, first.memory_free_bytes) == (2 << 30, 2 << 30)
    assert (second.memory_total_bytes, second.memory_free_bytes) == (2 << 30, 1 << 30)
    assert (first.flops_per_second, first.memory_bytes_per_second) == (1e12, 1e11)
    assert not any(d.healthy for d in devices.describe(healthy=False))
    assignment = topology_pb2.ShardAssignment(device_ids=["w/cpu:0", "w/sim:1"])
    (given,) = devices.simulated(assignment, {"w/sim:1": 1 << 30})
    assert (given.device_id, given.memory_bytes) == ("w/sim:1", 1 << 30)
    assert (given.flops_per_second, given.memory_bytes_per_second) == (1e12, 1e11)


def test_what_is_full_is_not_without_limit() -> None:
    devices = Devices("w", "sim:0:memory=1000:flops=5", 0)
    assignment = topology_pb2.ShardAssignment(device_ids=["w/sim:0"])
    (given,) = devices.simulated(assignment, {"w/sim:0": 2000})
    assert given.memory_bytes == 1
    assert given.flops_per_second == 0, "not paced: as fast as the CPU is"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("sim", "it is written"),
        ("sim:x:memory=1", "it is written"),
        ("sim:0", "no memory"),
        ("sim:0:memory", "none of its properties"),
        ("sim:0:memory=4GiB:speed=1", "'speed=1'"),
        ("sim:0:memory=4GiB:memory=5GiB", "none of its properties"),
        ("sim:0:memory=4GiB:paced=no", "'paced=no'"),
        ("sim:0:memory=lots", "memory=lots"),
        ("sim:0:memory=-1", "positive"),
        ("sim:0:memory=1:flops=inf", "positive"),
        ("sim:0:memory=4GiB:paced", "paced by what"),
        ("sim:3-1:memory=4GiB", "no range"),
    ],
)
def test_a_simulated_device_that_is_described_wrongly_is_refused(text: str, word: str) -> None:
    with pytest.raises(ConfigurationError, match="UELLM_WORKER_DEVICES") as caught:
        Devices("w", text, 0)
    assert word in caught.value.message


def test_another_accelerator_is_looked_for_by_torch() -> None:
    pytest.importorskip("torch")
    with pytest.raises(ConfigurationError, match="npu:7 is not there: torch"):
        Devices("w", "npu:7", 0)


def test_another_accelerator_is_described_as_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"xpu:0": Accelerator("xpu:0", "Arc", 1000), "xpu:1": Accelerator("xpu:1", "Arc", 0)}
    monkeypatch.setattr("uellm_worker.accelerators._probe", lambda: ("2", found))
    (device,) = Devices("w", "xpu:0", 0).describe(held={"w/xpu:0": 300})
    assert device.kind == topology_pb2.DEVICE_KIND_OTHER
    assert (device.name, device.memory_total_bytes, device.memory_free_bytes) == ("Arc", 1000, 700)
    with pytest.raises(ConfigurationError, match=r"how much memory xpu:1 has.* xpu:1:memory=16GiB"):
        Devices("w", "xpu:1", 0)
    (told,) = Devices("w", "xpu:1:memory=2KiB", 0).describe(held={"w/xpu:1": 48})
    assert (told.id, told.memory_total_bytes, told.memory_free_bytes) == ("w/xpu:1", 2048, 2000)
    assert "torch says what it is" in told.notes[0]
    with pytest.raises(ConfigurationError, match="memory=much: a positive number"):
        Devices("w", "xpu:1:memory=much", 0)


@pytest.mark.usefixtures("no_gpu")
def test_what_nvml_does_not_find_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"cuda:0": Accelerator("cuda:0", "AMD Instinct MI300X", 1000)}
    monkeypatch.setattr("uellm_worker.accelerators._probe", lambda: ("2+rocm", found))
    (device,) = Devices("w", "cuda:0", 0).describe()
    assert device.kind == topology_pb2.DEVICE_KIND_OTHER
    assert (device.id, device.name, device.memory_free_bytes) == (
        "w/cuda:0",
        found["cuda:0"].description,
        1000,
    )
    with pytest.raises(ConfigurationError, match=r"NVML finds no device, and torch 2\+rocm finds"):
        Devices("w", "cuda:1", 0)
    # Not every torch says how much memory it has, and NVML does not either.
    found["cuda:0"] = Accelerator("cuda:0", "AMD Instinct MI300X", 0)
    with pytest.raises(ConfigurationError, match="say it, as cuda:0:memory=16GiB"):
        Devices("w", "cuda:0", 0)
    (told,) = Devices("w", "cuda:0:memory=16GiB", 0).describe()
    assert told.memory_total_bytes == 16 << 30


@pytest.mark.usefixtures("two_gpus")
def test_memory_that_nvml_says_is_not_to_be_told() -> None:
    with pytest.raises(ConfigurationError, match=r"how much memory cuda:1 has, which NVML does"):
        Devices("w", "cuda:1:memory=16GiB", 0)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    "selection",
    ["cuda:0,cuda:1,cuda:0", "cpu,cpu:0", "sim:0-2:memory=1GiB,sim:2:memory=2GiB"],
)
def test_a_device_that_is_named_twice_is_refused(selection: str) -> None:
    with pytest.raises(ConfigurationError, match="is named twice; name each device once"):
        Devices("w", selection, 0)


async def test_the_cpu_is_measured_once_for_all_workers_of_a_host(tmp_path: Path) -> None:
    devices = Devices("w", "cpu", 1000, threads=1)
    (before,) = devices.describe()
    assert not before.HasField("measured_at")
    await devices.measure(tmp_path)
    (after,) = devices.describe()
    assert after.flops_per_second > 1e8
    assert after.memory_bytes_per_second > 1e8
    other = Devices("v", "cpu", 1000, threads=1)
    other.sharers = 2
    await other.measure(tmp_path)
    (shared,) = other.describe()
    assert shared.measured_at == after.measured_at
    assert shared.flops_per_second == after.flops_per_second / 2
    assert shared.cores == after.cores == 1
    assert shared.name.endswith(", 1 core")


async def test_where_nothing_can_be_kept_each_worker_measures(tmp_path: Path) -> None:
    devices = Devices("w", "cpu", 1000, threads=1)
    (tmp_path / "file").touch()
    await devices.measure(tmp_path / "file")
    assert devices.describe()[0].flops_per_second > 1e8


async def test_a_measurement_that_fails_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = Devices("w", "cpu", 1000)
    monkeypatch.setattr("uellm_worker.cpu_speed.sys.executable", "/nowhere/python")
    await devices.measure(tmp_path)
    (device,) = devices.describe()
    assert device.notes[0].startswith("speed: not measured")
    assert device.healthy


def test_copies_are_timed_by_size() -> None:
    torch = pytest.importorskip("torch")
    from uellm_worker.engine.copy_probe import time_copies  # noqa: PLC0415

    place = torch.device("cpu")
    samples = time_copies(place, place, 0.05, sizes=(4096, 1 << 20))
    assert [sample.bytes for sample in samples] == [4096, 1 << 20]
    assert all(sample.seconds > 0 for sample in samples)
