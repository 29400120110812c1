"""Quantizers in a network: where they go, what is mended without training, and that the frozen model agrees."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raydeep.compress import adaround, observe, prune, quantize
from raydeep.config import Prune, Quantize
from raydeep.fields import Average
from raydeep.model import artifact, layers

SHAPE = (12, 12, 2)

DEPTHWISE = """
import torch
from torch import nn

class Depthwise(nn.Module):
    def __init__(self, classes, depth):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(depth, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.deep, self.bn_deep = nn.Conv2d(6, 12, 3, padding=1, groups=6), nn.BatchNorm2d(12)
        self.point, self.bn_point = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.act, self.fc = nn.Hardswish(), nn.Linear(8, classes)

    def forward(self, x):
        x = self.act(self.bn(self.stem(x)))
        x = self.act(self.bn_deep(self.deep(x)))
        return self.fc(self.bn_point(self.point(x)).mean((2, 3)))

def depthwise(num_classes, in_channels, image_size):
    return Depthwise(num_classes, in_channels)
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with a depthwise network, importable as own_depthwise."""
    (tmp_path / "own_depthwise.py").write_text(DEPTHWISE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_depthwise", raising=False)


NETS: dict[str, dict[str, Any]] = {"resnet8": {"width": 4}, "own_depthwise:depthwise": {}, "seed": {"width": 4}}


def make(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network in evaluation mode, its BatchNorms far from where they start, and its spec."""
    torch.manual_seed(0)
    spec = artifact.make_spec(name, NETS[name], list("abcde"), SHAPE, [0.5] * 2, [0.25] * 2)
    model = artifact.build(spec).eval()
    for norm in norms(model):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model, spec


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def inputs(rows: int = 32) -> torch.Tensor:
    return torch.randn(rows, SHAPE[2], *SHAPE[:2], generator=torch.Generator().manual_seed(1))


def weight_quants(model: nn.Module) -> dict[str, layers.WeightQuant]:
    return {name: layers.part(m, layers.WeightQuant) for name, m in layers.compressible(model)}


# where quantizers go


def test_allocated_bits_are_taken_as_they_are_and_edges_keep_their_activations():
    cfg = Quantize(weight_bits=Average(average=3.5), activation_bits=4, edge_bits=8)
    found = quantize.widths(["a", "b", "c"], cfg, {"a": 2, "b": 7, "c": 3})
    assert found == {"a": (2, 8), "b": (7, 4), "c": (3, 8)}


def test_bits_of_each_layer_reach_its_quantizer():
    model, _ = make("resnet8")
    names = [name for name, _ in layers.compressible(model)]
    bits = dict(zip(names, itertools.cycle(range(2, 9))))
    quantize.prepare(model, Quantize(weight_bits=Average(average=5)), [], bits)
    assert {name: quant.bits for name, quant in weight_quants(model).items()} == bits


def test_an_average_that_was_not_allocated_is_a_mistake():
    with pytest.raises(AssertionError, match="allocated"):
        quantize.prepare(make("seed")[0], Quantize(weight_bits=Average(average=4)), [])


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_the_scheme_is_that_of_inputs_that_can_be_negative(scheme):
    model, _ = make("own_depthwise:depthwise")
    cfg = Quantize(weight_bits=4, activation_bits=4, edge_bits=None, scheme=scheme)
    quantize.prepare(model, cfg, [inputs()])
    lows = {name: module.input_quant.low for name, module in layers.compressible(model)}
    if scheme == "symmetric":
        assert set(lows.values()) == {-8}
    else:
        assert lows["stem"] in range(-9, -5)  # of noise about 0
        assert -4 < lows["deep"] < 0  # after a Hardswish: -0.375 at least
    model, _ = make("seed")
    quantize.prepare(model, cfg, [inputs()])
    assert {m.input_quant.low for n, m in layers.compressible(model) if n != "0"} == {0}


def test_powers_of_two_are_of_weights_and_activations():
    model, _ = make("resnet8")
    quantize.prepare(model, Quantize(weight_bits=4, activation_bits=4, power_of_two=True), [inputs()])
    for name, quant in weight_quants(model).items():
        assert quant.power_of_two
        assert model.get_submodule(name).input_quant.power_of_two


def test_a_bound_on_integers_is_for_8_bits_alone():
    model, _ = make("seed")
    quantize.prepare(model, Quantize(weight_bits=4), [], weight_qmax=63)
    assert [quant.qmax for quant in weight_quants(model).values()] == [63, 7, 7, 63]


def test_quantizers_go_on_masks_and_narrow_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 5))
    prune.prepare(model, Prune(sparsity=0.8, schedule="one_shot"), False, [(inputs(), torch.zeros(32).long())])
    zero = {name: module.weight == 0 for name, module in layers.compressible(model)}
    quantize.prepare(model, Quantize(weight_bits=2, activation_bits=2), [inputs()])
    loss = model.train()(inputs()).square().mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert all((model.get_submodule(name).weight[mask] == 0).all() for name, mask in zero.items())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# the frozen model agrees with the one that was trained


