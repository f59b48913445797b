"""The even split: whole, in order, within memory, the same every time, and explained."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations, product

from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from uellm.core.model import LayerProfile, ModelProfile
from uellm.placement.even import EvenPlacer
from uellm.placement.memory import Need
from uellm.placement.partition import fits, split
from uellm.placement.speed import HOP_SECONDS, first_guess
from uellm.placement.topology import Device, Topology
from uellm.placement.views import Plan, PlanRequest, Workload

PLACER = EvenPlacer(workspace_bytes=3, usable=1.0)


def place(
    devices: Sequence[Device], needs: ModelProfile, wanted: Workload, previous: Plan | None = None
) -> Plan:
    return PLACER.place(PlanRequest(Topology(tuple(devices)), needs, wanted, previous=previous))


def model(
    layers: int = 8,
    weight: int = 10,
    kv: int = 1,
    embed: int = 5,
    tied: bool = False,
    state: int = 0,
) -> ModelProfile:
    return ModelProfile(
        layers=(LayerProfile(weight, kv, 2.0 * weight, state),) * layers,
        embed_bytes=embed,
        head_bytes=embed,
        tied=tied,
        activation_bytes_per_token=4,
        max_tokens=64,
        vocab_size=10,
        hidden_size=1,
    )


def device(name: str, memory: int, kind: str = "simulated") -> Device:
    worker = name.partition("/")[0]
    return Device(name, worker, worker, kind, memory)


def ranges(plan: Plan, replica: int = 0) -> list[tuple[str, int, int]]:
    return [
        (stage.device_id, stage.first_layer, stage.last_layer)
        for stage in plan.replicas[replica].stages
    ]


models = st.builds(
    model,
    layers=st.integers(1, 6),
    weight=st.integers(1, 12),
    kv=st.integers(0, 2),
    embed=st.integers(0, 12),
    tied=st.booleans(),
    state=st.integers(0, 3),
)
memories = st.lists(st.integers(0, 70), min_size=1, max_size=4)
workloads = st.builds(
    Workload,
    replicas=st.integers(1, 2),
    stages=st.integers(0, 3),
    slots=st.integers(1, 4),
    max_tokens=st.integers(1, 6),
    kv_tokens=st.integers(0, 24),
)


@given(models, memories, workloads)
@settings(max_examples=300, deadline=None)
def test_every_layer_once_in_order_and_memory_never_exceeded(
    needs: ModelProfile, sizes: list[int], wanted: Workload
) -> None:
    devices = [device(f"w{i}/d:0", size) for i, size in enumerate(sizes)]
    plan = place(devices, needs, wanted)
    assert plan == place(list(reversed(devices)), needs, wanted)
    assert bool(plan.infeasible_reason) == (len(plan.replicas) < wanted.replicas)
    assert 1 <= plan.slots <= wanted.slots
    assert plan.max_tokens <= plan.kv_tokens
    assert plan.kv_tokens <= (wanted.kv_tokens or plan.slots * plan.max_tokens)
    need = Need(
        needs, plan.slots, plan.max_tokens, plan.kv_tokens, workspace_bytes=PLACER.workspace_bytes
    )
    used: dict[str, int] = {}
    for replica in plan.replicas:
        stages = replica.stages
        layers = [
            layer for stage in stages for layer in range(stage.first_layer, stage.last_layer + 1)
        ]
        assert layers == list(range(len(needs.layers)))
        assert len({stage.device_id for stage in stages}) == len(stages)
        assert [stage.has_embed for stage in stages] == [i == 0 for i in range(len(stages))]
        assert [stage.has_head for stage in reversed(stages)] == [
            i == 0 for i in range(len(stages))
        ]
        if wanted.stages:
            assert len(stages) == min(wanted.stages, len(devices), len(needs.layers))
        for stage in stages:
            assert stage.memory_bytes == need.stage(stage.first_layer, stage.last_layer)
            used[stage.device_id] = used.get(stage.device_id, 0) + stage.memory_bytes
    assert all(used.get(d.id, 0) <= d.memory_bytes for d in devices)


@given(models, memories, st.integers(0, 3), st.integers(1, 4), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_a_plan_is_found_whenever_there_is_one(
    needs: ModelProfile, sizes: list[int], stages: int, slots: int, max_tokens: int
) -> None:
    devices = [device(f"w{i}/d:0", size) for i, size in enumerate(sizes)]
    plan = place(devices, needs, Workload(1, stages, slots, max_tokens))
    most = min(len(sizes), len(needs.layers))
    counts = [min(stages, most)] if stages else range(1, most + 1)

    def possible(count: int, slots: int) -> bool:
        need = Need(needs, slots, max_tokens, workspace_bytes=PLACER.workspace_bytes)
        cuts = (
            cut
            for cut in product(range(1, len(needs.layers) + 1), repeat=count)
            if sum(cut) == len(needs.layers)
        )
        return any(
            all(
                need.stage(sum(cut[:i]), sum(cut[: i + 1]) - 1) <= room
                for i, room in enumerate(order)
            )
            for cut in cuts
            for order in permutations(sizes, count)
        )

    feasible = [count for count in counts if possible(count, 1)]
    assert bool(plan.replicas) == bool(feasible), plan
    if feasible:
        assert len(plan.replicas[0].stages) == feasible[0]


@given(
    models,
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), min_size=2, max_size=6),
    st.integers(0, 5),
)
@settings(max_examples=300, deadline=None)
def test_the_devices_of_a_worker_hold_consecutive_layers(
    needs: ModelProfile, sizes: list[tuple[str, int]], stages: int
) -> None:
    devices = [device(f"{name}/d:{i}", size) for i, (name, size) in enumerate(sizes)]
    wanted = Workload(stages=stages, slots=1, max_tokens=1)
    plan = place(devices, needs, wanted)
    rest = [each for each in devices if each.id != devices[0].id]
    for made in (plan, place(rest, needs, wanted, plan)):
        for replica in made.replicas:
            visits = [stage.device_id.partition("/")[0] for stage in replica.stages]
            assert sorted(visits, key=visits.index) == visits


def test_ends_are_on_one_worker_only_with_all_that_is_between() -> None:
    # b's device has room for a layer, and for no end with its 8 bytes; it could only be between.
    sizes = {"a/d:0": 40, "a/d:1": 40, "b/d:0": 13}
    devices = [device(name, size) for name, size in sizes.items()]
    needs = model(layers=3, weight=10, kv=0, embed=8)
    plan = place(devices, needs, Workload(stages=3, max_tokens=1))
    assert not plan.replicas
    assert "each worker's devices side by side" in plan.infeasible_reason
    assert "it fits with stages 2" in plan.infeasible_reason
    assert ranges(place(devices, needs, Workload(stages=0, max_tokens=1))) == [
        ("a/d:0", 0, 1),
        ("a/d:1", 2, 2),
    ]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=7),
    st.lists(st.integers(0, 30), min_size=1, max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_a_split_is_the_most_even_one_that_fits(costs: list[int], capacities: list[int]) -> None:
    best = None
    for cut in product(range(1, len(costs) + 1), repeat=len(capacities)):
        if sum(cut) != len(costs):
            continue
        parts = [sum(costs[sum(cut[:i]) : sum(cut[: i + 1])]) for i in range(len(cut))]
        if all(part <= room for part, room in zip(parts, capacities, strict=True)):
            squares = sum(part**2 for part in parts)
            best = squares if best is None else min(best, squares)
    found = split(costs, costs, capacities)
    assert fits(costs, capacities) == (best is not None)
    assert (found is None) == (best is None)
    if found is not None:
        assert sum(sum(costs[a : b + 1]) ** 2 for a, b in found) == best


def test_wanted_stages_go_to_different_workers_evenly() -> None:
    devices = [device("a/d:0", 200), device("a/d:1", 200), device("b/d:0", 150)]
    plan = place(devices, model(), Workload(stages=2, max_tokens=1))
    assert ranges(plan) == [("a/d:0", 0, 3), ("b/d:0", 4, 7)]
    assert plan.slots == 8


def test_as_few_devices_as_fit_and_the_roomiest_first() -> None:
    plan = place([device("a/d", 60), device("b/d", 500)], model(), Workload(max_tokens=1))
    assert ranges(plan) == [("b/d", 0, 7)]
    wanted = Workload(max_tokens=1, slots=1)
    plan = place([device("a/d", 60), device("b/d", 80)], model(), wanted)
    assert ranges(plan) == [("a/d", 0, 3), ("b/d", 4, 7)]


def test_a_smaller_device_takes_fewer_layers() -> None:
    plan = place(
        [device("a/d", 30), device("b/d", 200)], model(), Workload(stages=2, max_tokens=1, slots=1)
    )
    assert ranges(plan) == [("a/d", 0, 1), ("b/d", 2, 7)]


def test_fewer_slots_where_the_wanted_ones_do_not_fit() -> None:
    # Weights and ends 93; a slot of 4 tokens takes 32.
    plan = place([device("a/d", 93 + 3 * 32 + 5)], model(), Workload(max_tokens=4))
    assert plan.slots == 3
    assert "3 slot(s) of 4 tokens instead of 8" in plan.explanation


def test_a_context_is_the_models_own_where_more_is_wanted() -> None:
    plan = place([device("a/d", 2000)], replace(model(), max_tokens=16), Workload(max_tokens=99))
    assert plan.max_tokens == 16
    assert "of 16 tokens instead of 99: the model takes no more" in plan.explanation


def test_a_tied_embedding_counts_on_both_ends_only_when_they_differ() -> None:
    tied = model(embed=20, tied=True)
    whole = place([device("a/d", 500)], tied, Workload(slots=1, max_tokens=1))
    assert whole.replicas[0].stages[0].memory_bytes == 8 * 11 + 20 + 3
    halves = place(
        [device("a/d", 500), device("b/d", 500)], tied, Workload(stages=2, slots=1, max_tokens=1)
    )
    assert [stage.memory_bytes for stage in halves.replicas[0].stages] == [4 * 11 + 20 + 3] * 2


def test_a_recurrent_state_counts_once_a_slot_however_long_the_context() -> None:
    needs = model(layers=2, kv=0, embed=0, state=7)
    workload = Workload(slots=5, max_tokens=60)
    plan = place([device("a", 3 + 2 * (10 + 3 * 7) + 1)], needs, workload)
    assert (plan.slots, plan.max_tokens) == (3, 60)
    (stage,) = plan.replicas[0].stages
    assert (stage.kv_bytes, stage.memory_bytes) == (2 * 3 * 7, 3 + 2 * (10 + 3 * 7))


def test_replicas_go_to_unused_devices() -> None:
    plan = place(
        [device("a/d", 900), device("b/d", 300)], model(), Workload(replicas=2, max_tokens=1)
    )
    assert [replica.stages[0].device_id for replica in plan.replicas] == ["a/d", "b/d"]


def test_a_device_that_holds_nothing_comes_first() -> None:
    busy = Device("a/d", "a", "a", "cpu", 500, num_stages=1)
    plan = place([busy, device("b/d", 200)], model(), Workload(max_tokens=1))
    assert ranges(plan) == [("b/d", 0, 7)]
    plan = place([busy, device("b/d", 20)], model(), Workload(max_tokens=1))
    assert ranges(plan) == [("a/d", 0, 7)]


def test_survivors_keep_their_layers_when_a_device_is_replaced() -> None:
    names = ("a/d", "b/d", "c/d")
    wanted = Workload(stages=2, max_tokens=1)
    before = place([device(name, 200) for name in names], model(), wanted)
    assert ranges(before) == [("a/d", 0, 3), ("b/d", 4, 7)]
    after = place([device("b/d", 200), device("c/d", 900)], model(), wanted, before)
    assert ranges(after) == [("c/d", 0, 3), ("b/d", 4, 7)]
    same = place([device(name, 300) for name in names], model(), wanted, before)
    assert ranges(same) == ranges(before)


def test_fewer_stages_when_fewer_devices_are_left() -> None:
    wanted = Workload(stages=2, max_tokens=1)
    before = place([device("a/d", 200), device("b/d", 200)], model(), wanted)
    after = place([device("b/d", 200)], model(), wanted, before)
    assert ranges(after) == [("b/d", 0, 7)]
    assert "1 stage(s) instead of 2: there are 1 device(s)" in after.explanation


def test_no_device_says_how_to_get_one() -> None:
    plan = place([], model(), Workload())
    assert not plan.replicas
    assert "start a worker" in plan.infeasible_reason


def test_less_kv_room_lets_more_sequences_run() -> None:
    needs = model(layers=2, weight=5, kv=1)
    devices = [device("w/d:0", 45)]
    assert place(devices, needs, Workload(slots=8, max_tokens=5)).slots == 2
    plan = place(devices, needs, Workload(slots=8, max_tokens=5, kv_tokens=10))
    assert (plan.slots, plan.kv_tokens) == (8, 10)
    assert "8 slot(s) of 5 tokens, 10 together" in plan.explanation


def test_what_is_missing_is_named_with_the_nearest_choices() -> None:
    plan = place([device("a/d", 110)], model(), Workload(max_tokens=4))
    assert not plan.replicas
    # 8 layers of 10 and 4 tokens of KV, two ends of 5, a workspace of 3: 125.
    assert "15 B (15 bytes) are missing" in plan.infeasible_reason
    assert "a/d 110 B" in plan.infeasible_reason
    assert "it fits with max_tokens 2 or with one more device with" in plan.infeasible_reason
    again = place([device("a/d", 110)], model(), Workload(max_tokens=2))
    assert again.replicas


def test_another_number_of_stages_is_offered_when_it_fits() -> None:
    devices = [device(f"{name}/d", 50) for name in "abc"]
    plan = place(devices, model(), Workload(stages=2, max_tokens=1))
    assert "stages 3" in plan.infeasible_reason
    assert place(devices, model(), Workload(stages=3, max_tokens=1)).replicas


def test_many_devices_are_planned() -> None:
    devices = [device(f"w{i:02}/d", 90) for i in range(64)]
    plan = place(devices, model(layers=80, weight=40), Workload(max_tokens=1, slots=1))
    assert len(plan.replicas[0].stages) == 40


def test_a_first_guess_of_speed_uses_what_was_measured() -> None:
    slow = device("a/d", 500, "cpu")
    fast = Device("b/d", "b", "b", "cpu", 500, flops_per_second=1e3, memory_bytes_per_second=1e2)
    plan = place([slow, fast], model(), Workload(stages=2, max_tokens=1))
    cost = first_guess(plan.replicas[0], model(), {"a/d": slow, "b/d": fast})
    # Stage 1, measured: 4 layers of 20 FLOPs; 4 layers and a head of 45 bytes to read.
    assert cost.per_token == approx(80 / 1e3 + 80 / 2e10)
    assert cost.weights == approx(45 / 1e2 + 40 / 1e10)
    assert cost.overhead == HOP_SECONDS
    assert cost.per_context > 0
    assert cost.per_pair > 0


def test_a_way_within_a_worker_is_taken_to_cost_nothing() -> None:
    devices = {name: device(name, 500, "cpu") for name in ("a/d:0", "a/d:1", "b/d:0")}
    plan = place(list(devices.values()), model(), Workload(stages=3, max_tokens=1))
    assert [stage.device_id for stage in plan.replicas[0].stages] == sorted(devices)
    cost = first_guess(plan.replicas[0], model(), devices)
    assert cost.overhead == HOP_SECONDS
    assert cost.weights == approx(85 / 1e10)
