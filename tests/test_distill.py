"""Distillation: the losses against their formulas, hints, averages, the cache, and teachers of every kind."""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raydeep.compress import distill, teachers
from raydeep.config import Augment, Distill, Job, Train, parse_sets
from raydeep.data.augment import Augmenter
from raydeep.data.batches import Batches, Micro
from raydeep.data.resident import Dataset, Pixels
from raydeep.errors import JobError, ModelError
from raydeep.model import artifact, zoo
from raydeep.train import losses
from raydeep.train.loop import fit

CE = losses.cross_entropy()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 3))


def micro_batch(valid: int = 4) -> Micro:
    torch.manual_seed(9)
    return Micro(torch.randn(4, 1, 3, 3), torch.tensor([0, 1, 2, 1]), valid)


def loss_of(cfg: Distill, teacher: nn.Module | None = None, student: nn.Module | None = None) -> distill.Distilled:
    return distill.Distilled(CE, student or linear(1), teacher or linear(), cfg)


def test_logits_loss_is_the_formula_of_the_paper():
    teacher, micro, logits = linear(), micro_batch(), torch.randn(4, 3)
    found = loss_of(Distill(enabled=True, weight=0.3, temperature=2.5), teacher)(logits, micro)
    p = (teacher(micro.images) / 2.5).softmax(1)
    q = (logits / 2.5).softmax(1)
    divergence = (p * (p / q).log()).sum(1)
    hard = -logits.log_softmax(1)[range(4), micro.labels]
    close(found, (0.7 * hard + 0.3 * 2.5**2 * divergence).detach())


def test_weight_zero_is_the_loss_itself():
    micro, logits = micro_batch(), torch.randn(4, 3)
    assert torch.equal(loss_of(Distill(enabled=True, weight=0.0))(logits, micro), CE(logits, micro))


def test_the_teacher_learns_nothing_and_runs_in_evaluation_mode():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(9, 3), nn.BatchNorm1d(3)).train()
    student, micro = linear(1), micro_batch()
    loss_of(Distill(enabled=True, weight=1.0), teacher, student)(student(micro.images), micro).sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(teacher[2].running_mean, torch.zeros(3))
    assert student[1].weight.grad.abs().sum() > 0


def huber(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 1, x.square() / 2, x.abs() - 0.5)


def test_relational_loss_is_that_of_pairs_and_triples_by_hand():
    torch.manual_seed(3)
    mine, theirs = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)

    def distances(x: torch.Tensor) -> torch.Tensor:
        d = torch.tensor([[(a - b).norm() for b in x] for a in x], dtype=torch.float64)
        return d / (d.sum() / (5 * 4))

    def angle(x: torch.Tensor, i: int, j: int, k: int) -> torch.Tensor:
        a, b = x[j] - x[i], x[k] - x[i]
        return torch.zeros((), dtype=torch.float64) if i in (j, k) else (a @ b) / (a.norm() * b.norm())

    by_distance = huber(distances(mine) - distances(theirs)).mean(1)
    by_angle = torch.stack([
        torch.stack([huber(angle(mine, i, j, k) - angle(theirs, i, j, k)) for j in range(5) for k in range(5)]).mean()
        for i in range(5)
    ])  # fmt: skip
    close(distill.relational(mine, theirs, 5).double(), by_distance + 2 * by_angle)


def test_relational_loss_does_not_see_rows_that_do_not_count():
    mine, theirs = torch.randn(6, 3), torch.randn(6, 3)
    found = distill.relational(mine, theirs, 4)
    close(found[:4], distill.relational(mine[:4], theirs[:4], 4))
    assert found[4:].tolist() == [0.0, 0.0]
    assert distill.relational(mine, theirs, 1).tolist() == [0.0] * 6


def test_relational_loss_has_a_finite_gradient_where_rows_are_equal():
    mine = torch.ones(4, 3, requires_grad=True)
    distill.relational(mine, torch.randn(4, 3), 4).sum().backward()
    assert torch.isfinite(mine.grad).all()


