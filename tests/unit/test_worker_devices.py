"""What a worker finds to compute on."""

import socket

import pytest
from uellm_worker import devices as module
from uellm_worker.devices import Devices

from uellm.core.errors import ConfigurationError
from uellm.v1 import topology_pb2


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cuda_handles", lambda *, report: ["first", "second"])
    monkeypatch.setattr(module, "_cuda_facts", lambda handle: (f"GPU {handle}", 80 << 30, 70 << 30))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cuda_handles", lambda *, report: [])


@pytest.mark.usefixtures("no_gpu")
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
    assert both[0].name == "GPU first"
    assert both[0].memory_free_bytes == 70 << 30


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_does_not_answer_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices("w", "auto", 0)

    def fail(handle: str) -> tuple[str, int, int]:
        raise RuntimeError("GPU is lost")

    monkeypatch.setattr(module, "_cuda_facts", fail)
    assert [d.healthy for d in devices.describe()] == [False, False]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("selection", ["cuda:2", "gpu", "", "cpu,cuda:x"])
def test_a_device_that_is_not_there_is_named(selection: str) -> None:
    with pytest.raises(ConfigurationError, match="UELLM_WORKER_DEVICES"):
        Devices("w", selection, 0)
