"""8-bit grids of the tensors that no layer learned a step for: by least squared error on calibration pictures."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from raydeep.deploy import runtimes
from raydeep.deploy.integers import Grid, Place, Target

ROWS = 256  # pictures that are looked at, at most
BATCH = 16
VALUES = 1 << 14  # of a tensor that are looked at
SHARES = np.linspace(1, 0.4, 25)  # of the full range, tried in turn


def grids(model: onnx.ModelProto, places: list[Place], images: np.ndarray, target: Target) -> dict[str, Grid]:
    """The grid of every tensor of the places.

    A learned 8-bit grid is taken where there is one; of several, the one of least error.

    Args:
        model: the float graph.
        places: see integers.places.
        images: uint8 NHWC.
        target: gpu needs grids symmetric about 0.
    """
    open_places = [p for p in places if settled(p) is None]
    seen = values(model, [p.tensors[0] for p in open_places], images) if open_places else {}
    found: dict[str, Grid] = {}
    for place in places:
        grid = settled(place)
        if grid is None:
            learned = [g for g in place.learned if g.bits == 8]
            sample = seen[place.tensors[0]]
            grid = min(learned, key=lambda g: g.error(sample)) if learned else best(sample, target == "gpu")
        found |= dict.fromkeys(place.tensors, grid)
    return found


def settled(place: Place) -> Grid | None:
    """The grid of a place that needs no pictures."""
    eight = {g for g in place.learned if g.bits == 8}
    if len(eight) == 1:
        return next(iter(eight))
    return place.learned[0] if place.only_learned and len(set(place.learned)) == 1 else None


def values(model: onnx.ModelProto, tensors: list[str], images: np.ndarray) -> dict[str, np.ndarray]:
    """A sample of the values of tensors, flat float32; smallest and largest are never sampled away."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    opened.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors)
    session = runtimes.session(opened.SerializeToString())
    images = images[:ROWS]
    batches = np.array_split(images, -(-len(images) // BATCH))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in tensors}
    for batch in batches:
        for name, out in zip(tensors, session.run(tensors, {"images": batch}), strict=True):
            flat = out.ravel()
            stride = max(1, len(batches) * len(flat) // VALUES) | 1  # odd: no multiple of a row's length
            parts[name] += [flat[::stride], np.array([flat.min(), flat.max()])]
    return {name: np.concatenate(found) for name, found in parts.items()}


def best(sample: np.ndarray, symmetric: bool = False) -> Grid:
    """The 8-bit grid of least squared error, from 0 on where nothing is negative."""
    low, high = min(0.0, float(sample.min())), max(0.0, float(sample.max()))
    if symmetric and low < 0:
        low, high = -max(high, -low), max(high, -low)
    if high == low:
        high = 1.0
    tried = []
    for share in SHARES:
        step = max((high - low) * float(share) / 255, 1e-9)
        tried.append(Grid(step, -128 if symmetric and low < 0 else max(-255, round(low * float(share) / step))))
    return min(tried, key=lambda grid: grid.error(sample))
