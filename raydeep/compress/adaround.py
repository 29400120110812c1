"""Adaptive rounding: which weights round up and which down, learned from what the layer reads.

AdaRound: Nagel et al., "Up or Down?", arXiv 2004.10568. A layer is linear in its weight, so the squared error of
its output is a quadratic form in the weight: the second moments of its inputs are summed once, and every step of the
optimization sees all the data at the price of a small matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from raydeep.compress.observe import Enough, Images, run, trace
from raydeep.model import layers

COLUMNS = 1 << 15  # positions, of all pictures, that the moments are summed over; or 4 a weight of a channel
CHUNK = 1 << 23  # values unfolded at once
STEPS = 200
LR = 0.15
WARM_UP = 0.2  # share of the steps before the regulariser
BETA = (20.0, 2.0)  # of the regulariser, from wide to narrow
LOW, HIGH = -0.1, 1.1  # the stretch of the sigmoid: ζ and γ
REGULARISER = 0.1  # its weight a variable, where nearest rounding has an error of 1 a channel


@torch.no_grad()
def round_adaptively(model: nn.Module, float_model: nn.Module, calibration: Images) -> None:
    """Choose the rounding of every quantized weight, layer after layer as they run.

    Each layer aims at what it gives in the float network, from what it reads in this one: so it makes up for the
    layers before it (section 3.3 of the paper). No choice is random. A channel that nearest rounding serves
    better keeps that.

    Args:
        model: with quantizers, in evaluation mode; its weights become integers times steps.
        float_model: the same network without quantizers, in evaluation mode.
        calibration: batches of network inputs, float NCHW.
    """
    runs, _ = trace(model, calibration[0][:2])
    for name in runs:
        module = model.get_submodule(name)
        quant = layers.part(module, layers.WeightQuant)
        if quant is None:
            continue
        second, cross = moments(model, float_model, name, runs[name], calibration)
        raw = layers.raw_weight(module)
        mask = layers.part(module, layers.Mask)
        weight = raw if mask is None else mask(raw)
        integers = choose(weight, quant._step(weight), quant.qmax, second, cross)
        raw.data.copy_(integers * quant._step(weight))


def choose(
    weight: torch.Tensor, step: torch.Tensor, qmax: int, second: torch.Tensor, cross: torch.Tensor
) -> torch.Tensor:
    """The integers of least squared output error, each the one below or the one above weight / step.

    Args:
        weight: float, output channels O first; zeros stay zeros.
        step: positive, broadcast against weight.
        qmax: the integers' largest size.
        second: mean of x xᵀ over what the layer reads: shape [G, D, D] for G groups.
        cross: mean of y xᵀ with the outputs y that it aims at: shape [G, O / G, D].

    Returns:
        Whole numbers in the shape and dtype of weight.
    """
    shape = cross.shape
    scaled = (weight / step).reshape(shape)
    size = step.expand_as(weight).reshape(shape)
    below, free = scaled.floor(), scaled != 0
    nearest = scaled.round().clamp(-qmax, qmax)
    base, scale = _error(nearest * size, second, cross, weight.reshape(shape))
    share = (scaled - below).clamp(0.01, 0.99)
    v = torch.logit((share - LOW) / (HIGH - LOW)).requires_grad_(True)
    optimizer = torch.optim.Adam([v], LR)
    for i in range(STEPS):
        sigmoid = torch.sigmoid(v.detach())
        open_ = sigmoid * (HIGH - LOW) + LOW
        h = open_.clamp(0, 1)
        integers = below + h
        slope = 2 * (torch.baddbmm(cross, integers.clamp(-qmax, qmax) * size, second, beta=-1)) * size / scale
        slope *= (integers >= -qmax) & (integers <= qmax)
        if i >= WARM_UP * STEPS:
            left = 1 - (i / STEPS - WARM_UP) / (1 - WARM_UP)
            beta = BETA[1] + (BETA[0] - BETA[1]) * left
            t = 2 * h - 1
            slope -= REGULARISER * 2 * beta * t.abs().pow(beta - 1) * t.sign()
        v.grad = slope * ((open_ > 0) & (open_ < 1)) * sigmoid * (1 - sigmoid) * (HIGH - LOW) * free
        optimizer.step()
    up = torch.sigmoid(v.detach()) > 0.5  # where the stretched one is
    found = torch.where(free, (below + up).clamp(-qmax, qmax), 0)
    better = _error(found * size, second, cross, weight.reshape(shape))[0] <= base
    return torch.where(better, found, nearest).reshape(weight.shape)


def _error(
    rounded: torch.Tensor, second: torch.Tensor, cross: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of each output, up to a constant, and that of rounding alone: shape [G, O / G, 1] both."""
    total = ((rounded @ second) * rounded).sum(-1, keepdim=True) - 2 * (cross * rounded).sum(-1, keepdim=True)
    moved = rounded - weight
    alone = ((moved @ second) * moved).sum(-1, keepdim=True)
    return total, alone.clamp_min(1e-12 * alone.max().clamp_min(1e-30))


