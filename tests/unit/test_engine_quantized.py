"""Quantised checkpoints: exact at any split, held as planned, refused where not served.

The reference takes the stored words apart by code of its own; see
``uellm_worker.verification.dequantized``.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from uellm_worker.engine import panels
    from uellm_worker.engine.panels import PanelWeight
    from uellm_worker.engine.quantized import QuantizedLinear
    from uellm_worker.engine.quantized_panels import QuantizedPanels, code_panels
    from uellm_worker.engine.shard_engine import ShardEngine
    from uellm_worker.verification.pipeline import Pipeline
    from uellm_worker.verification.reference import Reference
    from uellm_worker.verification.report import verify

from safetensors.torch import load_file, save_file  # noqa: E402
from uellm_worker.engine.plan import Chunk, StepPlan  # noqa: E402

from tests.support.quantizing import Recipe, quantize_checkpoint  # noqa: E402
from uellm.core.errors import ModelFilesError  # noqa: E402
from uellm.models.profile import read_profile  # noqa: E402
from uellm.models.quantization import PACK, Quantization  # noqa: E402
from uellm.v1.common_pb2 import ModelRef  # noqa: E402
from uellm.v1.engine_pb2 import PrepareShard  # noqa: E402
from uellm.v1.topology_pb2 import ShardAssignment  # noqa: E402

LAYERS, VOCAB = 3, 96
PROMPTS = [[5], [7, 8, 9] * 7, [20] * 30, [3, 4]]
RECIPES = {
    "pack4-channel": Recipe(),
    "pack4-group": Recipe(group_size=16, scale_dtype="float32"),
    "pack4-asymmetric": Recipe(group_size=16, symmetric=False),
    "pack4-asymmetric-channel": Recipe(symmetric=False),
    "pack8-channel": Recipe(bits=8),
    "pack8-asymmetric": Recipe(bits=8, group_size=24, symmetric=False),
    "pack4-whole": Recipe(group_size=16, ignore=()),
    "pack4-some": Recipe(group_size=16, ignore=("lm_head", "down_proj", "1.self_attn.k_proj")),
    "int8-channel": Recipe("int", 8),
    "int8-asymmetric": Recipe("int", 8, symmetric=False),
    "gptq4": Recipe("gptq", group_size=16),
    "gptq4-asymmetric": Recipe("gptq", group_size=16, symmetric=False),
    # 48 and 80 inputs: the last group is shorter.
    "gptq4-ragged": Recipe("gptq", group_size=32, symmetric=False),
    "gptq4-v2": Recipe("gptq_v2", group_size=16, symmetric=False),
    "gptq8": Recipe("gptq", 8, group_size=16, symmetric=False),
    "gptq8-channel": Recipe("gptq", 8),
    "awq": Recipe("awq", group_size=16, symmetric=False),
}
Prepare = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in float32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.3)
    directory = tmp_path_factory.mktemp("original")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By recipe: a quantised copy, made when first asked for."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = quantize_checkpoint(original, tmp_path_factory.mktemp(name), RECIPES[name])
        return made[name]

    return get


def prepare(engine: ShardEngine, directory: Path, **fields: Any) -> Any:
    defaults: dict[str, Any] = {
        "stage_count": 1,
        "last_layer": LAYERS - 1,
        "has_embed": True,
        "has_head": True,
        "slots": 2,
    }
    assignment = ShardAssignment(**{**defaults, **fields})
    command = PrepareShard(assignment=assignment, model_dir=str(directory), threads=1)
    return engine.prepare(command, lambda *_: None)


def modules(pipeline: Pipeline) -> dict[str, Any]:
    """The quantised layers of all stages, by name."""
    return {
        name: module
        for stage in pipeline.stages
        for name, module in stage.first.model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_quantised_model_is_exact_and_held_as_planned(
    name: str, checkpoint: Callable[[str], Path], original: Path
) -> None:
    directory, recipe = checkpoint(name), RECIPES[name]
    reference = Reference.load(directory, torch.float32)
    _assert_close(reference, original, recipe)
    profile = read_profile(directory, "float32")
    planned = [layer.weight_bytes for layer in profile.layers]
    thorough = name in ("pack4-group", "gptq4-ragged")
    for split in ((3,), (1, 2), (1, 1, 1)) if thorough else ((1, 2),):
        stages = Pipeline(directory, split, slots=2, max_tokens=50)
        result = verify(stages, reference, PROMPTS, 6)
        assert result.exact
        assert result.preemptions
        assert min(prompt.compared_tokens for prompt in result.prompts) > 0
        partly = name == "pack4-some"  # The second layer, and with it its stage, is not joined.
        linears = 3 + 5 + 6 if partly else 4 * LAYERS
        assert len(modules(stages)) == linears + ("lm_head" not in recipe.ignore)
        first = 0
        for stage, count in zip(stages.stages, split, strict=True):
            shard = stage.first
            wanted = sum(planned[first : first + count])
            wanted += profile.embed_bytes * (first == 0)
            first += count
            wanted += profile.head_bytes * (first == LAYERS)
            if panels.usable() and not partly:
                assert shard.fused is not None
                assert shard.fused.compiled is not None
            parameters = shard.model.named_parameters()
            held = {id(p): _bytes(shard.model, path, p) for path, p in parameters}
            packed = [t for h, t in shard.tensors.items() if h.packed]
            assert shard.total_bytes == wanted
            plain = sum(4 * _numbers(tensor) for tensor in packed)
            assert sum(held.values()) + plain == wanted


def _bytes(model: Any, name: str, parameter: Any) -> int:
    """Without what panels are filled up with."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(owner, QuantizedPanels) or parameter is owner.bias:
        return int(parameter.nbytes)
    return int(parameter.nbytes) // owner.width * owner.out_features


