"""Mamba-2's mixer over packed steps (Dao and Gu, "Transformers are SSMs", arXiv 2405.21060)."""

from typing import Any

import torch
from torch.nn import functional

from uellm_worker.engine.recurrent import Mixer, convolve

_BLOCK_ROWS = 64
"""Rows of a sequence that are computed as one: more cost more products, fewer more operations."""


class StateSpace(Mixer):
    """A convolution, then ``h[t] = exp(dt A) h[t - 1] + dt x B``, ``y = h C + D x`` for each head.

    States: the last inputs of the convolution, and ``h``, ``[heads, head_dim, state]``, in float32.

    Args:
        module: transformers' mixer, as in Bamba and Granite's hybrid models.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.in_proj, self.conv1d, self.act = module.in_proj, module.conv1d, module.act
        self.norm, self.out_proj = module.norm, module.out_proj
        self.dt_bias, self.A_log, self.D = module.dt_bias, module.A_log, module.D
        self._heads, self._groups = int(module.num_heads), int(module.n_groups)
        self._inner, self._channels = int(module.intermediate_size), int(module.conv_dim)
        self._limits = module.time_step_limit

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """``[1, T, hidden]`` to the same."""
        del kwargs
        gate, mixed, times = self.in_proj(hidden_states)[0].split(
            [self._inner, self._channels, self._heads], dim=-1
        )
        mixed = self.act(convolve(mixed, self.conv1d, self.states[0], self.step)).float()
        inputs, *factors = mixed.split(
            [self._inner, *[(self._channels - self._inner) // 2] * 2], dim=-1
        )
        heads = inputs.view(len(inputs), self._heads, -1)
        times = functional.softplus(times + self.dt_bias).clamp(*self._limits).float()
        into, out_of = (
            factor.view(len(factor), self._groups, -1).repeat_interleave(
                self._heads // self._groups, dim=1
            )
            for factor in factors
        )
        decay = times * -torch.exp(self.A_log.float())
        attained = self._recur(decay, times[..., None] * heads, into, out_of)
        attained += self.D.float()[:, None] * heads
        rows = self.norm(attained.view_as(inputs).to(gate.dtype)[None], gate[None])
        output: torch.Tensor = self.out_proj(rows.to(hidden_states.dtype))
        return output

    def _recur(
        self, decay: torch.Tensor, inputs: torch.Tensor, into: torch.Tensor, out_of: torch.Tensor
    ) -> torch.Tensor:
        """``h C`` behind each row.

        Args:
            decay: ``dt A``, ``[T, heads]``.
            inputs: ``dt x``, ``[T, heads, head_dim]``.
            into: ``B``, ``[T, heads, state]``.
            out_of: ``C``, as ``into``.

        Returns:
            ``[T, heads, head_dim]``.
        """
        step, state = self.step, self.states[1]
        output = torch.empty_like(inputs)
        count, slots = step.decodes, step.slots[: step.decodes]
        if count:
            added = inputs[:count, :, :, None] * into[:count, :, None]
            hidden = torch.exp(decay[:count])[..., None, None] * state[slots] + added
            output[:count] = (hidden @ out_of[:count, ..., None])[..., 0]
            state[slots] = hidden
        for row, chunk in step.prefills:
            hidden = state[chunk.slot] if chunk.start else torch.zeros_like(state[chunk.slot])
            end = row + chunk.count
            for first in range(row, end, _BLOCK_ROWS):
                here = slice(first, min(first + _BLOCK_ROWS, end))
                output[here], hidden = _block(
                    decay[here], inputs[here], into[here], out_of[here], hidden
                )
            state[chunk.slot] = hidden
        return output


def _block(
    decay: torch.Tensor,
    inputs: torch.Tensor,
    into: torch.Tensor,
    out_of: torch.Tensor,
    hidden: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Consecutive rows at once, as attention to each other whose weights decay (section 6).

    Args:
        decay: see ``StateSpace._recur``, as the next three.
        inputs: see there.
        into: see there.
        out_of: see there.
        hidden: before them, ``[heads, head_dim, state]``.

    Returns:
        ``h C``, and ``h`` behind the last row.
    """
    total = decay.cumsum(0)  # From the block's start to each row, [L, heads].
    between = total.T[:, :, None] - total.T[:, None, :]
    later = torch.ones(between.shape[1:], dtype=torch.bool, device=decay.device).triu(1)
    weights = torch.exp(between.masked_fill(later, float("-inf")))
    weights = weights * torch.einsum("thn,shn->hts", out_of, into)
    output = torch.einsum("hts,shp->thp", weights, inputs)
    output += torch.exp(total)[..., None] * torch.einsum("thn,hpn->thp", out_of, hidden)
    remaining = torch.exp(total[-1] - total)[..., None] * into
    added = torch.einsum("shn,shp->hpn", remaining, inputs)
    return output, torch.exp(total[-1])[:, None, None] * hidden + added
