"""What a model needs, by its config and headers."""

from pathlib import Path

import pytest

from tests.support.checkpoints import write_checkpoint
from uellm.core.errors import InvalidArgumentError, ModelFilesError
from uellm.models.profile import read_profile


@pytest.mark.parametrize("shards", [1, 3])
def test_a_llama_like_checkpoint(tmp_path: Path, shards: int) -> None:
    profile = read_profile(write_checkpoint(tmp_path, shards=shards), "float32")
    # q and o: 16x16; k and v: 8x16; gate, up, down: 32x16; two norms of 16.
    elements = 2 * 256 + 2 * 128 + 3 * 512 + 2 * 16
    assert [layer.weight_bytes for layer in profile.layers] == [4 * elements] * 4
    assert {layer.kv_bytes_per_token for layer in profile.layers} == {2 * 2 * 4 * 4}
    assert {layer.flops_per_token for layer in profile.layers} == {2.0 * elements}
    assert (profile.embed_bytes, profile.head_bytes) == (4 * 32 * 16, 4 * (32 * 16 + 16))
    assert (profile.vocab_size, profile.hidden_size, profile.max_tokens) == (32, 16, 128)
    assert profile.activation_bytes_per_token == 64
    assert (profile.architecture, profile.stored_dtype) == ("LlamaForCausalLM", "float16")
    assert not profile.tied


def test_latent_attention_keeps_the_latent_and_one_key_of_each_token(tmp_path: Path) -> None:
    latent = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 6}
    profile = read_profile(write_checkpoint(tmp_path, **latent), "bfloat16")
    assert {layer.kv_bytes_per_token for layer in profile.layers} == {(8 + 4) * 2}


def test_bytes_are_those_of_the_compute_dtype(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    wide, narrow = read_profile(directory, "float32"), read_profile(directory, "bfloat16")
    assert wide.weight_bytes == 2 * narrow.weight_bytes
    assert wide.kv_bytes_per_token == 2 * narrow.kv_bytes_per_token


def test_a_tied_head_is_a_copy_of_the_embedding(tmp_path: Path) -> None:
    profile = read_profile(write_checkpoint(tmp_path, tied=True), "float32")
    assert profile.tied
    assert profile.head_bytes == profile.embed_bytes + 4 * 16


def test_a_stored_head_that_config_calls_tied_counts_once(tmp_path: Path) -> None:
    profile = read_profile(write_checkpoint(tmp_path, tie_word_embeddings=True), "float32")
    assert profile.tied


def test_a_gpt2_like_checkpoint_ties_and_skips_its_masks(tmp_path: Path) -> None:
    profile = read_profile(write_checkpoint(tmp_path, layout="gpt2"), "float16")
    elements = 16 * 48 + 48 + 16 * 64
    assert [layer.weight_bytes for layer in profile.layers] == [2 * elements] * 4
    assert profile.tied
    assert profile.embed_bytes == 2 * (32 + 64) * 16
    assert profile.head_bytes == 2 * (32 * 16 + 2 * 16)
    assert profile.layers[0].kv_bytes_per_token == 2 * 4 * 4 * 2


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_hidden_layers": 6}, "none of layer 4"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, config: dict[str, object], word: str) -> None:
    with pytest.raises(ModelFilesError, match=word) as refused:
        read_profile(write_checkpoint(tmp_path, **config), "float32")
    assert "config.json" in refused.value.message


def test_an_untied_model_without_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"no lm_head\.weight"):
        read_profile(write_checkpoint(tmp_path, tied=True, tie_word_embeddings=False), "float32")


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="float32, bfloat16, float16"):
        read_profile(write_checkpoint(tmp_path), "int4")