def _numbers(weight: object) -> int:
    """Of the matrix that is laid out, without what panels are filled up with."""
    if isinstance(weight, PanelWeight):
        return weight.out_features * weight.panels.shape[1]
    assert isinstance(weight, torch.Tensor)
    return weight.numel()


def test_a_fused_projection_tells_its_key_heads_quantised_as_well(tmp_path: Path) -> None:
    """Falcon's config does not; rows of the projection do."""
    config = transformers.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        eos_token_id=2,
        max_position_embeddings=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "whole")
    for name, recipe in {
        "gptq": Recipe("gptq", group_size=16, symmetric=False),
        "awq": Recipe("awq", group_size=16, symmetric=False),
        "pack": Recipe(),
    }.items():
        directory = quantize_checkpoint(tmp_path / "whole", tmp_path / name, recipe)
        stages = Pipeline(directory, (1, 1), slots=2, max_tokens=50)
        assert len(modules(stages)) == 2 * 4
        assert verify(stages, Reference.load(directory, torch.float32), PROMPTS, 4).exact
        whole, ours = (read_profile(tmp_path / of, "float32") for of in ("whole", name))
        assert ours.kv_bytes_per_token == whole.kv_bytes_per_token
        assert stages.stages[0].first.total_bytes == (
            ours.layers[0].weight_bytes + ours.embed_bytes
        )


def _assert_close(reference: Reference, original: Path, recipe: Recipe) -> None:
    """The reference's weights are those of the original, but for the rounding to codes."""
    tensors = load_file(original / "model.safetensors")
    changed = 0
    for name, weight in reference._model.named_parameters():
        error = float((weight - tensors[name]).abs().max())
        assert error <= 2.1 * float(tensors[name].abs().max()) / ((1 << recipe.bits) - 1)
        changed += error > 0
    assert changed >= 5 * LAYERS, "next to nothing was quantised"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["pack8-channel", "gptq4-ragged"])
