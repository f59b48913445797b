"""Benchmarks take the command lines that documents and their own docstrings give."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "benchmarks").glob("*.py"))
BENCHMARKS = [path.stem for path in MODULES if "parser_of(" in path.read_text()]
BENCHMARKS.remove("arguments")
WRITTEN = [
    ROOT / "Makefile",
    *MODULES,
    *sorted(
        p for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md") for p in ROOT.glob(pattern)
    ),
]
COMMAND = re.compile(r"(`)?python -m benchmarks\.(\w+)((?(1)[^`]|(?:\\\n|\n {8,}|[^\n`#]))*)")
"""To the end of its span of code; else to that of the line, or of indented lines that go on."""
COMMANDS = [
    pytest.param(module, rest, id=f"{path.relative_to(ROOT)}: {module}{' '.join(rest.split())}")
    for path in WRITTEN
    for _, module, rest in COMMAND.findall(path.read_text())
    if module not in ("NAME", "wires")
]


class ParsedError(Exception):
    """Carries what was parsed, before anything is measured."""


def parsed(
    monkeypatch: pytest.MonkeyPatch, module: str, arguments: list[str]
) -> argparse.Namespace:
    """What a benchmark reads from a command line.

    Raises:
        SystemExit: if it takes none such.
    """
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser) -> None:
        raise ParsedError(parse(parser))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(ParsedError) as found:
        importlib.import_module(f"benchmarks.{module}").main()
    options = found.value.args[0]
    assert isinstance(options, argparse.Namespace)
    return options


def given(rest: str, directory: Path) -> list[str]:
    """The arguments of a written command: the first of what it leaves open, and of alternatives."""
    text = rest.replace("\\\n", " ").split(" | ")[0].translate(str.maketrans("", "", "[]"))
    stands_for = {"N": "1", "DIR": str(directory), "FILE": "file.json", "TEXT": "text"}
    words = [word.partition("|")[0] for word in shlex.split(text)]
    return [stands_for.get(word, word) for word in words]


@pytest.mark.parametrize(("module", "rest"), COMMANDS)
def test_a_written_command_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, rest: str
) -> None:
    parsed(monkeypatch, module, given(rest, tmp_path))


NEEDED = {
    "engine": ["--random=small"],
    "pipeline": ["--random=small"],
    "probes": ["--random=small"],
    "profiler": ["--data=."],
    "profiler_burst": ["--pretrained=."],
    "step": ["--random=small"],
}


@pytest.mark.parametrize("module", BENCHMARKS)
def test_every_benchmark_can_print_json_and_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str
) -> None:
    needed = NEEDED.get(module, [])
    assert parsed(monkeypatch, module, [*needed, "--json"]).json is True
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", [module, *needed, "--no-such-option"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{module}").main()
    assert ended.value.code == 2
    usage = capsys.readouterr().err
    assert usage.startswith(f"usage: python -m benchmarks.{module} ")
    assert "--no-such-option" in usage


def test_every_benchmark_is_listed() -> None:
    table = (ROOT / "benchmarks" / "README.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    listed = re.findall(r"`(\w+)`", "\n".join(rows))
    assert sorted(listed) == BENCHMARKS


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("mesh", "--requests 0", "a whole number from 1 on"),
        ("mesh", "--latency-seconds nan", "a number above 0"),
        ("live_promises", "--loads 0.5,many", "'many': a number above 0"),
        ("engine", "--random small --engines shard,other", "'other': there are shard,"),
        ("goodput", "--platforms r3090,h9", "'h9' is neither one of"),
        ("goodput", "--workloads none", "'none' is neither one of"),
        ("probes", "--model /no/such/place", "/no/such/place: no such directory"),
        ("deployments", "--plans -1", "a whole number from 0 on"),
    ],
)
def test_what_makes_no_sense_is_said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    arguments: str,
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", [module, *arguments.split()])
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{module}").main()
    assert said in capsys.readouterr().err
