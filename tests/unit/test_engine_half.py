"""Weights in half precision: only where nothing is lost, and summed in float32."""

import warnings
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from uellm_worker.engine.half import HalfEmbedding, half_rows, half_weight
    from uellm_worker.engine.packing import PackedLinear, held_bytes, pack
    from uellm_worker.verification.pipeline import Pipeline, generate
    from uellm_worker.verification.reference import Reference

    from tests.support.families import prompts, save_model

from uellm.v1.common_pb2 import Sampling  # noqa: E402

if half_weight(torch.ones(2, 2)) is None:
    pytest.skip("this build of torch has no FBGEMM", allow_module_level=True)


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(1, 70),
    st.integers(1, 700),
    st.sampled_from([1, 3, 17]),
    st.sampled_from([1e-4, 0.02, 30.0]),
    st.booleans(),
)
def test_a_product_errs_no_more_than_one_in_float32(
    dtype: "torch.dtype", out: int, size: int, rows: int, scale: float, bias: bool
) -> None:
    numbers = torch.Generator().manual_seed(size)
    weight = (torch.randn(out, size, generator=numbers) * scale).to(dtype).float()
    inputs = torch.randn(1, rows, size, generator=numbers)
    added = torch.randn(out, generator=numbers) if bias else None
    half = half_weight(weight)
    assert half is not None
    whole = 2 * size * -(-out // 32) * 32  # Panels have 32 rows.
    assert half.nbytes in (2 * weight.numel(), whole)
    got = PackedLinear(half, added)(inputs)
    wanted = inputs.double() @ weight.double().T + (0 if added is None else added.double())
    # A sum of n products errs by at most n roundings of their magnitudes.
    room = 2**-24 * (size + 2) * (inputs.double().abs() @ weight.double().abs().T + 4)
    assert got.shape == (1, rows, out)
    assert ((got - wanted).abs() <= room).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
def test_looked_up_rows_are_the_stored_ones(dtype: "torch.dtype", scaled: bool) -> None:
    weight = torch.randn(9, 5).to(dtype).float() * 2**-7
    plain = torch.nn.Embedding(9, 5, _weight=weight)
    if scaled:
        plain.embed_scale = torch.tensor(5**0.5)
    held = half_rows(weight, shared=True)
    assert held is not None
    assert held.head is not None
    ids = torch.tensor([3, 8, 0, 3])
    wanted = weight[ids] * (plain.embed_scale if scaled else 1)
    assert torch.equal(HalfEmbedding(held, plain)(ids), wanted)


@pytest.mark.parametrize(
    "damage",
    [
        1 + 2**-12,  # a bit too many
        1e-30,  # too small beside the others
        1e38,  # too large beside the others
        float("nan"),
        float("inf"),
    ],
)
def test_what_would_change_stays_in_float32(damage: float) -> None:
    weight = torch.randn(80, 6).half().float()
    weight[79, 5] = damage
    assert half_weight(weight) is None
    assert half_rows(weight, shared=False) is None
    assert held_bytes(pack(weight)) >= 4 * weight.numel()


def test_zeros_are_held() -> None:
    half = half_weight(torch.zeros(3, 4))
    assert half is not None
    assert torch.equal(PackedLinear(half, None)(torch.ones(2, 4)), torch.zeros(2, 3))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_half_precision_is_served_exactly(
    family: str, dtype: "torch.dtype", tmp_path: Path
) -> None:
    save_model(tmp_path / "full", family)
    stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=dtype)
    stored.save_pretrained(tmp_path / "half")
    reference = Reference.load(tmp_path / "half", torch.float32)
    pipeline = Pipeline(tmp_path / "half", (1, 3), slots=4, max_tokens=96)
    shards = [part.shard for stage in pipeline.stages for part in stage.parts]
    if family != "qwen3_moe":  # Whose experts are not laid out.
        assert sum(s.held_bytes for s in shards) < 0.6 * sum(s.total_bytes for s in shards)
    whole = Pipeline(tmp_path / "half", (4,), slots=4, max_tokens=96)
    for made in (pipeline, whole):
        answers = generate(made.loop(), prompts(), partial(_greedy, 12))
        for prompt, answer in zip(prompts(), answers, strict=True):
            assert reference.compare(prompt, answer, 12).difference is None


def _greedy(count: int, _index: int) -> Sampling:
    return Sampling(max_tokens=count)
