"""Workloads, traces, platforms and predictors of the simulator."""

from pathlib import Path

import numpy as np
import pytest

from uellm.core.errors import InvalidArgumentError
from uellm.simulator.platforms import PLATFORMS, find_platform
from uellm.simulator.predictors import profiles
from uellm.simulator.traces import read_trace
from uellm.simulator.workloads import WORKLOADS, Arrivals, find_workload, generate

A100 = PLATFORMS["a100"]
HEAD = "arrival_s,prompt_tokens,output_tokens,deadline_s,ttft_s,tpot_s,class,tenant\n"


def drawn(name: str, rate: float = 1.0, cv: float = 1.0, seed: int = 1) -> list:  # type: ignore[type-arg]
    rng = np.random.default_rng(seed)
    return generate(WORKLOADS[name], A100, Arrivals(rate, cv), 20_000, rng)


def test_classes_lengths_and_gaps_are_as_described() -> None:
    requests = drawn("tier", rate=4.0, cv=3.0)
    kinds = {
        kind: [r for r in requests if r.kind == kind] for kind in ("interactive", "app", "batch")
    }
    shares = [len(found) / len(requests) for found in kinds.values()]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.02)
    medians = [float(np.median([r.output_tokens for r in found])) for found in kinds.values()]
    assert medians == pytest.approx([200, 100, 500], rel=0.05)
    gaps = np.diff([0.0, *(r.arrival for r in requests)])
    assert gaps.mean() == pytest.approx(0.25, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.1)
    t1 = A100.cost.unloaded
    assert {r.deadline for r in kinds["batch"]} == {15000 * t1}
    some = kinds["interactive"][0]
    assert some.tpot == 4 * t1
    assert some.ttft == pytest.approx(100 * t1 + 2 * A100.cost.prefill(some.prompt_tokens, 2048))


def test_runs_of_one_seed_differ_in_nothing_but_the_load() -> None:
    one, other = drawn("alpha"), drawn("alpha", rate=4.0)
    for a, b in zip(one, other, strict=True):
        assert a.arrival == pytest.approx(4 * b.arrival)
        assert (a.prompt_tokens, a.output_tokens, a.deadline) == (
            b.prompt_tokens,
            b.output_tokens,
            b.deadline,
        )
    assert one != drawn("alpha", seed=2)
    factors = {
        round(r.deadline / A100.cost.isolated(r.prompt_tokens, r.output_tokens, 2048), 6)
        for r in one
    }
    assert factors == {3, 5, 10}


@pytest.mark.parametrize("name", ["oracle", "b80", "class-mean"])
def test_predicted_quantiles_are_calibrated(name: str) -> None:
    requests = drawn("tier")
    found = profiles(name, requests, np.random.default_rng(2))
    for level in (0.1, 0.5, 0.9):
        below = [r.output_tokens <= found[r.request_id].output_tokens.at(level) for r in requests]
        assert np.mean(below) >= 0.99 if name == "oracle" else abs(np.mean(below) - level) < 0.1


def test_noise_is_confident_and_often_wrong() -> None:
    requests = drawn("alpha")
    for name, spread in (("noise", 1.0), ("noise:0.5", 0.5)):
        found = profiles(name, requests, np.random.default_rng(2))
        errors = [
            np.log(found[r.request_id].output_tokens.mean / r.output_tokens)
            for r in requests
            if 20 < r.output_tokens < 300
        ]
        assert np.std(errors) == pytest.approx(spread, rel=0.1)
        lengths = found[requests[0].request_id].output_tokens
        assert lengths.at(0.1) == lengths.at(0.9)


def test_four_in_five_buckets_are_right() -> None:
    requests = drawn("alpha")
    found = profiles("b80", requests, np.random.default_rng(2))
    right = [
        r.output_tokens.bit_length() - 1 == int(np.log2(found[r.request_id].output_tokens.at(0.5)))
        for r in requests
    ]
    assert np.mean(right) == pytest.approx(0.8, abs=0.02)


