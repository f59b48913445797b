"""LoRA adapters chosen per request, against peft's own model; see ``uellm_worker.engine.lora``."""

import json
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    from uellm_worker.engine import panels
    from uellm_worker.engine.lora import LoraLinear, rows_by_adapter
    from uellm_worker.engine.shard_engine import ShardEngine
    from uellm_worker.verification.pipeline import Pipeline, generate
    from uellm_worker.verification.reference import Reference
    from uellm_worker.verification.report import verify

from uellm_worker.engine.plan import Admission, Chunk, StepPlan  # noqa: E402

from tests.support.families import BASE, FAMILIES, LAYERS, save_model  # noqa: E402
from tests.support.quantizing import Recipe, quantize_checkpoint  # noqa: E402
from uellm.core.errors import ModelFilesError  # noqa: E402
from uellm.models.adapters import with_adapters  # noqa: E402
from uellm.models.profile import read_profile  # noqa: E402
from uellm.v1.common_pb2 import Sampling  # noqa: E402
from uellm.v1.engine_pb2 import AddSequence, PrepareShard  # noqa: E402
from uellm.v1.topology_pb2 import ShardAssignment  # noqa: E402

CONTEXT, TOKENS = 64, 12
ADAPTERS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "attention": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "all": {"r": 6, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True},
        "uneven": {
            "r": 2,
            "target_modules": ["o_proj", "down_proj", "k_proj"],
            "rank_pattern": {"down_proj": 5, r"layers\.1\.self_attn\.k_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.o_proj": 11, "k_proj": 1.5},
            "layers_to_transform": [0, 1, 3],
        },
    },
    "gpt2": {
        "attention": {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        "mlp": {"r": 3, "target_modules": ["c_fc", "mlp.c_proj"], "fan_in_fan_out": True},
    },
    "phi3": {"fused": {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj"]}},
    "lfm2": {"mixed": {"r": 3, "target_modules": ["in_proj", "out_proj", "q_proj", "w1"]}},
    "recurrent_gemma": {"mixed": {"r": 3, "target_modules": ["linear_x", "linear_out", "q_proj"]}},
    "falcon": {"fused": {"r": 4, "target_modules": ["query_key_value", "dense"]}},
    "stablelm": {"some": {"r": 3, "target_modules": ["k_proj", "up_proj", "down_proj"]}},
}
PROMPTS = [[5], [7, 8, 9] * 7, [11, 12, 13], [20] * 30, [3, 4], [40, 41, 42, 43], [9] * 15]
Made = tuple[Path, dict[str, Path]]


def config_of(family: str, **fields: Any) -> Any:
    name, own = FAMILIES[family]
    return getattr(transformers, name)(**{**BASE, **own, **fields})


def adapter_of(directory: Path, base: Any, seed: int, **fields: Any) -> Path:
    """Save an adapter with random weights, made and written by peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(base)
        made = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if ".lora_" in name:
                    parameter.normal_(0, 0.25)
        made.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """By family: the checkpoint's directory, and its adapters' by name."""
    made: dict[str, Made] = {}

    def get(family: str) -> Made:
        if family not in made:
            torch.set_num_threads(1)
            directory = tmp_path_factory.mktemp(family)
            save_model(directory, family)
            made[family] = (
                directory,
                {
                    name: adapter_of(directory / name, config_of(family), seed, **fields)
                    for seed, (name, fields) in enumerate(ADAPTERS[family].items(), 1)
                },
            )
        return made[family]

    return get


def greedy(_index: int) -> Sampling:
    return Sampling(max_tokens=TOKENS)


@pytest.mark.parametrize("family", ADAPTERS)
def test_a_batch_of_all_adapters_is_what_peft_computes(
    family: str, checkpoint: Callable[[str], Made]
) -> None:
    """Split, chunked, and preempted once each; see ``verify``."""
    directory, adapters = checkpoint(family)
    for split in ((4,), (1, (1, 1), 1)):
        pipeline = Pipeline(directory, split, slots=4, max_tokens=CONTEXT, adapters=adapters)
        result = verify(
            pipeline, Reference.load(directory, torch.float32, adapters), PROMPTS, TOKENS
        )
        assert result.exact, result
        assert result.preemptions >= len(adapters)
        assert {report.adapter for report in result.prompts} == {"", *adapters}


@pytest.mark.skipif(not panels.usable(), reason="panels need AVX2 or AVX-512")
@pytest.mark.parametrize("quantised", [False, True])
def test_layers_with_adapters_are_compiled(
    quantised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact as well; and a row's logits are the same bit for bit, whoever is beside it."""
    torch.set_num_threads(2)
    name, own = FAMILIES["llama"]
    heads = {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1}
    monkeypatch.setitem(FAMILIES, "llama-kernels", (name, own | heads))
    directory = tmp_path / "model"
    save_model(directory, "llama-kernels")
    adapters = {
        adapter: adapter_of(tmp_path / adapter, config_of("llama-kernels"), seed, **fields)
        for seed, (adapter, fields) in enumerate(ADAPTERS["llama"].items(), 1)
    }
    if quantised:
        coded = tmp_path / "coded"
        directory = quantize_checkpoint(directory, coded, Recipe("gptq", group_size=16))
    pipeline = Pipeline(directory, (LAYERS,), slots=4, max_tokens=CONTEXT, adapters=adapters)
    ((part,),) = (stage.parts for stage in pipeline.stages)
    assert part.shard.fused is not None
    assert part.shard.fused.compiled is not None
    if not quantised:
        reference = Reference.load(directory, torch.float32, adapters)
        assert verify(pipeline, reference, PROMPTS, TOKENS).exact
    alone = {}
    for adapter in range(-1, len(adapters)):
        admitted = (Admission(0, 9, Sampling(), adapter),)
        plan = StepPlan(0, (Chunk(0, 0, 9, True),), admitted, tuple(range(5, 14)))
        alone[adapter] = part.compute(plan, None)[0].clone()
    orders = [[-1, 0, 1, 2], [2, 1, 1, 0], [0, -1, -1, 1]]
    for order in orders:
        admitted = tuple(Admission(slot, 9, Sampling(), a) for slot, a in enumerate(order))
        chunks = tuple(Chunk(slot, 0, 9, True) for slot in range(4))
        together = part.compute(StepPlan(0, chunks, admitted, tuple(range(5, 14)) * 4), None)
        for row, adapter in zip(together, order, strict=True):
            assert torch.equal(row, alone[adapter])
    assert len({tuple(row.tolist()) for row in alone.values()}) == len(alone)


def test_each_adapter_answers_in_a_batch_as_alone_and_unlike_the_others(
    checkpoint: Callable[[str], Made],
) -> None:
    directory, adapters = checkpoint("llama")
    pipeline = Pipeline(directory, (3, 1), slots=8, max_tokens=CONTEXT, adapters=adapters)
    names = ["", *adapters, "", *adapters]
    prompt = PROMPTS[1]
    together = generate(pipeline.loop(), [prompt] * len(names), greedy, adapters=names)
    assert together[: len(names) // 2] == together[len(names) // 2 :]
    assert len({tuple(answer) for answer in together}) == len(adapters) + 1
    for name, answer in zip(names[:4], together, strict=False):
        assert generate(pipeline.loop(), [prompt], greedy, adapters=[name]) == [answer]
    plain = Pipeline(directory, (4,), slots=8, max_tokens=CONTEXT)
    assert generate(plain.loop(), [prompt], greedy) == [together[0]]


def test_a_slot_forgets_the_adapter_of_its_last_owner(checkpoint: Callable[[str], Made]) -> None:
    directory, adapters = checkpoint("llama")
    pipeline = Pipeline(directory, (2, 2), slots=1, max_tokens=CONTEXT, adapters=adapters)
    loop = pipeline.loop()
    alone = generate(loop, PROMPTS[1:2], greedy)
    assert generate(loop, PROMPTS[1:2], greedy, adapters=["all"]) != alone
    assert generate(loop, PROMPTS[1:2], greedy) == alone


def test_steps_and_rows_without_adapter_are_left_to_the_layer() -> None:
    class Step:
        groups: tuple[Any, ...] = ()

    class Refusing:
        def add(self, *_: Any) -> None:
            raise AssertionError("nothing is to be added")

    base = torch.nn.Linear(4, 4)
    step: Any = Step()
    linear = LoraLinear(base, {0: Refusing()}, step)  # type: ignore[dict-item]
    rows = torch.ones(1, 3, 4)
    assert torch.equal(linear(rows), base(rows))
    step.groups = ((1, slice(0, 2)),)  # an adapter without a part in this layer
    assert torch.equal(linear(rows), base(rows))


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(-1, 3)), max_size=8).map(
        lambda parts: [(slot, count, adapter) for slot, (count, adapter) in enumerate(parts)]
    )
)
def test_rows_are_grouped_by_adapter(parts: list[tuple[int, int, int]]) -> None:
    chunks = [Chunk(slot, 0, count, sample=True) for slot, count, _ in parts]
    owners = [adapter for _, count, adapter in parts for _ in range(count)]
    groups = rows_by_adapter(chunks, {slot: adapter for slot, _, adapter in parts})
    assert set(groups) == set(owners) - {-1}
    for adapter, runs in groups.items():
        rows = [row for run in runs for row in run]
        assert rows == [row for row, owner in enumerate(owners) if owner == adapter]
        assert all(a.stop < b.start for a, b in pairwise(runs))


