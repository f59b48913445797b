"""Attention by pages: what is asked of the kernel is what attention is, and a bad one is not used.

The kernel itself runs on CUDA devices only; what its documentation says stands in for it.
"""

import warnings
from typing import Any

import pytest

from tests.support.flash import documented

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers")
    from uellm_worker.engine.attention import attend
    from uellm_worker.engine.packed import PackedStep
    from uellm_worker.engine.plan import Chunk
    from uellm_worker.engine.varlen import Spans, agrees, attend_spans, kernel, usable

CPU = torch.device("cpu")
CHUNKS = (Chunk(0, 12, 1, True), Chunk(1, 3, 1, True), Chunk(3, 0, 9, True), Chunk(2, 5, 6, False))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_pages_are_attended_to_as_slots_are(window: int | None, kv_heads: int) -> None:
    torch.manual_seed(0)
    keys, values = (torch.randn(4, 16, kv_heads, 8).transpose(1, 2) for _ in range(2))
    query = torch.randn(sum(chunk.count for chunk in CHUNKS), 4, 8)
    spans = Spans(CHUNKS, CPU)
    given = attend_spans(documented, spans, query, keys, values, 0.3, window)
    keys, values = keys.contiguous(), values.contiguous()
    plain = attend(PackedStep(CHUNKS, CPU), query, keys, values, 0.3, window, None)
    torch.testing.assert_close(given, plain)


def test_a_kernel_that_is_right_is_found_right() -> None:
    assert agrees(documented, CPU, torch.float32, 16)


@pytest.mark.parametrize("damage", ["window", "length", "page"])
def test_a_kernel_that_is_wrong_is_found_out(damage: str) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        if damage == "window":
            kwargs["window_size"] = (-1, 0)
        elif damage == "length":
            kwargs["seqused_k"] = kwargs["seqused_k"] - (kwargs["seqused_k"] > 20).int()
        else:
            kwargs["block_table"] = kwargs["block_table"].flip(0)
        return documented(*args, **kwargs)

    assert not agrees(wrong, CPU, torch.float32, 16)


def test_torch_offers_the_kernel_with_these_arguments() -> None:
    flash = kernel()
    if flash is None:
        pytest.skip("this torch has no varlen attention")
    # There is none for CPUs; that is said only after the arguments were found to be in order.
    with pytest.raises(NotImplementedError, match=r"_flash_attention_forward.*CPU"):
        agrees(flash, CPU, torch.bfloat16, 16)


def test_the_cpu_and_float32_take_the_plain_path() -> None:
    assert not usable(CPU, torch.bfloat16, 64)
    assert not usable(torch.device("cuda", 0), torch.float32, 64)
