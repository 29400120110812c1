"""Which single weights stay: what is kept (score), how many of each layer (rates), and the masks of both.

A score is a tensor like the weight, largest stays. A mask is bool like the weight, True stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from raydeep import own
from raydeep.compress.observe import Labelled
from raydeep.errors import JobError

Tensors = dict[str, torch.Tensor]  # layer name → weight, score or mask

# Each layer keeps 1% of its weights, or a fifth of the density that is asked for, whichever is less (it binds below 5%:
# networks are pruned to 99.5% and more), and one weight at least. A layer pruned to nothing cuts the network.
KEEP_SHARE, KEEP_OF_DENSITY = 0.01, 0.2


# scores


def magnitude(model: nn.Module, weights: Tensors, batches: Labelled) -> Tensors:
    """|w|."""
    return {name: w.detach().abs() for name, w in weights.items()}


def lamp(model: nn.Module, weights: Tensors, batches: Labelled) -> Tensors:
    """w² over the sum of the squares of all that are not smaller, in its layer (arXiv 2010.07611, equation 1)."""
    out = {}
    for name, w in weights.items():
        squares, order = w.detach().flatten().double().square().sort(descending=True, stable=True)
        score = torch.empty_like(squares)
        score[order] = (squares / squares.cumsum(0)).nan_to_num(0.0)
        out[name] = score.view_as(w)
    return out


def taylor(model: nn.Module, weights: Tensors, batches: Labelled) -> Tensors:
    """First-order change of the loss without the weight, (w·∂L/∂w)², added over the batches (arXiv 1906.10771, eq. 8).

    Its root is returned: of the same order, and it does not underflow. The model runs in eval mode and keeps its mode,
    its statistics and its `.grad`.
    """
    if not batches:
        raise JobError("prune.score taylor needs labelled batches: quantize.calibration_rows of the train split")
    training, wanted = model.training, {name: w.requires_grad for name, w in weights.items()}
    out = {name: torch.zeros_like(w, requires_grad=False) for name, w in weights.items()}
    model.eval()
    try:
        for w in weights.values():
            w.requires_grad_(True)
        for images, labels in batches:
            with torch.enable_grad():
                loss = F.cross_entropy(model(images), labels)
            grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for (name, w), grad in zip(weights.items(), grads, strict=True):
                if grad is not None:
                    out[name] = torch.hypot(out[name], w.detach() * grad)
    finally:
        model.train(training)
        for name, w in weights.items():
            w.requires_grad_(wanted[name])
    return out


# (model, raw weights, calibration batches) → scores, none negative
SCORES: dict[str, Callable[[nn.Module, Tensors, Labelled], Tensors]] = {
    "magnitude": magnitude,
    "lamp": lamp,
    "taylor": taylor,
}


def scores_of(name: str, model: nn.Module, weights: Tensors, batches: Labelled) -> Tensors:
    """Scores by name: a key of SCORES, or a function of the user's own with their contract, `package.module:name`.

    Args:
        name: prune.score.
        model: in the state that it is in; to be left so.
        weights: layer name → weight.
        batches: inputs float32 NCHW and labels int64 N.

    Raises:
        JobError: the user's own raises, or gives no finite number ≥ 0 for each weight.
    """
    if name in SCORES:
        return SCORES[name](model, weights, batches)
    found = own.find("prune.score", name, JobError)
    with torch.enable_grad():  # it may want gradients
        try:
            given = found(model, weights, batches)
        except Exception as err:  # a user's own code may raise anything
            raise JobError(f"prune.score {name} fails: {own.reason(err)}") from err
    out = {}
    for layer, weight in weights.items():
        score = given.get(layer) if isinstance(given, dict) else None
        if not isinstance(score, torch.Tensor) or score.shape != weight.shape:
            what = tuple(score.shape) if isinstance(score, torch.Tensor) else type(score).__name__
            raise JobError(
                f"prune.score {name}: found {what} for layer {layer}, expected a dict with a tensor of shape "
                f"{tuple(weight.shape)} for it"
            )
        score = score.detach().to(weight)
        if not torch.isfinite(score).all() or (score < 0).any():
            raise JobError(f"prune.score {name}: scores of layer {layer} are negative or not finite; the largest stay")
        out[layer] = score
    return out


# rates

# shape of a weight → density, up to a factor that all layers share
RATES: dict[str, Callable[[torch.Size], float]] = {
    "uniform": lambda shape: 1.0,
    "erk": lambda shape: sum(shape) / math.prod(shape),  # Erdős–Rényi kernel, arXiv 1911.11134, appendix
}


def least(shapes: dict[str, torch.Size], kept: int) -> dict[str, int]:
    """Weights that each layer keeps at least, where all keep `kept` together; their sum is no more than that."""
    total = sum(map(math.prod, shapes.values()))
    share = KEEP_OF_DENSITY * (kept - len(shapes)) / total  # of what is left when each has its one
    return {
        name: min(math.ceil(KEEP_SHARE * shape.numel()), 1 + math.floor(share * shape.numel()))
        for name, shape in shapes.items()
    }


def kept_in_all(shapes: dict[str, torch.Size], sparsity: float) -> int:
    """Weights that all layers keep together.

    Raises:
        JobError: fewer than there are layers.
    """
    total = sum(map(math.prod, shapes.values()))
    kept = total - round(sparsity * total)
    if kept >= len(shapes):
        return kept
    digits = 10 ** (len(str(total)) + 1)
    name = min(shapes, key=lambda n: shapes[n].numel())
    raise JobError(
        f"prune.sparsity: found {sparsity:.9g}, which leaves {kept} of {total:,} weights for {len(shapes)} layers: "
        f"layer {name} of {shapes[name].numel():,} weights would be emptied; expected at most "
        f"{math.floor((1 - len(shapes) / total) * digits) / digits}"
    )


def keep_counts(shapes: dict[str, torch.Size], sparsity: float, rates: str) -> dict[str, int]:
    """Weights that each layer keeps at the rates `uniform` or `erk`; together exactly what `sparsity` leaves.

    Densities are the factor of RATES times one number, at most 1 and at least what a layer must keep: what is capped
    in one layer is made up for in the others. Fractions are rounded by largest remainder.
    """
    kept = kept_in_all(shapes, sparsity)
    size = {name: shape.numel() for name, shape in shapes.items()}
    weight = {name: RATES[rates](shape) * size[name] for name, shape in shapes.items()}
    low = least(shapes, kept)

    def at(factor: float) -> dict[str, float]:
        return {name: min(float(size[name]), max(float(low[name]), factor * weight[name])) for name in shapes}

    below, above = 0.0, max(size[name] / weight[name] for name in shapes)
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if sum(at(middle).values()) < kept else (below, middle)
    wanted = at(above)
    counts = {name: math.floor(value) for name, value in wanted.items()}
    order = sorted((name for name in shapes if counts[name] < size[name]), key=lambda n: counts[n] - wanted[n])
    for name in order[: kept - sum(counts.values())]:
        counts[name] += 1
    return counts


# masks


def _lowest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` smallest of a flat tensor are, of equal ones the first: bool."""
    if not count:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = values.kthvalue(count).values
    found = values < threshold
    ties = (values == threshold).nonzero().flatten()
    found[ties[: count - int(found.sum())]] = True
    return found