def prepare(directory: Path, adapters: list[Path], **fields: Any) -> tuple[Any, list[Any]]:
    defaults: dict[str, Any] = {"stage_count": 2, "slots": 2, "max_tokens": CONTEXT}
    command = PrepareShard(
        assignment=ShardAssignment(**{**defaults, **fields}),
        model_dir=str(directory),
        adapter_dirs=map(str, adapters),
    )
    progress: list[Any] = []
    prepared = ShardEngine().prepare(command, lambda *bytes_: progress.append(bytes_))
    return prepared, progress


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stage_loads_its_own_layers_as_planned(
    family: str, checkpoint: Callable[[str], Made]
) -> None:
    directory, adapters = checkpoint(family)
    dirs = list(adapters.values())
    for dtype in ("float32", "bfloat16"):
        profile = with_adapters(read_profile(directory, dtype), dirs, dtype)
        layers = [layer.weight_bytes for layer in profile.layers]
        assert layers != [layer.weight_bytes for layer in read_profile(directory, dtype).layers]
        middle, progress = prepare(directory, dirs, first_layer=1, last_layer=2, dtype=dtype)
        assert middle.total_bytes == sum(layers[1:3])
        assert progress[-1] == (middle.total_bytes, middle.total_bytes)


def test_the_models_weights_are_kept_when_adapters_come_and_go(
    checkpoint: Callable[[str], Made],
) -> None:
    directory, adapters = checkpoint("llama")
    engine = ShardEngine()
    whole = {"stage_count": 1, "last_layer": LAYERS - 1, "has_embed": True, "has_head": True}
    assignment = ShardAssignment(**whole, slots=2, max_tokens=CONTEXT)
    kept = []
    for names in ((), ("all",), ("attention", "uneven"), ()):
        command = PrepareShard(
            assignment=assignment,
            model_dir=str(directory),
            adapter_dirs=[str(adapters[name]) for name in names],
        )
        prepared = engine.prepare(command, lambda *_: None)
        kept.append(prepared.kept_bytes)
        if not names:
            base = prepared.total_bytes
    assert kept == [0, base, base, base]


