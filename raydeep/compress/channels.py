"""Whole channels go: a narrower network, by the dependency graph of torch-pruning (arXiv 2301.12900).

The library finds which channels of which layers hang together (a cut: they go as one, or not at all) and takes them
out; which go is decided here: the lowest scores over all cuts, as many as the target needs.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from raydeep.compress import cost
from raydeep.compress.cuts import Cut, Graph, find_cuts, silence
from raydeep.compress.observe import Labelled
from raydeep.errors import JobError, ModelError
from raydeep.model import layers

if TYPE_CHECKING:
    from raydeep.config import Prune

MAX_SHARE = 0.9  # of the channels of a cut that may go: none is emptied
TOLERANCE = 0.02  # by which what can go may miss what is asked for, and by half of what is to stay

# What the library can't cut (1.6.1), by name and by type of module: attention that it does not know, and channels that
# change places.
NAMES = r"(shufflenet_v2|vit_|swin_|maxvit)"
TYPES = (
    "MultiheadAttention", "ShiftedWindowAttention", "ShiftedWindowAttentionV2", "RelativePositionalMultiHeadAttention",
    "ChannelShuffle", "RNN", "LSTM", "GRU",
)  # fmt: skip
MIXING = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)  # a channel that nobody reads changes the others
CLOSE = 0.01  # of the largest logit, by which rounding (TF32's too) may change one


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


def _look(model: nn.Module, score: str, example: torch.Tensor, name: str) -> tuple[Graph, list[Cut]]:
    """The graph of a network, and its cuts: one or more."""
    try:
        graph = Graph(model, example)
        cuts = list(find_cuts(graph, score))
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
    model: nn.Module, example: torch.Tensor, graph: Graph, cuts: list[Cut], counts: list[int], name: str
) -> None:
    """Narrow a network; what it computes is compared with what it computed when nobody read the channels that go."""
    try:
        for cut, count in zip(cuts, counts, strict=True):
            silence(cut, count)
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
