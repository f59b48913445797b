"""How every service comes and goes, and what its callers see of its errors."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from redis.asyncio import Redis

from tests.support.service import NAME, Echo, EchoServicer, EchoSettings
from tests.support.waiting import HANG_SECONDS, eventually
from uellm.core.errors import ConfigurationError, NotFoundError, UnavailableError
from uellm.embedded import EmbeddedRedis, free_port
from uellm.rpc import channel, error_from
from uellm.service import Context, serve
from uellm.streams.registry import Registry
from uellm.v1 import topology_pb2, worker_pb2, worker_pb2_grpc

ROOT = Path(__file__).parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Running:
    """A service in this process."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stop = asyncio.Event()
        self.application: Echo | None = None
        self.address = ""
        self.task: asyncio.Task[None] | None = None

    def build(self, settings: EchoSettings) -> Callable[[Context], Echo]:
        def build(context: Context) -> Echo:
            self.application = Echo(settings, context, self.notes.append)
            return self.application

        return build

    async def end(self) -> None:
        self.stop.set()
        assert self.task is not None
        await self.task

    async def health(self, open_channel: grpc.aio.Channel, service: str = "") -> int:
        stub: Any = health_pb2_grpc.HealthStub(open_channel)
        request = health_pb2.HealthCheckRequest(service=service)
        return int((await stub.Check(request, timeout=HANG_SECONDS)).status)


@asynccontextmanager
async def running(url: str, **overrides: Any) -> AsyncIterator[Running]:
    service = Running()
    settings = EchoSettings.load(redis_url=url, host="127.0.0.1", service_id="echo-1", **overrides)
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    service.task = asyncio.create_task(
        serve(settings, service.build(settings), stop=service.stop, ready=ready.set_result)
    )
    try:
        either: set[asyncio.Future[Any]] = {service.task, ready}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if service.task.done():
            await service.task
        service.address = await ready
        yield service
    finally:
        service.stop.set()
        with contextlib.suppress(Exception):
            await service.task


# ---- coming and going ----------------------------------------------------------------------------


async def test_a_service_that_is_ready_serves_and_is_found(redis: Redis, redis_url: str) -> None:
    async with running(redis_url) as service, channel(service.address) as opened:
        assert service.notes == ["add", "start"]
        assert await service.health(opened) == SERVING
        assert await service.health(opened, NAME) == SERVING
        stub: Any = worker_pb2_grpc.WorkerServiceStub(opened)
        response = await stub.Probe(worker_pb2.ProbeRequest(payload=b"x"), timeout=HANG_SECONDS)
        assert response.payload == b"x"

        async def found() -> Any:
            return await Registry(redis).find("profiler")

        (address,) = await eventually(found)
        assert (address.service_id, address.address) == ("echo-1", service.address)


async def test_what_a_service_offers_can_be_asked(redis_url: str) -> None:
    async with running(redis_url) as service, channel(service.address) as opened:
        any_channel: Any = opened
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(any_channel)
        call = stub.ServerReflectionInfo(timeout=HANG_SECONDS)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = {entry.name for entry in (await call.read()).list_services_response.service}
        await call.done_writing()
        assert names == {
            NAME,
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }


async def test_a_service_goes_in_order(redis: Redis, redis_url: str) -> None:
    waits = {"drain_wait": HANG_SECONDS, "drain_seconds": HANG_SECONDS}
    async with running(redis_url, **waits) as service, channel(service.address) as opened:
        assert service.application is not None
        registry = Registry(redis)

        async def found() -> Any:
            return await registry.find("profiler")

        await eventually(found)
        stub: Any = worker_pb2_grpc.WorkerServiceStub(opened)
        request = worker_pb2.PrepareRequest(assignment=topology_pb2.ShardAssignment(replica="hold"))
        call = stub.Prepare(request, timeout=HANG_SECONDS)
        assert (await call.read()).loaded_bytes == 1
        service.stop.set()
        await eventually(lambda: "drain" in service.notes)
        # While it drains: not serving, off the registry, and what runs goes on.
        assert await service.health(opened) == NOT_SERVING
        assert await service.health(opened, NAME) == NOT_SERVING
        assert await registry.find("profiler") == []
        service.application.go_on.set()
        assert (await call.read()).loaded_bytes == 2
        assert await call.read() is grpc.aio.EOF
        service.application.drained.set()
        await service.end()
        assert service.notes == ["add", "start", "drain", "drained", "work ended", "close"]
        assert await registry.find("profiler") == []


async def test_draining_takes_no_longer_than_told(redis_url: str) -> None:
    async with running(redis_url, drain_wait=HANG_SECONDS, drain_seconds=0.2) as service:
        started = asyncio.get_running_loop().time()
        await service.end()
        assert asyncio.get_running_loop().time() - started < HANG_SECONDS / 2
        assert service.notes == ["add", "start", "drain", "work ended", "close"]


