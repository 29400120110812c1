"""Turns the float ONNX graph of a frozen network into an integer one (QDQ).

Runtimes run DequantizeLinear → Conv/Gemm/Add → QuantizeLinear in integer kernels. Weights keep the integers of the
packed model, the inputs of layers their learned step. Two forms:

- exact: only the inputs of layers are quantized, number for number as in the packed model. A layer whose output
  is not quantized next (one that feeds an addition) runs in float.
- whole: every tensor between the first layer and the last is quantized, to 8 bits where no layer learned a step
  for it. A tensor has one grid, whoever reads it: a block's first convolution and its shortcut share it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import torch
from onnx import helper

from raydeep.deploy.onnx_graph import Graph, layer_node
from raydeep.model.artifact import bias_integers

Target = Literal["avx2", "vnni", "arm", "gpu"]

# these commute with quantization
MOVES = ("MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Split", "Slice")
# with integer kernels in onnxruntime, or cheap enough between two layers that have them
INNER = (
    "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Relu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid",
    "LeakyRelu",
)  # fmt: skip
INT16_MAX = 32767


class Grid(NamedTuple):
    """Evenly spaced values: step × integers from low to low + 2^bits - 1."""

    step: float
    low: int
    bits: int = 8

    @property
    def high(self) -> int:
        """The largest integer."""
        return self.low + 2**self.bits - 1

    def error(self, values: np.ndarray) -> float:
        """Mean squared error of rounding values to the grid."""
        step = np.float32(self.step)
        return float(np.square((values / step).round().clip(self.low, self.high) * step - values).mean())


class Place(NamedTuple):
    """Tensors that hold the same values but for moves, and therefore share one grid."""

    tensors: tuple[str, ...]
    learned: tuple[Grid, ...]  # of the layers that read them, in graph order
    only_learned: bool  # nothing but those layers reads them


def grid_of(entry: dict[str, Any]) -> Grid:
    """The learned grid of a layer's input, of its entry in the spec."""
    return Grid(entry["activation"]["step"], entry["activation"]["low"], entry["activation"]["bits"])


def for_target(grid: Grid, target: Target) -> tuple[Grid, np.ndarray, int]:
    """How a target stores a grid.

    Returns:
        The grid (gpu: symmetric about 0, its step wider where all 8 bits were of one sign), its zero point, and
        the stored integer of its largest value.
    """
    if target == "gpu":
        wider = max(grid.high / 127, grid.low / -128)
        if wider > 1:
            grid = Grid(grid.step * wider, -128 if grid.low < 0 else 0, 8 if grid.low < 0 else 7)
        return grid, np.array(0, np.int8), grid.high
    if target == "arm":
        return grid, np.array(-grid.low - 128, np.int8), grid.high - grid.low - 128
    return grid, np.array(-grid.low, np.uint8), grid.high - grid.low


def stored_weight(integers: np.ndarray, grid: Grid, target: Target) -> tuple[np.ndarray, np.ndarray]:
    """A weight as a target stores it, and its zero points a channel.

    Processors with AVX2 but no VNNI add two products of unsigned and signed bytes in 16 bits, and saturate. Where
    two products could exceed that, both factors are unsigned, which they add in 32 bits.
    """
    unsigned = target == "avx2" and 2 * (grid.high - grid.low) * int(np.abs(integers.astype(int)).max()) > INT16_MAX
    stored = (integers.astype(np.int16) + 128).astype(np.uint8) if unsigned else integers.astype(np.int8)
    return stored, np.full(len(stored), 128 if unsigned else 0, stored.dtype)


def exact(model: onnx.ModelProto, layers: dict[str, Any], tensors: dict[str, np.ndarray], target: Target) -> None:
    """Quantize the inputs of layers, and no other tensor.

    Args:
        model: the float graph, changed in place.
        layers: layer name → {"weight_bits", "activation": {"bits", "low", "step"}}.
        tensors: `L.weight.q` int8, `L.weight.scale` float32, `L.bias` float32 of those layers.
        target: processor that it is for.
    """
    graph = Graph(model)
    for name, entry in layers.items():
        node, grid = layer_node(graph, name), grid_of(entry)
        chain = [node]  # quantized again above the moves before the layer, so that integers flow through them
        while True:
            source = graph.producer(chain[-1].input[0])
            if source is None or source.op_type not in MOVES or len(source.output) > 1:
                break
            if len(graph.readers(source.output[0])) != 1:
                break
            chain.append(source)
        for depth, member in enumerate(chain):
            tensor = member.input[0]
            new, out = _rounding(graph, tensor, f"{name}.in{depth}", grid, target, clip=depth == len(chain) - 1)
            graph.before(member, *new)
            graph.redirect(member, tensor, out)
        _quantize_weight(graph, node, name, grid, tensors, target)
    graph.rebuild()


