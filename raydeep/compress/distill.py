"""Knowledge distillation: from logits, features and relations, of a fixed teacher or the student's own average.

Shapes: N rows, K classes.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from raydeep.data.batches import Micro
from raydeep.errors import JobError
from raydeep.train.losses import Loss

if TYPE_CHECKING:
    from raydeep.config import Distill

PROJECTIONS = "hint_projections"  # name, in the student, of what maps its features to the teacher's
ANGLES = 2.0  # weight of angles against distances, as in the paper
CACHE_BYTES = 2**30


class Adapted(nn.Module):
    """A teacher behind its own normalisation, size and channels: takes what the student takes."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, net: nn.Module, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
        """Wrap a network.

        Args:
            net: the teacher.
            theirs: `input` (height, width, channels), `mean` and `std` that it was trained with.
            mine: the same of the student.
        """
        super().__init__()
        self.net, self.size = net, tuple(theirs["input"][:2])
        self.resize = self.size != tuple(mine["input"][:2])
        self.repeat = theirs["input"][2] if mine["input"][2] == 1 < theirs["input"][2] else 0
        scale = [m / t for m, t in zip(_wide(mine["std"], theirs), theirs["std"], strict=True)]
        shift = [
            (m - t) / s for m, t, s in zip(_wide(mine["mean"], theirs), theirs["mean"], theirs["std"], strict=True)
        ]
        self.same = all(abs(a - 1) < 1e-6 for a in scale) and all(abs(b) < 1e-6 for b in shift)
        self.register_buffer("scale", torch.tensor(scale).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float NCHW as the student takes it → logits NK."""
        if self.repeat:
            x = x.expand(-1, self.repeat, -1, -1)
        if not self.same:
            x = x * self.scale + self.shift
        if self.resize:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
        return self.net(x)


def _wide(values: list[float], theirs: dict[str, Any]) -> list[float]:
    return values * len(theirs["std"]) if len(values) == 1 else values


class _Projections(nn.ModuleList):
    """A list that may stand in a Sequential: as a layer it does nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X itself."""
        return x


class Distilled:
    """A loss mixed with what the teacher says; the teacher sees the same augmented pictures.

    A row: (1 - w) · loss + w · T² · KL(teacher_T ‖ student_T) (Hinton et al., arXiv 1503.02531)
    + hints · feature loss (FitNets, 1412.6550) + relational · RKD loss (1904.05068).
    """

    def __init__(
        self, loss: Loss, student: nn.Module, teacher: nn.Module | None, cfg: Distill, cache_rows: int = 0
    ) -> None:
        """Watch a student.

        Args:
            loss: of each row, from labels.
            student: on its device, as it will be trained; with hints it gains the module PROJECTIONS until `close`.
            teacher: float NCHW → logits NK; None: the moving average of the student (mean teacher, 1703.01780).
            cfg: the distill section.
            cache_rows: rows of a train split whose pictures never change: the teacher's logits are kept. 0: never.
        """
        self.loss, self.student, self.cfg = loss, student, cfg
        self.own = teacher is None
        self.teacher = (copy.deepcopy(student) if teacher is None else teacher).eval().requires_grad_(False)
        self.updates = 0
        self.cache_rows = 0 if self.own or cfg.hints else cache_rows
        self.cache: torch.Tensor | None = None
        self.known = torch.zeros(self.cache_rows, dtype=torch.bool)
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.pairs: list[tuple[str, str]] = []
        self.seen: dict[str, torch.Tensor] = {}  # "student.NAME" and "teacher.NAME" → output of the last forward pass

    def hint(self, example: torch.Tensor) -> Distilled:
        """Tap the layers that are hinted and give the student its projections.

        Args:
            example: pictures float NCHW, to learn the shapes from.

        Raises:
            JobError: distill.hint_layers names no layer, or there is nothing to hint.
        """
        if not self.cfg.hints:
            return self
        inner = self.teacher.net if isinstance(self.teacher, Adapted) else self.teacher
        mine, theirs = outputs(self.student, self.student, example), outputs(inner, self.teacher, example)
        self.pairs = _pairs(self.cfg.hint_layers, mine, theirs)
        projections = _Projections(_projection(mine[a], theirs[b]).to(example.device) for a, b in self.pairs)
        self.student.add_module(PROJECTIONS, projections)
        for side, net, names in (
            ("student", self.student, [a for a, _ in self.pairs]), ("teacher", inner, [b for _, b in self.pairs])
        ):  # fmt: skip
            for name in set(names):
                self.handles.append(net.get_submodule(name).register_forward_hook(self._tap(f"{side}.{name}")))
        return self

    def _tap(self, key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            self.seen[key] = out

        return hook

    def __call__(self, logits: torch.Tensor, micro: Micro) -> torch.Tensor:
        """The mixed loss of each row: float of shape [N]."""
        cfg = self.cfg
        with torch.no_grad():
            taught = self._taught(micro)
        total = (1 - cfg.weight) * self.loss(logits, micro)
        if cfg.weight:
            total = total + cfg.weight * kl(logits, taught, cfg.temperature)
        if cfg.relational:
            total = total + cfg.relational * relational(logits, taught, micro.valid)
        for (a, b), project in zip(self.pairs, getattr(self.student, PROJECTIONS, ()), strict=True):
            total = total + cfg.hints * feature(project(self.seen[f"student.{a}"]), self.seen[f"teacher.{b}"])
        return total

    def _taught(self, micro: Micro) -> torch.Tensor:
        if not self.cache_rows or micro.rows is None:
            return self.teacher(micro.images).float()
        if self.cache is not None and bool(self.known[micro.rows].all()):
            return self.cache[micro.rows].to(micro.images.device)
        logits = self.teacher(micro.images).float()
        if self.cache is None:
            if self.cache_rows * logits.shape[1] * 4 > CACHE_BYTES:
                self.cache_rows = 0
                return logits
            self.cache = torch.zeros(self.cache_rows, logits.shape[1])
        self.cache[micro.rows], self.known[micro.rows] = logits.cpu(), True
        return logits

    def on_step(self, step: int, total: int) -> None:
        """Before each step: a teacher that is the student's average takes in the step before."""
        if not self.own or step == 0:
            return
        decay = min(self.cfg.ema, (1 + self.updates) / (10 + self.updates))
        student, teacher = dict(self.student.named_parameters()), dict(self.teacher.named_parameters())
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)(list(teacher.values()), [student[n].detach() for n in teacher], self.updates)
            buffers = dict(self.student.named_buffers())
            for name, buffer in self.teacher.named_buffers():
                buffer.copy_(buffers[name])
        self.updates += 1

    def close(self) -> None:
        """Leave the student as it came, trained."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.seen.clear()
        if hasattr(self.student, PROJECTIONS):
            delattr(self.student, PROJECTIONS)


def kl(logits: torch.Tensor, taught: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² · KL(teacher ‖ student) of softened logits NK: float of shape [N]."""
    target = F.log_softmax(taught.float() / temperature, 1)
    student = F.log_softmax(logits.float() / temperature, 1)
    return F.kl_div(student, target, reduction="none", log_target=True).sum(1) * temperature**2


