"""A network of one's own (`model.name=slow:make`): the seed network, but a training step takes at least 20 ms.

So a training of a tiny network lasts until a node is back, and its arithmetic stays that of the tiny network.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from raydeep.model import zoo

STEP_S = 0.02


class Slow(nn.Module):
    """Waits before it computes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float NCHW → logits NK."""
        if self.training:
            time.sleep(STEP_S)
        return self.net(x)


def make(num_classes: int, in_channels: int, image_size: tuple[int, int]) -> nn.Module:
    """See zoo.py."""
    return Slow(zoo.build("seed", {}, num_classes, (*image_size, in_channels)))
