"""Turns the float ONNX graph of a frozen network into an integer one (QDQ), number for number.

onnxruntime runs DequantizeLinear → Conv/Gemm → QuantizeLinear in integer kernels. Weights keep their integers;
activations are uint8 with the learned step, and a Clip where they have fewer than 8 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from raydeep.model.artifact import bias_integers

MOVES = ("MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")  # commute with quantization


class _Graph:
    """A GraphProto with look-ups."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.weights = {i.name: i for i in graph.initializer}
        self.before: dict[str, list[Any]] = {}  # node name → nodes to place before it
        self.after: dict[str, list[Any]] = {}

    def producer(self, tensor: str) -> Any:
        return next((n for n in self.graph.node if tensor in n.output), None)

    def consumers(self, tensor: str) -> list[Any]:
        return [n for n in self.graph.node if tensor in n.input]

    def constant(self, name: str, values: np.ndarray) -> str:
        if name not in self.weights:
            proto = numpy_helper.from_array(values, name)
            self.graph.initializer.append(proto)
            self.weights[name] = self.graph.initializer[-1]
        return name

    def rebuild(self) -> None:
        """Put the new nodes where they belong, drop weights that nothing reads."""
        ordered = [
            n
            for node in self.graph.node
            for n in (*self.before.get(node.name, []), node, *self.after.get(node.name, []))
        ]
        del self.graph.node[:]
        self.graph.node.extend(ordered)
        read = {i for node in ordered for i in node.input} | {o.name for o in self.graph.output}
        kept = [i for i in self.graph.initializer if i.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)


def quantizable(model: onnx.ModelProto, layers: dict[str, Any], weights: dict[str, np.ndarray]) -> set[str]:
    """Names of the layers whose node and untouched weight are in the graph.

    Args:
        model: the float graph; the weight of layer L is called `net.L.weight`.
        layers: layer name → entry of the spec.
        weights: layer name → float32 weight, as it must stand in the graph.
    """
    graph = _Graph(model.graph)
    found = set()
    for name in layers:
        node, key = _node(graph, name), f"net.{name}.weight"
        if node is not None and np.array_equal(numpy_helper.to_array(graph.weights[key]), weights[name]):
            found.add(name)
    return found


def _node(graph: _Graph, layer: str) -> Any:
    readers = graph.consumers(f"net.{layer}.weight")
    if len(readers) != 1 or f"net.{layer}.weight" not in graph.weights:
        return None
    node = readers[0]
    if node.input[1] != f"net.{layer}.weight" or node.op_type not in ("Conv", "Gemm"):
        return None
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Gemm" and (attributes.get("transB") != 1 or attributes.get("transA", 0)):
        return None
    return node


def to_integers(model: onnx.ModelProto, layers: dict[str, Any], tensors: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Quantize the layers of a float graph that have both weight and activation bits.

    Args:
        model: the float graph, changed in place.
        layers: layer name → {"weight_bits", "activation": {"bits", "low", "step"}}.
        tensors: `L.weight.q` int8, `L.weight.scale` float32, `L.bias` float32 of those layers.
    """
    for i, node in enumerate(model.graph.node):
        node.name = f"n{i}"
    graph = _Graph(model.graph)
    for name, entry in layers.items():
        node = _node(graph, name)
        act = entry["activation"]
        integers, scale = tensors[f"{name}.weight.q"], tensors[f"{name}.weight.scale"]
        new = []
        # 8-bit weights times 8-bit activations overflow the 16-bit sums of processors without VNNI unless both
        # are unsigned; every narrower pair is exact
        unsigned = entry["weight_bits"] == 8 and act["bits"] == 8
        stored = (integers.astype(np.int16) + 128).astype(np.uint8) if unsigned else integers
        zero = np.full(len(scale), 128 if unsigned else 0, stored.dtype)
        new.append(helper.make_node(
            "DequantizeLinear",
            [graph.constant(f"{name}.q", stored), graph.constant(f"{name}.scale", scale),
             graph.constant(f"{name}.zero", zero)],
            [f"{name}.weight.dq"], name=f"{name}.dq_weight", axis=0,
        ))  # fmt: skip
        node.input[1] = f"{name}.weight.dq"
        if len(node.input) > 2 and node.input[2]:
            step = scale * np.float32(act["step"])
            bias = bias_integers(torch.from_numpy(tensors[f"{name}.bias"]), torch.from_numpy(step)).numpy()
            new.append(helper.make_node(
                "DequantizeLinear",
                [graph.constant(f"{name}.bias.q", bias.astype(np.int32)), graph.constant(f"{name}.bias.scale", step)],
                [f"{name}.bias.dq"], name=f"{name}.dq_bias", axis=0,
            ))  # fmt: skip
            node.input[2] = f"{name}.bias.dq"
        graph.before.setdefault(node.name, []).extend(new)
        _quantize_input(graph, node, name, act)
    graph.rebuild()
    return model


def _quantize_input(graph: _Graph, node: Any, name: str, act: dict[str, Any]) -> None:
    """Quantize before the layer, and again above the moves before it, so that integers flow through them."""
    chain = [node]
    while True:
        source = graph.producer(chain[-1].input[0])
        if source is None or source.op_type not in MOVES or len(graph.consumers(source.output[0])) != 1:
            break
        chain.append(source)
    low, high = act["low"], act["low"] + 2 ** act["bits"] - 1
    scale = graph.constant(f"{name}.in.scale", np.array(act["step"], np.float32))
    zero = graph.constant(f"{name}.in.zero", np.array(-low, np.uint8))
    for depth, member in enumerate(chain):
        key = f"{name}.in{depth}"
        nodes = [helper.make_node("QuantizeLinear", [member.input[0], scale, zero], [f"{key}.q"], name=f"{key}.q")]
        quantized = f"{key}.q"
        if act["bits"] < 8 and depth == len(chain) - 1:  # on integers, so that the layer before still ends in them
            top = graph.constant(f"{name}.in.max", np.array(high - low, np.uint8))
            nodes.append(helper.make_node("Clip", [quantized, "", top], [f"{key}.clip"], name=f"{key}.clip"))
            quantized = f"{key}.clip"
        nodes.append(helper.make_node("DequantizeLinear", [quantized, scale, zero], [f"{key}.dq"], name=f"{key}.dq"))
        member.input[0] = f"{key}.dq"
        graph.before.setdefault(member.name, []).extend(nodes)


def to_bytes(model: onnx.ModelProto) -> bytes:
    """Checked and serialised."""
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    assert all(i.data_type != TensorProto.UNDEFINED for i in model.graph.initializer)
    return model.SerializeToString()
