"""A model as data: freezing and thawing change no prediction, and no pickle is in a model folder."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raydeep.compress import pack, prune, quantize
from raydeep.config import Prune, Quantize
from raydeep.errors import ModelError, RaydeepError
from raydeep.model import artifact, layers

Spec = dict[str, Any]
SHAPE = (16, 16, 3)

OWN = """
import torch
from torch import nn

class Branching(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(in_channels, 6, 3), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x):
        if x.sum() > 1e9:  # depends on the data: fx can't trace it
            x = -x
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))

class Odd(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.twice, self.bn_twice = nn.Conv2d(in_channels, 6, 3), nn.BatchNorm2d(6)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.bn_a, self.bn_b = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.plain, self.bn_plain = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6, affine=False)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x):
        x = self.twice(x)
        x = self.bn_twice(x) + x                                      # the convolution is read twice
        x = self.bn_a(self.shared(x)) + self.bn_b(self.shared(x))     # and this one runs twice
        return self.fc(self.bn_plain(self.plain(x)).relu().mean((2, 3)))

def branching(num_classes, in_channels, image_size):
    return Branching(num_classes, in_channels)

def odd(num_classes, in_channels, image_size):
    return Odd(num_classes, in_channels)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module with networks of one's own."""
    (tmp_path / "own_odd_nets.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_odd_nets", raising=False)
    return "own_odd_nets"


def make(name: str, shape: tuple[int, int, int] = SHAPE, **args: Any) -> tuple[nn.Module, Spec]:
    """A network in eval mode, its BatchNorms far from where they start: gains of both signs, and 0."""
    torch.manual_seed(0)
    classes = [str(i) for i in range(5)]
    spec = artifact.make_spec(name, args, classes, shape, [0.5] * shape[2], [0.25] * shape[2])
    model = artifact.build(spec).eval()
    for norm in norms(model):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        if norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.weight.data[0] = 0.0
            norm.weight.data[1] = -norm.weight.data[1].abs()
    return model, spec


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def inputs(shape: tuple[int, int, int] = SHAPE, rows: int = 16) -> torch.Tensor:
    return torch.randn(rows, shape[2], shape[0], shape[1], generator=torch.Generator().manual_seed(1))


def compressed(name: str, **args: Any) -> tuple[nn.Module, Spec]:
    model, spec = make(name, **args)
    prune.prepare(model, Prune(sparsity=0.6, schedule="one_shot"), recovers=False)
    quantize.prepare(model, Quantize(weight_bits=4, activation_bits=4, edge_bits=5), [inputs()])
    return model.eval(), spec


@torch.no_grad()
def distance(model: nn.Module, other: nn.Module) -> float:
    """Of the logits, relative to their size."""
    expected = model(inputs())
    return float((other(inputs()) - expected).norm() / expected.norm())


def assert_same(model: nn.Module, spec: Spec, tensors: artifact.Tensors) -> None:
    """The thawed network gives the same logits, up to float32 rounding."""
    assert distance(model, artifact.thaw(spec, tensors)) < 1e-5


def test_a_network_without_batchnorm_comes_back_bit_for_bit():
    model, spec = make("seed", width=8)
    thawed = artifact.thaw(*artifact.freeze(model, spec))
    assert torch.equal(thawed(inputs()), model(inputs()))
    assert not thawed.training


@pytest.mark.parametrize(("name", "pairs"), [("resnet8", 9), ("mobilenet_v3_small", 34)])
def test_every_batchnorm_behind_a_convolution_is_folded(name, pairs):
    model, spec = make(name)
    assert len(norms(model)) == pairs
    frozen, tensors = artifact.freeze(model, spec)
    assert len(frozen["folded"]) == pairs
    assert norms(artifact.thaw(frozen, tensors)) == []
    assert not [key for key in tensors if "running" in key]
    assert_same(model, frozen, tensors)


def test_without_folding_batchnorm_comes_back_bit_for_bit():
    model, spec = make("resnet8")
    frozen, tensors = artifact.freeze(model, spec, fold=False)
    assert frozen["folded"] == []
    assert torch.equal(artifact.thaw(frozen, tensors)(inputs()), model(inputs()))


def test_freezing_leaves_the_network_as_it_was():
    model, spec = compressed("resnet8")
    before = model(inputs())
    artifact.freeze(model, spec)
    assert torch.equal(model(inputs()), before)


