"""`uellm plan`: on clusters by name, without a GPU and without a mesh."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from uellm import clusters
from uellm.cli.app import app
from uellm.cli.options import in_flags
from uellm.topology_file import load_topology

SMALL = ("--model", "llama-2-7b", "--topology", "3090x4", "--max-model-len", "1024")


def plan(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def planned(*arguments: str) -> dict[str, Any]:
    status, out = plan(*arguments, "--json")
    assert status == 0, out
    facts: dict[str, Any] = json.loads(out)
    return facts


def test_every_cluster_is_a_topology() -> None:
    assert len(clusters.names()) >= 8
    sizes = {name: len(clusters.cluster(name).devices) for name in clusters.names()}
    assert (sizes["dc64"], sizes["dc256"], sizes["mixed24"]) == (64, 256, 24)
    assert all(device.memory_bytes > 0 for device in clusters.kinds().values())


def test_a_plan_is_shown_with_its_proof_and_what_was_not_chosen() -> None:
    status, out = plan(*SMALL, "--slots", "2", "--explain")
    assert status == 0, out
    assert "0-31 +embed +head" in out
    assert "helr: the best there is" in out
    assert "best of 2" in out


def test_what_sets_the_pace_is_said_in_words() -> None:
    status, out = plan(*SMALL, "--stages", "4", "--in-flight", "1")
    assert status == 0, out
    assert "tokens/s, bound by how few batches are in flight" in out
    assert planned(*SMALL, "--stages", "4")["plan"]["replicas"][0]["prediction"]["bottleneck"]


def test_json_can_be_the_previous_plan(tmp_path: Path) -> None:
    first = planned(*SMALL, "--stages", "2")
    assert len(first["plan"]["replicas"][0]["stages"]) == 2
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(first))
    again = planned(*SMALL, "--stages", "2", "--previous", str(path))
    assert again["plan"]["moves"] == []
    gone = first["plan"]["replicas"][0]["stages"][0]["device_id"]
    after = planned(*SMALL, "--stages", "2", "--previous", str(path), "--exclude", gone)
    assert after["plan"]["moves"]


def test_the_plan_of_another_model_is_not_where_this_one_is(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(planned("--model", "llama-2-13b", *SMALL[2:])))
    status, out = plan(*SMALL, "--previous", str(path))
    assert (status, "previous: it ends with layer 39, and the model with 31" in out) == (2, True)


def test_full_stages_are_shown_beside_chains() -> None:
    told = (*SMALL, "--batch", "2", "--in-flight", "4", "--routing", "full_stage")
    status, out = plan(*told)
    assert status == 0, out
    assert "full-stage routing, for planning alone" in out
    assert re.search(r"[\d.]+ tokens/s with every device always busy; disjoint chains [\d.]+", out)
    found = planned(*told)["plan"]["full_stage"]
    # On equal devices they come to the same.
    assert found["tokens_per_second"] == pytest.approx(found["chain_tokens_per_second"])


def test_a_narrow_terminal_has_no_room_for_names_of_devices() -> None:
    told = ["plan", *SMALL]
    wide, narrow = (
        CliRunner().invoke(app, told, env={"COLUMNS": columns}).output for columns in ("200", "60")
    )
    assert "RTX 3090" in wide
    assert "RTX" not in narrow
    assert narrow.count("\n") == wide.count("\n")


def test_how_long_moved_layers_take_to_come_is_said(tmp_path: Path) -> None:
    told = ("--model", "llama-2-7b", "--topology", "mixed12", "--objective", "lr")
    path = tmp_path / "plan.json"
    first = planned(*told)
    path.write_text(json.dumps(first))
    _, out = plan(*told, "--previous", str(path))
    assert "moves " not in out
    used = [stage["device_id"] for stage in first["plan"]["replicas"][0]["stages"]]
    gone = {f"--exclude={device.partition('/')[0]}" for device in used}
    status, out = plan(*told, "--previous", str(path), *gone)
    assert status == 0, out
    assert re.search(r"moves 32 layers, 12\.\d GiB; [\d.]+ s where files come from those", out), out


def test_pins_costs_and_what_if() -> None:
    facts = planned(
        *SMALL, "--objective", "throughput", "--batch", "4", "--in-flight", "4",
        "--pin", "first=box/cuda:3", "--cost", "box/cuda:0=5",
        "--what-if", "remove=box/cuda:1", "--what-if", "add=RTX3090@other",
        "--what-if", "link=box/cuda:3~box,link=box~box",
    )  # fmt: skip
    assert facts["plan"]["replicas"][0]["stages"][0]["device_id"] == "box/cuda:3"
    fewer, more, free = facts["what_if"]
    assert free["change"] == "box/cuda:3~box free box~box free"
    assert free["figures"]["link_share"] == 0 < facts["figures"]["link_share"]
    now = facts["figures"]["tokens_per_second"]
    assert fewer["figures"]["tokens_per_second"] < now <= more["figures"]["tokens_per_second"]


def test_layers_are_pinned_to_a_host() -> None:
    told = ("--model", "llama-2-13b", "--topology", "mixed12", "--objective", "lr")
    free, pinned = planned(*told), planned(*told, "--pin", "4-11=t4-0", "--pin", "30-39=l4-1")
    (replica,) = pinned["plan"]["replicas"]
    on = {
        layer: stage["device_id"].partition("/")[0]
        for stage in replica["stages"]
        for layer in range(stage["first_layer"], stage["last_layer"] + 1)
    }
    assert {on[layer] for layer in range(4, 12)} == {"t4-0"}
    assert {on[layer] for layer in range(30, 40)} == {"l4-1"}
    proof = pinned["plan"]["certificate"]
    assert proof["value"] == pytest.approx(proof["bound"])
    assert proof["value"] > free["plan"]["certificate"]["value"]
    status, out = plan(*told, "--pin", "0-39=t4-0")
    assert status == 1
    assert "layers 0 to 39 on t4-0" in out
    assert "are missing" in out
    status, out = plan(*told, "--pin", "0-0=t4-0", "--pin", "2-2=l4-0", "--pin", "4-4=t4-0")
    assert status == 1
    assert "layers 0 to 0 on t4-0 and layers 2 to 2 on l4-0 and layers 4 to 4 on t4-0" in out


def test_what_does_not_fit_says_what_is_missing() -> None:
    status, out = plan("--model", "llama-2-70b", "--topology", "laptops", "--max-model-len", "512")
    assert status == 1
    assert "are missing" in out


def test_a_trace_says_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = [f"{i / 10},200,150" for i in range(1200)]
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    status, out = plan("--model", "llama-2-7b", "--topology", "3090x4", "--trace", str(path))
    assert status == 0, out
    assert "99% of this trace's minutes (10 requests/s of up to 200 + 150 tokens, 150 of the" in out
    assert "1 more RTX3090 would do" in out


@pytest.mark.parametrize(("arrivals", "rate"), [((0.0,), "1"), ((5.0, 5.0), "2"), ((0, 4), "0.5")])
def test_a_trace_of_a_moment_is_the_load_of_a_second(
    tmp_path: Path, arrivals: tuple[float, ...], rate: str
) -> None:
    path = tmp_path / "trace.csv"
    rows = "".join(f"{at},200,150\n" for at in arrivals)
    path.write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}")
    status, out = plan(*SMALL[:4], "--trace", str(path))
    assert status == 0, out
    assert f"({rate} requests/s of up to 200 + 150 tokens, 150 of the answer on average)" in out


def test_a_trace_in_other_units_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,2,2\n1e9,2,2\n")
    status, out = plan(*SMALL[:4], "--trace", str(path))
    assert status == 2
    assert "arrival_s: 1e+09 s from first to last; at most a year" in out


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    status, out = plan(*SMALL, "--stages", "3", "--plot", str(path))
    assert status == 0, out
    assert path.read_bytes().startswith(b"\x89PNG")
    drawn = path.with_suffix(".svg")
    assert plan(*SMALL, "--stages", "4", "--plot", str(drawn))[0] == 0
    found = drawn.read_text()
    # Texts are drawn as shapes, and named beside them.
    assert re.search(r"helr: 4 of 4 devices, [\d.]+ s a batch, [\d.]+ tokens/s", found)
    assert len(re.findall(r"layers \d+-\d+ -->", found)) == 4
    assert len(re.findall(r"ms, [\d.]+ GB/s -->", found)) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "llama-2-7b", "--topology", "nowhere"), "3090x4"),
        (("--model", "nobody", "--topology", "dgx1"), "llama-2-7b"),
        ((*SMALL, "--objective", "best"), "objective"),
        ((*SMALL, "--what-if", "more"), "add=KIND@HOST"),
        ((*SMALL, "--cost", "x"), "DEVICE=NUMBER"),
        ((*SMALL, "--previous", "/dev/null"), "uellm plan --json"),
        ((*SMALL, "--stages", "5"), "stages: 5; at most 4, with 4 devices for 32 layers"),
        ((*SMALL, "--stages", "4", "--exclude", "box/cuda:0"), "at most 3, with 3 devices"),
        ((*SMALL, "--prompt-tokens", "1024"), "prompt-tokens: 1024 and 1 of the answer"),
        ((*SMALL, "--prompt-tokens", "1000", "--output-tokens", "25"), "a context of 1024"),
        ((*SMALL[:4], "--max-model-len", "4097"), "max-model-len: 4097; at most 4096"),
        ((*SMALL, "--what-if", "add=999999999xT4@new"), "999999999 devices are added"),
        ((*SMALL, "--what-if", "add=0xT4@new"), "no kind of device '0xT4'"),
        ((*SMALL, "--what-if", "link=box~nowhere"), "no device, worker or host 'nowhere'"),
        ((*SMALL, "--what-if", "link=box"), "link=HOST~HOST*TIMES"),
        ((*SMALL, "--what-if", "link=box/cuda:1~box/cuda:1"), "a link has two ends"),
        ((*SMALL, "--trace", "/none.csv"), "trace: /none.csv: No such file"),
        ((*SMALL, "--routing", "ring"), "routing: 'ring' is none of chain, full_stage"),
        ((*SMALL, "--routing", "full_stage", "--objective", "even"), "not even"),
        ((*SMALL, "--routing", "full_stage", "--stages", "2"), "leave out pins and stages"),
    ],
)
def test_what_is_wrong_is_named(arguments: tuple[str, ...], says: str) -> None:
    status, out = plan(*arguments)
    assert status == 2, out
    assert says in out


def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("machines: []\n")
    status, out = plan("--model", "llama-2-7b", "--topology", str(path))
    assert status == 2
    assert 'no field named "machines"' in out
    assert out.count("\n") == 1


def test_a_file_that_is_no_plan_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG" + bytes(range(256)) * 1000)
    status, out = plan(*SMALL, "--previous", str(path))
    assert status == 2
    assert "is no plan" in out
    assert len(out) < 1000


def test_a_trace_that_a_context_does_not_hold_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,9000,100\n1,9000,100\n")
    status, out = plan(*SMALL, "--trace", str(path))
    assert status == 2
    assert "trace: 90 % of its prompts have up to 9000 tokens" in out


def test_clusters_are_files_that_can_be_copied(tmp_path: Path) -> None:
    source = Path(clusters.__file__).parent / "mixed12.yaml"
    copied = tmp_path / "mine.yaml"
    copied.write_text(source.read_text())
    assert load_topology(copied) == clusters.cluster("mixed12")


@pytest.mark.parametrize("cost", ["3090-0=nan", "3090-0=-1", "3090-0=inf", "3090-0", "=1"])
def test_a_cost_is_a_number_from_0_on(cost: str) -> None:
    status, out = plan(*SMALL, "--cost", cost)
    assert (status, f"cost: {cost!r} is not DEVICE=NUMBER" in out) == (2, True), out


def test_a_limit_is_a_duration_and_0_is_none() -> None:
    status, out = plan(*SMALL, "--slo", "10ms")
    assert (status, "no plan keeps the SLO of 0.01 s" in out) == (1, True), out
    assert plan(*SMALL, "--slo", "0")[0] == plan(*SMALL, "--slo", "1m")[0] == 0


def test_a_plan_that_misses_the_slo_says_so() -> None:
    for objective, missed in (("lr", True), ("throughput", False)):
        status, out = plan(*SMALL, "--objective", objective, "--slo", "10ms" if missed else "1m")
        assert (status, f"this misses --slo, which {objective}" in out) == (0, missed), out
    status, out = plan(*SMALL, "--objective", "he", "--slo", "10ms", "--json")
    assert (status, json.loads(out)["plan"]["slo_missed"]) == (0, True)


def test_reasons_name_flags_in_place_of_fields() -> None:
    _, out = plan(*SMALL, "--slo", "10ms")
    flag, told = out.split()[-2:]
    assert flag == "--slo"
    assert plan(*SMALL, flag, told)[0] == 0
    assert in_flags(
        "replica 3 with 1 sequence of 5 tokens needs 2 stage(s); it fits with max_tokens 5 or with "
        "replicas 2 or with stages 3 or with one more device with 2.0 GiB free"
    ) == (
        "replica 3 with 1 sequence of 5 tokens needs 2 stage(s); it fits with --max-model-len 5 or "
        "with --replicas 2 or with --stages 3 or with one more device with 2.0 GiB free"
    )
