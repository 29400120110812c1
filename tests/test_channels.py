"""Whole channels go: how much goes, that what stays computes what it did, and that the network comes back from data."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raydeep.compress import channels, cost, pack, quantize
from raydeep.compress.cuts import Graph, find_cuts
from raydeep.config import Prune, Quantize
from raydeep.errors import JobError, ModelError
from raydeep.model import artifact, narrow, zoo

Shape = tuple[int, int, int]
GREY, RGB, LARGE = (28, 28, 1), (32, 32, 3), (64, 64, 3)

OWN = """
import torch
from torch import nn

class Grouped(nn.Module):
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 24, 3, padding=1)
        self.norm = nn.GroupNorm(4, 24)
        self.act = nn.PReLU(24)
        self.grouped = nn.Conv2d(24, 36, 3, padding=1, groups=6)
        self.bn = nn.BatchNorm2d(36)
        self.left, self.right = nn.Conv2d(36, 10, 1), nn.Conv2d(36, 14, 1)
        self.scale = nn.Parameter(torch.ones(1, 36, 1, 1))
        self.fc1, self.fc2 = nn.Linear(24, 30), nn.Linear(30, num_classes)

    def forward(self, x):
        x = self.bn(self.grouped(self.act(self.norm(self.stem(x))))).relu() * self.scale
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc2(self.fc1(x).relu())

class Shuffled(nn.Module):  # shapes fit, but channels change places
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(in_channels, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.b(self.a(x))
        n, c, h, w = x.shape
        x = self.c(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)).relu()
        return self.fc(x.mean((2, 3)))

class Attention(nn.Module):
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__()
        self.conv, self.mix = nn.Conv2d(in_channels, 8, 4, 4), nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.fc(self.mix(x, x, x)[0].mean(1))

class Fixed(nn.Module):  # a size stands in the code
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(in_channels, 8, 3), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)).view(-1, 8))

class Heads(nn.Module):  # two layers give the logits together
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(in_channels, 8, 3), nn.Linear(8, num_classes), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        return self.a(x) + self.b(x)

class Linear(nn.Module):
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__()
        self.fc = nn.Linear(in_channels * image_size[0] * image_size[1], num_classes)

    def forward(self, x):
        return self.fc(x.flatten(1))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module with networks of one's own."""
    (tmp_path / "own_wide_nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_wide_nets", raising=False)
    return "own_wide_nets"


def spec_of(name: str, shape: Shape, classes: int = 5) -> dict[str, Any]:
    return artifact.make_spec(name, {}, [str(i) for i in range(classes)], shape, [0.5] * shape[2], [0.25] * shape[2])


def make(name: str, shape: Shape) -> tuple[nn.Module, dict[str, Any]]:
    """A network in eval mode, its BatchNorms far from where they start."""
    torch.manual_seed(0)
    spec = spec_of(name, shape)
    model = artifact.build(spec).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model, spec


def inputs(shape: Shape, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, shape[2], shape[0], shape[1], generator=torch.Generator().manual_seed(1))


def labelled(shape: Shape) -> channels.Labelled:
    return [(inputs(shape, 4), torch.tensor([0, 1, 2, 3])), (inputs(shape, 4).flip(0), torch.tensor([4, 3, 2, 1]))]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def gone(name: str, shape: Shape, cfg: Prune, round_to: int = 1) -> tuple[nn.Module, float]:
    """A narrowed network, and the share of the target that went."""
    model, _ = make(name, shape)
    size = (lambda: cost.macs(model, shape)) if cfg.target == "macs" else (lambda: parameters(model))
    before = size()
    channels.prune_channels(model, cfg, inputs(shape), labelled(shape), round_to)
    return model, 1 - size() / before


