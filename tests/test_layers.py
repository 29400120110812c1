"""Masks and learned-step quantizers: their grids, their gradients, their first steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raydeep.model import layers

BITS = range(2, 9)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", BITS)
def test_quantized_weights_lie_on_a_symmetric_grid_of_2_to_the_bits_less_1_levels(bits):
    line = torch.linspace(-1, 1, 2049)
    weight = torch.stack([line, 0.01 * line])
    quant = layers.WeightQuant(weight, bits)
    grid = (quant(weight) / quant.step[:, None]).detach()
    close(grid, grid.round())
    for row in grid.round():
        levels = row.unique()
        assert len(levels) == 2**bits - 1
        assert torch.equal(levels, -levels.flip(0))


@pytest.mark.parametrize("bits", BITS)
def test_weights_beyond_the_grid_are_clipped_to_its_ends(bits):
    quant = layers.WeightQuant(torch.ones(1, 3), bits)
    quant.step.data.fill_(0.5)
    integers, _ = quant.integers(torch.tensor([[-1e6, 0.0, 1e6]]))
    assert integers.tolist() == [[-(2 ** (bits - 1) - 1), 0, 2 ** (bits - 1) - 1]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 7)], ids=["conv", "linear"])
def test_integers_times_step_are_the_quantized_weight(bits, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    quant = layers.WeightQuant(weight, bits)
    integers, step = quant.integers(weight)
    assert integers.dtype == torch.int8
    assert step.shape == shape[:1]
    close(integers * step.view(-1, *[1] * (len(shape) - 1)), quant(weight))


def test_a_step_that_became_negative_acts_by_its_size():
    weight = torch.tensor([[0.5, -1.0, 0.3]])
    quant = layers.WeightQuant(weight, 4)
    before, step = quant(weight).detach(), quant.step.detach().clone()
    quant.step.data.neg_()
    close(quant(weight).detach(), before)
    close(quant.integers(weight)[1], step)


def test_a_channel_of_zeros_stays_zero_and_finite():
    quant = layers.WeightQuant(torch.zeros(2, 4), 4)
    assert torch.equal(quant(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_gradient_passes_straight_through_inside_the_grid_and_stops_outside():
    quant = layers.WeightQuant(torch.ones(1, 4), 3)  # grid -3..3
    quant.step.data.fill_(0.5)
    weight = torch.tensor([[0.2, -1.4, 1.6, -9.0]], requires_grad=True)
    upstream = torch.tensor([[2.0, 3.0, 5.0, 7.0]])
    quant(weight).backward(upstream)
    close(weight.grad, torch.tensor([[2.0, 3.0, 0.0, 0.0]]))


def test_step_gradient_of_weights_is_that_of_lsq():
    # arXiv 1902.08153, equation 3: d v̂/d s = round(v/s) - v/s inside, -Q or Q outside; times 1/sqrt(N Q)
    quant = layers.WeightQuant(torch.ones(2, 3), 3)  # Q = 3, N = 3 weights a channel
    quant.step.data.copy_(torch.tensor([0.5, 0.25]))
    upstream = torch.tensor([[1.0, 2.0, 3.0], [1.0, -1.0, 0.5]])
    quant(torch.tensor([[0.7, -0.2, 4.0], [-0.3, -2.0, 0.1]])).backward(upstream)
    inside = [[1 - 1.4, 0 + 0.4, 3.0], [-1 + 1.2, -3.0, 0 - 0.4]]
    expected = (torch.tensor(inside) * upstream).sum(1) / (3 * 3) ** 0.5
    close(quant.step.grad, expected)


@pytest.mark.parametrize(
    ("signed", "expected"),
    [
        # grids 0..7 and -4..3, step 0.5; inside round(x/s) - x/s, outside the end of the grid
        (False, [1 - 1.4, 0.0, 7.0, 2 - 2.2]),
        (True, [1 - 1.4, -4.0, 3.0, 2 - 2.2]),
    ],
)
def test_step_gradient_of_activations_is_that_of_lsq(signed, expected):
    quant = layers.ActivationQuant(3, layers.activation_range(3, signed)[0], 0.5).train()
    x = torch.tensor([[0.7, -9.0], [9.0, 1.1]], requires_grad=True)  # 2 rows of N = 2 values
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    quant(x).backward(upstream)
    high = 3 if signed else 7
    total = (torch.tensor(expected) * upstream.flatten()).sum() / (2 * high) ** 0.5
    close(quant.step.grad, total)
    close(x.grad, torch.tensor([[1.0, 0.0], [0.0, 4.0]]))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [False, True])
def test_quantized_activations_fill_their_range_and_no_more(bits, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    quant = layers.ActivationQuant(bits, low, 0.5).eval()
    levels = (quant(torch.linspace(-200, 200, 4001)) / 0.5).detach().unique()
    assert levels.tolist() == list(range(low, high + 1))


def test_activations_are_quantized_alike_in_training_and_evaluation():
    x = torch.randn(8, 16)
    quant = layers.ActivationQuant(4, -8, 0.3)
    close(quant.train()(x), quant.eval()(x))


def mse(values: torch.Tensor, step: torch.Tensor, low: int, high: int) -> torch.Tensor:
    step = step[:, None]
    return ((values / step).round().clamp(low, high) * step - values).square().mean(1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [False, True])
def test_best_step_is_no_worse_than_min_max_and_better_with_long_tails(bits, signed):
    torch.manual_seed(bits)
    low, high = layers.activation_range(bits, signed)
    values = torch.cat([torch.randn(4, 500), torch.distributions.Laplace(0.0, 1.0).sample((4, 500))])
    if not signed:
        values = values.relu()
    top = values.amax(1) / high
    if signed:
        top = torch.maximum(top, values.amin(1) / low)
    found = mse(values, layers.best_step(values, low, high), low, high)
    minmax = mse(values, top, low, high)
    assert (found <= minmax * (1 + 1e-5)).all()
    if bits <= 3:
        assert (found[4:] < 0.95 * minmax[4:]).all()


def test_best_step_of_values_on_a_grid_finds_the_grid():
    values = 0.125 * torch.arange(-7, 8).float()[None]
    close(layers.best_step(values, -7, 7), torch.tensor([0.125]))


def masked_and_quantized(zero: torch.Tensor) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    layers.add_mask(layer).mask.copy_(~zero)
    layers.add_weight_quant(layer, 4)
    return layer


def test_masked_weights_stay_zero_through_quantization_and_optimizer_steps():
    zero = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    layer = masked_and_quantized(zero)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    before = layer.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
        assert (layer.weight[zero] == 0).all()
    assert not torch.equal(layer.weight[~zero], before[~zero])


def test_masked_weights_get_no_gradient():
    zero = torch.zeros(4, 6, dtype=torch.bool)
    zero[1] = True
    layer = masked_and_quantized(zero)
    layer(torch.randn(8, 6)).square().sum().backward()
    gradient = layers.raw_weight(layer).grad
    assert (gradient[1] == 0).all()
    assert (gradient[0] != 0).any()


def test_parts_of_a_layer_are_found_by_kind():
    plain, layer = nn.Linear(6, 4), masked_and_quantized(torch.zeros(4, 6, dtype=torch.bool))
    assert isinstance(layers.part(layer, layers.Mask), layers.Mask)
    assert layers.part(layer, layers.WeightQuant).bits == 4
    assert layers.part(plain, layers.Mask) is None
    assert layers.raw_weight(plain) is plain.weight


def test_input_quantizer_acts_on_what_the_layer_reads():
    layer = nn.Linear(3, 2, bias=False)
    layers.add_input_quant(layer, 2, 0, 1.0)
    x = torch.tensor([[0.4, 1.6, 99.0]])
    close(layer(x), torch.tensor([[0.0, 2.0, 3.0]]) @ layer.weight.T)


def test_compressible_layers_come_in_the_order_of_definition():
    inner = nn.Sequential(nn.Linear(2, 2))
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), inner, nn.Linear(2, 2))
    assert [name for name, _ in layers.compressible(net)] == ["0", "2.0", "3"]
