"""Fine-tuning with LoRA on prompts and the lengths of their answers; it can be interrupted.

The loss is the pinball loss over all levels of the standardised log length (quantile regression;
Koenker and Bassett, 1978). Of answers that were cut only that they are longer is known: a quantile
beyond is not held against them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from uellm.core.request import LEVELS
from uellm_profiler.llm.network import LengthNetwork, fast_dtype, padded

CHECKPOINT_STEPS = 200
WARM_UP_SHARE = 0.06
_SORTED_BATCHES = 16
"""Examples of so many batches are put in order of their length, so that each pads little."""
_META, _TENSORS = "checkpoint.json", "checkpoint.safetensors"


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and what came of it.

    Attributes:
        text: the prompt.
        target: its answer's log length, standardised.
        censored: that was cut.
        head: of the network, for what is served; 0: none but the one for all.
    """

    text: str
    target: float
    censored: bool = False
    head: int = 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast is learnt.

    Attributes:
        epochs: times through all samples.
        batch: samples of a step.
        learning_rate: at its height; it rises at first and falls to 0.
        seed: of the order.
    """

    epochs: int = 3
    batch: int = 32
    learning_rate: float = 1e-3
    seed: int = 0


def pinball(quantiles: Tensor, targets: Tensor, censored: Tensor) -> Tensor:
    """Mean pinball loss of each sample, ``[samples]``.

    Args:
        quantiles: ``[samples, levels]``.
        targets: ``[samples]``.
        censored: ``[samples]``, flags.
    """
    levels = torch.tensor(LEVELS, device=quantiles.device)
    late = targets[:, None] - quantiles
    early = torch.where(censored[:, None], torch.zeros_like(late), (levels - 1) * late)
    return torch.maximum(levels * late, early).mean(dim=1)


class Tuning:
    """One tuning of a network.

    Args:
        network: is changed.
        samples: all of them.
        schedule: how.
        directory: where checkpoints are kept; None: nowhere.
        source: names the samples: checkpoints of others are not gone on from.
    """

    def __init__(
        self,
        network: LengthNetwork,
        samples: Sequence[Sample],
        schedule: Schedule,
        directory: Path | None = None,
        source: str = "",
    ) -> None:
        self._samples = samples
        self._schedule = schedule
        self._directory = directory
        self._source = source
        bfloat16 = fast_dtype() == torch.bfloat16
        self._accelerator = Accelerator(mixed_precision="bf16" if bfloat16 else "no")
        self._ids = network.base.encode([sample.text for sample in samples])
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.0)
        self._network = self._accelerator.prepare(network)
        self._optimizer = self._accelerator.prepare(optimizer)
        self._per_epoch = -(-len(samples) // schedule.batch)
        self.steps = schedule.epochs * self._per_epoch
        self.losses: list[float] = []

    def run(self, progress: Callable[[int, float], None] = lambda _, __: None) -> None:
        """Tune, from the latest checkpoint on.

        Args:
            progress: told the samples that were learnt from, and the loss of the last step.
        """
        step = self._resume()
        self._network.train()
        while step < self.steps:
            epoch, place = divmod(step, self._per_epoch)
            batches = self._batches(epoch)
            for batch in batches[place:]:
                # What dropout draws is the same whether the tuning was interrupted or not.
                torch.manual_seed(self._schedule.seed + step)
                self.losses.append(self._learn(batch, step))
                step += 1
                progress(step * self._schedule.batch, self.losses[-1])
                if step % CHECKPOINT_STEPS == 0 or step == self.steps:
                    self._keep(step)
        self._network.eval()

    @staticmethod
    def forget(directory: Path) -> None:
        """Remove the checkpoints of a directory."""
        for name in (_META, _TENSORS):
            (directory / name).unlink(missing_ok=True)
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()

    def _batches(self, epoch: int) -> list[npt.NDArray[np.intp]]:
        """Places of samples, in an order that is the epoch's own."""
        rng = np.random.default_rng([self._schedule.seed, epoch])
        order, size = rng.permutation(len(self._samples)), self._schedule.batch
        batches: list[npt.NDArray[np.intp]] = []
        for start in range(0, len(order), size * _SORTED_BATCHES):
            chunk = order[start : start + size * _SORTED_BATCHES]
            chunk = chunk[np.argsort([len(self._ids[i]) for i in chunk], kind="stable")]
            batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _learn(self, batch: npt.NDArray[np.intp], step: int) -> float:
        device = self._accelerator.device
        rate = self._schedule.learning_rate * _shape(step / self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        base = self._accelerator.unwrap_model(self._network).base
        ids, mask = padded([self._ids[i] for i in batch], base.most_tokens)
        samples = [self._samples[i] for i in batch]
        targets = torch.tensor([sample.target for sample in samples], device=device)
        censored = torch.tensor([sample.censored for sample in samples], device=device)
        heads = torch.tensor([sample.head for sample in samples], device=device)
        with self._accelerator.autocast():
            quantiles = self._network(ids.to(device), mask.to(device)).float()
        own = pinball(quantiles[torch.arange(len(batch)), heads], targets, censored)
        loss = (pinball(quantiles[:, 0], targets, censored) + own).mean() / 2
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(self._network.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())

    def _trainable(self) -> dict[str, Tensor]:
        network = self._accelerator.unwrap_model(self._network)
        return {name: p for name, p in network.named_parameters() if p.requires_grad}

    def _keep(self, step: int) -> None:
        if self._directory is None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._trainable().items():
            tensors[f"value:{name}"] = parameter.detach()
            for key in ("exp_avg", "exp_avg_sq", "step"):
                # A parameter that nothing depends on is never stepped.
                if key in (state := self._optimizer.state.get(parameter, {})):
                    tensors[f"{key}:{name}"] = state[key]
        fresh = self._directory / f"{_TENSORS}.new"
        kept = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        save_file(kept, fresh, metadata={"step": str(step)})
        meta = {"source": self._source, "schedule": repr(self._schedule), "step": step}
        (self._directory / _META).unlink(missing_ok=True)
        fresh.replace(self._directory / _TENSORS)
        (self._directory / _META).write_text(json.dumps(meta) + "\n")

    def _resume(self) -> int:
        """The step to go on from; 0 without a checkpoint of this very tuning."""
        if self._directory is None:
            return 0
        try:
            meta = json.loads((self._directory / _META).read_text())
            tensors = load_file(self._directory / _TENSORS)
        except (OSError, ValueError):
            return 0
        if (meta["source"], meta["schedule"]) != (self._source, repr(self._schedule)):
            return 0
        device = self._accelerator.device
        with torch.no_grad():
            for name, parameter in self._trainable().items():
                parameter.copy_(tensors[f"value:{name}"])
                state = {
                    key: tensors[f"{key}:{name}"].to("cpu" if key == "step" else device)
                    for key in ("exp_avg", "exp_avg_sq", "step")
                    if f"{key}:{name}" in tensors
                }
                if state:
                    self._optimizer.state[parameter] = state
        return int(meta["step"])


def _shape(progress: float) -> float:
    """Share of the learning rate's height: a straight rise, then a straight fall."""
    if progress < WARM_UP_SHARE:
        return (progress + 1e-3) / WARM_UP_SHARE
    return (1 - progress) / (1 - WARM_UP_SHARE)
