"""Evaluation: every row exactly once, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from raydeep.data.batches import Micro
from raydeep.train import parallel


class Score(NamedTuple):
    """Result of an evaluation."""

    accuracy: float  # fraction
    loss: float  # mean cross entropy, nats
    rows: int


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Micro], rows: int, device: torch.device | str = "cpu", flip: bool = False
) -> Score:
    """Accuracy and loss over this worker's batches, summed over all workers.

    Args:
        model: float NCHW → logits NK.
        batches: this worker's part of the split.
        rows: of the whole split; asserted.
        device: where the sums are kept.
        flip: average the logits of each picture and its mirror image (test-time augmentation).
    """
    training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for micro in batches:
        logits = model(micro.images).float()
        if flip:
            logits = (logits + model(micro.images.flip(3)).float()) / 2
        sums[0] += (logits.argmax(1) == micro.labels).sum()
        sums[1] += F.cross_entropy(logits, micro.labels, reduction="sum")
        sums[2] += len(micro.labels)
    model.train(training)
    correct, loss, seen = parallel.all_sum(sums).tolist()
    assert int(seen) == rows, f"evaluated {int(seen)} rows of {rows}"
    return Score(correct / rows, loss / rows, rows)


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts of shape [classes, classes]: row = true class, column = predicted."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
