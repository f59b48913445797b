"""Every family of models against transformers' own ``generate``, whatever the split.

*Exact* means token for token at float32, but for ties, and logits equal but for rounding; see
``uellm_worker.verification``, which also preempts every sequence once and prefills in chunks.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from uellm_worker.engine.shard_engine import ShardEngine
    from uellm_worker.verification.pipeline import Pipeline
    from uellm_worker.verification.reference import Reference
    from uellm_worker.verification.report import verify

    from tests.support.families import CONTEXT, FAMILIES, LAYERS, prompts, save_model

from uellm.models.families import architectures  # noqa: E402
from uellm.models.profile import read_profile  # noqa: E402
from uellm.v1.engine_pb2 import PrepareShard  # noqa: E402
from uellm.v1.topology_pb2 import ShardAssignment  # noqa: E402

SPLIT = (1, (2, 1))
"""Layers of each stage; the second has two parts."""
OTHERS = ((4,), (1, 3), (2, 1, 1), (1, 1, 1, 1))
ANSWER = 20


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """The directory and the model, of each family in turn."""
    directory = tmp_path_factory.mktemp(request.param)
    return directory, save_model(directory, request.param)


def assert_exact(directory: Path, model: Any, split: Sequence[int | tuple[int, ...]]) -> None:
    result = verify(
        Pipeline(directory, split, max_tokens=CONTEXT), Reference(model), prompts(), ANSWER
    )
    assert result.exact, result
    assert result.preemptions >= 4, "too few to tell"
    assert sum(prompt.answer_tokens for prompt in result.prompts) > 2 * ANSWER, "too short to tell"


def test_every_family_is_among_those_tested(tmp_path: Path) -> None:
    tested = {
        transformers.AutoModelForCausalLM._model_mapping[getattr(transformers, name)].__name__
        for name, _ in FAMILIES.values()
    }
    assert tested == set(architectures())


def test_a_batch_on_uneven_shards_is_exact(checkpoint: tuple[Path, Any]) -> None:
    """Six prompts on four slots, preempted and prefilled in chunks beside the others' decodes."""
    assert_exact(*checkpoint, SPLIT)


@pytest.mark.slow
@pytest.mark.parametrize("split", OTHERS)
def test_a_batch_on_any_shards_is_exact(
    checkpoint: tuple[Path, Any], split: tuple[int, ...]
) -> None:
    assert_exact(*checkpoint, split)


def test_the_profile_counts_the_bytes_that_are_held(checkpoint: tuple[Path, Any]) -> None:
    """Of the first, the second and the other layers, each a stage of its own."""
    profile = read_profile(checkpoint[0], "float32")
    ends = (profile.embed_bytes, 0, profile.head_bytes)
    for stage, (first, last) in enumerate([(0, 0), (1, 1), (2, LAYERS - 1)]):
        layers = profile.layers[first : last + 1]
        engine = ShardEngine()
        prepared = engine.prepare(
            PrepareShard(
                assignment=ShardAssignment(
                    stage_count=3,
                    first_layer=first,
                    last_layer=last,
                    has_embed=stage == 0,
                    has_head=stage == 2,
                    slots=4,
                    max_tokens=CONTEXT,
                ),
                model_dir=str(checkpoint[0]),
            ),
            lambda *_: None,
        )
        weights = sum(layer.weight_bytes for layer in layers)
        assert prepared.total_bytes == ends[stage] + weights
        assert engine._stage is not None
        (part,) = engine._stage.parts
        cache, mixers = part.cache, part.shard.mixers
        per_token = sum(tensor[0, :, 0].numel() for tensor in (*cache.keys, *cache.values))
        assert sum(layer.kv_bytes_per_token for layer in layers) == 4 * per_token
        states = sum(state[0].nbytes for mixer in mixers for state in mixer.states)
        assert sum(layer.state_bytes for layer in layers) == states
        assert prepared.capacity.sharing == (profile.state_bytes == 0)
