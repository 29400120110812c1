"""Scaling, the data: what planning an epoch costs each worker, and what Ray's tasks cost a unit of pictures.

Part of scale.py. Planning is raydeep's own functions, as Batches and Streamed compose them, for one worker of many;
the engine of the streams is the real one, on a fetch that sleeps as long as the decoding of a unit would take.
"""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
from scale_raylets import CPUS, raylets

from raydeep.data import fast, order
from raydeep.data.streamed import UNIT_BYTES, Streamed

BATCH = 4096  # global
GROUP_ROWS = 76  # of a row group of 110 KB pictures: sharding.GROUP_BYTES
PICTURE = (224, 224, 3)
WINDOW_BYTES = 256 * 2**20  # data.window_bytes
UNIT_PICTURES = UNIT_BYTES // int(np.prod(PICTURE))
SETS = {"60,000": 60_000, "1.28 M": 1_281_167, "14.2 M": 14_197_122}  # Fashion-MNIST, ImageNet-1k, all of ImageNet
DECODED_A_S = 1_390.0  # pictures a core decodes in a stream: 2,786 on two (ingest.json)


class Planned(NamedTuple):
    """What one worker computes before an epoch."""

    sequence: Callable[[], np.ndarray]  # the order of all rows
    hashed: Callable[[], str]  # its name
    mine: Callable[[], list[np.ndarray]]  # this worker's share of each global batch
    fetch: Callable[[], list[Any]]  # the units that it reads (streamed only)