async def test_a_call_that_never_ends_does_not_hold_a_service_up(redis_url: str) -> None:
    async with (
        running(redis_url, drain_seconds=0.3) as service,
        channel(service.address) as opened,
    ):
        stub: Any = worker_pb2_grpc.WorkerServiceStub(opened)
        before = EchoServicer.waiting
        call = stub.Probe(worker_pb2.ProbeRequest(payload=b"wait"), timeout=60)
        await eventually(lambda: EchoServicer.waiting > before)
        await service.end()
        with pytest.raises(grpc.aio.AioRpcError):
            await call


async def test_a_background_task_that_fails_ends_the_service(redis_url: str) -> None:
    async def fail() -> None:
        raise ArithmeticError("of the task")

    async with running(redis_url) as service:
        assert service.application is not None
        assert service.task is not None
        service.application.context.spawn(fail(), "failing")
        with pytest.raises(ArithmeticError, match="of the task"):
            await asyncio.wait_for(service.task, HANG_SECONDS)
        assert service.notes[-3:] == ["drained", "work ended", "close"]


async def test_a_service_outlives_a_fault_in_what_is_one_models_and_says_so(
    redis: Redis, redis_url: str
) -> None:
    told: list[Exception] = []

    async def fail() -> None:
        raise ArithmeticError("of the task")

    async def said() -> tuple[str, ...]:
        (found,) = await Registry(redis).find("profiler")
        return found.faults

    async with running(redis_url) as service, channel(service.address) as opened:
        assert service.application is not None
        context = service.application.context
        context.aside(fail(), "work of one model", told.append)
        (fault,) = await eventually(said)
        assert fault.startswith("work of one model failed 1 time(s), last by ArithmeticError")
        assert [str(error) for error in told] == ["of the task"]
        assert await service.health(opened) == SERVING


async def test_a_loop_goes_on_after_a_fault(redis: Redis, redis_url: str) -> None:
    tries: list[bool] = []

    async def step() -> None:
        tries.append(True)
        if len(tries) < 3:
            raise ArithmeticError("twice")
        await asyncio.sleep(0.05)

    async def said() -> bool:
        return bool((await Registry(redis).find("profiler"))[0].faults)

    async def silent() -> bool:
        return not await said()

    async with running(redis_url) as service:
        assert service.application is not None
        context = service.application.context
        context.spawn(context.repeat(step, "test"), "repeating")
        await eventually(said)
        await eventually(lambda: len(tries) > 5)
        await eventually(silent)


async def test_a_loop_that_cannot_go_on_as_told_ends_the_service(redis_url: str) -> None:
    async def step() -> None:
        raise ConfigurationError("set it right")

    async with running(redis_url) as service:
        assert service.application is not None
        assert service.task is not None
        context = service.application.context
        context.spawn(context.repeat(step, "test"), "repeating")
        with pytest.raises(ConfigurationError, match="set it right"):
            await asyncio.wait_for(service.task, HANG_SECONDS)


async def test_a_service_that_fails_to_start_leaves_nothing_behind(
    redis: Redis, redis_url: str
) -> None:
    before = asyncio.all_tasks()
    with pytest.raises(ConfigurationError, match="told to fail"):
        async with running(redis_url, fail_start=True):
            pass
    assert await Registry(redis).find("profiler") == []
    assert asyncio.all_tasks() == before


