"""A language model is tuned to predict lengths: it learns, is kept, and serves merged."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, BertConfig, BertModel
from uellm_profiler.llm.network import Base, LengthNetwork, padded
from uellm_profiler.llm.predictor import ADAPTER, LlmPredictor
from uellm_profiler.llm.tuning import Sample, Schedule, Tuning, pinball
from uellm_profiler.text.predictor import TextPredictor
from uellm_profiler.text.record import SAID, unpacked

import uellm.demo
from uellm.core.errors import InvalidArgumentError, ModelFilesError
from uellm.core.request import LEVELS
from uellm.learning.examples import Example
from uellm.learning.store import load_predictor
from uellm.learning.training import evaluate, train
from uellm.prediction import registry
from uellm.prediction.interface import PredictionRequest

DEMO = Path(uellm.demo.__file__).parent / "model"
OPTIONS = {"base_model": str(DEMO), "epochs": 8, "batch": 16, "rank": 4, "learning_rate": 8e-3}


def examples(count: int, seed: int) -> list[Example]:
    """Answers as long as the prompt says, give or take a tenth."""
    rng = Random(seed)  # noqa: S311
    found = []
    for _ in range(count):
        last = rng.randint(2, 90)
        if rng.random() < 0.5:
            prompt, length = f"Count from 1 to {last}.", 3 * last
        else:
            prompt, length = f"What is {last} + {rng.randint(2, 90)}?", 4
        found.append(Example(prompt, max(round(length * rng.uniform(0.9, 1.1)), 1), 12))
    return found


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its entry point offers it."""

    def make(name: str, settings: dict[str, object] | None = None) -> LlmPredictor:
        assert name == "llm"
        return LlmPredictor(settings)

    monkeypatch.setattr("uellm.learning.training.predictor", make)
    monkeypatch.setattr("uellm.learning.store.predictor", make)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuned")


@pytest.fixture(scope="module")
def tuned(directory: Path) -> LlmPredictor:
    torch.manual_seed(0)
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uellm.learning.training.predictor", lambda _, s: LlmPredictor(s))
        made = train(
            "llm", examples(240, 1), directory, OPTIONS, progress=lambda what, _: told.append(what)
        )
    for half in ("half 1", "half 2"):
        losses = [float(what.rpartition(" ")[2]) for what in told if f"{half} of 2, loss" in what]
        # It learns: from what any prompt would be expected to come to, to a fraction of that.
        assert losses[-1] < 0.4 * losses[0]
        assert len(set(losses)) <= 25
    assert isinstance(made, LlmPredictor)
    return made


@pytest.fixture
def learner(tuned: LlmPredictor, directory: Path) -> LlmPredictor:
    """One that was tuned, and learns for one test alone."""
    found = load_predictor(directory)
    assert isinstance(found, LlmPredictor)
    return found


def test_it_learns_what_prompts_ask_for(tuned: LlmPredictor) -> None:
    unseen = evaluate(tuned, examples(200, 2))
    lengths = np.array(unseen.lengths)
    guess = np.abs(lengths - np.median(lengths)).mean()
    assert unseen.scores.mae < 0.4 * guess
    assert unseen.scores.spearman > 0.85


