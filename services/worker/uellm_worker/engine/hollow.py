"""What stands in a hollow model for the parts that other stages hold."""

from typing import Any

import torch
from torch import nn


class PassThrough(nn.Module):
    """Stands for a layer that another stage holds."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The input, whatever else the layer would be given."""
        del args, kwargs
        return hidden_states


class PassThroughLayer(PassThrough):
    """The same, where a layer gives a pair."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The input, and nothing about attention."""
        return super().forward(hidden_states, *args, **kwargs), None


class NoPositions(nn.Module):
    """Stands for learned positions, which another stage has added."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Zero."""
        del args, kwargs
        return torch.zeros(())