def choose(scores: Tensors, sparsity: float, rates: str = "global") -> Tensors:
    """The masks of a sparsity: exactly round(sparsity × weights) zeros over all layers.

    Args:
        scores: layer name → score.
        sparsity: share of all weights that becomes zero, in [0, 1).
        rates: global (one threshold), or a key of RATES.

    Raises:
        JobError: each layer can't keep what it must.
    """
    shapes = {name: s.shape for name, s in scores.items()}
    flat = {name: s.flatten() for name, s in scores.items()}
    if rates != "global":
        counts = keep_counts(shapes, sparsity, rates)
        return {name: (~_lowest(s, len(s) - counts[name])).view(shapes[name]) for name, s in flat.items()}
    kept = kept_in_all(shapes, sparsity)
    low = least(shapes, kept)
    held = {name: s.masked_fill(~_lowest(s, len(s) - low[name]), torch.inf) for name, s in flat.items()}
    values = torch.cat(list(held.values()))
    parts = (~_lowest(values, len(values) - kept)).split([len(s) for s in flat.values()])
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def n_m_mask(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Of each `m` neighbours along the input dimension, the `n` of largest score (of equal ones the first) stay.

    Groups run along the input channels, at each place of the kernel, as sparse tensor cores read them (2:4, arXiv
    2104.08378). Where their number is no multiple of m, the last r < m keep ceil(n·r/m).

    Args:
        score: of shape [out, in] or [out, in, h, w].
        n: 1 to m.
        m: 1 to in.

    Returns:
        bool of that shape.
    """
    rows = score.movedim(1, -1)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    whole = rows.shape[-1] // m * m
    for part, out in ((rows[..., :whole], mask[..., :whole]), (rows[..., whole:], mask[..., whole:])):
        if not part.shape[-1]:
            continue
        width = min(m, part.shape[-1])
        groups = part.unflatten(-1, (-1, width))
        first = groups.argsort(dim=-1, descending=True, stable=True)[..., : -(-n * width // m)]
        out.copy_(torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, first, True).flatten(-2))
    return mask.movedim(-1, 1).contiguous()
