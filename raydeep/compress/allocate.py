"""Bits of each layer: what the loss says each layer needs, and the best that an average of bits buys."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from raydeep.model import layers

ROWS = 512  # pictures that sensitivity is measured on, at most
WORST = 1e6  # a loss that is not finite counts as so much
SCALE = 1e4  # largest loss that the solver sees: its tolerance is 1e-6, absolute


@torch.no_grad()
def sensitivity(
    model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], widths: Sequence[int] = range(2, 9)
) -> dict[str, dict[int, float]]:
    """What the loss rises by when one layer's weights alone are quantized, steps by least squared error.

    Args:
        model: float, perhaps masked; comes back as it was.
        batches: network inputs, float NCHW, and labels, int64 N; the first ROWS rows count.
        widths: bits to try.

    Returns:
        Layer name → bits → rise of the mean cross entropy: at least 0, and never less with fewer bits.
    """
    chosen, left = [], ROWS
    for images, labels in batches:
        if left > 0:
            chosen.append((images[:left], labels[:left]))
            left -= len(images)
    training = model.training
    model.eval()
    base = _loss(model, chosen)
    out = {}
    for name, module in layers.compressible(model):
        assert layers.part(module, layers.WeightQuant) is None, f"{name} is quantized already"
        raw = layers.raw_weight(module).data
        kept, weight = raw.clone(), module.weight.detach().clone()  # type: ignore[operator]
        rises: dict[int, float] = {}
        least = 0.0
        for bits in sorted(widths, reverse=True):
            raw.copy_(layers.WeightQuant(weight, bits)(weight))
            rise = _loss(model, chosen) - base
            least = rises[bits] = max(least, rise if math.isfinite(rise) else WORST)
        raw.copy_(kept)
        out[name] = dict(sorted(rises.items()))
    model.train(training)
    return out


def _loss(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    total = sum(float(F.cross_entropy(model(images), labels, reduction="sum")) for images, labels in batches)
    return total / sum(len(labels) for _, labels in batches)


def solve(sizes: Mapping[str, int], losses: Mapping[str, Mapping[int, float]], average: float) -> dict[str, int]:
    """The bits of least summed loss, so many on average: an integer programme, solved to the optimum.

    Of several such, one with the fewest bits in all.

    Args:
        sizes: layer name → number of weights.
        losses: layer name → bits → loss, finite.
        average: bits a weight, at most; no less than the fewest bits of `losses`.

    Returns:
        Layer name → bits.
    """
    names = list(sizes)
    unit = math.gcd(*sizes.values()) or 1
    budget = math.floor(average * (sum(sizes.values()) // unit) + 1e-9)
    options = [(i, bits) for i, name in enumerate(names) for bits in _worthwhile(losses[name])]
    bits = np.array([sizes[names[i]] // unit * b for i, b in options], dtype=float)
    loss = np.array([losses[names[i]][b] for i, b in options], dtype=float)
    loss *= SCALE / (np.abs(loss).max() or 1.0)
    one_each = np.zeros((len(names), len(options)))
    one_each[[i for i, _ in options], range(len(options))] = 1
    rows = [LinearConstraint(one_each, 1, 1), LinearConstraint(bits, ub=budget)]
    best = _minimise(loss, rows)
    assert best is not None, f"{average} bits on average do not fit"
    bound = math.fsum(loss[best])
    fewest = _minimise(bits, [*rows, LinearConstraint(loss, ub=bound)])
    if fewest is not None and math.fsum(loss[fewest]) <= bound * (1 + 1e-12):  # the solver itself allows 1e-6 more
        best = fewest
    return {names[options[k][0]]: options[k][1] for k in best}


def _worthwhile(losses: Mapping[int, float]) -> list[int]:
    """Bits that lose less than any fewer do."""
    out: list[int] = []
    for bits in sorted(losses):
        if not out or losses[bits] < losses[out[-1]]:
            out.append(bits)
    return out


def _minimise(cost: np.ndarray, rows: list[LinearConstraint]) -> np.ndarray | None:
    """The options taken: indices of the ones of the best 0-1 vector."""
    found = milp(
        cost, integrality=np.ones(len(cost)), bounds=Bounds(0, 1), constraints=rows, options={"mip_rel_gap": 0}
    )
    return None if found.x is None else np.flatnonzero(found.x > 0.5)
