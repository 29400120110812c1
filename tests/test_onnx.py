"""The forms of ONNX files: what is quantized and how each target stores it; gate, timing and files that are refused."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from raydeep.compress import pack, quantize
from raydeep.config import Augment, Export, Quantize, Train
from raydeep.data.augment import Augmenter, to_input
from raydeep.data.batches import Batches
from raydeep.data.resident import Dataset
from raydeep.deploy import calibrate, export, forms, gate, integers, onnx_graph, runtimes, timing, verify
from raydeep.deploy.integers import Grid
from raydeep.errors import ArtifactError, RaydeepError
from raydeep.model import artifact
from raydeep.train import losses
from raydeep.train.loop import fit

TARGETS = ("avx2", "vnni", "arm", "gpu")
# name → (network, its args, the quantize section)
NETS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "W8A8": ("resnet8", {"width": 8}, {"weight_bits": 8, "activation_bits": 8}),
    "W4A4": ("resnet8", {"width": 8}, {"weight_bits": 4, "activation_bits": 4}),
    "powers": ("resnet8", {"width": 8}, {"weight_bits": 8, "activation_bits": 8, "power_of_two": True}),
}


class Net(NamedTuple):
    """A quantized network that knows the digits a little, its float graph and what integers.py needs."""

    spec: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    layers: dict[str, Any]
    plain: onnx.ModelProto
    arrays: dict[str, np.ndarray]

    def form(self, target: Any, grids: dict[str, Grid] | None) -> bytes:
        """Whole with grids, exact without."""
        model = onnx.ModelProto()
        model.CopyFrom(self.plain)
        if grids is None:
            integers.exact(model, self.layers, self.arrays, target)
        else:
            integers.whole(model, self.layers, self.arrays, target, grids)
        return onnx_graph.to_bytes(model)


@pytest.fixture(scope="module")
def net(digits: Dataset) -> Any:
    """A name of NETS, made once: three epochs, then post-training quantization."""
    found: dict[str, Net] = {}
    dense: list[Any] = []
    images = torch.from_numpy(digits.train.images[:512].copy())
    inputs = to_input(images, digits.mean, digits.std)

    def trained(name: str) -> tuple[dict[str, Any], torch.nn.Module]:
        network, args, _ = NETS[name]
        spec = artifact.make_spec(network, args, digits.classes, digits.shape, digits.mean, digits.std)
        torch.manual_seed(0)
        model = artifact.build(spec)
        batches = Batches(digits.train, Augmenter(Augment(), digits.mean, digits.std), 32, seed=0)
        fit(model, losses.cross_entropy(), batches, Train(epochs=3, batch_size=32, lr=0.1))
        return spec, model

    def get(name: str) -> Net:
        if name not in found:
            if not dense:
                dense.append(trained(name))
            spec, model = copy.deepcopy(dense[0])
            quantize.prepare(model.eval(), Quantize(**NETS[name][2]), [inputs])
            spec, tensors = artifact.freeze(model.eval(), spec)
            layers, plain, arrays = export._plain(spec, tensors)
            found[name] = Net(spec, tensors, layers, plain, arrays)
        return found[name]

    return get


def grids(net: Net, digits: Dataset, target: Any = "avx2") -> dict[str, Grid]:
    return calibrate.grids(net.plain, integers.places(net.plain, net.layers), digits.train.images[:128], target)


def logits(model: bytes, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def kernels(model: bytes, path: Path, signed: bool = False) -> Counter[str]:
    """Kinds of the nodes that onnxruntime runs; `signed`: as on ARM, where it has kernels for signed activations."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    if signed:
        options.add_session_config_entry("session.qdqisint8allowed", "1")
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def constants(model: bytes) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in onnx.load_from_string(model).graph.initializer}


# the whole form


