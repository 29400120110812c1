"""Teachers: a model of raydeep's or of torchvision's, made to take the student's input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raydeep import mirror
from raydeep.compress.distill import Adapted, Distilled
from raydeep.data.augment import Augmenter
from raydeep.data.resident import Dataset, Pixels
from raydeep.errors import ModelError
from raydeep.model import artifact
from raydeep.train.losses import Loss

if TYPE_CHECKING:
    from raydeep.config import Distill, Job

TORCHVISION = "torchvision:"


def load(cfg: Distill, spec: dict[str, Any]) -> nn.Module | None:
    """The teacher that distill.teacher names; None if it is the dense model or the student's own average.

    Args:
        cfg: the distill section.
        spec: of the student.

    Raises:
        ModelError: there is no such model, it has other classes, or takes pictures that the student's can't become.
    """
    if cfg.teacher in ("dense", "ema"):
        return None
    where = f"distill.teacher {cfg.teacher}"
    if cfg.teacher.startswith(TORCHVISION):
        net, theirs = _torchvision(cfg.teacher.removeprefix(TORCHVISION), where)
    else:
        folder = artifact.dense_folder(mirror.place(cfg.teacher, "distill.teacher"))
        if not (folder / "spec.json").is_file():
            raise ModelError(
                f"{where}: neither a run with models/dense nor a model folder; expected dense, ema, the folder of one, "
                f"or torchvision:NAME@WEIGHTS"
            )
        artifact.check_sums(folder)
        theirs, tensors = artifact.load_model(folder)
        net = artifact.thaw(theirs, tensors)
    if cfg.weight and list(theirs["classes"]) != list(spec["classes"]):
        raise ModelError(
            f"{where}: has other classes ({_names(theirs['classes'])}) than the data ({_names(spec['classes'])}): give "
            f"a teacher of the same classes, or set distill.weight=0 and learn by distill.hints or distill.relational"
        )
    if theirs["input"][2] < spec["input"][2]:
        raise ModelError(f"{where}: takes grey pictures, the data has colours; set data.mode=grey, or another teacher")
    return Adapted(net, theirs, spec).eval().requires_grad_(False)


def _names(classes: list[str]) -> str:
    return f"{len(classes)}: {', '.join(map(str, classes[:3]))}{', …' if len(classes) > 3 else ''}"


def _torchvision(name: str, where: str) -> tuple[nn.Module, dict[str, Any]]:
    from torchvision import models

    name, _, label = name.partition("@")
    try:
        weights = models.get_model_weights(name)[label or "DEFAULT"]
    except (ValueError, KeyError) as err:
        raise ModelError(
            f"{where}: torchvision has no such network or weights ({err}); expected NAME@WEIGHTS"
        ) from None
    try:
        net = models.get_model(name, weights=weights)
    except OSError as err:  # the download
        raise ModelError(f"{where}: its weights can't be fetched: {err}; put them into torch's cache first") from None
    preset = weights.transforms()
    side = preset.crop_size[0]
    return net, {
        "classes": weights.meta["categories"], "input": [side, side, 3], "mean": list(preset.mean),
        "std": list(preset.std),
    }  # fmt: skip


def distilled(
    job: Job, loss: Loss, student: nn.Module, teacher: nn.Module | None, data: Dataset, device: torch.device | str
) -> Distilled:
    """The distillation of a training on the job's data; the teacher's logits are kept where pictures never change.

    Args:
        job: its distill and augment sections count.
        loss: from labels.
        student: on `device`.
        teacher: from `load` or the dense model, on `device`; None: the student's own average.
        data: the splits.
        device: of the training.
    """
    fixed = isinstance(data.train, Pixels) and not Augmenter(job.augment, data.mean, data.std).draws
    height, width, channels = data.shape
    example = torch.zeros(2, channels, height, width, device=device)
    rows = len(data.train.labels) if fixed else 0
    return Distilled(loss, student, teacher, job.distill, rows).hint(example)


class OnWorker:
    """Makes the distillation of a worker of `raydeep train`: sent there, it loads its teacher there."""

    def __init__(self, job: Job, spec: dict[str, Any]) -> None:
        self.job, self.spec = job.model_dump(mode="json"), spec

    def __call__(self, loss: Loss, student: nn.Module, data: Dataset, device: torch.device) -> Distilled:
        """See `distilled`."""
        from raydeep.config import Job

        job = Job.model_validate(self.job)
        teacher = load(job.distill, self.spec)
        return distilled(job, loss, student, None if teacher is None else teacher.to(device), data, device)
