"""`uellm verify`: what is exact is called exact, and what is not is found, and where."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner
from uellm_worker import verify as command
from uellm_worker.verification.splits import uneven_split

from tests.support.checkpoints import TOKENIZER, write_adapter
from uellm.cli.app import app
from uellm.core.errors import ConfigurationError

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from uellm_worker.verification.flips import count_flips
    from uellm_worker.verification.pipeline import Pipeline
    from uellm_worker.verification.reference import TIE, Reference
    from uellm_worker.verification.report import verify

VOCAB, TOKENS = 97, 12
PROMPTS = [[5], [7, 8, 9] * 7, [11, 12, 13], [20] * 30, [3, 4]]
Model = Any


@pytest.fixture(scope="module")
def model() -> Model:
    """A random Llama of four layers."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=2,
    )
    made = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.4)
    return made


@pytest.fixture(scope="module")
def directory(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return path


def pipeline(directory: Path) -> Pipeline:
    return Pipeline(directory, (1, 1, 2), slots=3, max_tokens=50)


def perturb(damaged: Pipeline, factor: float) -> None:
    """Scale a norm of the middle stage."""
    for held, tensor in damaged.stages[1].first.tensors.items():
        if held.key.endswith("input_layernorm.weight"):
            tensor.mul_(factor)


@given(st.integers(1, 80), st.data())
def test_a_split_is_whole_and_grows(layers: int, data: st.DataObject) -> None:
    split = uneven_split(layers, data.draw(st.integers(1, layers)))
    assert sum(split) == layers
    assert min(split) >= 1


def test_splits_are_uneven_where_they_can_be() -> None:
    assert uneven_split(8, 3) == (1, 3, 4)
    with pytest.raises(ConfigurationError, match="1 to 8"):
        uneven_split(8, 9)


def test_three_shards_are_exact(directory: Path, model: Model) -> None:
    result = verify(pipeline(directory), Reference(model), PROMPTS, TOKENS)
    assert result.exact
    assert (result.split, result.slots, result.dtype) == ((1, 1, 2), 3, "float32")
    assert result.preemptions >= 3
    for report in result.prompts:
        assert report.compared_tokens >= report.answer_tokens > 0
        assert report.logit_error < 1e-4


def test_static_batches_are_exact(directory: Path, model: Model) -> None:
    result = verify(pipeline(directory), Reference(model), PROMPTS, TOKENS, "static")
    assert result.exact
    assert result.execution == "static"
    assert result.preemptions >= 3


def test_float32_flips_no_token(directory: Path, model: Model) -> None:
    flips = count_flips(pipeline(directory), Reference(model), PROMPTS, TOKENS)
    assert (flips.dtype, flips.flipped) == ("float32", 0)
    assert flips.tokens >= TOKENS


def test_tokens_that_rounding_changed_are_counted(directory: Path, model: Model) -> None:
    half = Pipeline(directory, (2, 2), slots=3, max_tokens=50, dtype="bfloat16")
    for held, tensor in half.stages[1].first.tensors.items():
        if held.key.endswith("input_layernorm.weight"):
            tensor.neg_()  # No rounding does this much, so that some token must change.
    flips = count_flips(half, Reference(model), PROMPTS, TOKENS)
    assert flips.dtype == "bfloat16"
    assert 0 < flips.flipped <= flips.tokens
    assert flips.rate == flips.flipped / flips.tokens


def test_a_damaged_shard_is_found_with_place_and_margin(directory: Path, model: Model) -> None:
    damaged = pipeline(directory)
    perturb(damaged, 3.0)
    result = verify(damaged, Reference(model), PROMPTS, TOKENS)
    assert not result.exact
    found = [report for report in result.prompts if report.difference]
    assert found
    for report in found:
        difference, prompt = report.difference, PROMPTS[report.prompt - 1]
        wanted, logits = Reference(model).greedy(prompt, TOKENS)
        assert difference is not None
        assert difference.got is not None
        assert difference.wanted == wanted[difference.token] != difference.got
        row = logits[difference.token]
        assert difference.margin == pytest.approx(float(row.max() - row[difference.got]), abs=1e-4)
        assert difference.margin > TIE


def test_damage_that_changes_no_token_is_found_by_the_logits(directory: Path, model: Model) -> None:
    damaged = pipeline(directory)
    perturb(damaged, 1.02)
    result = verify(damaged, Reference(model), PROMPTS[:1], 1)
    assert result.prompts[0].difference is None
    assert not result.exact
    assert result.prompts[0].logit_error > 1e-3


def test_a_tie_is_passed_over_and_the_rest_still_compared(model: Model) -> None:
    reference = Reference(model)
    first = reference.greedy([5], 1)[0][0]
    head = model.lm_head.weight
    kept, twin = head[0].clone(), 0
    head[twin] = head[first]
    try:
        # Whichever of the two the reference now takes, the other is as good.
        answer = [first if reference.greedy([5], 1)[0][0] == twin else twin]
        answer += reference.greedy([5, *answer], 5)[0]
        compared = reference.compare([5], answer, 6)
        assert compared.difference is None
        assert compared.ties[0] == 0
        answer[3] = (answer[3] + 1) % VOCAB
        assert (found := reference.compare([5], answer, 6).difference) is not None
        assert found.token == 3
    finally:
        head[twin] = kept


def test_prompts_come_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    assert command.read_prompts(tmp_path, file) == ["one", "two"]
    assert len(command.read_prompts(tmp_path, None)) >= 4
    file.write_text("\n")
    with pytest.raises(ConfigurationError, match="one a line"):
        command.read_prompts(tmp_path, file)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        command.read_prompts(tmp_path, tmp_path / "none")


def test_the_command_runs_the_worker_and_prints_json(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\n")
    options = ["--prompts", str(file), "--max-tokens", "6", "--threads", "1", "--json"]
    done = CliRunner().invoke(app, ["verify", str(directory), *options])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["exact"]
    assert [prompt["prompt_tokens"] for prompt in result["prompts"]] == [1, 1]


def test_the_command_spreads_prompts_over_adapters(directory: Path, tmp_path: Path) -> None:
    twist = write_adapter(tmp_path / "twist", hidden=32)
    other = write_adapter(tmp_path / "other", hidden=32, seed=1, layers=2)
    options = ["--adapter", f"the.twist={twist}", "--adapter", f"other={other}"]
    done = CliRunner().invoke(
        app, ["verify", str(directory), *options, "--max-tokens", "6", "--threads", "1", "--json"]
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    adapters = [prompt["adapter"] for prompt in result["prompts"]]
    assert adapters[:4] == ["", "other", "the.twist", ""]


@pytest.mark.parametrize("options", [["--shards", "5"], ["--prompts", "/nowhere.txt"]])
def test_what_cannot_be_compared_is_said_in_one_line(directory: Path, options: list[str]) -> None:
    done = CliRunner().invoke(app, ["verify", str(directory), *options])
    assert done.exit_code == 2
    assert len(done.output.strip().splitlines()) == 1


def test_weights_that_do_not_fit_are_named(directory: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", hidden=16)
    misfit = shutil.copytree(directory, tmp_path / "misfit")
    config = json.loads((misfit / "config.json").read_text())
    (misfit / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    for arguments, words in (
        ([str(directory), "--adapter", f"x={adapter}"], "q_proj.lora_A.weight': shape (2, 16)"),
        ([str(misfit)], "mlp.down_proj.weight': shape"),
    ):
        done = CliRunner().invoke(app, ["verify", *arguments])
        assert done.exit_code == 2
        assert words in done.output
        assert len(done.output.strip().splitlines()) == 1


def test_a_model_that_is_not_there_is_unusable(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert done.exit_code == 2
    assert "config.json" in done.output


def test_a_difference_is_shown_and_ends_with_one(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = {
        "prompt": 1,
        "prompt_tokens": 4,
        "answer_tokens": 9,
        "ties": [2],
        "difference": {"token": 7, "got": 31, "wanted": None, "margin": 0.25},
        "logit_error": 0.5,
        "logit_error_at": 7,
        "logits_agree": False,
        "adapter": "",
    }
    result = {
        "model": "m",
        "exact": False,
        "split": [1, 3],
        "dtype": "float32",
        "execution": "continuous",
        "slots": 4,
        "preemptions": 1,
        "prompts": [prompt],
        "seconds": 1.0,
    }

    def answer(arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert arguments[:3] == [sys.executable, "-m", "uellm_worker.verify"]
        return subprocess.CompletedProcess(arguments, 1, json.dumps(result), "")

    monkeypatch.setattr("subprocess.run", answer)
    done = CliRunner().invoke(app, ["verify", str(directory)], env={"COLUMNS": "200"})
    assert done.exit_code == 1
    assert "differs at token 7: 31, and transformers says its end by 0.25" in done.output
    assert "different: m" in done.output