@pytest.mark.parametrize(("name", "target"), [("W8A8", "avx2"), ("W8A8", "vnni"), ("W8A8", "arm"), ("powers", "avx2")])
def test_a_residual_network_runs_in_integer_kernels_from_first_layer_to_last(net, digits, tmp_path, name, target):
    model = net(name)
    found = kernels(model.form(target, grids(model, digits)), tmp_path / "o.onnx", signed=target == "arm")
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"]) == (9, 3, 1)
    assert not {"Conv", "FusedConv", "Gemm", "DequantizeLinear"} & set(found)
    assert found["Add"] == 1  # of the normalisation
    exact = kernels(model.form(target, None), tmp_path / "o.onnx", signed=target == "arm")
    assert exact["QLinearConv"] == 3


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NETS)
def test_every_form_predicts_what_the_packed_model_predicts(net, digits, name, target):
    model = net(name)
    images, labels = digits.test.images, digits.test.labels
    packed = artifact.predict(
        artifact.thaw(model.spec, model.tensors), [to_input(torch.from_numpy(images.copy()), digits.mean, digits.std)]
    )
    assert (packed == labels).mean() > 0.6
    exact = logits(model.form(target, None), images).argmax(1)
    whole = logits(model.form(target, grids(model, digits, target)), images).argmax(1)
    share = 0.01 if target != "gpu" else 0.04  # 7 bits where nothing is negative
    assert (exact != packed).mean() <= share
    assert (whole != packed).mean() <= (share if name != "W4A4" else 0.06)  # 16 levels: more inputs on the edge of one


@pytest.mark.parametrize("name", ["W8A8", "W4A4"])
def test_the_targets_avx2_vnni_and_arm_give_the_same_numbers(net, digits, name):
    model = net(name)
    found = grids(model, digits)
    for form in (None, found):
        one, *others = (logits(model.form(t, form), digits.test.images[:64]) for t in ("avx2", "vnni", "arm"))
        for other in others:  # kernels that scale in another order fall on the next level now and then
            assert np.isclose(other, one, atol=0.02 * np.abs(one).max()).mean() > 0.99


@pytest.mark.parametrize("target", TARGETS)
def test_weights_of_every_target_are_the_integers_of_the_packed_model(net, digits, target):
    model = net("W8A8")
    held = constants(model.form(target, grids(model, digits, target)))
    for name in model.layers:
        stored, zero = held[f"{name}.q"].astype(int), held[f"{name}.zero"].astype(int)
        assert np.array_equal(
            stored - zero.reshape(-1, *[1] * (stored.ndim - 1)), model.tensors[f"{name}.weight.q"].numpy()
        )


def test_avx2_never_adds_two_products_that_exceed_16_bits(net, digits):
    for name in NETS:
        model = net(name)
        held = constants(model.form("avx2", grids(model, digits)))
        for layer, entry in model.layers.items():
            stored = held[f"{layer}.q"]
            most = 2 ** entry["activation"]["bits"] - 1
            signed_fits = 2 * most * int(np.abs(stored.astype(int)).max()) <= 32767
            assert stored.dtype == np.uint8 or signed_fits  # two unsigned factors are added in 32 bits
            assert (stored.dtype == np.uint8) == (entry["weight_bits"] == 8 and most == 255)


def test_63_levels_a_side_need_no_unsigned_weights():
    integers_of = np.array([[-63, 63], [1, 2]], np.int8)
    stored, zero = integers.stored_weight(integers_of, Grid(0.1, 0, 8), "avx2")
    assert stored.dtype == np.int8
    assert not zero.any()
    assert integers.stored_weight(integers_of * 2, Grid(0.1, 0, 8), "avx2")[0].dtype == np.uint8
    assert integers.stored_weight(integers_of * 2, Grid(0.1, 0, 8), "vnni")[0].dtype == np.int8


def test_arm_and_gpu_store_signed_integers_and_gpu_no_zero_point_but_0(net, digits):
    model = net("W8A8")
    for target in ("arm", "gpu"):
        held = constants(model.form(target, grids(model, digits, target)))
        zeros = [v for k, v in held.items() if k.startswith("zero.") or k.endswith(".zero")]
        assert {v.dtype for v in zeros} == {np.dtype(np.int8)}
        assert target != "gpu" or not any(v.any() for v in zeros)
    graph = onnx.load_from_string(model.form("gpu", grids(model, digits, "gpu"))).graph
    made = {out: node for node in graph.node for out in node.output}
    for node in graph.node:  # TensorRT: a pair side by side
        if node.op_type == "DequantizeLinear" and node.input[0] in made:
            assert made[node.input[0]].op_type == "QuantizeLinear"


