"""An ONNX graph with look-ups, and where the layers of a frozen network stand in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Graph:
    """A GraphProto with look-ups. New nodes are collected, and put in their places by `rebuild`."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.proto: Any = model.graph
        for i, node in enumerate(self.proto.node):
            node.name = f"n{i}"
        self.constants = {i.name: i for i in self.proto.initializer}
        self.outputs = {o.name for o in self.proto.output}
        self._producer = {name: node for node in self.proto.node for name in node.output}
        self._readers: dict[str, list[Any]] = {}
        for node in self.proto.node:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._before: dict[str, list[Any]] = {}  # node name → nodes to place before it
        self._after: dict[str, list[Any]] = {}

    @property
    def nodes(self) -> list[Any]:
        """Nodes of the graph as it came, in order."""
        return list(self.proto.node)

    def producer(self, tensor: str) -> Any:
        """The node that makes a tensor; None for inputs and constants."""
        return self._producer.get(tensor)

    def readers(self, tensor: str) -> list[Any]:
        """The nodes that read a tensor, of the graph as it came."""
        return self._readers.get(tensor, [])

    def value(self, name: str) -> np.ndarray | None:
        """A constant's values; None where the tensor is no constant."""
        proto, node = self.constants.get(name), self.producer(name)
        if proto is None and node is not None and node.op_type == "Constant" and node.attribute[0].name == "value":
            proto = node.attribute[0].t
        return None if proto is None else numpy_helper.to_array(proto)

    def constant(self, name: str, values: np.ndarray) -> str:
        """Add a constant, once a name."""
        if name not in self.constants:
            self.proto.initializer.append(numpy_helper.from_array(values, name))
            self.constants[name] = self.proto.initializer[-1]
        return name

    def before(self, node: Any, *new: Any) -> None:
        """Place nodes before one."""
        self._before.setdefault(node.name, []).extend(new)

    def after(self, node: Any, *new: Any) -> None:
        """Place nodes after one."""
        self._after.setdefault(node.name, []).extend(new)

    def redirect(self, node: Any, old: str, new: str) -> None:
        """Let a node read another tensor."""
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new

    def rebuild(self) -> None:
        """Put the new nodes where they belong; drop the nodes and constants that nothing reads."""
        ordered = [n for node in self.proto.node for n in (*self._around(node),)]
        needed, kept = set(self.outputs), []
        for node in reversed(ordered):
            if needed & set(node.output):
                kept.append(node)
                needed |= set(node.input)
        kept.reverse()
        del self.proto.node[:]
        self.proto.node.extend(kept)
        constants = [i for i in self.proto.initializer if i.name in needed]
        del self.proto.initializer[:]
        self.proto.initializer.extend(constants)

    def _around(self, node: Any) -> list[Any]:
        return [*self._before.get(node.name, []), node, *self._after.get(node.name, [])]


def pool_means(model: onnx.ModelProto) -> None:
    """Means over height and width become average pools: OpenVINO loses accuracy on integers after ReduceMean."""
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    graph = Graph(model)
    for node in graph.nodes:
        shape = shapes.get(node.input[0], []) if node.op_type == "ReduceMean" and len(node.input) == 2 else []
        axes = graph.value(node.input[1]) if len(shape) == 4 else None
        if axes is None or sorted(int(a) % 4 for a in axes.ravel()) != [2, 3] or not min(shape[2:]):
            continue
        keeps = all(a.i for a in node.attribute if a.name == "keepdims")
        del node.input[1:], node.attribute[:]
        node.op_type = "AveragePool"
        node.attribute.append(helper.make_attribute("kernel_shape", shape[2:]))
        if not keeps:
            flat, node.output[0] = node.output[0], f"{node.output[0]}.mean"
            graph.after(node, helper.make_node("Flatten", [node.output[0]], [flat], name=f"{flat}.flat", axis=1))
    graph.rebuild()


def layer_node(graph: Graph, layer: str) -> Any:
    """The Conv or Gemm of a layer, whose weight is called `net.LAYER.weight`; None if it has none of its own."""
    readers = graph.readers(f"net.{layer}.weight")
    if len(readers) != 1 or f"net.{layer}.weight" not in graph.constants:
        return None
    node = readers[0]
    if node.input[1] != f"net.{layer}.weight" or node.op_type not in ("Conv", "Gemm"):
        return None
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Gemm" and (attributes.get("transB") != 1 or attributes.get("transA", 0)):
        return None
    return node


def quantizable(model: onnx.ModelProto, layers: dict[str, Any], weights: dict[str, np.ndarray]) -> set[str]:
    """Names of the layers whose node and untouched weight are in the graph.

    Args:
        model: the float graph.
        layers: layer name → entry of the spec.
        weights: layer name → float32 weight, as it must stand in the graph.
    """
    graph, found = Graph(model), set()
    for name in layers:
        weight = graph.value(f"net.{name}.weight")
        if layer_node(graph, name) is not None and weight is not None and np.array_equal(weight, weights[name]):
            found.add(name)
    return found


def to_bytes(model: onnx.ModelProto) -> bytes:
    """Checked and serialised."""
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    assert all(i.data_type != TensorProto.UNDEFINED for i in model.graph.initializer)
    return model.SerializeToString()
