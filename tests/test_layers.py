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
    grid = (quant(weight) / quant.size()[:, None]).detach()
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


@pytest.mark.parametrize("bits", BITS)
def test_steps_have_few_digits_and_no_integer_feels_it(bits):
    torch.manual_seed(bits)
    step = torch.rand(500) * 10.0 ** torch.randint(-6, 3, (500,)) + 1e-7
    quant = layers.WeightQuant(torch.ones(500, 1), bits)
    quant.step.data.copy_(step)
    size = quant.size()
    mantissa, _ = torch.frexp(size)
    assert torch.equal((mantissa * 2 ** (bits + 5)).round(), mantissa * 2 ** (bits + 5))
    assert ((size - step).abs() * quant.qmax <= step / 64 * (1 + 1e-6)).all()


def test_a_step_that_became_negative_acts_by_its_size():
    weight = torch.tensor([[0.5, -1.0, 0.3]])
    quant = layers.WeightQuant(weight, 4)
    before, step = quant(weight).detach(), quant.size()
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


def lsq(
    x: torch.Tensor, step: torch.Tensor, low: int, high: int, scale: float, upstream: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Output, gradient of x, gradient of the step: equations 1 to 3 and section 2.2, operation by operation."""
    x, step, upstream = x.double().requires_grad_(True), step.double().requires_grad_(True), upstream.double()
    size = step.abs().view(-1, *[1] * (x.dim() - 1)) if step.dim() else step.abs()
    size = size * scale + (size * (1 - scale)).detach()
    v = (x / size).clamp(low, high)
    out = (v + (v.round() - v).detach()) * size
    out.backward(upstream)
    return out.detach(), x.grad, step.grad


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("bits", "low"), [(2, 0), (4, 0), (4, -8), (4, -3), (3, -7), (8, -128), (8, 0)])
def test_gradients_of_activations_are_those_of_lsq_in_every_layout_and_precision(bits, low, layout, dtype):
    torch.manual_seed(bits)
    x, upstream = (torch.randn(16, 8, 12, 10, dtype=dtype) for _ in range(2))
    x[0, 0, 0] = 0.0
    quant = layers.ActivationQuant(bits, low, 2.47 / 2**bits)  # no power of 2: inputs of 8 bits would lie on ties
    quant.step.data.neg_()
    if dtype == torch.float64:
        quant.double()
    given = LAYOUTS[layout](x).clone().requires_grad_(True)
    out = quant(given)
    out.backward(upstream)
    assert out.dtype == given.grad.dtype == dtype
    assert quant.step.grad.dtype == quant.step.dtype
    scale = (8 * 12 * 10 * max(quant.high, -low - 1)) ** -0.5
    expected = lsq(x, quant.step.detach(), low, quant.high, scale, upstream)
    rounding = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for found, wanted in zip((out, given.grad, quant.step.grad), expected, strict=True):
        allowed = 0.2 if dtype == torch.bfloat16 and found.dim() == 0 else rounding  # a sum that mostly cancels
        assert (found.detach().double() - wanted).norm() < allowed * wanted.norm()


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (7, 50)], ids=["conv", "linear"])
@pytest.mark.parametrize("bits", BITS)
def test_gradients_of_weights_are_those_of_lsq(bits, shape):
    torch.manual_seed(bits)
    weight = torch.randn(shape).requires_grad_(True)
    quant = layers.WeightQuant(weight, bits)
    quant.step.data.mul_(0.97)  # the largest weight lies on no end of the grid
    quant.step.data[0].neg_()
    upstream = torch.randn(shape)
    out = quant(weight)
    out.backward(upstream)
    size = quant.size() * quant.step.detach().sign()
    expected = lsq(weight.detach(), size, -quant.qmax, quant.qmax, quant.grad_scale, upstream)
    for found, wanted in zip((out.detach(), weight.grad, quant.step.grad), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_step_of_millions_of_values_gets_its_gradient_to_four_digits():
    # of values far larger than the step: round(x/s) - x/s must not be taken from a difference of two large sums
    torch.manual_seed(0)
    x, upstream = torch.rand(64, 16, 32, 32), torch.randn(64, 16, 32, 32)
    quant = layers.ActivationQuant(8, 0, 1 / 250)
    quant(x.requires_grad_(True)).backward(upstream)
    size = quant.step.detach()
    v = (x.detach() / size).double()
    slope = torch.where(v < 255, v.float().round().double() - x.detach().double() / size.double(), 255.0)
    expected = (slope * upstream.double()).sum() * (x[0].numel() * 255) ** -0.5
    torch.testing.assert_close(quant.step.grad.double(), expected, rtol=1e-4, atol=0)


def test_an_input_that_needs_no_gradient_still_teaches_the_step():
    quant = layers.ActivationQuant(4, 0, 0.1)
    quant(torch.rand(4, 5)).sum().backward()
    assert quant.step.grad != 0


def small_quantized(power_of_two: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    for layer, low in ((net[0], -8), (net[3], 0)):
        layers.add_input_quant(layer, 4, low, 0.25, power_of_two)
        layers.add_weight_quant(layer, 4, power_of_two)
    return net


def gradients(net: nn.Module, **kinds: bool) -> dict[str, torch.Tensor]:
    images = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    if kinds.get("channels_last"):
        net, images = (t.to(memory_format=torch.channels_last) for t in (net, images))
    with torch.autocast("cpu", torch.bfloat16, enabled=kinds.get("autocast", False)):
        out = net(images)
    out.float().backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
    return {name.removeprefix("module."): p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize(("kind", "allowed"), [("channels_last", 1e-4), ("autocast", 0.4)])
def test_quantizers_train_under(kind, allowed):
    expected, found = gradients(small_quantized()), gradients(small_quantized(), **{kind: True})
    assert expected.keys() == found.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        if name not in ("0.bias",):  # before BatchNorm: rounding alone
            assert (gradient - expected[name]).norm() < allowed * expected[name].norm(), name


def test_quantizers_train_under_distributed_data_parallel():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = gradients(nn.parallel.DistributedDataParallel(small_quantized()))
    finally:
        dist.destroy_process_group()
    expected = gradients(small_quantized())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_training_and_evaluation_quantize_to_the_same_bits(power_of_two):
    net = small_quantized(power_of_two)
    for layer, x in ((net[0], torch.randn(4, 3, 9, 9)), (net[3], torch.rand(4, 8, 9, 9))):
        weight = layers.raw_weight(layer)
        for quant, given in ((layer.input_quant, x), (layers.part(layer, layers.WeightQuant), weight)):
            with torch.no_grad():
                expected = quant.eval()(given)
            assert torch.equal(quant.train()(given), expected)


# powers of two


def is_power(step: torch.Tensor) -> bool:
    return bool((torch.frexp(step)[0] == 0.5).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_power_of_two_is_exact(dtype):
    steps = torch.logspace(-9, 6, 4001, dtype=dtype)
    found = layers.nearest_power(steps)
    assert is_power(found)
    assert torch.equal(found.double().log2(), steps.double().log2().round())


def test_steps_are_powers_of_two_wherever_they_act_and_learn_straight_through():
    torch.manual_seed(0)
    weight = torch.randn(5, 40)
    quant, plain = layers.WeightQuant(weight, 4, power_of_two=True), layers.WeightQuant(weight, 4)
    assert is_power(quant.step.detach())
    quant.step.data.mul_(1.2)
    plain.step.data.copy_(quant.size())
    assert not is_power(quant.step.detach())
    assert is_power(quant.size())
    assert torch.equal(quant.integers(weight)[1], quant.size())
    for q in (quant, plain):
        q(weight).square().sum().backward()
    assert torch.equal(quant(weight), plain(weight))
    assert torch.equal(quant.step.grad, plain.step.grad)
    act = layers.ActivationQuant(4, 0, 0.3, power_of_two=True)
    assert act.size() == 0.25
    close(act(torch.tensor([0.3, 99.0])), torch.tensor([0.25, 15 * 0.25]))


@pytest.mark.parametrize("bits", BITS)
def test_the_best_power_of_two_is_found(bits):
    torch.manual_seed(bits)
    values = torch.randn(20, 300) * torch.logspace(-3, 3, 20)[:, None]
    high = layers.weight_qmax(bits)
    found = layers.best_step(values, -high, high, power_of_two=True)
    assert is_power(found)
    errors = torch.stack([mse(values, found * 2.0**k, -high, high) for k in (-4, -3, -2, -1, 0, 1, 2)])
    assert (errors[4] <= errors.amin(0) * (1 + 1e-5)).all()


# affine grids


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_an_affine_grid_is_no_worse_than_a_symmetric_one_and_much_better_where_one_side_is_short(bits, power_of_two):
    torch.manual_seed(bits)
    for values, gain in [(nn.functional.hardswish(3 * torch.randn(5000)), 0.7), (torch.randn(5000), 1.0)]:
        low, step = layers.best_affine(values, bits, power_of_two)
        assert -(2**bits) < low <= 0
        assert not power_of_two or is_power(torch.tensor(step))
        ends = layers.activation_range(bits, True)
        symmetric = layers.best_step(values[None], *ends, power_of_two)
        found = mse(values[None], torch.tensor([step]), low, low + 2**bits - 1)
        assert found <= (gain if not power_of_two else 1.0) * mse(values[None], symmetric, *ends) * (1 + 1e-5)


@pytest.mark.parametrize("low", [-15, -11, -8, -3, 0])
def test_values_on_an_affine_grid_are_reproduced(low):
    values = 0.125 * torch.arange(low, low + 16).float()
    assert layers.best_affine(values, 4) == (low, 0.125)


def test_an_affine_grid_of_nothing_but_zeros_keeps_them():
    low, step = layers.best_affine(torch.zeros(10), 4)
    assert torch.equal(layers.ActivationQuant(4, low, step)(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("low", [-15, -9, -1])
def test_an_affine_quantizer_fills_its_range_and_keeps_zero(low):
    quant = layers.ActivationQuant(4, low, 0.5).eval()
    levels = (quant(torch.linspace(-20, 20, 4001)) / 0.5).detach().unique()
    assert levels.tolist() == list(range(low, low + 16))


def test_weight_integers_stay_within_a_bound_that_is_asked_for():
    weight = torch.randn(4, 500)
    quant = layers.WeightQuant(weight, 8, qmax=63)
    assert quant.bits == 8
    assert quant.integers(weight)[0].abs().max() <= 63
    assert layers.WeightQuant(weight, 3, qmax=63).qmax == 3


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


@pytest.mark.parametrize("bits", BITS)
def test_best_step_is_near_that_of_a_fine_search_even_with_an_outlier(bits):
    torch.manual_seed(bits)
    values = torch.randn(3, 800)
    values[1, 5] = 20.0
    high = layers.weight_qmax(bits)
    fine = torch.stack([mse(values, torch.full((3,), s), -high, high) for s in torch.logspace(-3, 1.3, 3000).tolist()])
    assert (mse(values, layers.best_step(values, -high, high), -high, high) <= 1.08 * fine.amin(0)).all()


def test_best_step_of_rows_does_not_depend_on_their_neighbours():
    values = torch.randn(300, 900, generator=torch.Generator().manual_seed(0))  # worked on in several blocks
    assert torch.equal(layers.best_step(values, -7, 7)[250:], layers.best_step(values[250:], -7, 7))


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
