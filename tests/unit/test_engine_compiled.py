"""Layers as one program of kernels: beside transformers' own, and what their results depend on."""

import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from uellm_worker.engine import panels
    from uellm_worker.engine.part import Part
    from uellm_worker.engine.shard_engine import load_stage, shard_specs

    from tests.support.families import FAMILIES, LAYERS, VOCAB, save_model

from uellm_worker.engine.plan import Chunk, StepPlan  # noqa: E402

from uellm.v1.engine_pb2 import PrepareShard  # noqa: E402
from uellm.v1.topology_pb2 import ShardAssignment  # noqa: E402

pytestmark = pytest.mark.skipif(not panels.usable(), reason="panels need AVX-512")

HIDDEN = 80
KERNEL_HEADS = {"hidden_size": HIDDEN, "num_attention_heads": 5, "num_key_value_heads": 1}
"""Heads of 16 numbers; products that end within a panel."""
WITH_EXPERTS = {"mixtral": {}, "qwen3_moe": {}}
COMPILED: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("gemma", "gemma2", "gemma3", "granite", "llama", "llama-tied")},
    "gemma3-untied": {"tie_word_embeddings": False},
    **{name: {} for name in ("mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "stablelm")},
    "llama-mha": {"num_key_value_heads": 5},
    "starcoder2": {},
    "stablelm-parallel": {"use_parallel_residual": True},
    "phi3-partial": {"partial_rotary_factor": 0.5},
    "smollm3-no-rope": {"no_rope_layers": [1, 0, 0, 1]},
}
# A chunk of each of two prompts, then decodes beside a chunk, in neighbouring slots and in others.
STEPS = [
    [Chunk(0, 0, 9, False), Chunk(1, 0, 14, True)],
    [Chunk(1, 14, 1, True), Chunk(0, 9, 6, True), Chunk(3, 0, 1, True)],
    [Chunk(0, 15, 1, True), Chunk(1, 15, 1, True), Chunk(3, 1, 1, True)],
    [Chunk(2, 0, 40, True), Chunk(1, 16, 1, True)],
]


def save(directory: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = name if name in FAMILIES else name.partition("-")[0]
    config, fields = FAMILIES[family]
    fields = fields | KERNEL_HEADS | {**COMPILED, **WITH_EXPERTS}[name]
    if "head_dim" in fields:
        fields["head_dim"] = 16
    monkeypatch.setitem(FAMILIES, name, (config, fields))
    save_model(directory, name)


def load(directory: Path, first: int = 0, last: int = LAYERS - 1, *, ends: bool = False) -> Part:
    assignment = ShardAssignment(
        stage_count=1,
        first_layer=first,
        last_layer=last,
        slots=4,
        max_tokens=64,
        has_embed=ends,
        has_head=ends,
    )
    specs = shard_specs(PrepareShard(assignment=assignment, model_dir=str(directory)))
    (part,) = load_stage(assignment, specs, {}, lambda *_: None).parts
    return part


def outputs(part: Part) -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    results = []
    for number, chunks in enumerate(STEPS):
        plan = StepPlan(number, tuple(chunks))
        results.append(part.compute(plan, torch.randn(plan.rows, HIDDEN, generator=generator)))
    return results


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layers_are_those_of_transformers_but_for_rounding(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, name, monkeypatch)
    part = load(tmp_path, 0, 1)
    assert part.shard.fused is not None
    assert part.shard.fused.compiled is not None
    with monkeypatch.context() as patch:
        patch.setattr("uellm_worker.engine.shard.join_layers", lambda *_: None)
        plain = load(tmp_path, 0, 1)
    assert plain.shard.fused is None
    for got, wanted in zip(outputs(part), outputs(plain), strict=True):
        room = 1e-5 * float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=room)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_layers_with_experts_are_fused_and_not_compiled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, name, monkeypatch)
    part = load(tmp_path, 0, 1)
    assert part.shard.fused is not None
    assert part.shard.fused.compiled is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Part:
    """All of a model with windows and norms all over; its head is in panels."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        save(directory, "gemma3-untied", patch)
    return load(directory, ends=True)


@pytest.mark.parametrize("name", ["gemma2", "llama-tied", "qwen2"])
def test_embedding_and_head_are_those_of_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, name, monkeypatch)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    part = load(tmp_path, ends=True)
    ids = [(5 * place) % (VOCAB - 3) + 3 for place in range(33)]
    plan = StepPlan(0, (Chunk(2, 0, len(ids), True),), token_ids=tuple(ids))
    got = part.compute(plan, None)
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0, -1:]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.fixture(scope="module", autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


PROMPTS = [[(7 * index + 3 * place) % (VOCAB - 3) + 3 for place in range(60)] for index in range(3)]
FIRST_SAMPLED = 40


@pytest.fixture(scope="module")
def wanted(whole: Part) -> list[list[Any]]:
    """Logits behind each of the last tokens of each prompt, decoded one by one by one thread."""
    torch.set_num_threads(1)
    found = []
    for prompt in PROMPTS:
        cuts = [0, *range(FIRST_SAMPLED, len(prompt) + 1)]
        plans = [
            StepPlan(0, (Chunk(0, begin, end - begin, begin > 0),), token_ids=(*prompt[begin:end],))
            for begin, end in pairwise(cuts)
        ]
        found.append([whole.compute(plan, None) for plan in plans][1:])
    return found


@pytest.mark.parametrize("seed", range(16))
def test_logits_depend_on_the_tokens_alone(whole: Part, wanted: list[list[Any]], seed: int) -> None:
    """Bit for bit: not on the batch, the cut of a prompt, the slot, nor the number of threads."""
    rng = Random(seed)  # noqa: S311
    torch.set_num_threads(1 + seed % 4)
    slots = rng.sample(range(4), len(PROMPTS))
    done = [0] * len(PROMPTS)
    while min(done) < len(PROMPTS[0]):
        shares = []
        for index, prompt in enumerate(PROMPTS):
            count = min(rng.choice([0, 1, 1, 1, 3, 8, 17, 60]), len(prompt) - done[index])
            if count:
                sample = done[index] + count > FIRST_SAMPLED
                shares.append((Chunk(slots[index], done[index], count, sample), index))
                done[index] += count
        if not shares:
            continue
        shares.sort(key=lambda share: (share[0].count > 1, share[0].slot))  # As steps have it.
        tokens = [
            token
            for chunk, index in shares
            for token in PROMPTS[index][chunk.start : chunk.start + chunk.count]
        ]
        plan = StepPlan(0, tuple(chunk for chunk, _ in shares), token_ids=tuple(tokens))
        got = whole.compute(plan, None)
        sampled = [(chunk, index) for chunk, index in shares if chunk.sample]
        assert got.shape == (len(sampled), VOCAB)
        for row, (chunk, index) in zip(got, sampled, strict=True):
            place = chunk.start + chunk.count - 1 - FIRST_SAMPLED
            assert torch.equal(row, wanted[index][place][0])
