"""Compiled kernels against the plain formula in float64, and what happens where there are none."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from uellm_worker.engine import native, panels
from uellm_worker.engine.attention import attend
from uellm_worker.engine.native import Kernels, kernels
from uellm_worker.engine.packed import PackedStep
from uellm_worker.engine.plan import Chunk

CPU = torch.device("cpu")
MAX_TOKENS = 90


def loaded() -> Kernels:
    found = kernels(CPU, torch.float32)
    assert found is not None
    return found


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """Decodes, and how they attend."""

    lengths: list[int]
    kv_heads: int
    group: int
    head_dim: int
    window: int | None
    softcap: float | None
    scaling: float
    seed: int

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Of every second slot, the last first."""
        count = len(self.lengths)
        return tuple(
            Chunk(2 * (count - 1 - row), length, 1, True) for row, length in enumerate(self.lengths)
        )


cases = st.builds(
    Case,
    lengths=st.lists(st.integers(1, MAX_TOKENS - 1), max_size=5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 32, 64, 80]),
    window=st.none() | st.integers(1, MAX_TOKENS),
    softcap=st.none() | st.floats(0.5, 50),
    scaling=st.floats(0.01, 2),
    seed=st.integers(0, 1000),
)


def reference(
    case: Case, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """``[n, heads, head_dim]`` in float64, row by row."""
    rows = []
    for row, chunk in enumerate(case.chunks):
        end = chunk.start + 1
        first = max(end - case.window, 0) if case.window else 0
        seen = slice(first, end)
        key = keys[chunk.slot, :, seen].double().repeat_interleave(case.group, 0)
        value = values[chunk.slot, :, seen].double().repeat_interleave(case.group, 0)
        scores = torch.einsum("hd,htd->ht", query[row].double(), key) * case.scaling
        if case.softcap:
            scores = torch.tanh(scores / case.softcap) * case.softcap
        rows.append(torch.einsum("ht,htd->hd", torch.softmax(scores, -1), value))
    heads = case.kv_heads * case.group
    return torch.stack(rows).float() if rows else torch.empty(0, heads, case.head_dim)


@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_decodes_attend_as_the_formula_says(case: Case) -> None:
    numbers = torch.Generator().manual_seed(case.seed)
    heads = case.kv_heads * case.group
    shape = (2 * len(case.lengths) + 1, case.kv_heads, MAX_TOKENS, case.head_dim)
    keys, values = torch.randn(2, *shape, generator=numbers)
    # As a layer has them: keys and values lie behind the queries of a row.
    packed = torch.randn(len(case.lengths), heads + 2, case.head_dim, generator=numbers)
    query = packed[:, :heads]
    step = PackedStep(case.chunks, CPU, kernels=loaded())
    got = attend(step, query, keys, values, case.scaling, case.window, case.softcap)
    torch.testing.assert_close(got, reference(case, query, keys, values), rtol=2e-5, atol=2e-5)


def test_threads_share_the_sequences(threads: int) -> None:
    """Enough of them that all threads are woken, of lengths that differ; and one alone."""
    for lengths in ([600, 3, 50, 700, 20, 90, 411, 2], [650]):
        case = Case(lengths, 2, 2, 64, None, None, 0.125, threads)
        numbers = torch.Generator().manual_seed(1)
        keys, values = torch.randn(2, 2 * len(lengths), 2, 720, 64, generator=numbers)
        query = torch.randn(len(lengths), 4, 64, generator=numbers)
        step = PackedStep(case.chunks, CPU, kernels=loaded())
        got = attend(step, query, keys, values, case.scaling, None, None)
        torch.testing.assert_close(got, reference(case, query, keys, values), rtol=2e-5, atol=2e-5)


def test_numbers_behind_the_end_of_a_sequence_are_not_read() -> None:
    keys, values = torch.full((2, 1, 1, 64, 16), float("nan"))
    keys[:, :, :5], values[:, :, :5] = 1.0, 2.0
    step = PackedStep((Chunk(0, 4, 1, True),), CPU, kernels=loaded())
    got = attend(step, torch.ones(1, 1, 16), keys, values, None, None, None)
    torch.testing.assert_close(got, torch.full((1, 1, 16), 2.0))


def test_large_scores_do_not_overflow() -> None:
    keys, values = torch.randn(2, 1, 1, 64, 16)
    step = PackedStep((Chunk(0, 40, 1, True),), CPU, kernels=loaded())
    query = 1e4 * torch.randn(1, 1, 16)
    got = attend(step, query, keys, values, None, None, None)
    best = (keys[0, 0, :41] @ query[0, 0]).argmax()
    torch.testing.assert_close(got[0, 0], values[0, 0, best])


def test_heads_turn_and_find_their_place(threads: int) -> None:
    rows, heads, kv_heads, head_dim, pairs = 130, 4, 2, 16, 6
    numbers = torch.Generator().manual_seed(threads)
    packed = torch.randn(rows, heads + 2 * kv_heads, head_dim, generator=numbers)
    turns = torch.randn(rows, pairs, dtype=torch.complex64, generator=numbers)
    slots = torch.randint(0, 3, (rows,), generator=numbers)
    positions = torch.randperm(rows, generator=numbers)
    keys, values = torch.zeros(2, 3, kv_heads, rows, head_dim)
    wanted = packed.clone()
    turning = torch.view_as_complex(wanted.view(rows, -1, head_dim // 2, 2))
    turning[:, : heads + kv_heads, :pairs] *= turns[positions][:, None]
    given = packed.clone()
    loaded().place(given, turns, keys, values, slots, positions)
    torch.testing.assert_close(given, wanted)
    torch.testing.assert_close(keys[slots, :, positions], wanted[:, heads : heads + kv_heads])
    torch.testing.assert_close(values[slots, :, positions], wanted[:, heads + kv_heads :])
    loaded().place(packed, None, keys, values, slots, positions)
    torch.testing.assert_close(
        keys[slots, :, positions], packed[:, heads : heads + kv_heads], rtol=0, atol=0
    )


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16]),
    rows=st.integers(0, 20),
    out=st.integers(1, 70),
    size=st.integers(1, 600),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_panels_give_the_product_whatever_else_is_in_the_batch(
    dtype: torch.dtype, rows: int, out: int, size: int, bias: bool, seed: int
) -> None:
    if not panels.usable():
        pytest.skip("panels need AVX-512")
    numbers = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, size, generator=numbers).to(dtype).float()
    given = torch.randn(rows, size + 3, generator=numbers)[:, :size]
    added = torch.randn(out, generator=numbers) if bias else None
    laid = panels.in_panels(weight * 8, dtype, 1 / 8)
    addend = laid.addend(added)
    got = laid.product(given, addend)
    wanted = given.double() @ weight.double().T + (0 if added is None else added.double())
    # A sum of n products errs by at most n roundings of their magnitudes.
    room = 2**-24 * (size + 2) * (given.double().abs() @ weight.double().abs().T + 4)
    assert got.shape == (rows, out)
    assert ((got - wanted).abs() <= room).all()
    for row in range(rows):
        assert torch.equal(laid.product(given[row], addend), got[row])


