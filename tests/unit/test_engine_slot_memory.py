"""The memory of the KV cache: what lies in it, and how much of it is real."""

import mmap
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from uellm_worker.engine.plan import Copy, Move, Release  # noqa: E402
from uellm_worker.engine.slot_memory import SlotMemory, page_tokens  # noqa: E402

CPU = torch.device("cpu")
HEAD_DIM = mmap.PAGESIZE // 64  # A block is 16 tokens of 4 bytes a number, on any machine.
SLOT = st.integers(0, 2)
BLOCK_16 = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [1, 8, 24, 64, 80, 96, 100, 128, 256])
@BLOCK_16
def test_a_block_is_the_least_number_of_tokens_in_whole_pages(head_dim: int, dtype: object) -> None:
    tokens = page_tokens(head_dim, dtype, CPU)
    size = head_dim * dtype.itemsize  # type: ignore[attr-defined]
    assert tokens == next(n for n in range(16, 10**6) if n * size % mmap.PAGESIZE == 0)


def test_other_devices_allocate_everything_at_once() -> None:
    assert page_tokens(64, torch.float16, torch.device("cuda")) == 1


@BLOCK_16
@pytest.mark.parametrize(("block", "length"), [(1, 40), (16, 48), (24, 40), (32, 48)])
def test_pages_are_used_where_blocks_are_whole_pages(block: int, length: int) -> None:
    memory = SlotMemory(1, 2, 1, 40, HEAD_DIM, torch.float32, CPU, block)
    assert memory.keys[0].shape == (2, 1, length, HEAD_DIM)


@settings(deadline=None)
@given(
    st.sampled_from([1, 16]),
    st.lists(
        st.tuples(st.just("write"), SLOT, st.integers(0, 39), st.integers(1, 9))
        | st.tuples(st.just("copy"), SLOT, SLOT, st.integers(1, 40))
        | st.tuples(st.just("release"), SLOT, st.sampled_from([0, 16, 32, 48]), st.just(0)),
        max_size=12,
    ),
)
def test_moves_do_to_the_tensors_what_they_say(
    block: int, actions: list[tuple[str, int, int, int]]
) -> None:
    memory = SlotMemory(2, 3, 2, 40, HEAD_DIM, torch.float32, CPU, block)
    tensors = [*memory.keys, *memory.values]
    model = [torch.zeros(3, 2, 40, HEAD_DIM) for _ in tensors]
    for what, slot, number, value in actions:
        move: Move
        if what == "write":
            for index, (tensor, plain) in enumerate(zip(tensors, model, strict=True)):
                tensor[slot, :, number] = plain[slot, :, number] = value + index
            continue
        if what == "copy":
            if slot == number:
                continue
            move = Copy(number, slot, value)
            for plain in model:
                plain[slot, :, :value] = plain[number, :, :value]
        else:
            move = Release(slot, number)
            # Without pages, only what must not be seen again is wiped.
            if block > 1 or number == 0:
                for plain in model:
                    plain[slot, :, number:] = 0
        memory.carry_out([move])
    for tensor, plain in zip(tensors, model, strict=True):
        assert torch.equal(tensor[:, :, :40], plain)


def resident(tensors: Sequence[Any]) -> int:
    """Bytes of the memory that tensors lie in which are real, whatever else the process holds."""
    spans = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]
    total, theirs = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(number, 16) for number in found.groups())
            theirs = any(begin < stop and start < end for start, stop in spans)
        elif theirs and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@BLOCK_16
def test_memory_is_taken_when_written_and_given_back_when_released() -> None:
    heads, layers, tokens = 4, 2, 16 * 256
    token_bytes = 2 * layers * heads * HEAD_DIM * 4
    virtual = SlotMemory(layers, 1000, heads, tokens, HEAD_DIM, torch.float32, CPU, 16)
    tensors = (*virtual.keys, *virtual.values)
    before = resident(tensors)

    def taken() -> float:
        return (resident(tensors) - before) / token_bytes

    for tensor in tensors:
        # What is only read takes no memory.
        assert float(tensor[990, :, :1024].sum()) == 0
        tensor[7, :, :2048] = 1
    assert taken() == 2048
    virtual.carry_out([Copy(7, 999, 1024)])
    assert taken() == 3072
    virtual.carry_out([Release(7, 512)])
    assert taken() == 1536
    assert float(virtual.values[1][999, :, :1024].min()) == 1
    virtual.carry_out([Release(7, 0), Release(999, 0)])
    assert taken() == 0
