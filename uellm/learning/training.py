"""Trains a predictor on examples, and judges one by them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryFile
from time import perf_counter
from typing import Protocol, runtime_checkable

from uellm.core.errors import ConfigurationError, InvalidArgumentError
from uellm.core.request import QuantileFunction
from uellm.learning.examples import Example
from uellm.learning.store import Manifest, load_predictor, save_predictor
from uellm.prediction.interface import Predictor
from uellm.prediction.metrics import Scores, scores
from uellm.prediction.registry import predictor

BATCH = 64
CHECKPOINT_EXAMPLES = 20_000

Progress = Callable[[str, int], None]
"""Told what is being done, and how many examples that are done with it."""


@runtime_checkable
class Tunable(Protocol):
    """A predictor that is trained on prompts themselves, before it serves."""

    def tune(self, examples: Sequence[Example], directory: Path, progress: Progress) -> None:
        """Learn all that there is to learn from examples, in place of ``teach`` and fits.

        One that was interrupted goes on from what it kept in the directory.
        """
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """An evaluation.

    Attributes:
        scores: how good the predictions are.
        predictions: what was predicted, in the order of the examples.
        lengths: what came of it.
        seconds_per_request: time to predict, in batches of 64.
    """

    scores: Scores
    predictions: Sequence[QuantileFunction]
    lengths: Sequence[int]
    seconds_per_request: float


def train(
    backend: str,
    examples: Sequence[Example],
    directory: Path,
    settings: Mapping[str, object] | None = None,
    *,
    force: bool = False,
    progress: Progress = lambda _, __: None,
) -> Predictor:
    """A predictor trained on examples, kept in a directory.

    A training that was interrupted goes on where it was last kept.

    Args:
        backend: the predictor's name.
        examples: in the order in which they are learnt.
        directory: where it is kept.
        settings: the predictor's own.
        force: take the place of what is there.
        progress: what to tell.

    Raises:
        InvalidArgumentError: if there are no examples, or the predictor cannot be made.
        ConfigurationError: if the directory holds something else, or cannot be written.
    """
    if not examples:
        raise InvalidArgumentError("data: no examples to learn from", field="data")
    made = predictor(backend, settings)
    _check_writable(directory)
    source = digest(examples)
    done = 0
    manifest = None if force else Manifest.read(directory)
    if manifest is not None:
        done = _done_before(manifest, made, source, settings or {}, directory)
        made = load_predictor(directory)
        progress("resumed", done)

    def keep(count: int, *, complete: bool = False) -> None:
        training = {"examples": source, "done": count, "complete": complete}
        save_predictor(directory, made, settings, training)

    if isinstance(made, Tunable):
        made.tune(examples, directory, progress)
        keep(len(examples), complete=True)
        return made
    for start in range(done, len(examples), CHECKPOINT_EXAMPLES):
        for batch in _batches(examples[start : start + CHECKPOINT_EXAMPLES]):
            teach(made, batch)
            done += len(batch)
            progress("learning", done)
        keep(done)
    progress("fitting", done)
    while (work := made.refit()) is not None:
        made.adopt(work())
    keep(done, complete=True)
    return made


def _check_writable(directory: Path) -> None:
    """Now, not after hours of training."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"out: {directory}: {error.strerror}; name a directory that can be written", field="out"
        ) from None


def _done_before(
    manifest: Manifest,
    made: Predictor,
    source: str,
    settings: Mapping[str, object],
    directory: Path,
) -> int:
    """How many examples a directory's unfinished training has learnt."""
    same = (
        manifest.predictor == made.name
        and manifest.version == made.version
        and dict(manifest.settings) == dict(settings)
        and manifest.training.get("examples") == source
    )
    if not same or manifest.training.get("complete"):
        raise ConfigurationError(
            f"out: {directory} holds a predictor already; choose another directory, or --force",
            field="out",
        )
    return int(manifest.training["done"])


def teach(learner: Predictor, examples: Sequence[Example]) -> None:
    """Have a predictor predict some examples together, and then observe them one by one."""
    asked = learner.predict_batch([example.request() for example in examples])
    for example, prediction in zip(examples, asked, strict=True):
        learner.observe(example.facts(prediction.features))


def evaluate(learnt: Predictor, examples: Sequence[Example], *, online: bool = False) -> Judged:
    """Judge a predictor by examples whose answers were not cut.

    Args:
        learnt: the predictor; it learns from them only if ``online``.
        examples: what to predict.
        online: each example is observed after it was predicted, alone.

    Raises:
        InvalidArgumentError: if there are none.
    """
    judged = [example for example in examples if not example.censored]
    if not judged:
        raise InvalidArgumentError("data: no examples to judge by", field="data")
    predictions: list[QuantileFunction] = []
    seconds = 0.0
    for batch in _batches(judged, 1 if online else BATCH):
        requests = [example.request() for example in batch]
        began = perf_counter()
        answers = learnt.predict_batch(requests)
        seconds += perf_counter() - began
        predictions += [answer.lengths for answer in answers]
        if online:
            learnt.observe(batch[0].facts(answers[0].features))
    lengths = [example.output_tokens for example in judged]
    return Judged(scores(predictions, lengths), predictions, lengths, seconds / len(judged))


def digest(examples: Sequence[Example]) -> str:
    """What tells two lists of examples apart."""
    hashed = blake2b(digest_size=16)
    for example in examples:
        hashed.update(repr(example).encode("utf-8", "surrogatepass"))
    return hashed.hexdigest()


def _batches(examples: Sequence[Example], size: int = BATCH) -> Iterator[Sequence[Example]]:
    return (examples[i : i + size] for i in range(0, len(examples), size))
