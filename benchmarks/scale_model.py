"""Scaling on paper: what ResNet-50 on ImageNet would ask of 8, 64 and 512 GPUs, of raydeep's design as it is. Pure.

Part of scale.py; `python benchmarks/scale_model.py` prints the tables. A node has 8 GPUs; what is assumed stands in
Assumed, what was measured here in Measured. All-reduce is a ring: each of n members sends and receives 2(n-1)/n of the
bytes (NVIDIA's nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from raydeep.data import order
from raydeep.data.streamed import UNIT_BYTES

GPUS = (8, 64, 512)
NETWORKS_GBIT = (25, 100, 400)
PARTS = ("all-reduce on paper", "the rest on paper")
PICTURE_BYTES = 224 * 224 * 3  # decoded


class Assumed(NamedTuple):
    """What is taken from elsewhere."""

    parameters: int = 25_557_032  # torchvision's resnet50; 4.1 GMACs a picture
    images_s: float = 2470.0  # of one A100, mixed precision: NVIDIA DeepLearningExamples, PyTorch ResNet50 v1.5
    batch: int = 256  # of a GPU, there too
    backward: float = 2 / 3  # of a step's time: twice the multiplications of the forward pass
    node_gpus: int = 8
    nvlink_bytes_s: float = 200e9  # bus bandwidth of an all-reduce inside a node of A100s
    wire: float = 0.9  # of a network's nominal speed that an all-reduce reaches
    hop_s: float = 10e-6  # latency of a step of a ring between nodes
    bucket_bytes: int = 25 * 2**20  # DDP's default
    jpeg_bytes: int = 110_000  # of ImageNet: 140 GB over 1.28 M
    rows: int = 1_281_167
    group_bytes: int = 8 * 2**20  # of a row group: sharding.GROUP_BYTES
    window_bytes: int = 256 * 2**20  # data.window_bytes
    decode_share: float = (
        0.42  # of the decoded pictures a second below: 500×375 against Caltech (0.07 Mpx), fast.decode_plain
    )
    disk_bytes_s: float = 1e9  # that one task reads a row group with


class Measured(NamedTuple):
    """What was measured on the machine of the other tables."""

    decoded_s: float = 1390.0  # pictures a second and core, read, decoded and resized (ingest.json: 2,786 on two)
    unit_cpu_s: float = 0.004  # CPU seconds that Ray takes the consumer of a unit
    away: float = 0.2  # units that are fetched on another node than they are needed on
    order_s: float = 0.083  # seconds of an epoch that every worker plans, the same on all of them
    hop_s: float = 180e-6  # a step of gloo's ring of votes, between two processes of one machine


def ring_s(size: float, members: int, bytes_s: float, hop_s: float = 0.0) -> float:
    """Seconds of a ring all-reduce of `size` bytes: 2(n-1) steps of size/n each."""
    return 2 * (members - 1) * (size / members / bytes_s + hop_s)


def all_reduce_s(size: float, gpus: int, net_bytes_s: float, a: Assumed) -> float:
    """Seconds of an all-reduce in two levels: scattered inside each node, rings between nodes, gathered inside.

    The rings of a node's GPUs share its network: together they send as much as one ring over the whole of it.
    """
    nodes = max(1, gpus // a.node_gpus)
    inside = ring_s(size, min(gpus, a.node_gpus), a.nvlink_bytes_s)
    return inside + (ring_s(size, nodes, net_bytes_s, a.hop_s * buckets(size, a)) if nodes > 1 else 0.0)


def buckets(size: float, a: Assumed) -> int:
    """In how many pieces DDP reduces."""
    return max(1, math.ceil(size / a.bucket_bytes))


def exposed_s(reduce_s: float, size: float, a: Assumed) -> float:
    """What the backward pass does not hide: it starts with the first bucket; the last one is reduced after it."""
    count = buckets(size, a)
    hidden = (1 - 1 / count) * a.backward * a.batch / a.images_s
    return max(reduce_s - hidden, reduce_s / count)


def efficiency(gpus: int, net_gbit: float, bytes_each: int, a: Assumed) -> float:
    """Share of the time that GPUs compute, if the all-reduce is all that holds them up."""
    size, step = a.parameters * bytes_each, a.batch / a.images_s
    reduce_s = all_reduce_s(size, gpus, net_gbit * 1e9 / 8 * a.wire, a)
    return step / (step + exposed_s(reduce_s, size, a))


def read_ratio(rows: int, group_rows: int, window_rows: int, batch: int, world: int, unit_rows: int) -> float:
    """Rows that a worker reads over those that it needs: a row group is read whole, once for each unit with rows of it.

    Counted over the first steps of an epoch of a few of the workers, with raydeep's own order and plan.
    """
    few = min(rows, max(4 * batch, 40 * world * unit_rows) // batch * batch)
    groups = np.full(-(-few // group_rows), group_rows)
    sequence = order.stream_order(0, 0, groups, window_rows, batch)
    read = needed = 0
    for rank in sorted({(2 * i + 1) * world // 16 for i in range(8)}):
        mine = [
            order.share(order.global_batch(sequence, step, batch), rank, world)
            for step in range(len(sequence) // batch)
        ]
        plan = order.fetch_plan(mine, groups, unit_rows)
        read += sum(len(np.unique(unit // group_rows)) for unit in plan.units) * group_rows
        needed += sum(map(len, plan.units))
    return read / needed


def units_ahead(world: int, a: Assumed) -> int:
    """Units that a worker has under way: as Streamed.read plans them, its share of a window and 2."""
    return 2 + math.ceil(a.window_bytes // PICTURE_BYTES / world / (UNIT_BYTES // PICTURE_BYTES))


def reduce_rows(a: Assumed = Assumed()) -> list[tuple[str, dict[str, str]]]:  # noqa: B008
    """GPUs and network → what the all-reduce costs."""
    out = []
    for gpus in GPUS:
        nodes = gpus // a.node_gpus
        for net in NETWORKS_GBIT if nodes > 1 else (None,):
            columns: dict[str, str] = {}
            for name, each in (("float32", 4), ("bf16", 2)):
                size = a.parameters * each
                reduce_s = all_reduce_s(size, gpus, (net or 1) * 1e9 / 8 * a.wire, a)
                columns |= {
                    f"{name}: MB a node sends": f"{2 * (nodes - 1) / nodes * size / 1e6:.0f}",
                    f"{name}: ms": f"{1e3 * reduce_s:.1f}",
                    f"{name}: ms not hidden": f"{1e3 * exposed_s(reduce_s, size, a):.1f}",
                    f"{name}: efficiency": f"{efficiency(gpus, net or 1, each, a):.0%}",
                }
            out.append((f"{gpus} GPUs, {net} Gb/s a node" if net else f"{gpus} GPUs, NVLink", columns))
    return out


def cost(gpus: int, a: Assumed = Assumed(), m: Measured = Measured()) -> dict[str, float]:  # noqa: B008
    """All the rest, if GPUs computed all the time."""
    nodes, unit_rows = gpus // a.node_gpus, UNIT_BYTES // PICTURE_BYTES
    images = a.images_s * a.node_gpus  # a second and node
    group_rows = a.group_bytes // a.jpeg_bytes
    ratio = read_ratio(a.rows, group_rows, a.window_bytes // PICTURE_BYTES, a.batch * gpus, gpus, unit_rows)
    decoded_s = m.decoded_s * a.decode_share
    ahead = units_ahead(gpus, a)
    unit_s = unit_rows / decoded_s + ratio * unit_rows * a.jpeg_bytes / a.disk_bytes_s
    epoch = a.rows / (a.images_s * gpus)
    return {
        "step, ms": 1e3 * a.batch / a.images_s,
        "pictures a second, all": images * nodes,
        "epoch, s": epoch,
        "steps an epoch": a.rows // (a.batch * gpus),
        "order of an epoch and its hash, on every worker, share of it": m.order_s / epoch,
        "JPEG needed, GB/s a node": images * a.jpeg_bytes / 1e9,
        "row groups read for one that is needed": ratio,
        "JPEG read from storage, GB/s in all": images * nodes * a.jpeg_bytes * ratio / 1e9,
        "cores that decode, a node": images / decoded_s,
        "units (tasks) a second, in all": images * nodes / unit_rows,
        "cores that Ray takes to hand units over, a node": images / unit_rows * m.unit_cpu_s,
        "decoded pixels between nodes, Gb/s a node": images * PICTURE_BYTES * 8 / 1e9 * (m.away if nodes > 1 else 0),
        "units under way, a worker": ahead,
        "pictures a second that so many allow a GPU": ahead * unit_rows / unit_s,
        "object store for them, GB a node": a.node_gpus * (ahead + 2) * UNIT_BYTES / 1e9,
        "resident copy instead, GB a node": a.rows * PICTURE_BYTES / 1e9,
        "checkpoint (weights, momentum), MB": 2 * 4 * a.parameters / 1e6,
        "votes (gloo ring of 12 bytes), ms a step": 1e3 * ring_s(12, gpus, 1e9, m.hop_s),
        "µs that a step of its ring may take before training waits": 1e6 * a.batch / a.images_s / (2 * (gpus - 1)),
        "files that watches write, a second": float(gpus),
    }


def cost_rows(a: Assumed = Assumed(), m: Measured = Measured()) -> list[tuple[str, dict[str, str]]]:  # noqa: B008
    """Quantity → its value at 8, 64 and 512 GPUs."""
    found = {gpus: cost(gpus, a, m) for gpus in GPUS}
    return [
        (name, {f"{gpus} GPUs": _shown(name, found[gpus][name]) for gpus in GPUS}) for name in found[GPUS[0]]
    ]  # fmt: skip


def _shown(name: str, value: float) -> str:
    if "share" in name:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2g}"


def rows(m: Measured) -> list[dict[str, Any]]:
    """The results for scale.py."""
    import harness

    a = Assumed()
    out = []
    for name, columns in reduce_rows(a):
        value = float(columns["float32: efficiency"].rstrip("%")) / 100
        out.append(harness.result(name, value, "efficiency, float32", part=PARTS[0], columns=columns))
    last = cost(GPUS[-1], a, m)
    for name, columns in cost_rows(a, m):
        out.append(harness.result(f"{name}", last[name], "at 512 GPUs", part=PARTS[1], columns=columns))
    return out


def main() -> None:
    """Print the tables."""
    for table in (reduce_rows(), cost_rows()):
        print(*(["", *table[0][1]]), sep=" | ")
        for name, columns in table:
            print(name, *columns.values(), sep=" | ")
        print()


if __name__ == "__main__":
    main()
