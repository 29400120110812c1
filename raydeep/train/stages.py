"""Cuts a network into stages of about equal cost, by its traced graph. The parts keep the names of the whole."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from raydeep.errors import ModelError

MOST_CROSSING = 4  # tensors that a stage may hand to the next


class Part(NamedTuple):
    """One stage."""

    module: fx.GraphModule  # takes what the stage before gives
    inputs: list[torch.Tensor]  # fake tensors: shapes and dtypes of what goes in
    outputs: list[torch.Tensor]  # and of what comes out
    cost: float  # multiply-adds of a micro-batch, and one for each value that is written


def cut(model: nn.Module, images: tuple[int, int, int, int], stages: int, names: Sequence[str] = ()) -> list[Part]:
    """Cut a network into stages.

    Args:
        model: float NCHW → logits NK; the stages share its parameters.
        images: shape of a micro-batch, NCHW.
        stages: how many.
        names: modules with which each further stage begins; none: balanced by cost (parameters × activations: the
            multiply-adds).

    Raises:
        ModelError: the network can't be traced or has too few places to cut, or a name is none of its modules.
    """
    graph = _trace(model)
    measured = _Measure(graph, model, images)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    places = _places(nodes, measured, 0 if names else stages - 1)
    if names:
        cuts = [_named(name, nodes, places, model) for name in names]
        if cuts != sorted(set(cuts)):
            raise ModelError(f"scaling.cut_points {', '.join(names)}: not in the order in which the network runs")
        if _with_parameters(nodes, cuts, model) != cuts:
            raise ModelError(f"scaling.cut_points {', '.join(names)}: a stage would have no parameters to train")
    else:
        places = _with_parameters(nodes, places, model)
        if len(places) < stages - 1:  # some hold nothing
            places = _with_parameters(nodes, _places(nodes, measured, len(nodes)), model)
        if len(places) < stages - 1:
            raise ModelError(
                f"scaling.stages {stages}: the network can be cut in {len(places)} places, into at most "
                f"{len(places) + 1} stages; lower stages (or scaling.workers), or use scaling.strategy fsdp"
            )
        edges = [0, *places, len(nodes)]
        costs = [sum(measured.cost[n] for n in nodes[a:b]) for a, b in pairwise(edges)]
        cuts = [places[i - 1] for i in balance(costs, stages)]
    edges = [0, *cuts, len(nodes)]
    parts = [_part(model, graph, nodes, start, stop, measured) for start, stop in pairwise(edges)]
    _keep_unused(model, parts)
    return parts


def balance(costs: Sequence[float], parts: int) -> list[int]:
    """Where to cut a sequence into non-empty parts so that the dearest is as cheap as can be; exact.

    Returns:
        The index with which each part after the first begins.
    """
    count = len(costs)
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    best = [[float("inf")] * (count + 1) for _ in range(parts + 1)]
    where = [[0] * (count + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for part in range(1, parts + 1):
        for stop in range(part, count + 1):
            for start in range(part - 1, stop):
                worst = max(best[part - 1][start], total[stop] - total[start])
                if worst < best[part][stop]:
                    best[part][stop], where[part][stop] = worst, start
    cuts, stop = [], count
    for part in range(parts, 0, -1):
        stop = where[part][stop]
        cuts.append(stop)
    return cuts[::-1][1:]


class _Tracer(fx.Tracer):
    """Leaves whole what is traced wrongly: modules without children, and those that depend on the mode."""

    def __init__(self, whole: set[str]) -> None:
        super().__init__()
        self.wholes = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See fx.Tracer."""
        lone = next(m.children(), None) is None
        return lone or module_qualified_name in self.wholes or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module) -> fx.Graph:
    """The graph, the same in training and evaluation (`self.training` would stay as traced)."""
    was, whole = {module: module.training for module in model.modules()}, set[str]()
    while True:
        graphs = []
        try:
            for mode in (True, False):
                model.train(mode)
                graphs.append(_Tracer(whole).trace(model))
        except Exception as err:  # whatever the user's code does with a proxy
            raise ModelError(
                f"scaling.strategy pipeline: the network can't be traced, so not be cut ({type(err).__name__}: "
                f"{str(err).splitlines()[0] if str(err) else ''}); use scaling.strategy ddp or fsdp"
            ) from err
        finally:
            for module, training in was.items():
                module.training = training
        other = next((a for a, b in zip(*(g.nodes for g in graphs), strict=False) if _call(a) != _call(b)), None)
        if other is None:
            return graphs[0]
        stack = [name for name, _ in (other.meta.get("nn_module_stack") or {}).values() if name]
        if not stack or stack[-1] in whole:
            raise ModelError(
                f"scaling.strategy pipeline: {other.name} is not the same in training and evaluation; put it into a "
                f"module of its own (nn.Dropout for dropout), or use scaling.strategy ddp or fsdp"
            )
        whole.add(stack[-1])


