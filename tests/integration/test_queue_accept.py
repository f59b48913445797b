"""Accepting a request: durable once, within limits."""

import time

from tests.support.queues import GATEWAY, REPLICA, Sides, append, finish, new_request
from uellm.streams.messages import Limits


async def test_an_accepted_request_waits_for_the_scheduler(sides: Sides) -> None:
    before = time.time()
    request = new_request(cost=7, prompt=[4, 5])
    result = await sides.gateway.accept(request, Limits())
    assert (result.status, result.request_id) == ("ok", request.request_id)
    assert before - 1 <= result.accepted_at <= time.time() + 1
    record = await sides.gateway.record(request.request_id)
    assert (record.state, record.generation, record.tokens) == ("QUEUED", 0, 0)
    assert list(record.payload.prompt_ids) == [4, 5]
    assert record.accepted_at == result.accepted_at
    (entry,) = await sides.read()
    assert entry.entry == request.entry
    assert (entry.generation, entry.offset, entry.attempts, entry.strikes) == (0, 0, 0, 0)
    assert entry.accepted_at == result.accepted_at
    assert await sides.queued_tokens() == 7


async def test_the_same_call_again_changes_nothing(sides: Sides) -> None:
    request = new_request()
    first = await sides.gateway.accept(request, Limits())
    assert await sides.gateway.accept(request, Limits()) == first
    assert len(await sides.read()) == 1
    assert await sides.queued_tokens() == 10
    assert await sides.unfinished() == 1


async def test_the_same_call_again_after_the_end_changes_nothing(sides: Sides) -> None:
    request = new_request(key="k")
    first = await sides.gateway.accept(request, Limits())
    assert await sides.cancel(request.request_id) == "CANCELLED"
    assert await sides.gateway.accept(request, Limits()) == first
    assert await sides.unrest() == []


async def test_an_idempotency_key_names_one_request(sides: Sides) -> None:
    first = await sides.accept(key="k", content="a")
    again = await sides.accept(key="k", content="a")
    assert again.status == "existing"
    assert (again.request_id, again.accepted_at) == (first.request_id, first.accepted_at)
    other = await sides.accept(key="k", content="b")
    assert other.status == "mismatch"
    assert len(await sides.read()) == 1


async def test_an_idempotency_key_is_its_tenants_own(sides: Sides) -> None:
    # The second pair would collide if tenant and key were merely joined.
    for tenant, key in (("a", "k"), ("b", "k"), ("c", "d:k"), ("c:d", "k"), ("c%3Ad", "k")):
        assert (await sides.accept(tenant=tenant, key=key, content=tenant)).status == "ok"
    assert len(await sides.read()) == 5


async def test_an_idempotency_key_lives_as_long_as_its_request(sides: Sides) -> None:
    request_id = (await sides.accept(key="k")).request_id
    key = f"{sides.keys.prefix}idem:local:k"
    assert await sides.redis.ttl(key) == -1
    await sides.cancel(request_id)
    assert await sides.redis.ttl(key) == await sides.redis.ttl(sides.keys.request(request_id)) > 0
    assert (await sides.accept(key="k")).status == "existing"
    # Past its retention the key names nothing, and may be used again, for other content too.
    await sides.redis.delete(sides.keys.request(request_id))
    again = await sides.accept(key="k", content="other")
    assert again.status == "ok"
    assert await sides.redis.ttl(key) == -1


async def test_each_limit_refuses_and_leaves_nothing_behind(sides: Sides) -> None:
    await sides.accept(tenant="a", cost=60)
    before = sorted(await sides.redis.keys("*"))
    for limits, tenant, status in (
        (Limits(waiting_requests=1), "b", "depth"),
        (Limits(waiting_tokens=100), "b", "tokens"),
        (Limits(tenant_requests=1), "a", "tenant"),
    ):
        refused = await sides.accept(limits, tenant=tenant, cost=41, key="k")
        assert refused.status == status
    assert sorted(await sides.redis.keys("*")) == before
    assert await sides.queued_tokens() == 60
    # At the limit, not over it; and another tenant's quota is its own.
    limits = Limits(waiting_requests=2, waiting_tokens=100, tenant_requests=1)
    assert (await sides.accept(limits, tenant="b", cost=40)).status == "ok"


async def test_room_comes_back_when_requests_leave_the_queue(sides: Sides) -> None:
    one = Limits(waiting_requests=1, waiting_tokens=10, tenant_requests=2)
    request_id = await sides.held(cost=10)
    assert (await sides.accept(one)).status == "ok"
    assert (await sides.accept(one)).status == "depth"
    await sides.say(append(request_id, 1, 0, [1]), finish(request_id, 1))
    assert (await sides.accept(one)).status == "depth"
    (waiting,) = await sides.read()
    await sides.cancel(waiting.entry.request_id)
    assert (await sides.accept(one)).status == "ok"


async def test_the_accepting_gateway_is_told_what_happens(sides: Sides) -> None:
    request_id = await sides.held(gateway=GATEWAY)
    silent = await sides.queued(gateway="")
    await sides.dispatch((silent, 0))
    await sides.say(append(request_id, 1, 0, [1]), append(silent, 1, 0, [2]))
    assert {entry.request_id for entry in await sides.events()} == {request_id}
    assert (await sides.gateway.record(silent)).replica == REPLICA
