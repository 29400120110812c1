"""Networks by name: shapes, sizes, pictures they can't take, networks of one's own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from raydeep.errors import ModelError
from raydeep.model import zoo

GREY, RGB = (28, 28, 1), (32, 32, 3)

OWN = """
import torch
from torch import nn

NO_FACTORY = 3

def tiny(num_classes, in_channels, image_size, hidden=4):
    height, width = image_size
    first = nn.Linear(in_channels * height * width, hidden)
    return nn.Sequential(nn.Flatten(), first, nn.Linear(hidden, num_classes))

def no_module(num_classes, in_channels, image_size):
    return [num_classes]

def one_class_more(num_classes, in_channels, image_size):
    return tiny(num_classes + 1, in_channels, image_size)

class Pair(nn.Module):
    def forward(self, x):
        return x, x

def pair(num_classes, in_channels, image_size):
    return Pair()
"""


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes an importable module; it is forgotten again after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


@pytest.fixture
def own(write_module: Callable[[str, str], None]) -> str:
    write_module("own_nets", OWN)
    return "own_nets"


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def logits(model: nn.Module, shape: tuple[int, int, int], rows: int = 3) -> torch.Tensor:
    height, width, channels = shape
    return model.eval()(torch.randn(rows, channels, height, width))


@pytest.mark.parametrize("name", zoo.MODELS)
@pytest.mark.parametrize("shape", [GREY, RGB], ids=["28x28x1", "32x32x3"])
def test_every_network_gives_logits_NK(name, shape):
    found = logits(zoo.build(name, {}, 7, shape), shape)
    assert found.shape == (3, 7)
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [("lenet_300_100", GREY, 266_610), ("lenet5", GREY, 431_080), ("resnet20", RGB, 272_474)],
)
def test_parameter_counts_are_those_of_the_literature(name, shape, expected):
    assert parameters(zoo.build(name, {}, 10, shape)) == expected


def test_width_of_the_seed_network_is_an_argument():
    wide, narrow = zoo.build("seed", {}, 10, GREY), zoo.build("seed", {"width": 8}, 10, GREY)
    assert wide[0].out_channels == 32
    assert narrow[0].out_channels == 8


def test_a_built_network_trains_on():
    assert zoo.build("resnet8", {}, 10, GREY).training


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
@pytest.mark.parametrize("shape", [GREY, RGB], ids=["28x28x1", "32x32x3"])
def test_torchvision_networks_fit_channels_and_small_pictures(name, shape):
    model = zoo.build(name, {}, 7, shape)
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert (first.in_channels, first.stride, first.kernel_size) == (shape[2], (1, 1), (3, 3))
    assert logits(model, shape).shape == (3, 7)


def test_torchvision_stem_stays_for_large_rgb_pictures():
    model = zoo.build("resnet18", {}, 7, (64, 64, 3))
    assert (model.conv1.kernel_size, model.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(model.maxpool, nn.MaxPool2d)


def test_torchvision_stem_of_large_grey_pictures_changes_its_channels_alone():
    model = zoo.build("resnet18", {}, 7, (64, 64, 1))
    assert (model.conv1.in_channels, model.conv1.kernel_size, model.conv1.stride) == (1, (7, 7), (2, 2))


def test_lenet5_refuses_pictures_that_are_too_small():
    with pytest.raises(ModelError, match="lenet5 needs pictures of 16×16 or more, found 8×8"):
        zoo.build("lenet5", {}, 10, (8, 8, 1))


def test_pictures_that_a_network_shrinks_to_nothing_are_refused():
    with pytest.raises(ModelError, match=r"model.name seed can't take pictures of 2×2×1: "):
        zoo.build("seed", {}, 10, (2, 2, 1))


def test_an_unknown_name_names_near_ones():
    with pytest.raises(ModelError, match=r"'resnet21' is unknown; did you mean .*resnet20") as err:
        zoo.build("resnet21", {}, 10, RGB)
    assert "lenet_300_100" in str(err.value)
    assert "package.module:factory" in str(err.value)


def test_a_torchvision_network_that_is_no_classifier_is_unknown():
    with pytest.raises(ModelError, match="'fcn_resnet50' is unknown"):
        zoo.build("fcn_resnet50", {}, 10, RGB)


def test_unknown_arguments_are_refused_by_name():
    with pytest.raises(ModelError, match=r"model.name seed: its factory failed: .*'depth'.*check model.args"):
        zoo.build("seed", {"depth": 3}, 10, RGB)


def test_own_factory_by_import_path(own):
    model = zoo.build(f"{own}:tiny", {"hidden": 5}, 7, (8, 6, 3))
    assert model[1].weight.shape == (5, 8 * 6 * 3)
    assert logits(model, (8, 6, 3)).shape == (3, 7)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("own_missing:tiny", {}, "can't import own_missing: No module named 'own_missing'"),
        (":tiny", {}, "can't import"),
        ("own_nets:small", {}, "own_nets has no small"),
        ("own_nets:no_module", {}, "its factory gave list, expected a torch.nn.Module"),
        ("own_nets:NO_FACTORY", {}, "NO_FACTORY is a int, expected a function or a class"),
        ("own_nets:tiny", {"hidden_size": 4}, r"its factory failed: .*'hidden_size'; check model.args"),
        ("own_nets:one_class_more", {}, r"gives \(2, 8\), expected logits of shape \(2, 7\)"),
        ("own_nets:pair", {}, r"gives tuple, expected logits of shape \(2, 7\)"),
    ],
)
def test_what_is_wrong_with_an_own_factory_is_said(own, name, args, message):
    with pytest.raises(ModelError, match=message) as err:
        zoo.build(name, args, 7, GREY)
    assert str(err.value).startswith(f"model.name {name}")


def test_an_error_inside_an_own_module_is_not_called_a_missing_factory(write_module):
    write_module("own_broken", "import math\nmath.no_such_thing\ndef tiny(**args): ...\n")
    with pytest.raises(Exception, match="no_such_thing"):
        zoo.build("own_broken:tiny", {}, 7, GREY)


def test_a_layer_under_two_names_is_refused_before_it_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared_nets.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, in_channels, image_size):\n"
        "    layer = nn.Linear(16, 16)\n"
        "    return nn.Sequential(nn.Flatten(), layer, layer, nn.Linear(16, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="under two names"):
        zoo.build("shared_nets:net", {}, 3, (4, 4, 1))
