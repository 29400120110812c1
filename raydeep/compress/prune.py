"""Single weights become zero: what is kept (score), how many of each layer (rates), when (schedule).

A score is a tensor like the weight, largest stays. A mask is bool like the weight, True stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from raydeep.errors import JobError
from raydeep.model import layers

if TYPE_CHECKING:
    from raydeep.config import Prune

Tensors = dict[str, torch.Tensor]  # layer name → weight, score or mask
Labelled = Sequence[tuple[torch.Tensor, torch.Tensor]]  # network inputs, float NCHW, and labels, int64 N

# Each layer keeps 1% of its weights, or a fifth of the density that is asked for, whichever is less (it binds below 5%:
# networks are pruned to 99.5% and more), and one weight at least. A layer pruned to nothing cuts the network.
KEEP_SHARE, KEEP_OF_DENSITY = 0.01, 0.2
EVERY = 5  # least steps between two tightenings of the cubic schedule
MOST = 150  # tightenings, at most: each sorts all weights
EVERY_GRADIENTS = 20  # and where each costs a pass over the calibration batches


def cubic(share: float, final: float) -> float:
    """Sparsity after `share` of the schedule (Zhu & Gupta, arXiv 1710.01878, equation 1)."""
    return final * (1 - (1 - min(1.0, share)) ** 3)


# scores


def magnitude(model: nn.Module, weights: Tensors, batches: Labelled) -> Tensors:
    """|w|."""
    return {name: w.detach().abs() for name, w in weights.items()}


def lamp(model: nn.Module, weights: Tensors, batches: Labelled) -> Tensors:
    """w² over the sum of the squares of all that are not smaller, in its layer (arXiv 2010.07611, equation 1)."""
    out = {}
    for name, w in weights.items():
        squares, order = w.detach().flatten().double().square().sort(descending=True, stable=True)
        score = torch.empty_like(squares)
        score[order] = (squares / squares.cumsum(0)).nan_to_num(0.0)
        out[name] = score.view_as(w)
    return out


def taylor(model: nn.Module, weights: Tensors, batches: Labelled) -> Tensors:
    """First-order change of the loss without the weight, (w·∂L/∂w)², added over the batches (arXiv 1906.10771, eq. 8).

    Its root is returned: of the same order, and it does not underflow. The model runs in eval mode and keeps its mode,
    its statistics and its `.grad`.
    """
    if not batches:
        raise JobError("prune.score taylor needs labelled batches: quantize.calibration_rows of the train split")
    training, wanted = model.training, {name: w.requires_grad for name, w in weights.items()}
    out = {name: torch.zeros_like(w, requires_grad=False) for name, w in weights.items()}
    model.eval()
    try:
        for w in weights.values():
            w.requires_grad_(True)
        for images, labels in batches:
            with torch.enable_grad():
                loss = F.cross_entropy(model(images), labels)
            grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for (name, w), grad in zip(weights.items(), grads, strict=True):
                if grad is not None:
                    out[name] = torch.hypot(out[name], w.detach() * grad)
    finally:
        model.train(training)
        for name, w in weights.items():
            w.requires_grad_(wanted[name])
    return out


# (model, raw weights, calibration batches) → scores, none negative
SCORES: dict[str, Callable[[nn.Module, Tensors, Labelled], Tensors]] = {
    "magnitude": magnitude,
    "lamp": lamp,
    "taylor": taylor,
}


# rates

# shape of a weight → density, up to a factor that all layers share
RATES: dict[str, Callable[[torch.Size], float]] = {
    "uniform": lambda shape: 1.0,
    "erk": lambda shape: sum(shape) / math.prod(shape),  # Erdős–Rényi kernel, arXiv 1911.11134, appendix
}


def least(shapes: dict[str, torch.Size], kept: int) -> dict[str, int]:
    """Weights that each layer keeps at least, where all keep `kept` together; their sum is no more than that."""
    total = sum(map(math.prod, shapes.values()))
    share = KEEP_OF_DENSITY * (kept - len(shapes)) / total  # of what is left when each has its one
    return {
        name: min(math.ceil(KEEP_SHARE * shape.numel()), 1 + math.floor(share * shape.numel()))
        for name, shape in shapes.items()
    }


def kept_in_all(shapes: dict[str, torch.Size], sparsity: float) -> int:
    """Weights that all layers keep together.

    Raises:
        JobError: fewer than there are layers.
    """
    total = sum(map(math.prod, shapes.values()))
    kept = total - round(sparsity * total)
    if kept >= len(shapes):
        return kept
    digits = 10 ** (len(str(total)) + 1)
    name = min(shapes, key=lambda n: shapes[n].numel())
    raise JobError(
        f"prune.sparsity: found {sparsity:g}, which leaves {kept} of {total:,} weights for {len(shapes)} layers: layer "
        f"{name} of {shapes[name].numel():,} weights would be emptied; expected at most "
        f"{math.floor((1 - len(shapes) / total) * digits) / digits}"
    )


def keep_counts(shapes: dict[str, torch.Size], sparsity: float, rates: str) -> dict[str, int]:
    """Weights that each layer keeps at the rates `uniform` or `erk`; together exactly what `sparsity` leaves.

    Densities are the factor of RATES times one number, at most 1 and at least what a layer must keep: what is capped
    in one layer is made up for in the others. Fractions are rounded by largest remainder.
    """
    kept = kept_in_all(shapes, sparsity)
    size = {name: shape.numel() for name, shape in shapes.items()}
    weight = {name: RATES[rates](shape) * size[name] for name, shape in shapes.items()}
    low = least(shapes, kept)

    def at(factor: float) -> dict[str, float]:
        return {name: min(float(size[name]), max(float(low[name]), factor * weight[name])) for name in shapes}

    below, above = 0.0, max(size[name] / weight[name] for name in shapes)
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(at(middle).values()) < kept else (below, middle)
    wanted = at(above)
    counts = {name: math.floor(value) for name, value in wanted.items()}
    order = sorted((name for name in shapes if counts[name] < size[name]), key=lambda n: counts[n] - wanted[n])
    for name in order[: kept - sum(counts.values())]:
        counts[name] += 1
    return counts


# masks


def _lowest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` smallest of a flat tensor are, of equal ones the first: bool."""
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.kthvalue(count).values
    found = values < threshold
    ties = (values == threshold).nonzero().flatten()
    found[ties[: count - int(found.sum())]] = True
    return found