HALF = Prune(kind="channels", sparsity=0.5)
FAMILIES = {
    "seed": GREY, "lenet_300_100": GREY, "lenet5": GREY, "resnet8": RGB, "resnet20": RGB,
    "mobilenet_v3_small": RGB, "efficientnet_b0": RGB, "regnet_y_400mf": RGB, "squeezenet1_1": LARGE,
}  # fmt: skip
HEAVY = {
    "resnet56": RGB, "resnet18": RGB, "resnet50": RGB, "wide_resnet50_2": RGB, "resnext50_32x4d": RGB,
    "mobilenet_v2": RGB, "mobilenet_v3_large": RGB, "efficientnet_v2_s": RGB, "regnet_x_400mf": RGB,
    "convnext_tiny": LARGE, "densenet121": LARGE, "vgg11": LARGE, "vgg16_bn": LARGE, "alexnet": LARGE,
    "googlenet": LARGE, "inception_v3": (96, 96, 3),
}  # fmt: skip
ALL = [
    *(pytest.param(name, shape, id=name) for name, shape in FAMILIES.items()),
    *(pytest.param(name, shape, id=name, marks=pytest.mark.slow) for name, shape in HEAVY.items()),
]
COARSE = {"lenet5": 0.02, "resnet8": 0.01, "seed": 0.01}  # one channel of theirs is so much


@pytest.mark.parametrize(("name", "shape"), ALL)
def test_half_of_the_macs_go_and_the_network_comes_back_from_data(name, shape):
    model, spec = make(name, shape)
    before, x = cost.macs(model, shape), inputs(shape)
    channels.prune_channels(model, HALF, x, [])
    assert 1 - cost.macs(model, shape) / before == pytest.approx(0.5, abs=COARSE.get(name, 0.003))
    expected = model(x)
    assert expected.shape == (2, 5)
    assert not model.training

    facts = json.loads(json.dumps(narrow.difference(artifact.build(spec), model)))
    fresh = artifact.build({**spec, "widths": facts}).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)  # to the last bit

    frozen, tensors = pack.unpack(pack.pack(*artifact.freeze(model, {**spec, "widths": facts})))
    thawed = artifact.thaw(frozen, tensors)
    assert (thawed(x) - expected).abs().max() <= 1e-4 * expected.abs().max()  # BatchNorm is folded
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(frozen["folded"]) == bool(norms) or name.startswith("densenet")


def test_a_network_of_ones_own_with_groups_of_channels(own):
    name = f"{own}:Grouped"
    model, spec = make(name, RGB)
    channels.check(name, model, inputs(RGB))
    channels.prune_channels(model, HALF, inputs(RGB), [])
    assert model.stem.out_channels % 12 == 0  # 4 groups of the norm, 6 of the convolution
    assert model.grouped.out_channels % 6 == 0
    assert model.scale.shape[1] == model.grouped.out_channels < 36
    facts = json.loads(json.dumps(narrow.difference(artifact.build(spec), model)))
    assert facts["fc1"]["in_features"] == model.left.out_channels + model.right.out_channels
    assert facts[""] == {"scale": list(model.scale.shape)}
    fresh = artifact.build({**spec, "widths": facts}).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(inputs(RGB)), model(inputs(RGB)))


def test_narrowed_networks_are_quantized_as_others_are():
    model, spec = make("resnet8", RGB)
    channels.prune_channels(model, HALF, inputs(RGB), [])
    widths = narrow.difference(artifact.build(spec), model)
    quantize.prepare(model, Quantize(weight_bits=8, activation_bits=8), [inputs(RGB)])
    thawed = artifact.thaw(*pack.unpack(pack.pack(*artifact.freeze(model.eval(), {**spec, "widths": widths}))))
    expected = model(inputs(RGB))
    assert (thawed(inputs(RGB)) - expected).abs().max() <= 0.01 * expected.abs().max()


# how much goes


@pytest.mark.parametrize("name", ["seed", "resnet20", "mobilenet_v3_small", "regnet_y_400mf"])
@pytest.mark.parametrize("target", ["macs", "parameters"])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_the_share_asked_for_goes(name, target, share):
    shape = FAMILIES[name]
    _, found = gone(name, shape, Prune(kind="channels", sparsity=share, target=target))
    assert found == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v3_small", "lenet5"])