@pytest.mark.parametrize("grid", [Grid(0.5, 0), Grid(0.5, -128), Grid(0.5, -30), Grid(0.5, 0, 4), Grid(0.5, -8, 4)])
def test_a_target_stores_the_same_values(grid):
    for target in ("avx2", "vnni", "arm"):
        same, zero, top = integers.for_target(grid, target)
        assert same == grid
        held = np.iinfo(zero.dtype)
        assert held.min <= grid.low + int(zero) <= top <= held.max
        assert top - int(zero) == grid.high
    wide, zero, top = integers.for_target(grid, "gpu")
    assert (int(zero), top <= 127) == (0, True)
    assert wide.step * top >= grid.step * grid.high * (1 - 1e-9)  # nothing is cut off


def test_a_shortcut_reads_what_the_first_convolution_of_its_block_reads(net, digits):
    model = net("W8A8")
    graph = onnx.load_from_string(model.form("avx2", grids(model, digits))).graph
    adds = [n for n in graph.node if n.op_type == "Add" and all(i.endswith(".dq") for i in n.input)]
    assert len(adds) == 3
    read_by_convs = {n.input[0] for n in graph.node if n.op_type == "Conv"}
    assert any(set(add.input) & read_by_convs for add in adds)  # the block with an identity shortcut
    assert len({n.input[0] for n in graph.node if n.op_type == "Conv"}) == 7  # two blocks project: one tensor for two


def test_the_grid_of_a_sample_has_least_error_and_starts_at_0_where_nothing_is_negative():
    rng = np.random.default_rng(0)
    for values in (np.abs(rng.normal(size=4000)), rng.normal(size=4000), rng.normal(size=4000) + 2):
        values = values.astype(np.float32)
        grid = calibrate.best(values)
        full = Grid(float(np.ptp(np.append(values, 0))) / 255, round(min(0, values.min()) / (np.ptp(values) / 255)))
        assert grid.error(values) <= full.error(values) * 1.01
        assert (grid.low == 0) == (values.min() >= 0)
        even = calibrate.best(values, symmetric=True)
        assert even.low == (0 if values.min() >= 0 else -128)
    assert calibrate.best(np.zeros(10, np.float32)).step > 0


def test_means_over_the_picture_become_pools():
    # OpenVINO loses accuracy on integers after ReduceMean
    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = images.permute(0, 3, 1, 2).float()
            return x.mean([2, 3]) + torch.nn.functional.adaptive_avg_pool2d(x * x, 1).flatten(1)

    images = torch.arange(2 * 6 * 4 * 3, dtype=torch.uint8).view(2, 6, 4, 3)
    program = torch.onnx.export(
        Mean().eval(), (images,), dynamo=True, opset_version=export.OPSET, input_names=["images"], verbose=False
    )  # fmt: skip
    model = program.model_proto
    before = logits(model.SerializeToString(), images.numpy())
    onnx_graph.pool_means(model)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert (kinds["AveragePool"], kinds["ReduceMean"]) == (2, 0)
    np.testing.assert_allclose(logits(onnx_graph.to_bytes(model), images.numpy()), before, rtol=1e-6)


# the choice of a form


