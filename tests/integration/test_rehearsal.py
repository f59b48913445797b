"""What an agent does for a step, measured on steps of no replica on a real Redis: nothing stays."""

from redis.asyncio import Redis
from uellm_worker.rehearsal import Rehearsal

from uellm.streams.leader_queue import LeaderQueue
from uellm.v1 import engine_pb2, queue_pb2


def step(number: int) -> engine_pb2.StepReport:
    return engine_pb2.StepReport(
        outputs=[
            engine_pb2.SequenceOutput(request_id=f"-:{n}", generation=1, token_ids=[number])
            for n in range(4)
        ],
        report=queue_pb2.ReplicaReport(epoch=1, step=number, running=4),
    )


async def test_what_steps_take_is_measured_and_nothing_is_kept(redis: Redis) -> None:
    rehearsal = Rehearsal(LeaderQueue(redis, "-"))
    assert rehearsal.seconds == 0
    for number in range(30):
        await rehearsal.hear(step(number))
    # A call of a script takes some time of a processor, and not a tenth of a second.
    assert 1e-5 < rehearsal.seconds < 0.1
    assert not await redis.keys("*")


async def test_without_redis_nothing_is_measured(redis: Redis) -> None:
    away = Redis(host="127.0.0.1", port=1)
    rehearsal = Rehearsal(LeaderQueue(away, "-"))
    for number in range(3):
        await rehearsal.hear(step(number))
    assert rehearsal.seconds == 0
    await away.aclose()