@pytest.mark.parametrize("target", ["macs", "parameters"])
def test_costs_foretold_are_those_of_the_narrowed_network(name, target):
    shape = FAMILIES[name]
    model, _ = make(name, shape)
    graph = Graph(model, inputs(shape))
    cuts = list(find_cuts(graph, "magnitude"))
    counts = [len(cut.scores) // 3 for cut in cuts]
    costs = channels._Costs(model, inputs(shape), target)
    foretold = costs.after(cuts, counts)
    for cut, count in zip(cuts, counts, strict=True):
        graph.take(cut, count)
    assert foretold == (cost.macs(model, shape) if target == "macs" else parameters(model))


def test_the_lowest_scores_of_all_layers_go():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 3))
    weak = [torch.tensor([1, 4, 6]), torch.tensor([0, 2, 3, 7, 8, 9])]
    with torch.no_grad():
        for i, rows in zip((1, 3), weak, strict=True):
            model[i].weight[rows] *= 0.01
            model[i + 2].weight[:, rows] *= 0.01
    kept = [model[1].bias[[i for i in range(10) if i not in weak[0]]], model[3].bias[[1, 4, 5, 6]]]
    whole, left = 160 + 100 + 30, 16 * 7 + 7 * 4 + 4 * 3
    cfg = Prune(kind="channels", sparsity=1 - left / whole)
    channels.prune_channels(model, cfg, torch.randn(2, 1, 4, 4), [])
    assert torch.equal(model[1].bias, kept[0])
    assert torch.equal(model[3].bias, kept[1])
    assert model[5].weight.shape == (3, 4)  # the classifier gives what it gave


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v3_small"])
def test_every_layer_keeps_a_tenth(name):
    shape = FAMILIES[name]
    model, _ = make(name, shape)
    wide = {path: m.weight.shape[0] for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    with torch.no_grad():  # one layer that magnitude would take whole
        next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1).weight.mul_(1e-6)
    channels.prune_channels(model, Prune(kind="channels", sparsity=0.9), inputs(shape), [])
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels >= 0.1 * wide[path]
            assert module.out_channels % module.groups == module.in_channels % module.groups == 0


def test_channels_of_wide_layers_are_rounded_up():
    wide, _ = make("resnet20", RGB)
    model, found = gone("resnet20", RGB, HALF, round_to=8)
    pairs = [(m, wide.get_submodule(n)) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert {m.out_channels % 8 for m, before in pairs if before.out_channels >= 64} == {0}
    assert {m.out_channels % 8 for m, before in pairs if before.out_channels < 64} != {0}
    assert found == pytest.approx(0.5, abs=0.05)


def test_a_share_that_can_not_go_is_refused_with_the_largest_one():
    cfg = Prune(kind="channels", sparsity=0.999)
    with pytest.raises(JobError, match=r"prune.sparsity: found 0.999 of prune.target macs .* at most 0\.9\d+ can go"):
        gone("resnet8", RGB, cfg)
    model, _ = make("resnet8", RGB)
    channels.check("resnet8", model, inputs(RGB))  # it can be narrowed, if not so far
    with pytest.raises(JobError, match=r"at most 0\.9\d+ can go"):
        channels.check("resnet8", model, inputs(RGB), cfg)


def test_rounds_go_on_from_the_narrowed_network():
    model, spec = make("resnet8", RGB)
    before = cost.macs(model, RGB)
    for _ in range(2):
        channels.prune_channels(model, Prune(kind="channels", sparsity=0.3), inputs(RGB), [])
    assert 1 - cost.macs(model, RGB) / before == pytest.approx(1 - 0.7**2, abs=0.02)
    facts = narrow.difference(artifact.build(spec), model)
    fresh = artifact.build({**spec, "widths": facts}).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(inputs(RGB)), model(inputs(RGB)))


# scores


@pytest.mark.parametrize("score", ["magnitude", "taylor", "bn_scale"])
def test_the_same_inputs_give_the_same_network(score):
    cfg = Prune(kind="channels", sparsity=0.5, score=score)
    (one, share), (other, _) = gone("resnet8", RGB, cfg), gone("resnet8", RGB, cfg)
    found = other.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in one.state_dict().items())
    assert share == pytest.approx(0.5, abs=0.02)


def test_bn_scale_takes_the_channels_of_the_smallest_gains():
    model, _ = make("resnet8", RGB)
    gains = model.blocks[0].bn1.weight.detach().clone()
    channels.prune_channels(model, Prune(kind="channels", sparsity=0.3, score="bn_scale"), inputs(RGB), [])
    left = model.blocks[0].bn1.weight
    assert len(left) < len(gains)
    assert torch.equal(left, gains[gains >= gains.sort(descending=True).values[len(left) - 1]])


def test_bn_scale_without_batchnorm_is_refused():
    model, _ = make("lenet5", GREY)
    with pytest.raises(JobError, match=r"prune.score bn_scale needs BatchNorm .* use score magnitude or taylor"):
        channels.check("lenet5", model, inputs(GREY), Prune(kind="channels", sparsity=0.5, score="bn_scale"))


