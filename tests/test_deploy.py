"""ONNX that predicts what the packed file predicts, the model folder, verification, prediction."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from raydeep.compress import pack, plan
from raydeep.config import Augment, Export, Job, Train
from raydeep.data.augment import Augmenter, to_input
from raydeep.data.batches import Batches
from raydeep.data.resident import Dataset, Pixels
from raydeep.deploy import export, gate, runtimes, verify
from raydeep.disk import read_json, write_json
from raydeep.errors import ArtifactError, ExportError
from raydeep.machine import usable_cores
from raydeep.model import artifact
from raydeep.train import losses
from raydeep.train.loop import fit

W, A, EDGE = "quantize.weight_bits", "quantize.activation_bits", "quantize.edge_bits"
RECOVER = {"recover.epochs": 1, "recover.lr": 0.05, "recover.batch_size": 32}

# name → (network, compression)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "float": ("seed", {"recover.epochs": 0}),
    "W4A8": ("seed", {W: 4, A: 8, EDGE: None, "prune.sparsity": 0.5, **RECOVER}),
    "W8A8": ("seed", {W: 8, A: 8, **RECOVER}),
    "W3A4": ("seed", {W: 3, A: 4, **RECOVER}),
    "W4": ("seed", {W: 4, **RECOVER}),
    "resnet8 W4A8": ("resnet8", {W: 4, A: 8, **RECOVER}),
    "tokens W4A8": ("own_tokens:tokens", {W: 4, A: 8, **RECOVER}),
}

QUICK = Export(latency_rounds=3, batch_sizes=(1,))

OWN = """
from torch import nn

class Tokens(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, stride=2, padding=1)
        self.each = nn.Linear(8, 12)  # of each place: its input has 3 dimensions
        self.head = nn.Linear(12 * 16, num_classes)

    def forward(self, x):
        places = self.stem(x).relu().flatten(2).transpose(1, 2)
        return self.head(self.each(places).relu().flatten(1))

def tokens(num_classes, in_channels, image_size):
    return Tokens(num_classes, in_channels)
"""


class Exported(NamedTuple):
    """A compressed model and its ONNX."""

    packed: bytes
    spec: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    onnx: bytes


@pytest.fixture(scope="module")
def compressed(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], bytes]]:
    """Packed bytes of a name of MODELS: trained two epochs, compressed, recovered one epoch."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_tokens.py").write_text(OWN)
    sys.path.insert(0, str(folder))
    dense: dict[str, plan.Dense] = {}
    found: dict[str, bytes] = {}

    def train(network: str) -> plan.Dense:
        args = {} if ":" in network else {"width": 8}
        spec = artifact.make_spec(network, args, digits.classes, digits.shape, digits.mean, digits.std)
        torch.manual_seed(0)
        model = artifact.build(spec)
        cfg = Train(epochs=2, batch_size=32, lr=0.1)
        batches = Batches(digits.train, Augmenter(Augment(), digits.mean, digits.std), cfg.batch_size, seed=0)
        fit(model, losses.cross_entropy(), batches, cfg)
        return plan.Dense(*artifact.freeze(model.eval(), spec, fold=False))

    def get(name: str) -> bytes:
        if name not in found:
            network, values = MODELS[name]
            if network not in dense:
                dense[network] = train(network)
            found[name] = plan.compress(Job().with_values(values), dense[network], digits, seed=0).packed
        return found[name]

    yield get
    sys.path.remove(str(folder))
    sys.modules.pop("own_tokens", None)


@pytest.fixture(scope="module")
def exported(compressed: Callable[[str], bytes]) -> Callable[[str], Exported]:
    """The ONNX of a name of MODELS beside what it was made from; made once."""
    found: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in found:
            packed = compressed(name)
            spec, tensors = pack.unpack(packed)
            found[name] = Exported(packed, spec, tensors, export.to_onnx(spec, tensors))
        return found[name]

    return get


@pytest.fixture(scope="module")
def every_digit(digits: Dataset) -> Pixels:
    splits = (digits.train, digits.val, digits.test)
    return Pixels(np.concatenate([s.images for s in splits]), np.concatenate([s.labels for s in splits]))


