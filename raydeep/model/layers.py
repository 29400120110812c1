"""Pruned weights and learned-step quantizers, as parametrizations and input hooks of ordinary layers.

LSQ: Esser et al., "Learned Step Size Quantization", arXiv 1902.08153. Weights are quantized a channel,
symmetrically to [-(2^(b-1) - 1), 2^(b-1) - 1]; activations a tensor, to [0, 2^b - 1] where they are never
negative and to [-2^(b-1), 2^(b-1) - 1] elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

GRID = 48  # candidate steps of the mean-squared-error search


def weight_qmax(bits: int) -> int:
    """Largest weight integer: 2 bits are ternary, 8 bits ±127."""
    return 2 ** (bits - 1) - 1


def activation_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest activation integer."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _round(x: torch.Tensor) -> torch.Tensor:
    return x + (x.round() - x).detach()  # straight-through


def _scaled(step: torch.Tensor, scale: float) -> torch.Tensor:
    """The step itself; its gradient times `scale` (equation 8 of the paper and the text after it)."""
    return (step - step * scale).detach() + step * scale


class Mask(nn.Module):
    """Parametrization that keeps pruned weights at zero."""

    mask: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Weight, zero where the mask is False."""
        return weight * self.mask


class WeightQuant(nn.Module):
    """Parametrization: symmetric quantization with a learned step for each output channel."""

    def __init__(self, weight: torch.Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.qmax = weight_qmax(bits)
        self.grad_scale = (weight[0].numel() * self.qmax) ** -0.5
        self.step = nn.Parameter(best_step(weight.detach().flatten(1), -self.qmax, self.qmax))

    def _step(self, weight: torch.Tensor) -> torch.Tensor:
        return self.step.abs().clamp_min(1e-9).view(-1, *[1] * (weight.dim() - 1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Weight on its grid, differentiable in weight and step."""
        step = self._step(weight)
        if self.training and torch.is_grad_enabled():  # elsewhere the very step that is frozen, to the last bit
            step = _scaled(step, self.grad_scale)
        return _round((weight / step).clamp(-self.qmax, self.qmax)) * step

    def integers(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Int8 weights and their float32 step a channel."""
        step = self._step(weight)
        return (weight / step).clamp(-self.qmax, self.qmax).round().to(torch.int8), step.flatten()


class ActivationQuant(nn.Module):
    """Quantizes a tensor with one learned step."""

    def __init__(self, bits: int, low: int, step: float) -> None:
        super().__init__()
        self.bits, self.low = bits, low
        self.high = low + 2**bits - 1
        self.step = nn.Parameter(torch.tensor(float(step)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X on its grid, differentiable in x and step."""
        step = self.step.abs().clamp_min(1e-9)
        if self.training and torch.is_grad_enabled():
            step = _scaled(step, (max(1, x[:1].numel()) * self.high) ** -0.5)
        return _round((x / step).clamp(self.low, self.high)) * step


def best_step(values: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The step of least mean squared error, by search over GRID candidates.

    Args:
        values: float of shape [R, V]; each row gets a step.
        low: smallest integer.
        high: largest integer.

    Returns:
        float32 of shape [R].
    """
    top = torch.maximum(values.amax(1) / max(high, 1), values.amin(1) / min(low, -1) if low else values.amax(1) / high)
    top = torch.where(
        top > 0, top.clamp_min(1e-8), 1 / max(high, 1)
    )  # nothing but zeros says nothing: a step of 1/high
    best = top.clone()
    least = torch.full_like(top, float("inf"))
    for i in range(1, GRID + 1):
        step = (top * i / GRID)[:, None]
        error = ((values / step).round().clamp(low, high) * step - values).square().mean(1)
        better = error < least
        best = torch.where(better, step[:, 0], best)
        least = torch.where(better, error, least)
    return best


def compressible(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each layer that can be pruned and quantized, in the order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            yield name, module


def part(module: nn.Module, kind: type) -> Any:
    """The weight parametrization of that kind, or None."""
    if parametrize.is_parametrized(module, "weight"):
        for item in module.parametrizations.weight:  # type: ignore[union-attr]
            if isinstance(item, kind):
                return item
    return None


def raw_weight(module: nn.Module) -> torch.Tensor:
    """The weight below all parametrizations: what the optimizer changes."""
    if parametrize.is_parametrized(module, "weight"):
        return module.parametrizations.weight.original  # type: ignore[union-attr, return-value]
    return module.weight  # type: ignore[return-value]


def add_mask(module: nn.Module) -> Mask:
    """Give a layer a mask (before any quantizer: zeros must stay zeros)."""
    mask = Mask(raw_weight(module))
    parametrize.register_parametrization(module, "weight", mask)
    return mask


def add_weight_quant(module: nn.Module, bits: int) -> None:
    """Quantize a layer's weight."""
    with torch.no_grad():
        quant = WeightQuant(module.weight, bits)  # type: ignore[arg-type]
    parametrize.register_parametrization(module, "weight", quant)


def add_input_quant(module: nn.Module, bits: int, low: int, step: float) -> None:
    """Quantize a layer's input to `bits` bits from the integer `low` on."""
    module.input_quant = ActivationQuant(bits, low, step)
    module.register_forward_pre_hook(_quantize_input)


def _quantize_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (module.input_quant(args[0]), *args[1:])  # type: ignore[operator]
