"""Fully sharded data parallelism: parameters, gradients and optimizer state are cut over the workers.

PyTorch's `fully_shard` (FSDP2; the idea is arXiv 1910.02054, stage 3), a block at a time: only the block that computes
is whole on a worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from raydeep.train.parallel import Strategy, uses_bfloat16

if TYPE_CHECKING:
    from raydeep.config import Train


class Fsdp(Strategy):
    """Every worker holds a shard of each parameter and takes its share of each batch."""

    sharded = True

    def prepare(self, model: nn.Module, cfg: Train, image_shape: tuple[int, int, int]) -> nn.Module:
        """See Strategy.prepare; the parameters become DTensors."""
        mesh = init_device_mesh(self.device.type, (self.data_world,), mesh_dim_names=("shard",))
        policy = MixedPrecisionPolicy()
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        if uses_bfloat16(cfg, self.device) and not norms:  # BatchNorm wants its weights in the type of its statistics
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)  # evaluation has no backward
        self.module = self.wrapped = model
        if cfg.compile:
            self.wrapped = torch.compile(model)  # type: ignore[assignment]
        return model

    def _last(self, last: bool) -> AbstractContextManager[object]:
        return self._syncing(last)

    @contextmanager
    def _syncing(self, last: bool) -> Iterator[None]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        self.module.set_is_last_backward(last)
        yield

    def finite(self) -> bool:
        """See Strategy.finite; each worker looks at its own shards."""
        bad = torch.zeros(1, device=self.device)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                bad += ~torch.isfinite(parameter.grad.to_local()).all()  # type: ignore[attr-defined]
        dist.all_reduce(bad)
        return not bool(bad)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network: outermost composite children of its sequences that hold parameters."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            inside = isinstance(module, (nn.Sequential, nn.ModuleList))
            composite = next(child.children(), None) is not None and not isinstance(child, nn.ModuleList)
            if inside and composite and next(child.parameters(), None) is not None and not _nested(child):
                found.append(child)
            else:
                walk(child)

    walk(model)
    return found


def _nested(module: nn.Module) -> bool:
    """Whether it is a sequence of composite modules, which are the blocks then."""
    return isinstance(module, nn.Sequential) and any(next(child.children(), None) is not None for child in module)
