"""A language model with quantile heads: from prompts to the logarithm of answers' lengths."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
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
from uellm_profiler.text.record import SAID

MOST_HEADS = 4
"""The first is of all that are served, the others of one each: those with the most examples."""
MOST_AT_ONCE = 64
MOST_TOKENS_AT_ONCE = 4096
"""Prompts, and their tokens with padding, that pass the model together."""
_TAIL_SHARE = 4
"""Of a prompt that is too long the last 1/4 of what is read is its end: there, too, it may say
what it asks for."""
_MULTIPLE = 8
"""Prompts are padded to a multiple: kernels that were made for a shape are found again."""
_BATCH_TOKENS = 64
"""What beginning another batch costs, in tokens that are computed meanwhile."""
_LORA, _HEAD = "lora:", "head:"
_LEAST_SPREAD = 0.05
_LOW, _MEDIAN, _HIGH = (LEVELS.index(level) for level in (0.1, 0.5, 0.9))

disable_progress_bar()


def fast_dtype() -> torch.dtype:
    """What a language model is computed in here: bfloat16 where the processor has it."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    can = torch.cpu.get_capabilities()
    has = any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if has else torch.float32


@dataclass(frozen=True, slots=True)
class Base:
    """A model that is tuned, and its tokenizer.

    Attributes:
        directory: where it is, in transformers' layout.
        causal: its tokens see only those before them.
        hidden_size: width of its states.
        most_tokens: of a prompt that are read.
    """

    directory: Path
    causal: bool
    hidden_size: int
    tokenizer: Any
    most_tokens: int

    @classmethod
    def read(cls, directory: Path, most_tokens: int = 256) -> "Base":
        """The base model of a directory, without its weights: a decoder, or an encoder like BERT.

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
        positions = getattr(config, "max_position_embeddings", None) or most_tokens
        return cls(directory, causal, config.hidden_size, tokenizer, min(most_tokens, positions))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of prompts; of long ones the beginning and the end."""
        # Text from JSON may hold halves of surrogate pairs.
        sound = [text.encode("utf-8", "replace").decode() for text in texts]
        return [self._shortened(one.ids) for one in self.tokenizer.encode_batch(sound)]

    def _shortened(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.most_tokens:
            return ids or [0]
        tail = self.most_tokens // _TAIL_SHARE
        return ids[: self.most_tokens - tail] + ids[len(ids) - tail :]


def padded(rows: Sequence[Sequence[int]], most: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts, both ``[prompts, longest]``; ``most`` bounds the padding."""
    longest = max(len(row) for row in rows)
    longest = max(min(-(-longest // _MULTIPLE) * _MULTIPLE, most), longest)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    return ids, mask


class LengthNetwork(nn.Module):
    """Quantiles of a standardised log length.

    Args:
        base: what it is built on; its weights are read.
        rank: of the LoRA matrices beside all its linear layers.
        seed: of what is drawn at the beginning.
    """

    def __init__(self, base: Base, rank: int, seed: int = 0) -> None:
        super().__init__()
        self.base = base
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = AutoModel.from_pretrained(
                base.directory, local_files_only=True, dtype=torch.float32
            )
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
            with warnings.catch_warnings():
                # peft asks transformers for something by a name that is going away.
                warnings.simplefilter("ignore", FutureWarning)
                self.backbone: Any = get_peft_model(backbone, config)
            self.dropout = nn.Dropout(0.1)
            self.head = nn.Linear(base.hidden_size, MOST_HEADS * len(LEVELS))
            nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Quantiles at ``LEVELS``, ascending, shape ``[prompts, heads, levels]``.

        Of a decoder the last token's state is looked at, of an encoder the mean of all.
        """
        states = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        if self.base.causal:
            pooled = states[torch.arange(len(ids)), mask.sum(1) - 1]
        else:
            weights = mask[..., None].float()
            pooled = (states * weights).sum(1) / weights.sum(1)
        raw = self.head(self.dropout(pooled)).float().view(-1, MOST_HEADS, len(LEVELS))
        steps = functional.softplus(raw[..., 1:])
        return torch.cat([raw[..., :1], raw[..., :1] + steps.cumsum(-1)], dim=-1)

    def begin_at(self, quantiles: Sequence[float]) -> None:
        """Have every prompt expect these quantiles before anything is learnt."""
        gaps = np.maximum(np.diff(quantiles), 1e-3)
        bias = np.concatenate([quantiles[:1], np.log(np.expm1(gaps))])
        with torch.no_grad():
            self.head.bias.copy_(torch.tensor(np.tile(bias, MOST_HEADS)))

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
        tensors = {
            name: torch.from_numpy(np.array(value, np.float32)) for name, value in tuned.items()
        }
        lora = {n.removeprefix(_LORA): t for n, t in tensors.items() if n.startswith(_LORA)}
        head = {n.removeprefix(_HEAD): t for n, t in tensors.items() if n.startswith(_HEAD)}
        if lora.keys() != get_peft_model_state_dict(self.backbone).keys():
            raise ValueError("the LoRA matrices are of another base model")
        try:
            set_peft_model_state_dict(self.backbone, lora)
            self.head.load_state_dict(head)
        except RuntimeError as error:
            raise ValueError(f"the LoRA matrices do not fit ({error})") from error

    def merged(self, dtype: torch.dtype) -> "LengthNetwork":
        """This network with its LoRA matrices added to the weights: as fast as the base model."""
        self.backbone = self.backbone.merge_and_unload().to(dtype)
        return self.eval().requires_grad_(False)

    def save_adapter(self, directory: Path) -> None:
        """Write the LoRA matrices in peft's format."""
        self.backbone.save_pretrained(str(directory))

    @torch.inference_mode()
    def quantiles(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Quantiles for prompts, shape ``[texts, heads, levels]``; alike long ones together."""
        device = self.head.weight.device
        rows = self.base.encode(texts)
        found = np.empty((len(rows), MOST_HEADS, len(LEVELS)), dtype=np.float32)
        for places in _batches([len(row) for row in rows]):
            ids, mask = padded([rows[i] for i in places], self.base.most_tokens)
            found[places] = self(ids.to(device), mask.to(device)).cpu().numpy()
        return found

    def say(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """What it says of prompts, shape ``[texts, SAID]``.

        The median of each head, and of the first, which is of all that are served, the logarithm of
        the spread and how far the median is from the middle of it.
        """
        quantiles = self.quantiles(texts)
        low, median, high = (quantiles[:, 0, place] for place in (_LOW, _MEDIAN, _HIGH))
        spread = np.maximum(high - low, _LEAST_SPREAD)
        said = np.column_stack(
            (quantiles[:, :, _MEDIAN], np.log(spread), (median - low) / spread - 0.5)
        )
        assert said.shape[1] == SAID  # noqa: S101
        return said.astype(np.float32)


def _batches(sizes: Sequence[int]) -> list[list[int]]:
    """Places of prompts by batches, the shortest first; padding costs less than more batches."""
    batches: list[list[int]] = []
    width = 0
    for place in sorted(range(len(sizes)), key=sizes.__getitem__):
        size = -(-sizes[place] // _MULTIPLE) * _MULTIPLE
        count = len(batches[-1]) if batches else MOST_AT_ONCE
        padding, tokens = count * (size - width), (count + 1) * size
        if count == MOST_AT_ONCE or padding > _BATCH_TOKENS or tokens > MOST_TOKENS_AT_ONCE:
            batches.append([])
        batches[-1].append(place)
        width = size
    return batches
