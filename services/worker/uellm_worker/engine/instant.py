"""An engine that computes nothing: tokens are a function of (seed, position).

The control plane is tested and measured with it. It runs under the same loop, protocol and child
process as the real one, needs no torch, and can keep a paced clock.
"""

import json
import time
from collections import deque
from pathlib import Path

from uellm.convert import device_shards
from uellm.core.errors import ModelFilesError
from uellm.v1.engine_pb2 import (
    BlockProbed,
    CopiesProbed,
    PrepareShard,
    ProbeBlock,
    ProbeCopies,
    ProbeLink,
)
from uellm_worker.engine.capacity import Capacity, Prepared, Vocabulary
from uellm_worker.engine.group import Group
from uellm_worker.engine.inbox import Inbox
from uellm_worker.engine.plan import Admission, StepPlan, StepResult
from uellm_worker.engine.randomness import instant_token
from uellm_worker.engine.runner import Progress, Tell

DEFAULT_VOCAB_SIZE = 32000
"""Of a model directory without a config."""
DEFAULT_MAX_TOKENS = 4096
"""Of an assignment that grants no context."""


class InstantRunner:
    """Steps of the instant engine, all of them computed on stage 0.

    Args:
        vocab_size: ids run below it.
        stages: reported as so many, which share the time.
        step_seconds: what each step is made to take; 0: nothing.
    """

    def __init__(self, vocab_size: int, stages: int = 1, step_seconds: float = 0.0) -> None:
        self._vocab_size = vocab_size
        self._stages = stages
        self._step_seconds = step_seconds
        self._admissions: dict[int, Admission] = {}
        self._results: deque[StepResult] = deque()

    @property
    def depth(self) -> int:
        """One: there is nobody to overlap with."""
        return 1

    def submit(self, plan: StepPlan) -> None:
        """See ``uellm_worker.engine.runner.Runner``."""
        for admission in plan.admissions:
            self._admissions[admission.slot] = admission
        if self._step_seconds:
            time.sleep(self._step_seconds)
        tokens = []
        for chunk in plan.chunks:
            if chunk.sample:
                admission = self._admissions[chunk.slot]
                position = chunk.start + chunk.count - admission.prompt_tokens
                seed = admission.sampling.seed
                tokens.append(instant_token(seed, position, self._vocab_size))
        seconds = [self._step_seconds / self._stages] * self._stages
        self._results.append(StepResult(tokens, seconds=seconds))

    def collect(self, *, patient: bool = True) -> StepResult | None:
        """See ``uellm_worker.engine.runner.Runner``."""
        del patient
        return self._results.popleft()

    def follow(self, meta: bytes) -> None:
        """Stages behind the first are never asked: it knows every token by itself."""
        raise AssertionError("the instant engine announces no steps")

    def close(self) -> None:
        """Nothing to give up."""


class InstantEngine:
    """The instant engine in a child process.

    Args:
        step_seconds: what each step is made to take.
    """

    def __init__(self, step_seconds: float = 0.0) -> None:
        self._step_seconds = step_seconds
        self._vocab_size = DEFAULT_VOCAB_SIZE
        self._stages = 1

    def prepare(self, command: PrepareShard, progress: Progress) -> Prepared:
        """See ``uellm_worker.engine.runner.Engine``."""
        assignment = command.assignment
        slots = max(assignment.slots, 1)
        max_tokens = assignment.max_tokens or DEFAULT_MAX_TOKENS
        self._vocab_size = _vocab_size(command.model_dir)
        self._stages = max(assignment.stage_count, 1) - 1 + len(device_shards(assignment))
        progress(0, 0)
        return Prepared(
            capacity=Capacity(slots, max_tokens, slots * max_tokens),
            vocabulary=Vocabulary(self._vocab_size),
        )

    def offer(self, bind_host: str) -> str:
        """Nothing: no activations travel."""
        del bind_host
        return ""

    def join(self, group: Group | None, inbox: Inbox) -> InstantRunner:
        """See ``uellm_worker.engine.runner.Engine``."""
        del group, inbox
        return InstantRunner(self._vocab_size, self._stages, self._step_seconds)

    def probe_block(self, command: ProbeBlock, tell: Tell) -> BlockProbed:
        """Nothing: it computes no layers."""
        del command, tell
        return BlockProbed()

    def probe_copies(self, command: ProbeCopies) -> CopiesProbed:
        """Nothing: it has no devices."""
        del command
        return CopiesProbed()

    def place(self, device_id: str) -> str:
        """The CPU, whatever the device."""
        del device_id
        return "cpu"

    def carrier(self, group: Group, inbox: Inbox, command: ProbeLink) -> "InlineCarrier":
        """The control links, over which small activations travel."""
        del inbox
        return InlineCarrier(group, command.hidden_size * 4)


class InlineCarrier:
    """Activations of zeros behind their announcements, whatever their size; no torch.

    Args:
        group: of two.
        width: bytes of a row.
    """

    def __init__(self, group: Group, width: int) -> None:
        self._group = group
        self._width = width

    def send(self, header: bytes, rows: int) -> None:
        """See ``uellm_worker.engine.link_probe.Carrier``."""
        self._group.send_step(header + bytes(rows * self._width))

    def receive(self, rows: int, inline: bytes) -> None:
        """See ``uellm_worker.engine.link_probe.Carrier``."""

    def close(self) -> None:
        """Nothing to give up."""


def _vocab_size(model_dir: str) -> int:
    """From the model's config, if there is one.

    Raises:
        ModelFilesError: if it cannot be read.
    """
    config = Path(model_dir) / "config.json"
    if not model_dir or not config.is_file():
        return DEFAULT_VOCAB_SIZE
    try:
        size = int(json.loads(config.read_text()).get("vocab_size", DEFAULT_VOCAB_SIZE))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelFilesError(f"{config} is not a model's config: {error}") from error
    if size < 1:
        raise ModelFilesError(f"{config}: vocab_size {size}: at least 1")
    return size