async def test_a_service_outlives_redis(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        async with running(server.url) as service, channel(service.address) as opened:
            steps: list[str] = []
            assert service.application is not None
            context = service.application.context

            async def step() -> None:
                await context.redis.ping()
                steps.append("done")
                await asyncio.sleep(0.01)

            context.spawn(context.repeat(step, "test"), "repeating")
            await eventually(lambda: steps)
            await asyncio.to_thread(server.kill)
            steps.clear()
            assert await service.health(opened) == SERVING
            await asyncio.to_thread(server.start)
            await eventually(lambda: steps)
            client = Redis.from_url(server.url)

            async def found() -> Any:
                return await Registry(client).find("profiler")

            await eventually(found)
            await client.aclose()


# ---- as a process --------------------------------------------------------------------------------


@contextlib.contextmanager
def process(**environment: str) -> Iterator[subprocess.Popen[str]]:
    variables = {f"UELLM_{name.upper()}": value for name, value in environment.items()}
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.support.service"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "UELLM_HOST": "127.0.0.1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def _until(child: subprocess.Popen[str], line: str) -> list[str]:
    assert child.stdout is not None
    lines = []
    for text in child.stdout:
        lines.append(text.strip())
        if lines[-1].startswith(line):
            return lines
    raise AssertionError(f"it ended: {lines}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(redis_server: EmbeddedRedis, number: signal.Signals) -> None:
    with process(redis_url=redis_server.url) as child:
        # What was loaded is not collected any more: that would stop every call for a while.
        assert "settled" in _until(child, "127.0.0.1:")
        child.send_signal(number)
        out, errors = child.communicate(timeout=HANG_SECONDS)
        assert child.returncode == 0
        assert out.split("\n") == ["drain", "drained", "work ended", "close", ""]
        assert "Traceback" not in errors


def test_a_second_signal_forces(redis_server: EmbeddedRedis) -> None:
    with process(redis_url=redis_server.url, profiler_drain_wait="60") as child:
        _until(child, "127.0.0.1:")
        child.send_signal(signal.SIGTERM)
        _until(child, "drain")
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=HANG_SECONDS) == 1


def _one_line_of(child: subprocess.Popen[str]) -> str:
    out, errors = child.communicate(timeout=HANG_SECONDS)
    assert child.returncode == 2
    assert out.split() in ([], ["add", "start", "close"])
    lines = [line for line in errors.splitlines() if line.startswith("uellm ")]
    assert len(lines) == 1
    assert "Traceback" not in errors
    return lines[0]


def test_without_redis_one_line_says_so() -> None:
    port = free_port()
    with process(redis_url=f"redis://:secret@127.0.0.1:{port}/0") as child:
        line = _one_line_of(child)
    assert line.startswith(f"uellm profiler: no Redis at 127.0.0.1:{port}")
    assert "UELLM_REDIS_URL" in line
    assert "secret" not in line


def test_a_port_that_is_taken_is_named(redis_server: EmbeddedRedis) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with process(redis_url=redis_server.url, port=str(port)) as child:
            line = _one_line_of(child)
    assert f"cannot listen on 127.0.0.1:{port}" in line
    assert "UELLM_PROFILER_PORT" in line


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"redis_url": "http://x"}, "UELLM_REDIS_URL"),
        ({"port": "x"}, "port = 'x'"),
        ({"prot": "1"}, "UELLM_PROT: no such setting; did you mean UELLM_PORT?"),
        ({"config": "/does/not/exist"}, "/does/not/exist"),
    ],
)
def test_a_wrong_setting_is_one_line(environment: dict[str, str], said: str) -> None:
    with process(**environment) as child:
        assert said in _one_line_of(child)


def test_a_service_that_cannot_start_says_why_in_one_line(redis_server: EmbeddedRedis) -> None:
    with process(redis_url=redis_server.url, profiler_fail_start="true") as child:
        assert "told to fail" in _one_line_of(child)


# ---- errors over the wire ------------------------------------------------------------------------


@pytest.fixture
async def stub(redis_url: str) -> AsyncIterator[Any]:
    async with running(redis_url) as service, channel(service.address) as opened:
        yield worker_pb2_grpc.WorkerServiceStub(opened)


async def _raised(stub: Any, payload: bytes) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Probe(worker_pb2.ProbeRequest(payload=payload), timeout=HANG_SECONDS)
    return raised.value


async def _streamed(stub: Any, replica: str) -> grpc.aio.AioRpcError:
    request = worker_pb2.PrepareRequest(assignment=topology_pb2.ShardAssignment(replica=replica))
    received = []
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for response in stub.Prepare(request, timeout=HANG_SECONDS):
            received.append(response.loaded_bytes)
    assert received == [1, 2]
    return raised.value


async def test_an_error_comes_back_as_it_was_raised(stub: Any) -> None:
    for raised, field in (
        (await _raised(stub, b"not found"), "payload"),
        (await _streamed(stub, "not found"), "assignment.replica"),
    ):
        error = error_from(raised)
        assert isinstance(error, NotFoundError)
        assert (error.message, error.field, error.reason) == ("no such thing", field, "NOT_FOUND")


async def test_an_unexpected_error_leaks_nothing(stub: Any) -> None:
    for raised in (await _raised(stub, b"secret"), await _streamed(stub, "secret")):
        assert raised.code() is grpc.StatusCode.INTERNAL
        everything = f"{raised.details()} {raised.debug_error_string()} "
        everything += " ".join(f"{key} {value!r}" for key, value in raised.trailing_metadata())
        assert "secret" not in everything
        assert "RuntimeError" not in everything


async def test_a_lost_redis_is_unavailable_and_worth_another_try(stub: Any) -> None:
    error = error_from(await _raised(stub, b"redis"))
    assert isinstance(error, UnavailableError)
    assert error.retry_after_seconds
    assert "redis.internal" not in error.message


async def test_what_a_handler_says_itself_is_let_be(stub: Any) -> None:
    raised = await _raised(stub, b"abort")
    assert raised.code() is grpc.StatusCode.OUT_OF_RANGE
    assert raised.details() == "said by the handler"


async def test_a_deadline_is_kept(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Probe(worker_pb2.ProbeRequest(payload=b"wait"), timeout=0.1)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert isinstance(error_from(raised.value), UnavailableError)


async def test_a_method_that_is_not_served_is_unimplemented(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=HANG_SECONDS)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_bytes_that_are_no_message_are_refused(stub: Any, redis_url: str) -> None:
    async with running(redis_url) as service, channel(service.address) as opened:
        call: Any = opened.unary_unary(f"/{NAME}/Probe")
        with pytest.raises(grpc.aio.AioRpcError):
            await call(b"\xff\xff\xff", timeout=HANG_SECONDS)
        assert await service.health(opened) == SERVING