def run(model: bytes, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def optimized(model: bytes, path: Path) -> list[str]:
    """Kinds of the nodes that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(str(path)).graph.node]


def stored_weights(model: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
    """Integers, less their zero point, and as stored, of each quantized weight in graph order."""
    graph = onnx.load_from_string(model).graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and constants.get(node.input[0], np.zeros(1)).ndim > 1:
            stored, zero = constants[node.input[0]], constants[node.input[2]]
            zero = zero.astype(np.int32).reshape(-1, *[1] * (stored.ndim - 1))
            found.append((stored.astype(np.int32) - zero, stored))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_onnx_predicts_what_the_packed_model_predicts(exported, every_digit, digits, name):
    model = exported(name)
    expected = plan.predictions(artifact.thaw(model.spec, model.tensors), digits, every_digit, 512)
    found = run(model.onnx, every_digit.images).argmax(1)
    assert gate.refusal(expected, found, every_digit.labels) is None
    assert (expected == every_digit.labels).mean() > 0.5  # a network that tells digits apart


@pytest.mark.parametrize(
    ("name", "share"),
    [("float", 1.0), ("W4", 1.0), ("tokens W4A8", 0.95)],  # rounding lets a few inputs fall on the next level
)
@torch.no_grad()
def test_logits_of_float_layers_are_the_same(exported, digits, name, share):
    model = exported(name)
    images = torch.from_numpy(digits.test.images.copy())
    expected = artifact.thaw(model.spec, model.tensors)(to_input(images, digits.mean, digits.std)).numpy()
    close = np.isclose(run(model.onnx, digits.test.images), expected, rtol=1e-4, atol=1e-4)
    assert close.mean() >= share


@pytest.mark.parametrize("name", ["W4A8", "W8A8", "W3A4"])
def test_quantized_layers_run_in_integer_kernels(exported, tmp_path, name):
    kinds = optimized(exported(name).onnx, tmp_path / "optimized.onnx")
    assert (kinds.count("QLinearConv"), kinds.count("QGemm")) == (2, 2)
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"} & set(kinds)


def test_convolutions_whose_output_is_quantized_run_in_integer_kernels(exported, tmp_path):
    # in a residual network the others feed an addition, in float
    kinds = optimized(exported("resnet8 W4A8").onnx, tmp_path / "optimized.onnx")
    assert (kinds.count("QLinearConv"), kinds.count("QGemm")) == (3, 1)


def test_a_layer_that_integer_kernels_can_not_take_stays_float_and_the_others_do_not(exported, tmp_path):
    kinds = optimized(exported("tokens W4A8").onnx, tmp_path / "optimized.onnx")
    assert kinds.count("QGemm") == 1
    assert len(stored_weights(exported("tokens W4A8").onnx)) == 2


@pytest.mark.parametrize("name", ["W4A8", "W8A8", "W3A4", "resnet8 W4A8"])
def test_integers_in_onnx_are_those_of_the_packed_model(exported, name):
    model = exported(name)
    expected = [t.numpy() for n, t in model.tensors.items() if n.endswith(".weight.q")]
    found = [integers for integers, _ in stored_weights(model.onnx)]

    def order(array: np.ndarray) -> tuple[Any, ...]:
        return array.shape, array.astype(np.int32).tobytes()

    assert len(found) == len(expected)
    for a, b in zip(sorted(found, key=order), sorted(expected, key=order), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("name", ["W8A8", "W4A8"])
def test_two_products_fit_the_16_bits_that_processors_without_vnni_add_them_in(exported, name):
    stored = [weight for _, weight in stored_weights(exported(name).onnx)]
    assert {weight.dtype for weight in stored} == {np.dtype(np.int8)}
    assert max(2 * 255 * int(np.abs(weight.astype(int)).max()) for weight in stored) <= 32767


def test_quantized_onnx_is_smaller(exported):
    assert len(exported("W4A8").onnx) < 0.5 * len(exported("float").onnx)


@pytest.mark.parametrize("name", ["float", "W4A8", "resnet8 W4A8", "tokens W4A8"])
def test_onnx_takes_any_batch_size(exported, digits, name):
    model = exported(name).onnx
    images = digits.test.images[:7]
    whole = run(model, images)
    assert whole.shape == (7, 10)
    assert whole.dtype == np.float32
    one_by_one = np.concatenate([run(model, images[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(one_by_one, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_onnx_holds_no_path_of_this_machine(exported, name):
    model = exported(name).onnx
    for path in (b"/work", b"site-packages", b"/tmp", b".py", os.getcwd().encode()):
        assert path not in model


def test_a_network_without_onnx_form_is_refused_by_name(monkeypatch, compressed):
    spec, tensors = pack.unpack(compressed("float"))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such operator\nand a long trace")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ExportError, match=r"^seed can't be written as ONNX: no such operator$"):
        export.to_onnx(spec, tensors)


# the model folder


@pytest.fixture
def quick_onnx(monkeypatch: pytest.MonkeyPatch, exported: Callable[[str], Exported]) -> None:
    """ONNX files of MODELS are taken from the cache."""
    known = {exported(name).packed: exported(name).onnx for name in ("float", "W4A8")}
    monkeypatch.setattr(export, "to_onnx", lambda spec, tensors, **_: known[pack.pack(spec, tensors)])


@pytest.fixture
def folder(tmp_path: Path, quick_onnx: None, exported: Callable[[str], Exported]) -> Path:
    """The model folder of W4A8."""
    export.write_model(tmp_path / "models" / "t001", exported("W4A8").packed)
    return tmp_path / "models" / "t001"


def test_a_model_folder_is_whole_and_nothing_is_left_beside_it(folder, exported):
    assert os.listdir(folder.parent) == ["t001"]
    assert sorted(os.listdir(folder)) == [
        "README.md", "SHA256SUMS", "export.json", "model.onnx", "model.rdz", "model.safetensors", "spec.json",
    ]  # fmt: skip
    artifact.check_sums(folder)
    assert (folder / "model.rdz").read_bytes() == exported("W4A8").packed
    spec, tensors = artifact.load_model(folder)
    assert spec == exported("W4A8").spec
    assert all(torch.equal(tensors[key], tensor) for key, tensor in exported("W4A8").tensors.items())


def test_an_old_model_folder_is_replaced_whole(folder, exported):
    (folder / "verify.json").write_text("{}")
    export.write_model(folder, exported("float").packed)
    assert not (folder / "verify.json").exists()
    assert (folder / "model.rdz").read_bytes() == exported("float").packed
    assert os.listdir(folder.parent) == ["t001"]


def test_an_export_that_fails_leaves_the_old_folder(folder, exported, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ExportError("no")

    monkeypatch.setattr(export, "to_onnx", fail)
    with pytest.raises(ExportError):
        export.write_model(folder, exported("float").packed)
    artifact.check_sums(folder)
    assert (folder / "model.rdz").read_bytes() == exported("W4A8").packed
    assert os.listdir(folder.parent) == ["t001"]


def test_without_formats_there_is_no_onnx(tmp_path, exported):
    export.write_model(tmp_path / "t", exported("float").packed, formats=())
    assert not (tmp_path / "t" / "model.onnx").exists()
    artifact.check_sums(tmp_path / "t")


def test_the_model_card_says_what_the_model_is(folder, exported):
    card = (folder / "README.md").read_text()
    assert "seed, 10 classes" in card
    assert "[N, 8, 8, 1] (grey)" in card
    assert "weight bits: 4." in card
    assert f"| `model.rdz` | {len(exported('W4A8').packed):,} |" in card


# verification, in a real process


def test_verification_counts_predictions_that_differ(folder, exported, digits):
    dense = folder.parent / "dense"
    export.write_model(dense, exported("float").packed)
    wrong = folder.parent / "t002"
    shutil.copytree(folder, wrong)
    result = plan.measure(exported("W4A8").packed, digits, 512)
    val, test = result.val_predictions, result.test_predictions
    other = test.copy()
    other[3] = (other[3] + 1) % 10
    candidates = [verify.Candidate(folder, val, test), verify.Candidate(wrong, val, other)]
    facts = verify.verify(candidates, dense, digits, cfg=QUICK)
    assert facts["t001"]["verified"] is True
    assert (facts["t001"]["packed_differ"], facts["t001"]["onnx_differ"]) == (0, 0)
    assert facts["t002"]["verified"] is False
    assert facts["t002"]["packed_differ"] == 1
    right = facts["t001"]
    assert (right["test_accuracy"], right["val_accuracy"]) == (result.test_accuracy, result.val_accuracy)
    assert right["rows"] == len(val) + len(test)
    assert right["bytes"] == len(exported("W4A8").packed)
    assert right["onnx_bytes"] == len(exported("W4A8").onnx)
    assert right["dense_bytes"] == (dense / "model.safetensors").stat().st_size
    assert right["latency_ms"] > 0
    assert right["latency_rounds"] == 3
    rows = right["latency"]
    assert [(r["runtime"], r["form"]) for r in rows if r["threads"] == 1] == [
        ("onnxruntime", "exact"), ("onnxruntime", "dense"), ("torch", "eager"),
    ]  # fmt: skip
    assert all(0 < r["median_ms"] <= r["p95_ms"] and r["batch"] == 1 and r["rounds"] == 3 for r in rows)
    assert rows[0]["ratio_to_dense_onnx"] == right["latency_ratio"]
    assert {r["threads"] for r in rows} == {1, usable_cores()}
    # what failed is not left under a final name
    assert not wrong.exists()
    assert facts["t002"]["folder"] == str(wrong) + ".unverified"
    assert "packed file, test: 1 predictions are not those that were scored" in facts["t002"]["refused"]
    artifact.check_sums(Path(facts["t002"]["folder"]))
    artifact.check_sums(folder)  # verify.json is among the sums now
    assert "verify.json" in (folder / "SHA256SUMS").read_text()


def test_a_form_that_fails_gives_way_to_the_exact_one(tmp_path, exported, digits, monkeypatch):
    model = exported("W4A8")
    folder = tmp_path / "t001"
    monkeypatch.setattr(export, "to_onnx", lambda spec, tensors, **_: model.onnx)
    export.write_model(folder, model.packed)
    write_json(folder / "export.json", {"form": "whole", "target": "avx2", "forms": {"whole": {}}})
    shutil.copy(tmp_path / "t001" / "model.onnx", tmp_path / "right.onnx")
    other = onnx.load_from_string(model.onnx)
    for node in other.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Neg"  # another network
    (folder / "model.onnx").write_bytes(other.SerializeToString())
    artifact.write_sums(folder)
    result = plan.measure(model.packed, digits, 512)
    candidate = verify.Candidate(folder, result.val_predictions, result.test_predictions)
    facts = verify.verify([candidate], folder, digits, cfg=QUICK)["t001"]
    assert (facts["verified"], facts["form"], facts["folder"]) == (True, "exact", str(folder))
    assert (folder / "model.onnx").read_bytes() == model.onnx
    assert read_json(folder / "export.json")["forms"]["whole"]["refused"]


def test_verification_of_a_damaged_folder_is_an_export_error(folder, digits):
    packed = bytearray((folder / "model.rdz").read_bytes())
    packed[len(packed) // 2] ^= 1
    (folder / "model.rdz").write_bytes(packed)
    none = np.zeros(0, np.int64)
    with pytest.raises(ExportError, match=r"process ended with 1: .*model.rdz: missing or changed"):
        verify.verify([verify.Candidate(folder, none, none)], folder, digits, cfg=QUICK)
    assert not (folder / "verify.json").exists()


def test_a_file_that_is_no_onnx_is_an_export_error(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not onnx")
    with pytest.raises(ArtifactError, match=r"model.onnx: not an ONNX file, or cut off"):
        runtimes.open_onnx(tmp_path / "model.onnx")