def _call(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.target, str(node.args), str(node.kwargs)


class _Measure(fx.Interpreter):
    """Runs a graph on fake tensors; notes each node's value and cost."""

    def __init__(self, graph: fx.Graph, model: nn.Module, images: tuple[int, int, int, int]) -> None:
        super().__init__(fx.GraphModule(model, graph))
        self.model = model
        self.cost: dict[fx.Node, float] = {}
        self.value: dict[fx.Node, Any] = {}
        self.by_name = {node.name: node for node in graph.nodes}
        was = {module: module.training for module in model.modules()}
        model.eval()  # or BatchNorm would count
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        like = next(model.parameters())
        dtype = like.dtype
        try:
            with mode, torch.no_grad():
                self.run(torch.empty(images, dtype=dtype, device=like.device))
        finally:
            for module, training in was.items():
                module.training = training

    def run_node(self, n: fx.Node) -> Any:
        """Note what a node gives and what it takes."""
        with FlopCounterMode(display=False) as counter:
            out = super().run_node(n)
        node = self.by_name[n.name]
        self.value[node] = out
        self.cost[node] = counter.get_total_flops() / 2 + (out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


def _crossing(nodes: list[fx.Node], place: int) -> list[fx.Node]:
    """Values from before a place that are used after it."""
    after = set(nodes[place:])
    before = [n for n in _ancestors(nodes) if n not in after]
    return [n for n in before if any(user in after or user.op == "output" for user in n.users)]


def _ancestors(nodes: list[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes[0].graph.nodes if n.op != "output"]


def _places(nodes: list[fx.Node], measured: _Measure, least: int) -> list[int]:
    """Where the graph can be cut: only tensors cross, one if that gives places enough; nothing shared is torn apart."""
    uses: dict[int, list[int]] = {}
    for i, node in enumerate(nodes):
        for value in _tensors(node, measured.model):
            uses.setdefault(id(value), []).append(i)
    held = [(min(u), max(u)) for u in uses.values() if len(u) > 1]
    found: dict[int, list[int]] = {}
    for place in range(1, len(nodes)):
        crossing = _crossing(nodes, place)
        if any(first < place <= last for first, last in held):
            continue
        if all(isinstance(measured.value[n], FakeTensor) for n in crossing) and 0 < len(crossing) <= MOST_CROSSING:
            found.setdefault(len(crossing), []).append(place)
    one = found.get(1, [])
    return one if len(one) >= least else sorted(place for places in found.values() for place in places)


def _tensors(node: fx.Node, model: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers that a node uses, by whatever name."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return [*module.parameters(), *module.buffers()]
    if node.op != "get_attr":
        return []
    parent, _, name = str(node.target).rpartition(".")
    return [getattr(model.get_submodule(parent), name)]


def _with_parameters(nodes: list[fx.Node], places: list[int], model: nn.Module) -> list[int]:
    """The places that leave no stage without parameters, as nothing could be trained there."""

    def holds(start: int, stop: int) -> bool:
        return any(isinstance(t, nn.Parameter) for node in nodes[start:stop] for t in _tensors(node, model))

    kept = [0]
    for place in places:
        if holds(kept[-1], place):
            kept.append(place)
    while len(kept) > 1 and not holds(kept[-1], len(nodes)):
        kept.pop()
    return kept[1:]


def _named(name: str, nodes: list[fx.Node], places: list[int], model: nn.Module) -> int:
    """The place before the first node of a module."""
    for i, node in enumerate(nodes):
        if node.op == "call_module" and (str(node.target) == name or str(node.target).startswith(name + ".")):
            if i in places:
                return i
            raise ModelError(f"scaling.cut_points: the network can't be cut before {name}: more than a tensor crosses")
    near = difflib.get_close_matches(name, [n for n, _ in model.named_modules() if n], 4, 0.0)
    raise ModelError(f"scaling.cut_points: the network runs no module {name}; near: {', '.join(near)}")


def _part(model: nn.Module, whole: fx.Graph, nodes: list[fx.Node], start: int, stop: int, measured: _Measure) -> Part:
    graph, copies = fx.Graph(), {}
    entering = [n for n in whole.nodes if n.op == "placeholder"] if start == 0 else _crossing(nodes, start)
    for node in entering:
        copies[node] = graph.placeholder(node.name)
    for node in nodes[start:stop]:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    if stop == len(nodes):
        [end] = [n for n in whole.nodes if n.op == "output"]
        leaving = [end.args[0]]
    else:
        leaving = list(_crossing(nodes, stop))
    outputs = tuple(copies[n] for n in leaving)
    graph.output(outputs[0] if len(outputs) == 1 else outputs)
    module = fx.GraphModule(model, graph)
    module.train(model.training)
    return Part(
        module, [measured.value[n] for n in entering], [measured.value[n] for n in leaving],
        sum(measured.cost[n] for n in nodes[start:stop]),
    )  # fmt: skip


def _keep_unused(model: nn.Module, parts: list[Part]) -> None:
    """Give the last part what no node uses, so that checkpoints have every name."""
    have = {name for part in parts for name in part.module.state_dict()}
    last = parts[-1].module
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in have:
            path, _, leaf = name.rpartition(".")
            try:
                owner = last.get_submodule(path)
            except AttributeError:
                last.add_submodule(path, owner := nn.Module())
            if isinstance(value, nn.Parameter):
                owner.register_parameter(leaf, value)
            else:
                owner.register_buffer(leaf, value)
