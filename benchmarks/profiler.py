"""How good predicted output lengths are: accuracy, new models, changes, speed.

    python -m benchmarks.profiler --data DIR [--train DIR] [--backends prior,text] [--json]
        [--llm-base DIR [--llm-out DIR]]

DIR holds prompts with lengths, as ``benchmarks.profiler_data`` says; what it has too few of is left
out. A fifth of the prompts is kept from all that learns, or, with ``--train``, all of DIR is.
``accuracy``: every backend and every baseline on instructions that none has seen; the backends have
learnt from all models at once, the baselines from the one that is predicted. ``online``: from
nothing, each outcome learnt after it was predicted, fits taken at once; outcomes 2,000 to 4,000.
``new-model``: a model of which 200 outcomes are known, other models' answers to the same prompts
being known, and alone. ``drift``: coverage of the 90 % quantile 300 to 1,000 outcomes after the
model or the task changed. ``speed``: one core.

``--llm-base`` puts ``llm`` beside the others, tuned from that model to the same examples: some
twenty minutes on two cores for a model of 22 million weights. It is kept in ``--llm-out``, from
which an interrupted tuning goes on, and which is taken as it is if it was tuned to these very
examples. It begins with what it was tuned to, so that ``online`` and ``new-model``, which begin
with nothing, are without it.
"""

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.arguments import count, directory, one_of, parser_of, several
from benchmarks.profiler_baselines import BASELINES, with_errors
from benchmarks.profiler_data import DAVINCI, VICUNA, Data, read_data
from uellm.learning.examples import Example
from uellm.learning.store import Manifest, load_predictor
from uellm.learning.training import digest, evaluate, teach, train
from uellm.prediction.interface import Predictor
from uellm.prediction.metrics import scores
from uellm.prediction.registry import predictor, predictors

PARTS = ("accuracy", "online", "new-model", "drift", "speed")
KNOWN = 200
"""Outcomes of a new model that are known."""
SETTLED, AFTER = 300, 1000
WINDOW = 200
LEARNING, JUDGED = 2000, 4000
"""Outcomes that are learnt from before others are judged, and where those end."""
_BEFORE = 500
_FEWEST_ROWS = 1200
LLM = "llm"
BATCHES = (1, 8, 32, 64)
MOST_TIMED = 4096


def main() -> None:
    """Measure what is asked for, and print it."""
    parser = parser_of("profiler", __doc__)
    parser.add_argument("--data", type=directory, required=True, help="prompts with lengths")
    parser.add_argument(
        "--train", type=directory, help="what is learnt from; by default 4/5 of --data"
    )
    parser.add_argument(
        "--backends",
        type=several(one_of([name for name in predictors() if name != LLM])),
        default="prior,text",
        help="by commas",
    )
    parser.add_argument(
        "--parts", type=several(one_of(PARTS)), default=",".join(PARTS), help="by commas"
    )
    parser.add_argument("--changes", type=count, default=50, help="of drift, each with its seed")
    parser.add_argument("--models", type=count, default=15, help="new ones, of each table")
    parser.add_argument("--llm-base", type=directory, help="a model that llm is tuned from")
    parser.add_argument("--llm-out", type=Path, help="where llm is kept; by default nowhere")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    data = read_data(options.data)
    known = read_data(options.train) if options.train else data.part(held=False)
    test = data if options.train else data.part(held=True)
    backends, parts = options.backends, options.parts
    with threadpool_limits(1):
        trained = {name: learnt(name, known.alpaca) for name in backends} if known.alpaca else {}
        if options.llm_base and known.alpaca:
            trained[LLM] = tuned(known.alpaca, options.llm_base, options.llm_out)
        found: dict[str, Any] = {}
        if "accuracy" in parts and trained:
            found["accuracy"] = accuracy(trained, known, test)
        if "online" in parts:
            found["online"] = {
                model: {name: online(name, data.of(model)) for name in backends}
                for model in (DAVINCI, VICUNA)
                if len(data.of(model)) > LEARNING
            }
        if "new-model" in parts:
            found["new-model"] = {
                name: new_models(backends, getattr(data, name), options.models)
                for name in ("alpaca_eval", "flask")
                if getattr(data, name)
            }
        if "speed" in parts and trained:
            asked = [each for each in test.alpaca if each.model == DAVINCI]
            found["speed"] = {name: speed(made, asked) for name, made in trained.items()}
        if "drift" in parts and trained and len(sources := kinds(test)) > 1:
            found["drift"] = {
                name: drift(made, _maker(name, options.llm_base), sources, options.changes)
                for name, made in trained.items()
            }
    if options.json:
        print(json.dumps(_without_nan(found), indent=2))
    else:
        show(found)