def whole(
    model: onnx.ModelProto,
    layers: dict[str, Any],
    tensors: dict[str, np.ndarray],
    target: Target,
    grids: dict[str, Grid],
) -> None:
    """Quantize every tensor of `places`.

    Args:
        model: the float graph, changed in place.
        layers: as in `exact`.
        tensors: as in `exact`.
        target: processor that it is for.
        grids: of each tensor of `places`.
    """
    graph = Graph(model)
    read: dict[str, Grid] = {}  # node of a layer → grid of what it reads
    own = {layer_node(graph, name).name: grid_of(entry) for name, entry in layers.items()}
    for tensor, grid in grids.items():
        source, readers = graph.producer(tensor), graph.readers(tensor)
        assert source is not None
        before = tensor
        limits = _limits(graph, source) if graph.readers(source.input[0]) == [source] else None
        if limits is not None:  # rounding and clipping commute: the integer kernel ends before the clip
            before = source.input[0]
        moved = source.op_type in MOVES and source.input[0] in grids
        new, out = _rounding(graph, before, f"{tensor}.8", grid, target, clip=not moved, limits=limits)
        graph.after(source, *new)
        for node in readers:
            mine = own.get(node.name)
            if mine is None or mine.bits == 8 or mine == grid:
                read[node.name] = grid
                graph.redirect(node, tensor, out)
            else:
                read[node.name] = mine
                extra, finer = _rounding(graph, out, f"{tensor}.{node.name}", mine, target)
                graph.before(node, *extra)
                graph.redirect(node, tensor, finer)
    for name in layers:
        node = layer_node(graph, name)
        _quantize_weight(graph, node, name, read[node.name], tensors, target)
    graph.rebuild()


def floating(model: onnx.ModelProto, layers: dict[str, Any], target: Target) -> None:
    """Round what layers of fewer than 8 activation bits read; weights stay float. Arguments as in `exact`."""
    graph = Graph(model)
    for name, entry in layers.items():
        grid, node = grid_of(entry), layer_node(graph, name)
        if grid.bits < 8:
            new, out = _rounding(graph, node.input[0], f"{name}.in", grid, target)
            graph.before(node, *new)
            graph.redirect(node, node.input[0], out)
    graph.rebuild()


def places(model: onnx.ModelProto, layers: dict[str, Any]) -> list[Place]:
    """What `whole` quantizes: the inputs of layers, and the outputs of layers and of INNER nodes after them.

    Not the network's output, and not what an activation function alone reads: it is fused to the node before.
    """
    graph = Graph(model)
    own = {layer_node(graph, name).name: grid_of(entry) for name, entry in layers.items()}
    inner: set[str] = set()  # tensors made by layers, and by INNER nodes and MOVES of such tensors
    chosen: list[str] = []
    for node in graph.nodes:
        data = [name for name in node.input if name and graph.value(name) is None]
        if node.name in own:
            chosen.append(node.input[0])
        elif not (node.op_type in INNER + MOVES and data and set(data) <= inner):
            continue
        elif node.op_type in ("Add", "Mul", "Concat") and len(data) < len(node.input):
            continue  # with a constant
        inner |= set(node.output)
        for tensor in node.output:
            readers = graph.readers(tensor)
            fused = len(readers) == 1 and (readers[0].op_type == "Relu" or _limits(graph, readers[0]) is not None)
            if tensor not in graph.outputs and readers and not fused:
                chosen.append(tensor)
    root = {tensor: tensor for tensor in chosen}
    for tensor in chosen:  # in graph order: the root of what a move reads is known
        source = graph.producer(tensor)
        if source is not None and source.op_type in MOVES and source.input[0] in root:
            root[tensor] = root[source.input[0]]
    groups: dict[str, list[str]] = {}
    for tensor in root:
        groups.setdefault(root[tensor], []).append(tensor)
    found = []
    for group in groups.values():
        readers = [n for t in group for n in graph.readers(t) if not (n.op_type in MOVES and n.output[0] in root)]
        learned = tuple(own[n.name] for n in readers if n.name in own)
        found.append(Place(tuple(group), learned, len(learned) == len(readers)))
    return found


