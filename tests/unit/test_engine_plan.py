from hypothesis import given
from hypothesis import strategies as st
from uellm_worker.engine.plan import (
    Admission,
    Chunk,
    Copy,
    Release,
    StepPlan,
    StepResult,
    decode_plan,
    decode_result,
    encode_plan,
    encode_result,
)

from uellm.v1.common_pb2 import Sampling
from uellm.v1.inference_pb2 import TokenLogprobs

U32 = st.integers(0, 2**32 - 1)
SECONDS = st.lists(st.floats(0, 1e6), max_size=4).map(tuple)
CHUNKS = st.builds(Chunk, U32, U32, U32, st.booleans())
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.none() | U32,
    min_tokens=U32,
    temperature=st.none() | st.floats(0, 2, width=32),
    seed=st.none() | st.integers(0, 2**64 - 1),
    stop=st.lists(st.text(max_size=5), max_size=2),
)
ADMISSIONS = st.builds(Admission, U32, U32, SAMPLINGS, st.integers(-1, 255))
MOVES = st.builds(Release, U32, U32) | st.builds(Copy, U32, U32, U32).filter(
    lambda copy: copy.source != copy.slot
)
PLANS = st.builds(
    StepPlan,
    step=st.integers(0, 2**64 - 1),
    chunks=st.lists(CHUNKS, max_size=5).map(tuple),
    admissions=st.lists(ADMISSIONS, max_size=3).map(tuple),
    seconds=SECONDS,
    moves=st.lists(MOVES, max_size=4).map(tuple),
)
LOGPROBS = st.none() | st.builds(
    TokenLogprobs, logprob=st.floats(-9, 0, width=32), top_ids=st.lists(U32, max_size=3)
)


@given(PLANS, st.binary(max_size=20))
def test_plans_survive_the_wire(plan: StepPlan, behind: bytes) -> None:
    assert decode_plan(encode_plan(plan) + behind) == (plan, behind)


def test_token_ids_stay_on_stage_0() -> None:
    plan = StepPlan(0, (Chunk(0, 0, 3, True),), token_ids=(7, 8, 9))
    assert decode_plan(encode_plan(plan))[0].token_ids == ()


@given(st.data(), st.lists(st.integers(-1, 300_000), max_size=5), SECONDS)
def test_results_survive_the_wire(
    data: st.DataObject, tokens: list[int], seconds: tuple[float, ...]
) -> None:
    size = len(tokens)
    logprobs = data.draw(st.just([]) | st.lists(LOGPROBS, min_size=size, max_size=size))
    result = StepResult(tuple(tokens), logprobs, seconds)
    assert decode_result(encode_result(result)) == result
