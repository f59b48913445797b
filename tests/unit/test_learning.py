"""Predictors trained on files, kept in directories, and judged: the library and its commands."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.support.prompts import prompts
from uellm.cli.app import app
from uellm.core.errors import ConfigurationError
from uellm.core.request import LEVELS, QuantileFunction
from uellm.learning import training
from uellm.learning.examples import Example, Problem, example_of, read_examples
from uellm.learning.store import MANIFEST, Manifest, load_predictor, save_predictor
from uellm.prediction.metrics import kendall, scores, spearman
from uellm.prediction.prior import Prior

NUMBERS = st.lists(st.integers(0, 6), min_size=2, max_size=150)


def write(path: Path, lines: Sequence[object]) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def synthetic(count: int, seed: int) -> list[dict[str, object]]:
    texts, lengths = prompts(count, seed)
    return [
        {"prompt": text, "output_tokens": int(length), "model": "m"}
        for text, length in zip(texts, lengths, strict=True)
    ]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["profiler", *map(str, arguments)])


# ---- metrics -----------------------------------------------------------------------------------


@given(NUMBERS, st.randoms(use_true_random=False))
def test_kendall_counts_pairs(first: list[int], random: Any) -> None:
    second = [random.choice(first) for _ in first]
    pairs = [(i, j) for j in range(len(first)) for i in range(j)]
    signs = [np.sign(first[i] - first[j]) * np.sign(second[i] - second[j]) for i, j in pairs]
    untied = [sum(each[i] != each[j] for i, j in pairs) for each in (first, second)]
    found = kendall(np.array(first, dtype=float), np.array(second, dtype=float))
    if untied[0] * untied[1]:
        assert found == pytest.approx(sum(signs) / (untied[0] * untied[1]) ** 0.5)
    else:
        assert np.isnan(found)


def test_spearman_of_ties_by_hand() -> None:
    # Ranks 1.5 1.5 3 and 1 2 3.
    assert spearman(np.array([5.0, 5, 9]), np.array([1.0, 2, 3])) == pytest.approx(0.75**0.5)
    assert np.isnan(spearman(np.array([1.0, 1]), np.array([1.0, 2])))


def test_scores_by_hand() -> None:
    certain = [QuantileFunction(LEVELS, [float(y)] * len(LEVELS)) for y in range(1, 101)]
    perfect = scores(certain, list(range(1, 101)))
    assert (perfect.spearman, perfect.mae, perfect.r2, perfect.pinball) == (1, 0, 1, 0)
    assert (perfect.coverage, perfect.coverage_p90, perfect.width) == (1, 1, 0)
    assert (perfect.width_accuracy, perfect.population_accuracy) == (1, 1)
    assert perfect.population_majority == pytest.approx(0.1, abs=0.01)
    wide = [QuantileFunction(LEVELS, [100 * level for level in LEVELS])] * 100
    constant = scores(wide, list(range(1, 101)))
    assert constant.mae == 25
    assert constant.coverage_p90 == 0.9
    assert constant.coverage == 0.81
    assert constant.width == pytest.approx(80)
    with pytest.raises(ValueError, match="1 predictions and 0 lengths"):
        scores(wide[:1], [])


# ---- examples ----------------------------------------------------------------------------------


def test_a_line_says_what_it_says_and_the_rest_is_assumed(tmp_path: Path) -> None:
    full = {
        "prompt": "p",
        "output_tokens": 3,
        "prompt_tokens": 9,
        "model": "m",
        "regime": "sampled",
        "censored": True,
    }
    path = write(tmp_path / "d.jsonl.gz", [{"prompt": 8 * "abc ", "output_tokens": 7.0}, "", full])
    assert list(read_examples(path)) == [
        Example(8 * "abc ", 7, 8),
        Example("p", 3, 9, "m", "sampled", True),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("\ufeff{", "not JSON: Expecting property name"),
        ("[1]", "a list, not an object"),
        ('{"output_tokens": 3}', "prompt: missing"),
        ('{"prompt": 5, "output_tokens": 3}', "prompt: 5 is not text"),
        ('{"prompt": "p"}', "output_tokens: missing"),
        ('{"prompt": "p", "output_tokens": -1}', "output_tokens: -1 is not a whole number from 0"),
        ('{"prompt": "p", "output_tokens": true}', "output_tokens: True is not a whole number"),
        ('{"prompt": "p", "output_tokens": 1.5}', "output_tokens: 1.5 is not a whole number"),
        ('{"prompt": "p", "output_tokens": 1, "regime": "x"}', "regime: 'x' is neither"),
        ('{"prompt": "p", "output_tokens": 1, "censored": 1}', "censored: 1 is neither"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = write(tmp_path / "d.jsonl", ['{"prompt": "p", "output_tokens": 1}', line])
    [_, found] = read_examples(path)
    assert isinstance(found, Problem)
    assert f"{path}:2: {problem}" in str(found)


@given(st.binary(max_size=60))
def test_no_line_breaks_the_reader(line: bytes) -> None:
    try:
        example_of(line)
    except ValueError as error:
        assert str(error)


# ---- keeping -----------------------------------------------------------------------------------


def test_a_directory_holds_one_whole_predictor(tmp_path: Path) -> None:
    predictor = Prior()
    for length in (10, 20, 30):
        predictor.observe(Example("p", length, 5).facts(b""))
        save_predictor(tmp_path / "kept", predictor)
    assert load_predictor(tmp_path / "kept").describe("default") == predictor.describe("default")
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == {MANIFEST, "state-3.npz"}


def test_what_is_wrong_with_a_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"holds no predictor\.json; `uellm profiler train`"
    ):
        load_predictor(tmp_path)
    save_predictor(tmp_path, Prior())
    manifest = tmp_path / MANIFEST
    right = manifest.read_text()
    manifest.write_text(right.replace(f'"{Prior.version}"', '"0"'))
    with pytest.raises(ConfigurationError, match="of version 0, this is version"):
        load_predictor(tmp_path)
    manifest.write_text(right)
    (tmp_path / "state-1.npz").write_bytes(b"PK\x03\x04 not a zip file")
    with pytest.raises(ConfigurationError, match=r"state-1\.npz is damaged"):
        load_predictor(tmp_path)
    manifest.write_text("{")
    with pytest.raises(ConfigurationError, match="is not readable"):
        load_predictor(tmp_path)


# ---- training and judging ----------------------------------------------------------------------


def test_an_interrupted_training_goes_on_where_it_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECKPOINT_EXAMPLES", 100)
    examples = [Example("p", 10 + i, 5) for i in range(250)]
    told: list[tuple[str, int]] = []

    def interrupt(what: str, done: int) -> None:
        if done > 130:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train("prior", examples, tmp_path / "out", progress=interrupt)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    assert (manifest.training["done"], manifest.training["complete"]) == (100, False)

    made = training.train(
        "prior", examples, tmp_path / "out", progress=lambda *each: told.append(each)
    )
    assert told[0] == ("resumed", 100)
    assert min(done for what, done in told if what == "learning") > 100
    whole = training.train("prior", examples, tmp_path / "other")
    assert made.describe("default") == whole.describe("default")
    assert made.observations("default") == 250


def test_train_and_eval_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = write(tmp_path / "train.jsonl", [*synthetic(700, 0), '{"prompt": "x"}'])
    trained = run("train", "--data", data, "--out", tmp_path / "p", "--json")
    assert trained.exit_code == 0, trained.output
    assert f"skipped {data}:701: output_tokens: missing" in trained.stderr
    assert json.loads(trained.stdout)["skipped"] == 1

    fresh = write(tmp_path / "test.jsonl", synthetic(200, 1))
    drawn = tmp_path / "drawn.png"
    arguments = ("--profiler", tmp_path / "p", "--data", fresh, "--plot", drawn, "--json")
    judged = run("eval", *arguments)
    assert judged.exit_code == 0, judged.output
    found = json.loads(judged.stdout)
    assert found["predictor"] == "text"
    assert found["count"] == 200
    assert found["spearman"] > 0.9
    assert found["width_accuracy"] > found["width_majority"]
    assert 0.8 < found["coverage_p90"] < 0.97
    assert drawn.stat().st_size > 1000
    online = json.loads(run("eval", *arguments[:4], "--online", "--json").stdout)
    assert online["spearman"] > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "foo"), "predictor: no 'foo'; available: "),
        (("--backend", "prior", "--set", "cell_window"), "set: 'cell_window' is not NAME=VALUE"),
        (("--backend", "prior", "--set", "cell_window=0"), "cell_window: 0 must be at least 1"),
        (("--backend", "prior", "--strict"), "d.jsonl:2: prompt: missing"),
    ],
)
def test_what_cannot_be_trained_is_said(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": "p", "output_tokens": 3}, "{}"])
    done = run("train", "--data", data, "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_predictor_that_is_there_is_not_overwritten_by_mistake(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": "p", "output_tokens": 3}])
    train = ("train", "--backend", "prior", "--data", data, "--out", tmp_path / "out")
    assert run(*train).exit_code == 0
    again = run(*train)
    assert (again.exit_code, "or --force" in again.stderr) == (2, True)
    assert run(*train, "--force").exit_code == 0


def test_missing_data_is_said(tmp_path: Path) -> None:
    done = run("train", "--data", tmp_path / "none.jsonl", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "none.jsonl" in done.stderr
    empty = run("train", "--data", write(tmp_path / "e.jsonl", []), "--out", tmp_path / "out")
    assert "no examples to learn from" in empty.stderr


def test_a_file_whose_compression_is_damaged_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl.gz", synthetic(500, 0))
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(byte ^ 0x5A for byte in content[2000:2100])
    path.write_bytes(content)
    done = run("train", "--data", path, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert f"data: {path}: " in done.stderr


def test_a_place_that_cannot_be_written_is_said_before_the_training(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", synthetic(10, 0))
    for out in (data, "/proc/predictor"):
        done = run("train", "--backend", "prior", "--data", data, "--out", out)
        assert done.exit_code == 2
        assert f"out: {out}: " in done.stderr
        assert "learning" not in done.stderr
