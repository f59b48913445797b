"""The command line: what it understands, what it says, how it exits."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as RedisConnectionError
from typer.testing import CliRunner

from tests.support.checkpoints import write_checkpoint
from uellm import convert
from uellm.cli import exits
from uellm.cli.app import app
from uellm.cli.durations import parse_duration
from uellm.cli.mesh_address import gateways
from uellm.cli.promises import describe_end, describe_promise
from uellm.core.durations import show_duration
from uellm.core.errors import (
    ConfigurationError,
    NotFoundError,
    ResourceExhaustedError,
    UellmError,
    UnavailableError,
)
from uellm.mesh.state import MeshState
from uellm.v1 import common_pb2, inference_pb2

COMMANDS = [
    *("demo", "up", "serve", "generate", "chat", "cancel"),
    *("models", "health", "topology", "verify", "version", "simulate", "profiler"),
    *("why", "decisions", "replay", "deploy", "undeploy", "status"),
]
NOON = 1_700_000_000.0


@pytest.fixture(autouse=True)
def uellm_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("UELLM_SERVER", "UELLM_REDIS_URL", "UELLM_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UELLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("5s", 5), ("2m", 120), ("1h", 3600), ("1.5", 1.5)]
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5x", "-5s", "0s", "s", "1e9", "1000h", "5 s s", "nan"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_duration(text)


@given(st.floats(0.001, 600_000))
def test_a_duration_is_shown_near_its_value(seconds: float) -> None:
    number, unit = show_duration(seconds).split(" ")
    in_seconds = float(number) * {"ms": 0.001, "s": 1, "min": 60, "h": 3600}[unit]
    assert in_seconds == pytest.approx(seconds, rel=0.06, abs=0.0006)
    assert float(number) <= 1000, "a unit that reads best"


def test_help_names_every_command_and_status() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(f" {command} " in result.output for command in COMMANDS)
    assert "130" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from uellm.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'grpc', 'redis', 'pydantic', 'opentelemetry', 'numpy'}\n"
        "sys.exit(f'imported: {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    spent = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run(
            [sys.executable, "-c", program], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        spent.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert min(spent) < 1.0


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["generate", "hi", "--deadline", "5x"], exits.USAGE, "5x"),
        (["generate", "hi", "--max-tokens", "0"], exits.USAGE, "max-tokens"),
        (["generate", "hi"], exits.UNREACHABLE, "uellm up"),
        (["models"], exits.UNREACHABLE, "UELLM_SERVER"),
        (["models", "--server", "127.0.0.1:1"], exits.UNREACHABLE, "127.0.0.1:1"),
        (["cancel", "demo:x"], exits.UNREACHABLE, "uellm up"),
        (["health"], exits.UNREACHABLE, "UELLM_REDIS_URL"),
        (["health", "--redis", "nonsense"], exits.USAGE, "redis://"),
        (["policy", "list", "magic"], exits.USAGE, "available: cslo-odbs, edf"),
        (["policy", "show", "demo"], exits.UNREACHABLE, "UELLM_REDIS_URL"),
        (["policy", "set", "demo", "edf", "speed"], exits.USAGE, "`uellm policy list edf` shows"),
        (
            ["policy", "set", "demo", "edf", "watermark=0", "watermark=0.1"],
            exits.USAGE,
            "watermark: given twice",
        ),
        (["policy", "set", "demo", "edf", "class.x.y=1s"], exits.USAGE, "deadline, ttft, tpot"),
        (["policy", "set", "demo", "edf", "class.batch.ttft=x"], exits.USAGE, "no duration"),
        (["policy", "reset", "demo"], exits.UNREACHABLE, "uellm up"),
        (["topology"], exits.UNREACHABLE, "UELLM_REDIS_URL"),
        (["topology", "--redis", "nonsense"], exits.USAGE, "redis://"),
        (["topology", "--json", "--yaml"], exits.USAGE, "choose one"),
        (["topology", "--timeout", "soon"], exits.USAGE, "'soon'"),
        (["up", "--model", "/nonexistent"], exits.USAGE, "/nonexistent"),
        (["up", "--model", " "], exits.USAGE, "--model"),
        (["serve", "cook"], exits.USAGE, "cook"),
        (["up", "--workers", "0"], exits.USAGE, "workers"),
        (["up", "--max-model-len", "99999999"], exits.USAGE, "at most 1024"),
        (["up", "--objective", "cheapest"], exits.USAGE, "'cheapest' is none of helr"),
        (["deploy", "/m", "--replicas", "99999999999"], exits.USAGE, "replicas: 99999999999"),
        (["plan", "--model", "m", "--slots", f"{10**20}"], exits.USAGE, "--slots"),
        (["plan", "--model", "m", "--rate", "inf"], exits.USAGE, "--rate"),
        (["plan", "--model", "m", "--rate", "nan"], exits.USAGE, "--rate"),
        (["plan", "--model", "m", "--rate", "-1"], exits.USAGE, "--rate"),
        (["plan", "--model", "m", "--slo", "inf"], exits.USAGE, "--slo"),
        (["plan", "--model", "m", "--slo", "-1"], exits.USAGE, "--slo"),
        (["plan", "--model", "m", "--replicas", "99999999999"], exits.USAGE, "--replicas"),
        (["deploy", "/m", "--rate", "nan"], exits.USAGE, "--rate"),
        (["deploy", "/m", "--rate", "inf"], exits.USAGE, "--rate"),
        (["deploy", "/m", "--slo", "0"], exits.USAGE, "--slo"),
        (["generate", "hi", "--temperature", "nan"], exits.USAGE, "--temperature"),
        (["generate", "hi", "--temperature", "inf"], exits.USAGE, "--temperature"),
        (["simulate", "--cv", "nan"], exits.USAGE, "--cv"),
        (["up", "--port", "47999", "--host", "192.0.2.1"], exits.USAGE, "correct --host"),
        (["models", "--server", "localhost"], exits.USAGE, "not host:port"),
        (["models", "--server", "http://127.0.0.1:1"], exits.USAGE, "not host:port"),
        (["models", "--server", "127.0.0.1:1,127.0.0.1:99999"], exits.USAGE, "'127.0.0.1:99999'"),
        (["health", "--address", "nonsense"], exits.USAGE, "--address"),
        (["health", "--address", "127.0.0.1:1"], exits.UNREACHABLE, "no service answers"),
    ],
)
def test_errors_are_one_line_with_a_status(
    arguments: list[str], status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uellm.client.client.CONNECT_SECONDS", 0.2)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == status, result.output
    assert words in result.output
    assert "Traceback" not in result.output
    if result.output.startswith("uellm: "):
        assert result.output.count("\n") == 1


@pytest.mark.parametrize("address", ["127.0.0.1:1", "gateway-1.mesh:50051", "[::1]:50051"])
def test_addresses_are_taken_as_they_are(address: str) -> None:
    assert gateways(f" {address},,localhost:2 ") == [address, "localhost:2"]


def test_a_model_whose_tokenizer_cannot_be_read_is_not_started(
    tmp_path: Path,
) -> None:
    directory = write_checkpoint(tmp_path / "model")
    (directory / "tokenizer.json").write_text("{}")
    result = CliRunner().invoke(app, ["up", "--model", str(directory)])
    assert (result.exit_code, "not a tokenizer.json" in result.output) == (exits.USAGE, True)


def test_a_dead_mesh_is_told_from_none(uellm_home: Path) -> None:
    MeshState(999_999_999, ("127.0.0.1:1",), "redis://127.0.0.1:1/0").write(
        uellm_home / "logs" / "old"
    )
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == exits.UNREACHABLE
    assert "999999999 ran here is gone" in result.output


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigurationError("no Redis", field="redis_url"), 2, "redis_url: no Redis"),
        (NotFoundError("no request", field=""), 1, "no request"),
        (UnavailableError("gone", retry_after_seconds=1), 3, "gone"),
        (ResourceExhaustedError("full", retry_after_seconds=1.5), 1, "full (try again in 1.5 s)"),
    ],
)
def test_errors_in_words(error: UellmError, status: int, line: str) -> None:
    assert (exits.status_of(error), exits.explain(error)) == (status, line)


def a_promise(**fields: object) -> common_pb2.Promise:
    return common_pb2.Promise(finish_p90=convert.timestamp(NOON + 3.2), **fields)  # type: ignore[arg-type]


def test_a_promise_in_words() -> None:
    words = describe_promise(a_promise(p_meet=0.963))
    assert words.endswith(".2 (p90), 96 % sure to make it")
    assert words.startswith("ready by ")
    assert "3 ahead" in describe_promise(a_promise(queue_position=3))


def finished(at: float, *, met: bool) -> inference_pb2.Finished:
    return inference_pb2.Finished(
        reason=common_pb2.FINISH_REASON_STOP,
        usage=common_pb2.Usage(output_tokens=12),
        timings=common_pb2.Timings(
            accepted_at=convert.timestamp(NOON), finished_at=convert.timestamp(at)
        ),
        slo=common_pb2.SloVerdict(met=met, deadline_met=met),
    )


def test_what_became_of_a_promise_in_words() -> None:
    kept = describe_end(finished(NOON + 2.7, met=True), a_promise())
    assert "12 tokens in 2.7 s" in kept
    assert "promise kept" in kept
    assert "500 ms before the p90" in kept
    assert kept.endswith("deadline met")
    missed = describe_end(finished(NOON + 4.2, met=False), a_promise())
    assert "promise missed" in missed
    assert "1.0 s after" in missed
    assert missed.endswith("deadline missed")


def test_a_refusal_in_words() -> None:
    end = inference_pb2.Finished(
        reason=common_pb2.FINISH_REASON_REFUSED,
        failure=inference_pb2.Failure(reason="INFEASIBLE", message="not before 12:00"),
    )
    assert describe_end(end, None) == "refused: not before 12:00"


def test_policies_are_listed_with_their_settings() -> None:
    result = CliRunner().invoke(app, ["policy", "list", "--json"])
    assert json.loads(result.output)["slo-odbs"] == {"levels": ["dispatch", "step"]}
    result = CliRunner().invoke(app, ["policy", "list", "cslo-odbs", "--json"])
    found = {(row["level"], row["setting"]): row for row in json.loads(result.output)}
    assert found["step", "most_preemptions"]["default"] == "3"
    assert found["dispatch", "max_wait_seconds"]["description"]
    for arguments in (["policy", "list"], ["policy", "list", "s3"]):
        shown = CliRunner().invoke(app, arguments)
        assert (shown.exit_code, "…" in shown.output) == (0, False)


def test_what_is_no_fault_of_uellm_is_said_in_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UELLM_HOME", str(tmp_path))
    assert exits.report_fault(RedisConnectionError("closed by server")) == exits.UNREACHABLE
    assert "Redis went away meanwhile (closed by server)" in capsys.readouterr().err
    with pytest.raises(UnicodeEncodeError) as given:
        "a\udcff".encode()
    assert exits.report_fault(given.value) == exits.USAGE
    assert "is no UTF-8; give it in UTF-8" in capsys.readouterr().err
    assert exits.report_fault(ZeroDivisionError("oh")) == exits.FAILED
    assert "oh" in (tmp_path / "fault.txt").read_text()


def test_ctrl_c_before_there_is_a_command_leaves_no_trace() -> None:
    """The command line is being imported: a module that it needs is interrupted."""
    program = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from uellm.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (exits.INTERRUPTED, "")