@torch.no_grad()
def moments(
    model: nn.Module, float_model: nn.Module, name: str, runs: int, calibration: Images
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of x xᵀ and y xᵀ: x what a layer reads in `model`, y what it gives in `float_model`, less its bias.

    Args:
        model: with quantizers.
        float_model: without.
        name: of the layer.
        runs: how often it runs in a pass.
        calibration: batches of network inputs, float NCHW.

    Returns:
        Float32 of shapes [G, D, D] and [G, O / G, D], for G groups with D inputs and O outputs in all.
    """
    layer: Any = model.get_submodule(name)
    weight = layer.weight.detach()
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    width, outputs = weight[0].numel(), len(weight) // groups
    second, cross = weight.new_zeros(groups, width, width), weight.new_zeros(groups, outputs, width)
    pictures = sum(len(images) for images in calibration)
    each = -(-max(COLUMNS, 4 * width) // (pictures * runs))  # positions of a picture
    generator = torch.Generator().manual_seed(0)
    count = 0
    for images in calibration:
        read, _ = _seen(model, name, runs, images)
        _, given = _seen(float_model, name, runs, images)
        for x, y in zip(read, given, strict=True):
            y = y if layer.bias is None else y - layer.bias.view(-1, *[1] * (2 * isinstance(layer, nn.Conv2d)))
            for columns, targets in _columns(layer, x, y, each, generator):
                second.baddbmm_(columns, columns.mT)
                cross.baddbmm_(targets, columns.mT)
                count += columns.shape[2]
    return second / count, cross / count


def _seen(
    model: nn.Module, name: str, runs: int, images: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a layer reads (quantized) and what it gives, at each of its runs."""
    read: list[torch.Tensor] = []
    given: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        read.append(args[0])
        given.append(out)
        if len(given) == runs:
            raise Enough

    run(model, [images], [model.get_submodule(name).register_forward_hook(hook)])
    return read, given


def _columns(
    layer: Any, x: torch.Tensor, y: torch.Tensor, each: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs [G, D, M] and outputs [G, O / G, M] of a layer's matrix product, at a sample of `each` positions a row."""
    if not isinstance(layer, nn.Conv2d):
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        yield x.T[None], y.T[None]
        return
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    places = y.shape[2] * y.shape[3]
    rows = max(1, CHUNK // (layer.weight[0].numel() * layer.groups * places))
    for part, out in zip(x.split(rows), y.split(rows), strict=True):
        padded = F.pad(part, layer._reversed_padding_repeated_twice, mode)
        unfolded = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
        out = out.flatten(2)
        if each < places:
            chosen = torch.randperm(places, generator=generator)[:each].to(out.device)
            unfolded, out = unfolded[:, :, chosen], out[:, :, chosen]
        yield tuple(t.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2) for t in (unfolded, out))