def test_biases_of_quantized_layers_lie_on_the_grid_of_integer_kernels():
    model, spec = compressed("seed")
    frozen, tensors = artifact.freeze(model, spec)
    for name, layer in layers.compressible(model):
        step = tensors[f"{name}.weight.scale"] * frozen["layers"][name]["activation"]["step"]
        found = tensors[f"{name}.bias"]
        torch.testing.assert_close(found, (found / step).round() * step, rtol=1e-6, atol=0)
        assert ((found - layer.bias).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("name", ["seed", "resnet8"])
def test_pruned_and_quantized_networks_come_back_bit_for_bit(name):
    model, spec = compressed(name)
    _, tensors = artifact.freeze(model, spec, fold=False)
    for layer_name, layer in layers.compressible(model):
        if layer.bias is not None:
            layer.bias.data.copy_(tensors[f"{layer_name}.bias"])  # on the grid: freezing moves it no more
    thawed = artifact.thaw(*artifact.freeze(model, spec, fold=False))
    assert torch.equal(thawed(inputs()), model(inputs()))


@torch.no_grad()
def test_batchnorm_is_folded_into_scale_and_bias_of_quantized_convolutions():
    model, spec = compressed("resnet8")
    frozen, tensors = artifact.freeze(model, spec)
    thawed = artifact.thaw(frozen, tensors)
    assert len(frozen["folded"]) == 9
    for conv, norm in frozen["folded"]:
        expected, norm = model.get_submodule(conv), model.get_submodule(norm)
        found = thawed.get_submodule(conv)
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight = expected.weight * gain.view(-1, 1, 1, 1)
        torch.testing.assert_close(found.weight, weight, rtol=1e-5, atol=1e-7)
        step = tensors[f"{conv}.weight.scale"] * found.input_quant.step
        assert ((found.bias - (norm.bias - norm.running_mean * gain)).abs() <= 0.501 * step).all()
        assert found.input_quant.step == expected.input_quant.step
        assert found.input_quant.low == expected.input_quant.low


@pytest.mark.parametrize("gain", [1e-30, -1e-12, 1e-8])
def test_a_channel_that_batchnorm_all_but_switches_off_keeps_its_bias(gain):
    model, spec = compressed("resnet8")
    model.bn1.weight.data[2], model.bn1.bias.data[2], model.bn1.running_mean[2] = gain, 0.75, 0.0
    frozen, tensors = artifact.freeze(model, spec)
    assert ["conv1", "bn1"] in frozen["folded"]
    assert tensors["conv1.bias"][2].item() == pytest.approx(0.75, abs=0.01)


def test_quantized_weights_are_stored_as_integers_with_a_scale_a_channel():
    model, spec = compressed("resnet8")
    frozen, tensors = artifact.freeze(model, spec)
    names = [name for name, _ in layers.compressible(artifact.build(spec))]
    assert list(frozen["layers"]) == names
    for i, name in enumerate(names):
        q, scale = tensors[f"{name}.weight.q"], tensors[f"{name}.weight.scale"]
        bits = 5 if i in (0, len(names) - 1) else 4
        assert (q.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, q.shape[:1])
        assert q.abs().max() <= 2 ** (bits - 1) - 1
        assert (scale > 0).all()
        assert frozen["layers"][name]["weight_bits"] == bits
        assert frozen["layers"][name]["activation"]["bits"] == bits
    share = sum(int((tensors[f"{n}.weight.q"] == 0).sum()) for n in names)
    assert share >= 0.6 * sum(tensors[f"{n}.weight.q"].numel() for n in names) - 1


def test_weights_alone_quantized_come_back():
    model, spec = make("resnet8")
    quantize.prepare(model, Quantize(weight_bits=3), [inputs()])
    frozen, tensors = artifact.freeze(model, spec)
    assert not any("activation" in entry for entry in frozen["layers"].values())
    assert_same(model, frozen, tensors)


def test_pruned_zeros_are_no_negative_zeros_whatever_the_sign_of_the_gain():
    # -0.0 is stored by the packed file as it is: it would make every pruned convolution dense
    model, spec = make("resnet8")
    prune.prepare(model, Prune(sparsity=0.9, schedule="one_shot"), recovers=False)
    _, tensors = artifact.freeze(model, spec)
    for name, tensor in tensors.items():
        assert not torch.signbit(tensor[tensor == 0]).any(), name


@pytest.mark.parametrize("quantized", [False, True])
def test_a_network_that_can_not_be_traced_keeps_its_batchnorm(own, quantized):
    model, spec = make(f"{own}:branching")
    if quantized:
        quantize.prepare(model, Quantize(weight_bits=4), [])
    frozen, tensors = artifact.freeze(model, spec)
    assert frozen["folded"] == []
    assert len(norms(artifact.thaw(frozen, tensors))) == 1
    assert_same(model, frozen, tensors)


def test_batchnorm_that_does_not_alone_read_its_convolution_is_kept(own):
    model, spec = make(f"{own}:odd")
    frozen, tensors = artifact.freeze(model, spec)
    assert frozen["folded"] == []
    assert_same(model, frozen, tensors)


def test_freezing_what_was_thawed_changes_nothing():
    model, spec = make("seed", width=8)
    frozen, tensors = artifact.freeze(model, spec)
    again, same = artifact.freeze(artifact.thaw(frozen, tensors), spec)
    assert again == frozen
    assert same.keys() == tensors.keys()
    assert all(torch.equal(same[key], tensors[key]) for key in same)


def test_predictions_are_the_largest_logits_of_all_batches():
    model, _ = make("seed", width=8)
    batches = [(inputs()[:9], torch.zeros(9)), (inputs()[9:], torch.zeros(7))]
    found = artifact.predict(model, [x for x, _ in batches])
    assert found.tolist() == model(inputs()).argmax(1).tolist()


def test_a_spec_of_another_version_is_refused():
    model, spec = make("seed", width=8)
    frozen, tensors = artifact.freeze(model, spec)
    with pytest.raises(ModelError, match="version 2, expected 1"):
        artifact.thaw({**frozen, "version": 2}, tensors)


def without(tensors: artifact.Tensors, key: str) -> artifact.Tensors:
    return {k: v for k, v in tensors.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "9.bias"), "tensors do not fit seed: missing .*9.bias"),
        (lambda t: {**t, "11.weight": torch.zeros(1)}, "tensors do not fit seed: .*unexpected .*11.weight"),
        (lambda t: {**t, "9.bias": torch.zeros(4)}, "tensors do not fit seed"),
        (lambda t: without(t, "7.weight.scale"), "tensors do not fit seed"),
    ],
    ids=["missing", "unexpected", "of another shape", "integers without scale"],
)
def test_tensors_that_do_not_fit_the_spec_are_refused(change, message):
    frozen, tensors = artifact.freeze(*compressed("seed", width=8))
    with pytest.raises(ModelError, match=message):
        artifact.thaw(frozen, change(tensors))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with checksums."""
    folder = tmp_path / "model"
    frozen, tensors = artifact.freeze(*compressed("resnet8"))
    artifact.save_model(folder, frozen, tensors)
    (folder / "model.rdz").write_bytes(pack.pack(frozen, tensors))
    artifact.write_sums(folder)
    return folder


def test_a_model_folder_comes_back(folder):
    frozen, tensors = artifact.freeze(*compressed("resnet8"))
    found_spec, found = artifact.load_model(folder)
    assert found_spec == frozen
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)


def test_a_model_folder_needs_no_pickle(folder, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was read")

    for module, name in [(torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")]:
        monkeypatch.setattr(module, name, refuse)
    expected = artifact.thaw(*artifact.freeze(*compressed("resnet8")))
    from_folder = artifact.thaw(*artifact.load_model(folder))
    from_packed = artifact.thaw(*pack.unpack((folder / "model.rdz").read_bytes()))
    assert torch.equal(from_folder(inputs()), expected(inputs()))
    assert torch.equal(from_packed(inputs()), expected(inputs()))


def test_no_file_of_a_model_folder_is_a_pickle(folder):
    for file in folder.iterdir():
        assert not zipfile.is_zipfile(file), file  # what torch.save writes
        with file.open("rb") as stream, pytest.raises(Exception):  # noqa: B017, PT011 (it raises many)
            pickle.load(stream)


def test_whole_folders_pass_their_checksums(folder):
    artifact.check_sums(folder)
    assert sorted(line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()) == [
        "model.rdz", "model.safetensors", "spec.json",
    ]  # fmt: skip


def test_a_changed_file_is_named(folder):
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps({**spec, "classes": ["z", *spec["classes"][1:]]}))
    with pytest.raises(ModelError, match=r"spec.json: missing or changed"):
        artifact.check_sums(folder)


def test_a_missing_file_is_named(folder):
    (folder / "model.rdz").unlink()
    with pytest.raises(ModelError, match=r"model.rdz: missing or changed"):
        artifact.check_sums(folder)


def test_a_folder_without_checksums_is_no_whole_model(folder):
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ModelError, match="no SHA256SUMS; not a whole model folder"):
        artifact.check_sums(folder)


def test_checksums_reach_no_file_outside_the_folder(folder):
    (folder.parent / "secret").write_text("x")
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ../secret\n")
    with pytest.raises(ModelError, match=r"model/secret: missing or changed"):
        artifact.check_sums(folder)


def test_missing_and_torn_tensors_are_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"model.safetensors: .*; export the model again"):
        artifact.load_model(folder)
    file.unlink()
    with pytest.raises(ModelError, match=r"model.safetensors: .*No such file"):
        artifact.load_model(folder)


def test_a_missing_spec_is_named(folder):
    (folder / "spec.json").unlink()
    with pytest.raises(RaydeepError, match=r"spec.json: no such file"):
        artifact.load_model(folder)
