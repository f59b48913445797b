"""Layers that carry a state of fixed size per sequence, over packed steps of many sequences.

A state lies in its slot, as keys and values do, but holds for the last computed token alone. So a
chunk goes on from where the one before it ended, and one that starts at position 0 starts from
zero, whoever had the slot before: preemption needs no more than computing again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from uellm_worker.engine.attention import SlotCache
from uellm_worker.engine.packed import PackedStep


class Mixer(nn.Module):
    """What stands in the place of attention; made of transformers' module, whose weights it uses.

    Attributes:
        states: ``[slots, ...]``, as the family describes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.states: tuple[torch.Tensor, ...] = ()
        self._cache: SlotCache | None = None

    def bind(self, cache: SlotCache, states: Sequence[torch.Tensor]) -> None:
        """Have the step under way from ``cache``, and keep the states in ``states``."""
        self._cache, self.states = cache, tuple(states)

    @property
    def step(self) -> PackedStep:
        """The one under way."""
        if self._cache is None or self._cache.step is None:
            raise RuntimeError("recurrence outside of a step")
        return self._cache.step


class ShortConvolution(Mixer):
    """LFM2's gated convolution; its state: the last inputs of the convolution.

    Args:
        module: transformers' ``Lfm2ShortConv``.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.in_proj, self.conv, self.out_proj = module.in_proj, module.conv, module.out_proj

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """``[1, T, hidden]`` to the same."""
        del kwargs
        before, behind, rows = self.in_proj(hidden_states)[0].chunk(3, dim=-1)
        mixed = convolve(before * rows, self.conv, self.states[0], self.step)
        output: torch.Tensor = self.out_proj((behind * mixed)[None])
        return output


class RealGatedRecurrence(Mixer):
    """Griffin's recurrent block: a convolution, then the RG-LRU (arXiv 2402.19427, section 2.4).

    States: the last inputs of the convolution, and ``h`` in float32.

    Args:
        module: transformers' ``RecurrentGemmaRecurrentBlock``.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.linear_x, self.linear_y = module.linear_x, module.linear_y
        self.linear_out = module.linear_out
        self.conv_1d, self.rg_lru, self.act_fn = module.conv_1d, module.rg_lru, module.act_fn

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """``[1, T, hidden]`` to the same, and no weights."""
        del kwargs
        gate = self.act_fn(self.linear_y(hidden_states))
        rows = convolve(self.linear_x(hidden_states)[0], self.conv_1d, self.states[0], self.step)
        return self.linear_out(self._recur(rows)[None] * gate), None

    def _recur(self, rows: torch.Tensor) -> torch.Tensor:
        """``h`` behind each row of ``[T, width]``: equations 1 to 4."""
        lru, step = self.rg_lru, self.step
        recurrence_gate = _block_gate(rows, lru.recurrent_gate_weight, lru.recurrent_gate_bias)
        input_gate = _block_gate(rows, lru.input_gate_weight, lru.input_gate_bias)
        log_decay = -8.0 * recurrence_gate * functional.softplus(lru.recurrent_param)
        scale = torch.sqrt(1 - torch.exp(2 * log_decay))
        scale[step.positions == 0] = 1.0  # Nothing came before that could add up.
        inputs = (rows * input_gate * scale).float()
        return recur(torch.exp(log_decay).float(), inputs, self.states[1], step).to(rows.dtype)


def _block_gate(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A sigmoid gate ``[T, width]`` from block-diagonal ``[blocks, block, block]``."""
    blocks = rows.view(len(rows), *bias.shape).transpose(0, 1)
    gate = torch.sigmoid(torch.baddbmm(bias[:, None], blocks, weight))
    return gate.transpose(0, 1).reshape(rows.shape)


def convolve(
    rows: torch.Tensor, convolution: nn.Conv1d, state: torch.Tensor, step: PackedStep
) -> torch.Tensor:
    """A causal convolution of each sequence's rows, channel by channel.

    Args:
        rows: ``[T, channels]``.
        convolution: its weight is ``[channels, 1, taps]``.
        state: ``[slots, taps - 1, channels]``, the inputs before; brought up to date.
        step: whose rows they are.

    Returns:
        ``[T, channels]``.
    """
    output = torch.empty_like(rows)
    decodes, slots = step.decodes, step.slots[: step.decodes]
    if decodes:
        window = torch.cat([state[slots], rows[:decodes, None]], dim=1)
        output[:decodes] = (window * convolution.weight[:, 0].T).sum(1)
        state[slots] = window[:, 1:]
    for row, chunk in step.prefills:
        here = slice(row, row + chunk.count)
        before = state[chunk.slot] if chunk.start else torch.zeros_like(state[chunk.slot])
        window = torch.cat([before, rows[here]])
        output[here] = functional.conv1d(
            window.T[None], convolution.weight, groups=convolution.groups
        )[0].T
        state[chunk.slot] = window[chunk.count :]
    return output if convolution.bias is None else output + convolution.bias


def recur(
    decay: torch.Tensor, inputs: torch.Tensor, state: torch.Tensor, step: PackedStep
) -> torch.Tensor:
    """``h[t] = decay[t] * h[t - 1] + inputs[t]`` of each sequence.

    Args:
        decay: ``[T, width]``, from 0 to 1.
        inputs: ``[T, width]``.
        state: ``[slots, width]``, ``h`` before; brought up to date.
        step: whose rows they are.

    Returns:
        ``[T, width]``.
    """
    output = torch.empty_like(inputs)
    decodes, slots = step.decodes, step.slots[: step.decodes]
    if decodes:
        output[:decodes] = state[slots] = decay[:decodes] * state[slots] + inputs[:decodes]
    for row, chunk in step.prefills:
        here = slice(row, row + chunk.count)
        present = inputs[here].clone()
        if chunk.start:
            present[0] += decay[row] * state[chunk.slot]
        output[here] = scan(decay[here], present)
        state[chunk.slot] = output[row + chunk.count - 1]
    return output


def scan(decay: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """``h`` of one sequence from ``h = 0``, in log2(T) steps (Hillis and Steele, 1986).

    Args:
        decay: ``[T, width]``, from 0 to 1: products of them only get smaller.
        inputs: ``[T, width]``.
    """
    span = 1
    while span < len(inputs):
        later = inputs[span:] + decay[span:] * inputs[:-span]
        inputs = torch.cat([inputs[:span], later])
        decay = torch.cat([decay[:span], decay[span:] * decay[:-span]])
        span *= 2
    return inputs