def learnt(name: str, examples: Sequence[Example], **settings: object) -> Predictor:
    """A predictor that has learnt from examples, in an order of no meaning."""
    shuffled = _shuffled(examples)
    room = {"most_rows": max(len(shuffled), 50_000)} if name == "text" else {}
    made = predictor(name, {**room, **settings})
    for start in range(0, len(shuffled), 64):
        teach(made, shuffled[start : start + 64])
    while (work := made.refit()) is not None:
        made.adopt(work())
    return made


def _shuffled(examples: Sequence[Example]) -> list[Example]:
    shuffled = list(examples)
    random.Random(0).shuffle(shuffled)
    return shuffled


def tuned(examples: Sequence[Example], base: Path, out: Path | None) -> Predictor:
    """A language model that was tuned to examples, now or before."""
    shuffled = _shuffled(examples)
    settings = {"base_model": str(base.resolve()), "most_rows": max(len(shuffled), 50_000)}
    with TemporaryDirectory() as passing:
        directory = out or Path(passing)
        kept = (Manifest.read(directory) or Manifest("", "")).training
        if kept.get("complete") and kept.get("examples") == digest(shuffled):
            return load_predictor(directory)
        return train(LLM, shuffled, directory, settings)


def accuracy(trained: dict[str, Predictor], train: Data, test: Data) -> dict[str, Any]:
    """Scores of every backend and baseline, for each model that answered instructions."""
    found: dict[str, Any] = {}
    for model in (DAVINCI, VICUNA):
        known, asked = ([e for e in d.of(model) if not e.censored] for d in (train, test))
        if not known or not asked:
            continue
        rows = found.setdefault(model, {})
        for name, make in BASELINES.items():
            predict = with_errors(make, known)
            began = time.perf_counter()
            said = predict(asked)
            seconds = (time.perf_counter() - began) / len(asked)
            judged = scores(said, [example.output_tokens for example in asked])
            rows[name] = asdict(judged) | {"seconds_per_request": seconds}
        for name, made in trained.items():
            outcome = evaluate(made, asked)
            rows[name] = asdict(outcome.scores) | {
                "seconds_per_request": outcome.seconds_per_request
            }
    return found


def online(name: str, examples: Sequence[Example]) -> dict[str, Any]:
    """Scores of a predictor that begins with nothing and learns as it predicts."""
    stream = random.Random(1).sample(examples, min(JUDGED, len(examples)))
    made = predictor(name)
    said = []
    for example in stream:
        [prediction] = made.predict_batch([example.request()])
        said.append(prediction.lengths)
        made.observe(example.facts(prediction.features))
        if (work := made.refit()) is not None:
            made.adopt(work())
    true = [example.output_tokens for example in stream]
    return asdict(scores(said[LEARNING:], true[LEARNING:]))


