"""Data parallelism over the process group that is there, if one is. Single process: everything is a no-op."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def rank_world() -> tuple[int, int]:
    """Rank of this worker and number of workers."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """DistributedDataParallel over all workers; the model itself if there is one worker."""
    if rank_world()[1] == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def inner(model: nn.Module) -> nn.Module:
    """The model without its wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def no_sync(model: nn.Module, skip: bool) -> AbstractContextManager[object]:
    """Skip the gradient all-reduce (inner steps of an accumulation)."""
    return model.no_sync() if skip and isinstance(model, DistributedDataParallel) else nullcontext()


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over all workers, in place."""
    if rank_world()[1] > 1:
        dist.all_reduce(values)
    return values


def sync_buffers(model: nn.Module) -> None:
    """Give every worker the buffers (BatchNorm statistics) of worker 0, so that they evaluate one model."""
    if rank_world()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
