"""Schedules, Muon and averaged weights against torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raydeep.config import Train
from raydeep.train.average import Average
from raydeep.train.optim import Muon, as_matrix, lr_factor, make_optimizer

TOTAL = 100


def factors(warmup: int, **keys: Any) -> list[float]:
    return [lr_factor(step, TOTAL, warmup, Train(**keys)) for step in range(TOTAL)]


def test_one_cycle_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=TOTAL, pct_start=0.3)
    wanted = []
    for _ in range(TOTAL):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert factors(0, schedule="one_cycle") == pytest.approx(wanted, abs=1e-12)
    assert factors(30, schedule="one_cycle") == pytest.approx(wanted, abs=1e-12)


def test_steps_fall_where_they_are_said_to():
    found = factors(10, schedule="step", step_at=[0.3, 0.6], step_factor=0.5)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10:30] == [1.0] * 20
    assert found[30:60] == [0.5] * 30
    assert found[60:] == [0.25] * 40


def test_cosine_rises_linearly_and_ends_near_zero():
    found = factors(10)
    assert found[9] == found[10] == 1.0
    assert found[10:] == sorted(found[10:], reverse=True)
    assert 0 < found[-1] < 1e-3


# Muon


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> list[float]:
    """Train on one batch; the loss before each step."""
    numbers = torch.Generator().manual_seed(1)
    x, y = torch.rand(16, 1, 8, 8, generator=numbers), torch.randint(0, 4, (16,), generator=numbers)
    found = []
    for step in range(first, first + count):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step) * group.get("lr_scale", 1.0)
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


CFG = Train(optimizer="muon", weight_decay=0.01, momentum=0.95, muon_rest=0.5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_muon_trains_inner_kernels_as_torch_trains_their_matrices(channels_last):
    net = network()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    optimizer = make_optimizer(net, CFG, 0.02)
    kernel, matrix = other[3].weight, other[7].weight
    flat = nn.Parameter(as_matrix(kernel.detach()))
    assert flat.data_ptr() == kernel.data_ptr()
    rest = [p for p in other.parameters() if p is not kernel and p is not matrix]
    muon = torch.optim.Muon(
        [flat, matrix], lr=0.02, weight_decay=0.01, momentum=0.95, nesterov=True, adjust_lr_fn="original"
    )
    adam = torch.optim.AdamW(
        [{"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.01},
         {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0}], lr=0.01, fused=True,
    )  # fmt: skip

    class Both:
        param_groups = [*muon.param_groups, *({**g, "lr_scale": 0.5} for g in adam.param_groups)]  # noqa: RUF012

        def step(self) -> None:
            for part, groups in ((muon, self.param_groups[:1]), (adam, self.param_groups[1:])):
                for own, group in zip(part.param_groups, groups, strict=True):
                    own["lr"] = group["lr"]
            gradient = kernel.grad.permute(0, 2, 3, 1) if channels_last else kernel.grad
            flat.grad = gradient.reshape(flat.shape)
            muon.step()
            adam.step()

        def zero_grad(self) -> None:
            other.zero_grad()

    assert steps(net, optimizer, 5) == steps(other, Both(), 5)  # type: ignore[arg-type]
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_muon_leaves_edges_and_depthwise_kernels_to_adamw():
    net = network()
    optimizer = make_optimizer(net, CFG, 0.02)
    steps(net, optimizer, 1)
    by = {name: set(optimizer.state[p]) for name, p in net.named_parameters()}
    muon = {name for name, keys in by.items() if keys == {"momentum_buffer"}}
    assert muon == {"3.weight", "7.weight"}
    assert all("exp_avg" in keys for name, keys in by.items() if name not in muon)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_an_optimizer_lowers_the_loss(optimizer):
    net = network()
    found = steps(net, make_optimizer(net, Train(optimizer=optimizer, momentum=0.9), 0.02), 20)
    assert found[-1] < 0.9 * found[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_state_that_is_put_back_by_parameter_goes_on_bit_identically(optimizer):
    cfg = CFG.model_copy(update={"optimizer": optimizer})
    net = network()
    own = make_optimizer(net, cfg, 0.02)
    steps(net, own, 3)
    other = copy.deepcopy(net)
    again = make_optimizer(other, cfg, 0.02)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        again.state[q] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in own.state[p].items()}
    assert steps(net, own, 3, 3) == steps(other, again, 3, 3)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


# averaged weights


def test_the_average_is_torchs_after_its_first_updates():
    net = network()
    optimizer = make_optimizer(net, Train(), 0.02)
    average = Average(net, 0.5)  # (1 + n) / (10 + n) is above it from the eighth update on
    average.updates = 8
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    theirs.update_parameters(net)  # torch's first update copies
    for _ in range(5):
        steps(net, optimizer, 1)
        average.update()
        theirs.update_parameters(net)
    for name, value in theirs.module.named_parameters():
        assert torch.equal(average.state()[name], value)


def test_a_young_average_follows_closely():
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    average = Average(net, 0.999)
    nn.init.ones_(net.weight)
    average.update()
    assert average.state()["weight"].item() == pytest.approx(0.9)


def test_averaged_weights_go_in_and_out_bit_exactly():
    net = network()
    average = Average(net, 0.9)
    steps(net, make_optimizer(net, Train(), 0.02), 3)
    average.update()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}

    def run() -> None:
        with average.applied():
            assert all(torch.equal(p, average.state()[name]) for name, p in net.named_parameters())
            assert not torch.equal(net[0].weight, before["0.weight"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    average.keep()
    assert all(torch.equal(p, average.state()[name]) for name, p in net.named_parameters())


# short trainings, layouts, state from elsewhere

LAYOUTS = [torch.contiguous_format, torch.channels_last]
OPTIMIZERS = ["sgd", "adamw", "muon"]


def layers(layout: torch.memory_format = torch.contiguous_format) -> nn.Sequential:
    """Every kind of layer: a stem, an inner kernel, a depthwise and a 1 × 1 one, norms, a matrix, a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 10, 1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 5),
    ).to(memory_format=layout)  # fmt: skip


