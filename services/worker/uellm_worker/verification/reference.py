"""The whole model as transformers runs it, and where an answer departs from its own.

Where the reference holds the token that was chosen for as likely as its own, but for rounding, the
order of the two is chance: such a *tie* is passed over, and the reference goes on from the tokens
that were chosen (*teacher-forced*).
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from uellm.core.errors import ModelFilesError
from uellm_worker.engine.checkpoint import read_eos_ids, read_model
from uellm_worker.verification.dequantized import dequantized_tensors

TIE = 1e-4
"""Logits that are this close are equal."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token of an answer that is not the reference's.

    Attributes:
        token: its place in the answer, from 0.
        got: the token chosen; None for the end of the answer.
        wanted: the reference's; None for the end of the answer.
        margin: by how much the reference's logit of its own token exceeds that of the chosen one.
    """

    token: int
    got: int | None
    wanted: int | None
    margin: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """An answer beside the reference's.

    Attributes:
        ties: places where either token was right.
        difference: the first place where it was not; None for an exact answer.
    """

    ties: tuple[int, ...] = ()
    difference: Difference | None = None


class Reference:
    """The whole model under transformers.

    Args:
        model: ``…ForCausalLM`` in evaluation mode; changed in place if there are adapters.
        adapters: directories of LoRA adapters, by name; peft adds them.

    Raises:
        ModelFilesError: if peft cannot load one.
    """

    def __init__(self, model: Any, adapters: Mapping[str, Path] | None = None) -> None:
        self._model = model
        # peft takes no name with a dot.
        self._names = {name: f"adapter{index}" for index, name in enumerate(adapters or ())}
        self._adapted = None
        for name, directory in (adapters or {}).items():
            self._adapted = _with_adapter(self._adapted or model, self._names[name], directory)
        if self._adapted is not None:
            self._adapted.base_model.disable_adapter_layers()
        eos = model.generation_config.eos_token_id
        self.eos_ids = sorted({*eos} if isinstance(eos, list) else {eos} - {None})

    @classmethod
    def load(
        cls, directory: Path, dtype: torch.dtype, adapters: Mapping[str, Path] | None = None
    ) -> "Reference":
        """From a checkpoint; of a quantised one, the model of its weights in floating point.

        Raises:
            ModelFilesError: if it is not served, or transformers cannot load it, or peft one of
                its adapters.
        """
        _, config, quantization = read_model(directory)
        options = {"dtype": dtype, "local_files_only": True}
        try:
            if quantization is None:
                model = AutoModelForCausalLM.from_pretrained(
                    directory, trust_remote_code=False, **options
                )
            else:
                weights = dequantized_tensors(directory, quantization, dtype)
                kind = getattr(transformers, config.architectures[0])
                model = kind.from_pretrained(None, config=config, state_dict=weights, **options)
        except Exception as error:  # Whatever a malformed checkpoint makes the library raise.
            line = str(error).strip().partition("\n")[0]
            raise ModelFilesError(f"{directory}: transformers cannot load it: {line}") from error
        if quantization is not None:
            # It comes with a checkpoint, and transformers was shown none.
            model.generation_config.eos_token_id = sorted(read_eos_ids(directory, config)) or None
        return cls(model.eval().requires_grad_(False), adapters)

    @contextmanager
    def adapted(self, adapter: str) -> Iterator[None]:
        """Within it, one of the adapters answers; with "" the model alone."""
        if self._adapted is None or not adapter:
            yield
            return
        self._adapted.set_adapter(self._names[adapter])
        self._adapted.base_model.enable_adapter_layers()
        try:
            yield
        finally:
            self._adapted.base_model.disable_adapter_layers()

    def greedy(self, prompt: Sequence[int], count: int) -> tuple[list[int], list[torch.Tensor]]:
        """The answer without its end-of-sequence token, and the logits behind every token."""
        # The model's own config may ask for penalties and the like, which are not greedy.
        self._model.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=self.eos_ids or None,
            pad_token_id=self.eos_ids[0] if self.eos_ids else 0,
        )
        if getattr(self._model, "_is_stateful", False):
            # Some modules keep their state, and would go on from it with a prompt of one token.
            self._model(torch.tensor([prompt[:1]]), use_cache=False)
        output = self._model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = [int(token) for token in output.sequences[0, len(prompt) :]]
        if tokens[-1] in self.eos_ids:
            tokens.pop()
        return tokens, [logits[0].float() for logits in output.logits]

    def logits(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """``[answer + 1, vocabulary]``: behind every token of an answer, and behind its end."""
        tokens = torch.tensor([[*prompt, *answer]])
        with torch.inference_mode():
            output = self._model(tokens, use_cache=False, logits_to_keep=len(answer) + 1)
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def compare(self, prompt: Sequence[int], answer: Sequence[int], count: int) -> Comparison:
        """Compare a greedy answer, given without its end-of-sequence token.

        Args:
            prompt: token ids.
            answer: what is to be judged.
            count: most tokens that it could have had.
        """
        done = 0
        ties: list[int] = []
        while done < count:
            wanted, logits = self.greedy([*prompt, *answer[:done]], count - done)
            pairs = enumerate(zip_longest(answer[done:], wanted))
            unequal = next(((i, got, want) for i, (got, want) in pairs if got != want), None)
            if unequal is None:
                break
            place, got, want = unequal
            if place >= len(logits):  # More tokens than were allowed.
                return Comparison(tuple(ties), Difference(done + place, got, want, float("inf")))
            row = logits[place]
            chosen = [got] if got is not None else self.eos_ids
            margin = float(row.max() - row[chosen].max()) if chosen else float("inf")
            if not margin <= TIE:  # Not a number is no tie either.
                return Comparison(tuple(ties), Difference(done + place, got, want, margin))
            ties.append(done + place)
            if got is None:
                break
            done += place + 1
        return Comparison(tuple(ties))


def _with_adapter(model: Any, name: str, directory: Path) -> Any:
    """A model with one adapter more, by peft.

    Raises:
        ModelFilesError: if it cannot load it.
    """
    from peft import PeftModel  # noqa: PLC0415 - slow to import, and seldom needed

    try:
        with warnings.catch_warnings():
            # Of names in transformers that peft has not given up yet.
            warnings.simplefilter("ignore")
            if isinstance(model, PeftModel):
                model.load_adapter(directory, name, autocast_adapter_dtype=False)
                return model.eval()
            return PeftModel.from_pretrained(
                model, directory, adapter_name=name, autocast_adapter_dtype=False
            ).eval()
    except Exception as error:  # Whatever a malformed adapter makes the library raise.
        line = str(error).strip().partition("\n")[0]
        raise ModelFilesError(f"{directory}: peft cannot load it: {line}") from error