FACTS = {
    "whole": {"ratio": 1.5, "refused": None}, "exact": {"ratio": 0.9, "refused": None},
    "float": {"ratio": 1.0, "refused": None},
}  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "passed", "timed", "expected"),
    [
        (1.5, ["whole", "exact", "float"], True, "whole"),
        (0.6, ["whole", "exact", "float"], True, "float"),
        (0.95, ["whole", "exact", "float"], True, "whole"),  # float weights are worth 4 times the bytes from 10 % on
        (1.5, ["exact", "float"], True, "float"),
        (0.1, ["whole", "exact", "float"], False, "whole"),  # times of another machine say nothing
        (0.1, ["float"], False, "float"),
    ],
)
def test_the_fastest_form_that_passes_wins(ratio, passed, timed, expected):
    facts = {**FACTS, "whole": {"ratio": ratio, "refused": None}}
    facts["exact"] = {"ratio": 0.7, "refused": None}
    assert forms._first(passed, facts, timed) == expected


def test_the_form_of_a_file_is_measured_and_written_down(net, digits, tmp_path, monkeypatch):
    model = net("W8A8")
    inputs = [to_input(torch.from_numpy(digits.val.images.copy()), digits.mean, digits.std)]
    predictions = artifact.predict(artifact.thaw(model.spec, model.tensors), inputs)
    sample = forms.sample(digits, predictions)
    monkeypatch.setattr(export, "_plain", lambda *_: (model.layers, copied(model.plain), model.arrays))
    export.write_model(tmp_path / "t", pack.pack(model.spec, model.tensors), sample=sample, cfg=Export())
    facts = export.read_json(tmp_path / "t" / "export.json")
    assert set(facts["forms"]) == {"whole", "exact", "float"}
    assert facts["forms"]["exact"]["differ"] <= 1
    assert facts["forms"][facts["form"]]["refused"] is None
    assert facts["forms"][facts["form"]]["bytes"] == (tmp_path / "t" / "model.onnx").stat().st_size
    assert all(f["ms"] > 0 and f["ratio"] > 0 for f in facts["forms"].values())
    # what predicts otherwise is not taken, however fast
    other = forms.Sample(sample.calibration, sample.images, sample.labels, (sample.predictions + 1) % 10)
    assert forms.choose(export.to_forms(model.spec, model.tensors, "avx2", sample.calibration), other, "avx2", 1)[
        0
    ] == "exact"  # fmt: skip
    export.write_model(tmp_path / "t", pack.pack(model.spec, model.tensors))  # no pictures: exact
    assert export.read_json(tmp_path / "t" / "export.json")["form"] == "exact"
    assert export.make_exact(tmp_path / "t") is False


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    new = onnx.ModelProto()
    new.CopyFrom(model)
    return new


# the gate


@pytest.mark.parametrize(
    ("rows", "differ", "lost", "passes"),
    [
        (10_000, 100, 10, True), (10_000, 101, 0, False), (10_000, 50, 11, False), (10_000, 50, -11, False),
        (100, 1, 1, True), (100, 2, 0, False), (1500, 10, 1, True), (1500, 10, 2, False), (3000, 20, 3, True),
    ],
)  # fmt: skip
def test_the_gate(rows, differ, lost, passes):
    packed = np.zeros(rows, int)
    found = packed.copy()
    found[:differ] = 1
    labels = np.zeros(rows, int)
    labels[:differ] = 2  # wrong either way, except:
    labels[: abs(lost)] = 0 if lost > 0 else 1
    assert (gate.refusal(packed, found, labels) is None) is passes


def test_a_model_that_fails_loses_its_name(tmp_path):
    for content in ("old", "new"):
        (tmp_path / "t001").mkdir()
        (tmp_path / "t001" / "file").write_text(content)
        assert verify.withdraw(tmp_path / "t001") == tmp_path / "t001.unverified"
    assert not (tmp_path / "t001").exists()
    assert (tmp_path / "t001.unverified" / "file").read_text() == "new"


# timing