def test_half_precision_rounds_only(
    name: str, dtype: str, checkpoint: Callable[[str], Path]
) -> None:
    """Against the dequantised weights in twice the precision."""
    directory = checkpoint(name)
    layers = modules(Pipeline(directory, (LAYERS,), slots=1, dtype=dtype))
    exact = Reference.load(directory, torch.float32)._model
    for path in ("model.layers.0.mlp.down_proj", "model.layers.2.self_attn.q_proj"):
        layer, weight = layers[path], exact.get_submodule(path).weight
        for rows in (1, 40):
            inputs = torch.randn(rows, layer.in_features).to(getattr(torch, dtype))
            with torch.inference_mode():
                got = layer(inputs)
            wanted = inputs.float() @ weight.T
            bound = (2**-6 if dtype == "bfloat16" else 2**-9) * float(wanted.abs().max())
            assert float((got.float() - wanted).abs().max()) < bound


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [7, 24, 40, 64])
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_of_any_width_compute_the_product(
    bits: int, inputs: int, group_size: int, symmetric: bool
) -> None:
    """Also where kernels that read whole vectors would read beyond the end."""
    outputs, middle = 5, 1 << (bits - 1)
    quantization = Quantization(PACK, bits, group_size, symmetric)
    plain = torch.nn.Linear(inputs, outputs).requires_grad_(False)
    layer = QuantizedLinear(plain, quantization, torch.float32)
    codes = torch.randint(-middle, middle, (outputs, inputs))
    scales = torch.rand(layer.scales.shape)
    zeros = torch.zeros(layer.scales.shape, dtype=torch.long)
    width = layer.codes.shape[1]
    held = codes.clone()
    if bits == 4:
        held = torch.zeros(outputs, width, dtype=torch.long)
        for column in range(inputs):
            upper = column >= width
            held[:, column % width] |= (codes[:, column] & 15) << (4 if upper else 0)
        held = (held ^ 128) - 128
    parts = {"codes": held.to(torch.int8), "scales": scales}
    if not symmetric:
        zeros = torch.randint(-middle, middle, zeros.shape)
        parts["zeros"] = zeros.to(torch.int8)
    for name, tensor in parts.items():
        assert getattr(layer, name).shape == tensor.shape
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    groups = torch.arange(inputs) // (group_size or inputs)
    weight = (codes - zeros[:, groups]) * scales[:, groups]
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        layer.bias.data = plain.bias.to(dtype)
        for rows in (1, 16, 40):
            given = torch.randn(rows, inputs).to(dtype)
            wanted = given.double() @ weight.double().T + layer.bias
            with torch.inference_mode():
                error = float((layer(given) - wanted).abs().max() / wanted.abs().max())
            assert error < bound
    if panels.usable() and (bits == 8 or inputs % 2 == 0):
        _check_panels(layer, parts, weight)


def _check_panels(layer: QuantizedLinear, parts: dict[str, Any], weight: Any) -> None:
    """The same layer in panels: its product, whatever else is in the batch."""
    plain = torch.nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)
    laid = QuantizedPanels(plain, layer.quantization, torch.float32)
    for name, tensor in parts.items():
        of = "pairs" if name == "codes" and layer.quantization.bits == 4 else "numbers"
        held = code_panels(tensor, of, layer.in_features)
        laid.register_parameter(name, torch.nn.Parameter(held, requires_grad=False))
    given = torch.randn(19, layer.in_features)
    wanted = given.double() @ weight.double().T + laid.bias
    got = laid(given)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5
    for row, alone in zip(got, given, strict=True):
        assert torch.equal(laid(alone[None])[0], row)


