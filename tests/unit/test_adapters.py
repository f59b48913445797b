"""LoRA adapters without torch: how they are declared, read and refused, and what room they need."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner
from uellm_deployer.catalog import adapters_by_model, checked, resolve

from tests.support.checkpoints import write_adapter, write_checkpoint
from uellm.cli.app import app
from uellm.core.errors import ConfigurationError, InvalidArgumentError, ModelFilesError
from uellm.mesh.options import ModelSource, with_adapters
from uellm.models import adapters, lora
from uellm.v1.common_pb2 import ModelRef
from uellm.v1.deployer_pb2 import PlanRequest

WEIGHTS = "adapter_model.safetensors"


@given(
    st.integers(1, 64),
    st.floats(0.5, 64),
    st.booleans(),
    st.none() | st.integers(1, 64),
    st.none() | st.floats(0.5, 64),
)
def test_the_scale_is_alpha_over_rank(
    rank: int, alpha: float, stabilised: bool, own_rank: int | None, own_alpha: float | None
) -> None:
    config = lora.LoraConfig(
        rank,
        alpha,
        stabilised,
        {r"layers\.1\.mlp": own_rank} if own_rank else {},
        {"mlp": own_alpha} if own_alpha else {},
    )
    for module, r, a in (
        ("model.layers.1.mlp", own_rank or rank, own_alpha or alpha),
        ("model.layers.11.mlp", rank, own_alpha or alpha),
        ("model.layers.1.amlp", rank, alpha),
        ("model.layers.1.mlp.up", rank, alpha),
    ):
        assert config.rank_of(module) == r
        assert config.scale_of(module) == pytest.approx(a / (math.sqrt(r) if stabilised else r))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "use_dora is set"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters is set"),
        ({"something_new": 1}, "something_new is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 3}, r"rank 3: \[rank, in\]"),
        ({"r": "two"}, "r = 'two'"),
        ({"rank_pattern": {"q_proj": 7}}, "rank 7"),
        ({"alpha_pattern": {"(": 7}}, "is no pattern"),
        ({"module": "lm_head"}, "linear layers within the model's layers"),
    ],
)
def test_what_would_not_be_exact_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    directory = write_adapter(tmp_path / "adapter", layers=1, **fields)
    with pytest.raises(ModelFilesError, match=message) as caught:
        adapters.resolve_adapter(ModelRef(name="x", source=str(directory)))
    assert str(directory) in caught.value.message
    assert "adapter 'x'" not in str(directory)


def test_how_it_was_trained_does_not_matter(tmp_path: Path) -> None:
    directory = write_adapter(
        tmp_path,
        lora_dropout=0.1,
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
        base_model_name_or_path="somewhere/else",
        use_dora=False,
        modules_to_save=None,
        megatron_config=None,
    )
    assert len(lora.read_factors(directory)) == 4


def test_damaged_files_say_what_to_do(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path)
    whole = (directory / WEIGHTS).read_bytes()
    tensors = load_file(directory / WEIGHTS)
    save_file(dict(list(tensors.items())[1:]), directory / WEIGHTS)
    with pytest.raises(ModelFilesError, match="not the other factor: it is damaged"):
        lora.read_factors(directory)
    (directory / WEIGHTS).write_bytes(whole[:-1])
    with pytest.raises(ModelFilesError, match="truncated"):
        lora.read_factors(directory)
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")
    with pytest.raises(ModelFilesError, match="pickled weights are never read"):
        lora.read_factors(directory)


def test_the_digest_is_of_every_byte(tmp_path: Path) -> None:
    first = adapters.digest(write_adapter(tmp_path / "a", seed=1))
    assert adapters.digest(write_adapter(tmp_path / "b", seed=1)) == first
    assert adapters.digest(write_adapter(tmp_path / "c", seed=2)) != first
    ref = ModelRef(name="x", source=str(tmp_path / "c"), digest=first)
    with pytest.raises(ModelFilesError, match="not the adapter that was deployed as 'x'"):
        adapters.resolve_adapter(ref)


async def test_a_plan_leaves_room_for_adapters(tmp_path: Path) -> None:
    """By layer and dtype; one that reaches behind the last layer is another model's."""
    source = write_checkpoint(tmp_path / "model", layers=3)
    small, large = (write_adapter(tmp_path / str(r), layers=3, rank=r) for r in (2, 5))
    request = PlanRequest(model=ModelRef(name="m", source=str(source)))
    base = (await resolve(request)).profile("bfloat16")
    for name, directory in (("s", small), ("l", large)):
        request.adapters.append(ModelRef(name=name, source=str(directory)))
    model = await resolve(checked(request, 8))
    assert [ref.name for ref in model.adapter_refs] == ["l", "s"]
    assert all(len(ref.digest) == 64 for ref in model.adapter_refs)
    extra = (2 + 5) * (16 + 16) * 2
    grown = model.profile("bfloat16").layers
    assert [layer.weight_bytes for layer in grown] == [
        layer.weight_bytes + extra for layer in base.layers
    ]
    request.adapters[0].source = str(write_adapter(tmp_path / "deep", layers=4))
    with pytest.raises(ModelFilesError, match="has 3 layers; it belongs to another model"):
        await resolve(checked(request, 8))


