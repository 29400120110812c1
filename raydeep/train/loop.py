"""The training loop. Knows no Ray, no compression, no command line.

Distillation is one more loss; quantization-aware training is a prepared model; a pruning schedule is `on_step`; how
the model is spread over workers is a strategy (parallel.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raydeep.data.batches import Batches
from raydeep.errors import TrainError
from raydeep.train import checkpoint, parallel
from raydeep.train.average import Average
from raydeep.train.control import Control, Wish
from raydeep.train.losses import Loss
from raydeep.train.metrics import Score
from raydeep.train.optim import lr_factor, make_optimizer
from raydeep.train.saver import Saver

if TYPE_CHECKING:
    from raydeep.config import Train

GPU_CHECK_EVERY = 25  # steps between looks at the gradient on a GPU, where each look waits for it


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    cfg: Train,
    *,
    epochs: int | None = None,
    until: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    strategy: parallel.Strategy | None = None,
    evaluate: Callable[[parallel.Strategy], Score] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    saver: Saver | None = None,
    resume: checkpoint.Checkpoint | None = None,
    control: Control | None = None,
) -> list[dict[str, Any]]:
    """Train a model in place; with cfg.ema it ends with the averaged weights.

    The gradient of a step is that of the mean loss over the global batch, whatever the number of workers and
    micro-batches and however the model is spread over them.

    Args:
        model: float NCHW → logits NK, on the device of `batches`, the same on every worker. Under a strategy that
            partitions it, it must not be used afterwards: the checkpoints hold it whole.
        loss: see losses.py.
        batches: this worker's training batches.
        cfg: the train section.
        epochs: instead of cfg.epochs.
        until: stop after this epoch, for a later call to go on from its checkpoint; the schedule is that of `epochs`.
        lr: peak learning rate instead of cfg.lr.
        seed: of the layers' own randomness (dropout).
        strategy: None: data parallel over the process group, if there is one.
        evaluate: called after each epoch, on the averaged weights if cfg.ema; every worker must take part.
        on_epoch: called after each epoch with its metrics.
        on_step: called before each step with its number and the number of steps in all.
        saver: writes a checkpoint at the end of each epoch, each cfg.checkpoint_steps steps, after
            cfg.checkpoint_seconds without one, and when any worker's `control` asks for one.
        resume: continue after this checkpoint.
        control: the votes of this worker; None: of its own.

    Returns:
        The metrics of each epoch.

    Raises:
        TrainError: the loss is not finite, or a checkpoint can't be written: on every worker at the same step; or
            `resume` is of another training.
        SystemExit: this worker was told to leave and has done so after a checkpoint.
    """
    run = _Fit(model, loss, batches, cfg, cfg.lr if lr is None else lr, seed, strategy, saver, control)
    run.resume(resume)
    epochs = cfg.epochs if epochs is None else epochs
    history: list[dict[str, Any]] = []
    with closing(batches):
        for epoch in range(resume.moment.epoch if resume else 0, until or epochs):
            first = resume.moment.step if resume and resume.moment.epoch == epoch else 0
            loss_sum = resume.moment.loss_sum if resume and first else 0.0
            metrics = run.epoch(epoch, epochs, first, loss_sum, on_step)
            metrics["first_batch_s"] = None if history else batches.meter.first_batch_s
            metrics["start_s"] = None if history else batches.meter.start_s
            if evaluate is not None:
                metrics |= run.score(evaluate)
            history.append(metrics)
            if on_epoch is not None:
                on_epoch(metrics)
            run.save(checkpoint.Moment(
                epoch + 1, 0, 0.0, metrics["step"], batches.steps_per_epoch, metrics.get("val_accuracy")
            ))  # fmt: skip
            run.leave()
    run.finish()
    return history


class _Fit:
    """The parts of a training that is under way."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Batches,
        cfg: Train,
        lr: float,
        seed: int,
        strategy: parallel.Strategy | None,
        saver: Saver | None,
        control: Control | None,
    ) -> None:
        self.loss, self.batches, self.cfg, self.lr, self.seed = loss, batches, cfg, lr, seed
        self.device, self.saver = batches.device, saver
        self.strategy = strategy or parallel.strategy(None, batches.device)
        self.control = control or Control()
        height, width, channels = batches.split.shape
        if cfg.channels_last is True or (cfg.channels_last == "auto" and not self.strategy.sharded):
            model = model.to(memory_format=torch.channels_last)
        module = self.strategy.prepare(model, cfg, (channels, height, width))
        self.state = checkpoint.State(
            module, make_optimizer(module, cfg, lr), Average(module, cfg.ema) if cfg.ema else None
        )
        self.saved_at = time.monotonic()
        self.leaving = (False, False)  # any worker is told to go; this one is
        self.bfloat16 = parallel.uses_bfloat16(cfg, self.device)

    def resume(self, before: checkpoint.Checkpoint | None) -> None:
        """Continue after a checkpoint."""
        if before is None:
            return
        if before.moment.steps_per_epoch != self.batches.steps_per_epoch:
            raise TrainError(
                f"the checkpoint is of a training of {before.moment.steps_per_epoch} steps an epoch, this one has "
                f"{self.batches.steps_per_epoch}: the data or train.batch_size changed since; start a new run"
            )
        error = None
        try:
            checkpoint.restore(before, self.state)
        except TrainError as err:
            error = str(err)
        if told := [e for e in self.control.votes.gather(error) if e]:  # one stage alone may miss something
            raise TrainError(told[0])

    def epoch(
        self, epoch: int, epochs: int, first: int, loss_before: float, on_step: Callable[[int, int], None] | None
    ) -> dict[str, Any]:
        """Train through one epoch from step `first` on; returns its metrics."""
        batches, cfg, per_epoch = self.batches, self.cfg, self.batches.steps_per_epoch
        optimizer, rank = self.state.optimizer, parallel.rank_world()[0]
        total = epochs * per_epoch
        warmup = min(int(cfg.warmup_epochs * per_epoch), total // 2)
        self.state.module.train()
        start = time.perf_counter()
        loss_sum = torch.zeros(1, dtype=torch.float64, device=self.device)
        if rank == 0:
            loss_sum += loss_before
        step = epoch * per_epoch + first
        self.control.at("waits for its first batch", step)
        for micros in batches.epoch(epoch, first, epochs):
            self.control.at("computes")
            torch.manual_seed((self.seed * 1_000_003 + step) * 4099 + rank)  # a step, so that a resume draws alike
            if on_step is not None:
                on_step(step, total)
            factor = lr_factor(step, total, warmup, cfg)
            for group in optimizer.param_groups:
                group["lr"] = self.lr * factor * group.get("lr_scale", 1.0)
            with batches.meter("step"):
                rows = batches.step_rows(step)
                part = self.strategy.backward(micros, self.loss, rows, self._precision)
                loss_sum += part
                self._check_finite(part, epoch, step)
                if cfg.clip_norm is not None:
                    self.strategy.clip(cfg.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if self.state.average is not None:
                    self.state.average.update()
            step += 1
            self.control.at("waits for the others", step)
            self._maybe_save(epoch, step, loss_sum)
            self.control.at("waits for a batch")
        mean_loss = parallel.all_sum(loss_sum).item() / per_epoch  # waits for the device
        self._check_sum(mean_loss, epoch)
        train_s = time.perf_counter() - start
        done = sum(batches.step_rows(s) for s in range(first, per_epoch))
        return {
            "epoch": epoch + 1,
            "epochs": epochs,
            "step": step,
            "train_loss": mean_loss,
            "lr": optimizer.param_groups[0]["lr"],
            "seconds": train_s,
            "images_per_s": done / train_s,
            "order_hash": batches.order_hash(epoch),
            "device": self.device.type,
            "workers": parallel.rank_world()[1],
            "meter": batches.meter.take(),
        }

    def score(self, evaluate: Callable[[parallel.Strategy], Score]) -> dict[str, Any]:
        """Evaluate the model that would be kept."""
        self.control.at("evaluates")
        self.strategy.sync_buffers()
        average = self.state.average
        with average.applied() if average is not None else nullcontext():
            score = evaluate(self.strategy)
        return {"val_loss": score.loss, "val_accuracy": score.accuracy, "val_rows": score.rows}

    def save(self, moment: checkpoint.Moment) -> None:
        """Checkpoint, if there is where to."""
        if self.saver is not None:
            self.control.at("checkpoints")
            self.saver.save(moment, self.state)
            self.saved_at = time.monotonic()

    def finish(self) -> None:
        """Wait for the last checkpoint; every worker hears if it failed."""
        if self.saver is not None:
            self.control.at("writes the last checkpoint")
            self.saver.wait()
            self._obey(self.control.votes.now(Wish(failed=self.saver.error is not None)))
        if self.state.average is not None:
            self.state.average.keep()
        if not self.strategy.sharded:  # as it came
            self.state.module.to(memory_format=torch.contiguous_format)

    def _maybe_save(self, epoch: int, step: int, loss_sum: torch.Tensor) -> None:
        saver, cfg, per_epoch = self.saver, self.cfg, self.batches.steps_per_epoch
        if saver is None:
            return
        wish = self.control.wishes()
        late = cfg.checkpoint_seconds is not None and time.monotonic() - self.saved_at > cfg.checkpoint_seconds
        wanted = self.control.votes.cast(Wish(wish.save or late, wish.leave, saver.error is not None))
        self._obey(wanted._replace(leave=False))
        inside = step - epoch * per_epoch
        due = bool(cfg.checkpoint_steps) and step % (cfg.checkpoint_steps or 1) == 0
        if (due or wanted.save or wanted.leave) and inside < per_epoch:
            so_far = parallel.all_sum(loss_sum.clone()).item()
            self._check_sum(so_far, epoch)
            self.save(checkpoint.Moment(epoch, inside, so_far, step, per_epoch))
        self.leaving = (wanted.leave, wish.leave)
        if inside < per_epoch:  # else the checkpoint of the epoch's end comes first
            self.leave()

    def leave(self) -> None:
        """Go after a checkpoint, if told to; every worker calls it at the same moment."""
        asked, mine = self.leaving
        if asked and self.saver is not None:
            self.leaving = (False, False)
            self.saver.wait()
            self._obey(self.control.votes.now(Wish(leave=mine, failed=self.saver.error is not None)), mine)

    def _obey(self, wanted: Wish, mine: bool = False) -> None:
        if wanted.failed:
            errors = self.control.votes.gather(self.saver.error if self.saver else None)
            raise TrainError(next(error for error in errors if error))
        if wanted.leave and mine:
            raise SystemExit("told to leave; a checkpoint is written")

    def _precision(self) -> Any:
        if self.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _check_sum(self, value: float, epoch: int) -> None:
        """On a GPU, between the looks at the gradient: nothing that is not finite is saved."""
        if not math.isfinite(value):  # the same on every worker
            raise TrainError(
                f"the loss is not finite in epoch {epoch + 1}: lower the learning rate (now {self.lr:g}: train.lr), "
                f"set train.clip_norm (now {self.cfg.clip_norm}), or set train.precision float32"
            )

    def _check_finite(self, part: torch.Tensor, epoch: int, step: int) -> None:
        if (self.device.type == "cuda" and step % GPU_CHECK_EVERY) or self.strategy.finite():
            return
        cfg, inside = self.cfg, step - epoch * self.batches.steps_per_epoch
        raise self.control.explain_not_finite(
            not bool(torch.isfinite(part)) if self.strategy.sees_loss else None,
            self.batches.rows(epoch, inside).tolist(),
            f"the loss is not finite at epoch {epoch + 1}, step {step + 1}: lower the learning rate (now {self.lr:g}: "
            f"train.lr, or recover.lr in recovery), set train.clip_norm (now {cfg.clip_norm}), raise "
            f"train.warmup_epochs (now {cfg.warmup_epochs:g}), or set train.precision float32",
        )