def rows(seed: int = 0, count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures N × 1 × 8 × 8 of five classes: noise about a picture of each."""
    labels = torch.arange(count) % 5
    centres = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 0.5 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), labels


def config(**keys: Any) -> Train:
    return Train(**{"weight_decay": 0.01, **keys})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, lr: float | None = None) -> list[float]:
    losses = []
    for step in steps:
        for group in optimizer.param_groups if lr is not None else []:  # as the loop does it
            group["lr"] = lr * lr_factor(step, 20, 3) * group.get("lr_scale", 1.0)
        images, labels = rows(step)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def torch_one_cycle(total: int, share: float) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = OneCycleLR(optimizer, max_lr=1.0, total_steps=total, pct_start=share, final_div_factor=1e4)
    factors = []
    for _ in range(total):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step() if len(factors) < total else None
    return factors


@pytest.mark.parametrize(("total", "warmup", "share"), [(100, 0, 0.3), (37, 0, 0.3), (100, 20, 0.2), (40, 20, 0.5)])
def test_one_cycle_is_that_of_torch(total, warmup, share):
    cfg = config(schedule="one_cycle")
    found = [lr_factor(step, total, warmup, cfg) for step in range(total)]
    assert found == pytest.approx(torch_one_cycle(total, share), rel=0, abs=1e-12)
    assert found[0] == pytest.approx(1 / 25)
    assert found[-1] == pytest.approx(1 / 25e4)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle", "step"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (7, 3), (50, 0), (50, 25)])
def test_however_short_a_training_some_step_is_near_the_peak_and_none_above(schedule, total, warmup):
    factors = [lr_factor(step, total, warmup, config(schedule=schedule)) for step in range(total)]
    assert 0.95 < max(factors) <= 1
    assert min(factors) > 0


def test_the_rate_falls_at_each_share_of_the_training():
    cfg = config(schedule="step", step_at=(0.55, 0.7), step_factor=0.5)  # 0.55 × 100 > 55 in floating point
    factors = [lr_factor(step, 100, 10, cfg) for step in range(100)]
    assert factors == pytest.approx([(i + 1) / 10 for i in range(10)] + [1] * 45 + [0.5] * 15 + [0.25] * 30)
    assert lr_factor(7, 10, 0, cfg) == pytest.approx(0.25)


@pytest.mark.parametrize(("name", "lr"), [("sgd", 0.5), ("adamw", 0.02), ("muon", 0.1)])
def test_a_training_repeats_bit_for_bit_and_learns(name, lr):
    cfg = config(optimizer=name)
    runs = []
    for _ in range(2):
        model = layers()
        losses = train(model, make_optimizer(model, cfg, lr), range(20), lr=lr)
        runs.append((model, losses))
    assert runs[0][1] == runs[1][1]
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1][-1] < 0.9 * runs[0][1][0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_assigned_state_continues_bit_for_bit(name, layout):
    """The copies are contiguous, whatever the layout of the network, as those from a file are."""
    cfg = config(optimizer=name)
    whole, half = layers(layout), layers(layout)
    train(whole, make_optimizer(whole, cfg, 0.02), range(10), lr=0.02)
    before = make_optimizer(half, cfg, 0.02)
    train(half, before, range(5), lr=0.02)
    saved = {
        key: {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in before.state.get(p, {}).items()}
        for key, p in half.named_parameters()
    }
    assert all(saved.values())
    assert all(
        v.shape == half.get_parameter(key).shape for key, s in saved.items() for k, v in s.items() if k != "step"
    )
    again = layers(layout)
    again.load_state_dict(half.state_dict())
    after = make_optimizer(again, cfg, 0.02)
    for key, parameter in again.named_parameters():
        after.state[parameter] = saved[key]
    train(again, after, range(5, 10), lr=0.02)
    assert same(again, whole)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_dict_continues_bit_for_bit(name):
    cfg = config(optimizer=name)
    whole, half = layers(), layers()
    train(whole, make_optimizer(whole, cfg, 0.02), range(10))
    before = make_optimizer(half, cfg, 0.02)
    train(half, before, range(5))
    again = copy.deepcopy(half)
    after = make_optimizer(again, cfg, 0.5)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(again, after, range(5, 10))
    assert same(again, whole)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_layout_of_gradients_and_state_changes_nothing(name):
    """The fused kernels of the CPU walk through memory without regard to strides."""
    model, plain = layers(torch.channels_last), layers()
    mine, other = (make_optimizer(m, config(optimizer=name), 0.1) for m in (model, plain))
    numbers = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=numbers)
            p.grad = q.grad.clone()
        mine.step()
        other.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_kernels_are_used_and_compute_the_same(name):
    model, plain = layers().double(), layers().double()
    mine = make_optimizer(model, config(optimizer=name), 0.05)
    assert mine.defaults["fused"]
    other = make_optimizer(plain, config(optimizer=name), 0.05)
    for group in other.param_groups:
        group["fused"] = False
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    for _ in range(3):
        mine.step()
        other.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)


def test_muon_trains_the_inner_weights_and_adamw_the_rest_at_its_own_rate():
    model = layers()
    rest = copy.deepcopy(model)
    optimizer = make_optimizer(model, config(optimizer="muon", muon_rest=0.25), 0.02)
    assert isinstance(optimizer, Muon)
    names = {p: name for name, p in model.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    assert groups[0] == ["3.weight", "6.weight", "9.weight"]
    assert groups[1] == ["0.weight", "5.weight", "11.weight"]  # the first, depthwise, the last
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.01, 0]
    assert [g["lr"] for g in optimizer.param_groups] == [0.02, 0.005, 0.005]
    assert [g.get("lr_scale") for g in optimizer.param_groups] == [None, 0.25, 0.25]
    adamw = make_optimizer(rest, config(optimizer="adamw"), 0.005)
    for p, q in zip(model.parameters(), rest.parameters(), strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    adamw.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, rest.get_parameter(name)) == (name not in groups[0]), name


def test_the_first_layer_is_not_taken_for_a_class_token():
    model = nn.Module()
    model.token = nn.Parameter(torch.randn(1, 1, 6))
    model.stem, model.inner, model.head = nn.Conv2d(3, 6, 2), nn.Linear(6, 6), nn.Linear(6, 3)
    optimizer = make_optimizer(model, config(optimizer="muon"), 0.02)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(model.inner.weight)]


def test_muon_does_without_inner_weights():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    losses = train(model, make_optimizer(model, config(optimizer="muon"), 0.1), range(10))
    assert losses[-1] < losses[0]


def test_muon_follows_parameters_whose_memory_moved_and_keeps_no_gradient():
    model, moved = layers(), layers()
    one, other = (make_optimizer(m, config(optimizer="muon"), 0.02) for m in (model, moved))
    for p in moved.parameters():
        p.data = p.data.clone()
    train(model, one, range(3))
    train(moved, other, range(3))
    assert same(model, moved)
    assert isinstance(other, Muon)
    assert all(view.grad is None for view in other.views.values())


def walk(model: nn.Module, average: Average, steps: range, others: list[AveragedModel] | None = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        images, labels = rows(step)
        F.cross_entropy(model(images.to(next(model.parameters()).dtype)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        for other in others or []:
            other.update_parameters(model)


def test_the_average_is_that_of_torch():
    model = layers().double()
    average = Average(model, 0.8)
    average.updates = 1000  # past the warm-up of the decay
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    reference.n_averaged += 1  # it starts as ours does, from the weights before the first step
    walk(model, average, range(6), [reference])
    with average.applied():
        assert same(model, reference.module)  # buffers too: BatchNorm's statistics are the network's
    assert not same(model, reference.module)


def test_the_decay_warms_up():
    """After n updates the start weighs the product of (1 + i) / (10 + i), i < n, not decay to the n."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    average = Average(model, 0.5)
    nn.init.constant_(model.weight, 0.0)
    share = 1.0
    for i in range(20):
        average.update()
        share *= min(0.5, (1 + i) / (10 + i))
        assert average.state()["weight"].item() == pytest.approx(share, rel=1e-12)
    assert average.updates == 20


def test_an_average_goes_on_where_it_was():
    whole, half = layers(), layers()
    one, first = Average(whole, 0.9), Average(half, 0.9)
    walk(whole, one, range(6))
    walk(half, first, range(3))
    again = copy.deepcopy(half)
    nn.init.zeros_(again[3].weight)
    second = Average(again, 0.9)
    again.load_state_dict(half.state_dict())
    second.load({key: value.clone() for key, value in first.state().items()}, first.updates)
    walk(again, second, range(3, 6))
    assert second.updates == one.updates == 6
    assert all(torch.equal(second.state()[key], value) for key, value in one.state().items())


def test_an_average_of_another_network_is_refused():
    average = Average(layers(), 0.9)
    with pytest.raises(AssertionError):
        average.load({"0.weight": torch.zeros(8, 1, 3, 3)}, 1)


def test_the_second_name_of_a_tied_weight_is_averaged_too():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight

    net = Tied()
    average = Average(net, 0.9)
    nn.init.ones_(net.one.weight)
    average.update()
    found = average.state()
    assert found.keys() == {"one.weight", "two.weight"}
    assert torch.equal(found["one.weight"], found["two.weight"])
    assert not torch.equal(found["one.weight"], net.one.weight)
    other = Average(net, 0.9)
    other.load({key: value.clone() for key, value in found.items()}, 1)
    assert torch.equal(other.state()["two.weight"], found["one.weight"])
