"""Recurrent states: however a sequence is cut into chunks, and whoever runs beside it."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uellm_worker.engine.plan import Chunk

from uellm.core.errors import ModelFilesError
from uellm.v1.engine_pb2 import PrepareShard
from uellm.v1.topology_pb2 import ShardAssignment

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from transformers.models.bamba.modeling_bamba import BambaMixer
    from uellm_worker.engine.attention import SlotCache
    from uellm_worker.engine.mamba2 import StateSpace
    from uellm_worker.engine.packed import PackedStep
    from uellm_worker.engine.recurrent import convolve, recur, scan
    from uellm_worker.engine.shard_engine import ShardEngine
    from uellm_worker.verification.pipeline import Pipeline

    from tests.support.families import save_model

SLOTS, WIDTH, TAPS = 3, 5, 4
CPU = torch.device("cpu")
Tensor = Any


@st.composite
def schedules(draw: st.DrawFn) -> list[list[tuple[int, int, int]]]:
    """Steps of (sequence, start, count) in row order: decodes first, by slot.

    Six sequences on three slots, so that each slot has two owners; some are preempted half-way,
    and begin again.
    """
    lengths = draw(st.lists(st.integers(1, 9), min_size=6, max_size=6))
    queues = [[0, 3], [1, 4], [2, 5]]
    done = [0] * 6
    preempted: set[int] = set()
    steps = []
    while any(queues):
        decodes, prefills = [], []
        for queue in queues:
            if not queue or draw(st.booleans()):
                continue
            sequence = queue[0]
            start = done[sequence]
            count = draw(st.integers(1, min(lengths[sequence] - start, 4)))
            part = (sequence, start, count)
            (decodes if count == 1 and start else prefills).append(part)
            done[sequence] += count
            if done[sequence] == lengths[sequence]:
                queue.pop(0)
            elif sequence not in preempted and draw(st.booleans()):
                preempted.add(sequence)
                done[sequence] = 0
        if decodes or prefills:
            steps.append(decodes + draw(st.permutations(prefills)))
    return steps


def packed(parts: list[tuple[int, int, int]]) -> PackedStep:
    chunks = (Chunk(sequence % SLOTS, start, count, True) for sequence, start, count in parts)
    return PackedStep(tuple(chunks), CPU)


def run(
    steps: list[list[tuple[int, int, int]]],
    rows: list[Tensor],
    compute: Callable[[Tensor, PackedStep], Tensor],
) -> Iterator[tuple[int, int, Tensor]]:
    """The output of every row of every step: sequence, position, row."""
    for parts in steps:
        inputs = torch.cat([rows[s][start : start + count] for s, start, count in parts])
        output = iter(compute(inputs, packed(parts)))
        for sequence, start, count in parts:
            for position in range(start, start + count):
                yield sequence, position, next(output)


@settings(deadline=None, max_examples=60)
@given(schedules(), st.integers(2, TAPS), st.booleans())
def test_a_convolution_in_chunks_is_that_of_the_whole(
    steps: list[list[tuple[int, int, int]]], taps: int, bias: bool
) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Conv1d(WIDTH, WIDTH, taps, groups=WIDTH, padding=taps - 1, bias=bias)
    rows = [torch.randn(9, WIDTH) for _ in range(6)]
    # What lay in the slots before must not matter, whatever it was.
    state = torch.full((SLOTS, taps - 1, WIDTH), float("nan"))
    with torch.inference_mode():
        wanted = [plain(r.T[None])[0, :, :9].T for r in rows]
        got = run(steps, rows, lambda inputs, step: convolve(inputs, plain, state, step))
        for sequence, position, row in got:
            torch.testing.assert_close(row, wanted[sequence][position])


@settings(deadline=None, max_examples=60)
@given(schedules())
def test_a_recurrence_in_chunks_is_that_of_the_whole(
    steps: list[list[tuple[int, int, int]]],
) -> None:
    torch.manual_seed(0)
    # Decays and inputs side by side, as one row.
    rows = [torch.cat([torch.rand(9, WIDTH), torch.randn(9, WIDTH)], 1) for _ in range(6)]
    state = torch.full((SLOTS, WIDTH), float("nan"))

    def compute(inputs: Tensor, step: PackedStep) -> Tensor:
        return recur(inputs[:, :WIDTH], inputs[:, WIDTH:], state, step)

    wanted = [one_by_one(r[:, :WIDTH], r[:, WIDTH:]) for r in rows]
    for sequence, position, row in run(steps, rows, compute):
        torch.testing.assert_close(row, wanted[sequence][position])


def one_by_one(decay: Tensor, inputs: Tensor) -> Tensor:
    hidden, rows = torch.zeros(inputs.shape[1]), []
    for factor, row in zip(decay, inputs, strict=True):
        hidden = factor * hidden + row
        rows.append(hidden)
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 100, 513])
def test_a_scan_is_the_recurrence_one_by_one(length: int) -> None:
    torch.manual_seed(length)
    decay, inputs = torch.rand(length, WIDTH) ** 0.05, torch.randn(length, WIDTH)
    torch.testing.assert_close(scan(decay, inputs), one_by_one(decay, inputs))


@settings(deadline=None, max_examples=40)
@given(schedules(), st.integers(1, 3))
def test_a_state_space_in_chunks_is_that_of_the_whole(
    steps: list[list[tuple[int, int, int]]], block_rows: int
) -> None:
    """Transformers computes each sequence as a whole, without a cache."""
    torch.manual_seed(0)
    config = transformers.BambaConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        mamba_n_heads=4,
        mamba_d_state=3,
        mamba_n_groups=2,
        mamba_d_conv=TAPS,
    )
    plain = BambaMixer(config, 0).eval().requires_grad_(False)
    plain.A_log.normal_()
    plain.dt_bias.normal_()
    rows = [torch.randn(9, 8) for _ in range(6)]
    channels = plain.conv_dim
    cache = SlotCache(0, SLOTS, 1, 9, 1, torch.float32, CPU)
    mixer = StateSpace(plain)
    states = ((SLOTS, TAPS - 1, channels), (SLOTS, 4, 4, 3))
    mixer.bind(cache, [torch.full(shape, float("nan")) for shape in states])

    def compute(inputs: Tensor, step: PackedStep) -> Tensor:
        cache.step = step
        return mixer(inputs[None])[0]

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr("uellm_worker.engine.mamba2._BLOCK_ROWS", block_rows)
        wanted = [plain(r[None])[0] for r in rows]
        for sequence, position, row in run(steps, rows, compute):
            torch.testing.assert_close(row, wanted[sequence][position], rtol=1e-4, atol=1e-5)


# ---- room ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of LFM2: convolution, attention, convolution, convolution."""
    directory = tmp_path_factory.mktemp("lfm2")
    save_model(directory, "lfm2")
    return directory


