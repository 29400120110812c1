"""Losses. Contract of a loss: `(logits_NK, micro) -> loss_N`, one float32 a row, not averaged."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from raydeep.data.batches import Micro

Loss = Callable[[torch.Tensor, Micro], torch.Tensor]


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Cross entropy with smoothed labels (arXiv 1512.00567, section 7), of both labels where pictures are mixed."""

    def loss(logits: torch.Tensor, micro: Micro) -> torch.Tensor:
        def of(labels: torch.Tensor) -> torch.Tensor:
            full = logits if logits.dtype == torch.float64 else logits.float()
            return F.cross_entropy(full, labels, reduction="none", label_smoothing=label_smoothing)

        if micro.weight is None or micro.other_labels is None:
            return of(micro.labels)
        return micro.weight * of(micro.labels) + (1 - micro.weight) * of(micro.other_labels)

    return loss
