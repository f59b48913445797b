"""What a quantization_config asks for, and which are refused."""

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import write_checkpoint
from tests.support.quantizing import Recipe, quantize_checkpoint
from uellm.core.errors import ModelFilesError
from uellm.models.profile import read_profile
from uellm.models.quantization import AWQ, GPTQ, INT, PACK, Quantization, read_quantization
from uellm.models.safetensors import TensorInfo
from uellm.placement.even import EvenPlacer
from uellm.placement.topology import Device, Topology
from uellm.placement.views import PlanRequest, Workload

PATH = Path("config.json")


def read(described: Any) -> Quantization | None:
    return read_quantization(PATH, {"quantization_config": described})


@pytest.mark.parametrize(
    ("recipe", "wanted", "text"),
    [
        (Recipe(), Quantization(PACK, 4, 0, True), "int4 (per channel)"),
        (Recipe(bits=8, group_size=32), Quantization(PACK, 8, 32, True), "int8 (group 32)"),
        (Recipe("int", 8, symmetric=False), Quantization(INT, 8, 0, False), "int8 (per channel)"),
        (Recipe("gptq", group_size=128), Quantization(GPTQ, 4, 128, True, 1), "int4 (group 128)"),
        (Recipe("gptq_v2", 8), Quantization(GPTQ, 8, 0, True), "int8 (per channel)"),
        (Recipe("awq", group_size=64), Quantization(AWQ, 4, 64, False), "int4 (group 64)"),
    ],
)
def test_configs_are_read(recipe: Recipe, wanted: Quantization, text: str) -> None:
    found = read(recipe.config())
    assert found == wanted
    assert str(found) == text
    assert read(None) is None


def test_several_groups_of_one_kind_are_one() -> None:
    config = Recipe(group_size=32).config()
    groups = config["config_groups"]
    groups["group_1"] = copy.deepcopy(groups["group_0"]) | {"targets": ["re:.*mlp.*"]}
    assert read(config) == Quantization(PACK, 4, 32, True)
    groups["group_1"]["weights"]["num_bits"] = 8
    with pytest.raises(ModelFilesError, match=r"several kinds = 'int4 .*, int8 "):
        read(config)


def _with(recipe: Recipe, path: str, value: Any) -> dict[str, Any]:
    """A config with one setting changed, named by its place."""
    config = recipe.config()
    *outer, last = path.split("/")
    at = config
    for key in outer:
        at = at[key]
    at[last] = value
    return config


GROUP = "config_groups/group_0"


@pytest.mark.parametrize(
    ("recipe", "path", "value"),
    [
        (Recipe(), "quant_method", "bitsandbytes"),
        (Recipe(), "quant_method", "fp8"),
        (Recipe(), "format", "marlin-24"),
        (Recipe(), "format", "float-quantized"),
        (Recipe(), "kv_cache_scheme", {"num_bits": 8}),
        (Recipe(), "quantization_status", "frozen"),
        (Recipe(), "transform_config", {"config_groups": {}}),
        (Recipe(), "config_groups", {}),
        (Recipe(), "config_groups", "all"),
        (Recipe(), f"{GROUP}/input_activations", {"num_bits": 8}),
        (Recipe(), f"{GROUP}/weights", None),
        (Recipe(), f"{GROUP}/weights/type", "float"),
        (Recipe(), f"{GROUP}/weights/num_bits", 3),
        (Recipe("int", 8), f"{GROUP}/weights/num_bits", 4),
        (Recipe(), f"{GROUP}/weights/actorder", "group"),
        (Recipe(), f"{GROUP}/weights/actorder", True),
        (Recipe(), f"{GROUP}/weights/strategy", "tensor"),
        (Recipe(), f"{GROUP}/weights/strategy", "block"),
        (Recipe(), f"{GROUP}/weights/group_size", 0),
        (Recipe("gptq"), "bits", 3),
        (Recipe("gptq"), "bits", None),
        (Recipe("gptq"), "desc_act", True),
        (Recipe("gptq"), "dynamic", {"-:lm_head": {}}),
        (Recipe("gptq"), "checkpoint_format", "marlin"),
        (Recipe("gptq"), "group_size", "128"),
        (Recipe("gptq"), "sym", 1),
        (Recipe("awq"), "version", "gemv"),
        (Recipe("awq"), "zero_point", False),
    ],
)
def test_what_is_not_served_is_named_with_what_is(recipe: Recipe, path: str, value: Any) -> None:
    with pytest.raises(ModelFilesError) as refused:
        read(_with(recipe, path, value))
    message = refused.value.message
    assert path.rpartition("/")[2] in message
    assert repr(value) in message or "none" in message
    assert "gptq_v2" in message
    assert str(PATH) in message


