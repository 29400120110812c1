"""Pruned weights and learned-step quantizers, as parametrizations and input hooks of ordinary layers.

LSQ: Esser et al., "Learned Step Size Quantization", arXiv 1902.08153. Weights are quantized a channel,
symmetrically to [-(2^(b-1) - 1), 2^(b-1) - 1]; activations a tensor, to [low, low + 2^b - 1]: low is 0 where
they are never negative, and elsewhere -2^(b-1) (symmetric) or chosen with the step (affine, arXiv 2004.09576:
its zero point, -low, stays as calibrated).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

LEAST_STEP = 1e-9
GRID, PER_OCTAVE = 48, 8  # candidates of the search for a step: 2^(-i/8) of the largest, 6 octaves down
ROW_SAMPLE = 1 << 17  # values of a row that the search looks at
BLOCK = 1 << 16  # values that it works on at once: they stay in the cache
ENDS, ENDS_SAMPLE = 16, 1 << 12  # affine grids: candidates for each end, and the values they are tried on


def weight_qmax(bits: int) -> int:
    """Largest weight integer: 2 bits are ternary, 8 bits ±127."""
    return 2 ** (bits - 1) - 1


def activation_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest activation integer where there is no zero point."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def nearest_power(step: torch.Tensor) -> torch.Tensor:
    """The power of two nearest to each positive step in the logarithm, exact to the bit."""
    mantissa, _ = torch.frexp(step)  # step = mantissa · 2^e, mantissa in [1/2, 1)
    return step / mantissa * torch.where(mantissa < 0.5**0.5, 0.5, 1.0).to(step.dtype)


def shortened(step: torch.Tensor, digits: int) -> torch.Tensor:
    """Each positive step rounded to so many binary digits after the first: what is stored of it is short."""
    mantissa, _ = torch.frexp(step)
    return step / mantissa * ((mantissa * 2 ** (digits + 1)).round() / 2 ** (digits + 1))


def _on_grid(x: torch.Tensor, step: torch.Tensor, low: int, high: int) -> torch.Tensor:
    return (x / step).clamp_(low, high).round_().mul_(step)


class _Quantize(torch.autograd.Function):
    """LSQ's quantizer and gradients (equations 1 to 5), forward and backward in few passes over memory.

    Saved are its input and output, which the layers on either side save too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, raw: torch.Tensor, step: torch.Tensor, low: int, high: int, scale: float
    ) -> torch.Tensor:
        """X on the grid of `step`.

        Args:
            ctx: of autograd.
            x: float; with a step a channel, its first dimension is that of channels.
            raw: the parameter behind the step; gets the step's gradient, by its sign, times `scale`.
            step: positive, of no dimension or broadcast against x.
            low: smallest integer.
            high: largest integer.
            scale: of the step's gradient (section 2.2 of the paper).
        """
        out = _on_grid(x, step, low, high)
        ctx.save_for_backward(x, out, raw, step)
        ctx.low, ctx.high, ctx.scale = low, high, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Straight through inside the grid, 0 at its ends and outside; of the step: round(x/s) - x/s, or the end."""
        x, out, raw, step = ctx.saved_tensors
        if step.dim() == 0 and x.device.type == "cpu":
            ends = (ctx.low * float(step), ctx.high * float(step))
            passed = torch.ops.aten.hardtanh_backward(grad, x, *ends)  # compares and masks in one pass
        else:
            inside = (x > ctx.low * step) & (x < ctx.high * step)
            passed = torch.where(inside, grad, 0)
        # s · d out/d s is out - x where the gradient passes, and out elsewhere
        moved = out - x
        if step.dim() == 0:
            total = _dot(passed, moved)
            total += _dot(torch.sub(grad, passed, out=moved), out)
        else:
            total = (passed * moved + (grad - passed) * out).flatten(1).sum(1)
        slope = total / step.flatten() if step.dim() else total / step
        return passed if ctx.needs_input_grad[0] else None, (slope * raw.sign() * ctx.scale).to(raw.dtype), *[None] * 4


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum of the products, in float32 at least."""
    if a.dtype.itemsize >= 4:
        for layout in (torch.contiguous_format, torch.channels_last)[: 2 if a.dim() == 4 else 1]:
            if a.is_contiguous(memory_format=layout) and b.is_contiguous(memory_format=layout):
                return torch.dot(*(t.as_strided((t.numel(),), (1,)) for t in (a, b)))
    return (a * b).sum(dtype=torch.promote_types(a.dtype, torch.float32))


