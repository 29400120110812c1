"""Single weights become zero, when the schedule says so; which ones, masks.py says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from raydeep.compress import masks
from raydeep.compress.masks import Tensors
from raydeep.compress.observe import Labelled
from raydeep.errors import JobError
from raydeep.model import layers

if TYPE_CHECKING:
    from raydeep.config import Prune

EVERY = 5  # least steps between two tightenings of the cubic schedule
MOST = 150  # tightenings, at most: each sorts all weights
EVERY_GRADIENTS = 20  # and where each costs a pass over the calibration batches


def cubic(share: float, final: float) -> float:
    """Sparsity after `share` of the schedule (Zhu & Gupta, arXiv 1710.01878, equation 1)."""
    return final * (1 - (1 - min(1.0, share)) ** 3)


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

    def __init__(
        self, model: nn.Module, cfg: Prune, recovers: bool, batches: Labelled = (), first: Tensors | None = None
    ) -> None:
        """Add masks to a model; arguments and errors are those of `prepare`."""
        self.model, self.cfg, self.batches, self.first = model, cfg, batches, first
        self.rounds = cfg.rounds if cfg.active and cfg.schedule == "iterative" and recovers else 1
        self.on_step: Callable[[int, int], None] | None = None
        self.left_dense: tuple[str, ...] = ()
        self.masks: dict[str, layers.Mask] = {}
        self.found: dict[str, nn.Module] = {}
        self.before: Tensors = {}
        if not cfg.active or cfg.kind == "channels":
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
            masks.kept_in_all({name: weights[name].shape for name in self.found}, self.cfg.sparsity)

    def _tighten(self, step: int, total: int) -> None:
        last = total // 2
        gradients = self.cfg.score not in ("magnitude", "lamp")  # what costs more than a look at the weights
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
        scores = self.first or masks.scores_of(self.cfg.score, self.model, weights, self.batches)
        scores, self.first = {name: scores[name] for name in weights}, None
        if nested:
            scores = {name: score.masked_fill(~self.masks[name].mask, -1.0) for name, score in scores.items()}
        if self.cfg.pattern is not None:
            new = {name: masks.n_m_mask(score, n_left, self.cfg.pattern[1]) for name, score in scores.items()}
        else:
            new = masks.choose(scores, sparsity, self.cfg.rates)
        for name, mask in self.masks.items():
            mask.mask.copy_(new[name])


def prepare(
    model: nn.Module, cfg: Prune, recovers: bool, batches: Labelled = (), first: Tensors | None = None
) -> Pruner:
    """Add masks to a model.

    Args:
        model: changed in place. Without sparsity, or with kind channels, it is left as it is.
        cfg: the prune section.
        recovers: whether training follows; without it every schedule is one shot.
        batches: inputs and labels that score taylor, or the user's own, is measured on, on the model's device.
        first: the scores of the model as it is now, where they are known.

    Raises:
        JobError: the sparsity would empty a layer, the pattern fits none, or score taylor has no batches.
    """
    return Pruner(model, cfg, recovers, batches, first)
