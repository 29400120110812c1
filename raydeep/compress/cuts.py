"""What of a network can lose channels, and what goes with each: torch-pruning's dependency graph (arXiv 2301.12900)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from raydeep.model import layers

PASSES = 20  # of all channels over all edges of the graph, a cut: more is a circle; torchvision's networks need 1.2


class Cut(NamedTuple):
    """Channels that go together: D positions, each a channel in every one of `blocks` equal parts of the root layer."""

    root: nn.Module
    scores: np.ndarray  # float64 D
    blocks: int
    lost: dict[tuple[Any, str], np.ndarray]  # (module or parameter, "in" or "out") → channels lost a position, int64 D
    readers: list[tuple[nn.Module, np.ndarray, np.ndarray]]  # layers that read it: input channels, their positions

    def gone(self, count: int) -> np.ndarray:
        """The `count` positions of lowest score: int64."""
        return np.argsort(self.scores, kind="stable")[:count]


class Graph:
    """The library's dependency graph of a network, with a watch on every edge against going round in circles."""

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        import torch_pruning as tp

        self.graph = tp.DependencyGraph().build_dependency(
            model, example, forward_fn=lambda m, x: m(x), verbose=False
        )  # fmt: skip
        self.outwards = self.graph.is_out_channel_pruning_fn
        order = {module: i for i, module in enumerate(model.modules())}
        found = [m for m in self.graph.module2node if isinstance(m, (nn.Conv2d, nn.Linear))]
        self.roots = sorted(found, key=order.__getitem__)
        edges = [edge for node in self.graph.module2node.values() for edge in node.dependencies]
        widest = max(max(layers.raw_weight(m).shape[:2]) for m in found)
        self.limit, self.followed = PASSES * len(edges) * widest, 0
        for edge in edges:
            edge.index_mapping.append(self._watch)

    def _watch(self, indices: list[Any]) -> list[Any]:
        self.followed += len(indices)
        if self.followed > self.limit:
            raise RuntimeError("its channels hang together in circles")
        return indices

    def group(self, root: nn.Module, indices: list[int]) -> Any:
        """All that goes with these output channels of a layer."""
        self.followed = 0
        return self.graph.get_pruning_group(root, self.graph.get_pruner_of_module(root).prune_out_channels, indices)

    def take(self, cut: Cut, count: int) -> None:
        """Take the `count` lowest positions of a cut out of the network."""
        if not count:
            return
        indices = np.concatenate([cut.gone(count) + block * len(cut.scores) for block in range(cut.blocks)])
        group = self.group(cut.root, sorted(indices.tolist()))
        if not self.graph.check_pruning_group(group):
            raise RuntimeError("a layer would lose all its channels")
        group.prune()


def _importance(score: str) -> Any:
    """Scores of the library; magnitude and taylor relative to the mean of a cut, bn_scale as it is (1708.06519)."""
    from torch_pruning.pruner import importance

    if score == "bn_scale":
        return importance.BNScaleImportance(normalizer=None)
    return {"magnitude": importance.GroupMagnitudeImportance, "taylor": importance.GroupTaylorImportance}[score]()


def find_cuts(graph: Graph, score: str) -> Iterator[Cut]:
    """The cuts of a network that may lose channels, in the order of its layers."""
    importance = _importance(score)
    seen: set[int] = set()
    for root in graph.roots:
        if id(root) in seen:
            continue
        width = graph.graph.get_out_channels(root)
        group = graph.group(root, list(range(width)))
        outs = [edge.target for edge, _ in group if graph.outwards(edge.handler)]
        seen |= {id(node.module) for node in outs}
        if any(not node.outputs for node in outs):  # what the network gives
            continue
        scores = importance(group)
        if scores is None:
            continue
        blocks = math.lcm(*(_blocks(edge.target.module) for edge, _ in group))
        if len(scores) != width or width % blocks:
            raise RuntimeError(f"{blocks} groups of channels do not fit {width}")
        scores = scores.double().view(blocks, -1).mean(0).nan_to_num(0.0).cpu().numpy()
        yield Cut(root, scores, blocks, *_touched(graph, group, width // blocks))


def _blocks(module: Any) -> int:
    """Equal parts of a layer's channels, each of which must lose as many as the others."""
    if isinstance(module, nn.Conv2d):
        return 1 if module.groups == module.out_channels else module.groups
    return module.num_groups if isinstance(module, nn.GroupNorm) else 1


def _touched(graph: Graph, group: Any, positions: int) -> tuple[Any, Any]:
    """`lost` and `readers` of a cut."""
    lost: dict[tuple[Any, str], np.ndarray] = {}
    readers = []
    for item in group:
        module, where = item.dep.target.module, np.asarray(item.root_idxs) % positions
        if not isinstance(module, nn.Parameter) and next(module.parameters(recurse=False), None) is None:
            continue
        key = (module, "out" if graph.outwards(item.dep.handler) else "in")
        found = np.bincount(where, minlength=positions)
        lost[key] = lost[key] + found if key in lost else found
        if key[1] == "in" and isinstance(module, (nn.Conv2d, nn.Linear)):
            readers.append((module, np.asarray(item.idxs), where))
    return lost, readers


@torch.no_grad()
def silence(cut: Cut, count: int) -> None:
    """Nobody reads the `count` lowest positions any more: their weights, which go with them, become zero."""
    for module, channels, where in cut.readers:
        weight: Any = module.weight
        groups = getattr(module, "groups", 1)
        rows, columns = weight.shape[0] // groups, weight.shape[1]
        for channel in channels[np.isin(where, cut.gone(count))].tolist():
            group = channel // columns
            weight[group * rows : (group + 1) * rows, channel % columns] = 0