class _Step(nn.Module):
    """A learned step: its size, perhaps a power of two."""

    def __init__(self, step: torch.Tensor, power_of_two: bool) -> None:
        super().__init__()
        self.power_of_two = power_of_two
        self.step = nn.Parameter(step)

    @torch.no_grad()
    def size(self) -> torch.Tensor:
        """The positive step that quantizes and is frozen."""
        size = self.step.abs().clamp_min(LEAST_STEP)
        return nearest_power(size) if self.power_of_two else size

    def _apply_step(self, x: torch.Tensor, step: torch.Tensor, low: int, high: int, scale: float) -> torch.Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or self.step.requires_grad):
            return _Quantize.apply(x, self.step, step, low, high, scale)
        return _on_grid(x, step, low, high)


class Mask(nn.Module):
    """Parametrization that keeps pruned weights at zero."""

    mask: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Weight, zero where the mask is False."""
        return weight * self.mask


class WeightQuant(_Step):
    """Parametrization: symmetric quantization with a learned step for each output channel.

    Args:
        weight: float, output channels first; sets the first steps.
        bits: 2 to 8.
        power_of_two: steps are powers of two; the gradient passes straight through that rounding.
        qmax: largest integer, where it is to be less than `bits` allow.
    """

    def __init__(self, weight: torch.Tensor, bits: int, power_of_two: bool = False, qmax: int | None = None) -> None:
        qmax = min(weight_qmax(bits), qmax or weight_qmax(bits))
        super().__init__(best_step(weight.detach().flatten(1), -qmax, qmax, power_of_two), power_of_two)
        self.bits, self.qmax = bits, qmax
        self.grad_scale = (weight[0].numel() * qmax) ** -0.5

    @torch.no_grad()
    def size(self) -> torch.Tensor:
        """The positive step that quantizes and is frozen, of few digits: of the largest integer that is 1/64 step."""
        return shortened(super().size(), self.bits + 4)

    def _step(self, weight: torch.Tensor) -> torch.Tensor:
        return self.size().view(-1, *[1] * (weight.dim() - 1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Weight on its grid, differentiable in weight and step."""
        return self._apply_step(weight, self._step(weight), -self.qmax, self.qmax, self.grad_scale)

    def integers(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Int8 weights and their step a channel."""
        step = self._step(weight)
        return (weight / step).clamp(-self.qmax, self.qmax).round().to(torch.int8), step.flatten()


class ActivationQuant(_Step):
    """Quantizes a tensor with one learned step to the integers [low, low + 2^bits - 1]."""

    def __init__(self, bits: int, low: int, step: float, power_of_two: bool = False) -> None:
        super().__init__(torch.tensor(float(step)), power_of_two)
        self.bits, self.low = bits, low
        self.high = low + 2**bits - 1
        self.largest = max(self.high, -low - 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X on its grid, differentiable in x and step."""
        scale = (max(1, x[:1].numel()) * self.largest) ** -0.5
        return self._apply_step(x, self.size(), self.low, self.high, scale)


@torch.no_grad()
def best_step(values: torch.Tensor, low: int, high: int, power_of_two: bool = False) -> torch.Tensor:
    """The step of least mean squared error, by search from the step that clips nothing downwards.

    Args:
        values: float of shape [R, V]; each row gets a step. Of long rows, a sample at even distances decides.
        low: smallest integer, at most 0.
        high: largest integer, at least 0.
        power_of_two: look at powers of two only.

    Returns:
        Of shape [R], in the dtype of values.
    """
    top = torch.maximum(
        values.amax(1) / high if high else values.new_zeros(len(values)),
        values.amin(1) / low if low else values.new_zeros(len(values)),
    )
    # nothing but zeros says nothing: a step of 1/high
    top = torch.where(top > 0, top.clamp_min(LEAST_STEP), 1 / max(high, 1))
    values = values[:, :: -(-values.shape[1] // ROW_SAMPLE)]
    rows = max(1, BLOCK // values.shape[1])
    if power_of_two:
        power = nearest_power(top)
        power = torch.where(power < top, 2 * power, power)
        return _least(values, power, [0.5**i for i in range(GRID // PER_OCTAVE)], low, high, rows)
    best = _least(values, top, [2 ** (-i / PER_OCTAVE) for i in range(GRID)], low, high, rows)
    return _least(
        values, best, [2 ** (i / (6 * PER_OCTAVE)) for i in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5)], low, high, rows
    )


def _least(
    values: torch.Tensor, start: torch.Tensor, factors: list[float], low: int, high: int, rows: int
) -> torch.Tensor:
    """Of start × factors, the step of least squared error for each row; the first where several are."""
    best = []
    for block, top in zip(values.split(rows), start.split(rows), strict=True):
        steps = [(top * factor)[:, None] for factor in factors]
        errors = torch.stack([(_on_grid(block, step, low, high) - block).square_().sum(1) for step in steps])
        best.append(top * torch.tensor(factors, dtype=top.dtype, device=top.device)[errors.argmin(0)])
    return torch.cat(best)


@torch.no_grad()
def best_affine(values: torch.Tensor, bits: int, power_of_two: bool = False) -> tuple[int, float]:
    """The smallest integer and the step of least mean squared error, for values that can be negative.

    Args:
        values: float of shape [V].
        bits: 2 to 8.
        power_of_two: look at such steps only.

    Returns:
        `low`, from -(2^bits - 1) to 0, and the step; never worse than the symmetric grid on these values.
    """
    levels = 2**bits - 1
    shares = torch.arange(1, ENDS + 1, device=values.device, dtype=values.dtype) / ENDS
    ends = torch.cartesian_prod(shares * values.min().clamp_max(0), shares * values.max().clamp_min(0))
    steps = ((ends[:, 1] - ends[:, 0]) / levels).clamp_min(LEAST_STEP)
    steps = nearest_power(steps) if power_of_two else steps
    lows = (ends[:, 0] / steps).round().clamp(-levels, 0)
    sample = values[:: -(-len(values) // ENDS_SAMPLE)]
    errors = torch.stack([
        ((sample / step).round().clamp(low, low + levels) * step - sample).square().sum()
        for low, step in zip(lows, steps, strict=True)
    ])  # fmt: skip
    tried = {-(2 ** (bits - 1)): None} | {int(lows[i]): None for i in errors.argsort(stable=True)[:ENDS]}
    found = []
    for low in tried:
        step = best_step(values[None], low, low + levels, power_of_two)
        found.append((float((_on_grid(values, step, low, low + levels) - values).square().sum()), low, float(step)))
    return min(found, key=lambda item: item[0])[1:]


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


def add_weight_quant(module: nn.Module, bits: int, power_of_two: bool = False, qmax: int | None = None) -> None:
    """Quantize a layer's weight."""
    with torch.no_grad():
        quant = WeightQuant(module.weight, bits, power_of_two, qmax)  # type: ignore[arg-type]
    parametrize.register_parametrization(module, "weight", quant)


def add_input_quant(module: nn.Module, bits: int, low: int, step: float, power_of_two: bool = False) -> None:
    """Quantize a layer's input to `bits` bits from the integer `low` on."""
    module.input_quant = ActivationQuant(bits, low, step, power_of_two)
    module.register_forward_pre_hook(_quantize_input)


def _quantize_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (module.input_quant(args[0]), *args[1:])  # type: ignore[operator]
