"""Whole channels go: a narrower network, by the dependency graph of torch-pruning (arXiv 2301.12900).

The library finds which channels of which layers hang together (a cut: they go as one, or not at all) and takes them
out; which go is decided here: the lowest scores over all cuts, as many as the target needs.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from raydeep.compress import cost
from raydeep.errors import JobError, ModelError
from raydeep.model import layers

if TYPE_CHECKING:
    from raydeep.config import Prune

Labelled = Sequence[tuple[torch.Tensor, torch.Tensor]]  # network inputs, float NCHW, and labels, int64 N

MAX_SHARE = 0.9  # of the channels of a cut that may go: none is emptied
TOLERANCE = 0.02  # by which what can go may miss what is asked for, and by half of what is to stay
PASSES = 20  # of all channels over all edges of the graph, a cut: more is a circle; torchvision's networks need 1.2

# What the library can't cut (1.6.1), by name and by type of module: attention that it does not know, and channels that
# change places.
NAMES = r"(shufflenet_v2|vit_|swin_|maxvit)"
TYPES = (
    "MultiheadAttention", "ShiftedWindowAttention", "ShiftedWindowAttentionV2", "RelativePositionalMultiHeadAttention",
    "ChannelShuffle", "RNN", "LSTM", "GRU",
)  # fmt: skip
MIXING = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)  # a channel that nobody reads changes the others
CLOSE = 0.01  # of the largest logit, by which rounding (TF32's too) may change one


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


def check(name: str, model: nn.Module, example: torch.Tensor, cfg: Prune | None = None) -> None:
    """Refuse a network whose channels can't be pruned, before any time is spent: a copy loses half of all its cuts.

    Args:
        name: model.name of the job.
        model: left as it is.
        example: one or more inputs, float NCHW; its shape and device alone count.
        cfg: the prune section that will come; None: any.

    Raises:
        ModelError: its channels can't be pruned.
        JobError: not by so much, or not by that score.
    """
    named = f"model.name {name}"
    found = sorted({type(module).__name__ for module in model.modules()} & set(TYPES))
    if re.match(NAMES, name) or found:
        raise _refusal(named, f"it has {found[0]}" if found else "the way they hang together is not known")
    noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    copied = copy.deepcopy(model)
    score = "magnitude" if cfg is None or cfg.score == "taylor" else cfg.score
    with _traceable(copied):
        graph, cuts = _look(copied, score, noise, named)
        if cfg is not None:
            choose(cuts, _Costs(copied, noise, cfg.target), cfg.sparsity, 1)
        _carry_out(copied, noise, graph, cuts, [len(cut.scores) // 2 for cut in cuts], named)


def prune_channels(model: nn.Module, cfg: Prune, example: torch.Tensor, batches: Labelled, round_to: int = 1) -> None:
    """Narrow a network: the same inputs give the same network.

    Args:
        model: changed in place; no layer may have a mask or quantizer yet. Its classifier keeps all its outputs, and
            every cut keeps a tenth of its channels.
        cfg: the prune section; `sparsity` is the share of `target` that goes.
        example: one or more inputs, float NCHW, on the model's device.
        batches: inputs and labels that score taylor is measured on.
        round_to: channels that stay are a multiple of it, in layers that had 8 times so many.

    Raises:
        ModelError: the channels of this network can't be pruned.
        JobError: so much of it can't go, or score taylor has no batches.
    """
    if cfg.score == "taylor" and not batches:
        raise JobError("prune.score taylor needs labelled batches: quantize.calibration_rows of the train split")
    assert not any(layers.part(m, nn.Module) for _, m in layers.compressible(model)), "channels go first"
    name = f"model {type(model).__name__}"
    with _traceable(model):
        if cfg.score == "taylor":
            _gradients(model, batches)
        graph, cuts = _look(model, cfg.score, example, name)
        counts = choose(cuts, _Costs(model, example, cfg.target), cfg.sparsity, round_to)
        _carry_out(model, example, graph, cuts, counts, name)


def _refusal(name: str, reason: str) -> ModelError:
    return ModelError(
        f"{name}: its channels can't be pruned: {reason}; set prune.kind weights or N:M (such as 2:4), or "
        f"quantize.weight_bits, which work for it"
    )


def _look(model: nn.Module, score: str, example: torch.Tensor, name: str) -> tuple[_Graph, list[Cut]]:
    """The graph of a network, and its cuts: one or more."""
    try:
        graph = _Graph(model, example)
        cuts = list(_cuts(graph, score))
    except Exception as err:  # the library raises anything where it does not know a network
        raise _refusal(name, _first_line(err)) from err
    if not cuts and score == "bn_scale":
        raise JobError(
            f"prune.score bn_scale needs BatchNorm behind layers that can be narrowed, and {name} has none; "
            f"use score magnitude or taylor"
        )
    if not cuts:
        raise _refusal(name, "none of its layers can lose a channel")
    return graph, cuts


def _carry_out(
    model: nn.Module, example: torch.Tensor, graph: _Graph, cuts: list[Cut], counts: list[int], name: str
) -> None:
    """Narrow a network; what it computes is compared with what it computed when nobody read the channels that go."""
    try:
        for cut, count in zip(cuts, counts, strict=True):
            _silence(cut, count)
        before = model(example)
        for cut, count in zip(cuts, counts, strict=True):
            graph.take(cut, count)
        after = model(example)
    except Exception as err:
        raise _refusal(name, _first_line(err)) from err
    if after.shape != before.shape:
        raise _refusal(name, f"narrowed, it gives {tuple(after.shape)} instead of {tuple(before.shape)}")
    mixes = any(isinstance(module, MIXING) for module in model.modules())
    if not mixes and (after - before).abs().max() > CLOSE * before.abs().max():
        raise _refusal(name, "they hang together in a way that is not known: narrowed, it computes something else")


def _first_line(err: Exception) -> str:
    return (str(err) or type(err).__name__).splitlines()[0]


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """In eval mode, every parameter with a gradient; afterwards as before, and no gradient stays."""
    training = model.training
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    model.eval().requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None


def _gradients(model: nn.Module, batches: Labelled) -> None:
    """Leave the gradient of the mean loss over the batches in `.grad`."""
    model.zero_grad()
    for images, labels in batches:
        (F.cross_entropy(model(images), labels) / len(batches)).backward()


# the library: its graph, its cuts


class _Graph:
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


def _cuts(graph: _Graph, score: str) -> Iterator[Cut]:
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


def _touched(graph: _Graph, group: Any, positions: int) -> tuple[Any, Any]:
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
def _silence(cut: Cut, count: int) -> None:
    """Nobody reads the `count` lowest positions any more: their weights, which go with them, become zero."""
    for module, channels, where in cut.readers:
        weight: Any = module.weight
        groups = getattr(module, "groups", 1)
        rows, columns = weight.shape[0] // groups, weight.shape[1]
        for channel in channels[np.isin(where, cut.gone(count))].tolist():
            group = channel // columns
            weight[group * rows : (group + 1) * rows, channel % columns] = 0


# how much goes


class _Costs:
    """What a network costs when its cuts have lost so many positions: multiply-accumulates or parameters."""

    def __init__(self, model: nn.Module, example: torch.Tensor, target: str) -> None:
        self.model, self.target = model, target
        channels, height, width = example.shape[1:]
        counted = cost.layer_macs(model, (height, width, channels)) if target == "macs" else {}
        layer: dict[str, Any] = dict(layers.compressible(model))
        self.places = {layer[name]: macs // layer[name].weight.numel() for name, macs in counted.items()}

    def after(self, cuts: list[Cut], counts: list[int]) -> int:
        """The cost when each cut loses its `counts` lowest positions."""
        lost: Counter[tuple[Any, str]] = Counter()
        for cut, count in zip(cuts, counts, strict=True):
            if count:
                lost.update({key: int(each[cut.gone(count)].sum()) for key, each in cut.lost.items()})
        total = 0
        for module in self.model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                out, fan_in = _layer(module, lost[module, "out"], lost[module, "in"])
                if self.target == "macs":
                    total += self.places.get(module, 0) * out * fan_in
                else:
                    total += out * fan_in + (0 if module.bias is None else out)
            elif self.target == "parameters":
                for parameter in module.parameters(recurse=False):
                    gone_here = lost[module, "out"] or lost[parameter, "out"]
                    total += parameter.numel() - parameter.numel() // max(parameter.shape, default=1) * gone_here
        return total


def _layer(module: nn.Conv2d | nn.Linear, out_lost: int, in_lost: int) -> tuple[int, int]:
    """Output channels, and weights of each, of a layer that lost channels."""
    if isinstance(module, nn.Linear):
        return module.out_features - out_lost, module.in_features - in_lost
    out, area = module.out_channels - out_lost, math.prod(module.kernel_size)
    if module.groups == module.out_channels > 1:  # depthwise: its inputs go with its outputs
        return out, module.in_channels // module.groups * area
    return out, (module.in_channels - in_lost) // module.groups * area


def choose(cuts: list[Cut], costs: _Costs, share: float, round_to: int) -> list[int]:
    """Positions that each cut loses: the lowest scores of all cuts together, until `share` of the cost is gone.

    Raises:
        JobError: less can go.
    """
    size = [len(cut.scores) for cut in cuts]
    most = [min(n - 1, math.floor(MAX_SHARE * n)) for n in size]
    ranked = np.concatenate([np.sort(cut.scores)[:top] for cut, top in zip(cuts, most, strict=True)])
    owner = np.repeat(np.arange(len(cuts)), most)[np.argsort(ranked, kind="stable")]
    steps = [
        round_to // math.gcd(round_to, cut.blocks) if n >= 8 * round_to else 1
        for n, cut in zip(size, cuts, strict=True)
    ]

    def counts(taken: int) -> list[int]:
        wanted = np.bincount(owner[:taken], minlength=len(cuts))
        kept = [-(-(n - int(gone)) // step) * step for n, gone, step in zip(size, wanted, steps, strict=True)]
        return [max(0, n - keep) for n, keep in zip(size, kept, strict=True)]

    whole = costs.after(cuts, [0] * len(cuts))

    def gone(taken: int) -> float:
        return 1 - costs.after(cuts, counts(taken)) / whole

    low, high = 0, len(owner)
    if gone(high) < share - min(TOLERANCE, (1 - share) / 2):
        raise JobError(
            f"prune.sparsity: found {share:g} of prune.target {costs.target} with prune.kind channels; at most "
            f"{math.floor(1000 * gone(high)) / 1000} can go, as every layer keeps a tenth of its channels"
        )
    while low < high:  # the fewest that are enough
        middle = (low + high) // 2
        low, high = (middle + 1, high) if gone(middle) < share else (low, middle)
    fewer = max(0, low - 1)
    return counts(min((low, fewer), key=lambda taken: abs(gone(taken) - share)))
