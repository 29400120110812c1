"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from raydeep.config import Train


def _sgd(groups: list[dict[str, Any]], cfg: Train, lr: float) -> torch.optim.Optimizer:
    nesterov = cfg.momentum > 0
    return torch.optim.SGD(groups, lr=lr, momentum=cfg.momentum, nesterov=nesterov)


def _adamw(groups: list[dict[str, Any]], cfg: Train, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr)


# Contract: (parameter groups with weight_decay set, the train section, peak learning rate) -> optimizer
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": _sgd, "adamw": _adamw}


def make_optimizer(model: nn.Module, cfg: Train, lr: float) -> torch.optim.Optimizer:
    """The optimizer of the job; weight decay on matrices and kernels only, not on biases, norms and steps."""
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return OPTIMIZERS[cfg.optimizer]([g for g in groups if g["params"]], cfg, lr)


def lr_factor(step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine to zero (arXiv 1608.03983)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
