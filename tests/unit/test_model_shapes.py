"""What a model needs by its config alone agrees with what its checkpoint holds."""

import json
from pathlib import Path

import pytest

import uellm.demo
from tests.support.checkpoints import write_checkpoint
from uellm.core.errors import ModelFilesError
from uellm.models.profile import read_profile
from uellm.models.shapes import SHAPES, profile_of_shape, read_shape

DEMO = Path(uellm.demo.__file__).parent / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_model(dtype: str) -> None:
    by_shape, held = read_shape(DEMO / "config.json", dtype), read_profile(DEMO, dtype)
    assert by_shape.kv_bytes_per_token == held.kv_bytes_per_token
    assert (by_shape.tied, by_shape.max_tokens) == (held.tied, held.max_tokens)
    assert by_shape.embed_bytes == held.embed_bytes
    for one, other in zip(by_shape.layers, held.layers, strict=True):
        assert one.weight_bytes == pytest.approx(other.weight_bytes, rel=0.01)
        assert one.flops_per_token == pytest.approx(other.flops_per_token, rel=0.01)


def test_experts_weigh_all_and_compute_some(tmp_path: Path) -> None:
    directory = write_checkpoint(
        tmp_path, layers=2, hidden=64, vocab=100, model_type="mixtral",
        architectures=["MixtralForCausalLM"], num_local_experts=4, num_experts_per_tok=2,
        intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
        max_position_embeddings=128,
    )  # fmt: skip
    held = read_shape(directory / "config.json", "float32")
    dense = profile_of_shape(
        {**json.loads((directory / "config.json").read_text()), "num_local_experts": 1},
        "float32",
        "x",
    )
    assert held.layers[0].weight_bytes > 2 * dense.layers[0].weight_bytes
    assert held.layers[0].flops_per_token < 2.1 * dense.layers[0].flops_per_token


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-2-7b", 6.7), ("llama-2-70b", 69), ("llama-3-8b", 8.0), ("mixtral-8x7b", 46.7)],
)
def test_well_known_models_are_as_large_as_they_are_said_to_be(name: str, billions: float) -> None:
    profile = profile_of_shape(SHAPES[name], "float16", name)
    held = sum(layer.weight_bytes for layer in profile.layers)
    total = (held + profile.embed_bytes + profile.head_bytes) / 2e9
    assert total == pytest.approx(billions, rel=0.02)


LATENT = {"v_head_dim": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "kv_lora_rank": 512}
DEEPSEEK = {
    "v2-lite": {
        **LATENT, "num_hidden_layers": 27, "hidden_size": 2048, "num_attention_heads": 16,
        "num_key_value_heads": 16, "q_lora_rank": None, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "vocab_size": 102400,
        "max_position_embeddings": 163840,
    },
    "v2": {
        **LATENT, "num_hidden_layers": 60, "hidden_size": 5120, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "vocab_size": 102400,
        "max_position_embeddings": 163840,
    },
    "v3": {
        **LATENT, "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "vocab_size": 129280,
        "max_position_embeddings": 163840,
    },
}  # fmt: skip
"""What their config.json says."""


@pytest.mark.parametrize(
    ("name", "billions", "active", "kv_bytes"),
    # As published: all parameters, those that a token meets, and (512 + 64) numbers a layer.
    [("v2-lite", 15.7, 2.4, 27 * 576 * 2), ("v2", 236, 21, 60 * 576 * 2), ("v3", 671, 37, 70272)],
)
def test_latent_attention_and_shared_experts(
    name: str, billions: float, active: float, kv_bytes: int
) -> None:
    profile = profile_of_shape(DEEPSEEK[name], "bfloat16", name)
    assert profile.kv_bytes_per_token == kv_bytes
    assert profile.weight_bytes / 2e9 == pytest.approx(billions, rel=0.01)
    met = profile.flops_per_token / 2e9 + profile.embed_bytes / 2e9
    assert met == pytest.approx(active, rel=0.12)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"num_hidden_layers": 2}'])
def test_what_is_no_config_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ModelFilesError, match=r"config\.json"):
        read_shape(path, "float16")
