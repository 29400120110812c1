"""Losses. Contract of a loss: `(logits_NK, micro) -> loss_N`, one float32 a row, not averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from raydeep import own
from raydeep.data.batches import Micro
from raydeep.errors import JobError

if TYPE_CHECKING:
    from raydeep.config import Train

Loss = Callable[[torch.Tensor, Micro], torch.Tensor]


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Cross entropy with smoothed labels (arXiv 1512.00567, section 7), of both labels where pictures are mixed."""

    def rows(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_NK, labels_N, reduction="none", label_smoothing=label_smoothing)

    return _mixed(rows)


def of(cfg: Train) -> Loss:
    """The loss that a job trains with.

    Raises:
        JobError: it is the user's own and can't be imported.
    """
    if cfg.loss == "cross_entropy":
        return cross_entropy(cfg.label_smoothing)
    return _mixed(own.find("train.loss", cfg.loss, JobError))


def check(name: str, classes: int) -> None:
    """Try a loss of the user's own on four made-up rows.

    Args:
        name: `package.module:name`, a function of float32 logits [N, K] and int64 labels [N].
        classes: K.

    Raises:
        JobError: it raises, or what it gives is not one finite number a row that depends on the logits.
    """
    found = own.find("train.loss", name, JobError)
    logits = torch.linspace(-1, 1, 4 * classes).reshape(4, classes).requires_grad_(True)
    try:
        loss = found(logits, torch.arange(4) % classes)
    except Exception as err:  # a user's own code may raise anything
        raise JobError(f"train.loss {name} fails on logits of shape (4, {classes}): {own.reason(err)}") from err
    if not isinstance(loss, torch.Tensor) or loss.shape != (4,):
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise JobError(
            f"train.loss {name} gives {what} for 4 pictures, expected one loss a picture, of shape (4,), neither "
            f"summed nor averaged (reduction='none')"
        )
    if not loss.requires_grad or not torch.isfinite(loss).all():
        what = "does not depend on the logits" if not loss.requires_grad else f"gives {loss.tolist()} on small logits"
        raise JobError(f"train.loss {name} {what}: it can't be trained with")


def _mixed(rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Loss:
    """A loss of plain labels, taken of both labels where pictures are mixed (arXiv 1710.09412, equation 2)."""

    def loss(logits: torch.Tensor, micro: Micro) -> torch.Tensor:
        full = logits if logits.dtype == torch.float64 else logits.float()
        if micro.weight is None or micro.other_labels is None:
            return rows(full, micro.labels)
        return micro.weight * rows(full, micro.labels) + (1 - micro.weight) * rows(full, micro.other_labels)

    return loss