def feature(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Squared error of features over the teacher's mean square: float of shape [N]."""
    if mine.dim() == 4 and mine.shape[-2:] != theirs.shape[-2:]:
        size = (min(mine.shape[-2], theirs.shape[-2]), min(mine.shape[-1], theirs.shape[-1]))
        mine, theirs = F.adaptive_avg_pool2d(mine, size), F.adaptive_avg_pool2d(theirs, size)
    mine, theirs = mine.float(), theirs.detach().float()
    return (mine - theirs).square().flatten(1).mean(1) / theirs.square().mean().clamp_min(1e-12)


def relational(logits: torch.Tensor, taught: torch.Tensor, valid: int) -> torch.Tensor:
    """Relational distillation (Park et al., arXiv 1904.05068), equations 6 and 9, on the first `valid` rows.

    Huber loss between the distances (over their mean) of each pair, plus ANGLES times that between the angles of each
    triple, the student's against the teacher's.

    Returns:
        float of shape [N]: the mean over the pairs and triples of a row; 0 for rows that are not valid.
    """
    total = logits.new_zeros(len(logits), dtype=torch.float32)
    mine, theirs = logits[:valid].float(), taught[:valid].float()
    if valid < 2:
        return total
    part = F.smooth_l1_loss(_distances(mine), _distances(theirs), reduction="none").mean(1)
    part = part + ANGLES * F.smooth_l1_loss(_angles(mine), _angles(theirs), reduction="none").mean((1, 2))
    return torch.cat([part, total[valid:]])


def _distances(x: torch.Tensor) -> torch.Tensor:
    """Euclidean distances of rows over the mean of those that are not 0: [N, N]."""
    found = ((x[:, None] - x[None]).square().sum(2) + 1e-12).sqrt()
    off = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return found * off / found[off].mean().clamp_min(1e-12)


def _angles(x: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle at i between j and k: [N, N, N], i first."""
    unit = F.normalize(x[None] - x[:, None], dim=2)
    return unit @ unit.transpose(1, 2)


@torch.no_grad()
def outputs(model: nn.Module, run: nn.Module, example: torch.Tensor) -> dict[str, torch.Size]:
    """Shapes of what each module of `model` gives when `run`, which holds it, sees the example.

    Of the modules that are called once, in the order in which they finish.
    """
    shapes: dict[str, torch.Size] = {}
    calls: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: object, out: object) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(out, torch.Tensor):
                shapes[name] = out.shape

        return note

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if n and PROJECTIONS not in n]
    training = run.training
    run.eval()(example)
    run.train(training)
    for handle in handles:
        handle.remove()
    return {name: shape for name, shape in shapes.items() if calls[name] == 1 and "parametrizations" not in name}


def _pairs(wanted: Iterable[str], mine: dict[str, torch.Size], theirs: dict[str, torch.Size]) -> list[tuple[str, str]]:
    """Which output of the student is hinted by which of the teacher."""
    pairs = []
    for text in wanted:
        a, _, b = text.partition("=")
        b = b or a
        for name, known, whose in ((a, mine, "student"), (b, theirs, "teacher")):
            if name not in known:
                near = difflib.get_close_matches(name, known, 3, 0.3) or list(known)[:3]
                raise JobError(f"distill.hint_layers {text}: the {whose} has no {name}; near: {', '.join(near)}")
        if len(mine[a]) != len(theirs[b]):
            raise JobError(
                f"distill.hint_layers {text}: the student gives {tuple(mine[a])[1:]}, the teacher "
                f"{tuple(theirs[b])[1:]}: both must be maps, or both vectors"
            )
        pairs.append((a, b))
    if pairs:
        return pairs
    last = [{tuple(s[2:]): n for n, s in side.items() if len(s) == 4} for side in (mine, theirs)]
    pairs = [(last[0][size], last[1][size]) for size in last[0] if size in last[1]]
    if not pairs:
        raise JobError(
            "distill.hints: student and teacher have no feature maps of the same size; name distill.hint_layers "
            "(STUDENT=TEACHER), or set distill.hints=0"
        )
    return pairs


def _projection(mine: torch.Size, theirs: torch.Size) -> nn.Module:
    if len(mine) == 4:
        return nn.Conv2d(mine[1], theirs[1], 1, bias=False)
    return nn.Linear(mine[1], theirs[1], bias=False)