def test_blocks_do_not_change_the_product(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uellm_worker.engine.quantized_checkpoint.suits", lambda *_: False)
    layers = modules(Pipeline(checkpoint("gptq4-ragged"), (LAYERS,)))
    layer = layers["model.layers.0.mlp.uellm_gate_up"]
    inputs = torch.randn(2, 3, layer.in_features)
    with torch.inference_mode():
        whole = layer(inputs)
        assert whole.shape == (2, 3, layer.out_features)
        few = {"cpu": 7 * layer.in_features}
        monkeypatch.setattr("uellm_worker.engine.quantized._BLOCK_NUMBERS", few)
        torch.testing.assert_close(layer(inputs), whole)
        monkeypatch.setattr("uellm_worker.engine.quantized.packable", lambda *_: False)
        torch.testing.assert_close(layer(inputs), whole)


def test_layers_in_common_are_kept_and_progress_counts_what_is_read(
    checkpoint: Callable[[str], Path],
) -> None:
    directory, engine = checkpoint("pack4-group"), ShardEngine()
    ref, seen = ModelRef(digest="d"), []
    command = PrepareShard(
        assignment=ShardAssignment(
            model=ref, stage_count=1, last_layer=2, has_embed=True, has_head=True
        ),
        model_dir=str(directory),
    )
    whole = engine.prepare(command, lambda *pair: seen.append(pair))
    assert seen[0] == (0, whole.total_bytes)
    assert 0.9 * whole.total_bytes < seen[-1][0] <= whole.total_bytes
    part = prepare(engine, directory, model=ref, last_layer=1, has_head=False)
    assert part.kept_bytes == part.total_bytes < whole.total_bytes
    assert prepare(engine, directory, model=ref).kept_bytes == part.total_bytes
    assert prepare(engine, directory, model=ModelRef(digest="e")).kept_bytes == 0


def damaged(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("name", "leaf", "change", "words"),
    [
        ("gptq4", "q_proj.g_idx", lambda tensor: tensor.flip(0).contiguous(), "order"),
        ("gptq4", "q_proj.qzeros", lambda tensor: tensor + 1, "symmetry"),
        ("gptq4", "q_proj.scales", lambda tensor: tensor[:2].clone(), "do not belong together"),
        ("gptq4", "q_proj.scales", lambda tensor: tensor.int(), "scales' of floating point"),
        ("pack4-group", "q_proj.weight_packed", lambda t: t[:, :5].clone(), "do not belong"),
        ("awq", "q_proj.qzeros", lambda t: t[:, :5].clone(), "do not belong together"),
        ("awq", "q_proj.qzeros", None, "no tensor 'model.layers.0.self_attn.q_proj.qzeros'"),
    ],
)
def test_tensors_that_contradict_the_config_are_named(
    name: str,
    leaf: str,
    change: Callable[[Any], Any] | None,
    words: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    key = f"model.layers.0.self_attn.{leaf}"

    def apply(tensors: dict[str, Any]) -> None:
        stored = tensors.pop(key)
        if change is not None:
            tensors[key] = change(stored)

    directory = damaged(checkpoint(name), tmp_path, apply)
    with pytest.raises(ModelFilesError, match=words) as caught:
        prepare(ShardEngine(), directory)
    assert key in caught.value.message


def test_a_quantised_embedding_is_refused_by_plan_and_engine(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def apply(tensors: dict[str, Any]) -> None:
        del tensors["model.embed_tokens.weight"]
        for leaf in ("weight_packed", "weight_scale", "weight_shape"):
            stored = tensors[f"model.layers.0.self_attn.q_proj.{leaf}"]
            tensors[f"model.embed_tokens.{leaf}"] = stored.clone()

    directory = damaged(checkpoint("pack4-group"), tmp_path, apply)
    for read in (
        lambda: prepare(ShardEngine(), directory),
        lambda: read_profile(directory, "float32"),
    ):
        with pytest.raises(ModelFilesError, match=r"embed_tokens\.weight_\w+.*only plain linear"):
            read()


def test_an_unquantised_checkpoint_with_a_quantised_ones_config_is_served(
    original: Path, tmp_path: Path
) -> None:
    """What is stored decides: nothing here is quantised."""
    directory = damaged(original, tmp_path, lambda _: None)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = Recipe().config()
    (directory / "config.json").write_text(json.dumps(config))
    stages = Pipeline(directory, (LAYERS,), slots=1)
    assert not modules(stages)
    assert verify(stages, Reference.load(original, torch.float32), PROMPTS[:1], 4).exact


@pytest.mark.skipif(not panels.usable(), reason="panels need AVX2 or AVX-512")
@pytest.mark.parametrize("name", ["int8-channel", "gptq4-ragged", "awq"])
def test_logits_do_not_depend_on_the_batch(
    name: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, where the layers are one program; and close to what torch makes of them."""

    def logits(*batches: tuple[Chunk, ...]) -> Any:
        (stage,) = Pipeline(checkpoint(name), (LAYERS,), slots=2).stages
        (part,) = stage.parts
        return [part.compute(plan_of(chunks), None) for chunks in batches][-1]

    def plan_of(chunks: tuple[Chunk, ...]) -> StepPlan:
        places = [(c.slot, c.start + index) for c in chunks for index in range(c.count)]
        ids = tuple((7 * slot + 3 * place) % 90 + 3 for slot, place in places)
        return StepPlan(0, chunks, token_ids=ids)

    alone = logits((Chunk(1, 0, 20, False),), (Chunk(1, 20, 1, True),))
    beside = logits(
        (Chunk(1, 0, 9, False), Chunk(0, 0, 11, True)),
        (Chunk(0, 11, 1, True), Chunk(1, 9, 12, True)),
    )
    assert torch.equal(alone[0], beside[1])
    monkeypatch.setattr("uellm_worker.engine.quantized_checkpoint.suits", lambda *_: False)
    torch.testing.assert_close(logits((Chunk(1, 0, 21, True),)), alone, rtol=1e-4, atol=1e-4)