def resnets() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    student = zoo.build("resnet8", {"width": 4}, 3, (16, 16, 1))
    return student, zoo.build("resnet20", {"width": 8}, 3, (16, 16, 1)), torch.randn(4, 1, 16, 16)


def test_hints_pair_the_last_maps_of_each_resolution_and_projections_learn():
    student, teacher, images = resnets()
    before = set(student.state_dict())
    cfg = Distill(enabled=True, weight=0.0, hints=2.0)
    loss = distill.Distilled(CE, student, teacher, cfg).hint(images)
    sizes = [distill.outputs(student, student, images)[a] for a, _ in loss.pairs]
    assert [tuple(s[1:]) for s in sizes] == [(4, 16, 16), (8, 8, 8), (16, 4, 4), (16, 1, 1)]
    micro = Micro(images, torch.tensor([0, 1, 2, 0]), 4)
    logits = student(images)
    found = loss(logits, micro)
    expected = CE(logits, micro)
    maps = {}
    handles = [
        net.get_submodule(name).register_forward_hook(lambda m, i, out, key=(side, name): maps.__setitem__(key, out))
        for a, b in loss.pairs for side, net, name in ((0, student, a), (1, teacher, b))
    ]  # fmt: skip
    student(images), teacher(images)
    projections = getattr(student, distill.PROJECTIONS)
    for (a, b), project in zip(loss.pairs, projections, strict=True):
        theirs = maps[1, b]
        expected = expected + 2 * (project(maps[0, a]) - theirs).square().mean((1, 2, 3)) / theirs.square().mean()
    close(found, expected.detach())
    found.sum().backward()
    assert all(p.weight.grad.abs().sum() > 0 for p in projections)
    for handle in handles:
        handle.remove()
    loss.close()
    assert set(student.state_dict()) == before
    assert not any(m._forward_hooks for net in (student, teacher) for m in net.modules())


def test_hints_of_different_sizes_meet_at_the_smaller_one():
    mine, theirs = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)
    close(distill.feature(mine, theirs), distill.feature(F.avg_pool2d(mine, 2), theirs))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("blocks.9",), "distill.hint_layers blocks.9: the student has no blocks.9; near: blocks."),
        (("blocks.1=blocks.99",), "distill.hint_layers blocks.1=blocks.99: the teacher has no blocks.99"),
        (("fc=blocks.1",), "the student gives (3,), the teacher (8, 16, 16): both must be maps"),
    ],
)
def test_hint_layers_that_do_not_exist_or_fit_are_named(layers, message):
    student, teacher, images = resnets()
    loss = distill.Distilled(CE, student, teacher, Distill(enabled=True, hints=1.0, hint_layers=layers))
    with pytest.raises(JobError, match=re.escape(message)):
        loss.hint(images)


def test_networks_without_maps_need_named_hints():
    cfg = Distill(enabled=True, hints=1.0)
    student, teacher = linear(1), linear()
    with pytest.raises(JobError, match="student and teacher have no feature maps of the same size"):
        distill.Distilled(CE, student, teacher, cfg).hint(torch.randn(2, 1, 3, 3))
    named = cfg.model_copy(update={"hint_layers": ("1",)})
    loss = distill.Distilled(CE, student, teacher, named).hint(torch.randn(2, 1, 3, 3))
    assert isinstance(getattr(student, distill.PROJECTIONS)[0], nn.Linear)
    micro = micro_batch()
    loss(student(micro.images), micro).sum().backward()  # a Sequential runs through what was added to it
    assert getattr(student, distill.PROJECTIONS)[0].weight.grad.abs().sum() > 0
    loss.close()