def _limits(graph: Graph, node: Any) -> tuple[float, float] | None:
    """Smallest and largest value that a Clip lets through."""
    if node.op_type != "Clip" or len(node.input) < 3:
        return None
    low, high = graph.value(node.input[1]), graph.value(node.input[2])
    return None if low is None or high is None else (float(low), float(high))


def _rounding(
    graph: Graph, tensor: str, key: str, grid: Grid, target: Target, clip: bool = True, limits: Any = None
) -> tuple[list[Any], str]:
    """Nodes that round a tensor to a grid, and the tensor that they give."""
    grid, zero, top = for_target(grid, target)
    bottom = grid.low + int(zero)
    if limits is not None:
        bottom, top = (
            int(np.clip(np.round(np.float32(v) / np.float32(grid.step)), grid.low, grid.high)) + int(zero)
            for v in limits
        )
    step = np.array(grid.step, np.float32)  # constants are named by value: equal ones are one
    names = [graph.constant(f"step.{step:.9g}", step), graph.constant(f"zero.{zero}", zero)]
    held = np.iinfo(zero.dtype)
    narrow = clip and (bottom > held.min or top < held.max)
    nodes = []
    if narrow and target == "gpu":  # TensorRT wants the pair side by side; a grid from 0 holds what is never negative
        if top < held.max or bottom not in (0, held.min):
            ends = [
                graph.constant(f"{key}.{end}", np.array(np.float32(v) * step))
                for end, v in (("least", bottom), ("most", top))
            ]
            nodes.append(helper.make_node("Clip", [tensor, *ends], [f"{key}.clip"], name=f"{key}.clip"))
            tensor = f"{key}.clip"
        narrow = False
    nodes.append(helper.make_node("QuantizeLinear", [tensor, *names], [f"{key}.q"], name=f"{key}.q"))
    quantized = f"{key}.q"
    if narrow:  # on integers, so that the layer before still ends in them
        least = "" if bottom == held.min else graph.constant(f"end.{bottom}", np.array(bottom, zero.dtype))
        most = graph.constant(f"end.{top}", np.array(top, zero.dtype))
        nodes.append(helper.make_node("Clip", [quantized, least, most], [f"{key}.clip"], name=f"{key}.clip"))
        quantized = f"{key}.clip"
    nodes.append(helper.make_node("DequantizeLinear", [quantized, *names], [f"{key}.dq"], name=f"{key}.dq"))
    return nodes, f"{key}.dq"


def _quantize_weight(
    graph: Graph, node: Any, name: str, grid: Grid, tensors: dict[str, np.ndarray], target: Target
) -> None:
    """Weight and bias of a layer as integers; on a GPU the bias stays float, as TensorRT wants it."""
    integers, scale = tensors[f"{name}.weight.q"], tensors[f"{name}.weight.scale"]
    stored, zero = stored_weight(integers, grid, target)
    graph.before(node, helper.make_node(
        "DequantizeLinear",
        [graph.constant(f"{name}.q", stored), graph.constant(f"{name}.scale", scale),
         graph.constant(f"{name}.zero", zero)],
        [f"{name}.weight.dq"], name=f"{name}.dq_weight", axis=0,
    ))  # fmt: skip
    node.input[1] = f"{name}.weight.dq"
    if target == "gpu" or len(node.input) < 3 or not node.input[2]:
        return
    step = scale * np.float32(grid.step)
    bias = bias_integers(torch.from_numpy(tensors[f"{name}.bias"]), torch.from_numpy(step)).numpy()
    graph.before(node, helper.make_node(
        "DequantizeLinear",
        [graph.constant(f"{name}.bias.q", bias.astype(np.int32)), graph.constant(f"{name}.bias.scale", step)],
        [f"{name}.bias.dq"], name=f"{name}.dq_bias", axis=0,
    ))  # fmt: skip
    node.input[2] = f"{name}.bias.dq"
