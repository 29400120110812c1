"""The recipe: prune → recover (with distillation) → quantize → train its steps → re-estimate BatchNorm → freeze → pack.

What is scored is what was packed: the bytes are read back and evaluated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from raydeep.compress import cost, masks, pack, prune, quantize, teachers
from raydeep.compress.observe import Labelled
from raydeep.data import order
from raydeep.data.augment import Augmenter, to_input
from raydeep.data.batches import Batches, eval_batches
from raydeep.data.resident import Dataset, Split
from raydeep.fields import Average
from raydeep.model import artifact, layers
from raydeep.train import losses
from raydeep.train.loop import fit

if TYPE_CHECKING:
    from raydeep.config import Augment, Job

CALIBRATION_BATCH = 256
AVX2_QMAX = 64  # of 8-bit weights: two products with 8-bit activations fit the 16 bits that AVX2 adds them in
CHANNELS_ROUND_TO = 8  # kernels work on 8 channels at a time: a ResNet-18 of such widths is a seventh faster
STATISTICS_SHARE = 4  # times calibration_rows
STATISTICS_BYTES = 2**28


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
    weights: cost.Cost  # of convolutions and linear layers alone
    history: list[dict[str, Any]]
    sensitivity: dict[str, dict[int, float]]  # layer → bits → loss increase, where bits were allocated; else empty


def check(job: Job, spec: dict[str, Any]) -> None:
    """Refuse what can't be compressed as the job says, before any time is spent.

    Raises:
        ModelError: the network has no channels that can go, or the teacher does not fit.
    """
    space = job.search.space
    kinds = {job.prune.kind, *space.get("prune.kind", [])}
    shares = {job.prune.sparsity, *space.get("prune.sparsity", [])}
    model = artifact.build(spec)
    shapes = {name: module.weight.shape for name, module in layers.compressible(model)}
    if "weights" in kinds:
        for share in shares:
            masks.kept_in_all(shapes, share)  # type: ignore[arg-type]
    if "channels" in kinds and any(shares):
        from raydeep.compress import channels

        height, width, depth = spec["input"]
        cfg = job.prune.model_copy(update={"kind": "channels", "sparsity": max(shares)})
        channels.check(spec["model"]["name"], model, torch.zeros(2, depth, height, width), cfg)
    for teacher in {job.distill.teacher, *space.get("distill.teacher", [])}:
        if job.distill.enabled or any(space.get("distill.enabled", [])):
            teachers.load(job.distill.model_copy(update={"teacher": teacher}), spec)


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
    steps = _Steps(job, dense, data, seed, device, on_epoch)
    cfg = job.quantize
    within = cfg.epochs is None
    steps.prune(quantize_last=within)
    if not within:
        steps.quantize()
        if cfg.epochs:
            steps.train(cfg.epochs, job.recover.lr * cfg.lr_factor, None)
    if cfg.weight_bits is not None and not (cfg.epochs or (within and job.recover.epochs)):
        quantize.post_training(steps.model, cfg, steps.inputs, steps.before)
    else:
        quantize.reestimate_batchnorm(steps.model, steps.inputs)
    spec, tensors = artifact.freeze(steps.model.eval().cpu(), steps.spec)
    found = measure(pack.pack(spec, tensors), data, job.train.eval_batch_size, steps.history)
    return found._replace(sensitivity=steps.sensitivity)


class _Steps:
    """A network on its way."""

    def __init__(
        self,
        job: Job,
        dense: Dense,
        data: Dataset,
        seed: int,
        device: str,
        on_epoch: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.job, self.dense, self.data = job, dense, data
        self.seed, self.device, self.on_epoch = seed, device, on_epoch
        self.spec = dense.spec
        self.model = artifact.thaw(dense.spec, dense.tensors).requires_grad_(True).train().to(device)
        self.before: nn.Module = self.model  # without quantizers
        self.labelled = calibration_batches(data, job.quantize.calibration_rows, seed, device)
        self.inputs = training_inputs(data, job.augment, job.quantize.calibration_rows, seed, device)
        self.history: list[dict[str, Any]] = []
        self.sensitivity: dict[str, dict[int, float]] = {}
        self.teacher = None
        if job.distill.enabled and job.distill.teacher != "ema":
            named = teachers.load(job.distill, dense.spec)
            self.teacher = (named or artifact.thaw(dense.spec, dense.tensors)).to(device)

    def prune(self, quantize_last: bool) -> None:
        """Prune and recover, in one round or several; quantizers come before the last one if asked for."""
        cfg, recover = self.job.prune, self.job.recover
        pruner = prune.prepare(self.model, cfg, recover.epochs > 0, self.labelled)
        narrows = cfg.active and cfg.kind == "channels"
        rounds = pruner.rounds
        shares = [len(part) for part in np.array_split(np.arange(recover.epochs), rounds)]
        for k, epochs in enumerate(shares):
            if narrows:
                self._narrow(1 - (1 - cfg.sparsity) ** (1 / rounds))
            if k:
                pruner.start(k)
            if cfg.active:
                quantize.reestimate_batchnorm(self.model, self.inputs)
            if quantize_last and k == rounds - 1:
                self.quantize()
            if epochs:
                self.train(epochs, recover.lr, pruner.on_step)

    def _narrow(self, share: float) -> None:
        """Take channels out, so much of what there still is."""
        from raydeep.compress import channels
        from raydeep.model import narrow

        cfg = self.job.prune.model_copy(update={"sparsity": share})
        channels.prune_channels(self.model, cfg, self.inputs[0][:2], self.labelled, CHANNELS_ROUND_TO)
        widths = narrow.difference(artifact.build(self.dense.spec), self.model)
        self.spec = {**self.dense.spec, "widths": widths}

    def quantize(self) -> None:
        """Add quantizers, with bits as asked for or allocated by what each layer loses."""
        cfg = self.job.quantize
        if cfg.weight_bits is None:
            return
        bits = None
        if isinstance(cfg.weight_bits, Average):
            from raydeep.compress import allocate

            self.sensitivity = allocate.sensitivity(self.model, self.labelled)
            found = dict(layers.compressible(self.model))
            sizes = {name: int(torch.count_nonzero(found[name].weight)) for name in self.sensitivity}  # type: ignore[arg-type]
            bits = allocate.solve(sizes, self.sensitivity, cfg.weight_bits.average)
        self.before = copy.deepcopy(self.model).eval()
        avx2 = self.job.export.target == "avx2" and cfg.activation_bits is not None
        quantize.prepare(self.model, cfg, self.inputs, bits, AVX2_QMAX if avx2 else None)

    def train(self, epochs: int, lr: float, on_step: Callable[[int, int], None] | None) -> None:
        """Some epochs of the one training loop."""
        job, data = self.job, self.data
        self.model.train()
        batches = Batches(
            data.train, Augmenter(job.augment, data.mean, data.std), job.recover.batch_size or job.train.batch_size,
            self.seed, accumulate=job.train.accumulate, drop_last=job.train.drop_last, device=self.device,
        )  # fmt: skip
        loss: Any = losses.cross_entropy(job.train.label_smoothing)
        taught = None
        if job.distill.enabled:
            loss = taught = teachers.distilled(job, loss, self.model, self.teacher, data, self.device)

        def before_step(step: int, total: int) -> None:
            if on_step is not None:
                on_step(step, total)
            if taught is not None:
                taught.on_step(step, total)

        done = len(self.history)

        def after_epoch(metrics: dict[str, Any]) -> None:
            if self.on_epoch is not None:
                self.on_epoch({**metrics, "epoch": done + metrics["epoch"]})

        with closing(taught) if taught is not None else nullcontext():
            self.history += fit(
                self.model, loss, batches, job.train, epochs=epochs, lr=lr, seed=self.seed, on_step=before_step,
                on_epoch=after_epoch,
            )  # fmt: skip


def measure(packed: bytes, data: Dataset, batch_size: int, history: list[dict[str, Any]] | None = None) -> Result:
    """Score packed bytes: read them back, rebuild the network, evaluate it on val and test."""
    spec, tensors = pack.unpack(packed)
    model = artifact.thaw(spec, tensors)
    val, test = (predictions(model, data, split, batch_size) for split in (data.val, data.test))
    return Result(
        packed, float((val == data.val.labels).mean()), float((test == data.test.labels).mean()), val, test,
        cost.count(tensors), cost.weights(tensors), history or [], {},
    )  # fmt: skip


def predictions(model: torch.nn.Module, data: Dataset, split: Split, batch_size: int) -> np.ndarray:
    """Predicted classes of a split: int64 of shape [rows]."""
    return artifact.predict(model, (m.images for m in eval_batches(split, data.mean, data.std, batch_size)))


def training_inputs(data: Dataset, cfg: Augment, rows: int, seed: int, device: str = "cpu") -> list[torch.Tensor]:
    """Network inputs as training sees them, augmented: what statistics and steps are estimated on.

    A network has learned with the statistics of augmented pictures: those of plain ones cost a ResNet-20 on CIFAR-10 2
    points of accuracy.

    Args:
        data: for its train split.
        cfg: the augment section.
        rows: STATISTICS_SHARE times so many, if they take no more than STATISTICS_BYTES.
        seed: of the choice and the draws.
        device: where they lie.

    Returns:
        Batches float32 NCHW of one size.
    """
    height, width, channels = data.shape
    size = min(CALIBRATION_BATCH, len(data.train.labels))
    most = max(rows, STATISTICS_BYTES // (4 * height * width * channels))
    count = max(1, min(STATISTICS_SHARE * rows, most, len(data.train.labels)) // size)
    with closing(Batches(data.train, Augmenter(cfg, data.mean, data.std), size, seed, device=device)) as batches:
        return [micro.images for [micro] in islice(batches.epoch(0), count)]


def calibration_batches(data: Dataset, rows: int, seed: int, device: str = "cpu") -> Labelled:
    """A seeded choice of train rows, not augmented: batches of inputs float32 NCHW and labels int64 N."""
    chosen = order.epoch_order(seed, 0, len(data.train.labels))[:rows]
    parts = np.array_split(chosen, -(-len(chosen) // CALIBRATION_BATCH))  # even: averages weigh batches alike
    read = data.train.read([parts])
    return [
        (
            to_input(torch.from_numpy(images).to(device), data.mean, data.std),
            torch.from_numpy(data.train.labels[part]).to(device),
        )
        for part, images in zip(parts, read, strict=True)
    ]