def damaged(adapter: Path, target: Path, **config: Any) -> Path:
    """A copy whose config says something else."""
    target.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (target / name).write_bytes((adapter / name).read_bytes())
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def test_what_cannot_be_loaded_says_where_and_why(
    checkpoint: Callable[[str], Made], tmp_path: Path
) -> None:
    directory, adapters = checkpoint("llama")
    wider = adapter_of(
        tmp_path / "wider", config_of("llama", hidden_size=64), 1, target_modules=["q_proj"]
    )
    deeper = adapter_of(
        tmp_path / "deeper", config_of("llama", num_hidden_layers=5), 1, target_modules=["q_proj"]
    )
    cut = damaged(adapters["all"], tmp_path / "cut")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    cases = [
        (wider, r"layers\.0\.self_attn\.q_proj\.lora_A.*\(8, 64\).*\(8, 32\)"),
        (deeper, r"layers\.4\.self_attn\.q_proj.*4 layers"),
        (checkpoint("gpt2")[1]["mlp"], r"h\.0\.mlp\.c_fc.*no such linear"),
        (cut, r"cut/adapter_model\.safetensors is truncated.*again"),
        (tmp_path / "nowhere", r"nowhere has no adapter_config\.json"),
        (damaged(adapters["all"], tmp_path / "rank", r=7), r"rank 7.*belong"),
        (damaged(adapters["all"], tmp_path / "dora", use_dora=True), r"use_dora is set.*merged"),
    ]
    for adapter, message in cases:
        with pytest.raises(ModelFilesError, match=message):
            prepare(directory, [adapters["attention"], adapter], last_layer=3, has_embed=True)


def test_an_unknown_adapter_fails_its_own_request_only(checkpoint: Callable[[str], Made]) -> None:
    directory, adapters = checkpoint("llama")
    loop = Pipeline(directory, (4,), max_tokens=CONTEXT, adapters=adapters).loop()
    for request_id, adapter in (("a", "nope"), ("b", "all")):
        loop.add(
            AddSequence(
                request_id=request_id,
                token_ids=[5],
                prompt_tokens=1,
                sampling=Sampling(max_tokens=1),
                adapter=adapter,
            )
        )
    report = loop.step()
    assert report is not None
    first, second = report.outputs
    assert (first.request_id, first.failure.reason) == ("a", "ADAPTER_NOT_FOUND")
    assert "all, attention, uneven" in first.failure.message
    assert (second.request_id, len(second.token_ids)) == ("b", 1)
