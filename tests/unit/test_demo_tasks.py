"""The demonstration's tasks: what is drawn, what is kept out of training, what counts as right."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from uellm import demo
from uellm.demo.prompts import demo_prompts
from uellm.demo.tasks import (
    HELDOUT_SHARE,
    KINDS,
    MAX_ADDEND,
    MAX_SENTENCES,
    MIN_SENTENCES,
    Kind,
    Split,
    Task,
    check,
    generate_task,
    is_heldout,
    parse,
    write_answer,
)

MODEL = Path(demo.__file__).parent / "model"

seeds = st.integers(min_value=0, max_value=2**32)
kinds = st.sampled_from(KINDS)
splits = st.sampled_from(("train", "heldout"))


def draw(seed: int, split: Split = "train", kind: Kind | None = None) -> Task:
    return generate_task(random.Random(seed), split, kind)  # noqa: S311


@given(seeds, splits, kinds)
def test_a_task_can_be_parsed_back_and_its_answer_is_right(
    seed: int, split: Split, kind: Kind
) -> None:
    task = draw(seed, split, kind)

    assert task.kind == kind
    assert parse(task.prompt) == (task.kind, task.arguments)
    assert task.check(task.answer)
    assert check(task.prompt, f" {task.answer}\n")


@given(seeds, splits, kinds)
def test_the_splits_are_disjoint(seed: int, split: Split, kind: Kind) -> None:
    task = draw(seed, split, kind)

    assert is_heldout(*parse(task.prompt)) == (split == "heldout")


@given(seeds, splits)
def test_equal_states_draw_equal_tasks(seed: int, split: Split) -> None:
    assert draw(seed, split) == draw(seed, split)


@given(seeds, kinds, st.data())
def test_cut_or_padded_answers_are_wrong(seed: int, kind: Kind, data: st.DataObject) -> None:
    task = draw(seed, "heldout", kind)
    kept = data.draw(st.integers(0, len(task.answer) - 1))

    assert not task.check(task.answer[:kept])
    assert not task.check(f"{task.answer} More.")
    assert not task.check(f"{task.answer}\n{task.answer}")


@pytest.mark.parametrize(
    ("prompt", "right", "wrong"),
    [
        ("Count from 3 to 6.", "3, 4, 5, 6", "3, 4, 6"),
        ("Count down from 11 to 9.", "11, 10, 9", "9, 10, 11"),
        ("Please spell the word 'garden'.", "g a r d e n", "g a r d n e"),
        ("Reverse the word 'tree'.", "eert", "tree"),
        ("What is 27 + 45?", "72", "27 + 45 = 72"),
        ("Repeat the word tree two times.", "1. tree\n2. tree", "1. tree\n2. trees"),
        ("Say the phrase good night 1 time.", "1. good night", "good night"),
        ("List 2 animals.", "1. fox\n2. cat", "1. cat\n2. cat"),
        ("List two fruits.", "1. kiwi\n2. fig", "1. kiwi\n2. hammer"),
        ("Name three birds.", "1. owl\n2. hawk\n3. dove", "owl\nhawk\ndove"),
        (
            "Tell me a story of 2 sentences about an owl.",
            "There was an owl called Ivy. She slept!",
            "There was an owl called Ivy.",
        ),
        (
            "Write a story about a fox in two sentences.",
            "The fox woke. It ate.",
            "The dog woke. It ate.",
        ),
    ],
)
def test_right_and_wrong_answers(prompt: str, right: str, wrong: str) -> None:
    assert check(prompt, right)
    assert not check(prompt, wrong)


@pytest.mark.parametrize("prompt", ["", "Hello!", "List 3 planets.", "List some animals."])
def test_unknown_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a prompt of a known task"):
        parse(prompt)


@given(st.integers(0, MAX_ADDEND), st.integers(0, MAX_ADDEND))
def test_a_sum_is_kept_out_in_either_order(a: int, b: int) -> None:
    assert is_heldout("add", (a, b)) == is_heldout("add", (b, a))


def test_the_heldout_share_is_as_stated() -> None:
    pairs = [(a, b) for a in range(100) for b in range(a, 100)]

    assert sum(is_heldout("add", pair) for pair in pairs) / len(pairs) == pytest.approx(
        HELDOUT_SHARE, abs=0.02
    )


@pytest.mark.parametrize("sentences", range(MIN_SENTENCES, MAX_SENTENCES + 1))
def test_a_story_has_as_many_sentences_as_asked_for(sentences: int) -> None:
    tasks = (draw(seed, kind="story") for seed in range(100_000))
    task = next(task for task in tasks if task.arguments[1] == sentences)

    assert task.answer.count(".") == sentences


def test_the_demo_asks_24_different_prompts_kept_out_of_training() -> None:
    prompts = demo_prompts()

    assert len({prompt.prompt for prompt in prompts}) == len(prompts) == 24
    assert {prompt.kind for prompt in prompts} == set(KINDS)
    for prompt in prompts:
        kind, arguments = parse(prompt.prompt)
        assert kind == prompt.kind
        assert is_heldout(kind, arguments)
        assert prompt.checkable
        assert 2 <= prompt.deadline_s <= 60


def test_the_demo_asks_for_what_is_urgent_last() -> None:
    deadlines = [prompt.deadline_s for prompt in demo_prompts()]

    assert min(deadlines[:8]) > max(deadlines[-8:])


def test_the_model_directory_is_complete_and_small() -> None:
    names = {path.name for path in MODEL.iterdir()}

    assert names >= {
        "README.md",
        "accuracy.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 10_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@given(text=st.text())
def test_the_tokenizer_loses_nothing(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids

    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@given(seed=seeds, kind=kinds)
def test_the_tokenizer_knows_our_words_but_spells_quoted_ones(
    tokenizer: Tokenizer, seed: int, kind: Kind
) -> None:
    task = draw(seed, kind=kind)
    tokens = tokenizer.encode(task.prompt).tokens

    if kind in {"spell", "reverse"}:
        word = str(task.arguments[0])
        assert list(word) in [tokens[i : i + len(word)] for i in range(len(tokens))]
    else:
        assert len(tokens) <= 2 * len(task.prompt.split()) + 6


def test_the_demo_leaves_room_for_right_answers(tokenizer: Tokenizer) -> None:
    for prompt in demo_prompts():
        kind, arguments = parse(prompt.prompt)
        answers = [write_answer(kind, arguments, random.Random(i)) for i in range(100)]  # noqa: S311

        assert all(len(tokenizer.encode(text).ids) < prompt.max_tokens for text in answers)
