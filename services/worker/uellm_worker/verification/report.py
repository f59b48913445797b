"""The check as a whole: what is run, what is compared, what is said."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from uellm.core.errors import ConfigurationError
from uellm.v1.common_pb2 import Sampling
from uellm_worker.verification.pipeline import Pipeline, PreemptOnce, Record, generate
from uellm_worker.verification.reference import Difference, Reference

LOGIT_TOLERANCE = 1e-3
"""Largest error of a float32 logit, as a share of the largest logit there is. Rounding stays two
orders of magnitude below it."""
_RECORD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class PromptReport:
    """One prompt's answer.

    Attributes:
        prompt: its number, from 1.
        prompt_tokens: how long it is.
        answer_tokens: how long the answer is.
        ties: places in the answer where either of two tokens was right.
        difference: where the answer is not the reference's; None for an exact one.
        logit_error: largest difference of a logit, the reference fed the same tokens.
        logit_error_at: the place in the answer of that difference.
        logits_agree: no logit is further off than rounding explains; always so in half precision,
            where no such bound is known.
        compared_tokens: places whose logits were compared.
        adapter: the LoRA adapter that answered; "": the model alone.
    """

    prompt: int
    prompt_tokens: int
    answer_tokens: int
    ties: tuple[int, ...]
    difference: Difference | None
    logit_error: float
    logit_error_at: int
    logits_agree: bool
    compared_tokens: int
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    """What came of a check.

    Attributes:
        split: layers of each stage.
        dtype: computed in.
        execution: how the engine composed its steps.
        slots: sequences at once.
        preemptions: how often a sequence lost its slot.
        prompts: in order.
        seconds: it took.
    """

    split: tuple[int, ...]
    dtype: str
    execution: str
    slots: int
    preemptions: int
    prompts: tuple[PromptReport, ...]
    seconds: float

    @property
    def exact(self) -> bool:
        """Every answer is the reference's, and no logit is too far off."""
        return all(p.difference is None and p.logits_agree for p in self.prompts)


def verify(
    pipeline: Pipeline,
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    execution: str = "continuous",
) -> Verification:
    """Answer all prompts greedily at once, preempting each, and compare with the reference.

    With adapters, prompts take the model and each adapter in turn.

    Args:
        pipeline: what is judged.
        reference: what judges.
        prompts: token ids.
        max_tokens: most tokens of an answer, context permitting.
        execution: how the engine composes its steps.

    Raises:
        ConfigurationError: if a prompt leaves no room for an answer.
    """
    started = time.perf_counter()
    room = pipeline.capacity.max_tokens
    for number, prompt in enumerate(prompts, 1):
        if not 0 < len(prompt) < room:
            raise ConfigurationError(
                f"prompt {number} has {len(prompt)} tokens; 1 to {room - 1} fit the context",
                field="prompts",
            )
    record = Record(_RECORD_BYTES)
    loop = pipeline.loop(PreemptOnce(), record, execution)
    adapters = pipeline.spread(len(prompts))
    answers = generate(loop, prompts, lambda _: Sampling(max_tokens=max_tokens), adapters=adapters)
    spec = pipeline.stages[0].first.spec
    reports = []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        count = min(max_tokens, room - len(prompt))
        with reference.adapted(adapters[index]):
            compared = reference.compare(prompt, answer, count)
            theirs = reference.logits(prompt, answer)
        errors = {
            place: float((record.rows[str(index), place] - row).abs().max())
            for place, row in enumerate(theirs)
            if (str(index), place) in record.rows
        }
        worst = max(errors, key=lambda place: errors[place], default=0)
        bound = LOGIT_TOLERANCE * max(float(theirs.abs().max()), 1.0)
        reports.append(
            PromptReport(
                prompt=index + 1,
                prompt_tokens=len(prompt),
                answer_tokens=len(answer),
                adapter=adapters[index],
                ties=compared.ties,
                difference=compared.difference,
                logit_error=errors.get(worst, 0.0),
                logit_error_at=worst,
                logits_agree=spec.dtype != torch.float32
                or all(error <= bound for error in errors.values()),
                compared_tokens=len(errors),
            )
        )
    return Verification(
        split=pipeline.split,
        dtype=str(spec.dtype).removeprefix("torch."),
        execution=execution,
        slots=pipeline.capacity.slots,
        preemptions=record.admissions - len(prompts),
        prompts=tuple(reports),
        seconds=time.perf_counter() - started,
    )
