"""Evaluation: every row exactly once, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from raydeep.data.batches import Micro
from raydeep.train.parallel import Strategy, all_sum


class Score(NamedTuple):
    """Result of an evaluation."""

    accuracy: float  # fraction
    loss: float  # mean cross entropy, nats
    rows: int


@torch.no_grad()
def evaluate(
    model: nn.Module | Strategy,
    batches: Iterable[Micro],
    rows: int,
    device: torch.device | str | None = None,
    flip: bool = False,
    on_batch: Callable[[], None] | None = None,
) -> Score:
    """Accuracy and loss over this worker's batches, summed over all workers.

    Args:
        model: float NCHW → logits NK; or the strategy that holds it.
        batches: this worker's part of the split.
        rows: of the whole split; asserted.
        device: where the sums are kept; None: that of the network's first parameter.
        flip: average the logits of each picture and its mirror image (test-time augmentation).
        on_batch: called after each batch.
    """
    module = model.module if isinstance(model, Strategy) else model
    predict = model.predict if isinstance(model, Strategy) else model
    group = model.data_group if isinstance(model, Strategy) else None
    if device is None:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
    training = module.training
    module.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for micro in batches:
        logits = predict(micro.images).float()
        if flip:
            logits = (logits + predict(micro.images.flip(3)).float()) / 2
        logits, labels = logits[: micro.valid], micro.labels[: micro.valid]
        sums[0] += (logits.argmax(1) == labels).sum()
        sums[1] += F.cross_entropy(logits, labels, reduction="sum")
        sums[2] += micro.valid
        if on_batch is not None:
            on_batch()
    module.train(training)
    correct, loss, seen = all_sum(sums, group).tolist()
    assert int(seen) == rows, f"evaluated {int(seen)} rows of {rows}"
    return Score(correct / rows, loss / rows, rows)


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts of shape [classes, classes]: row = true class, column = predicted."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