def new_models(
    backends: Sequence[str], answers: dict[str, list[Example]], count: int
) -> dict[str, Any]:
    """Means over models of which little is known, the others known and not."""
    names = sorted(answers)
    rng = random.Random(0)
    rng.shuffle(names)
    new, others = names[: min(count, len(names) // 3)], names[min(count, len(names) // 3) :]
    pool = [example for name in others for example in answers[name]]
    found: dict[str, Any] = {}
    for backend in backends:
        pooled = learnt(backend, pool)
        for kind in ("pooled", "alone"):
            judged = []
            for name in new:
                shuffled = rng.sample(answers[name], len(answers[name]))
                known, asked = shuffled[:KNOWN], shuffled[KNOWN:]
                if kind == "alone":
                    made = learnt(
                        backend, known, **({"first_fit": 64} if backend == "text" else {})
                    )
                else:
                    made = pooled
                    for example in known:
                        teach(made, [example])
                judged.append(asdict(evaluate(made, asked).scores))
            # R2 of a model whose answers are all of one length is beyond all bounds.
            found[f"{backend}, {kind}"] = {
                key: float((np.nanmedian if key == "r2" else np.nanmean)([e[key] for e in judged]))
                for key in judged[0]
            } | {"models": len(new)}
    return found


def _maker(name: str, base: Path | None) -> Callable[[], Predictor]:
    """Makes predictors that take the state of one that has learnt."""
    room = {} if name == "prior" else {"most_rows": 200_000}
    model = {"base_model": str(base)} if name == LLM else {}
    return lambda: predictor(name, {**room, **model})


def kinds(test: Data) -> dict[str, list[Example]]:
    """What may be served under one name, each with enough examples to change to it."""
    sources = {
        "davinci, plain": [e for e in test.of(DAVINCI) if "\n" not in e.prompt],
        "davinci, with input": [e for e in test.of(DAVINCI) if "\n" in e.prompt],
        "vicuna": [e for e in test.of(VICUNA) if not e.censored],
        **{f"flask, {model}": examples for model, examples in test.flask.items()},
    }
    return {key: rows for key, rows in sources.items() if len(rows) >= _FEWEST_ROWS}


def drift(
    learner: Predictor,
    make: Callable[[], Predictor],
    sources: Mapping[str, Sequence[Example]],
    changes: int,
) -> dict[str, Any]:
    """Coverage of the 90 % quantile after abrupt changes of what is served under one name."""
    state = learner.state()
    prompts = list({e.prompt: e.request() for rows in sources.values() for e in rows}.values())
    seen = {
        asked.text: said.features
        for start in range(0, len(prompts), 64)
        for asked, said in zip(
            prompts[start : start + 64],
            learner.predict_batch(prompts[start : start + 64]),
            strict=True,
        )
    }
    means, sound, lows, highs = [], [], [], []
    for seed in range(changes):
        rng = random.Random(seed)
        first, second = rng.sample(sorted(sources), 2)
        stream = rng.sample(sources[first], _BEFORE) + rng.sample(sources[second], AFTER)
        made = make()
        made.load(state)
        hits = np.array(_hits(made, stream, seen)[_BEFORE + SETTLED :])
        windows = np.convolve(hits, np.full(WINDOW, 1 / WINDOW), "valid")
        means.append(hits.mean())
        lows.append(windows.min())
        highs.append(windows.max())
        sound.append(windows.min() >= 0.80 and windows.max() <= 0.97)
    return {
        "changes": changes,
        "mean": float(np.mean(means)),
        "mean_p05": float(np.quantile(means, 0.05)),
        "mean_p95": float(np.quantile(means, 0.95)),
        "window_min_p05": float(np.quantile(lows, 0.05)),
        "window_max_p95": float(np.quantile(highs, 0.95)),
        "windows_sound": float(np.mean(sound)),
    }


def _hits(made: Predictor, stream: Sequence[Example], seen: Mapping[str, bytes]) -> list[float]:
    """Whether each length was within the 90 % quantile; each is learnt after it was predicted."""
    hits = []
    for example in stream:
        served = Example(example.prompt, example.output_tokens, example.prompt_tokens, "served")
        asked = replace(served.request(), features=seen[example.prompt])
        [said] = made.predict_batch([asked])
        hits.append(float(served.output_tokens <= said.lengths.at(0.9)))
        made.observe(served.facts(said.features))
    return hits


def speed(made: Predictor, asked: Sequence[Example]) -> dict[str, float]:
    """Requests a second in batches of some sizes, and what one batch takes."""
    requests = [example.request() for example in asked[:MOST_TIMED]]
    found: dict[str, float] = {}
    for size in BATCHES:
        # Alone each takes longest; fewer of them say as much.
        timed = requests if size > 1 else requests[: len(requests) // 4]
        times = []
        for start in range(0, len(timed) - size + 1, size):
            began = time.perf_counter()
            made.predict_batch(timed[start : start + size])
            times.append(time.perf_counter() - began)
        found |= {
            f"{size} per s": size / float(np.median(times)),
            f"{size} ms p50": 1e3 * float(np.quantile(times, 0.5)),
            f"{size} ms p99": 1e3 * float(np.quantile(times, 0.99)),
        }
    return found


def _without_nan(found: Any) -> Any:
    """The same for JSON, which knows no NaN."""
    if isinstance(found, dict):
        return {name: _without_nan(value) for name, value in found.items()}
    return None if found != found else found  # noqa: PLR0124 - NaN alone is not itself


def show(found: dict[str, Any]) -> None:
    """Tables, a line for each predictor."""
    for part, groups in found.items():
        nested = all(isinstance(v, dict) for g in groups.values() for v in g.values())
        for group, rows in (groups if nested else {"": groups}).items():
            print(f"\n{part} {group}")
            columns = list(next(iter(rows.values())))
            print(f"{'':22}" + "".join(f"{column[:11]:>12}" for column in columns))
            for name, row in rows.items():
                print(f"{name:22}" + "".join(f"{row[column]:12.4g}" for column in columns))


if __name__ == "__main__":
    main()
