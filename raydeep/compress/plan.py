"""The recipe: prune → calibrate → recover (with distillation) → re-estimate BatchNorm → freeze → pack.

What is scored is what was packed: the bytes are read back and evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from raydeep.compress import cost, distill, pack, prune, quantize
from raydeep.data import order
from raydeep.data.augment import Augmenter, to_input
from raydeep.data.batches import Batches, eval_batches
from raydeep.data.resident import Dataset, Split
from raydeep.model import artifact
from raydeep.train import losses
from raydeep.train.loop import fit

if TYPE_CHECKING:
    from raydeep.config import Job

CALIBRATION_BATCH = 256


class Dense(NamedTuple):
    """The trained network that compression starts from."""

    spec: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class Result(NamedTuple):
    """A compressed model, as measured on its packed bytes."""

    packed: bytes
    val_accuracy: float
    test_accuracy: float
    val_predictions: np.ndarray  # int64 of shape [rows]
    test_predictions: np.ndarray
    cost: cost.Cost
    history: list[dict[str, Any]]


def compress(
    job: Job,
    dense: Dense,
    data: Dataset,
    seed: int,
    device: str = "cpu",
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Compress the dense network as the job's prune, quantize, distill and recover sections say.

    Args:
        job: the job, a trial's values set.
        dense: where it starts.
        data: the decoded splits.
        seed: of order and augmentation in recovery.
        device: where recovery runs; scoring is always on the CPU, where the files are verified.
        on_epoch: called with the metrics of each recovery epoch.
    """
    torch.manual_seed(seed)
    model = artifact.thaw(dense.spec, dense.tensors).requires_grad_(True).train().to(device)
    calibration = calibration_batches(data, job.quantize.calibration_rows, seed, device)
    tighten = prune.prepare(model, job.prune, recovers=job.recover.epochs > 0)
    quantize.prepare(model, job.quantize, calibration)
    loss = losses.cross_entropy(job.train.label_smoothing)
    if job.distill.enabled:
        loss = distill.distilled(loss, artifact.thaw(dense.spec, dense.tensors).to(device), job.distill)
    history = []
    if job.recover.epochs:
        batch_size = job.recover.batch_size or job.train.batch_size
        augmenter = Augmenter(job.augment, data.mean, data.std)
        batches = Batches(
            data.train, augmenter, batch_size, seed, accumulate=job.train.accumulate, drop_last=job.train.drop_last,
            device=device,
        )  # fmt: skip
        history = fit(
            model, loss, batches, job.train, epochs=job.recover.epochs, lr=job.recover.lr, seed=seed,
            on_step=tighten, on_epoch=on_epoch,
        )  # fmt: skip
    quantize.reestimate_batchnorm(model, calibration)
    spec, tensors = artifact.freeze(model.eval().cpu(), dense.spec)
    return measure(pack.pack(spec, tensors), data, job.train.eval_batch_size, history)


def measure(packed: bytes, data: Dataset, batch_size: int, history: list[dict[str, Any]] | None = None) -> Result:
    """Score packed bytes: read them back, rebuild the network, evaluate it on val and test."""
    spec, tensors = pack.unpack(packed)
    model = artifact.thaw(spec, tensors)
    val, test = (predictions(model, data, split, batch_size) for split in (data.val, data.test))
    return Result(
        packed, float((val == data.val.labels).mean()), float((test == data.test.labels).mean()), val, test,
        cost.count(tensors), history or [],
    )  # fmt: skip


def predictions(model: torch.nn.Module, data: Dataset, split: Split, batch_size: int) -> np.ndarray:
    """Predicted classes of a split: int64 of shape [rows]."""
    return artifact.predict(model, (m.images for m in eval_batches(split, data.mean, data.std, batch_size)))


def calibration_batches(data: Dataset, rows: int, seed: int, device: str = "cpu") -> list[torch.Tensor]:
    """Network inputs of a seeded choice of train rows, not augmented: batches of float32 NCHW."""
    chosen = order.epoch_order(seed, 0, len(data.train.labels))[:rows]
    parts = np.array_split(chosen, -(-len(chosen) // CALIBRATION_BATCH))  # even: averages weigh batches alike
    read = data.train.read([parts])
    return [to_input(torch.from_numpy(images).to(device), data.mean, data.std) for images in read]