def test_timing_interleaves_and_is_bounded(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call(seconds: float) -> Any:
        def run(images: np.ndarray) -> None:
            clock[0] += seconds

        return run

    example = np.zeros((1, 2, 2, 1), np.uint8)
    slow, fast = timing.interleaved([call(0.008), call(0.002)], example, 5)
    assert (len(slow.rounds), len(slow.calls), len(fast.calls)) == (5, 10, 25)
    assert timing.ratio(slow, fast) == (pytest.approx(4), pytest.approx(0))
    assert slow.facts()["median_ms"] == pytest.approx(8)
    [huge] = timing.interleaved([call(9.0)], example, 15)
    assert len(huge.rounds) == 2  # none begins after LIMIT_S


# runtimes, and files that they must not open


def small(path: Path, change: Any = None) -> Path:
    weight = numpy_helper.from_array(np.ones((12, 2), np.float32), "weight")
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("Cast", ["flat"], ["x"], to=1),
        helper.make_node("MatMul", ["x", "weight"], ["logits"]),
    ]  # fmt: skip
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 2, 2, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [images], [logits], [weight]), opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )  # fmt: skip
    if change is not None:
        change(model)
    path.write_bytes(model.SerializeToString())
    return path


def outside(tensor: Any, location: str) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value=location)


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "weights.bin"])
def test_a_tensor_kept_in_another_file_is_refused_before_a_runtime_sees_it(tmp_path, monkeypatch, location):
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    (tmp_path / "weights.bin").write_bytes(bytes(96))
    file = small(tmp_path / "model.onnx", lambda model: outside(model.graph.initializer[0], location))
    with pytest.raises(ArtifactError, match=rf"model.onnx: tensor weight is kept in another file, '{location}'"):
        runtimes.open_onnx(file)


def test_such_tensors_are_found_in_attributes_and_subgraphs(tmp_path):
    def hide(model: Any) -> None:
        inner = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(3, np.float32), "deep"))
        outside(inner.attribute[0].t, "/dev/zero")
        out = helper.make_tensor_value_info("c", TensorProto.FLOAT, [3])
        branch = helper.make_graph([inner], "b", [], [out])
        model.graph.node.append(helper.make_node("If", ["k"], ["z"], then_branch=branch, else_branch=branch))

    with pytest.raises(ArtifactError, match="tensor deep is kept in another file"):
        runtimes.checked(small(tmp_path / "model.onnx", hide))


def test_files_that_are_cut_off_empty_or_too_large_are_refused(tmp_path, monkeypatch):
    file = small(tmp_path / "model.onnx")
    assert runtimes.open_onnx(file)(np.ones((3, 2, 2, 3), np.uint8)).tolist() == [[12.0, 12.0]] * 3
    whole = file.read_bytes()
    for data in (b"", b"\0", whole[: len(whole) // 2], b"not onnx"):
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match=re.escape(str(file))):
            runtimes.open_onnx(file)
    with pytest.raises(ArtifactError, match="can't be read"):
        runtimes.open_onnx(tmp_path / "none.onnx")
    file.write_bytes(whole)
    monkeypatch.setattr(runtimes, "MAX_BYTES", 10)
    with pytest.raises(ArtifactError, match="an ONNX file has at most 10"):
        runtimes.open_onnx(file)


def test_a_runtime_that_is_not_installed_is_named_before_anything_is_trained(monkeypatch):
    cfg = Export(runtimes=("onnxruntime", "openvino"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        RaydeepError, match=re.escape("export.runtimes openvino needs: pip install 'raydeep[openvino]'")
    ):
        runtimes.check_runtimes(cfg)
    runtimes.check_runtimes(Export())


def test_openvino_predicts_what_onnxruntime_predicts(net, digits, tmp_path):
    pytest.importorskip("openvino")
    model = net("W8A8")
    (tmp_path / "model.onnx").write_bytes(model.form("vnni", grids(model, digits)))
    images, labels = digits.test.images, digits.test.labels
    one = runtimes.open_onnx(tmp_path / "model.onnx")(images).argmax(1)
    two = runtimes.open_openvino(tmp_path / "model.onnx")(images).argmax(1)
    assert (one != two).mean() <= 0.01
    assert abs((one == labels).mean() - (two == labels).mean()) <= 0.01
    (tmp_path / "model.onnx").write_bytes(b"not onnx")
    with pytest.raises(ArtifactError, match="not an ONNX file"):
        runtimes.open_openvino(tmp_path / "model.onnx")