STATE = 2 * 32 * 4  # The last two inputs of 32 channels, in float32.
TOKEN = 2 * 2 * 8 * 4  # Keys and values, heads, head size, float32.


@pytest.mark.parametrize(
    ("first", "last", "kv_bytes", "slots", "max_tokens"),
    [
        (0, 3, 0, 4, 50),
        (0, 3, 4 * (3 * STATE + 50 * TOKEN), 4, 50),
        (0, 3, 4 * (3 * STATE + 50 * TOKEN) - 1, 3, 50),
        (0, 3, 3 * STATE + 7 * TOKEN, 1, 7),
        (2, 3, 4 * 2 * STATE, 4, 50),
        (2, 3, 2 * 2 * STATE, 2, 50),
        (1, 1, 3 * 50 * TOKEN, 3, 50),
    ],
)
def test_states_take_their_part_of_the_memory(
    hybrid: Path, first: int, last: int, kv_bytes: int, slots: int, max_tokens: int
) -> None:
    capacity = prepare(hybrid, first, last, kv_bytes).capacity
    assert (capacity.slots, capacity.max_tokens) == (slots, max_tokens)
    assert not capacity.sharing


@pytest.mark.parametrize("max_tokens", [25, 100, 128])
def test_stages_without_attention_agree_with_those_that_have_it(
    hybrid: Path, max_tokens: int
) -> None:
    whole, parts = (
        Pipeline(hybrid, split, max_tokens=max_tokens).capacity for split in ((4,), (1, 1, 1, 1))
    )
    assert whole == parts
    assert whole.max_tokens == max_tokens


@pytest.mark.parametrize(("first", "last"), [(0, 3), (2, 3)])
def test_memory_that_no_state_fits_is_refused(hybrid: Path, first: int, last: int) -> None:
    with pytest.raises(ModelFilesError, match="beside a state of"):
        prepare(hybrid, first, last, kv_bytes=2 * STATE - 1)


def prepare(directory: Path, first: int, last: int, kv_bytes: int) -> Any:
    assignment = ShardAssignment(
        stage_count=1,
        first_layer=first,
        last_layer=last,
        has_embed=first == 0,
        has_head=last == 3,
        slots=4,
        max_tokens=50,
        kv_bytes=kv_bytes,
    )
    command = PrepareShard(assignment=assignment, model_dir=str(directory), threads=1)
    return ShardEngine().prepare(command, lambda *_: None)
