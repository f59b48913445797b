"""Which architectures are served, and what their checkpoints call their weights."""

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from uellm.core.errors import ModelFilesError
from uellm.models import families
from uellm.models.architectures import check_architecture
from uellm.models.families import Family, Piece, architectures, family

OFFERED = Family("other", layers="blocks")
CONFIG = {"architectures": ["OtherForCausalLM"], "model_type": "other"}


def test_packages_can_offer_families(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("config.json")
    with pytest.raises(ModelFilesError, match="OtherForCausalLM"):
        check_architecture(path, CONFIG)
    entry = EntryPoint("OtherForCausalLM", f"{__name__}:OFFERED", families.GROUP)
    monkeypatch.setattr(families, "entry_points", lambda *, group: EntryPoints((entry,)))
    assert check_architecture(path, CONFIG) == OFFERED
    assert "OtherForCausalLM" in architectures()
    with pytest.raises(ModelFilesError, match="of type 'llama'"):
        check_architecture(path, CONFIG | {"model_type": "llama"})


@pytest.mark.parametrize(
    ("architecture", "fields", "words"),
    [
        ("OtherForCausalLM", {}, "the architecture is unknown"),
        ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, "an encoder and a decoder"),
        ("LlavaForConditionalGeneration", {"vision_config": {"depth": 2}}, "only text is served"),
        ("BloomForCausalLM", {"model_type": "bloom"}, "ALiBi"),
        ("MptForCausalLM", {"attn_config": {"alibi": True}}, "ALiBi"),
        ("FalconForCausalLM", {"model_type": "falcon", "alibi": True}, "ALiBi"),
        ("BertForMaskedLM", {}, "no causal language model"),
        ("LlamaForCausalLM", {}, "of this architecture are of type 'llama'"),
    ],
)
def test_what_is_not_served_is_told_why(
    architecture: str, fields: dict[str, object], words: str
) -> None:
    config = {"architectures": [architecture], "model_type": "other", **fields}
    with pytest.raises(ModelFilesError, match=words):
        check_architecture(Path("config.json"), config)


def test_the_nearest_that_are_served_are_named() -> None:
    config = {"architectures": ["Qwen9ForCausalLM"], "model_type": "qwen9"}
    with pytest.raises(
        ModelFilesError, match=r"nearest that are served: Qwen\dForCausalLM"
    ) as found:
        check_architecture(Path("config.json"), config)
    assert len(str(found.value)) < 400


def test_the_documentation_names_what_is_served() -> None:
    table = (Path(__file__).parents[2] / "docs" / "models.md").read_text().split("|\n\n")[0]
    cells = [row.split("|")[2] for row in table.splitlines()[2:] if row.startswith("| ")]
    named = [name.strip() for cell in cells[1:] for name in cell.split(",")]
    suffixed = [name if name.endswith("Model") else f"{name}ForCausalLM" for name in named]
    assert sorted(suffixed) == architectures()


@pytest.mark.parametrize(
    ("architecture", "name", "stored"),
    [
        ("LlamaForCausalLM", "model.norm.weight", "model.norm.weight"),
        ("LlamaForCausalLM", "model.norm.weight", "norm.weight"),
        ("GPT2LMHeadModel", "transformer.wte.weight", "wte.weight"),
        ("GPTNeoXForCausalLM", "lm_head.weight", "embed_out.weight"),
        ("OPTForCausalLM", "model.decoder.layers.0.fc1.bias", "decoder.layers.0.fc1.bias"),
    ],
)
def test_checkpoints_spell_names_in_several_ways(architecture: str, name: str, stored: str) -> None:
    found = family(architecture)
    assert found is not None
    assert found.pieces(name, 0, {stored}.__contains__) == [Piece(stored)]


def test_experts_are_stacked_unless_they_are_stored_so() -> None:
    found = family("MixtralForCausalLM")
    assert found is not None
    name, theirs = "model.layers.0.mlp.experts.", "model.layers.0.block_sparse_moe.experts."
    stored = {f"{theirs}{expert}.w{leaf}.weight" for expert in range(2) for leaf in (1, 2, 3)}
    assert found.pieces(f"{name}gate_up_proj", 2, stored.__contains__) == [
        Piece(f"{theirs}0.w1.weight", 0, 0, 2),
        Piece(f"{theirs}0.w3.weight", 0, 1, 2),
        Piece(f"{theirs}1.w1.weight", 1, 0, 2),
        Piece(f"{theirs}1.w3.weight", 1, 1, 2),
    ]
    assert found.pieces(f"{name}down_proj", 2, stored.__contains__)[1].key == (
        f"{theirs}1.w2.weight"
    )
    stacked = f"{name}down_proj"
    assert found.pieces(stacked, 2, {stacked}.__contains__) == [Piece(stacked)]
    assert found.pieces(stacked, 2, lambda _: False) == [Piece(stacked)]
