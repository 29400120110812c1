"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from raydeep.config import Train

Groups = list[dict[str, Any]]


def _sgd(groups: Groups, cfg: Train, lr: float, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=cfg.momentum, nesterov=cfg.momentum > 0, fused=fused)


def _adamw(groups: Groups, cfg: Train, lr: float, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, fused=fused)


def _muon(groups: Groups, cfg: Train, lr: float, fused: bool) -> torch.optim.Optimizer:
    return Muon(groups, cfg, lr, fused)


# Contract: (parameter groups with weight_decay set, the train section, peak learning rate, fused kernels) -> optimizer
OPTIMIZERS: dict[str, Callable[[Groups, Train, float, bool], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "muon": _muon,
}


def make_optimizer(model: nn.Module, cfg: Train, lr: float) -> torch.optim.Optimizer:
    """The optimizer of the job; weight decay on matrices and kernels only, not on biases, norms and steps.

    A group may have `lr_scale`, its share of the learning rate.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = all(p.is_floating_point() and type(p) in (nn.Parameter, torch.Tensor) for p in parameters)
    return OPTIMIZERS[cfg.optimizer]([g for g in groups if g["params"]], cfg, lr, fused)


def as_matrix(kernel: torch.Tensor) -> torch.Tensor:
    """A view of a kernel as a matrix [out, in × height × width]; columns in the order of its memory."""
    if kernel.dim() == 2:
        return kernel
    if not kernel.is_contiguous():
        kernel = kernel.permute(0, *range(2, kernel.dim()), 1)  # channels last: Muon does not mind columns' order
    return kernel.view(kernel.shape[0], -1)


def _is_full(kernel: torch.Tensor) -> bool:
    """Whether there is something to orthogonalise: neither depthwise nor a vector."""
    return kernel.shape[1] > 1 and min(as_matrix(kernel).shape) > 1


class Muon(torch.optim.Optimizer):
    """Muon for the inner matrices and kernels, AdamW for all else: first and last layer, biases, norms, depthwise.

    `torch.optim.Muon` (momentum orthogonalised by Newton-Schulz, Nesterov, arXiv 2502.16982) takes matrices only: it
    works on views of the kernels. State is kept by the network's own parameters, as in any optimizer of torch.
    """

    def __init__(self, groups: Groups, cfg: Train, lr: float, fused: bool) -> None:
        weights = [p for g in groups for p in g["params"] if p.dim() > 1]
        edges = {id(p) for p in (weights[:1] + weights[-1:])}
        mine: list[nn.Parameter] = []
        rest: Groups = []
        for group in groups:
            inner = [p for p in group["params"] if p.dim() > 1 and id(p) not in edges and _is_full(p)]
            mine += inner
            others = [p for p in group["params"] if not any(p is q for q in inner)]
            if others:
                rest.append({**group, "params": others, "lr_scale": cfg.muon_rest})
        own: Groups = [{"params": mine, "weight_decay": cfg.weight_decay}] if mine else []
        super().__init__([*own, *rest], {"lr": lr})
        self.views = {p: nn.Parameter(as_matrix(p.detach())) for p in mine}
        self.parts: list[torch.optim.Optimizer] = []
        if mine:
            self.parts.append(
                torch.optim.Muon(
                    list(self.views.values()),
                    lr=lr,
                    weight_decay=cfg.weight_decay,
                    momentum=cfg.momentum,
                    adjust_lr_fn="original",
                )
            )
        if rest:
            self.parts.append(torch.optim.AdamW([{**g, "lr": lr * cfg.muon_rest} for g in rest], fused=fused))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; `closure` is not supported."""
        assert closure is None
        inner = [group for part in self.parts for group in part.param_groups]
        for outer, group in zip(self.param_groups, inner, strict=True):
            group["lr"] = outer["lr"]
        for parameter, view in self.views.items():
            view.grad = None if parameter.grad is None else self._like(parameter)
        for part in self.parts:
            for group in part.param_groups:
                for leaf in group["params"]:
                    kept = self.state.get(self._owner(leaf))
                    if kept:
                        part.state[leaf] = kept
            part.step()
            for leaf, kept in part.state.items():
                self.state[self._owner(leaf)] = kept

    def _like(self, parameter: torch.Tensor) -> torch.Tensor:
        """The gradient in the order of the parameter's view."""
        assert parameter.grad is not None
        if parameter.dim() > 2 and not parameter.is_contiguous():
            return parameter.grad.permute(0, *range(2, parameter.dim()), 1).reshape(parameter.shape[0], -1)
        return parameter.grad.reshape(parameter.shape[0], -1)

    def _owner(self, leaf: torch.Tensor) -> torch.Tensor:
        return self._owners.get(leaf, leaf)

    @property
    def _owners(self) -> dict[torch.Tensor, torch.Tensor]:
        return {view: parameter for parameter, view in self.views.items()}


def lr_factor(step: int, total: int, warmup: int, cfg: Train | None = None) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then the schedule of the job.

    cosine to zero (arXiv 1608.03983); step; or one_cycle (arXiv 1708.07120), whose rise from 1/25 to the peak and fall
    to 1/250,000 both follow a cosine, as in torch's OneCycleLR; it rises over the warm-up, or 30% of the training if
    there is none.
    """
    schedule = cfg.schedule if cfg is not None else "cosine"
    if schedule == "one_cycle":
        rise = (warmup or 0.3 * total) - 1
        if step <= rise:
            return _anneal(1 / 25, 1.0, step / max(1e-12, rise))
        return _anneal(1.0, 1 / 25e4, (step - rise) / max(1e-12, total - 1 - rise))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "step" and cfg is not None:
        return cfg.step_factor ** sum(step >= share * total for share in cfg.step_at)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