def test_the_average_follows_the_student_by_its_decay():
    student = linear(1)
    loss = distill.Distilled(CE, student, None, Distill(enabled=True, teacher="ema", ema=0.5))
    first = student[1].weight.detach().clone()
    loss.on_step(0, 10)  # nothing is done yet
    close(loss.teacher[1].weight, first)
    expected = first
    for step in range(1, 4):
        with torch.no_grad():
            student[1].weight += 1
        loss.on_step(step, 10)
        decay = min(0.5, step / (9 + step))
        expected = decay * expected + (1 - decay) * student[1].weight.detach()
        close(loss.teacher[1].weight, expected)
    assert not loss.teacher[1].weight.requires_grad


class Counting(nn.Module):
    """Counts the rows that it sees."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.rows = net, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows += len(x)
        return self.net(x)


def pixels(rows: int, seed: int = 0) -> Pixels:
    rng = np.random.default_rng(seed)
    return Pixels(rng.integers(0, 256, (rows, 3, 3, 1), np.uint8), rng.integers(0, 3, rows))


def dataset() -> Dataset:
    return Dataset(pixels(40), pixels(8, 1), pixels(8, 2), ["a", "b", "c"], [0.5], [0.25])


def trained(job: Job, teacher: nn.Module, data: Dataset, epochs: int) -> dict[str, torch.Tensor]:
    student = linear(5)
    loss = teachers.distilled(job, CE, student, teacher, data, "cpu")
    batches = Batches(data.train, Augmenter(job.augment, data.mean, data.std), 8, 0)
    cfg = Train(epochs=epochs, batch_size=8, lr=0.1, warmup_epochs=0)
    fit(student, loss, batches, cfg, on_step=loss.on_step)
    return student.state_dict()


def test_logits_of_pictures_that_never_change_are_asked_for_once():
    data, job = dataset(), Job(distill=Distill(enabled=True), augment=Augment())
    counted = Counting(linear())
    with_cache = trained(job, counted, data, epochs=5)
    assert counted.rows == len(data.train.labels)
    always = distill.Distilled(CE, student := linear(5), linear(), job.distill)
    fit(student, always, Batches(data.train, Augmenter(job.augment, data.mean, data.std), 8, 0),
        Train(epochs=5, batch_size=8, lr=0.1, warmup_epochs=0))  # fmt: skip
    assert student.state_dict().keys() == with_cache.keys()
    for key, value in student.state_dict().items():
        close(with_cache[key], value)


def test_augmented_pictures_are_shown_to_the_teacher_each_time():
    data, job = dataset(), Job(distill=Distill(enabled=True), augment=Augment(horizontal_flip=0.5))
    counted = Counting(linear())
    trained(job, counted, data, epochs=3)
    assert counted.rows == 3 * len(data.train.labels)


# teachers


def spec_of(name: str, shape: tuple[int, int, int], classes: list[str], mean: float, std: float) -> dict[str, Any]:
    return artifact.make_spec(name, {}, classes, shape, [mean] * shape[2], [std] * shape[2])


def saved(folder: Any, spec: dict[str, Any]) -> nn.Module:
    torch.manual_seed(1)
    model = artifact.build(spec).eval()
    folder.mkdir(parents=True)
    artifact.save_model(folder, *artifact.freeze(model, spec, fold=False))
    artifact.write_sums(folder)
    return model


CLASSES = ["cat", "dog", "owl"]


def test_a_teacher_of_another_normalisation_sees_the_pictures_as_it_knows_them(tmp_path):
    theirs = spec_of("resnet8", (16, 16, 1), CLASSES, 0.3, 0.2)
    model = saved(tmp_path / "run" / "models" / "dense", theirs)
    mine = spec_of("seed", (16, 16, 1), CLASSES, 0.5, 0.4)
    teacher = teachers.load(Distill(enabled=True, teacher=str(tmp_path / "run")), mine)
    raw = torch.rand(4, 1, 16, 16)
    close(teacher((raw - 0.5) / 0.4), model((raw - 0.3) / 0.2))


def test_a_teacher_of_larger_colour_pictures_takes_small_grey_ones(tmp_path):
    theirs = spec_of("resnet8", (32, 32, 3), CLASSES, 0.5, 0.5)
    model = saved(tmp_path / "m", theirs)
    mine = spec_of("seed", (16, 16, 1), CLASSES, 0.5, 0.5)
    teacher = teachers.load(Distill(enabled=True, teacher=str(tmp_path / "m")), mine)
    x = torch.randn(2, 1, 16, 16)
    close(teacher(x), model(F.interpolate(x.expand(-1, 3, -1, -1), (32, 32), mode="bilinear", antialias=True)))


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    saved(tmp_path / "m", spec_of("resnet8", (16, 16, 1), CLASSES, 0.5, 0.5))
    other = spec_of("seed", (16, 16, 1), ["cat", "dog"], 0.5, 0.5)
    cfg = Distill(enabled=True, teacher=str(tmp_path / "m"))
    with pytest.raises(ModelError, match=r"has other classes \(3: cat, dog, owl\) than the data \(2: cat, dog\)"):
        teachers.load(cfg, other)
    assert teachers.load(cfg.model_copy(update={"weight": 0.0, "relational": 1.0}), other) is not None
    colour = spec_of("seed", (16, 16, 3), CLASSES, 0.5, 0.5)
    with pytest.raises(ModelError, match="takes grey pictures, the data has colours"):
        teachers.load(cfg, colour)
    with pytest.raises(ModelError, match="neither a run with models/dense nor a model folder"):
        teachers.load(cfg.model_copy(update={"teacher": str(tmp_path / "nothing")}), other)
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    with pytest.raises(ModelError, match=r"model\.safetensors: missing or changed"):
        teachers.load(cfg, other)


@pytest.mark.parametrize("name", ["torchvision:resnet18@NOPE", "torchvision:resnet1800"])
def test_unknown_weights_of_torchvision_are_named(name):
    with pytest.raises(ModelError, match="torchvision has no such network or weights"):
        teachers.load(Distill(enabled=True, teacher=name), spec_of("seed", (16, 16, 1), CLASSES, 0.5, 0.5))


def test_torchvision_teachers_need_other_than_logits_for_other_classes(monkeypatch):
    from torchvision import models

    monkeypatch.setattr(models, "get_model", lambda name, weights: models.resnet18(weights=None))
    spec = spec_of("seed", (16, 16, 3), CLASSES, 0.5, 0.5)
    cfg = Distill(enabled=True, teacher="torchvision:resnet18@DEFAULT")
    with pytest.raises(ModelError, match=r"has other classes \(1000: tench, .*set distill.weight=0"):
        teachers.load(cfg, spec)
    teacher = teachers.load(cfg.model_copy(update={"weight": 0.0, "hints": 1.0}), spec)
    assert teacher(torch.randn(2, 3, 16, 16)).shape == (2, 1000)


def test_a_worker_loads_its_teacher_from_what_it_is_sent(tmp_path):
    spec = spec_of("lenet_300_100", (3, 3, 1), CLASSES, 0.5, 0.25)
    model = saved(tmp_path / "m", spec)
    job = Job(distill=Distill(enabled=True, teacher=str(tmp_path / "m")))
    sent = pickle.loads(pickle.dumps(teachers.OnWorker(job, spec)))
    loss = sent(CE, linear(5), dataset(), torch.device("cpu"))
    micro, logits = micro_batch(), torch.randn(4, 3)
    expected = 0.3 * CE(logits, micro) + 0.7 * distill.kl(logits, model(micro.images), 4.0)
    close(loss(logits, micro), expected.detach())


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["distill.teacher=ema", "scaling.strategy=fsdp"], "distill.teacher ema needs scaling.strategy ddp"),
        (["distill.teacher=RUN", "distill.hints=1", "train.compile=true"], "distill.hints needs train.compile false"),
    ],
)
def test_training_with_a_teacher_is_checked_with_the_job(sets, message):
    with pytest.raises(JobError, match=message):
        parse_sets({}, ["distill.enabled=true", *sets])
