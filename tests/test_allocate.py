"""Bits of each layer: the measure of what it loses, and the programme that spends an average."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raydeep.compress import allocate
from raydeep.model import layers, zoo

Losses = dict[str, dict[int, float]]


def net() -> nn.Module:
    torch.manual_seed(0)
    return zoo.build("resnet8", {"width": 4}, 5, (8, 8, 1))


def labelled(rows: int = 48) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 5, (n,), generator=generator))
        for n in (rows // 3, rows - rows // 3)
    ]


# sensitivity


@torch.no_grad()
def test_sensitivity_is_the_rise_of_the_loss_when_one_layer_alone_is_quantized():
    model, batches = net().eval(), labelled()
    found = allocate.sensitivity(model, batches, widths=(2,))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    base = F.cross_entropy(model(images), labels)
    for name, module in layers.compressible(model):
        kept = module.weight.clone()
        module.weight.copy_(layers.WeightQuant(kept, 2)(kept))
        rise = float(F.cross_entropy(model(images), labels) - base)
        module.weight.copy_(kept)
        assert found[name][2] == pytest.approx(max(0.0, rise), abs=1e-6)


def test_sensitivity_is_never_negative_and_never_less_with_fewer_bits():
    found = allocate.sensitivity(net(), labelled())
    assert list(found) == [name for name, _ in layers.compressible(net())]
    for rises in found.values():
        assert list(rises) == [2, 3, 4, 5, 6, 7, 8]
        values = list(rises.values())
        assert values == sorted(values, reverse=True)
        assert values[-1] >= 0
    assert max(rises[2] for rises in found.values()) > 0.01


def test_sensitivity_leaves_the_network_as_it_was():
    model = net().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    allocate.sensitivity(model, labelled(), widths=(2, 8))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(layers.part(m, layers.WeightQuant) is None for _, m in layers.compressible(model))


def test_sensitivity_is_that_of_masked_weights():
    model, plain = net(), net()
    for (_, module), (_, other) in zip(layers.compressible(model), layers.compressible(plain), strict=True):
        mask = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5
        layers.add_mask(module).mask.copy_(mask)
        other.weight.data.mul_(mask)
    assert allocate.sensitivity(model, labelled(), (2, 4)) == allocate.sensitivity(plain, labelled(), (2, 4))


def test_only_so_many_rows_are_looked_at(monkeypatch):
    batches = labelled()
    monkeypatch.setattr(allocate, "ROWS", 20)
    few = [(batches[0][0], batches[0][1]), (batches[1][0][:4], batches[1][1][:4])]
    assert allocate.sensitivity(net(), batches, (3,)) == allocate.sensitivity(net(), few, (3,))


def test_a_loss_that_is_not_finite_counts_as_a_very_bad_one(monkeypatch):
    seen = iter([1.0, 1.5, float("nan"), *[1.0] * 100])
    monkeypatch.setattr(allocate, "_loss", lambda model, batches: next(seen))
    found = allocate.sensitivity(net(), labelled(), (2, 8))
    assert found["conv1"] == {2: allocate.WORST, 8: 0.5}


# allocation


def total(bits: dict[str, int], sizes: dict[str, int]) -> int:
    return sum(sizes[name] * bits[name] for name in sizes)


def by_trial(sizes: dict[str, int], losses: Losses, average: float) -> tuple[float, int]:
    """Least loss, and the fewest bits that give it, of all there are."""
    best = (math.inf, 0)
    for choice in itertools.product(*losses.values()):
        bits = dict(zip(losses, choice, strict=True))
        if total(bits, sizes) <= average * sum(sizes.values()) + 1e-9:
            best = min(best, (sum(losses[name][b] for name, b in bits.items()), total(bits, sizes)))
    return best


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, int], Losses, float]:
    """Sizes, losses that fall with the bits (whole numbers: ties are exact), and an average."""
    count = draw(st.integers(1, 5))
    sizes = {f"layer{i}": draw(st.integers(1, 10 ** draw(st.integers(1, 6)))) for i in range(count)}
    losses = {}
    for name in sizes:
        falls = draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, 1000]), min_size=4, max_size=4))
        losses[name] = {bits: float(sum(falls[bits - 2 :])) for bits in range(2, 6)}
    return sizes, losses, draw(st.floats(2, 5))


@given(problems())
def test_no_choice_within_the_average_loses_less_or_as_little_with_fewer_bits(problem):
    sizes, losses, average = problem
    found = allocate.solve(sizes, losses, average)
    loss = sum(losses[name][bits] for name, bits in found.items())
    assert (loss, total(found, sizes)) == by_trial(sizes, losses, average)


@given(st.integers(0, 10_000))
def test_measured_losses_are_minimised_to_the_last_digits(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = {str(i): int(n) for i, n in enumerate(torch.randint(1, 2_000_000, (4,), generator=generator))}
    losses = {}
    for name in sizes:
        falls = torch.rand(5, dtype=torch.float64, generator=generator) * 10.0 ** -torch.arange(5)
        losses[name] = {b: float(falls[b - 2 :].sum()) for b in range(2, 7)}
    found = allocate.solve(sizes, losses, 3.5)
    loss = sum(losses[name][bits] for name, bits in found.items())
    assert loss == pytest.approx(by_trial(sizes, losses, 3.5)[0], rel=1e-9)


FALLING = {b: 2.0**-b for b in range(2, 9)}


@pytest.mark.parametrize(("average", "expected"), [(2, 2), (3, 3), (8, 8)])
def test_layers_alike_share_alike(average, expected):
    sizes = dict.fromkeys("abc", 100)
    assert allocate.solve(sizes, dict.fromkeys("abc", FALLING), average) == dict.fromkeys("abc", expected)


def test_bits_go_where_the_loss_is():
    losses = {"robust": {b: 0.001 * 2.0**-b for b in range(2, 9)}, "fragile": {b: 10 * 2.0**-b for b in range(2, 9)}}
    assert allocate.solve({"robust": 1000, "fragile": 1000}, losses, 4) == {"robust": 2, "fragile": 6}


def test_bits_that_gain_nothing_are_not_spent():
    flat = dict.fromkeys(range(2, 9), 0.25)
    assert allocate.solve({"a": 10, "b": 10}, {"a": flat, "b": flat}, 8) == {"a": 2, "b": 2}


def test_layers_without_weights_take_nothing():
    assert allocate.solve({"empty": 0, "b": 10}, {"empty": dict.fromkeys(FALLING, 0.0), "b": FALLING}, 4) == {
        "empty": 2, "b": 4,
    }  # fmt: skip


def test_hundred_layers_take_seconds_and_the_same_answer_each_time():
    generator = torch.Generator().manual_seed(0)
    sizes = {str(i): int(n) for i, n in enumerate(torch.randint(500, 2_000_000, (100,), generator=generator))}
    scales = torch.rand(100, generator=generator).tolist()
    losses = {name: {b: s * 3.0**-b for b in range(2, 9)} for name, s in zip(sizes, scales, strict=True)}
    start = time.process_time()
    found = allocate.solve(sizes, losses, 4.0)
    assert time.process_time() - start < 20
    assert found == allocate.solve(sizes, losses, 4.0)
    assert 3.99 < total(found, sizes) / sum(sizes.values()) <= 4.0
