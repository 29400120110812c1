"""The recipe: prune → recover (with distillation) → quantize → train its steps → re-estimate BatchNorm → freeze → pack.

What is scored is what was packed: the bytes are read back and evaluated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from raydeep import own
from raydeep.compress import cost, masks, pack, prune, quantize, teachers
from raydeep.compress.common import Common, calibration_batches, training_inputs
from raydeep.compress.state import State, rebuild, snapshot
from raydeep.data.augment import Augmenter
from raydeep.data.batches import Batches, eval_batches
from raydeep.data.resident import Dataset, Split
from raydeep.errors import JobError
from raydeep.fields import Average
from raydeep.model import artifact, layers
from raydeep.train import losses, parallel
from raydeep.train.loop import fit

if TYPE_CHECKING:
    from raydeep.config import Job

__all__ = ["Dense", "Made", "Result", "calibration_batches", "check", "compress", "make", "measure", "training_inputs"]

AVX2_QMAX = 64  # of 8-bit weights: two products with 8-bit activations fit the 16 bits that AVX2 adds them in
CHANNELS_ROUND_TO = 8  # kernels work on 8 channels at a time: a ResNet-18 of such widths is a seventh faster


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
    test_probability: np.ndarray  # float32 of shape [rows], of the class predicted
    cost: cost.Cost
    weights: cost.Cost  # of convolutions and linear layers alone
    history: list[dict[str, Any]]
    sensitivity: dict[str, dict[int, float]]  # layer → bits → loss increase, where bits were allocated; else empty


def check(job: Job, spec: dict[str, Any]) -> None:
    """Refuse what can't be compressed as the job says, before any time is spent.

    Raises:
        ModelError: there is no such network, it has no channels that can go, or the teacher does not fit.
        JobError: a loss or score of the user's own can't be used.
    """
    values = job.search.values
    for name in {job.train.loss, *values("train.loss")} - {"cross_entropy"}:
        losses.check(name, len(spec["classes"]))
    for name in {job.prune.score, *values("prune.score")}:
        if ":" in name:
            own.find("prune.score", name, JobError)
    for name in values("model.name"):
        args = {} if "model.args" in job.search.space else job.model.args
        artifact.build({**spec, "model": {"name": name, "args": args}})
    kinds = {job.prune.kind, *values("prune.kind")}
    shares = {job.prune.sparsity, *values("prune.sparsity")}
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
    for teacher in {job.distill.teacher, *values("distill.teacher")}:
        if job.distill.enabled or any(values("distill.enabled")):
            teachers.load(job.distill.model_copy(update={"teacher": teacher}), spec)


class Made(NamedTuple):
    """A compressed model, not yet measured."""

    packed: bytes
    state: State  # to go on from
    history: list[dict[str, Any]]
    sensitivity: dict[str, dict[int, float]]  # as of Result


def compress(
    job: Job,
    dense: Dense,
    data: Dataset,
    seed: int,
    device: str = "cpu",
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Result:
    """Compress the dense network as the job's prune, quantize, distill and recover sections say, and score it.

    Args:
        job: the job, a trial's values set.
        dense: where it starts.
        data: the decoded splits.
        seed: of order, augmentation and calibration.
        device: where recovery runs; scoring is always on the CPU, where the files are verified.
        on_epoch: called with the metrics of each recovery epoch.
    """
    made = make(job, dense, data, seed, device, on_epoch)
    found = measure(made.packed, data, job.train.eval_batch_size, made.history)
    return found._replace(sensitivity=made.sensitivity)


def make(
    job: Job,
    dense: Dense,
    data: Dataset,
    seed: int,
    device: str = "cpu",
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    common: Common | None = None,
    before: State | None = None,
) -> Made:
    """As `compress`, without scoring.

    Args:
        job: as of compress.
        dense: as of compress.
        data: as of compress.
        seed: of order and augmentation in recovery.
        device: as of compress.
        on_epoch: as of compress.
        common: of the search that this belongs to; None: its own, from `seed`.
        before: go on from there for recover.epochs: masks stay, steps and weights train on, from the peak rate anew.
    """
    torch.manual_seed(seed)
    steps = _Steps(job, dense, data, seed, device, on_epoch, common or Common(dense, data, seed, device))
    cfg = job.quantize
    trains = steps.go_on(before) if before is not None else steps.begin()
    if before is None and cfg.weight_bits is not None and not trains:
        quantize.post_training(steps.model, cfg, steps.inputs, steps.before)
    else:
        quantize.reestimate_batchnorm(steps.model, steps.inputs)
    model = steps.model.eval().cpu()
    state = snapshot(model, steps.spec)
    return Made(pack.pack(*artifact.freeze(model, steps.spec)), state, steps.history, steps.sensitivity)


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
        common: Common,
    ) -> None:
        self.job, self.dense, self.data, self.common = job, dense, data, common
        self.seed, self.device, self.on_epoch = seed, device, on_epoch
        self.spec = dense.spec
        self.model = artifact.thaw(dense.spec, dense.tensors).requires_grad_(True).train().to(device)
        self.model.to(memory_format=torch.channels_last)
        self.before: nn.Module = self.model  # without quantizers
        self.labelled = common.labelled(job.quantize.calibration_rows)
        self.inputs = common.inputs(job.augment, job.quantize.calibration_rows)
        self.history: list[dict[str, Any]] = []
        self.sensitivity: dict[str, dict[int, float]] = {}
        self.teacher = None
        if job.distill.enabled and job.distill.teacher != "ema":
            named = teachers.load(job.distill, dense.spec)
            self.teacher = (named or artifact.thaw(common.dense.spec, common.dense.tensors)).to(device)

    def begin(self) -> bool:
        """The whole recipe, from the dense network; whether quantizers were trained."""
        cfg = self.job.quantize
        within = cfg.epochs is None
        self.prune(quantize_last=within)
        if not within:
            self.quantize()
            if cfg.epochs:
                self.train(cfg.epochs, self.job.recover.lr * cfg.lr_factor, None)
        return bool(cfg.epochs or (within and self.job.recover.epochs))

    def go_on(self, before: State) -> bool:
        """Train further."""
        self.spec = before.spec
        self.model = rebuild(before).to(self.device)
        cfg = self.job.quantize
        rate = cfg.lr_factor if cfg.weight_bits is not None and cfg.epochs else 1.0
        if self.job.recover.epochs:
            self.train(self.job.recover.epochs, self.job.recover.lr * rate, None)
        return True

    def prune(self, quantize_last: bool) -> None:
        """Prune and recover, in one round or several; quantizers come before the last one if asked for."""
        cfg, recover = self.job.prune, self.job.recover
        first = self.common.taylor(self.job.quantize.calibration_rows) if self._taylor_of_dense() else None
        pruner = prune.prepare(self.model, cfg, recover.epochs > 0, self.labelled, first)
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

    def _taylor_of_dense(self) -> bool:
        cfg = self.job.prune
        return cfg.active and cfg.kind != "channels" and cfg.score == "taylor" and self.dense is self.common.dense

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

            self.sensitivity = self.common.sensitivity(cfg.calibration_rows)
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
        rank, world = parallel.rank_world()  # of a trial on several workers; else 0 of 1
        batches = Batches(
            data.train, Augmenter(job.augment, data.mean, data.std), job.recover.batch_size or job.train.batch_size,
            self.seed, rank=rank, world=world, accumulate=job.train.accumulate, drop_last=job.train.drop_last,
            device=self.device,
        )  # fmt: skip
        loss: Any = losses.of(job.train)
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
    _, tensors = pack.unpack(packed)
    val = score(packed, data, data.val, batch_size)
    model = artifact.thaw(*pack.unpack(packed))
    test, probability = artifact.predict_surely(model, _inputs(data, data.test, batch_size))
    return Result(
        packed, float((val == data.val.labels).mean()), float((test == data.test.labels).mean()), val, test,
        probability, cost.count(tensors), cost.weights(tensors), history or [], {},
    )  # fmt: skip


def score(packed: bytes, data: Dataset, split: Split, batch_size: int) -> np.ndarray:
    """Classes that packed bytes, read back, predict for a split: int64 of shape [rows]."""
    return predictions(artifact.thaw(*pack.unpack(packed)), data, split, batch_size)


def predictions(model: torch.nn.Module, data: Dataset, split: Split, batch_size: int) -> np.ndarray:
    """Predicted classes of a split: int64 of shape [rows]."""
    return artifact.predict(model, _inputs(data, split, batch_size))


def _inputs(data: Dataset, split: Split, batch_size: int) -> Iterator[torch.Tensor]:
    """Batches NCHW of a split, in order."""
    return (micro.images for micro in eval_batches(split, data.mean, data.std, batch_size))
