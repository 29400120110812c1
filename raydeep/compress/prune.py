"""Magnitude pruning, one threshold over the whole network (Han et al., arXiv 1506.02626)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from raydeep.model import layers

if TYPE_CHECKING:
    from raydeep.config import Prune

KEEP_SHARE = 0.01  # of its weights each layer keeps at least: a layer pruned to nothing cuts the network
EVERY = 5  # steps between two tightenings of the cubic schedule


def cubic(share: float, final: float) -> float:
    """Sparsity after `share` of the schedule (Zhu & Gupta, arXiv 1710.01878, equation 1)."""
    return final * (1 - (1 - min(1.0, share)) ** 3)


def magnitude_masks(weights: dict[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    """Keep the largest weights of all layers together.

    Args:
        weights: layer name → weight.
        sparsity: share of all these weights that becomes zero, in [0, 1).

    Returns:
        Layer name → bool mask, True where the weight stays. Each layer keeps KEEP_SHARE of its weights.
    """
    scores = {name: w.detach().abs() for name, w in weights.items()}
    total = sum(s.numel() for s in scores.values())
    forced = {}
    for name, score in scores.items():
        least = max(1, math.ceil(KEEP_SHARE * score.numel()))
        forced[name] = score.flatten().topk(least).indices
    remove = round(sparsity * total)
    flat = torch.cat([s.flatten().clone().index_fill_(0, forced[n], torch.inf) for n, s in scores.items()])
    keep = torch.ones(total, dtype=torch.bool, device=flat.device)
    if remove:
        order = torch.argsort(flat, stable=True)[:remove]
        keep[order[~torch.isinf(flat[order])]] = False
    parts = torch.split(keep, [s.numel() for s in scores.values()])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


def prepare(model: nn.Module, cfg: Prune, recovers: bool) -> Callable[[int, int], None] | None:
    """Add masks to a model.

    Args:
        model: changed in place.
        cfg: the prune section.
        recovers: whether training follows; without it the cubic schedule is one shot.

    Returns:
        A function of (step, steps in all) that tightens the masks during recovery, or None.
    """
    if not cfg.active:
        return None
    found = dict(layers.compressible(model))
    masks = {name: layers.add_mask(module) for name, module in found.items()}

    def apply(sparsity: float) -> None:
        new = magnitude_masks({n: layers.raw_weight(m) for n, m in found.items()}, sparsity)
        for name, mask in masks.items():
            mask.mask.copy_(new[name])

    if cfg.schedule == "one_shot" or not recovers:
        apply(cfg.sparsity)
        return None

    def tighten(step: int, total: int) -> None:
        last = total // 2
        if step <= last and (step % EVERY == 0 or step == last):
            apply(cubic(step / last if last else 1.0, cfg.sparsity))

    return tighten
