"""One profiler learns for all: by a lease, in versions, over restarts."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from random import Random
from threading import Event
from typing import Any

import grpc
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from uellm_profiler import learning
from uellm_profiler.serving import MOST_WAITING, Serving
from uellm_profiler.store import PREFIX, Store

from tests.support.predictors import DUE, UNFITTED, Guess, Slow
from tests.support.profiler import learnt, profile_request, stub_of, teach
from tests.support.scheduling import MODEL, Mesh, profiler
from tests.support.waiting import HANG_SECONDS, eventually
from uellm.core.errors import ConfigurationError, InvalidArgumentError, ResourceExhaustedError
from uellm.core.request import LEVELS
from uellm.learning.store import save_predictor
from uellm.prediction import registry
from uellm.prediction.interface import (
    GREEDY,
    CompletionFacts,
    Prediction,
    PredictionRequest,
)
from uellm.prediction.prior import Prior
from uellm.prediction.states import unpack
from uellm.rpc import error_from
from uellm.streams.registry import Registry
from uellm.streams.scheduler_queue import SchedulerQueue
from uellm.v1 import profiler_pb2

CHALLENGE = 10


@pytest.fixture
async def mesh(redis: Any) -> Mesh:
    mesh = Mesh(redis)
    await mesh.deploy("r0", slots=100)
    return mesh


@pytest.fixture
def guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """The predictors of the tests, as a package would offer them."""
    named = {"guess": "Guess", "unfit": "unfit", "slow": "Slow"}
    points = EntryPoints(
        EntryPoint(name, f"tests.support.predictors:{attribute}", registry.GROUP)
        for name, attribute in named.items()
    )
    monkeypatch.setattr(registry, "entry_points", points.select)


@asynccontextmanager
async def guessing(redis_url: str, name: str = "a") -> AsyncIterator[Any]:
    options = {"predictor": "guess", "challenge_outcomes": CHALLENGE}
    async with profiler(redis_url, name, **options) as service, stub_of(service) as stub:
        yield stub


async def median(stub: Any, **fields: Any) -> float:
    answer = await stub.Profile(profile_request(max_tokens=100_000, **fields), timeout=HANG_SECONDS)
    return float(answer.items[0].profile.output_tokens.values[LEVELS.index(0.5)])


async def versions(stub: Any) -> list[profiler_pb2.PredictorVersion]:
    response = await stub.ListVersions(profiler_pb2.ListVersionsRequest(), timeout=HANG_SECONDS)
    return list(response.versions)


async def fitted(mesh: Mesh, stub: Any, length: int) -> None:
    """Teach until a version that expects ``length`` serves."""
    number = (await versions(stub))[-1].number

    async def served() -> bool:
        await teach(mesh, 5, output_tokens=length)
        return (await versions(stub))[-1].number > number

    await eventually(served)
    await eventually(lambda: _expects(stub, length))


async def _expects(stub: Any, length: int) -> bool:
    return await median(stub) == length


async def _kept(mesh: Mesh) -> bool:
    """Whether all that there is has been learnt for good."""
    places = json.loads(await mesh.redis.hget(f"{PREFIX}past", "places") or "{}")
    return (
        bool(places)
        and places[MODEL] == await SchedulerQueue(mesh.redis, MODEL).completions_place()
    )


async def test_when_the_learner_dies_another_learns_on_from_what_was_kept(
    mesh: Mesh, redis_url: str
) -> None:
    async with profiler(redis_url, "a") as first, stub_of(first) as one:
        await teach(mesh, 30, output_tokens=40)
        before = await learnt(one, 30)
        await eventually(partial(_kept, mesh))
        await first.kill()
    # What was learnt from is gone, as after a long time.
    await mesh.redis.delete(mesh.gateway.keys.completions)
    async with profiler(redis_url, "b") as second, stub_of(second) as other:
        assert await learnt(other, 30) == before
        await teach(mesh, 30, output_tokens=80)
        # The lease of the dead has to run out first.
        await learnt(other, 60)
        [version] = await versions(other)
    assert version.reason == "prior/2 learns from the beginning"


async def test_the_places_of_withdrawn_models_are_forgotten(
    mesh: Mesh, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "MOST_PLACES", 1)
    other = Mesh(mesh.redis, "other")
    await other.deploy("r1", slots=100)

    async def places() -> set[str]:
        return set(json.loads(await mesh.redis.hget(f"{PREFIX}past", "places") or "{}"))

    async def learnt_from(*models: Mesh) -> bool:
        for each in models:
            await teach(each, 1, output_tokens=40)
        return await places() == {each.model for each in models}

    async with profiler(redis_url):
        await eventually(lambda: learnt_from(mesh, other))
        await Registry(mesh.redis).withdraw("other")
        await eventually(lambda: learnt_from(mesh))


async def test_a_better_fit_becomes_a_version_and_can_be_rolled_back(
    mesh: Mesh, redis_url: str, guess: None
) -> None:
    async with guessing(redis_url) as stub:
        await eventually(lambda: versions(stub))
        assert await median(stub) == UNFITTED
        await fitted(mesh, stub, 50)
        first, second = await versions(stub)
        assert (first.number, second.number) == (1, 2)
        assert second.outcomes >= CHALLENGE
        assert second.loss < second.loss_before
        answer = await stub.Profile(profile_request(), timeout=HANG_SECONDS)
        assert answer.items[0].profile.predictor_version == "1.2"
        await stub.Rollback(profiler_pb2.RollbackRequest(number=1), timeout=HANG_SECONDS)
        await eventually(lambda: _expects(stub, int(UNFITTED)))
        latest = (await versions(stub))[-1]
        assert (latest.number, latest.reason) == (3, "rolled back to version 1")


async def test_versions_outlive_profilers(mesh: Mesh, redis_url: str, guess: None) -> None:
    async with guessing(redis_url) as stub:
        await eventually(lambda: versions(stub))
        await fitted(mesh, stub, 50)
        kept = await versions(stub)
    async with guessing(redis_url, "b") as stub:
        await eventually(lambda: _expects(stub, 50))
        assert await versions(stub) == kept


async def test_only_so_many_versions_are_kept(mesh: Mesh, redis_url: str, guess: None) -> None:
    async with guessing(redis_url) as stub:
        await eventually(lambda: versions(stub))
        await fitted(mesh, stub, 50)
        for latest in range(3, 12):
            earlier = profiler_pb2.RollbackRequest(number=latest - 2)
            await stub.Rollback(earlier, timeout=HANG_SECONDS)
            await eventually(partial(_serves, stub, latest))
        kept = await versions(stub)
    assert [version.number for version in kept] == list(range(4, 12))
    assert await mesh.redis.hlen("uellm:{:profilers}:states") == 8


async def _serves(stub: Any, number: int) -> bool:
    return (await versions(stub))[-1].number == number


@pytest.mark.parametrize("number", [0, 1, 99])
async def test_no_version_but_an_earlier_one_is_rolled_back_to(
    mesh: Mesh, redis_url: str, number: int
) -> None:
    async with profiler(redis_url) as service, stub_of(service) as stub:
        await eventually(lambda: versions(stub))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Rollback(profiler_pb2.RollbackRequest(number=number), timeout=HANG_SECONDS)
        found = error_from(raised.value)
        assert isinstance(found, InvalidArgumentError)
        assert "these are: none" in found.message


async def test_another_predictor_learns_from_what_is_still_there(
    mesh: Mesh, redis_url: str, guess: None
) -> None:
    async with profiler(redis_url) as service, stub_of(service) as stub:
        await teach(mesh, DUE, output_tokens=50)
        await learnt(stub, DUE)
    async with guessing(redis_url) as stub:
        await learnt(stub, DUE)
        assert [version.predictor for version in await versions(stub)] == ["prior", "guess"]


async def test_what_was_seen_of_a_prompt_comes_back_and_is_remembered(
    mesh: Mesh, redis_url: str, guess: None
) -> None:
    async with guessing(redis_url) as stub:
        answer = await stub.Profile(profile_request(text="four"), timeout=HANG_SECONDS)
        again = await stub.Profile(profile_request(text="four"), timeout=HANG_SECONDS)
    assert answer.items[0].features == again.items[0].features == b"4 characters"


async def test_a_prompt_that_comes_again_is_not_read_again() -> None:
    predictor = Guess()
    serving = Serving(predictor)
    request = PredictionRequest(MODEL, GREEDY, 3, 100, text="four")
    try:
        first = await serving.predict([request])
        second = await serving.predict([request])
    finally:
        serving.close()
    assert first == second
    assert [(asked.text, asked.features) for asked in predictor.seen] == [
        ("four", b""),
        ("", b"4 characters"),
    ]


async def test_calls_beyond_the_limit_are_refused_and_the_others_answered() -> None:
    serving = Serving(Prior())
    requests = [PredictionRequest(MODEL, GREEDY, 3, 100)] * (MOST_WAITING // 4)
    try:
        with pytest.raises(ResourceExhaustedError, match="start more profilers"):
            await serving.predict([*requests * 4, requests[0]])
        answers = await asyncio.gather(*(serving.predict(requests) for _ in range(4)))
    finally:
        serving.close()
    assert [len(answer) for answer in answers] == [len(requests)] * 4


class Reader(Guess):
    """Takes 10 ms for each prompt that it reads with care, and none for others."""

    now, seconds = 0.0, 0.01

    def __init__(self) -> None:
        super().__init__()
        self.careful: list[int] = []

    def predict_batch(self, requests: Sequence[PredictionRequest]) -> list[Prediction]:
        read = sum(not request.hurried and not request.features for request in requests)
        self.now += self.seconds * read
        self.careful.append(read)
        return super().predict_batch(requests)


def prompts(turn: int, count: int) -> list[PredictionRequest]:
    return [PredictionRequest(MODEL, GREEDY, 3, 9, text=f"{turn:03} {i:03}") for i in range(count)]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    made = Reader()
    monkeypatch.setattr("uellm_profiler.serving.time.perf_counter", lambda: made.now)
    return made


async def test_as_many_are_read_as_there_is_time_for_and_all_are_answered_in_time(
    reader: Reader,
) -> None:
    serving, took, read = Serving(reader), [], []
    try:
        for turn in range(40):
            began, before = reader.now, sum(reader.careful)
            found = await serving.predict(prompts(turn, 64), 0.1)
            # It has to learn how slow it is.
            assert all(found) or turn < 5
            took.append(reader.now - began)
            read.append(sum(reader.careful) - before)
        again = sum(reader.careful)
        await serving.predict(prompts(39, 1), 0.1)
    finally:
        serving.close()
    # Ten fit into 100 ms, in turns of four, and one of them is left for the way back.
    assert max(took[5:]) <= 0.1
    assert all(6 <= count <= 9 for count in read[10:])
    assert sum(reader.careful) == again


async def test_whoever_waits_for_as_long_as_it_takes_is_read(reader: Reader) -> None:
    serving = Serving(reader)
    try:
        found = await serving.predict(prompts(0, 300))
    finally:
        serving.close()
    assert all(found)
    assert sum(reader.careful) == 300


async def test_one_that_took_long_for_a_while_reads_again(reader: Reader) -> None:
    serving = Serving(reader)
    try:
        reader.seconds = 5.0
        for turn in range(5):
            await serving.predict(prompts(turn, 1))
        reader.seconds = 0.01
        for turn in range(5, 60):
            await serving.predict(prompts(turn, 1), 0.1)
    finally:
        serving.close()
    assert not all(reader.careful)
    assert all(reader.careful[-5:])


async def test_who_comes_too_late_is_told_so_at_once() -> None:
    serving = Serving(Prior())
    request = PredictionRequest(MODEL, GREEDY, 3, 100)
    try:
        assert await serving.predict([request], 0.001) == [None]
        assert all(await serving.predict([request], 10.0))
    finally:
        serving.close()


async def test_whoever_waits_no_longer_is_not_worked_for() -> None:
    predictor, begun, go_on = Guess(), Event(), Event()

    class Held(Guess):
        def predict_batch(self, requests: Sequence[PredictionRequest]) -> list[Prediction]:
            begun.set()
            assert go_on.wait(HANG_SECONDS)
            return predictor.predict_batch(requests)

    serving = Serving(Held())

    def asked(text: str) -> list[PredictionRequest]:
        return [PredictionRequest(MODEL, GREEDY, 3, 9, text=text)]

    try:
        first = asyncio.create_task(serving.predict(asked("one")))
        await asyncio.to_thread(begun.wait, 10)
        gone, stays = (asyncio.create_task(serving.predict(asked(t))) for t in ("two", "three"))
        await asyncio.sleep(0)
        gone.cancel()
        go_on.set()
        await asyncio.gather(first, stays)
    finally:
        serving.close()
    assert [request.text for request in predictor.seen] == ["one", "three"]


async def test_a_learner_that_is_stopped_keeps_all_that_it_learnt(
    mesh: Mesh, redis_url: str
) -> None:
    async with profiler(redis_url, "a", keep_seconds=0.2) as service, stub_of(service) as stub:
        await teach(mesh, 30, output_tokens=40)
        await learnt(stub, 30)
        await service.drain()
    assert await _kept(mesh)


async def test_what_it_is_learning_while_it_is_stopped_is_kept_once_and_whole(
    mesh: Mesh, redis_url: str, guess: None
) -> None:
    Slow.observing.clear()
    Slow.may.clear()
    async with profiler(redis_url, predictor="slow") as service:
        await teach(mesh, 5, output_tokens=40)
        await eventually(Slow.observing.is_set)
        draining = asyncio.create_task(service.drain())
        done, _ = await asyncio.wait([draining], timeout=0.3)
        assert not done
        Slow.may.set()
        await draining
    past = unpack(await mesh.redis.hget(f"{PREFIX}past", "state"))
    places = json.loads(await mesh.redis.hget(f"{PREFIX}past", "places"))
    unread = await mesh.redis.xrange(mesh.gateway.keys.completions, f"({places[MODEL]}")
    assert len(past["lengths"]) + len(unread) == 5
    assert len(past["lengths"]) > 0


async def test_a_fit_that_fails_leaves_what_serves(mesh: Mesh, redis_url: str, guess: None) -> None:
    options = {"predictor": "unfit", "challenge_outcomes": CHALLENGE}
    async with profiler(redis_url, **options) as service, stub_of(service) as stub:
        for taught in (DUE, 2 * DUE, 3 * DUE):
            await teach(mesh, DUE, output_tokens=50)
            await learnt(stub, taught)
        assert await median(stub) == UNFITTED
        assert len(await versions(stub)) == 1


async def test_a_version_that_could_not_be_kept_is_kept_later(
    mesh: Mesh, redis_url: str, guess: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, refused = Store.keep, []

    async def away_once(self: Store, *arguments: Any) -> None:
        if len(await self.versions()) == 1 and not refused and arguments[-1] is not None:
            refused.append(arguments[-1].number)
            raise RedisConnectionError("away")
        await keep(self, *arguments)

    monkeypatch.setattr(Store, "keep", away_once)
    async with guessing(redis_url) as stub:
        await eventually(lambda: versions(stub))
        await fitted(mesh, stub, 50)
        assert refused == [2]
        assert [version.number for version in await versions(stub)] == [1, 2]


async def test_a_profiler_begins_with_what_was_trained(
    mesh: Mesh, redis_url: str, tmp_path: Path
) -> None:
    trained = Prior()
    for _ in range(50):
        trained.observe(CompletionFacts(MODEL, GREEDY, 3, 70))
    save_predictor(tmp_path, trained)
    async with profiler(redis_url, pretrained=str(tmp_path)) as service, stub_of(service) as stub:
        assert await median(stub) == 70
        await learnt(stub, 50)
        await teach(mesh, 5, output_tokens=70)
        await learnt(stub, 55)
    with pytest.raises(ConfigurationError, match="holds 'prior', and predictor is 'text'"):
        async with profiler(redis_url, predictor="text", pretrained=str(tmp_path)):
            pass


async def test_the_default_learns_from_words(mesh: Mesh, redis_url: str) -> None:
    """From nothing: short questions, long stories, told apart by their words alone."""
    options = {"predictor": "text", "challenge_outcomes": 40}
    async with profiler(redis_url, **options) as service, stub_of(service) as stub:
        shapes = {"What is {} plus {}?": 4, "Tell a long story about {} and {}.": 300}
        rng = Random(1)  # noqa: S311

        async def ask(shape: str) -> profiler_pb2.ProfiledItem:
            text = shape.format(rng.randint(1, 99), rng.randint(1, 99))
            request = profile_request(text=text, prompt_tokens=9, max_tokens=4000)
            return (await stub.Profile(request, timeout=HANG_SECONDS)).items[0]

        async def told_apart() -> bool:
            for shape, length in shapes.items():
                item = await ask(shape)
                spread = round(length * rng.uniform(0.8, 1.25))
                fields = {"features": item.features, "prompt_tokens": 9}
                await teach(mesh, 1, output_tokens=spread, **fields)
            short, long = [(await ask(s)).profile.output_tokens.values for s in shapes]
            return bool(short[LEVELS.index(0.5)] < 8 and long[LEVELS.index(0.5)] > 200)

        await eventually(told_apart, 240)