def test_a_trace_is_read_in_order_of_arrival(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(HEAD + "12,5,7,,,,,\n10.5,3,4,2.5,0.5,0.1,chat,acme\n")
    first, second = read_trace(path, load=2.0)
    assert (first.arrival, second.arrival) == (0.0, 0.75)
    assert (first.deadline, first.ttft, first.tpot) == (2.5, 0.5, 0.1)
    assert (first.kind, first.tenant, first.prompt_tokens) == ("chat", "acme", 3)
    assert (second.kind, second.tenant, second.deadline) == ("all", "local", None)
    assert [r.request_id for r in read_trace(path, most=1)] == ["r0000000"]
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n", encoding="utf-8-sig")
    assert read_trace(path)[0].kind == "all", "as spreadsheets write it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival_s,prompt_tokens\n1,2\n", "column output_tokens is missing"),
        ("arrival_s,prompt_tokens,output_tokens,deadline\n1,2,3,4\n", "is deadline_s meant?"),
        ("arrival_s,prompt_tokens,output_tokens,Class\n1,2,3,a\n", "is class meant?"),
        (
            "arrival_s,prompt_tokens,output_tokens,arrival_s\n1,2,3,4\n",
            "arrival_s is there 2 times",
        ),
        (HEAD, "has no requests"),
        (HEAD + "x,1,1,,,,,\n", "trace.csv:2: arrival_s: 'x' is not a number"),
        (HEAD + "0,1,1,,,,,\n0,1.5,1,,,,,\n", "trace.csv:3: prompt_tokens: '1.5' is not a whole"),
        (HEAD + "0,1,0,,,,,\n", "output_tokens: '0'"),
        (HEAD + "0,1,1,-3,,,,\n", "deadline_s: '-3' is not seconds above 0"),
        (HEAD + "0,1\n", "output_tokens: '' is not a number"),
        (HEAD + "1e308,1,1,,,,,\n", "trace.csv:2: arrival_s: '1e308' is not seconds"),
        (HEAD + "0,1,1,1e11,,,,\n", "trace.csv:2: deadline_s: '1e11' is not seconds"),
    ],
)
def test_a_bad_trace_is_refused_by_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError) as caught:
        read_trace(path)
    assert message in caught.value.message


def test_columns_of_other_things_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens,blocks_512,total_tokens\n1,2,3,4,5\n")
    assert read_trace(path)[0].output_tokens == 3


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"none.csv: No such file or directory$"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgumentError, match="no CSV file"):
        read_trace(tmp_path / "bytes.csv")


GOOD = "overhead=0.001\nweights=0.01\nper_token=0.0001\nkv_tokens=1000\nslots=8\nchunk_tokens=64\n"


def test_a_platform_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + "per_pair=1e-9\n")
    platform = find_platform(str(path))
    assert (platform.name, platform.slots, platform.cost.per_pair) == ("mine", 8, 1e-9)
    assert platform.block_tokens == 1
    assert find_platform("cpu") is PLATFORMS["cpu"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overhead = ", "mine.toml"),
        (GOOD.replace("weights=0.01\n", ""), "weights: missing"),
        (GOOD.replace("=8", "=0"), "slots: 0"),
        (GOOD.replace("=8", "=true"), "slots: True"),
        (GOOD.replace("=8", "=80"), "chunk_tokens: less than slots"),
        (GOOD.replace("0.01", "-1"), "weights: -1"),
        (GOOD.replace("0.01", "'x'"), "weights: 'x'"),
        (GOOD + "speed=3\n", "speed: not known"),
        (GOOD + "block_tokens=0\n", "block_tokens: 0"),
        (GOOD + "block_tokens=16\n", "kv_tokens: not whole blocks of 16 tokens"),
        ("overhead=0\nweights=0\nper_token=0\nkv_tokens=9\nslots=1\nchunk_tokens=4", "no time"),
    ],
)
def test_a_bad_platform_is_refused_by_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError) as caught:
        find_platform(str(path))
    assert message in caught.value.message


def test_unknown_names_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(InvalidArgumentError, match="a100, r3090, cpu"):
        find_platform("h100")
    with pytest.raises(InvalidArgumentError, match="alpha, tier, loose"):
        find_workload("beta")
    with pytest.raises(InvalidArgumentError, match="above 0"):
        drawn("alpha", rate=0.0)
    for name in ("magic", "b80:2", "noise:x", "noise:-1"):
        with pytest.raises(InvalidArgumentError, match="class-mean"):
            profiles(name, [], np.random.default_rng(0))