def test_what_was_tuned_is_kept_in_peft_s_format_and_as_a_predictor(
    tuned: LlmPredictor, directory: Path
) -> None:
    asked = [example.request() for example in examples(20, 3)]
    again = load_predictor(directory)
    found, expected = (
        np.array([one.lengths.values for one in each.predict_batch(asked)])
        for each in (again, tuned)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert {path.name for path in (directory / ADAPTER).iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    # The same states as the adapter, read by peft, gives; here its matrices are merged.
    base = Base.read(DEMO)
    ids, mask = padded(base.encode(["Count from 1 to 40."]), base.most_tokens)
    backbone = AutoModel.from_pretrained(DEMO, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Between peft and transformers.
        adapted = PeftModel.from_pretrained(backbone, str(directory / ADAPTER))
    network = tuned._network
    assert network is not None
    assert not any("lora" in name for name, _ in network.named_parameters())
    with torch.inference_mode():
        torch.testing.assert_close(
            network.backbone(input_ids=ids, attention_mask=mask).last_hidden_state.float(),
            adapted(input_ids=ids, attention_mask=mask).last_hidden_state,
            rtol=0.05,
            atol=0.05,
        )


def test_what_was_seen_stands_for_the_prompt(tuned: LlmPredictor) -> None:
    (request,) = [example.request() for example in examples(1, 4)]
    (first,) = tuned.predict_batch([request])
    unread = PredictionRequest(
        request.model, request.regime, request.prompt_tokens, 0, features=first.features
    )
    assert tuned.predict_batch([unread]) == [first]
    seen = unpacked(first.features)
    assert seen is not None
    assert len(seen.said) == SAID
    assert request.text.encode() not in first.features


def test_it_follows_a_model_whose_answers_grow(learner: LlmPredictor) -> None:
    def asked(last: int) -> PredictionRequest:
        text = f"Count from 1 to {last}."
        return PredictionRequest("other", "greedy", 12, 0, text=text)

    (before,) = learner.predict_batch([asked(50)])
    rng = Random(5)  # noqa: S311
    for _ in range(150):
        last = rng.randint(5, 90)
        (prediction,) = learner.predict_batch([asked(last)])
        facts = Example("", 9 * last, 12, "other").facts(prediction.features)
        learner.observe(facts)
    (prediction,) = learner.predict_batch([asked(50)])
    assert 300 < prediction.lengths.at(0.5) < 650
    assert prediction.lengths.at(0.5) > 2 * before.lengths.at(0.5)


def test_until_it_is_tuned_it_is_text() -> None:
    predictor = LlmPredictor(OPTIONS)
    request = PredictionRequest("m", "greedy", 5, 100, text="Count from 1 to 9.")
    (prediction,) = predictor.predict_batch([request])
    assert prediction == replace(TextPredictor().predict_batch([request])[0], by="text")
    (without,) = predictor.predict_batch([replace(request, text=" ")])
    assert without.features == b""
    assert without.lengths.values[-1] == 100


def test_who_is_hurried_is_answered_from_words_alone(
    learner: LlmPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [replace(each.request(), hurried=i > 2) for i, each in enumerate(examples(40, 6))]
    read: list[str] = []
    say = LengthNetwork.say

    def listened(network: LengthNetwork, texts: Sequence[str]) -> Any:
        read.extend(texts)
        return say(network, texts)

    monkeypatch.setattr(LengthNetwork, "say", listened)
    found = learner.predict_batch(asked)
    assert read == [request.text for request in asked[:3]]
    assert [prediction.by for prediction in found] == 3 * [""] + 37 * ["text"]
    lengths = np.array([example.output_tokens for example in examples(40, 6)])
    medians = np.array([prediction.lengths.at(0.5) for prediction in found])
    assert np.abs(medians - lengths).mean() < np.abs(lengths - np.median(lengths)).mean()
    # What comes of them is learnt from, whether they were read or not.
    before = learner.observations(asked[0].model)
    for example, prediction in zip(examples(40, 6), found, strict=True):
        learner.observe(example.facts(prediction.features))
    assert learner.observations(asked[0].model) == before + 40


def test_long_prompts_are_read_from_both_ends() -> None:
    base = Base.read(DEMO, most_tokens=8)
    (whole,), (short,) = (base.encode([text]) for text in ("a b c d e f g h i j k l m n", "a b"))
    longer = Base.read(DEMO).encode(["a b c d e f g h i j k l m n"])[0]
    assert whole == longer[:6] + longer[-2:]
    assert len(short) < 8
    assert base.encode(["", "\ud800"]) != []


def test_an_encoder_is_tuned_too(tmp_path: Path) -> None:
    """BERT-like: its states are averaged, and padding leaves no trace in them."""
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path)
    words = {"[PAD]": 0, "[UNK]": 1} | {str(n): n + 2 for n in range(150)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    base = Base.read(tmp_path, most_tokens=256)
    assert (base.causal, base.most_tokens) == (False, 64)
    network = LengthNetwork(base, 4)
    samples = [Sample(str(n), n / 50 - 1.0) for n in range(100)] * 4
    tuning = Tuning(network, samples, Schedule(epochs=8, batch=20, learning_rate=1e-2))
    tuning.run()
    assert np.mean(tuning.losses[-5:]) < 0.5 * np.mean(tuning.losses[:5])
    merged = network.cpu().merged(torch.float32)
    alone, beside = (
        merged.quantiles(["7"]),
        merged.quantiles(["7", "7 8 9 10 11 12 13 14 15 16 17"]),
    )
    np.testing.assert_allclose(alone[0], beside[0], atol=1e-5)
    assert (np.diff(alone, axis=-1) >= 0).all()


def test_a_tuning_that_was_interrupted_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uellm_profiler.llm.tuning.CHECKPOINT_STEPS", 3)
    samples = [Sample(f"Count from 1 to {n}.", n / 10, n == 7) for n in range(2, 26)]
    schedule = Schedule(epochs=2, batch=4, learning_rate=3e-3)

    def network() -> LengthNetwork:
        torch.manual_seed(1)
        return LengthNetwork(Base.read(DEMO), 2)

    whole = network()
    Tuning(whole, samples, schedule).run()

    class Interrupted(Exception):
        pass

    def stop(done: int, loss: float) -> None:
        if done == 4 * 8:
            raise Interrupted

    with pytest.raises(Interrupted):
        Tuning(network(), samples, schedule, tmp_path, "these").run(stop)
    assert (tmp_path / "checkpoint.json").exists()
    other = Tuning(network(), samples, schedule, tmp_path, "others")
    assert other._resume() == 0
    parts = network()
    resumed = Tuning(parts, samples, schedule, tmp_path, "these")
    resumed.run()
    assert len(resumed.losses) == 12 - 6
    done = Tuning(network(), samples, schedule, tmp_path, "these")
    assert done._resume() == done.steps
    Tuning.forget(tmp_path)
    assert not tmp_path.exists()
    for name, array in whole.tuned().items():
        np.testing.assert_allclose(parts.tuned()[name], array, atol=1e-5, err_msg=name)


def test_a_cut_answer_speaks_only_for_being_longer() -> None:
    quantiles = torch.linspace(0, 3, len(LEVELS))[None]
    target = torch.tensor([1.0])
    known = pinball(quantiles, target, torch.tensor([False]))
    cut = pinball(quantiles, target, torch.tensor([True]))
    assert 0 < cut < known
    beyond = pinball(quantiles + 10, target, torch.tensor([True]))
    assert beyond == 0


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="--base-model"):
        LlmPredictor()
    with pytest.raises(ModelFilesError, match="no base model"):
        LlmPredictor({"base_model": str(tmp_path)})
    with pytest.raises(InvalidArgumentError, match="rank"):
        LlmPredictor({**OPTIONS, "rank": 0})
    predictor = LlmPredictor(OPTIONS)
    with pytest.raises(InvalidArgumentError, match="state: not one of predictor 'llm'"):
        predictor.load({**predictor.state(), "tuned_lora:x": np.zeros(3)})


def test_it_is_offered_by_its_name() -> None:
    assert "llm" in registry.predictors()