def test_sparse_checkpoints_and_nonsense_are_refused() -> None:
    config = Recipe().config() | {"sparsity_config": {"format": "sparse-24-bitmask"}}
    with pytest.raises(ModelFilesError, match="sparse-24-bitmask"):
        read(config)
    with pytest.raises(ModelFilesError, match="not a JSON object"):
        read("int4")


def test_tensors_weigh_what_is_held_of_them() -> None:
    asymmetric = Quantization(PACK, 4, 16, False)
    at = "model.layers.0.mlp.up_proj"
    codes = TensorInfo("I32", (10, 6))  # 10 outputs, 48 inputs.
    assert asymmetric.weigh(f"{at}.weight_packed", codes) == (480, 240)
    scales = TensorInfo("BF16", (10, 3))
    assert asymmetric.weigh(f"{at}.weight_scale", scales) == (0, 30 * 3)
    assert Quantization(PACK, 4, 16, True).weigh(f"{at}.weight_scale", scales) == (0, 60)
    assert asymmetric.weigh(f"{at}.weight_zero_point", TensorInfo("I32", (2, 3))) == (0, 0)
    assert asymmetric.weigh("model.norm.weight", TensorInfo("F16", (48,))) is None
    assert asymmetric.outputs(codes) == 10
    assert Quantization(GPTQ, 4, 16, True).outputs(TensorInfo("I32", (6, 10))) == 10
    assert Quantization(AWQ, 4, 16, False).outputs(TensorInfo("I32", (48, 2))) == 16
    whole = Quantization(INT, 8, 0, True)
    assert whole.weigh(f"{at}.weight", TensorInfo("I8", (10, 48))) == (480, 480)
    assert whole.weigh("lm_head.weight", TensorInfo("F16", (10, 48))) is None


def test_a_profile_names_the_quantisation_and_counts_its_bytes(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", hidden=32)
    whole = read_profile(source, "float32")
    recipe = Recipe(bits=8, group_size=16)
    found = read_profile(quantize_checkpoint(source, tmp_path / "int8", recipe), "float32")
    linear = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32
    assert found.stored_dtype == "int8 (group 16)"
    for plain, layer in zip(whole.layers, found.layers, strict=True):
        assert layer.weight_bytes == linear + 2 * linear // 16 + 4 * 2 * 32
        assert layer.flops_per_token == plain.flops_per_token
    assert found.head_bytes == whole.head_bytes
    assert found.embed_bytes == whole.embed_bytes


def test_a_plan_has_room_where_the_unquantised_model_has_none(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "whole", layers=16, hidden=64)
    target = quantize_checkpoint(source, tmp_path / "int4", Recipe(group_size=32))
    plain, quantised = read_profile(source, "float32"), read_profile(target, "float32")
    memory = quantised.weight_bytes + quantised.kv_bytes_per_token * 16
    topology = Topology(
        tuple(Device(f"w{i}/cpu", f"w{i}", f"w{i}", "cpu", memory) for i in range(16))
    )
    placer, wanted = EvenPlacer(workspace_bytes=0, usable=1.0), Workload(1, 0, 1, 16)
    (whole,) = placer.place(PlanRequest(topology, quantised, wanted)).replicas
    assert len(whole.stages) == 1
    (parted,) = placer.place(PlanRequest(topology, plain, wanted)).replicas
    assert len(parted.stages) > 4