def with_biases_on_their_grid(model: nn.Module, spec: dict[str, Any]) -> tuple[dict[str, Any], artifact.Tensors]:
    """Freeze, after each bias has moved to where freezing rounds it: then nothing but arithmetic may differ."""
    frozen, tensors = artifact.freeze(model, spec)
    folded = dict(frozen["folded"])
    for name, module in layers.compressible(model):
        if f"{name}.bias" not in tensors:
            continue
        bias = tensors[f"{name}.bias"]
        if name in folded:
            norm = model.get_submodule(folded[name])
            gain = norm.weight / (norm.running_var + norm.eps).sqrt()
            own = 0 if module.bias is None else module.bias
            norm.bias.data.copy_(bias - (own - norm.running_mean) * gain)
        else:
            module.bias.data.copy_(bias)
    return artifact.freeze(model, spec)


@pytest.fixture
def float64():
    """Networks are built in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("power_of_two", [False, True], ids=["any step", "powers of two"])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", NETS)
def test_the_frozen_model_computes_what_was_trained(name, bits, scheme, power_of_two, float64):
    model, spec = make(name)
    cfg = Quantize(
        weight_bits=bits, activation_bits=bits, edge_bits=None, scheme=scheme, power_of_two=power_of_two
    )  # fmt: skip
    quantize.prepare(model, cfg, [inputs()])
    frozen, tensors = with_biases_on_their_grid(model, spec)
    assert bool(frozen["folded"]) == (bool(norms(model)) and not power_of_two)
    expected, found = model(inputs()), artifact.thaw(frozen, tensors)(inputs())
    assert (found - expected).norm() < 1e-12 * expected.norm()
    assert torch.equal(found.argmax(1), expected.argmax(1))


@torch.no_grad()
@pytest.mark.parametrize("bits", [None, 2, 5, 8])
@pytest.mark.parametrize("name", ["resnet8", "own_depthwise:depthwise"])
def test_folding_batchnorm_is_exact(name, bits, float64):
    model, spec = make(name)
    quantize.prepare(model, Quantize(weight_bits=bits, edge_bits=None), [])
    frozen, tensors = artifact.freeze(model, spec)
    assert len(frozen["folded"]) == len(norms(model))
    thawed = artifact.thaw(frozen, tensors)
    assert not norms(thawed)
    expected = model(inputs())
    assert (thawed(inputs()) - expected).norm() < 1e-12 * expected.norm()


@torch.no_grad()
def test_with_float32_and_biases_rounded_the_frozen_model_predicts_the_same():
    model, spec = make("resnet8")
    quantize.prepare(model, Quantize(weight_bits=8, activation_bits=8), [inputs()])
    thawed = artifact.thaw(*artifact.freeze(model, spec))
    expected, found = model(inputs(256)), thawed(inputs(256))
    assert (found - expected).norm() < 0.01 * expected.norm()
    top = expected.topk(2, 1).values
    sure = top[:, 0] - top[:, 1] > 0.02 * expected.abs().max()
    assert sure.float().mean() > 0.8
    assert torch.equal(found.argmax(1)[sure], expected.argmax(1)[sure])


@pytest.mark.parametrize("name", NETS)
def test_scales_of_powers_of_two_are_frozen_as_such(name):
    model, spec = make(name)
    quantize.prepare(model, Quantize(weight_bits=4, activation_bits=4, power_of_two=True), [inputs()])
    with torch.no_grad():
        list(layers.compressible(model))[-1][1].bias[0] = 1e7  # too large for the grid: its channel gets another
    frozen, tensors = artifact.freeze(model, spec)
    steps = [t for key, t in tensors.items() if key.endswith(".scale")]
    steps += [torch.tensor(entry["activation"]["step"]) for entry in frozen["layers"].values()]
    assert all((torch.frexp(step)[0] == 0.5).all() for step in steps)


# what is mended without training


def test_layers_are_traced_in_the_order_they_run_with_those_that_batchnorm_reads():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.shared, self.first = nn.Linear(4, 2), nn.Conv2d(4, 4, 1), nn.Conv2d(2, 4, 3)
            self.never, self.bn = nn.Linear(1, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.shared(self.shared(self.bn(self.first(x)))).mean((2, 3)))

    model = Net().train()
    assert observe.trace(model, inputs(2)) == ({"first": 1, "shared": 2, "last": 1}, {"first"})
    assert model.training
    assert not model.first._forward_hooks


LINEAR_MAPS = {
    "linear": nn.Linear(6, 4),
    "conv": nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2), bias=False),
    "dilated": nn.Conv2d(2, 4, 3, dilation=2, padding="same"),
    "groups": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "circular": nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", LINEAR_MAPS)
def test_the_quadratic_form_is_the_error_of_the_output(kind):
    torch.manual_seed(0)
    layer, other = copy.deepcopy(LINEAR_MAPS[kind]), copy.deepcopy(LINEAR_MAPS[kind])
    other.weight.add_(0.1 * torch.randn_like(other.weight))
    x = torch.randn(7, 6) if kind == "linear" else torch.randn(7, layer.in_channels, 6, 5)
    target = nn.Sequential(other)(x)

    def error(weight: torch.Tensor) -> torch.Tensor:
        layer.weight.copy_(weight)
        y = (layer(x) - target).square()
        return (y if kind == "linear" else y.movedim(1, -1).flatten(0, 2)).mean(0)

    first, second = torch.randn_like(layer.weight), torch.randn_like(layer.weight)
    moments = adaround.moments(nn.Sequential(layer), nn.Sequential(other), "0", 1, [x[:3], x[3:]])
    form = [
        adaround._error(w, *moments, w)[0].flatten() for w in (t.reshape(moments[1].shape) for t in (first, second))
    ]
    torch.testing.assert_close(form[0] - form[1], error(first) - error(second), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_moments_of_a_sample_of_positions_are_near_those_of_all(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3))
    x = inputs(64)
    whole = adaround.moments(net, net, "0", 1, [x])
    monkeypatch.setattr(adaround, "COLUMNS", 64 * 30)
    monkeypatch.setattr(adaround, "CHUNK", 18 * 100 * 4)
    for found, expected in zip(adaround.moments(net, net, "0", 1, [x]), whole, strict=True):
        assert 0 < (found - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("seed", range(5))
def test_adaptive_rounding_is_near_the_best_of_all_roundings(seed):
    torch.manual_seed(seed)
    x = torch.randn(500, 8) @ torch.randn(8, 8)
    weight, step, qmax = torch.randn(1, 8), torch.tensor([[0.4]]), 7
    second, cross = (x.T @ x / 500)[None], (weight @ (x.T @ x) / 500)[None]
    found = adaround.choose(weight, step, qmax, second, cross)

    def error(integers: torch.Tensor) -> float:
        return float(F.linear(x, integers * step - weight).square().mean())

    below = (weight / step).floor()
    every = [error((below + torch.tensor([up])).clamp(-qmax, qmax)) for up in itertools.product((0, 1), repeat=8)]
    nearest = error((weight / step).round().clamp(-qmax, qmax))
    assert ((found - weight / step).abs() < 1).all()
    assert error(found) <= min(nearest, sorted(every)[8]) * (1 + 1e-5)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small residual network that knows the digits, the pictures it is calibrated on, and others."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
    labels = torch.tensor(labels)
    torch.manual_seed(0)
    spec = artifact.make_spec("resnet8", {"width": 8}, [str(i) for i in range(10)], (8, 8, 1), [0.0], [1.0])
    model = artifact.build(spec)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for rows in torch.randperm(1200).repeat(5).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    return model.eval(), images[:256], images[1200:]


def post_trained(trained: Any, bits: int, **cfg: Any) -> nn.Module:
    model, calibration = copy.deepcopy(trained[0]), [trained[1][:128], trained[1][128:]]
    section = Quantize(weight_bits=bits, activation_bits=8, edge_bits=None, **cfg)
    quantize.prepare(model, section, calibration)
    quantize.post_training(model, section, calibration, trained[0])
    return model


@pytest.fixture(scope="module")
def adapted(trained: Any) -> nn.Module:
    """The network with 3 bits, rounded adaptively. Read only."""
    return post_trained(trained, 3, rounding="adaptive")


@torch.no_grad()
@pytest.mark.parametrize(("bits", "share"), [(2, 0.5), (3, 0.65)])
def test_adaptive_rounding_beats_nearest_on_pictures_it_has_not_seen(trained, bits, share):
    model, _, unseen = trained
    nearest, adaptive = (
        float((rounded(unseen) - model(unseen)).square().mean())
        for rounded in (post_trained(trained, bits), post_trained(trained, bits, rounding="adaptive"))
    )
    assert adaptive < share * nearest


@torch.no_grad()
def test_what_was_rounded_stays_as_it_was_chosen(trained, adapted):
    moved = 0
    for name, quant in weight_quants(adapted).items():
        raw, dense = layers.raw_weight(adapted.get_submodule(name)), trained[0].get_submodule(name).weight
        integers, step = quant.integers(raw)
        step = step.view(-1, *[1] * (raw.dim() - 1))
        assert torch.equal(quant(raw), raw)
        assert torch.equal(integers * step, raw)
        inside = (dense / step).abs() < quant.qmax
        assert ((integers - dense / step).abs() < 1)[inside].all()
        moved += int((integers != quant.integers(dense)[0]).sum())
    assert moved > 30


def test_without_training_results_are_the_same_whatever_the_seed(trained, adapted):
    torch.manual_seed(12345)
    found = post_trained(trained, 3, rounding="adaptive").state_dict()
    assert all(torch.equal(value, found[key]) for key, value in adapted.state_dict().items())


@torch.no_grad()
def test_adaptive_rounding_keeps_pruned_weights_at_zero(trained):
    dense = copy.deepcopy(trained[0])
    prune.prepare(dense, Prune(sparsity=0.7, schedule="one_shot"), False, [(trained[1], torch.zeros(256).long())])
    model = post_trained((dense, *trained[1:]), 3, rounding="adaptive")
    for name, module in layers.compressible(model):
        assert (module.weight[~layers.part(module, layers.Mask).mask] == 0).all(), name


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_bias_correction_removes_the_mean_error_layer_after_layer(name):
    model, _ = make(name)
    dense, calibration = copy.deepcopy(model), [inputs()[:16], inputs()[16:]]
    cfg = Quantize(weight_bits=2, activation_bits=3, edge_bits=None)
    quantize.prepare(model, cfg, calibration)
    quantize.reestimate_batchnorm(model, calibration)
    expected = observe.output_means(dense, calibration)
    before = observe.output_means(model, calibration)
    quantize.correct_bias(model, expected, calibration)
    after = observe.output_means(model, calibration)
    corrected = [n for n, m in layers.compressible(model) if m.bias is not None and not (norms(model) and n != "fc")]
    assert len(corrected) == (4 if name == "seed" else 1)
    for layer in expected:
        if layer in corrected:
            assert (before[layer] - expected[layer]).norm() > 0.01 * expected[layer].norm()
            torch.testing.assert_close(after[layer], expected[layer], rtol=1e-4, atol=1e-4)
        else:  # in front of a BatchNorm
            torch.testing.assert_close(after[layer], before[layer])


def test_bias_correction_is_as_the_section_says():
    dense, _ = make("seed")
    found = {}
    for corrects in (False, True):
        model = copy.deepcopy(dense)
        cfg = Quantize(weight_bits=2, bias_correction=corrects)
        quantize.prepare(model, cfg, [inputs()])
        quantize.post_training(model, cfg, [inputs()], dense)
        found[corrects] = {name: module.bias for name, module in layers.compressible(model)}
    assert all(torch.equal(found[False][name], dense.get_submodule(name).bias) for name in found[False])
    assert not any(torch.equal(found[True][name], found[False][name]) for name in found[True])


@torch.no_grad()
def test_output_means_are_the_means_over_all_rows():
    model, _ = make("own_depthwise:depthwise")
    seen = {}
    model.deep.register_forward_hook(lambda module, args, out: seen.setdefault("deep", out))
    expected = model(inputs())
    found = observe.output_means(model, [inputs()[:10], inputs()[10:]])
    torch.testing.assert_close(found["fc"], expected.double().mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["deep"], seen["deep"].double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
