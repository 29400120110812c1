"""Knowledge distillation from logits (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from raydeep.data.batches import Micro
from raydeep.train.losses import Loss

if TYPE_CHECKING:
    from raydeep.config import Distill


def distilled(loss: Loss, teacher: nn.Module, cfg: Distill) -> Loss:
    """Mix a loss with the divergence from the teacher's softened output.

    (1 - w) · loss + w · T² · KL(teacher_T ‖ student_T), a row; the teacher sees the same augmented pictures.
    """
    teacher = teacher.eval().requires_grad_(False)

    def mixed(logits: torch.Tensor, micro: Micro) -> torch.Tensor:
        with torch.no_grad():
            target = F.log_softmax(teacher(micro.images).float() / cfg.temperature, 1)
        student = F.log_softmax(logits.float() / cfg.temperature, 1)
        divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(1) * cfg.temperature**2
        return (1 - cfg.weight) * loss(logits, micro) + cfg.weight * divergence

    return mixed