def planned(rows: int, world: int, streamed: bool) -> Planned:
    """The steps of the planning of rank 0; the same functions, in the same order, as in Batches and Streamed."""
    labels = np.zeros(rows, np.int64)
    groups = [(0, g, np.arange(min(GROUP_ROWS, rows - g * GROUP_ROWS))) for g in range(-(-rows // GROUP_ROWS))]
    form = fast.Format("encoded", PICTURE[:2], PICTURE, None)
    with tempfile.NamedTemporaryFile() as file:
        split = Streamed([file.name], groups, labels, form, window_bytes=WINDOW_BYTES)
    sequence = split.order(0, 0, BATCH) if streamed else order.epoch_order(0, 0, rows)
    steps = order.steps_per_epoch(rows, BATCH)

    def mine() -> list[np.ndarray]:
        return [order.share(order.global_batch(sequence, step, BATCH), 0, world) for step in range(steps)]

    def fetch() -> list[Any]:
        if not streamed:
            return []
        plan = order.fetch_plan(shares, split.sizes, split.unit_rows)
        return [split.unit(unit) for unit in plan.units]

    shares = mine()
    return Planned(
        (lambda: split.order(0, 0, BATCH)) if streamed else (lambda: order.epoch_order(0, 0, rows)),
        lambda: order.order_hash(sequence, BATCH), mine, fetch,
    )  # fmt: skip


def peak_mb(call: Callable[[], Any]) -> float:
    """Largest memory that a call takes beside what is there, in MB."""
    gc.collect()
    tracemalloc.start()
    kept = call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return peak / 1e6


def plan_rows(sets: Sequence[str], worlds: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each dataset, kind and number of workers."""
    for name in sets:
        for streamed in (False, True):
            for world in worlds:
                steps = planned(SETS[name], world, streamed)
                timed = harness.interleaved(dict(steps._asdict()), rounds)
                # `_mine` runs twice an epoch in Batches: for the reader and for the loop
                total = harness.Timing([
                    sum(t.seconds[i] * (2 if part == "mine" else 1) for part, t in timed.items()) for i in range(rounds)
                ])  # fmt: skip
                everyone = timed["sequence"].median_s + timed["hashed"].median_s
                peak = max(peak_mb(call) for call in (steps.sequence, steps.fetch))
                kind = "streamed" if streamed else "resident"
                yield harness.result(
                    f"{name} rows, {kind}, {world} worker{'s' * (world > 1)}", total.median_s, "s an epoch",
                    spread=total.spread, n=rounds, part="plan",
                    columns={
                        "s an epoch, each worker": f"{total.median_s:.3g} ± {total.spread:.0%}",
                        "order of all rows": f"{timed['sequence'].median_s:.3g}",
                        "its hash": f"{timed['hashed'].median_s:.3g}",
                        "own shares, twice": f"{2 * timed['mine'].median_s:.3g}",
                        "own units": f"{timed['fetch'].median_s:.3g}" if streamed else "",
                        "the same on every worker": f"{min(1.0, everyone / total.median_s):.0%}",
                        "peak, MB": f"{peak:.0f}",
                    },
                    peak_mb=peak, everyone_s=everyone,
                )  # fmt: skip


# streaming


class Pulled(NamedTuple):
    """What one consumer of a stream saw."""

    seconds: float
    cpu: float
    away: int  # units that another node fetched
    bytes: int


def consumer(units: int, ahead: int, sleep_s: float, pixels: int) -> Callable[[], Pulled]:
    """Pulls units through raydeep.data.stream.engine; the fetch sleeps, and gives so many bytes.

    Made of closures, so that Ray's workers need not find this file.
    """

    def pull() -> Pulled:
        import ray

        from raydeep.data import stream

        def fetch(unit: Any, form: Any) -> Any:
            time.sleep(sleep_s)
            node = ray.get_runtime_context().get_node_id()
            return fast.Block(np.zeros(pixels, np.uint8), float(int(node[:8], 16)), 0.0)  # read_s: who fetched it

        stream._fetch = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy=stream.OUTSIDE)(fetch)
        here = float(int(ray.get_runtime_context().get_node_id()[:8], 16))
        for _ in stream.engine([[]] * ahead, None, ahead):  # type: ignore[arg-type]  # workers start
            pass
        start, cpu = time.time(), time.process_time()
        blocks = [block.read_s for block in stream.engine([[]] * units, None, ahead)]  # type: ignore[arg-type]
        away = sum(node != here for node in blocks)
        return Pulled(time.time() - start, time.process_time() - cpu, away, pixels * units)

    return pull


def streamed(nodes: int, units: int, ahead: int, sleep_s: float, pixels: int) -> list[Pulled]:
    """One consumer on each node of the cluster of RAY_ADDRESS, all at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    work = ray.remote(consumer(units, ahead, sleep_s, pixels))
    there = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    assert len(there) == nodes, f"{len(there)} of {nodes} nodes"
    return [
        Pulled(*found)
        for found in ray.get([work.options(num_cpus=0, scheduling_strategy=On(n, soft=False)).remote() for n in there])
    ]


def stream_rows(nodes: Sequence[int], rounds: int, units: int) -> Iterator[dict[str, Any]]:
    """A row for each number of nodes, with results of no size and of a unit's."""
    sleep_s = UNIT_PICTURES / DECODED_A_S
    for count in nodes:
        with raylets(count):
            import ray  # reads the token's place when it is imported

            on_term = signal.getsignal(signal.SIGTERM)
            ray.init(log_to_driver=False, logging_level="ERROR")
            signal.signal(signal.SIGTERM, on_term)  # ray.init has put its own in place
            try:
                for pixels, much in ((0, units), (UNIT_BYTES, max(4, units // 4))):
                    found = [streamed(count, much, 2 * CPUS, sleep_s, pixels) for _ in range(rounds)]
                    yield _stream_row(count, found, much, sleep_s, pixels)
            finally:
                ray.shutdown()


def _stream_row(nodes: int, found: list[list[Pulled]], units: int, sleep_s: float, pixels: int) -> dict[str, Any]:
    rates = harness.Timing([nodes * units / max(p.seconds for p in pulled) for pulled in found])
    ideal = nodes * CPUS / sleep_s
    every = [p for pulled in found for p in pulled]
    cpu, away = sum(p.cpu for p in every) / (len(every) * units), sum(p.away for p in every) / (len(every) * units)
    size = f"units of {pixels >> 20} MiB" if pixels else "empty units"
    return harness.result(
        f"{nodes} node{'s' * (nodes > 1)}, {size}", rates.median_s, "units/s", spread=rates.spread, n=len(found),
        part="stream",
        columns={
            "units/s": f"{rates.median_s:.3g} ± {rates.spread:.0%}", "ideal": f"{ideal:.3g}",
            "efficiency": f"{rates.median_s / ideal:.0%}", "consumer, CPU ms a unit": f"{1e3 * cpu:.2f}",
            "fetched on another node": f"{away:.0%}",
        },
        nodes=nodes, cpu_s=cpu, away=away,
    )  # fmt: skip


# files that are looked at or written all the time


def file_rows(rounds: int) -> Iterator[dict[str, Any]]:
    """What the driver's looks at metrics.jsonl cost it, and a worker's line of its whereabouts, on this disk."""
    from raydeep.disk import read_lines, write_json

    where = {"rank": 1, "node": "n", "pid": 1, "stage": "computes", "step": 1, "idle_s": 0.1, "time": 1.5}
    meter = dict.fromkeys(("wait", "read", "decode", "transfer", "augment", "step"), 0.123456789)
    epoch = {
        "stage": "train",
        "epoch": 1,
        "epochs": 1000,
        "train_loss": 0.123456789,
        "val_accuracy": 0.9,
        "meter": meter,
    }
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        calls = {"a worker's whereabouts, written": (lambda: write_json(folder / "rank-1.json", where), "each second")}
        for lines in (90, 1000):
            file = folder / f"metrics-{lines}.jsonl"
            file.write_text("".join(json.dumps(epoch) + "\n" for _ in range(lines)))
            calls[f"metrics.jsonl of {lines} epochs, looked at"] = (partial(read_lines, file), "4 times a second")
        timed = harness.interleaved({name: call for name, (call, _) in calls.items()}, rounds)
    for name, found in timed.items():
        yield harness.result(
            name, found.median_s * 1e3, "ms", spread=found.spread, n=rounds, part="files",
            columns={"ms": f"{1e3 * found.median_s:.2g} ± {found.spread:.0%}", "how often": calls[name][1]},
        )  # fmt: skip


# votes

VOTES = """
import sys, time
import torch, torch.distributed as dist
rank, world, steps = map(int, sys.argv[2:])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=world)
seconds = []
for _ in range(steps + 20):
    start = time.perf_counter()
    dist.all_reduce(torch.zeros(3, dtype=torch.int32))
    seconds.append(time.perf_counter() - start)
dist.barrier()
if rank == 0:
    print(*seconds[20:])
dist.destroy_process_group()
"""


def vote_rows(worlds: Sequence[int], steps: int) -> Iterator[dict[str, Any]]:
    """The all-reduce that Votes.cast begins each step, among processes of this machine."""
    for world in worlds:
        with tempfile.TemporaryDirectory() as home:
            started = [
                subprocess.Popen(
                    [sys.executable, "-c", VOTES, f"{home}/store", str(rank), str(world), str(steps)],
                    stdout=subprocess.PIPE, text=True,
                )
                for rank in range(world)
            ]  # fmt: skip
            try:
                said, _ = started[0].communicate(timeout=120)
            finally:
                for process in started:
                    process.kill()
                    process.wait()
        timed = harness.Timing([float(word) for word in said.split()])
        hop_s = timed.median_s / (2 * (world - 1))
        yield harness.result(
            f"{world} processes", timed.median_s * 1e3, "ms", spread=timed.spread, n=len(timed.seconds), part="votes",
            hop_s=hop_s,
            columns={
                "ms": f"{1e3 * timed.median_s:.2f} ± {timed.spread:.0%}", "steps of the ring": str(2 * (world - 1)),
                "µs a step of it": f"{1e6 * hop_s:.0f}",
            },
        )  # fmt: skip