def masks(scores: Tensors, sparsity: float, rates: str = "global") -> Tensors:
    """The masks of a sparsity: exactly round(sparsity × weights) zeros over all layers.

    Args:
        scores: layer name → score.
        sparsity: share of all weights that becomes zero, in [0, 1).
        rates: global (one threshold), or a key of RATES.

    Raises:
        JobError: each layer can't keep what it must.
    """
    shapes = {name: s.shape for name, s in scores.items()}
    flat = {name: s.flatten() for name, s in scores.items()}
    if rates != "global":
        counts = keep_counts(shapes, sparsity, rates)
        return {name: (~_lowest(s, len(s) - counts[name])).view(shapes[name]) for name, s in flat.items()}
    kept = kept_in_all(shapes, sparsity)
    low = least(shapes, kept)
    held = {name: s.masked_fill(~_lowest(s, len(s) - low[name]), torch.inf) for name, s in flat.items()}
    values = torch.cat(list(held.values()))
    parts = (~_lowest(values, len(values) - kept)).split([len(s) for s in flat.values()])
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def n_m_mask(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Of each `m` neighbours along the input dimension, the `n` of largest score (of equal ones the first) stay.

    Groups run along the input channels, at each place of the kernel, as sparse tensor cores read them (2:4, arXiv
    2104.08378). Where their number is no multiple of m, the last r < m keep ceil(n·r/m).

    Args:
        score: of shape [out, in] or [out, in, h, w].
        n: 1 to m.
        m: 1 to in.

    Returns:
        bool of that shape.
    """
    rows = score.movedim(1, -1)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    whole = rows.shape[-1] // m * m
    for part, out in ((rows[..., :whole], mask[..., :whole]), (rows[..., whole:], mask[..., whole:])):
        if not part.shape[-1]:
            continue
        width = min(m, part.shape[-1])
        groups = part.unflatten(-1, (-1, width))
        first = groups.argsort(dim=-1, descending=True, stable=True)[..., : -(-n * width // m)]
        out.copy_(torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, first, True).flatten(-2))
    return mask.movedim(-1, 1).contiguous()


# schedules


class Pruner:
    """The masks of a model, and when they tighten.

    Round 0 has begun when it is made, so that quantizers which are added next see its zeros:
    `for k in range(pruner.rounds): if k: pruner.start(k)`, and then a training with `on_step=pruner.on_step`.

    Attributes:
        rounds: times that the model is pruned and then trained: 1, or cfg.rounds where an iterative schedule recovers.
        on_step: function of (step, steps in all) that tightens the masks over the first half of a training, or None.
        left_dense: layers without a mask: of N:M, those with fewer than M input channels (a group's), such as
            depthwise ones and a first one that reads pictures.
    """

    def __init__(self, model: nn.Module, cfg: Prune, recovers: bool, batches: Labelled = ()) -> None:
        """Add masks to a model; arguments and errors are those of `prepare`."""
        self.model, self.cfg, self.batches = model, cfg, batches
        self.rounds = cfg.rounds if cfg.schedule == "iterative" and recovers else 1
        self.on_step: Callable[[int, int], None] | None = None
        self.left_dense: tuple[str, ...] = ()
        self.masks: dict[str, layers.Mask] = {}
        self.found: dict[str, nn.Module] = {}
        self.before: Tensors = {}
        if not cfg.active or cfg.kind == "channels":
            self.rounds = 1
            return
        self._choose()
        self.masks = {name: layers.add_mask(module) for name, module in self.found.items()}
        if cfg.rewind == "weights" and self.rounds > 1:
            self.before = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith(".mask")}
        if cfg.schedule == "cubic" and recovers:
            self.on_step = self._tighten
        else:
            self.start(0)

    def start(self, k: int) -> None:
        """Prune for round k, from 0, by the weights as they are now: what is zero stays so.

        After it, of K, (1 - s)^((k + 1) / K) of the weights are left (the same share goes each time, Frankle &
        Carbin, arXiv 1803.03635). With cfg.rewind weights, the model then gets back the weights and statistics that it
        had when this was made.
        """
        if not self.masks or self.on_step is not None:
            return
        share = (k + 1) / self.rounds
        if self.cfg.pattern is not None:
            n, m = self.cfg.pattern
            self._apply(n_left=n if share == 1 else round(m * (n / m) ** share), nested=True)
        else:
            s = self.cfg.sparsity
            self._apply(sparsity=s if share == 1 else 1 - (1 - s) ** share, nested=True)
        if k and self.before:
            self.model.load_state_dict(self.before, strict=False)

    def _choose(self) -> None:
        """Set which layers get a mask.

        Raises:
            JobError: none does, or the sparsity is too high.
        """
        every = dict(layers.compressible(self.model))
        weights = {name: layers.raw_weight(module) for name, module in every.items()}
        m = self.cfg.pattern[1] if self.cfg.pattern else 1
        self.found = {name: module for name, module in every.items() if weights[name].shape[1] >= m}
        self.left_dense = tuple(name for name in every if name not in self.found)
        if not self.found:
            raise JobError(
                f"prune.kind {self.cfg.kind}: none of the {len(every)} layers has {m} input channels or more; "
                f"use prune.kind weights, or a smaller pattern"
            )
        if self.cfg.pattern is None:
            kept_in_all({name: weights[name].shape for name in self.found}, self.cfg.sparsity)

    def _tighten(self, step: int, total: int) -> None:
        last = total // 2
        gradients = self.cfg.score == "taylor"
        every = max(EVERY_GRADIENTS if gradients else EVERY, last // MOST)
        if step > last or (step % every and step != last):
            return
        share = step / last if last else 1.0
        if self.cfg.pattern is not None:
            n, m = self.cfg.pattern
            self._apply(n_left=m - round(cubic(share, m - n)), nested=gradients)
        else:
            self._apply(sparsity=cubic(share, self.cfg.sparsity), nested=gradients)

    @torch.no_grad()
    def _apply(self, *, sparsity: float = 0.0, n_left: int = 0, nested: bool) -> None:
        """Set all masks; `nested`: what is pruned is pruned first (elsewhere a weight may come back)."""
        weights = {name: layers.raw_weight(module) for name, module in self.found.items()}
        scores = SCORES[self.cfg.score](self.model, weights, self.batches)
        if nested:
            scores = {name: score.masked_fill(~self.masks[name].mask, -1.0) for name, score in scores.items()}
        if self.cfg.pattern is not None:
            new = {name: n_m_mask(score, n_left, self.cfg.pattern[1]) for name, score in scores.items()}
        else:
            new = masks(scores, sparsity, self.cfg.rates)
        for name, mask in self.masks.items():
            mask.mask.copy_(new[name])


def prepare(model: nn.Module, cfg: Prune, recovers: bool, batches: Labelled = ()) -> Pruner:
    """Add masks to a model.

    Args:
        model: changed in place. Without sparsity, or with kind channels, it is left as it is.
        cfg: the prune section.
        recovers: whether training follows; without it every schedule is one shot.
        batches: inputs and labels that score taylor is measured on, on the model's device.

    Raises:
        JobError: the sparsity would empty a layer, the pattern fits none, or score taylor has no batches.
    """
    return Pruner(model, cfg, recovers, batches)
