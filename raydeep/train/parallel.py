"""How the model and the data are spread over the workers of the process group that is there, if one is.

A strategy hides that from the loop: `ddp` (each worker holds the model, gradients are averaged), `fsdp` (parameters
sharded) and, in pipeline.py, `pipeline` (each worker holds a stage). Terms: a *data rank* is the share of each global
batch that a worker takes; a *part* is what a worker holds of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raydeep.data.batches import Micro
from raydeep.train.losses import Loss

if TYPE_CHECKING:
    from raydeep.config import Scaling, Train


def uses_bfloat16(cfg: Train, device: torch.device) -> bool:
    """Whether the forward pass runs in bfloat16 where autocast allows it."""
    if cfg.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return cfg.precision == "bfloat16"


Precision = Callable[[], AbstractContextManager[Any]]  # autocast or nothing


def rank_world() -> tuple[int, int]:
    """Rank of this worker and number of workers."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_sum(values: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Element-wise sum over all workers (of a group), in place."""
    if rank_world()[1] > 1:
        dist.all_reduce(values, group=group)
    return values


class Strategy:
    """One worker, or data parallel (`ddp`): the base that the other strategies change.

    Attributes:
        module: this worker's part; parameters carry the names they have in the whole model.
        data_rank: which share of each global batch this worker takes.
        data_world: how many shares there are.
        data_group: the workers that hold the same part and, among them, every share; None: all workers.
        sharded: parts differ between workers, so that all of them write checkpoints.
        sees_loss: this worker's part ends in the logits.
    """

    sharded = False
    sees_loss = True

    def __init__(self, scaling: Scaling | None = None, device: torch.device | str = "cpu") -> None:
        self.scaling, self.device = scaling, torch.device(device)
        self.data_rank, self.data_world = rank_world()
        self.data_group: dist.ProcessGroup | None = None
        self.module: nn.Module
        self.wrapped: nn.Module

    def prepare(self, model: nn.Module, cfg: Train, image_shape: tuple[int, int, int]) -> nn.Module:
        """Take a whole model, the same on every worker; returns this worker's part, whose parameters are trained.

        Args:
            model: the whole model, on the device.
            cfg: the train section.
            image_shape: channels, height, width of what goes in.
        """
        if self.scaling is not None and self.scaling.sync_batchnorm and self.data_world > 1:
            model = sync_batchnorm(model, self.device)
        self.module = self.wrapped = model
        if self.data_world > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.wrapped = ddp = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
            if self.scaling is not None and self.scaling.gradient_compression == "bf16":
                from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

                ddp.register_comm_hook(None, default_hooks.bf16_compress_hook)
        if cfg.compile:
            self.wrapped = torch.compile(self.wrapped)  # type: ignore[assignment]
        return self.module

    def backward(self, micros: Sequence[Micro], loss: Loss, rows: int, precision: Precision) -> torch.Tensor:
        """Forward and backward of this worker's share of a step; afterwards `.grad` is that of the mean loss.

        Args:
            micros: the micro-batches of this worker's share.
            loss: of each row.
            rows: of the global batch.
            precision: makes the context of the forward pass.

        Returns:
            This worker's share of the mean loss of the global batch, detached, float: the sum over all workers is it.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, micro in enumerate(micros):
            with self._last(i + 1 == len(micros)):
                with precision():
                    losses = loss(self.wrapped(micro.images), micro)
                part = losses[: micro.valid].sum() / rows
                (part * self.data_world).backward()  # gradients are averaged over the shares
                total = total + part.detach()
        return total

    def _last(self, last: bool) -> AbstractContextManager[object]:
        """Gradients are reduced after the last micro-batch only."""
        ddp = getattr(self.wrapped, "_orig_mod", self.wrapped)  # inside torch.compile's wrapper
        return ddp.no_sync() if not last and isinstance(ddp, DistributedDataParallel) else nullcontext()

    def clip(self, norm: float) -> None:
        """Scale the gradient of the whole model to at most this norm."""
        nn.utils.clip_grad_norm_(self.module.parameters(), norm)

    def finite(self) -> bool:
        """Whether the gradient is finite: the same answer on every worker."""
        last = [p.grad for p in self.module.parameters() if p.grad is not None][-1]  # nearest the loss; reduced already
        return bool(torch.isfinite(last).all())

    def sync_buffers(self) -> None:
        """Give every worker the buffers (BatchNorm statistics) of data rank 0, so that they evaluate one model."""
        if self.data_world > 1:
            for buffer in self.module.buffers():
                dist.broadcast(buffer, group=self.data_group, group_src=0)

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of float NCHW images with the whole model, in eval mode, on each worker for its own images.

        Workers that share a data rank must call it together with the same images.
        """
        return self.module(images)


class _AllSum(torch.autograd.Function):
    """Sum over all workers, of the values and, backwards, of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return all_sum(values.clone())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return all_sum(gradient.clone())


class _SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all workers, where torch's own (CUDA only) does not run; any input shape N C …"""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise `input`; in eval mode with the running statistics."""
        if not self.training:
            return super().forward(input)
        axes = [0, *range(2, input.dim())]
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        wide = x.double()  # a difference of squares: float32 would cancel
        sums = torch.stack([wide.sum(axes), (wide * wide).sum(axes)])
        count = torch.full((), input.numel() // input.shape[1], dtype=sums.dtype, device=input.device)
        all_sum(count)
        mean, square = _AllSum.apply(sums) / count
        var = (square - mean * mean).clamp(min=0)
        if self.track_running_stats and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)  # type: ignore[union-attr]
                unbiased = var * (count / (count - 1).clamp(min=1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)  # type: ignore[union-attr]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        out = (x - mean.to(x.dtype).view(shape)) * torch.rsqrt(var + self.eps).to(x.dtype).view(shape)
        out = out if self.weight is None else out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)


def sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm use the statistics of the global batch, in place; names stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                own = _SyncBatchNorm(
                    child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
                )
                own.__dict__.update({k: v for k, v in child.__dict__.items() if k in ("training",)})
                own._parameters, own._buffers = child._parameters, child._buffers
                setattr(parent, name, own)
    return model


def strategy(scaling: Scaling | None = None, device: torch.device | str = "cpu") -> Strategy:
    """The strategy of a job, over the process group that is there."""
    if scaling is not None and rank_world()[1] > 1:
        if scaling.strategy == "fsdp":
            from raydeep.train.fsdp import Fsdp

            return Fsdp(scaling, device)
        if scaling.strategy == "pipeline":
            from raydeep.train.pipeline import Pipeline

            return Pipeline(scaling, device)
    return Strategy(scaling, device)
