"""What a model costs: parameters, non-zeros, multiply-accumulates, bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import nn

from raydeep.model import layers


class Cost(NamedTuple):
    """Counts over all weights and biases of a frozen network."""

    parameters: int
    nonzeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.nonzeros / max(1, self.parameters)


def count(tensors: dict[str, torch.Tensor]) -> Cost:
    """Parameters and non-zeros of frozen tensors; scales and BatchNorm's statistics are not counted."""
    others = (".weight.scale", ".running_mean", ".running_var")
    counted = [t for name, t in tensors.items() if not name.endswith(others)]
    return Cost(sum(t.numel() for t in counted), sum(int(torch.count_nonzero(t)) for t in counted))


def file_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of the safetensors file of these tensors."""
    return len(save(tensors))


@torch.no_grad()
def macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of convolutions and linear layers for one picture of height, width, channels."""
    total = 0

    def hook(module: Any, args: Any, out: torch.Tensor) -> None:
        nonlocal total
        fan_in = module.weight[0].numel()
        total += out[0].numel() * fan_in

    handles = [module.register_forward_hook(hook) for _, module in layers.compressible(model)]
    training = model.training
    model.eval()(torch.zeros(1, shape[2], shape[0], shape[1], device=next(model.parameters()).device))
    model.train(training)
    for handle in handles:
        handle.remove()
    return total
