"""The predictor ``llm``: what ``text`` looks at, and what a tuned language model says of it.

The paper's profiler (section III-A) is such a model alone. Here it is asked for numbers that
``text`` takes among its cues, so that all that ``text`` learns while it serves is learnt here too.
See ADR 33.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar

import numpy as np

from uellm.core.errors import InvalidArgumentError
from uellm.core.settings import setting
from uellm.learning.examples import Example
from uellm.prediction.interface import PredictionRequest, State
from uellm_profiler.llm.halves import forget, tune_halves
from uellm_profiler.llm.network import Base, LengthNetwork, fast_dtype
from uellm_profiler.llm.tuning import Schedule
from uellm_profiler.text.predictor import TextPredictor, TextSettings
from uellm_profiler.text.record import Seen, as_kept, see

BASE_MODEL = "base_model"
ADAPTER = "adapter"
_TUNED = "tuned_"


@dataclass(frozen=True)
class LlmSettings(TextSettings):
    """How it is tuned, beside the settings of ``text``."""

    rank: int = setting(16, "Rank of the LoRA matrices.", least=1, most=256)
    epochs: int = setting(3, "Times through all examples.", least=1, most=1000)
    batch: int = setting(32, "Examples of a step.", least=1, most=4096)
    learning_rate: float = setting(1e-3, "At its height.", above=0.0, most=1.0)
    seed: int = setting(0, "Of what is drawn.", least=0, most=2**31 - 1)
    most_tokens: int = setting(
        256, "Of a prompt that the language model reads.", least=8, most=32_768
    )


class LlmPredictor(TextPredictor):
    """See ``uellm.prediction.interface.Predictor``, docs/profiler.md and ADR 33.

    Until it is tuned, and for requests that are hurried, it is ``text``.

    Args:
        settings: by name; see ``LlmSettings``, and ``base_model``, a directory.

    Raises:
        InvalidArgumentError: if there is no base model.
    """

    name = "llm"
    version = "2"
    listens: ClassVar[bool] = True

    def __init__(self, settings: Mapping[str, object] | None = None) -> None:
        given = dict(settings or {})
        directory = given.pop(BASE_MODEL, "")
        if not directory:
            raise InvalidArgumentError(
                "base_model: not set; `uellm profiler train --backend llm --base-model DIR` tunes "
                "one, and UELLM_PROFILER_PRETRAINED names the result",
                field=BASE_MODEL,
            )
        chosen = LlmSettings.parse(given)
        super().__init__({each.name: getattr(chosen, each.name) for each in fields(TextSettings)})
        self._chosen = chosen
        self._base = Base.read(Path(str(directory)), chosen.most_tokens)
        self._tuned: State = {}
        self._network: LengthNetwork | None = None

    def tune(
        self,
        examples: Sequence[Example],
        directory: Path,
        progress: Callable[[str, int], None] = lambda _, __: None,
    ) -> None:
        """Learn from prompts; see ``uellm.learning.training.Tunable``."""
        chosen = self._chosen
        schedule = Schedule(chosen.epochs, chosen.batch, chosen.learning_rate, chosen.seed)
        tuned, said = tune_halves(self._base, chosen.rank, schedule, examples, directory, progress)
        network = LengthNetwork(self._base, chosen.rank)
        network.tune_to(tuned)
        network.save_adapter(directory / ADAPTER)
        self._tuned, self._network = tuned, _merged(self._base, chosen.rank, tuned)
        progress("fitting", len(examples))
        for example, spoken in zip(examples, said, strict=True):
            seen = see(example.prompt, example.prompt_tokens)
            self.observe(example.facts(replace(seen, said=as_kept(spoken)).packed()))
        self.adopt(self.fitting()())
        forget(directory)

    def state(self) -> State:
        """See ``uellm.prediction.interface.Predictor``."""
        return super().state() | self._tuned_state()

    def serving_state(self) -> State:
        """See ``uellm.prediction.interface.Predictor``."""
        return super().serving_state() | self._tuned_state()

    def load(self, state: State) -> None:
        """See ``uellm.prediction.interface.Predictor``."""
        tuned = {n.removeprefix(_TUNED): a for n, a in state.items() if n.startswith(_TUNED)}
        try:
            network = _merged(self._base, self._chosen.rank, tuned) if tuned else None
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidArgumentError(
                f"state: not one of predictor {self.name!r} version {self.version} ({error!r})",
                field="state",
            ) from error
        super().load(state)
        self._tuned, self._network = tuned, network

    def _tuned_state(self) -> State:
        return {_TUNED + name: array for name, array in self._tuned.items()}

    def _look(self, requests: Sequence[PredictionRequest]) -> list[Seen | None]:
        seen = super()._look(requests)
        network = self._network
        asked = [
            i
            for i, (request, sight) in enumerate(zip(requests, seen, strict=True))
            if sight and not len(sight.said) and request.text.strip() and not request.hurried
        ]
        if network is not None and asked:
            said = network.say([requests[i].text for i in asked])
            for i, spoken in zip(asked, said, strict=True):
                seen[i] = replace(seen[i], said=as_kept(spoken))  # type: ignore[type-var]
        return seen


_NETWORKS: OrderedDict[bytes, LengthNetwork] = OrderedDict()
_KEPT_NETWORKS = 2
"""States are loaded every few seconds, and what changes in them is not the network."""


def _merged(base: Base, rank: int, tuned: State) -> LengthNetwork:
    """The network of some weights, which is made once."""
    hashed = blake2b(f"{base.directory} {rank} {base.most_tokens}".encode(), digest_size=16)
    for name in sorted(tuned):
        hashed.update(name.encode())
        hashed.update(np.ascontiguousarray(tuned[name]).tobytes())
    key = hashed.digest()
    if key not in _NETWORKS:
        network = LengthNetwork(base, rank)
        network.tune_to(tuned)
        _NETWORKS[key] = network.merged(fast_dtype())
        while len(_NETWORKS) > _KEPT_NETWORKS:
            _NETWORKS.popitem(last=False)
    _NETWORKS.move_to_end(key)
    return _NETWORKS[key]
