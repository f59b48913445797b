"""Fused layers beside those of transformers."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from uellm_worker.engine.part import Part
    from uellm_worker.engine.recipes import recipe_of
    from uellm_worker.engine.shard_engine import load_stage, shard_specs

from uellm_worker.engine.plan import Chunk, StepPlan  # noqa: E402

from tests.support.families import BASE, FAMILIES, save_model  # noqa: E402
from uellm.v1.engine_pb2 import PrepareShard  # noqa: E402
from uellm.v1.topology_pb2 import ShardAssignment  # noqa: E402

LEFT_ALONE = {"gpt2", "gpt_neox", "gpt_neox-serial", "opt", "opt-projected"}
KNOWN = (
    *("gemma", "gemma2", "gemma3", "granite", "llama", "llama-mha", "llama-tied", "mistral"),
    *("mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm"),
    "starcoder2",
)
FUSED = {
    **{name: (name, {}) for name in KNOWN},
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "starcoder2-plain": ("starcoder2", {"use_bias": False}),
    "smollm3-no-rope": ("smollm3", {"no_rope_layers": [1, 0, 0, 1]}),
    "phi3-partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "gemma2-uncapped": ("gemma2", {"attn_logit_softcapping": None}),
}
# A chunk of each of two prompts, then decodes beside a chunk, in neighbouring slots and in others.
STEPS = [
    [Chunk(0, 0, 9, False), Chunk(1, 0, 14, True)],
    [Chunk(1, 14, 1, True), Chunk(0, 9, 6, True), Chunk(3, 0, 1, True)],
    [Chunk(0, 15, 1, True), Chunk(1, 15, 1, True), Chunk(3, 1, 1, True)],
]


def layer_part(directory: Path, layer: int) -> Part:
    assignment = ShardAssignment(
        stage_count=1, first_layer=layer, last_layer=layer, slots=4, max_tokens=40
    )
    specs = shard_specs(PrepareShard(assignment=assignment, model_dir=str(directory)))
    (part,) = load_stage(assignment, specs, {}, lambda *_: None).parts
    return part


def outputs(part: Part, hidden_size: int) -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    results = []
    for number, chunks in enumerate(STEPS):
        plan = StepPlan(number, tuple(chunks))
        rows = torch.randn(plan.rows, hidden_size, generator=generator)
        results.append(part.compute(plan, rows))
    return results


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_layer_is_that_of_transformers_but_for_rounding(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, fields = FUSED[name]
    monkeypatch.setitem(FAMILIES, name, (FAMILIES[family][0], FAMILIES[family][1] | fields))
    save_model(tmp_path, name)
    for layer in (0, 1):
        fused = layer_part(tmp_path, layer)
        assert fused.shard.fused is not None
        with monkeypatch.context() as patch:
            patch.setattr("uellm_worker.engine.shard.join_layers", lambda *_: None)
            plain = layer_part(tmp_path, layer)
        assert plain.shard.fused is None
        sizes = BASE["hidden_size"]
        for got, wanted in zip(outputs(fused, sizes), outputs(plain, sizes), strict=True):
            torch.testing.assert_close(
                got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())
            )


@pytest.mark.parametrize("family", sorted(LEFT_ALONE))
def test_what_is_not_described_is_left_to_transformers(family: str, tmp_path: Path) -> None:
    save_model(tmp_path, family)
    part = layer_part(tmp_path, 1)
    assert part.shard.fused is None
    assert all(torch.isfinite(rows).all() for rows in outputs(part, BASE["hidden_size"]))


def llama_layer() -> Any:
    config = transformers.LlamaConfig(**BASE)
    return transformers.models.llama.modeling_llama.LlamaDecoderLayer(config, 0)


class Wrapped(torch.nn.Linear):
    """As an adapter would have it."""


def wrap_query(layer: Any) -> None:
    layer.self_attn.q_proj = Wrapped(32, 32, bias=False)


def add_a_gate(layer: Any) -> None:
    layer.self_attn.gate = torch.nn.Linear(32, 32)


def add_a_norm(layer: Any) -> None:
    layer.third_norm = torch.nn.LayerNorm(32)


@pytest.mark.parametrize("change", [wrap_query, add_a_gate, add_a_norm])
def test_a_layer_that_holds_anything_else_is_left_alone(change: Callable[[Any], None]) -> None:
    layer = llama_layer()
    assert recipe_of(layer) is not None
    change(layer)
    assert recipe_of(layer) is None


def test_a_class_of_the_same_name_from_elsewhere_is_left_alone() -> None:
    layer = llama_layer()
    layer.__class__ = type("LlamaDecoderLayer", (type(layer),), {})
    assert recipe_of(layer) is None
