"""Whatever numbers a deployment is asked for with: a plan that workers can be told, or why not."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from uellm_deployer import assigning, planning
from uellm_deployer.catalog import ResolvedModel, checked

from tests.support.checkpoints import write_checkpoint
from uellm.convert_topology import planned_to_proto
from uellm.core.errors import InvalidArgumentError, UellmError
from uellm.placement.topology import Device
from uellm.v1 import common_pb2, deployer_pb2

DEVICES = [Device(f"w{n}/cpu:0", f"w{n}", f"h{n}", "cpu", 4 << 30, 1e12, 1e11) for n in range(2)]
UINT32, UINT64 = 2**32 - 1, 2**64 - 1


def numbers(most: int) -> st.SearchStrategy[int]:
    return st.sampled_from([0, 1, 2, 64, 4096, 1 << 20, most]) | st.integers(0, most)


ASKED = st.fixed_dictionaries(
    {
        **dict.fromkeys(
            (
                *("replicas", "most_replicas", "stages", "slots", "max_tokens"),
                *("prompt_tokens", "output_tokens"),
            ),
            numbers(UINT32),
        ),
        "kv_tokens": numbers(UINT64),
        **dict.fromkeys(("slo_seconds", "requests_per_second"), st.just(0.0) | st.floats()),
        "objective": st.sampled_from(["helr", "he", "lr", "throughput", "goodput", "even"]),
    }
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    directory: Path = write_checkpoint(tmp_path_factory.mktemp("limits") / "model", layers=4)
    return ResolvedModel(common_pb2.ModelRef(name="m", source=str(directory)), directory)


def test_as_many_stages_as_devices_of_all_kinds_let_there_be(model: ResolvedModel) -> None:
    devices = [
        Device(f"w{n}/{kind}:0", f"w{n}", f"h{n}", kind, 4 << 30)
        for n, kind in enumerate(("cuda", "cpu", "cpu"))
    ]
    for stages, there in ((9, 3), (2, 2), (1, 1), (0, 1)):
        request = checked(deployer_pb2.PlanRequest(model=model.ref, stages=stages), 8)
        found = planning.plan(model, request, devices, 1).plan.replicas[0].stages
        assert len(found) == there
        # A CPU among accelerators would set the pace: it is taken where there is no other.
        assert there > 1 or found[0].device_id == "w0/cuda:0"


def test_a_pin_to_what_is_not_there_is_told_all_that_is(model: ResolvedModel) -> None:
    devices = [
        Device(f"w{n}/{k}:0", f"w{n}", "h", k, 4 << 30) for n, k in ((0, "cuda"), (1, "cpu"))
    ]
    pin = deployer_pb2.DevicePin(device_id="w2/cuda:0")
    request = checked(deployer_pb2.PlanRequest(model=model.ref, pins=[pin]), 8)
    with pytest.raises(InvalidArgumentError, match="of w0/cuda:0, w1/cpu:0"):
        planning.plan(model, request, devices, 1)


def test_an_even_split_takes_no_pins(model: ResolvedModel) -> None:
    pin = deployer_pb2.DevicePin(device_id="w0/cuda:0")
    wanted = deployer_pb2.PlanRequest(model=model.ref, pins=[pin], objective="even")
    with pytest.raises(InvalidArgumentError, match="leave out the pins, or ask for another objec"):
        checked(wanted, 8)


@settings(max_examples=60, deadline=None)
@given(asked=ASKED)
@example(asked={"kv_tokens": UINT64, "slots": 4096, "objective": "lr"})
@example(asked={"max_tokens": UINT32, "prompt_tokens": UINT32, "output_tokens": UINT32})
@example(asked={"slo_seconds": math.nan})
@example(asked={"requests_per_second": math.inf, "objective": "goodput"})
@example(asked={"slo_seconds": 5e-324, "replicas": 64})
def test_it_is_placed_or_said_why_not(model: ResolvedModel, asked: dict[str, Any]) -> None:
    wanted = deployer_pb2.PlanRequest(model=model.ref, **asked)
    try:
        request = checked(wanted, 8)
        planned = planning.plan(model, request, DEVICES, request.replicas)
    except UellmError as error:
        assert error.field or error.message
        return
    message = planning.plan_to_proto("m", planned)
    assert message.replicas or message.infeasible_reason
    for replica in planned.plan.replicas:
        assert planned_to_proto(replica).stages
        assert assigning.first_report(planned, replica, 1).slots > 0
