"""A language model with a quantile head: from prompts to the logarithm of answers' lengths."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel
from transformers.utils.logging import disable_progress_bar

from uellm.core.errors import ModelFilesError
from uellm.core.request import LEVELS
from uellm.prediction.interface import State

MOST_TOKENS = 256
"""Of a prompt; what it asks for is said before, or at the end, which of longer ones is kept too."""
_TAIL_TOKENS = 64
_LORA, _HEAD = "lora:", "head:"

disable_progress_bar()


@dataclass(frozen=True, slots=True)
class Base:
    """A model that is tuned, and its tokenizer.

    Attributes:
        directory: where it is, in transformers' layout.
        causal: its tokens see only those before them.
        hidden_size: width of its states.
    """

    directory: Path
    causal: bool
    hidden_size: int
    tokenizer: Any

    @classmethod
    def read(cls, directory: Path) -> "Base":
        """The base model of a directory, without its weights.

        Raises:
            ModelFilesError: if it is none.
        """
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:
            raise ModelFilesError(
                f"{directory}: no base model ({error}); it needs config.json, tokenizer.json and "
                "model.safetensors of a text model"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        names = config.architectures or [""]
        causal = names[0].endswith(("ForCausalLM", "LMHeadModel"))
        return cls(directory, causal, config.hidden_size, tokenizer)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of prompts, both ``[texts, longest]``."""
        rows = [_shortened(one.ids) for one in self.tokenizer.encode_batch(list(texts))]
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        return ids, mask


def _shortened(ids: list[int]) -> list[int]:
    if len(ids) <= MOST_TOKENS:
        return ids or [0]
    return ids[: MOST_TOKENS - _TAIL_TOKENS] + ids[-_TAIL_TOKENS:]


class LengthNetwork(nn.Module):
    """Quantiles of a standardised log length.

    Args:
        base: what it is built on; its weights are read.
        rank: of the LoRA matrices beside all its linear layers.
    """

    def __init__(self, base: Base, rank: int) -> None:
        super().__init__()
        self.base = base
        backbone = AutoModel.from_pretrained(
            base.directory, local_files_only=True, dtype=torch.float32
        )
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        with warnings.catch_warnings():
            # peft asks transformers for something by a name that is going away.
            warnings.simplefilter("ignore", FutureWarning)
            self.backbone: Any = get_peft_model(backbone, config)
        self.head = nn.Linear(base.hidden_size, len(LEVELS))
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Quantiles at ``LEVELS``, ascending, shape ``[prompts, levels]``."""
        states = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        if self.base.causal:
            pooled = states[torch.arange(len(ids)), mask.sum(1) - 1]
        else:
            weights = mask[..., None].float()
            pooled = (states * weights).sum(1) / weights.sum(1)
        raw = self.head(pooled)
        steps = functional.softplus(raw[:, 1:])
        return torch.cat([raw[:, :1], raw[:, :1] + steps.cumsum(1)], dim=1)

    def begin_at(self, quantiles: Sequence[float]) -> None:
        """Have every prompt expect these quantiles before anything is learnt."""
        gaps = np.maximum(np.diff(quantiles), 1e-3)
        bias = np.concatenate([quantiles[:1], np.log(np.expm1(gaps))])
        with torch.no_grad():
            self.head.bias.copy_(torch.tensor(bias))

    def tuned(self) -> State:
        """What tuning has changed: LoRA matrices and the head."""
        lora = get_peft_model_state_dict(self.backbone)
        head = self.head.state_dict()
        named = {_LORA + k: v for k, v in lora.items()} | {_HEAD + k: v for k, v in head.items()}
        return {name: tensor.detach().cpu().numpy() for name, tensor in named.items()}

    def tune_to(self, tuned: State) -> None:
        """Take what tuning has changed.

        Raises:
            ValueError: if it is of another base model or rank.
        """
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in tuned.items()}
        lora = {n.removeprefix(_LORA): t for n, t in tensors.items() if n.startswith(_LORA)}
        head = {n.removeprefix(_HEAD): t for n, t in tensors.items() if n.startswith(_HEAD)}
        if lora.keys() != get_peft_model_state_dict(self.backbone).keys():
            raise ValueError("the LoRA matrices are of another base model")
        try:
            set_peft_model_state_dict(self.backbone, lora)
            self.head.load_state_dict(head)
        except RuntimeError as error:
            raise ValueError(f"the LoRA matrices do not fit ({error})") from error

    def merged(self) -> "LengthNetwork":
        """This network with its LoRA matrices added to the weights: as fast as the base model."""
        self.backbone = self.backbone.merge_and_unload()
        return self.eval().requires_grad_(False)

    def save_adapter(self, directory: Path) -> None:
        """Write the LoRA matrices in peft's format."""
        self.backbone.save_pretrained(str(directory))

    @torch.inference_mode()
    def quantiles(self, texts: Sequence[str]) -> np.ndarray:
        """Quantiles for prompts, shape ``[texts, levels]``."""
        device = self.head.weight.device
        ids, mask = self.base.encode(texts)
        found: np.ndarray = self(ids.to(device), mask.to(device)).cpu().numpy()
        return found
