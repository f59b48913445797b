"""Traces of real services are given objectives, and what a platform cannot hold is left out."""

from pathlib import Path

import pytest

from benchmarks.traces import convert, is_trace, source_of
from uellm.simulator.platforms import PLATFORMS
from uellm.simulator.traces import read_trace

R3090 = PLATFORMS["r3090"]


@pytest.mark.parametrize("prompts", ["prompt_tokens", "input_tokens"])
def test_a_trace_is_given_objectives(tmp_path: Path, prompts: str) -> None:
    source, target = tmp_path / "real.csv", tmp_path / "prepared.csv"
    rows = ["0.5,100,20", f"0.6,{R3090.kv_tokens},1", "0.7,100,0", "0.9,30,40", "1.0,5,5"]
    source.write_text(f"arrival_s,{prompts},output_tokens\n" + "\n".join(rows))
    convert(source, target, R3090, 2, seed=0)
    first, second = read_trace(target)
    assert (first.prompt_tokens, first.output_tokens) == (100, 20)
    assert (second.prompt_tokens, second.output_tokens) == (30, 40)
    assert second.arrival == pytest.approx(0.4)
    assert all(each.deadline or (each.ttft and each.tpot) for each in (first, second))
    assert {first.kind, second.kind} <= {"interactive", "app", "batch"}


def test_a_trace_is_a_name_or_a_file(tmp_path: Path) -> None:
    assert is_trace("mooncake")
    assert is_trace("mine.csv")
    assert not is_trace("tier")
    assert source_of("mine.csv", None) == Path("mine.csv")
    assert source_of("mooncake", tmp_path).parent == tmp_path / "traces"