def test_threads_share_the_panels(threads: int) -> None:
    if not panels.usable():
        pytest.skip("panels need AVX-512")
    numbers = torch.Generator().manual_seed(threads)
    weight = torch.randn(1000, 300, generator=numbers)
    given = torch.randn(50, 300, generator=numbers)
    laid = panels.in_panels(weight, torch.float32)
    got = laid.product(given, laid.addend(None))
    torch.testing.assert_close(got, given @ weight.T, rtol=1e-4, atol=1e-4)


def test_norms_and_gates_are_those_of_torch(threads: int) -> None:
    numbers = torch.Generator().manual_seed(threads)
    for rows, size in ((0, 8), (1, 5), (3, 64), (90, 700)):
        given = 3 * torch.randn(rows, 2 * size, generator=numbers)
        weight = torch.randn(2 * size, generator=numbers)
        wanted = torch.nn.functional.rms_norm(given, (2 * size,), weight, 1e-5)
        torch.testing.assert_close(loaded().norm(given, weight, None, 1e-5), wanted)
        gates, values = 30 * given[:, :size], given[:, size:]
        both = torch.cat((gates, values), 1)
        wanted = torch.nn.functional.silu(gates) * values
        torch.testing.assert_close(loaded().gate(both), wanted)


def test_what_is_not_a_number_comes_out() -> None:
    """The engine then gives no token, and wipes out what the slot holds."""
    keys, values = torch.ones(2, 1, 1, 64, 16)
    keys[0, 0, 3, 2] = float("nan")
    step = PackedStep((Chunk(0, 40, 1, True),), CPU, kernels=loaded())
    assert attend(step, torch.ones(1, 1, 16), keys, values, None, None, None).isnan().all()
    both = torch.tensor([[float("nan"), 1.0, 1.0, float("nan")]])
    assert loaded().gate(both).isnan().all()
    assert loaded().norm(both, torch.ones(4), None, 1e-5).isnan().all()


def test_other_dtypes_and_devices_have_none() -> None:
    assert kernels(CPU, torch.bfloat16) is None
    assert kernels(torch.device("meta"), torch.float32) is None


def test_without_numba_there_are_none_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "numba", None)
    native.load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert kernels(CPU, torch.float32) is None
            assert kernels(CPU, torch.float32) is None
        assert [record.message for record in caplog.records] == [
            "numba is not installed: decode steps on CPUs will be slower"
        ]
    finally:
        native.load.cache_clear()
