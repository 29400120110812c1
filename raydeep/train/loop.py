"""The training loop. Knows no Ray, no compression, no command line.

Distillation is one more loss; quantization-aware training is a prepared model; a pruning schedule is `on_step`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raydeep.data.batches import Batches
from raydeep.errors import TrainError
from raydeep.train import checkpoint, parallel
from raydeep.train.losses import Loss
from raydeep.train.metrics import Score
from raydeep.train.optim import lr_factor, make_optimizer

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
    lr: float | None = None,
    seed: int = 0,
    evaluate: Callable[[nn.Module], Score] | None = None,
    on_epoch: Callable[[dict[str, Any], nn.Module, torch.optim.Optimizer], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    save: Callable[[checkpoint.Moment, nn.Module, torch.optim.Optimizer], None] | None = None,
    resume: checkpoint.Checkpoint | None = None,
) -> list[dict[str, Any]]:
    """Train a model in place.

    The gradient of a step is that of the mean loss over the global batch, whatever the number of workers and
    micro-batches.

    Args:
        model: float NCHW → logits NK, on the device of `batches`.
        loss: see losses.py.
        batches: this worker's training batches.
        cfg: the train section.
        epochs: instead of cfg.epochs.
        lr: peak learning rate instead of cfg.lr.
        seed: of the layers' own randomness (dropout).
        evaluate: called after each epoch; every worker must take part.
        on_epoch: called after each epoch with its metrics, the model and the optimizer.
        on_step: called before each step with its number and the number of steps in all.
        save: called on every worker at the end of each epoch, and each cfg.checkpoint_steps steps.
        resume: continue after this checkpoint.

    Returns:
        The metrics of each epoch.

    Raises:
        TrainError: the loss is not finite, on every worker at the same step; or `resume` is of another training.
    """
    epochs, lr = cfg.epochs if epochs is None else epochs, cfg.lr if lr is None else lr
    rank, world = parallel.rank_world()
    device = batches.device
    if resume is not None:
        if resume.steps_per_epoch != batches.steps_per_epoch:
            raise TrainError(
                f"the checkpoint is of a training of {resume.steps_per_epoch} steps an epoch, this one has "
                f"{batches.steps_per_epoch}: the data or train.batch_size changed since; start a new run"
            )
        model.load_state_dict(resume.model)
    optimizer = make_optimizer(model, cfg, lr)
    if resume is not None:
        state = resume.optimizer
        groups = [
            {**own, **g, "params": own["params"]}
            for g, own in zip(state["param_groups"], optimizer.state_dict()["param_groups"], strict=True)
        ]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    wrapped = parallel.wrap(model, device)
    total = epochs * batches.steps_per_epoch
    warmup = min(int(cfg.warmup_epochs * batches.steps_per_epoch), total // 2)
    history: list[dict[str, Any]] = []
    with closing(batches):
        for epoch in range(resume.epoch if resume else 0, epochs):
            model.train()
            start = time.perf_counter()
            loss_sum = torch.zeros(1, dtype=torch.float64, device=device)
            first = resume.step if resume and resume.epoch == epoch else 0
            if first and resume and rank == 0:
                loss_sum += resume.loss_sum
            step = epoch * batches.steps_per_epoch + first
            for micros in batches.epoch(epoch, first, epochs):
                torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)  # a step, so that a resume draws alike
                if on_step is not None:
                    on_step(step, total)
                for group in optimizer.param_groups:
                    group["lr"] = lr * lr_factor(step, total, warmup)
                with batches.meter("step"):
                    for i, micro in enumerate(micros):
                        with parallel.no_sync(wrapped, i + 1 < len(micros)):
                            with _precision(cfg, device):
                                rows = loss(wrapped(micro.images), micro)
                            total_loss = rows[: micro.valid].sum() / batches.step_rows(step)
                            (total_loss * world).backward()  # DDP averages over the workers
                            loss_sum += total_loss.detach()
                    _check_finite(model, cfg, lr, epoch, step, device)
                    if cfg.clip_norm is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                step += 1
                inside = step - epoch * batches.steps_per_epoch
                due = cfg.checkpoint_steps and step % cfg.checkpoint_steps == 0
                if save is not None and due and inside < batches.steps_per_epoch:
                    so_far = parallel.all_sum(loss_sum.clone()).item()
                    save(checkpoint.Moment(epoch, inside, so_far, step, batches.steps_per_epoch), model, optimizer)
            train_s = time.perf_counter() - start
            mean_loss = parallel.all_sum(loss_sum).item() / batches.steps_per_epoch
            done = sum(batches.step_rows(s) for s in range(first, batches.steps_per_epoch))
            metrics: dict[str, Any] = {
                "epoch": epoch + 1,
                "epochs": epochs,
                "step": step,
                "train_loss": mean_loss,
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": train_s,
                "images_per_s": done / train_s,
                "order_hash": batches.order_hash(epoch),
                "device": device.type,
                "meter": batches.meter.take(),
                "first_batch_s": None if history else batches.meter.first_batch_s,
                "start_s": None if history else batches.meter.start_s,
            }
            if evaluate is not None:
                parallel.sync_buffers(model)
                score = evaluate(model)
                metrics |= {"val_loss": score.loss, "val_accuracy": score.accuracy, "val_rows": score.rows}
            history.append(metrics)
            if on_epoch is not None:
                on_epoch(metrics, model, optimizer)
            if save is not None:
                save(checkpoint.Moment(epoch + 1, 0, 0.0, step, batches.steps_per_epoch), model, optimizer)
    return history


def _precision(cfg: Train, device: torch.device) -> Any:
    wanted = cfg.precision
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.autocast(device.type, torch.bfloat16) if wanted == "bfloat16" else nullcontext()


def _check_finite(model: nn.Module, cfg: Train, lr: float, epoch: int, step: int, device: torch.device) -> None:
    """Look at the gradient nearest the loss: already summed over the workers, so all of them decide alike."""
    if device.type == "cuda" and step % GPU_CHECK_EVERY:
        return
    last = [p.grad for p in model.parameters() if p.grad is not None][-1]
    if not bool(torch.isfinite(last).all()):
        raise TrainError(
            f"the loss is not finite at epoch {epoch + 1}, step {step + 1}: lower the learning rate (now {lr:g}: "
            f"train.lr, or recover.lr in recovery), set train.clip_norm (now {cfg.clip_norm}), raise "
            f"train.warmup_epochs (now {cfg.warmup_epochs:g}), or set train.precision float32"
        )
