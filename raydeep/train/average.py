"""The exponential moving average of a network's weights (Polyak averaging; arXiv 1803.05407 compares the kinds)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Shadows of a module's parameters. Buffers (BatchNorm statistics) are not averaged: they average already.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that a short training is not ruled by its first steps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self.shadows = {name: p.detach().clone() for name, p in module.named_parameters()}
        first = {p: name for name, p in module.named_parameters()}
        every = module.named_parameters(remove_duplicate=False)
        self.aliases = {name: first[p] for name, p in every if name != first[p]}  # further names of tied weights

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after a step of the optimizer."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = [parameter.detach() for parameter in self.module.parameters()]
        get_ema_multi_avg_fn(decay)(list(self.shadows.values()), now, self.updates)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the module has the averaged parameters."""
        own = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        self._put(self.shadows)
        try:
            yield
        finally:
            self._put(own)

    def keep(self) -> None:
        """Leave the averaged parameters in the module."""
        self._put(self.shadows)

    @torch.no_grad()
    def _put(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.copy_(values[name])

    def state(self) -> dict[str, torch.Tensor]:
        """The averaged parameters by name."""
        return self.shadows | {alias: self.shadows[name] for alias, name in self.aliases.items()}

    def load(self, shadows: dict[str, torch.Tensor], updates: int) -> None:
        """Go on from a saved state."""
        assert shadows.keys() == self.state().keys()
        self.updates = updates
        for name, shadow in self.shadows.items():
            shadow.copy_(shadows[name])