def test_taylor_keeps_what_the_loss_feels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5))
    with torch.no_grad():
        model[1].bias[[1, 3, 5, 7]] = -100.0  # never active: no gradient, whatever the weights
        model[1].weight[[1, 3, 5, 7]] *= 10
    kept = model[1].weight[[0, 2, 4, 6]]
    cfg = Prune(kind="channels", sparsity=0.5, score="taylor")
    channels.prune_channels(model, cfg, torch.randn(2, 1, 4, 4), labelled((4, 4, 1)))
    assert torch.equal(model[1].weight, kept)


@pytest.mark.parametrize("training", [True, False])
def test_taylor_leaves_no_gradient_and_the_mode_of_the_network(training):
    model, _ = make("resnet8", RGB)
    model.train(training)
    model.fc.weight.requires_grad_(False)
    mean = model.bn1.running_mean.clone()
    channels.prune_channels(model, Prune(kind="channels", sparsity=0.5, score="taylor"), inputs(RGB), labelled(RGB))
    assert model.training == model.bn1.training == training
    assert all(p.grad is None for p in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["fc.weight"]
    assert set(model.bn1.running_mean.tolist()) <= set(mean.tolist())
    F.cross_entropy(model(inputs(RGB)), torch.tensor([0, 1])).backward()  # it trains on


def test_taylor_without_batches_is_refused():
    model, _ = make("lenet5", GREY)
    cfg = Prune(kind="channels", sparsity=0.5, score="taylor")
    with pytest.raises(JobError, match=r"prune.score taylor needs labelled batches"):
        channels.prune_channels(model, cfg, inputs(GREY), [])
    channels.check("lenet5", model, inputs(GREY), cfg)


# what can't be narrowed

WORKS = r"set prune.kind weights or N:M \(such as 2:4\), or quantize.weight_bits, which work for it"


def test_a_check_leaves_the_network_as_it_was():
    model, _ = make("resnet8", RGB)
    before = copy.deepcopy(model.state_dict())
    channels.check("resnet8", model.train(), torch.zeros(2, 3, 32, 32))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "name", ["shufflenet_v2_x0_5", *(pytest.param(n, marks=pytest.mark.slow) for n in ("vit_b_32", "swin_t"))]
)
def test_known_networks_that_can_not_be_narrowed_are_refused_by_name_and_by_trying(name):
    model = zoo.build(name, {}, 5, LARGE)
    with pytest.raises(ModelError, match=rf"^model.name {name}: its channels can't be pruned: .*; {WORKS}$"):
        channels.check(name, model, inputs(LARGE))
    with pytest.raises(ModelError, match=rf"^model \w+: its channels can't be pruned: .*; {WORKS}$"):
        channels.prune_channels(model, HALF, inputs(LARGE), [])


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("Attention", "it has MultiheadAttention"),
        ("Shuffled", "they hang together in a way that is not known: narrowed, it computes something else"),
        ("Fixed", ".*shapes cannot be multiplied"),
        ("Linear", "none of its layers can lose a channel"),
    ],
)
def test_own_networks_that_can_not_be_narrowed_are_refused_before_they_are_trained(own, attribute, reason):
    name = f"{own}:{attribute}"
    model, _ = make(name, (16, 16, 3))
    with pytest.raises(ModelError, match=rf"^model.name {name}: its channels can't be pruned: {reason}.*; {WORKS}$"):
        channels.check(name, model, torch.zeros(2, 3, 16, 16))


def test_layers_that_give_the_logits_together_keep_all_their_outputs(own):
    model, _ = make(f"{own}:Heads", RGB)
    channels.prune_channels(model, HALF, inputs(RGB), [])
    assert (model.conv.out_channels, model.a.out_features, model.b.out_features) == (4, 5, 5)


