"""The shard engine against transformers' own ``generate``, on tiny checkpoints.

*Exact* means token for token at float32, but for ties; see ``uellm_worker.verification``.
"""

import json
import mmap
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from uellm_worker.engine.member import ShardMember
    from uellm_worker.engine.packing import PackedLinear, pack, packable
    from uellm_worker.engine.shard_engine import ShardEngine
    from uellm_worker.engine.transport import from_bytes, to_bytes
    from uellm_worker.verification.pipeline import Pipeline, generate
    from uellm_worker.verification.reference import Reference

    from tests.support.families import CONTEXT, LAYERS, prompts, save_model

from uellm_worker.engine.capacity import Capacity, Prepared  # noqa: E402
from uellm_worker.engine.loop import EngineLoop  # noqa: E402

from uellm.core.errors import ModelFilesError  # noqa: E402
from uellm.policy.fcfs import FcfsStep  # noqa: E402
from uellm.v1.common_pb2 import ModelRef, Sampling  # noqa: E402
from uellm.v1.engine_pb2 import AddSequence, PrepareShard  # noqa: E402
from uellm.v1.topology_pb2 import ShardAssignment  # noqa: E402

Model = Any


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Model]]:
    """By family: the directory and the model, made when first asked for."""
    made: dict[str, tuple[Path, Model]] = {}

    def get(family: str) -> tuple[Path, Model]:
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            made[family] = directory, save_model(directory, family)
        return made[family]

    return get


def assert_exact(model: Model, prompt: list[int], got: list[int], count: int) -> None:
    """``got`` (without its end-of-sequence token) is what the reference generates."""
    assert Reference(model).compare(prompt, got, count).difference is None


def prepare(engine: ShardEngine, directory: Path, **fields: Any) -> Prepared:
    defaults: dict[str, Any] = {
        "stage_count": 1,
        "last_layer": LAYERS - 1,
        "has_embed": True,
        "has_head": True,
        "slots": 4,
        "max_tokens": CONTEXT,
    }
    assignment = ShardAssignment(**{**defaults, **fields})
    command = PrepareShard(assignment=assignment, model_dir=str(directory), threads=1)
    return engine.prepare(command, lambda *_: None)


def pipeline(directory: Path, split: tuple[int, ...], **fields: Any) -> EngineLoop:
    """A loop over stages of so many layers each, in this process."""
    return Pipeline(directory, split, **{"max_tokens": CONTEXT, **fields}).loop()


def greedy(count: int, _index: int) -> Sampling:
    return Sampling(max_tokens=count)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3_moe", "lfm2"])
def test_a_resumed_answer_continues_as_it_would_have(
    family: str, checkpoint: Callable[[str], tuple[Path, Model]]
) -> None:
    directory, _ = checkpoint(family)

    def sampling(index: int) -> Sampling:
        return Sampling(
            max_tokens=20,
            seed=index,
            temperature=0.0 if index % 2 else 1.0,
            top_p=0.9,
            min_tokens=10,
            ignore_eos=index == 2,
        )

    whole = generate(pipeline(directory, (4,)), prompts(), sampling)
    logged = [answer[: 3 * index % 11] for index, answer in enumerate(whole)]
    assert generate(pipeline(directory, (3, 1), slots=2), prompts(), sampling, logged) == whole
    assert all(len(answer) >= 10 for answer in whole)


def test_log_probabilities_travel_from_the_last_stage(
    checkpoint: Callable[[str], tuple[Path, Model]],
) -> None:
    directory, _ = checkpoint("llama")
    loop = pipeline(directory, (2, 2))
    loop.add(
        AddSequence(
            request_id="a",
            token_ids=[5],
            prompt_tokens=1,
            sampling=Sampling(max_tokens=1, logprobs=3, ignore_eos=True),
        )
    )
    report = loop.step()
    assert report is not None
    (output,) = report.outputs
    assert len(output.logprobs[0].top_ids) == 3
    assert output.logprobs[0].logprob < 0
    assert len(report.report.stages) == 2


@pytest.mark.parametrize("family", ["llama", "falcon", "lfm2", "recurrent_gemma", "bamba"])
def test_half_precision_is_computed_as_asked(
    family: str, checkpoint: Callable[[str], tuple[Path, Model]]
) -> None:
    directory, _ = checkpoint(family)
    loop = pipeline(directory, (2, 2), dtype="bfloat16")
    answers = generate(loop, prompts(), lambda _: Sampling(max_tokens=5, ignore_eos=True))
    assert all(len(answer) == 5 for answer in answers)


