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

    A group may have `lr_scale`, its share of the learning rate. State is kept by parameter; to go on from a saved one,
    assign it: `optimizer.state[parameter] = {...}`.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    plain = all(p.is_floating_point() and type(p) in (nn.Parameter, torch.Tensor) for p in parameters)
    fused = plain and all(p.device.type in ("cpu", "cuda") for p in parameters)
    optimizer = OPTIMIZERS[cfg.optimizer]([g for g in groups if g["params"]], cfg, lr, fused)
    if fused and any(p.device.type == "cpu" and not p.is_contiguous() for p in parameters):
        optimizer.register_step_pre_hook(_align)
    return optimizer


@torch.no_grad()
def _align(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Give gradients and state the strides of their parameters: the CPU's fused kernels walk through memory blindly."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad).detach()
            entry = optimizer.state.get(p, {})
            for key, value in entry.items():
                if isinstance(value, torch.Tensor) and value.shape == p.shape and value.stride() != p.stride():
                    entry[key] = torch.empty_like(p, dtype=value.dtype).copy_(value).detach()


def _order(kernel: torch.Tensor) -> list[int]:
    """Its axes, outputs first, the others as they lie in memory (channels last: 0, 2, 3, 1)."""
    return [0, *sorted(range(1, kernel.dim()), key=lambda axis: -kernel.stride()[axis])]


def as_matrix(kernel: torch.Tensor) -> torch.Tensor:
    """A view of a kernel as a matrix [out, in × height × width]; columns in the order of its memory.

    Muon does not mind the order of columns.
    """
    return kernel.permute(_order(kernel)).view(kernel.shape[0], -1)


def _is_weight(parameter: torch.Tensor) -> bool:
    """Whether it is a matrix or kernel of a layer; not so are vectors, class tokens and position embeddings."""
    return parameter.dim() > 1 and min(parameter.shape[0], parameter.numel() // max(1, parameter.shape[0])) > 1


class Muon(torch.optim.Optimizer):
    """Muon for the inner matrices and kernels, AdamW for all else: first and last layer, biases, norms, depthwise.

    `torch.optim.Muon` (momentum orthogonalised by Newton-Schulz, arXiv 2502.16982; Nesterov, and the learning rate of
    a matrix × sqrt(max(1, rows / columns)) as in its first implementation) takes matrices only: it works on views of
    the kernels. State is kept by the network's own parameters and in their shape, as in any optimizer of torch.
    """

    def __init__(self, groups: Groups, cfg: Train, lr: float, fused: bool) -> None:
        weights = [p for g in groups for p in g["params"] if _is_weight(p)]
        mine = {p for p in weights[1:-1] if p.shape[1] > 1}  # one input a group: depthwise
        own: Groups = []
        rest: Groups = []
        for group in groups:
            inner = [p for p in group["params"] if p in mine]
            others = [p for p in group["params"] if p not in mine]
            if inner:
                own.append({**group, "params": inner})
            if others:
                scale = cfg.muon_rest
                rest.append({**group, "params": others, "lr": lr * scale, "lr_scale": scale, "fused": fused})
        super().__init__([*own, *rest], {"lr": lr})
        self.views = {p: nn.Parameter(as_matrix(p.detach())) for g in own for p in g["params"]}
        self.muon: torch.optim.Muon | None = None
        self.adamw: torch.optim.AdamW | None = None
        if own:
            self.muon = torch.optim.Muon(
                [{**g, "params": [self.views[p] for p in g["params"]]} for g in own],
                lr=lr,
                momentum=cfg.momentum,
                nesterov=True,
                adjust_lr_fn="original",
            )
        if rest:
            self.adamw = torch.optim.AdamW([{**g} for g in rest], fused=fused)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; `closure` is not supported."""
        assert closure is None
        parts = [part for part in (self.muon, self.adamw) if part is not None]
        inner = [group for part in parts for group in part.param_groups]
        for outer, group in zip(self.param_groups, inner, strict=True):
            group["lr"], group["weight_decay"] = outer["lr"], outer["weight_decay"]
        if self.muon is not None:
            for kernel, view in self.views.items():
                if kernel.grad is not None:
                    view.data = as_matrix(kernel.detach())
                    view.grad = kernel.grad.permute(_order(kernel)).reshape(view.shape)
                    self.muon.state[view] = {"momentum_buffer": as_matrix(self._momentum(kernel))}
            self.muon.step()
            self.muon.zero_grad(set_to_none=True)  # else it would keep the gradients' memory
        if self.adamw is not None:
            self.adamw.state = self.state
            self.adamw.step()

    def _momentum(self, kernel: torch.Tensor) -> torch.Tensor:
        """The momentum of a kernel, in its memory layout: one that was assigned may have another."""
        kept = self.state[kernel].get("momentum_buffer")
        if kept is None:
            kept = torch.zeros_like(kernel)
        elif kept.stride() != kernel.stride() or kept.device != kernel.device:
            kept = torch.empty_like(kernel).copy_(kept)
        self.state[kernel]["momentum_buffer"] = kept
        return kept


def lr_factor(step: int, total: int, warmup: int, cfg: Train | None = None) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then the schedule of the job.

    cosine to zero (arXiv 1608.03983); step; or one_cycle (arXiv 1708.07120), whose rise from 1/25 to the peak and fall
    to 1/250,000 both follow a cosine, as in torch's OneCycleLR; it rises over the warm-up, or 30% of the training if
    there is none. The factor stands for steps 0 to total - 1.
    """
    schedule = cfg.schedule if cfg is not None else "cosine"
    if schedule == "one_cycle":
        rise = max(0.0, (warmup or 0.3 * total) - 1)  # a training too short to rise begins at the peak
        if step < rise:
            return _anneal(1 / 25, 1.0, step / rise)
        return _anneal(1.0, 1 / 25e4, min(1.0, (step - rise) / max(1.0, total - 1 - rise)))
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "step" and cfg is not None:
        return cfg.step_factor ** sum(step / total >= share for share in cfg.step_at)  # 0.55 × 100 is more than 55
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