# widths out of a file


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([], None),
        (["conv1"], "widths: found list, expected a table of modules"),
        ({"nowhere": {"out_channels": 2}}, "widths: the network has no module nowhere"),
        ({"conv1": 3}, "widths of conv1: found int, expected a table of sizes"),
        ({"conv1": {"kernel_size": 1}}, "widths of conv1: Conv2d has no size kernel_size; expected in_ch"),
        ({"conv1": {"forward": 1}}, "widths of conv1: Conv2d has no size forward"),
        ({"conv1": {"weight": [1, 1, 1, 1]}}, "widths of conv1: Conv2d has no size weight"),
        ({"pool": {"output_size": 1}}, "widths of pool: AdaptiveAvgPool2d has no size output_size; expected none"),
        ({"conv1": {"out_channels": 0}}, "conv1: out_channels: found 0, expected a whole number from 1 to 16"),
        ({"conv1": {"out_channels": -3}}, "out_channels: found -3, expected"),
        ({"conv1": {"out_channels": 17}}, "out_channels: found 17, expected a whole number from 1 to 16"),
        ({"conv1": {"out_channels": 10**12}}, "out_channels: found 1000000000000, expected"),
        ({"conv1": {"out_channels": 8.0}}, "out_channels: found 8.0, expected"),
        ({"conv1": {"out_channels": True}}, "out_channels: found True, expected"),
        ({"conv1": {"out_channels": "8"}}, "out_channels: found '8', expected"),
        ({"conv1": {"out_channels": [8]}}, r"out_channels: found \[8\], expected"),
        ({"conv1": {"groups": 2}}, "out_channels: found|groups: found 2, expected a whole number from 1 to 1"),
        ({"conv1": {"out_channels": 8}}, r"model.name resnet8 can't take pictures of 32×32×3"),
        ({"fc": {"out_features": 4}}, r"model.name resnet8 gives \(2, 4\), expected logits of shape \(2, 5\)"),
    ],
)  # fmt: skip
def test_tampered_widths_are_refused(widths, message):
    spec = {**spec_of("resnet8", RGB), "widths": widths}
    if message is None:
        artifact.build(spec)
        return
    with pytest.raises(ModelError, match=message):
        artifact.build(spec)


@pytest.mark.parametrize(
    ("module", "widths", "message"),
    [
        (nn.Conv2d(8, 8, 3, groups=4), {"in_channels": 6}, "6 channels are no multiple of its 4 groups"),
        (nn.Conv2d(8, 8, 3, groups=4), {"in_channels": 4, "groups": 1}, "weight of shape .* can't become"),
        (nn.GroupNorm(4, 8), {"num_channels": 6}, "6 channels are no multiple of its 4 groups"),
        (nn.LayerNorm(8), {"normalized_shape": 4}, "found 4, expected 1 whole numbers"),
        (nn.LayerNorm(8), {"normalized_shape": [4, 2]}, r"found \[4, 2\], expected 1 whole numbers"),
        (nn.LayerNorm(8), {"normalized_shape": [9]}, "found 9, expected a whole number from 1 to 8"),
    ],
)
def test_sizes_that_do_not_fit_their_layer_are_refused(module, widths, message):
    with pytest.raises(ModelError, match=message):
        narrow.apply(nn.Sequential(module), {"0": widths})


def test_tensors_of_the_whole_network_do_not_fit_the_narrow_one():
    model, spec = make("resnet8", RGB)
    whole = artifact.freeze(model, spec)[1]
    channels.prune_channels(model, HALF, inputs(RGB), [])
    widths = narrow.difference(artifact.build(spec), model)
    frozen, _ = artifact.freeze(model, {**spec, "widths": widths})
    with pytest.raises(ModelError, match=r"tensors do not fit resnet8: .*size mismatch"):
        artifact.thaw(frozen, whole)


def test_nothing_is_different_between_a_network_and_itself():
    model, spec = make("mobilenet_v3_small", RGB)
    assert narrow.difference(artifact.build(spec), model) == {}


def test_another_network_is_no_narrowed_one():
    one, other = make("resnet8", RGB)[0], make("resnet20", RGB)[0]
    with pytest.raises(ModelError, match=r"module blocks.1.shortcut: found Sequential, expected Identity"):
        narrow.difference(other, one)
    longer = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ModelError, match=r"module 1: found NoneType, expected ReLU"):
        narrow.difference(longer, longer[:1])
    with pytest.raises(ModelError, match=r"module 1 is not in the network that was narrowed"):
        narrow.difference(longer[:1], longer)


def test_models_of_before_widths_are_read():
    model, spec = make("resnet8", RGB)
    frozen, tensors = artifact.freeze(model, spec)
    del frozen["widths"]
    expected = model(inputs(RGB))
    assert (artifact.thaw(frozen, tensors)(inputs(RGB)) - expected).abs().max() <= 1e-4 * expected.abs().max()