def test_a_checkpoint_stored_in_half_precision_is_computed_in_float32(
    checkpoint: Callable[[str], tuple[Path, Model]], tmp_path: Path
) -> None:
    half = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama")[0]).half()
    half.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    answers = generate(pipeline(tmp_path, (4,)), prompts(), partial(greedy, 10))
    for prompt, answer in zip(prompts(), answers, strict=True):
        assert_exact(model, prompt, answer, 10)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_layers_in_common_are_kept(
    family: str, checkpoint: Callable[[str], tuple[Path, Model]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, model = checkpoint(family)
    ref = ModelRef(digest="d")
    engine = ShardEngine()
    whole = prepare(engine, directory, model=ref)
    assert (whole.kept_bytes, whole.total_bytes) == (0, _bytes(model, ("",)))
    middle = ("model.layers.1.", "model.layers.2.")
    monkeypatch.setattr("uellm_worker.engine.checkpoint.TensorFiles.read", lambda *_: iter(()))
    part = prepare(
        engine,
        directory,
        model=ref,
        first_layer=1,
        last_layer=2,
        has_embed=False,
        has_head=False,
    )
    assert part.kept_bytes == part.total_bytes == _bytes(model, middle)
    monkeypatch.undo()
    again = prepare(engine, directory, model=ref)
    assert again.kept_bytes == part.total_bytes
    assert again.total_bytes == whole.total_bytes
    assert engine._stage is not None
    loop = EngineLoop(
        ShardMember(engine._stage, None), FcfsStep(), again.capacity, again.vocabulary
    )
    answers = generate(loop, prompts(), partial(greedy, 8))
    for prompt, answer in zip(prompts(), answers, strict=True):
        assert_exact(model, prompt, answer, 8)
    assert prepare(engine, directory, model=ModelRef(digest="e")).kept_bytes == 0
    assert prepare(engine, directory, model=ModelRef(digest="e"), dtype="float16").kept_bytes == 0


def _bytes(model: Model, prefixes: tuple[str, ...]) -> int:
    return sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if name.startswith(prefixes)
    )


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_computes_the_plain_product(rows: int, bias: bool) -> None:
    if not packable(torch.device("cpu"), torch.float32):
        pytest.skip("this build of torch has no oneDNN")
    plain = torch.nn.Linear(33, 47, bias=bias)
    packed = PackedLinear(pack(plain.weight.detach()), plain.bias)
    inputs = torch.randn(1, rows, 33)
    with torch.inference_mode():
        torch.testing.assert_close(packed(inputs), plain(inputs))


def test_without_packing_the_answers_are_exact_as_well(
    checkpoint: Callable[[str], tuple[Path, Model]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uellm_worker.engine.shard.packable", lambda *_: False)
    directory, model = checkpoint("llama")
    answers = generate(pipeline(directory, (2, 2)), prompts(), partial(greedy, 10))
    for prompt, answer in zip(prompts(), answers, strict=True):
        assert_exact(model, prompt, answer, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_survive_as_bytes(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        activation = torch.randn(5, 7).to(dtype)
        assert torch.equal(from_bytes(to_bytes(activation), 5, dtype), activation)


def test_progress_runs_up_to_the_total(checkpoint: Callable[[str], tuple[Path, Model]]) -> None:
    seen: list[tuple[int, int]] = []
    command = PrepareShard(
        assignment=ShardAssignment(
            stage_count=1, last_layer=LAYERS - 1, has_embed=True, has_head=True
        ),
        model_dir=str(checkpoint("llama")[0]),
    )
    total = ShardEngine().prepare(command, lambda *pair: seen.append(pair)).total_bytes
    assert seen == sorted(seen)
    assert seen[0] == (0, total)
    assert seen[-1][0] > 0.9 * total


@pytest.mark.parametrize(
    ("kv_tokens", "expected"),
    [
        # A block is 128 tokens: so many of 8 numbers of 4 bytes fill a page of 4 KiB.
        (0, Capacity(4, 96, 4 * 128, 4, 128)),
        (10**6, Capacity(4, 96, 8 * 128, 4, 128)),
        (5 * 128 + 127, Capacity(4, 96, 5 * 128, 4, 128)),
        # Less than a block for each slot: all of it is allocated.
        (4 * 128 - 1, Capacity(4, 96, 5 * 96, 1)),
        (2 * 96 + 95, Capacity(2, 96, 2 * 96)),
        (96, Capacity(1, 96, 96)),
        (50, Capacity(1, 50, 50)),
    ],
)
def test_the_cache_keeps_to_its_memory(
    kv_tokens: int, expected: Capacity, checkpoint: Callable[[str], tuple[Path, Model]]
) -> None:
    per_token = LAYERS * 2 * 2 * 8 * 4  # Layers, keys and values, heads, head size, bytes.
    engine = ShardEngine()
    capacity = prepare(engine, checkpoint("llama")[0], kv_bytes=kv_tokens * per_token).capacity
    if mmap.PAGESIZE == 4096 and sys.platform == "linux":
        assert capacity == expected
    assert not kv_tokens or capacity.kv_tokens <= kv_tokens
    assert engine._stage is not None
    cache = engine._stage.parts[0].cache
    for tensor in (*cache.keys, *cache.values):
        assert len(tensor) == capacity.cache_slots
        assert tensor.shape[2] >= capacity.max_tokens


# ---- what is refused -----------------------------------------------------------------------------


def edited(directory: Path, source: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another config."""
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoModel": "m.M"}}, "never executed"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "BloomForCausalLM"),
        ({"architectures": []}, "(none)"),
        ({"model_type": "mistral"}, "mistral"),
        ({"num_hidden_layers": 2}, "which has 2"),
        ({"num_hidden_layers": "many"}, "not a valid config"),
        ({"intermediate_size": 64}, "do not belong together"),
        ({"attention_bias": True}, "no tensor 'model.layers.0.self_attn.o_proj.bias'"),
        (
            {
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                "max_position_embeddings": 64,
            },
            None,
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
            "max_tokens of at most 32",
        ),
    ],
)
def test_configs_that_cannot_be_served_say_why(
    changes: dict[str, Any],
    words: str | None,
    tmp_path: Path,
    checkpoint: Callable[[str], tuple[Path, Model]],
) -> None:
    directory = edited(tmp_path, checkpoint("llama")[0], **changes)
    if words is None:
        assert prepare(ShardEngine(), directory).capacity.max_tokens == 64
        return
    with pytest.raises(ModelFilesError) as caught:
        prepare(ShardEngine(), directory)
    assert words in caught.value.message
    assert str(tmp_path) in caught.value.message or "rope" in caught.value.message


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", b"{", "cannot be read as JSON"),
        ("config.json", b"[]", "JSON object"),
        ("model.safetensors", None, "never loaded"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0garbage!", "not a whole safetensors file"),
        ("model.safetensors.index.json", b"{}", "weight_map"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"model.embed_tokens.weight": "../../gone.safetensors"}}',
            "no tensor",
        ),
        ("generation_config.json", b"?", "generation_config.json"),
    ],
)
def test_broken_files_are_named(
    file: str,
    content: bytes | None,
    words: str,
    tmp_path: Path,
    checkpoint: Callable[[str], tuple[Path, Model]],
) -> None:
    directory = edited(tmp_path, checkpoint("llama")[0])
    if content is None:
        (directory / file).unlink()
    else:
        (directory / file).write_bytes(content)
    with pytest.raises(ModelFilesError) as caught:
        prepare(ShardEngine(), directory)
    assert words in caught.value.message
    assert str(tmp_path) in caught.value.message


def test_a_truncated_file_is_named(
    tmp_path: Path, checkpoint: Callable[[str], tuple[Path, Model]]
) -> None:
    directory = edited(tmp_path, checkpoint("llama")[0])
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFilesError, match="download it again"):
        prepare(ShardEngine(), directory)


def test_a_failed_load_can_be_followed_by_another(
    tmp_path: Path, checkpoint: Callable[[str], tuple[Path, Model]]
) -> None:
    engine = ShardEngine()
    prepare(engine, checkpoint("llama")[0])
    with pytest.raises(ModelFilesError):
        prepare(engine, tmp_path)
    assert prepare(engine, checkpoint("llama")[0]).total_bytes > 0


def test_unknown_dtypes_and_rooms_are_refused(
    checkpoint: Callable[[str], tuple[Path, Model]],
) -> None:
    directory = checkpoint("llama")[0]
    with pytest.raises(ModelFilesError, match="int3"):
        prepare(ShardEngine(), directory, dtype="int3")
    with pytest.raises(ModelFilesError, match="hold no token"):
        prepare(ShardEngine(), directory, kv_bytes=1)
