"""What NVML says of devices, whole, in parts, wrongly, or not at all; through the real bindings."""

import socket
from dataclasses import replace

import pynvml
import pytest
from uellm_worker.devices import Devices
from uellm_worker.gpus import Gpus

from tests.support.nvml import GPU_IS_LOST, NOT_SUPPORTED, FakeGpu, FakeLibrary, install
from uellm.v1 import topology_pb2

A100 = FakeGpu(processes={4711: 5 << 30, 4712: None})
BUSES = [f"00000000:{bus}:00.0" for bus in ("01", "25", "81", "C1")]


def described(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> list[topology_pb2.Device]:
    install(monkeypatch, library)
    return Devices("w", "auto", 0).describe()


def linked(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> dict[str, topology_pb2.Link]:
    """Links by their ends, as ``0-1``."""
    install(monkeypatch, library)
    return {f"{link.src[-1]}-{link.dst[-1]}": link for link in Devices("w", "auto", 0).links}


def test_all_fields_of_a_device_that_says_all(monkeypatch: pytest.MonkeyPatch) -> None:
    (device,) = described(FakeLibrary([A100]), monkeypatch)
    assert device.name == "NVIDIA A100-SXM4-40GB"
    assert (device.memory_total_bytes, device.memory_free_bytes) == (40 << 30, 30 << 30)
    assert device.utilisation == 0.25
    assert device.path == ["", socket.gethostname(), "numa0"]
    assert (device.pcie.generation, device.pcie.max_width) == (4, 16)
    held = {p.pid: p.memory_bytes if p.HasField("memory_bytes") else None for p in device.processes}
    assert held == {4711: 5 << 30, 4712: None}
    assert device.uuid == "GPU-0"
    assert device.healthy
    assert device.slowdown == 1
    assert not device.notes
    assert not device.throttled_by


@pytest.mark.parametrize(
    ("function", "note"),
    [
        ("nvmlDeviceGetUtilizationRates", "utilisation: Not Supported"),
        ("processes", "processes: Not Supported"),
        ("reasons", "clock events: Not Supported"),
        ("pcie", "CurrPcieLinkGeneration: Not Supported"),
        ("nvmlDeviceGetUUID", "uuid: Not Supported"),
        ("nvmlDeviceGetName", "name: Not Supported"),
        ("nvmlDeviceGetPciInfo", "PCI address: Not Supported"),
    ],
)
def test_one_field_that_is_not_supported_is_noted_and_the_rest_counts(
    function: str, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = replace(A100, errors={function: NOT_SUPPORTED})
    (device,) = described(FakeLibrary([gpu]), monkeypatch)
    assert note in device.notes
    assert device.healthy
    assert device.memory_free_bytes == 30 << 30


def test_without_memory_nothing_can_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = replace(A100, errors={"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NO_PERMISSION})
    (device,) = described(FakeLibrary([gpu]), monkeypatch)
    assert not device.healthy
    assert "memory: Insufficient Permissions" in device.notes
    assert device.utilisation == 0.25


def test_answers_that_cannot_be_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = replace(A100, free=50 << 30, busy=250, pcie=(1, 8, 4, 16))
    (device,) = described(FakeLibrary([gpu]), monkeypatch)
    assert device.memory_free_bytes == device.memory_total_bytes == 40 << 30
    assert not device.HasField("utilisation")
    assert "utilisation: 250 %" in device.notes
    assert "PCIe: 8 of 16 lanes" in device.notes


def test_a_chip_without_lanes_has_no_pcie(monkeypatch: pytest.MonkeyPatch) -> None:
    (device,) = described(FakeLibrary([replace(A100, pcie=(0, 0, 0, 0))]), monkeypatch)
    assert not device.HasField("pcie")


@pytest.mark.parametrize(
    ("reasons", "said", "slowdown"),
    [
        (0x1, [], 1.0),
        (0x4, ["sw power cap"], 2.0),
        (0x8 | 0x40, ["hw slowdown", "hw thermal slowdown"], 2.0),
        (0x1 | 0x20, ["sw thermal slowdown"], 1.0),
    ],
)
@pytest.mark.parametrize("missing", ["", "nvmlDeviceGetCurrentClocksEventReasons"])
def test_lower_clocks_slow_down_unless_the_device_idles(
    reasons: int, said: list[str], slowdown: float, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = replace(A100, reasons=reasons, clock=700)
    (device,) = described(FakeLibrary([gpu], missing=frozenset({missing})), monkeypatch)
    assert list(device.throttled_by) == said
    assert device.slowdown == slowdown


def test_mig_instances_are_devices_and_a_process_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        FakeGpu("A100 MIG 3g.20gb", "MIG-a", total=20 << 30, free=19 << 30),
        None,
        FakeGpu("A100 MIG 2g.10gb", "MIG-b", total=10 << 30, free=9 << 30),
    ]
    for part in parts:
        if part is not None:
            part.errors = {"nvmlDeviceGetUtilizationRates": NOT_SUPPORTED}
    whole = replace(A100, mig=True, slices=parts)
    library = FakeLibrary([whole, replace(A100, uuid="GPU-1")])
    first, second, other = described(library, monkeypatch)
    assert (first.id, second.id, other.id) == ("w/cuda:0", "w/cuda:1", "w/cuda:2")
    assert [d.memory_total_bytes >> 30 for d in (first, second, other)] == [20, 10, 40]
    assert [d.healthy for d in (first, second, other)] == [True, False, False]
    assert first.notes == ["one of 2 MIG instances of its device"]
    assert any("CUDA_VISIBLE_DEVICES=MIG-b" in note for note in second.notes)
    assert not Devices("w", "auto", 0).links
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-b")
    (named,) = Devices("w", "cuda:0", 0).describe()
    assert (named.uuid, named.healthy) == ("MIG-b", True)


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        ("1,0", ["GPU-1", "GPU-0"]),
        ("GPU-1", ["GPU-1"]),
        ("0,7,1", ["GPU-0"]),
        ("", []),
        ("GPU-x", []),
    ],
)
def test_devices_are_in_the_order_of_cuda(
    visible: str, uuids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeLibrary([A100, replace(A100, uuid="GPU-1")]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = Gpus.find(report=False)
    assert [gpus[index].uuid for index in range(len(gpus))] == uuids


def test_without_the_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    def no_library(*_: object) -> None:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(pynvml, "CDLL", no_library)
    (device,) = Devices("w", "auto", 0).describe()
    assert device.kind == topology_pb2.DEVICE_KIND_CPU


def test_a_device_that_is_lost_hides_those_behind_it_as_cuda_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = replace(A100, errors={"nvmlDeviceGetHandleByIndex": GPU_IS_LOST})
    assert [d.kind for d in described(FakeLibrary([lost, A100]), monkeypatch)] == [
        topology_pb2.DEVICE_KIND_CPU
    ]


# ---- links -------------------------------------------------------------------------------------


def test_nvlinks_are_counted_by_their_remote_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bridged pairs of 3090s: four links of 14 GB/s within each pair, PCIe between them."""
    remote = {0: 1, 1: 0, 2: 3, 3: 2}
    gpus = [
        FakeGpu(
            uuid=f"GPU-{i}",
            bus=BUSES[i],
            # The remote's address in the older, shorter form.
            nvlinks=dict.fromkeys(range(4), BUSES[remote[i]][4:]),
            nvlink_mbps=14062,
        )
        for i in range(4)
    ]
    system = pynvml.NVML_TOPOLOGY_SYSTEM
    ancestors = {(i, j): system for i in range(4) for j in range(4)}
    links = linked(FakeLibrary(gpus, ancestors, frozenset({(0, 2)})), monkeypatch)
    assert {ends for ends, link in links.items() if link.kind == "nvlink"} == {
        "0-1",
        "1-0",
        "2-3",
        "3-2",
    }
    assert links["0-1"].bytes_per_second == pytest.approx(4 * 14.062e9 * 0.78)
    assert links["0-2"].kind == "pcie-system, through the host"
    assert links["1-2"].kind == "pcie-system"
    assert links["1-2"].bytes_per_second == pytest.approx(16 * 1.969e9 * 0.78)
    assert {link.source for link in links.values()} == {"nvml"}
    assert not any(link.HasField("measured_at") for link in links.values())


def test_nvlinks_to_switches_reach_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [
        FakeGpu(uuid=f"GPU-{i}", bus=BUSES[i], nvlinks=dict.fromkeys(range(12), "switch"))
        for i in range(3)
    ]
    links = linked(FakeLibrary(gpus), monkeypatch)
    assert {link.kind for link in links.values()} == {"nvswitch"}
    assert links["0-2"].bytes_per_second == pytest.approx(12 * 25e9 * 0.78)


def test_the_common_ancestor_says_what_pcie_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [replace(A100, uuid=f"GPU-{i}", bus=BUSES[i]) for i in range(4)]
    ancestors = {
        (0, 1): pynvml.NVML_TOPOLOGY_SINGLE,
        (0, 2): pynvml.NVML_TOPOLOGY_HOSTBRIDGE,
        (1, 2): pynvml.NVML_TOPOLOGY_NODE,
    }
    library = FakeLibrary(gpus, ancestors)
    links = linked(library, monkeypatch)
    kinds = {ends: links[ends].kind for ends in ("0-1", "0-2", "1-2", "0-3")}
    assert kinds == {"0-1": "pcie-switch", "0-2": "pcie-bridge", "1-2": "pcie-node", "0-3": "pcie"}
    paths = [list(device.path[2:]) for device in described(library, monkeypatch)]
    assert paths == [["numa0", "switch0"], ["numa0", "switch0"], ["numa0"], ["numa0"]]


def test_links_are_of_the_devices_that_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeLibrary([replace(A100, bus=bus) for bus in BUSES]))
    devices = Devices("w", "cuda:1,cuda:3", 0)
    assert {(link.src, link.dst) for link in devices.links} == {
        ("w/cuda:1", "w/cuda:3"),
        ("w/cuda:3", "w/cuda:1"),
    }