def test_adapters_are_declared_by_model(tmp_path: Path) -> None:
    two = [ModelRef(name="a", source="/a"), ModelRef(source="org/b")]
    found = adapters_by_model(["a:x=/x", "b:x=org/x", "a:y=/y=z"], two)
    assert {name: [(r.name, r.source) for r in refs] for name, refs in found.items()} == {
        "a": [("x", "/x"), ("y", "/y=z")],
        "b": [("x", "org/x")],
    }
    assert adapters_by_model(["x=/x"], two[:1])["a"][0].source == "/x"
    for text in ("x=/x", "c:x=/x"):
        with pytest.raises(InvalidArgumentError, match="MODEL:NAME=SOURCE; served: a, b"):
            adapters_by_model([text], two)
        with pytest.raises(ConfigurationError, match="served are: a, b"):
            with_adapters([ModelSource("a", "/a"), ModelSource("b", "/b")], [text])
    (alone,) = with_adapters([ModelSource("a", "/a")], ["y=/y", f"x={tmp_path}"])
    assert [(r.name, r.source) for r in alone.adapters] == [("x", str(tmp_path)), ("y", "/y")]


@pytest.mark.parametrize("text", ["/only/a/path", "=/x", "a b=/x", "../x=/x", "x=", "a:=/x"])
def test_what_is_no_declaration_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        adapters.parse_adapter(text)
    assert caught.value.field.startswith("adapter")


def test_a_name_stands_once(tmp_path: Path) -> None:
    refs = [ModelRef(name="x", source="/a"), ModelRef(name="x", source="/b")]
    with pytest.raises(InvalidArgumentError, match="stands twice"):
        checked(PlanRequest(model=ModelRef(source="/m"), adapters=refs), 8)


def test_the_command_line_finds_adapters_before_it_starts_anything(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "adapter")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "bias": "all"}))
    for command in (["up"], ["verify"]):
        done = CliRunner().invoke(app, [*command, "--adapter", f"x={directory}"])
        assert done.exit_code == 2, done.output
        assert "adapter 'x'" in done.output
        assert "bias" in done.output


def test_empty_files_are_no_adapter(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path)
    save_file({}, directory / WEIGHTS)
    with pytest.raises(ModelFilesError, match="holds no tensor"):
        lora.read_factors(directory)
    name = "base_model.model.model.layers.0.q.lora_A.weight"
    save_file({name: np.zeros(3), name.replace("_A", "_B"): np.zeros(3)}, directory / WEIGHTS)
    with pytest.raises(ModelFilesError, match="do not belong together"):
        lora.read_factors(directory)
