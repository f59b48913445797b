"""What a stage fetches of a model is what the engine reads of it, for every family."""

import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers")
    from uellm_worker.engine.shard import Shard, load_shard
    from uellm_worker.engine.weights import ShardSpec

    from tests.support.families import FAMILIES, LAYERS, save_model
    from tests.support.quantizing import Recipe, quantize_checkpoint

from uellm_worker.files.cache import FileCache  # noqa: E402

from tests.support.sharing import copy_parts  # noqa: E402
from uellm.models.manifest import Span  # noqa: E402

SOME = ("llama", "llama-tied", "gpt2", "opt", "gpt_neox", "falcon", "qwen3_moe", "lfm2", "mixtral")
SPANS = (Span(0, 0, True, False), Span(1, 2, False, False), Span(3, LAYERS - 1, False, True))


def load(directory: Path, span: Span) -> Shard:
    # In this dtype nothing is packed, and tensors can be compared.
    spec = ShardSpec(
        model_dir=directory,
        digest="",
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        first_layer=span.first_layer,
        last_layer=span.last_layer,
        has_embed=span.has_embed,
        has_head=span.has_head,
    )
    return load_shard(spec, None, lambda done, total: None)


def assert_loads_the_same(source: Path, hosts: Path) -> None:
    for number, span in enumerate(SPANS):
        # Each on a host of its own, or one would find what another has fetched.
        whole = load(source, span)
        fetched = load(copy_parts(source, FileCache(hosts / str(number)), span), span)
        assert whole.tensors.keys() == fetched.tensors.keys()
        for held, tensor in whole.tensors.items():
            assert torch.equal(tensor, fetched.tensors[held]), held


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in FAMILIES],
)
def test_a_stage_loads_from_what_it_fetched(family: str, tmp_path: Path) -> None:
    save_model(tmp_path / "whole", family)
    assert_loads_the_same(tmp_path / "whole", tmp_path)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(group_size=16, symmetric=False),
        Recipe("int", 8),
        Recipe("gptq", group_size=16),
        Recipe("awq", group_size=16, symmetric=False),
    ],
    ids=lambda recipe: recipe.kind,
)
def test_quantised_stages_do_so_too(recipe: Recipe, tmp_path: Path) -> None:
    save_model(tmp_path / "plain", "llama")
    source = quantize_checkpoint(tmp_path / "plain", tmp_path / "whole", recipe)
    assert_loads_the_same(source, tmp_path)
