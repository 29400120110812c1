"""Schedules, Muon and averaged weights against torch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raydeep.config import Train
from raydeep.train.average import Average
from raydeep.train.optim import as_matrix, lr_factor, make_optimizer

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
