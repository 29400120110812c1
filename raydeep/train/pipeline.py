"""Pipeline parallelism: each worker holds a stage of the network, micro-batches flow through the stages.

PyTorch's `torch.distributed.pipelining` with the schedules GPipe (arXiv 1811.06965) and 1F1B (1806.03377). Workers
form a mesh of replicas × stages; over the replicas of a stage gradients are averaged as in ddp.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from raydeep.data.batches import Micro
from raydeep.errors import TrainError
from raydeep.train import stages
from raydeep.train.losses import Loss
from raydeep.train.parallel import Precision, Strategy

if TYPE_CHECKING:
    from raydeep.config import Scaling, Train

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class _Cast(nn.Module):
    """A stage in the precision of the training, or of the evaluation (none of its own)."""

    def __init__(self, part: nn.Module, types: list[torch.dtype]) -> None:
        super().__init__()
        self.part, self.types = part, types
        self.precision: Precision = nullcontext

    def forward(self, *values: torch.Tensor) -> Any:
        """Run it; what is handed on has the types of a run without autocast, which the next stage expects."""
        with self.precision():
            out = self.part(*values)
        if not isinstance(out, tuple):
            return out.to(self.types[0]).contiguous()  # it is sent
        return tuple(o.to(kind).contiguous() for o, kind in zip(out, self.types, strict=True))


class Pipeline(Strategy):
    """Worker r holds stage r mod stages of replica r // stages; all workers of a replica take the same share."""

    sharded = True

    def __init__(self, scaling: Scaling, device: torch.device | str = "cpu") -> None:
        super().__init__(scaling, device)
        self.stages = scaling.pipeline_stages
        replicas = self.data_world // self.stages
        mesh = init_device_mesh(
            self.device.type, (replicas, self.stages), mesh_dim_names=("replica", "stage")
        )  # fmt: skip
        self.stage = self.data_rank % self.stages
        self.sees_loss = self.stage == self.stages - 1
        self.data_rank, self.data_world = self.data_rank // self.stages, replicas
        self.data_group, self.stage_group = mesh.get_group("replica"), mesh.get_group("stage")
        self.kind = scaling.pipeline_schedule
        self.cut_points = scaling.cut_points

    def prepare(self, model: nn.Module, cfg: Train, image_shape: tuple[int, int, int]) -> nn.Module:
        """See Strategy.prepare; the part is a GraphModule with the parameters of one stage."""
        self.micros, self.micro = cfg.accumulate, cfg.batch_size // self.data_world // cfg.accumulate
        parts = stages.cut(model, (self.micro, *image_shape), self.stages, self.cut_points)
        part = parts[self.stage]
        self.module = part.module
        inside: nn.Module = torch.compile(part.module) if cfg.compile else part.module  # type: ignore[assignment]
        self.wrapped = self.cast = _Cast(inside, [v.dtype for v in part.outputs])
        if self.data_world > 1 and any(p.requires_grad for p in part.module.parameters()):
            ids = [self.device] if self.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.wrapped, device_ids=ids, process_group=self.data_group)
        self.logits = tuple(parts[-1].outputs[0].shape[1:]), parts[-1].outputs[0].dtype
        shapes = [
            tuple(
                torch.empty(v.shape, dtype=v.dtype, device="meta", requires_grad=grad and v.is_floating_point())
                for v in values
            )
            for values, grad in ((part.inputs, self.stage > 0), (part.outputs, True))
        ]
        self.loss: Any = None

        def losses(logits: torch.Tensor, micro: Micro) -> torch.Tensor:
            return self.loss(logits, micro)

        def schedule(kind: str, loss_fn: Any) -> Any:
            stage = PipelineStage(
                self.wrapped, self.stage, self.stages, self.device, input_args=shapes[0], output_args=shapes[1],
                group=self.stage_group,
            )  # fmt: skip
            return SCHEDULES[kind](stage, self.micros, loss_fn=loss_fn, scale_grads=False)

        self.schedule, self.forward_only = schedule(self.kind, losses), schedule("gpipe", None)
        return self.module

    def backward(self, micros: Sequence[Micro], loss: Loss, rows: int, precision: Precision) -> torch.Tensor:
        """See Strategy.backward; only the workers with the last stage see a loss.

        Raises:
            TrainError: the micro-batches are not all of one size, for which the stages are built.
        """
        sizes = [len(micro.images) for micro in micros]
        if sizes != [self.micro] * self.micros:
            raise TrainError(
                f"scaling.strategy pipeline needs {self.micros} micro-batches of {self.micro} rows, found {sizes}: "
                f"make train.batch_size a multiple of replicas × train.accumulate × 2 (mixed pairs are never cut apart)"
            )
        self.cast.precision = precision
        self.loss = lambda logits, micro: loss(logits, micro)[: micro.valid].sum() / rows * self.data_world
        found: list[torch.Tensor] = []
        feed: dict[str, Any] = {}
        if self.stage == 0:
            feed["arg_mbs"] = [(micro.images,) for micro in micros]
        if self.sees_loss:
            feed |= {"target_mbs": list(micros), "losses": found}
        self.schedule.step(**feed, return_outputs=False)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in found:
            total = total + part.detach()
        return total / self.data_world

    def clip(self, norm: float) -> None:
        """See Strategy.clip; over the stages."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for gradient in gradients:
            squares += gradient.double().square().sum()
        dist.all_reduce(squares, group=self.stage_group)
        scale = (norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.dtype))

    def finite(self) -> bool:
        """See Strategy.finite."""
        bad = torch.zeros(1, device=self.device)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                bad += ~torch.isfinite(parameter.grad).all()
        dist.all_reduce(bad)
        return not bool(bad)

    @torch.no_grad()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """See Strategy.predict; rows that fill up the last micro-batches are cut off again."""
        self.cast.precision = nullcontext  # as the other strategies: autocast is for training
        whole, (shape, dtype) = self.micro * self.micros, self.logits
        out = []
        for start in range(0, len(images), whole):
            chunk = images[start : start + whole]
            index = torch.arange(whole, device=images.device) % len(chunk)
            feed: dict[str, Any] = (
                {"arg_mbs": [(part,) for part in chunk[index].split(self.micro)]} if self.stage == 0 else {}
            )
            logits = self.forward_only.eval(**feed)
            if logits is None:
                logits = torch.empty(whole, *shape, dtype=dtype, device=self.device)
            dist.broadcast(logits, group=self.stage_group, group_src=self.stages - 1)
            out.append(logits[: len(chunk)])
        return torch.cat(out)
